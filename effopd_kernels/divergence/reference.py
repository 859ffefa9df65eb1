"""The definition, in plain PyTorch: readable first, exact in fp64, and the fallback that runs on any device.

N tokens, V vocabulary. With lq, lp the student's and teacher's log-probabilities and m = π·p + (1−π)·q:

    phi   = a·p·(lp − lm) + b·q·(lq − lm) − κ·(p − q)   D = Σ phi,   κ = a·(1−π) − b·π
    share = (1−π)·q/m                                   in [0, 1]
    w     = b·q·(lq − lm) − κ·share·(p − q)             dD/dz_s = w − q·Σw

Near the teacher nothing large cancels: of the forms that phi and w can take, as Σp = Σq and w is determined up to a
multiple of q, these vanish with p − q, phi in second order, so that rounding of the normalisers does not show; and m is
taken over the larger of p and q, as π + (1−π)·q/p or (1−π) + π·p/q, to whose logarithm what rounding took from
(1−π)·(q/p − 1) or π·(p/q − 1) is added.

An entry at −inf on both sides is outside the support: it adds nothing and its gradient is 0. Where one side alone is
−inf its log-probability counts as FLOOR, so the value is large but finite, and so is the gradient.
"""

import math

import torch
from torch import Tensor

from ..checks import wide
from .family import Spec, TopKSpec

FLOOR = -1e4


def _transform(logits: Tensor, temperature: float, scale: float, softcap: float) -> tuple[Tensor, Tensor | float]:
    """z = softcap·tanh(scale·x/softcap) / temperature (softcap 0: none), up to a shift of the row, and dz/dx.
    Uncapped, x comes relative to the row's largest: a product rounds by its own size, and softmax would subtract the
    largest only after that."""
    if not softcap:
        return (logits - logits.amax(-1, keepdim=True)) * (scale / temperature), scale / temperature
    tanh = torch.tanh(logits * (scale / softcap))
    return tanh * (softcap / temperature), (1 - tanh.square()) * (scale / temperature)


def _log_probs(z: Tensor) -> Tensor:
    log_probs = torch.log_softmax(z, -1)
    return log_probs.masked_fill(log_probs == -math.inf, FLOOR)


