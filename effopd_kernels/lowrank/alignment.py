"""Comparing subspaces of singular vectors. All of it is invariant under the free signs, and the overlap under rotation
as well.

Shape legend: D rows of a basis, K columns.
"""

import torch
from torch import Tensor

from ..checks import check_float, is_integer, shown, wide
from .types import RSVD, check_svd
from .workers import without_autocast


@without_autocast
def subspace_alignment(u: Tensor, u_final: Tensor, k: int) -> Tensor:
    """Mean over i ≤ k of |cos(u_i, u_i,final)|, the alignment of arXiv 2605.11739: (...) in [0, 1].

    It compares vectors one by one, so inside a cluster of equal σ, where they are arbitrary, it falls although the
    subspaces agree; :func:`principal_cosines` does not.

    Args:
        u, u_final: (..., D, ≥ k) singular vectors in columns, in any scale; arithmetic is fp32, or fp64 for fp64.

    Raises:
        TypeError: what is no dense floating tensor. ValueError: shapes that are not (..., D, K), that differ in more
            than the number of columns, two devices, or k beyond the fewer columns.
    """
    u, u_final = (
        torch.nn.functional.normalize(w, torch.inf, -2, torch.finfo(w.dtype).tiny) for w in _leading(u, u_final, k)
    )
    return torch.nn.functional.cosine_similarity(u, u_final, dim=-2).abs().clamp_max(1).mean(-1)


@without_autocast
def principal_cosines(u: Tensor, v: Tensor, k: int | None = None) -> Tensor:
    """Cosines of the principal angles between span(u) and span(v), (..., k) descending, of columns (..., D, ≥ k), which
    must be orthonormal; k defaults to the fewer columns. Raises as `subspace_alignment`.
    """
    u, v = _leading(u, v, k)
    return torch.linalg.svdvals(u.mT @ v).clamp_max(1)


@without_autocast
def subspace_overlap(u: Tensor, v: Tensor) -> Tensor:
    """‖UᵀV‖_F² / k (...), k the fewer columns: the mean squared principal cosine of orthonormal u (..., D, K) and
    v (..., D, K′), a smooth, gauge-invariant function for losses on subspaces.
    """
    _check_bases(u, v)
    u, v = _promoted(u, v)
    return (u.mT @ v).square().sum((-2, -1)) / min(u.shape[-1], v.shape[-1])


@without_autocast
def reconstruct(svd: RSVD) -> Tensor:
    """U diag(S) Vh, (..., m, n). For a gradient that also exists inside clusters of equal σ, take `low_rank_part`.
    TypeError for what is no RSVD.
    """
    check_svd(svd)
    return (svd.U * svd.S.unsqueeze(-2)) @ svd.Vh


def _check_bases(u: Tensor, v: Tensor) -> None:
    for basis in (u, v):
        if not isinstance(basis, Tensor):
            raise TypeError(f"a basis must be a tensor (..., D, K), such as U of an RSVD, got {type(basis).__name__}")
    check_float(**{"the first basis": u, "the second basis": v})
    if min(u.ndim, v.ndim) < 2 or u.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"the bases have shapes {tuple(u.shape)} and {tuple(v.shape)}; they must be (..., D, K), and all but the "
            "last size must agree"
        )


def _leading(u: Tensor, v: Tensor, k: int | None) -> tuple[Tensor, Tensor]:
    _check_bases(u, v)
    k = min(u.shape[-1], v.shape[-1]) if k is None else k
    if not is_integer(k) or not 1 <= k <= min(u.shape[-1], v.shape[-1]):
        raise ValueError(
            f"k must be an integer between 1 and the fewer columns, {min(u.shape[-1], v.shape[-1])}; it is {shown(k)}"
        )
    u, v = _promoted(u, v)
    return u[..., :k], v[..., :k]


def _promoted(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    dtype = wide(u, v)
    return u.to(dtype), v.to(dtype)
