"""Teachers known only in part: top-k log-probabilities, or the log-probability of the sampled token.

N tokens, V vocabulary, D hidden size, k known entries. Top-k: the vocabulary outside the k entries becomes one bucket,
on both sides, so that what is compared are two distributions over k + 1 outcomes. By the data-processing inequality
that divergence is at most the full one; it is never negative, but for rounding (of 1e-7); and at k = V, with no bucket,
it is the full one.
"""

from typing import Any

import torch
from torch import Tensor

from ..checks import check_float, readable, wide
from .arguments import answer, as_floats, check_num_valid, chunk_budget, gathered, make_spec, row_factor
from .autograd import reduced_loss
from .family import REVERSE_KL, Divergence, TopKSpec
from .linear import check_side, compute_dtype, run_linear_rows
from .linear_rows import held_in, may_keep
from .logits import as_rows, run_rows
from .ops import repeated_id


def _rows(*args):
    return run_rows("topk_rows", *args)


def _linear_rows(*args):
    return run_linear_rows("linear_topk_rows", *args)


def _check_ids(name: str, ids: Tensor, shape: torch.Size, device: torch.device) -> None:
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(ids).__name__}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32, got {ids.dtype}")
    if ids.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(ids.shape)}")
    if ids.device != device:
        raise ValueError(f"{name} is on {ids.device} but what it indexes on {device}")


def _check_range(name: str, ids: Tensor, V: int, hint: str = "") -> None:
    if readable(ids):  # where it is not, indexing out of bounds is an assertion on the device
        for found in map(int, ids.aminmax()):
            if not 0 <= found < V:
                raise ValueError(f"{name} must be token ids from 0 to {V - 1}, got {found}{hint}")


def _check_distinct(name: str, ids: Tensor, V: int) -> None:
    """ids (N, k) from 0 to V − 1, of int64; negative ones are none."""
    if readable(ids) and (twice := repeated_id(ids, V)) >= 0:
        raise ValueError(f"{name} must all be different within a token, got {twice} more than once in one")


def _check_mass(logprobs: Tensor) -> None:
    if readable(logprobs):
        mass = logprobs.detach().float().logsumexp(-1).exp().amax().item()
        if mass > 1.05:  # rounded to bf16, those of an even distribution over up to 300,000 tokens add up to 1.032
            raise ValueError(
                f"teacher_logprobs must be log-probabilities under the full distribution, got a token whose add up to "
                f"a probability of {mass:.3g}"
            )


