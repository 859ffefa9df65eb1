"""The low-rank operators in plain PyTorch, on panels that stay in cache.

Shape legend: N rows, M columns of one matrix; L sketch columns; C rows of a panel.

A panel is C rows of X = scale · (x − base), subtracted into one reused buffer. So a difference is never held at full
size, every matrix runs through equally aligned memory (a result does not depend on where its input lay), and one
reading of the pair serves both products of XᵀXQ:

    for P in panels:  Z += Pᵀ (P Q)
"""

from collections.abc import Iterator

import torch
from torch import Tensor

PANEL = 1 << 20  # entries of a panel, 4 MiB of fp32: of 1 to 16 MiB the fastest in every pass
GRAM_BLOCK = 128  # columns of a block row of a Gram; only blocks at or below the diagonal are computed

# The exponent field alone, read as a float, is the power of two at or below |x|; times eps, its unit in the last place.
_EXPONENT = {
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}


def ulp(x: Tensor) -> Tensor:
    """Distance from |x| to the next larger number of x's dtype; 0 for zeros and denormals, which no weight of interest
    is.
    """
    integer, mask = _EXPONENT[x.dtype]
    return (
        (x.view(integer) & mask)
        .view(x.dtype)
        .to(torch.promote_types(x.dtype, torch.float32))
        .mul_(torch.finfo(x.dtype).eps)
    )


def bf16_is_native(device: torch.device) -> bool:
    """Whether bf16 products are faster than fp32 ones here."""
    if device.type != "cpu":
        return True
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    avx512 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return bool(supported() and avx512())


