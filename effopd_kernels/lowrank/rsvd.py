"""Truncated SVD of many weight updates, with error bounds.

Checks of what is asked for, gradients where they are wanted, and signs; :mod:`decompose` has the algorithm.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..checks import FLOATS, below_infinity, is_integer, is_number, shown
from . import routes
from .autograd import LowRankPart, TruncatedSVD
from .decompose import Settings, decompose
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
    if rank > settings.rank:
        result = result._replace(flags=result.flags | Flag.CLIPPED)
    return result if align_to is None else aligned(result, align_to)


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


def as_batch(a: Tensor) -> Tensor:
    return a.reshape(a.shape[:-2].numel(), *a.shape[-2:])


def aligned(svd: RSVD, align_to: RSVD | Tensor) -> RSVD:
    """The same triplets with every free sign chosen towards ``align_to``."""
    u, previous = svd.U, align_to.U if isinstance(align_to, RSVD) else align_to
    k = min(u.shape[-1], previous.shape[-1])
    with torch.no_grad():
        pivot = torch.ones_like(svd.S)
        pivot[..., :k] = (u[..., :k] * previous[..., :k].to(u.dtype)).sum(-2)
        sign = torch.where(pivot < 0, -1.0, 1.0).to(u.dtype)
    return svd._replace(U=u * sign.unsqueeze(-2), Vh=svd.Vh * sign.unsqueeze(-1))


def check_pair(a: Tensor, base: Tensor | None, name: str = "a", base_name: str = "base") -> None:
    """Raise for anything that is not one floating matrix (or a batch), or two of one shape, on one device."""
    for tensor, label in ((a, name), (base, base_name)):
        if tensor is None and label == base_name:
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS:
            found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{label} must be a tensor of bf16, fp16, fp32 or fp64, got {found}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{label} must be dense, got layout {tensor.layout}")
        if tensor.ndim < 2:
            raise ValueError(
                f"{label} must be a matrix or a batch of matrices (..., m, n), not of shape {tuple(tensor.shape)}"
            )
    if base is None:
        return
    if a.shape != base.shape:
        raise ValueError(f"{name} {tuple(a.shape)} and {base_name} {tuple(base.shape)} must have one shape")
    if a.device != base.device:
        raise ValueError(f"{name} is on {a.device} and {base_name} on {base.device}; both must be on one device")


def check_align_to(align_to: "RSVD | Tensor | None", shape: torch.Size, name: str = "align_to") -> None:
    """Raise for what is neither None nor an earlier result of (a batch of) matrices (..., m, n)."""
    previous = align_to.U if isinstance(align_to, RSVD) else align_to
    if previous is None:
        return
    if not isinstance(previous, Tensor) or previous.dtype not in FLOATS:
        found = previous.dtype if isinstance(previous, Tensor) else type(previous).__name__
        raise TypeError(f"{name} must be an RSVD or its U, got {found}")
    if previous.shape[:-1] != shape[:-1]:
        raise ValueError(f"{name} has U of shape {tuple(previous.shape)}; it must be {(*shape[:-1], 'k')}")


def settings_for(shape: torch.Size, rank, oversample, power_iters, tol, seed, route, clip_rank) -> Settings:
    """What was asked for of matrices (..., m, n), with the rank there is. Raises for options out of range."""
    m, n = shape[-2:]
    for name, value in (
        ("rank", rank),
        ("oversample", 0 if oversample is None else oversample),
        ("power_iters", power_iters),
    ):
        if not is_integer(value) or value < 0:
            raise ValueError(f"{name} must be an integer ≥ 0, got {shown(value)}")
    if rank > min(m, n) and not clip_rank:
        raise ValueError(
            f"rank {rank} exceeds min(m, n) = {min(m, n)} of a {m} × {n} matrix; clip_rank=True takes that instead"
        )
    if tol is not None and not (is_number(tol) and tol > 0 and below_infinity(tol)):
        raise ValueError(f"tol must be a finite number > 0 or None, got {shown(tol)}")
    check_seed(seed)
    if route not in (None, *routes.ROUTES):
        raise ValueError(f"route must be one of {', '.join(routes.ROUTES)} or None, got {shown(route)}")
    oversample, tol = None if oversample is None else int(oversample), None if tol is None else float(tol)
    return Settings(int(min(rank, m, n)), oversample, int(power_iters), tol, int(seed), route)


def check_seed(seed: int) -> None:
    if not is_integer(seed):
        raise TypeError(f"seed must be an integer, got {shown(seed)}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must be an integer of 64 bits, got {seed}")
