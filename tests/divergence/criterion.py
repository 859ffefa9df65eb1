"""How accurate a row kernel must be, whichever language it is in. N tokens, V vocabulary.

Element by element: the error against fp64 is at most that of the same formula in eager PyTorch in the same dtype, plus
an absolute term. Eager's error at one element may happen to be nil, so the term is what fp32 arithmetic itself commits:
every logit enters rounded to fp32 relative to its distance R from the row's largest, R·2⁻²³, and the result is rounded
once to the output's dtype. A gradient element is q·(…): its term carries q for the bracket's rounding, and R·2⁻²³ of
the element itself for that of q = 2^u, whose relative error is u's absolute one.
"""

from dataclasses import astuple

import oracle
import torch
from torch import Tensor

from effopd_kernels.divergence import FORWARD_KL, REVERSE_KL, jsd, skew_forward_kl, skew_reverse_kl
from effopd_kernels.divergence.family import Spec, TopKSpec

MEMBERS = {  # by the names of oracle.FAMILY
    "reverse": REVERSE_KL,
    "forward": FORWARD_KL,
    "jsd(0.3)": jsd(0.3),
    "skew_forward(0.1)": skew_forward_kl(0.1),
    "skew_reverse(0.1)": skew_reverse_kl(0.1),
}
PLAIN = (1.0, 1.0, 1.0, 1.0, 0.0, 0.0)  # temperatures, scales, soft caps: student, teacher
TOPK_PLAIN = (1.0, 1.0, 0.0)  # temperature, scale, soft cap
EPS = torch.finfo(torch.float32).eps


def spec(member: str, knobs=PLAIN) -> Spec:
    return Spec(*astuple(MEMBERS[member]), *knobs)


def topk_spec(member: str | None, tail: bool = True, knobs=TOPK_PLAIN) -> TopKSpec:
    return TopKSpec(*astuple(MEMBERS[member or "reverse"]), tail, *knobs)


def definition(
    member: str, student: Tensor, teacher: Tensor, knobs=PLAIN, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    """((N,) value, gradient) by autograd from the oracle; in a narrow dtype, what a user writes in eager PyTorch."""
    t_s, t_t, c_s, c_t, cap_s, cap_t = knobs
    V = min(student.shape[1], teacher.shape[1])
    log_p = oracle.log_probs(teacher[:, :V].to(dtype), t_t, c_t, cap_t)
    return oracle.value_and_grad(
        lambda x: oracle.FAMILY[member](oracle.log_probs(x[:, :V], t_s, c_s, cap_s), log_p), student, dtype=dtype
    )


def assert_accurate(found: tuple[Tensor, Tensor, Tensor], member: str, student: Tensor, teacher: Tensor, knobs=PLAIN):
    """`found` is the (loss, gradient, stats) that a kernel made of these logits."""
    loss, grad, stats = found
    t_s, t_t, c_s, c_t, cap_s, cap_t = knobs
    V = min(student.shape[1], teacher.shape[1])
    true_loss, true_grad = definition(member, student, teacher, knobs)
    eager_dtype = torch.promote_types(student.dtype, teacher.dtype)
    eager_loss, eager_grad = definition(member, student, teacher, knobs, eager_dtype)

    sides = (student[:, :V], t_s, c_s, cap_s), (teacher[:, :V], t_t, c_t, cap_t)
    log_q, log_p = (oracle.log_probs(x.double(), *side) for x, *side in sides)
    weight = log_q.exp() + log_p.exp()
    depth = -torch.minimum(log_q, log_p)  # R of the larger of the two sides
    mean_depth = (weight * depth).sum(-1) + 1
    # four roundings of numbers of size R: (x − top), ·c, u − v, and the product with 2^u
    loss_term = 4 * EPS * mean_depth
    _within(loss, true_loss, eager_loss, loss_term)

    chain = abs(c_s) / t_s
    term = torch.zeros_like(true_grad)
    term[:, :V] = 4 * EPS * chain * weight * (depth + mean_depth[:, None]) + 2 * EPS * depth * true_grad[:, :V].abs()
    term[:, :V] += 2.0**-124 * chain * (depth + mean_depth[:, None])  # 2^u is flushed to 0 below 2⁻¹²⁵
    term += torch.finfo(student.dtype).eps * true_grad.abs() + torch.finfo(student.dtype).smallest_normal
    _within(grad, true_grad, eager_grad, term)
    assert (grad[:, V:] == 0).all()

    for entropy, log, (x, *side) in zip(stats, (log_q, log_p), sides, strict=False):
        _within(entropy, oracle.entropy(log), oracle.entropy(oracle.log_probs(x, *side)), loss_term)
    assert torch.equal(stats[2] == 1, log_q.argmax(-1) == log_p.argmax(-1))


def assert_sharp(found: tuple[Tensor, ...], member: str, student: Tensor, teacher: Tensor) -> None:
    """Of a mixture of fp32 logits that agree to 1e-2: Σ a·p·(lp − lm) + b·q·(lq − lm), as it is usually written, has
    lost its third digit there."""
    true, usual = (definition(member, student, teacher, dtype=dtype) for dtype in (torch.float64, torch.float32))
    (loss, grad), (usual_loss, usual_grad) = (
        [((x.double() - t).norm() / t.norm()).item() for x, t in zip(values, true, strict=False)]
        for values in (found[:2], usual)
    )
    assert usual_loss > 1e-3 and loss < 1e-4
    assert grad < min(usual_grad, 4e-5)


def _within(found: Tensor, true: Tensor, eager: Tensor, term: Tensor) -> None:
    error, allowed = (found.double() - true).abs(), (eager.double() - true).abs() + term
    assert (error <= allowed).all(), (error / allowed).max()


def in_buckets(log_q: Tensor, ids: Tensor, tail: bool) -> Tensor:
    """Log-probabilities (N, V) as those of the entries `ids` (N, k), a negative one is none, and with a tail of all
    others together (N, k + 1); without one, of the k alone.
    """
    known = log_q.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf)
    if not tail:
        return torch.log_softmax(known, 1)
    places = torch.where(ids < 0, log_q.shape[1], ids)
    is_known = torch.zeros(len(ids), log_q.shape[1] + 1, dtype=torch.bool, device=ids.device).scatter(1, places, True)
    return torch.cat([known, log_q.masked_fill(is_known[:, :-1], -torch.inf).logsumexp(1, keepdim=True)], 1)


