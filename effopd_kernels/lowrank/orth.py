"""Orthonormal bases of tall matrices and their singular values, batched.

Shape legend: B matrices, N rows, L columns (L ≤ N), K leading triplets.

CholeskyQR: G = YᵀY = RᵀR, Q = Y R⁻¹ is one pass of matrix products where Householder's QR is a chain of small steps
(and loops over the batch on CUDA). It squares the condition number, so G is formed and factored in fp64: then fp32
columns of condition up to 1e6 come out orthonormal after a second round, and the rare others go to Householder one by
one.
"""

import torch
from torch import Tensor

from . import ops

_CONDITION = 1e5  # beyond it σ of a Gram lose digits that fp32 has


def _cholesky_step(y: Tensor) -> tuple[Tensor, Tensor]:
    """One round: (Q, usable) with usable (B,) false where the Gram was not numerically positive definite."""
    wide = y.double()
    g = wide.mT @ wide
    # Equilibrate: columns of very different length are no obstacle, only near-parallel ones are.
    d = g.diagonal(dim1=-2, dim2=-1).rsqrt()
    r, info = torch.linalg.cholesky_ex(g * d.unsqueeze(-1) * d.unsqueeze(-2), upper=True)
    eye = torch.eye(y.shape[-1], dtype=torch.float64, device=y.device)
    inverse = d.unsqueeze(-1) * torch.linalg.solve_triangular(r, eye.expand_as(r), upper=True)
    usable = (info == 0) & inverse.isfinite().all(-1).all(-1)
    return y @ inverse.to(y.dtype), usable


def _householder_where(bad: Tensor, y: Tensor, q: Tensor) -> Tensor:
    if bad.any():
        q[bad] = torch.linalg.qr(y[bad].double())[0].to(q.dtype)
    return q


def basis(y: Tensor) -> Tensor:
    """A well-conditioned basis of span(y), (B, N, L): orthonormal up to rounding times the condition of y. For use
    inside iterations.
    """
    q, usable = _cholesky_step(y)
    return _householder_where(~usable, y, q)


def orthonormal(y: Tensor) -> Tensor:
    """Columns orthonormal to rounding with the span of y, (B, N, L); where y is rank-deficient, completed to L
    columns.
    """
    first, usable = _cholesky_step(y)
    q, again = _cholesky_step(first)
    return _householder_where(~(usable & again) | ~_nearly_orthonormal(first), y, q)


def _nearly_orthonormal(q: Tensor) -> Tensor:
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    return (q.mT @ q - eye).abs().amax((-2, -1)) < 1e-2


def svd_of_tall(y: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Singular values of y (B, N, L): (U of the k largest (B, N, K), σ (B, L) fp64, right vectors W (B, L, L) in y's
    dtype).

    From the eigenvalues of the fp64 Gram where the k-th σ is within 1e-5 of the first, else (and for fp64) from
    Householder's R.
    """
    if y.dtype == torch.float64:
        return _svd_by_householder(y, k)
    wide = y.double()
    squares, w = ops.eigh(wide.mT @ wide)
    s = squares.clamp_min(0).sqrt()
    leading = w[..., :k] / s[..., None, :k]
    first = y @ leading.to(y.dtype)
    u, usable = _cholesky_step(first)
    w = w.to(y.dtype)
    bad = ~usable | (s[:, :k] * _CONDITION < s[:, :1]).any(-1)
    if bad.any():
        u[bad], s[bad], w[bad] = _svd_by_householder(y[bad], k)
    return u, s, w


def _svd_by_householder(y: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    q, r = torch.linalg.qr(y.double())  # in fp64: fp32 reflections lose 1e-6 of orthogonality over thousands of rows
    ur, s, wh = torch.linalg.svd(r)
    return (q @ ur[..., :k]).to(y.dtype), s, wh.mT.to(y.dtype)
