"""Orthonormal bases of tall matrices and their singular values, batched.

Shape legend: B matrices, N rows, L columns (L ≤ N), K leading triplets.

CholeskyQR: G = YᵀY = RᵀR, Q = Y R⁻¹ is matrix products where Householder's QR is a chain of small steps (and loops over
the batch on CUDA). It squares the condition κ: |QᵀQ − I| ≈ κ² ε. So all of it is in fp64 and rounded once at the end:
one round mostly gives fp32 columns orthonormal to rounding, a second one (Yamamoto et al. 2015) does up to κ = 1e7, and
the rare others go to Householder one by one.
"""

import functools

import torch
from torch import Tensor

from ..native import has_products, native
from . import ops

_ONE_ROUND, _TWO_ROUNDS = 3e3, 1e7  # ‖R⁻¹‖ of unit columns up to which so many rounds give fp32 orthonormality
_OBLIQUE = 32  # Σ 1/s² − L of unit columns with singular values s, up to which no s is below 1/6
_CONDITION = 1e4  # σ_1/σ_k up to which the eigenvalues of an fp64 Gram give σ and U to fp32's rounding
_ROWS = 512  # taken to fp64 at a time on the CPU: they stay in cache


def basis(y: Tensor) -> Tensor:
    """A basis of span(y) (B, N, L), orthonormal as far as one round goes: for use inside iterations."""
    q, size = _one_round(y)
    return _householder_where(~(size < torch.inf), y, q)


def orthonormal(y: Tensor) -> Tensor:
    """Columns orthonormal to rounding with the span of y (B, N, L); completed to L columns where y is deficient."""
    if y.dtype != torch.float64:
        q, size = _one_round(y)
        if (size < _ONE_ROUND).all():
            return q
    wide = y.double()
    inverse, size = _cholesky_inverse(_gram(y))
    q = wide @ inverse
    inverse, again = _cholesky_inverse(_gram(q))
    q = _householder_where(~(size < _TWO_ROUNDS) | ~(again < _ONE_ROUND), wide, q @ inverse)
    return q.to(y.dtype)


def svd_of_tall(y: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Singular values of y (B, N, L): (U of the k largest (B, N, K), σ (B, L) fp64, right vectors W (B, L, L) like y).

    From the eigenvalues of the fp64 Gram where σ_k is within 1e-4 of the first, else (and for fp64) from Householder's
    R.
    """
    if y.dtype == torch.float64:
        return _svd_by_householder(y, k)
    squares, w = ops.eigh(_gram(y))
    s = squares.clamp_min(0).sqrt()
    u = times(y, w[..., :k] / s[..., None, :k])
    w = w.to(y.dtype)
    bad = ~(s[:, 0] < _CONDITION * s[:, k - 1])
    if bad.any():
        u[bad], s[bad], w[bad] = _svd_by_householder(y[bad], k)
    return u, s, w


def svd_of_projection(y: Tensor, z: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """The SVD of U₀U₀ᵀX, U₀ = orth(Y), from Y = X Q (B, N, L) and Z = XᵀY (B, M, L): (U of the k leading triplets
    (B, N, K), σ (B, L) fp64, V (B, M, L)); σ and V at rounding level are zero.

    With Y = U₀R, XᵀU₀ is Z R⁻¹, which loses what R⁻¹ amplifies: None unless Y's columns are nearly orthogonal, as
    those of Ritz vectors are.
    """
    inverse, size = _cholesky_inverse(_gram(y))
    if not (size.square() <= y.shape[-1] + _OBLIQUE).all():
        return None
    squares, w = ops.eigh(inverse.mT @ _gram(z) @ inverse)
    s = squares.clamp_min(0).sqrt()
    if not (s[:, 0] < _CONDITION * s[:, k - 1]).all():
        return None
    w, s = inverse @ w, torch.where(s * _CONDITION > s[:, :1], s, 0.0)
    v = times(z, w * torch.where(s > 0, 1 / s, 0.0).unsqueeze(-2))
    return times(y, w[..., :k]), s, v


def _one_round(y: Tensor) -> tuple[Tensor, Tensor]:
    """(Y R⁻¹ in y's dtype, the size of R⁻¹ for unit columns); the first is anything where the second is infinite."""
    if not _in_cpp(y):
        inverse, size = _cholesky_inverse(_gram(y))
        return times(y, inverse), size
    q = y.new_empty(y.shape)
    sizes = [
        native().orthonormal(y_i.data_ptr(), y_i.stride(0), *y_i.shape, q_i.data_ptr())
        for y_i, q_i in zip(y, q, strict=True)
    ]
    return q, torch.tensor(sizes, dtype=torch.float64, device="cpu")


def _in_cpp(y: Tensor) -> bool:
    return (
        y.device.type == "cpu"
        and y.dtype == torch.float32
        and (y.stride(-1) == 1 or y.shape[-1] == 1)
        and has_products()
    )


def _blocks(y: Tensor) -> list[slice]:
    step = _ROWS if y.device.type == "cpu" else y.shape[-2]
    return [slice(start, start + step) for start in range(0, y.shape[-2], step)]


def _gram(y: Tensor) -> Tensor:
    """YᵀY (B, L, L), in fp64."""
    if _in_cpp(y):
        g = y.new_empty(len(y), y.shape[-1], y.shape[-1], dtype=torch.float64)
        for y_i, g_i in zip(y, g, strict=True):
            native().gram_of_columns(y_i.data_ptr(), y_i.stride(0), *y_i.shape, g_i.data_ptr())
        return g
    parts = (wide.mT @ wide for wide in (y[:, rows].double() for rows in _blocks(y)))
    return functools.reduce(Tensor.add_, parts)


def times(y: Tensor, right: Tensor) -> Tensor:
    """Y R in fp64, rounded once to y's dtype."""
    out = y.new_empty(*y.shape[:-1], right.shape[-1])
    if _in_cpp(y):
        for y_i, right_i, out_i in zip(y, right.contiguous(), out, strict=True):
            native().times(
                y_i.data_ptr(), y_i.stride(0), *y_i.shape, right_i.data_ptr(), right_i.shape[-1], out_i.data_ptr()
            )
        return out
    for rows in _blocks(y):
        out[:, rows] = y[:, rows].double() @ right
    return out


def _cholesky_inverse(g: Tensor) -> tuple[Tensor, Tensor]:
    """(R⁻¹, its size (B,) for unit columns) of G = RᵀR (B, L, L) fp64; the size is infinite where Cholesky failed."""
    # Equilibrate: columns of very different length are no obstacle, only near-parallel ones are.
    d = g.diagonal(dim1=-2, dim2=-1).rsqrt()
    r, info = torch.linalg.cholesky_ex(g * d.unsqueeze(-1) * d.unsqueeze(-2), upper=True)
    eye = torch.eye(g.shape[-1], dtype=g.dtype, device=g.device)
    inverse = torch.linalg.solve_triangular(r, eye.expand_as(r), upper=True)
    size = torch.linalg.matrix_norm(inverse)
    return d.unsqueeze(-1) * inverse, torch.where((info == 0) & size.isfinite(), size, torch.inf)


def _householder_where(bad: Tensor, y: Tensor, q: Tensor) -> Tensor:
    if bad.any():
        q[bad] = torch.linalg.qr(y[bad].double())[0].to(q.dtype)
    return q


def _svd_by_householder(y: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    q, r = torch.linalg.qr(y.double())  # in fp64: fp32 reflections lose 1e-6 of orthogonality over thousands of rows
    ur, s, wh = torch.linalg.svd(r)
    return (q @ ur[..., :k]).to(y.dtype), s, wh.mT.to(y.dtype)
