"""The low-rank operators panel by panel (see :mod:`panels`): in PyTorch, and on the CPU in C++ where that serves.

``fast`` is heeded only there, and where the processor has such products: PyTorch's in bf16 on the CPU round their
results too, and spectra that fall off quickly do not bear that.

Shape legend: N rows, M columns of one matrix; L sketch columns; P a panel of X.

One reading of the pair serves both products of XᵀXQ:

    for P in panels:  Z += Pᵀ (P Q)
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..checks import wide
from . import panels, signs
from .panels import over_panels, over_rows, panel, split
from .workers import shared_out

GRAM_BLOCK = 128  # columns of a block row of a Gram; only blocks at or below the diagonal are computed


def stats(x: list[Tensor], base: list[Tensor], full: bool) -> Tensor:
    """First-pass statistics of the unscaled differences, (B, 5) fp64: Σ Δ², max |Δ|, entries with Δ = 0, Σ ulp(x)²,
    non-finite entries.

    The two middle ones are filled only when ``full``. A matrix with non-finite entries may hold anything in the first
    two.
    """
    result = torch.zeros(len(x), 5, dtype=torch.float64, device=x[0].device)
    for row, matrix in zip(result, _each(x, base, None), strict=True):
        over_panels(lambda rows, p: None, *matrix, wide(matrix[0]), row, full)
    return result


def sketch(x: list[Tensor], base: list[Tensor], columns: int, seed: int, full: bool) -> tuple[Tensor, Tensor]:
    """The first pass: (fast :func:`gram_apply` of the unscaled differences and the test matrix of :mod:`signs`,
    :func:`stats`), the second from the same reading.
    """
    rows = x[0].shape[1]
    z = x[0].new_empty(len(x), rows, columns, dtype=wide(x[0]))
    result = torch.zeros(len(x), 5, dtype=torch.float64, device=z.device)
    omega = signs.dense(seed, rows, columns, z.device, z.dtype)
    places = signs.sparse(seed, rows, columns)
    for i, matrix in enumerate(_each(x, base, None)):
        z[i] = _products(matrix, omega, statistics=result[i], full=full, half=True, places=places)
    return z, result


def gram_apply(x: list[Tensor], base: list[Tensor], q: Tensor, scale: Tensor | None, fast: bool) -> Tensor:
    """Z_b = X_bᵀ (X_b q_b): x_b (N, M), q (B, M, L) → (B, M, L). One reading of the pair on CPU; two skinny products
    elsewhere. ``fast`` lets the operands be rounded to 16 bits (sums stay in fp32).
    """
    z = torch.empty_like(q, memory_format=torch.contiguous_format)
    for i, matrix in enumerate(_each(x, base, scale)):
        z[i] = _products(matrix, q[i], half=fast)
    return z


def project(x: list[Tensor], base: list[Tensor], q: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """(Y_b = X_b q_b, X_bᵀ Y_b): (B, M, L) → (B, N, L), (B, M, L). Readings of the pair as in :func:`gram_apply`."""
    y, z = q.new_empty(len(x), x[0].shape[0], q.shape[2]), torch.empty_like(q, memory_format=torch.contiguous_format)
    for i, matrix in enumerate(_each(x, base, scale)):
        z[i] = _products(matrix, q[i], y[i])
    return y, z


def skinny(x: list[Tensor], base: list[Tensor], q: Tensor, scale: Tensor | None) -> Tensor:
    """Y_b = X_b q_b: x_b (N, M), q (B, M, L) → (B, N, L)."""
    y = q.new_empty(len(x), x[0].shape[0], q.shape[2])
    for i, matrix in enumerate(_each(x, base, scale)):
        _products(matrix, q[i], y[i], want_z=False)
    return y


def _products(matrix, q, y=None, want_z=True, statistics=None, full=False, half=False, places=None) -> Tensor | None:
    """XᵀXq of one matrix, panel by panel, as `panels.products`."""

    def of(rows: slice, found: Tensor | None) -> Tensor | None:
        return panels.products(*matrix, rows, q, None if y is None else y[rows], want_z, found, full, half, places)

    return over_rows(of, matrix[0], statistics)


def gram(x: list[Tensor], base: list[Tensor], scale: Tensor | None, double: bool) -> Tensor:
    """G_b = X_bᵀ X_b, (B, M, M), exactly symmetric; only one triangle is computed. ``double``: fp64 products and
    result.
    """
    m = x[0].shape[1]
    g = torch.zeros(len(x), m, m, dtype=torch.float64 if double else wide(x[0]), device=x[0].device)
    share = shared_out if g.device.type == "cpu" else map
    for i, matrix in enumerate(_each(x, base, scale)):
        for rows in split(matrix[0]):
            p = panel(*matrix, rows, g.dtype)

            def block(start: int, g_i=g[i], p=p) -> None:
                stop = min(start + GRAM_BLOCK, m)
                g_i[start:stop, :stop].addmm_(p[:, start:stop].mT, p[:, :stop])

            for _ in share(block, range((m - 1) // GRAM_BLOCK * GRAM_BLOCK, -1, -GRAM_BLOCK)):  # the largest first
                pass
    lower = g.tril(-1)
    return g.tril_().add_(lower.mT)


def eigh(g: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, (B, L) and eigenvectors in columns (B, L, L) of symmetric g (B, L, L), in g's dtype
    (fp32 or fp64).
    """
    values, vectors = torch.linalg.eigh(g[0] if len(g) == 1 else g)  # one matrix alone is a third faster
    return values.flip(-1).reshape(g.shape[:2]), vectors.flip(-1).contiguous().reshape(g.shape)


def _each(
    x: list[Tensor], base: list[Tensor], scale: Tensor | None
) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
    for i, matrix in enumerate(x):
        yield matrix, base[i] if base else None, None if scale is None else scale[i]