def assert_topk_accurate(found, member: str | None, student, ids, known, tail=True, knobs=TOPK_PLAIN) -> None:
    """`found` is the (loss, gradient) that a kernel made of these logits and the teacher's log-probabilities of the
    buckets. member None: the loss is the log-probability of ids (N, 1).

    The terms are those of `assert_accurate`, for the buckets: each logit enters relative to the row's largest bucket,
    and what is compared are numbers of the size of the buckets' log-probabilities on both sides.
    """
    temperature, scale, softcap = knobs

    def definition(dtype):
        def value(x):
            log_q = in_buckets(oracle.log_probs(x, temperature, scale, softcap), ids, tail)
            if member is None:
                return log_q[:, 0]
            log_q = torch.where(log_q == -torch.inf, oracle.LOG_FLOOR, log_q)
            log_p = known.to(dtype) if tail else torch.log_softmax(known.to(dtype), 1)
            return oracle.FAMILY[member](log_q, torch.where(log_p == -torch.inf, oracle.LOG_FLOOR, log_p))

        return oracle.value_and_grad(value, student, dtype=dtype)

    loss, grad = found
    (true_loss, true_grad), (eager_loss, eager_grad) = map(definition, (torch.float64, torch.float32))
    log_q = oracle.log_probs(student.double(), temperature, scale, softcap)
    sides = [in_buckets(log_q, ids, tail)] + ([] if known is None else [known.double()])
    depth = sum(-x.masked_fill(x == -torch.inf, 0) for x in sides).amax(1)
    _within(loss, true_loss, eager_loss, 4 * EPS * (depth + 1))
    k, tail_q = ids.shape[1], sides[0][:, -1:]

    def on_logits(side):
        """What a distribution over the buckets puts on each logit, the tail shared out as the student does."""
        p = side.exp()
        known = torch.zeros_like(log_q).scatter_add(1, ids.clamp(min=0), torch.where(ids < 0, 0.0, p[:, :k]))
        return known + p[:, k:] * (log_q - tail_q).clamp(max=0).exp() if tail else known

    share = sum(map(on_logits, sides))
    term = 4 * EPS * abs(scale) / temperature * share * (depth[:, None] - log_q.clamp(min=-1e4) + 1)
    term += torch.finfo(student.dtype).eps * true_grad.abs() + torch.finfo(student.dtype).smallest_normal
    term += 2.0**-120 * abs(scale) / temperature * depth[:, None]
    _within(grad, true_grad, eager_grad, term)


def assert_entropy_accurate(stats: Tensor, student: Tensor, knobs=TOPK_PLAIN) -> None:
    """stats (3, N) that came with log-probabilities of tokens, of these logits. The term is that of a divergence."""
    log_q = oracle.log_probs(student.double(), *knobs)
    mean_depth = -(log_q.exp() * log_q.clamp(min=-1e4)).sum(-1) + 1
    eager = oracle.entropy(oracle.log_probs(student.float(), *knobs))
    _within(stats[0], oracle.entropy(log_q), eager, 4 * EPS * mean_depth)
    assert not stats[1:].any()