def divergence_rows(
    student_NV: Tensor,
    teacher_NV: Tensor,
    mask_N: Tensor | None,
    row_scale_N: Tensor | None,
    spec: Spec,
    with_grad: bool = True,
    with_stats: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Per-row divergence (N,) fp32 (fp64 for fp64 logits), row_scale·dD/dstudent (N, Vs) in the student's dtype, and
    stats (3, N): student entropy, teacher entropy, top-1 agreement. All three are 0 in masked rows."""
    a, b, pi, *_ = spec
    V = min(student_NV.shape[-1], teacher_NV.shape[-1])  # both are renormalised over the shared prefix
    dtype = wide(student_NV, teacher_NV)
    student, teacher = student_NV[:, :V].to(dtype), teacher_NV[:, :V].to(dtype)
    if mask_N is not None:  # whatever masked rows hold, NaN included, must not leak
        student = student.masked_fill(~mask_N[:, None], 0)
        teacher = teacher.masked_fill(~mask_N[:, None], 0)
    z_s, slope = _transform(student, spec.student_temperature, spec.student_scale, spec.student_softcap)
    z_t, _ = _transform(teacher, spec.teacher_temperature, spec.teacher_scale, spec.teacher_softcap)
    lq, lp = _log_probs(z_s), _log_probs(z_t)
    q, p, d = lq.exp(), lp.exp(), lp - lq
    less = torch.expm1(-d.abs())  # the smaller of p and q over the larger, minus 1
    if pi == 1:
        lq_lm, lp_lm, share = -d, 0.0, 0.0
    elif pi == 0:
        lq_lm, lp_lm, share = 0.0, d, 1.0
    else:
        of_smaller = torch.where(d > 0, d.new_full((), 1 - pi), d.new_full((), pi))
        of_larger = torch.where(d > 0, d.new_full((), pi), d.new_full((), 1 - pi))
        m = of_larger + of_smaller * torch.exp(-d.abs())  # over the larger of p and q
        larger = m.log() + (of_smaller * less - (m - 1))
        lq_lm, lp_lm = -larger - d.clamp_min(0), -larger + d.clamp_max(0)
        share = (1 - pi) * lq_lm.exp()

    kappa, difference = a * (1 - pi) - b * pi, torch.where(d > 0, -p, q) * less  # of p − q
    b_term = b * q * lq_lm
    loss = (a * p * lp_lm + b_term - kappa * difference).sum(-1)
    kept = 1.0 if mask_N is None else mask_N.to(loss.dtype)
    grad = stats = None
    if with_grad:
        w = b_term - kappa * share * difference
        row_scale = kept if row_scale_N is None else _of_those(mask_N, row_scale_N)
        dz = (w - q * w.sum(-1, keepdim=True)) * slope
        grad = torch.zeros_like(student_NV)
        grad[:, :V] = dz * row_scale[:, None] if isinstance(row_scale, Tensor) else dz
    if with_stats:
        same = (z_s.argmax(-1) == z_t.argmax(-1)).to(loss.dtype)
        stats = torch.stack([-(q * lq).sum(-1), -(p * lp).sum(-1), same]) * kept
    return loss * kept, grad, stats


def topk_rows(
    logits_NV: Tensor,
    ids_Nk: Tensor,
    known: Tensor | None,
    mask_N: Tensor | None,
    row_scale_N: Tensor | None,
    spec: TopKSpec,
    with_grad: bool = True,
    with_stats: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `divergence_rows`, of the vocabulary in buckets: the k entries `ids`, of which a negative one is none, and
    with a tail all others as one more, which else take no part; known (N, k + tail) are the teacher's log-probabilities
    of these. None: instead of a divergence the log-probability of ids (N, 1), with a tail; stats are then the student's
    entropy over the vocabulary, and zeros.

    The others are summed for themselves: 1 less the sum of the k cancels where these hold nearly everything.
    """
    (N, V), k, tail = logits_NV.shape, ids_Nk.shape[1], spec.tail
    dtype = wide(logits_NV, logits_NV if known is None else known)
    logits = logits_NV.to(dtype)
    if mask_N is not None:
        logits = logits.masked_fill(~mask_N[:, None], 0)
    places = torch.where(ids_Nk < 0, V, ids_Nk)  # one past the end for what is no token
    is_known = logits.new_zeros(N, V + 1, dtype=torch.bool).scatter(1, places, True)[:, :V]
    if not tail:  # what the others hold must not matter, and the largest of them would
        logits = logits.masked_fill(~is_known, -math.inf)
    z, slope = _transform(logits, spec.temperature, spec.scale, spec.softcap)
    others = z.masked_fill(is_known, -math.inf)
    rest = others.logsumexp(1, keepdim=True)
    buckets = z.gather(1, ids_Nk.clamp(min=0)).masked_fill(ids_Nk < 0, -math.inf)
    buckets = torch.cat([buckets, rest], 1) if tail else buckets
    if known is None:
        of_others = None
        if with_stats:
            log_probs = _log_probs(others.masked_fill(rest == -math.inf, 0))
            of_others = -(log_probs.exp() * log_probs).sum(1)
        loss, grad, stats = log_prob(buckets, mask_N, row_scale_N, of_others)
    else:
        loss, grad, stats = divergence_rows(buckets, known, mask_N, row_scale_N, Spec(*spec[:3]), with_grad, with_stats)
    if not with_grad:
        return loss, None, stats
    dz = logits.new_zeros(N, V + 1).scatter(1, places, grad[:, :k])[:, :V]
    if tail:
        dz = dz + (others - rest.masked_fill(rest == -math.inf, 0)).exp() * grad[:, k:]
    return loss, (dz * slope).to(logits_NV.dtype), stats


def log_prob(
    pair_N2: Tensor, mask_N: Tensor | None, row_scale_N: Tensor | None, entropy_N: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probability (N,) of the first of two outcomes, row_scale times its gradient (N, 2), and given the entropy of
    what the second is made of, the stats (3, N): the entropy of all, and zeros.
    """
    lead = pair_N2[:, 0] - pair_N2[:, 1]
    loss, share, stats = torch.nn.functional.logsigmoid(lead), torch.sigmoid(-lead), None
    grad = torch.stack([share, -share], 1)
    if entropy_N is not None:
        logs = torch.stack([loss, torch.nn.functional.logsigmoid(-lead)]).clamp(min=FLOOR)  # 0 · −inf is 0
        entropy = _of_those(mask_N, share * entropy_N - (logs.exp() * logs).sum(0))
        stats = torch.stack([entropy, *torch.zeros_like(logs)])
    if row_scale_N is not None:
        grad = grad * _of_those(mask_N, row_scale_N)[:, None]
    if mask_N is not None:
        loss, grad = loss * mask_N, grad * mask_N[:, None]
    return loss, grad, stats


def _of_those(mask_N: Tensor | None, row_scale_N: Tensor) -> Tensor:
    """0 where masked, whatever it is there."""
    return row_scale_N if mask_N is None else row_scale_N.masked_fill(~mask_N, 0)