def topk_divergence_loss(
    student: Tensor,
    teacher_logprobs: Tensor,
    teacher_ids: Tensor,
    divergence: Divergence = REVERSE_KL,
    *,
    student_weight: Tensor | None = None,
    student_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    tail: bool = True,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
    num_tokens: int | float | Tensor | None = None,
    return_stats: bool = False,
    chunk_bytes: int | None = None,
    num_valid: int | None = None,
) -> Any:
    """Divergence from a teacher of whom k log-probabilities per token are known, in fp32, or fp64 for an fp64 student.

    student: logits (..., V), or with student_weight (V, D) (and student_bias (V,)) hidden states (..., D), whose logits
        are then never held. teacher_logprobs, teacher_ids (..., k): log-probabilities under the teacher's full
        distribution, at whatever temperature it was asked at, and their token ids, all different within a token. Where
        fewer than k < V are known the log-probability is −inf, whatever the id: such an entry stands for no token.
        So are vLLM's lists filled up, which have the sampled token besides if it is not among the top k.
    tail: the rest of the vocabulary is one more outcome. False: both sides are renormalised over the k entries instead,
        of which a token then needs one.
    temperature: of the student. mask, weight, reduction, num_tokens, return_stats: as in `divergence_loss`; the stats
        are those of the k + 1 outcomes. chunk_bytes: as in `linear_divergence_loss`. A masked token may hold
        anything, in the student, the teacher and the ids.
    num_valid: as in `linear_divergence_loss`. Masked tokens cost nothing but, from logits, zeros in their gradient.

    The teacher's tail has the mass that the k leave, and at least 2⁻²⁴: fp32 log-probabilities know it no better.
    Raises ValueError or TypeError, before any work, for shapes, dtypes or options that do not fit, and on the CPU for
    ids out of range or twice in a token and log-probabilities of more than one in all.
    """
    student, student_weight, student_bias = map(gathered, (student, student_weight, student_bias))
    teacher_logprobs, teacher_ids = gathered(teacher_logprobs), gathered(teacher_ids)
    mask, weight, num_tokens = map(gathered, (mask, weight, num_tokens))
    head = {"student_weight": student_weight, "student_bias": student_bias}
    head = {name: tensor for name, tensor in head.items() if tensor is not None}
    check_float(student=student, teacher_logprobs=teacher_logprobs, **head)
    if student.ndim < 1 or teacher_logprobs.ndim < 1:
        raise ValueError(
            f"student and teacher_logprobs must be (..., V or D) and (..., k), got {tuple(student.shape)} and "
            f"{tuple(teacher_logprobs.shape)}"
        )
    if student_weight is not None:
        check_side("student_", student, student_weight, student_bias)
    shape = student.shape[:-1]
    V = student.shape[-1] if student_weight is None else student_weight.shape[0]
    if teacher_logprobs.shape[:-1] != shape or not 0 < teacher_logprobs.shape[-1] <= V:
        raise ValueError(
            f"teacher_logprobs must be {tuple(shape)} + (k,) with 0 < k <= {V}, got {tuple(teacher_logprobs.shape)}"
        )
    _check_ids("teacher_ids", teacher_ids, teacher_logprobs.shape, student.device)
    if student_weight is None and student_bias is not None:
        raise ValueError("student_bias belongs to the head of student_weight, got it without one")
    spec = make_spec(divergence, temperature, None, student_logit_scale, student_softcap=student_softcap)
    chunk_bytes = chunk_budget(chunk_bytes, student.device)
    mask_N, scale_N = row_factor(student, student, mask, weight, reduction, num_tokens)
    check_num_valid(mask_N, num_valid)
    tail = tail and teacher_logprobs.shape[-1] < V
    hint = "; what the student lacks has log-probability −inf"
    if student_weight is None:
        hint += "; if the student is hidden states, give student_weight too"
    ids, known = _known_entries(teacher_ids, teacher_logprobs, mask_N, V, tail, hint)
    known = known.to(wide(student))
    numbers = TopKSpec(*spec[:3], tail, spec.student_temperature, spec.student_scale, spec.student_softcap)
    if student_weight is None:
        run, rows, dtype, keep = _rows, as_rows(student), torch.float32, None
    else:
        run, dtype = _linear_rows, compute_dtype("student_", student, student_weight)
        rows = student.reshape(-1, student.shape[-1]), student_weight, student_bias
        numbers = (*numbers, dtype, chunk_bytes, num_valid)
        keep = may_keep(rows[0], num_valid, V, dtype, dtype, chunk_bytes) if reduction == "none" else None
        dtype = held_in(rows[0], dtype, dtype)
    loss, per_row, stats = reduced_loss(
        run,
        (*rows, ids, known, mask_N),
        numbers,
        scale_N,
        num_inputs=len(rows),
        per_row=reduction == "none",
        with_stats=return_stats,
        dtype=dtype,
        keep=keep,
    )
    return answer(loss, per_row, stats, shape, reduction, return_stats)


