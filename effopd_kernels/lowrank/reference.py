"""The low-rank operators in plain PyTorch, panel by panel (see :mod:`panels`).

Shape legend: N rows, M columns of one matrix; L sketch columns; P a panel of X.

One reading of the pair serves both products of XᵀXQ:

    for P in panels:  Z += Pᵀ (P Q)
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .panels import arithmetic, over_panels, panel, split
from .workers import shared_out

GRAM_BLOCK = 128  # columns of a block row of a Gram; only blocks at or below the diagonal are computed


def bf16_is_native(device: torch.device) -> bool:
    """Whether bf16 products are faster than fp32 ones here."""
    if device.type != "cpu":
        return True
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    avx512 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return bool(supported() and avx512())


def stats(x: list[Tensor], base: list[Tensor], full: bool) -> Tensor:
    result = torch.zeros(len(x), 5, dtype=torch.float64, device=x[0].device)
    for row, matrix in zip(result, _each(x, base, None), strict=True):
        over_panels(lambda rows, p: None, *matrix, arithmetic(matrix[0]), row, full)
    return result


def sketch(x: list[Tensor], base: list[Tensor], q: Tensor, full: bool, fast: bool) -> tuple[Tensor, Tensor]:
    result = torch.zeros(len(x), 5, dtype=torch.float64, device=q.device)
    return _gram_apply(x, base, q, None, fast, result, full), result


def gram_apply(x: list[Tensor], base: list[Tensor], q: Tensor, scale: Tensor | None, fast: bool) -> Tensor:
    return _gram_apply(x, base, q, scale, fast)


def _gram_apply(x, base, q, scale, fast, statistics=None, full=False) -> Tensor:
    z = torch.empty_like(q, memory_format=torch.contiguous_format)
    for i, matrix in enumerate(_each(x, base, scale)):
        q_i = _operand(q[i], fast)
        z[i] = over_panels(
            lambda rows, p, q_i=q_i: (p.mT @ (p @ q_i)).to(z.dtype),
            *matrix, q_i.dtype, None if statistics is None else statistics[i], full,
        )  # fmt: skip
    return z


def skinny(x: list[Tensor], base: list[Tensor], q: Tensor, scale: Tensor | None, fast: bool) -> Tensor:
    y = q.new_empty(len(x), x[0].shape[0], q.shape[2])
    for i, matrix in enumerate(_each(x, base, scale)):
        q_i = _operand(q[i], fast)

        def product(rows: slice, p: Tensor, q_i=q_i, y_i=y[i]) -> None:
            if p.dtype == y_i.dtype:
                torch.mm(p, q_i, out=y_i[rows])
            else:
                y_i[rows] = p @ q_i

        over_panels(product, *matrix, q_i.dtype)
    return y


def gram(x: list[Tensor], base: list[Tensor], scale: Tensor | None, double: bool) -> Tensor:
    m = x[0].shape[1]
    g = torch.zeros(len(x), m, m, dtype=torch.float64 if double else arithmetic(x[0]), device=x[0].device)
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
    values, vectors = torch.linalg.eigh(g[0] if len(g) == 1 else g)  # one matrix alone is a third faster
    return values.flip(-1).reshape(g.shape[:2]), vectors.flip(-1).contiguous().reshape(g.shape)


def _each(
    x: list[Tensor], base: list[Tensor], scale: Tensor | None
) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
    for i, matrix in enumerate(x):
        yield matrix, base[i] if base else None, None if scale is None else scale[i]


def _operand(q: Tensor, fast: bool) -> Tensor:
    """q as the products take it; its dtype is the panels' too."""
    half = fast and q.dtype == torch.float32 and bf16_is_native(q.device)
    return q.contiguous().bfloat16() if half else q.contiguous()