def panels(x: Tensor, base: Tensor | None, scale: Tensor | None, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, X[rows]) with X = scale · (x − base) in ``dtype``: to be read only, before the next is asked for."""
    rows, columns = x.shape
    step = max(1, min(rows, max(16, PANEL // max(1, columns))))
    transposed = x.stride(0) == 1 and x.stride(1) != 1
    if scale is not None and scale.device.type == "cpu" and scale.item() == 1:
        scale = None
    if base is None and scale is None and x.dtype == dtype and _aligned(x):
        for start in range(0, rows, step):
            yield slice(start, min(start + step, rows)), x[start : start + step]
        return

    def empty() -> Tensor:
        shape = (columns, step) if transposed else (step, columns)
        buffer = torch.empty(shape, dtype=dtype, device=x.device)
        return buffer.mT if transposed else buffer

    buffer, other = empty(), None if base is None else empty()
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        panel = buffer[: stop - start].copy_(x[start:stop])
        if base is not None:
            panel.sub_(other[: stop - start].copy_(base[start:stop]))
        if scale is not None:
            panel.mul_(scale)
        yield slice(start, stop), panel


def _aligned(x: Tensor) -> bool:
    """Whether x lies as a panel would: products of other alignments may round differently."""
    pitch = max(x.stride()) * x.element_size()
    return 1 in x.stride() and pitch % 64 == 0 and x.data_ptr() % 64 == 0


def _each(
    x: list[Tensor], base: list[Tensor], scale: Tensor | None
) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
    for i, matrix in enumerate(x):
        yield matrix, base[i] if base else None, None if scale is None else scale[i]


def _sum_squares(panel: Tensor, largest: Tensor) -> Tensor:
    """Σ P² in fp64. Row norms in fp32 are exact enough (their errors average out) and eight times faster, while squares
    stay in range.
    """
    if panel.dtype == torch.float32 and panel.device.type == "cpu" and not 1e-12 < float(largest) < 1e12:
        panel = panel.double()
    return torch.linalg.vector_norm(panel, dim=1).double().square_().sum()


def _accumulate(row: Tensor, panel: Tensor, values: Tensor, full: bool) -> None:
    """Add one panel to a row of statistics; ``values`` are the entries of x the panel was made from."""
    if panel.numel() == 0:
        return
    if panel.stride(0) == 1:  # the order of memory
        panel, values = panel.mT, values.mT
    largest = torch.maximum(-panel.amin(), panel.amax())  # aminmax would copy a panel whose rows lie apart
    row[0] += _sum_squares(panel, largest)
    row[1] = torch.maximum(row[1], largest.double())
    if panel.device.type != "cpu" or not largest.isfinite():
        row[4] += (~panel.isfinite()).sum()
    if full:
        # Of the bits, without the sign of −0: counting floats that are not zero takes ten times as long.
        row[2] += panel.numel() - torch.count_nonzero(panel.abs().view(_EXPONENT[panel.dtype][0]))
        steps = ulp(values)
        row[3] += _sum_squares(steps, steps.amax())


def stats(x: list[Tensor], base: list[Tensor], full: bool) -> Tensor:
    result = torch.zeros(len(x), 5, dtype=torch.float64, device=x[0].device)
    for row, (matrix, other, _) in zip(result, _each(x, base, None), strict=True):
        for rows, panel in panels(matrix, other, None, _arithmetic(matrix)):
            _accumulate(row, panel, matrix[rows], full)
    return result


def sketch(x: list[Tensor], base: list[Tensor], q: Tensor, full: bool, fast: bool) -> tuple[Tensor, Tensor]:
    y = q.new_empty(len(x), x[0].shape[0], q.shape[2])
    result = torch.zeros(len(x), 5, dtype=torch.float64, device=q.device)
    for i, (matrix, other, _) in enumerate(_each(x, base, None)):
        q_i, half = _operand(q[i], fast)
        for rows, panel in panels(matrix, other, None, q.dtype):
            _accumulate(result[i], panel, matrix[rows], full)
            y[i, rows] = (_bf16(panel) if half else panel) @ q_i
    return y, result


def skinny(x: list[Tensor], base: list[Tensor], q: Tensor, scale: Tensor | None, fast: bool) -> Tensor:
    y = q.new_empty(len(x), x[0].shape[0], q.shape[2])
    for i, matrix in enumerate(_each(x, base, scale)):
        q_i, half = _operand(q[i], fast)
        for rows, panel in panels(*matrix, q.dtype):
            if half:
                y[i, rows] = _bf16(panel) @ q_i
            else:
                torch.mm(panel, q_i, out=y[i, rows])
    return y


def gram_apply(x: list[Tensor], base: list[Tensor], q: Tensor, scale: Tensor | None, fast: bool) -> Tensor:
    z = q.new_zeros(q.shape)
    for i, matrix in enumerate(_each(x, base, scale)):
        q_i, half = _operand(q[i], fast)
        for _, panel in panels(*matrix, q.dtype):
            if half:
                panel = _bf16(panel)
                z[i] += panel.mT @ (panel @ q_i)
            else:
                z[i].addmm_(panel.mT, panel @ q_i)
    return z


def gram(x: list[Tensor], base: list[Tensor], scale: Tensor | None, double: bool) -> Tensor:
    m = x[0].shape[1]
    g = torch.zeros(len(x), m, m, dtype=torch.float64 if double else _arithmetic(x[0]), device=x[0].device)
    for i, matrix in enumerate(_each(x, base, scale)):
        for _, panel in panels(*matrix, g.dtype):
            for start in range(0, m, GRAM_BLOCK):
                stop = min(start + GRAM_BLOCK, m)
                g[i, start:stop, :stop].addmm_(panel[:, start:stop].mT, panel[:, :stop])
    lower = g.tril(-1)
    return g.tril_().add_(lower.mT)


def eigh(g: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(g[0] if len(g) == 1 else g)  # one matrix alone is a third faster
    return values.flip(-1).reshape(g.shape[:2]), vectors.flip(-1).contiguous().reshape(g.shape)


def _arithmetic(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _bf16(panel: Tensor) -> Tensor:
    """Rounded, in the order of memory: a cast of columns that lie apart would transpose, in four times the time."""
    return panel.mT.bfloat16().mT if panel.stride(0) == 1 else panel.bfloat16()


def _operand(q: Tensor, fast: bool) -> tuple[Tensor, bool]:
    half = fast and q.dtype == torch.float32 and bf16_is_native(q.device)
    q = q.contiguous()
    return (q.bfloat16() if half else q), half
