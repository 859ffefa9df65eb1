"""Truncated SVD of many weight updates, with error bounds.

Gradients where they are wanted, and signs; :mod:`decompose` has the algorithm.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .arguments import as_batch, check_align_to, check_pair, settings_for
from .autograd import LowRankPart, TruncatedSVD
from .decompose import decompose
from .types import RSVD, Flag
from .workers import without_autocast


@without_autocast
def batched_rsvd(
    a: Tensor,
    rank: int,
    *,
    base: Tensor | None = None,
    oversample: int | None = None,
    power_iters: int = 2,
    tol: float | None = None,
    seed: int = 0,
    align_to: "RSVD | Tensor | None" = None,
    route: str | None = None,
    clip_rank: bool = False,
) -> RSVD:
    """The ``rank`` leading singular triplets of every matrix of ``a − base``.

    Of small matrices on the CPU (up to 16,384 entries, not fp64) it is LAPACK's SVD in fp64, with about half a
    millisecond each for the rest; without a need for bounds, `torch.linalg.svd` is faster there.

    Args:
        a: (..., m, n) bf16, fp16, fp32 or fp64, any strides. Arithmetic is fp32, or fp64 for fp64 input.
        rank: k, 0 ≤ k ≤ min(m, n).
        base: like ``a``, or None for zero. Subtracted on the fly, exactly for bf16 pairs; never written at full size.
        oversample: extra columns of the sketch, default max(k, 32) or a few more. Generous on purpose: columns are
            cheap, a slow spectrum is not.
        power_iters: products with AᵀA before the projection (times four inside a Gram matrix).
        tol: iterate until every triplet residual ≤ tol · σ_i, or is at rounding level; else `Flag.TOL_NOT_MET` is set.
        seed: of the sketch. It depends on the seed and the shape alone, so a matrix's result does not depend on its
            batch.
        align_to: a previous RSVD or its U (..., m, k'): signs are chosen so that uᵢ·uᵢ,previous ≥ 0. Default: the
            largest |u_i| is positive.
        route: "subspace", "gram" or "exact" instead of the one chosen by shape and rank (see `routes`).
        clip_rank: take min(m, n) where ``rank`` exceeds it, and set `Flag.CLIPPED`, instead of raising.

    Returns:
        `RSVD`, of which U, S and Vh are differentiable once, and not in forward mode nor under `torch.func`. A matrix
        with non-finite entries gives NaN and a flag, and does not disturb the others. A gradient through U and Vh is
        as good as the vectors that the loss was computed from: of a spectrum that falls slowly ask for ``tol``, 1e-3.

    Raises:
        TypeError: integer, complex or sparse input. ValueError: shapes, rank, route or options out of range.
    """
    check_pair(a, base)
    settings = settings_for(a.shape, rank, oversample, power_iters, tol, seed, route, clip_rank)
    check_align_to(align_to, a.shape)
    pair = as_batch(a), None if base is None else as_batch(base)
    result = RSVD(*TruncatedSVD.apply(*pair, settings)) if _wants_gradient(*pair) else decompose(*pair, settings)[0]
    result = RSVD(*(field.reshape((*a.shape[:-2], *field.shape[1:])) for field in result))
    return finished(result, rank, align_to)


@without_autocast
def low_rank_part(
    a: Tensor,
    rank: int,
    *,
    base: Tensor | None = None,
    oversample: int | None = None,
    power_iters: int = 2,
    tol: float | None = None,
    seed: int = 0,
    route: str | None = None,
    clip_rank: bool = False,
) -> Tensor:
    """The best approximation of rank k to every matrix of ``a − base``, (..., m, n); arguments and errors as
    `batched_rsvd`.

    It has a gradient wherever σ_k > σ_{k+1}, clusters of equal σ inside the rank included, where one through
    ``reconstruct(batched_rsvd(a, k))`` does not exist. Elsewhere, as for a matrix of a rank below k, backward raises
    RuntimeError. Where σ_k and σ_{k+1} are close, as those of noise, backward takes the time of a full decomposition,
    or, where the short side is above 2048, may raise: ask for ``route="exact"`` there.
    """
    check_pair(a, base)
    settings = settings_for(a.shape, rank, oversample, power_iters, tol, seed, route, clip_rank)
    pair = as_batch(a), None if base is None else as_batch(base)
    _refuse_transforms(*pair)
    return LowRankPart.apply(*pair, settings).reshape(a.shape)


def _wants_gradient(*tensors: Tensor | None) -> bool:
    _refuse_transforms(*tensors)
    given = [t for t in tensors if t is not None]
    if any(forward_ad.unpack_dual(t).tangent is not None for t in given):
        return True  # PyTorch then refuses what `TruncatedSVD` has no rule for; else it would go unsaid
    return torch.is_grad_enabled() and any(t.requires_grad for t in given)


def _refuse_transforms(*tensors: Tensor | None) -> None:
    """Raises RuntimeError for tensors within a transform of `torch.func`."""
    if any(t is not None and torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors):
        raise RuntimeError(
            "singular value decompositions have no rules for the transforms of torch.func (grad, vmap, jvp, ...): "
            "differentiate them by torch.autograd, and give batches as (..., m, n)"
        )


def finished(svd: RSVD, rank: int, align_to: "RSVD | Tensor | None") -> RSVD:
    """The triplets that were found as those of ``rank`` that were asked for: with `Flag.CLIPPED` where they are fewer,
    and with every free sign chosen towards ``align_to``.
    """
    if rank > svd.S.shape[-1]:
        svd = svd._replace(flags=svd.flags | Flag.CLIPPED)
    return svd if align_to is None else _aligned(svd, align_to)


def _aligned(svd: RSVD, align_to: "RSVD | Tensor") -> RSVD:
    u, previous = svd.U, align_to.U if isinstance(align_to, RSVD) else align_to
    k = min(u.shape[-1], previous.shape[-1])
    with torch.no_grad():
        pivot = torch.ones_like(svd.S)
        pivot[..., :k] = (u[..., :k] * previous[..., :k].to(u.dtype)).sum(-2)
        sign = torch.where(pivot < 0, -1.0, 1.0).to(u.dtype)
    return svd._replace(U=u * sign.unsqueeze(-2), Vh=svd.Vh * sign.unsqueeze(-1))
