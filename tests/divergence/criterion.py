"""How accurate a row kernel must be, whichever language it is in. N tokens, V vocabulary.

Element by element: the error against fp64 is at most that of the same formula in eager PyTorch in the same dtype, plus
an absolute term. Eager's error at one element may happen to be nil, so the term is what fp32 arithmetic itself commits:
every logit enters rounded to fp32 relative to its distance R from the row's largest, R·2⁻²³, and the result is rounded
once to the output's dtype. A gradient element is q·(…): its term carries q for the bracket's rounding, and R·2⁻²³ of
the element itself for that of q = 2^u, whose relative error is u's absolute one.
"""

import oracle
import torch
from torch import Tensor

from effopd_kernels.divergence import FORWARD_KL, REVERSE_KL, jsd, skew_forward_kl, skew_reverse_kl

MEMBERS = {  # by the names of oracle.FAMILY
    "reverse": REVERSE_KL,
    "forward": FORWARD_KL,
    "jsd(0.3)": jsd(0.3),
    "skew_forward(0.1)": skew_forward_kl(0.1),
    "skew_reverse(0.1)": skew_reverse_kl(0.1),
}
PLAIN = (1.0, 1.0, 1.0, 1.0, 0.0, 0.0)  # temperatures, scales, soft caps: student, teacher
EPS = torch.finfo(torch.float32).eps


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