def _known_entries(
    ids: Tensor, logprobs: Tensor, mask_N: Tensor | None, V: int, tail: bool, hint: str
) -> tuple[Tensor, Tensor]:
    """ids (N, k) int64, −1 for an entry that is none, and the teacher's log-probabilities of these and, with a tail, of
    all others together, (N, k + tail). Raises ValueError, where it can look, for ids and log-probabilities that no
    teacher gives; `hint` is added to what is said of ids out of range.
    """
    k = ids.shape[-1]
    known, ids = (x.detach().reshape(-1, k) for x in (logprobs, ids))
    absent = known == -torch.inf if k < V else torch.zeros_like(ids, dtype=torch.bool)
    absent = absent if mask_N is None else absent | ~mask_N[:, None]
    if not tail and readable(absent):
        nothing = absent.all(-1) if mask_N is None else absent.all(-1) & mask_N
        if nothing.any():
            token = int(nothing.nonzero()[0])
            raise ValueError(f"without a tail every token that counts needs a known entry, got none in token {token}")
    _check_range("teacher_ids", ids.masked_fill(absent, 0), V, hint)
    _check_mass(known if mask_N is None else known.masked_fill(~mask_N[:, None], -torch.inf))
    ids = ids.long().masked_fill(absent, -1)
    _check_distinct("teacher_ids", ids, V)
    if tail:
        known = known.double()
        rest = (-torch.expm1(known.logsumexp(-1, keepdim=True))).clamp(min=2.0**-24)
        known = torch.cat([known, rest.log()], -1)
    return ids, known


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    return_entropy: bool = False,
    chunk_bytes: int | None = None,
    num_valid: int | None = None,
) -> Any:
    """Log-probabilities (...) of the tokens ids (...), from hidden (..., D) and weight (V, D), without N×V logits; in
    fp32, or fp64 for fp64.

    mask, chunk_bytes, num_valid: as in `linear_divergence_loss`; the log-probability is 0 where masked, whatever the
        hidden state and the id (as −100) are there.
    return_entropy: return (log-probabilities, entropy), from the same pass: that of each token's whole distribution, at
        the same temperature, in nats, of the same shape and dtype, detached, 0 where masked.

    Differentiable in hidden, weight and bias. Where one of the latter is trained, the gradients of all logits are kept
    for backward if chunk_bytes holds them, else (and always in fp16) it projects again: four GEMM units of 2·N·V·D
    operations instead of three.
    Raises ValueError or TypeError for shapes, dtypes or ids that do not fit.
    """
    hidden, weight, bias, ids, mask = map(gathered, (hidden, weight, bias, ids, mask))
    check_float(hidden=hidden, weight=weight, **({} if bias is None else {"bias": bias}))
    _check_ids("ids", ids, hidden.shape[:-1], hidden.device)
    check_side("", hidden, weight, bias)
    mask_N, _ = row_factor(hidden, hidden, mask, None, "none", None)
    check_num_valid(mask_N, num_valid)
    ids = ids.long().reshape(-1, 1)
    ids = ids if mask_N is None else ids.masked_fill(~mask_N[:, None], 0)
    _check_range("ids", ids, weight.shape[0], "; mask what is no token" if mask_N is None else "")
    transform = as_floats(temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    chunk_bytes = chunk_budget(chunk_bytes, hidden.device)
    dtype = compute_dtype("", hidden, weight)
    numbers = (0.0, 0.0, 1.0, True, *transform, dtype, chunk_bytes, num_valid)
    tensors = (hidden.reshape(-1, hidden.shape[-1]), weight, bias, ids, None, mask_N)
    keep = may_keep(tensors[0], num_valid, weight.shape[0], dtype, dtype, chunk_bytes)
    rows, _, stats = reduced_loss(
        _linear_rows,
        tensors,
        numbers,
        None,
        num_inputs=3,
        per_row=True,
        with_stats=return_entropy,
        dtype=dtype,
        keep=keep,
    )
    rows = rows.reshape(hidden.shape[:-1])
    return (rows, stats[0].reshape(rows.shape)) if return_entropy else rows


def sampled_kl(student_logprobs: Tensor, teacher_logprobs: Tensor, estimator: str = "k2") -> Tensor:
    """Per-token estimates of KL(student ‖ teacher) at tokens sampled from the student, of the inputs' shape.

    With d = log q − log p (J. Schulman, "Approximating KL divergence", 2020):
    "k2" is d²/2, biased, never negative, and its gradient is an unbiased estimate of the divergence's: the loss.
    "k1" is d, unbiased, of high variance and either sign; its gradient is zero on average: a reward, once negated.
    "k3" is e^(−d) − 1 + d, unbiased and never negative: a statistic. Its gradient estimates that of
        KL(teacher ‖ student), and it overflows where the teacher's log-probability is 88 above the student's.
    The teacher is a constant. A sampled token has a finite log-probability under the student; at −inf on both sides the
    estimates are NaN.
    Raises ValueError or TypeError for inputs that do not fit each other, or another estimator.
    """
    check_float(student_logprobs=student_logprobs, teacher_logprobs=teacher_logprobs)
    if student_logprobs.shape != teacher_logprobs.shape:
        raise ValueError(
            f"log-probabilities differ in shape: {tuple(student_logprobs.shape)}, {tuple(teacher_logprobs.shape)}"
        )
    d = student_logprobs.to(wide(student_logprobs)) - teacher_logprobs.detach()
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d.square() / 2
    if estimator == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f'estimator must be "k1", "k2" or "k3", got {estimator!r}')
