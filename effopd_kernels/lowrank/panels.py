"""Panels of a difference X = scale · (x − base), each made in one pass and used while it is in cache.

A panel is some rows of X, subtracted into a buffer of the thread that will use it. So a difference is never held at
full size, every matrix runs through equally aligned memory (a result does not depend on where its input lay), and
threads can share the panels of a matrix out.

On the CPU the C++ extension makes them: subtraction, rounding to bf16 and statistics from one reading of the pair, at
4 to 8 bytes an entry. Where it was not built, and for fp64, PyTorch does, in as many passes as operations.
"""

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import wide
from ..native import DTYPES, has_products, native
from . import signs
from .statistics import add_statistics, fill_statistics
from .workers import shared_out

PANEL = 1 << 20  # entries of a panel, 4 MiB of fp32; a quarter or twice as many take as long

_local = threading.local()  # buffers of this thread, by dtype


def over_panels(
    function: Callable[[slice, Tensor], Tensor | None],
    x: Tensor,
    base: Tensor | None,
    scale: Tensor | None,
    dtype: torch.dtype,
    statistics: Tensor | None = None,
    full: bool = False,
) -> Tensor | None:
    """The sum, in order, of function(rows, X[rows]) over all panels, or None where the function returns nothing. The
    panel, of ``dtype``, is the function's until it returns.

    ``statistics`` (5,) fp64: where those of the unscaled difference are added, as `ops.stats` has them.
    """
    return over_rows(lambda rows, found: function(rows, panel(x, base, scale, rows, dtype, found, full)), x, statistics)


def over_rows(
    function: Callable[[slice, Tensor | None], Tensor | None], x: Tensor, statistics: Tensor | None = None
) -> Tensor | None:
    """As :func:`over_panels`, of function(rows, their statistics to be filled in)."""

    def run(rows: slice) -> tuple[Tensor | None, Tensor | None]:
        found = None if statistics is None else torch.zeros(5, dtype=torch.float64, device=x.device)
        return function(rows, found), found

    total = None
    for part, found in (shared_out if x.device.type == "cpu" else map)(run, split(x)):
        total = part if total is None else total.add_(part)
        if found is not None:
            add_statistics(statistics, found)
    return total


def split(x: Tensor) -> list[slice]:
    """The rows of x (N, M) in panels, equal but for the last."""
    rows, columns = x.shape
    count = max(1, -(-rows * columns // PANEL))
    step = max(16, -(-rows // count // 16) * 16)
    return [slice(start, min(start + step, rows)) for start in range(0, max(rows, 1), step)]


def panel(
    x: Tensor,
    base: Tensor | None,
    scale: Tensor | None,
    rows: slice,
    dtype: torch.dtype,
    statistics: Tensor | None = None,
    full: bool = False,
    instruction_set: int | None = -1,
) -> Tensor:
    """X[rows] in ``dtype``, in a buffer that the thread's next one takes. ``statistics`` (5,) fp64, zeros, are filled
    in. instruction_set: the kernel's, −1 the best; None for PyTorch.
    """
    if scale is not None and scale.device.type == "cpu" and scale.item() == 1:
        scale = None
    a, b = x[rows], None if base is None else base[rows]
    if instruction_set is None or not _in_cpp(a, b, dtype):
        return _in_torch(a, b, scale, dtype, statistics, full)
    out = _buffer(a, dtype)
    native().difference_panel(
        *_sources(a, b), out.data_ptr(), DTYPES[dtype], out.stride(int(_by_column(a))), *_lines(a),
        1.0 if scale is None else scale.item(),
        0 if statistics is None else statistics.data_ptr(), full, instruction_set,
    )  # fmt: skip
    return out


def row_squares(x: Tensor, base: Tensor, instruction_set: int | None = -1) -> Tensor:
    """Of every row of x and base (N, M): Σ (x − base)², Σ x² and Σ base², (N, 3) fp64. instruction_set as in
    :func:`panel`.
    """
    if instruction_set is not None and _in_cpp(x, base, torch.float32) and not _by_column(x):
        out = torch.empty(len(x), 3, dtype=torch.float64, device="cpu")
        native().line_squares(*_sources(x, base), *_lines(x), out.data_ptr(), instruction_set)
        return out
    return squares_of_rows(x.to(wide(x)) - base, x, base)


def squares_of_rows(*matrices: Tensor) -> Tensor:
    """Σ v² of every row of each, (N, …) fp64."""
    norms = (torch.linalg.vector_norm(v.to(wide(v)), dim=1) for v in matrices)
    return torch.stack([norm.double().square() for norm in norms], 1)


def products(
    x: Tensor,
    base: Tensor | None,
    scale: Tensor | None,
    rows: slice,
    q: Tensor,
    y: Tensor | None = None,
    want_z: bool = True,
    statistics: Tensor | None = None,
    full: bool = False,
    half: bool = False,
    places: Tensor | None = None,
    instruction_set: int = -1,
) -> Tensor | None:
    """X[rows]ᵀ (X[rows] q), q (M, L) in the panel's dtype, if ``want_z``; y (rows, L), contiguous, takes X[rows] q.
    ``half``: operands may be rounded to 16 bits, where those are multiplied faster, and y is not to be had; ``places``
    are those of a q of signs, as :mod:`signs` has them. ``statistics`` as in :func:`panel`. instruction_set: the
    multiplier's, −1 the best.
    """
    if not multiplies(x, base, q):
        p = panel(x, base, scale, rows, q.dtype, statistics, full)
        y = torch.mm(p, q, out=y)
        return p.mT @ y if want_z else None
    a, b, q = x[rows], None if base is None else base[rows], q.contiguous()
    z = q.new_zeros(-(-q.shape[0] // 2) * 2, -(-q.shape[1] // 16) * 16) if want_z else None
    native().difference_products(
        *_sources(a, b), *_lines(a), 1.0 if scale is None else scale.item(), _by_column(a), q.data_ptr(), q.shape[1],
        *(0 if t is None else t.data_ptr() for t in (places, y, z, statistics)),
        0 if places is None else places.shape[1], full, half, instruction_set,
    )  # fmt: skip
    return z[: q.shape[0], : q.shape[1]] if want_z else None


def rounded(q: Tensor) -> Tensor:
    """An fp32 q (..., M, L) rounded as products in 16 bits round it: to bf16, or each column to multiples of its own
    unit.
    """
    if q.device.type != "cpu" or not has_products() or native().rounded(-1) != "int16":
        return q.bfloat16().float()
    largest = torch.linalg.vector_norm(q, torch.inf, -2, keepdim=True)
    unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 12)
    unit = torch.where(largest > native().MOST_WHOLE * unit, 2 * unit, unit)
    return q.div(unit).round_().mul_(unit)


def exact_gram(
    x: Tensor, base: Tensor | None, statistics: Tensor | None = None, instruction_set: int = -1
) -> Tensor | None:
    """(x − base)ᵀ(x − base) (M, M) of bf16 matrices, exactly symmetric, as exact as products in fp32. None for others,
    without AVX2, and where differences have more than the 16 bits of an operand, but for some in a thousand.
    ``statistics`` (6,) fp64 takes those of `ops.stats` in full, and Σ base². instruction_set: the multiplier's, −1 the
    best.
    """
    if x.dtype != torch.bfloat16 or not x.numel() or not _in_cpp(x, base, x.dtype) or not has_products():
        return None
    g = torch.empty(x.shape[1], x.shape[1], dtype=torch.float32, device="cpu")
    taken = native().difference_gram(
        *_sources(x, base), *_lines(x), _by_column(x), g.data_ptr(),
        *((0, 0) if statistics is None else (statistics.data_ptr(), statistics[5:].data_ptr())), instruction_set,
    )  # fmt: skip
    return g if taken else None


def times_signs(x: Tensor, columns: int, seed: int) -> Tensor:
    """x Ω (N, columns) of an fp32 x with the test matrix Ω of :mod:`signs`: an entry of x costs as many additions as a
    row of Ω has signs.
    """
    omega = signs.dense(seed, x.shape[1], columns, x.device)
    y = torch.empty(len(x), columns, dtype=torch.float32, device="cpu")
    products(x, None, None, slice(None), omega, y, want_z=False, places=signs.sparse(seed, x.shape[1], columns))
    return y


def multiplies(x: Tensor, base: Tensor | None, q: Tensor) -> bool:
    """Whether :func:`products` is one kernel of C++, without a panel in memory: for the operands of C++ panels, on a
    processor with AVX2 at least.
    """
    return q.dtype == torch.float32 and x.numel() > 0 < q.numel() and _in_cpp(x, base, q.dtype) and has_products()


def _sources(a: Tensor, b: Tensor | None) -> list[int]:
    """Address, dtype and pitch of both; memory's lines are columns where _by_column."""
    across = int(_by_column(a))
    return [v for t in (a, b) for v in ((0, 0, 0) if t is None else (t.data_ptr(), DTYPES[t.dtype], t.stride(across)))]


def _lines(a: Tensor) -> tuple[int, int]:
    """How many lines, and how long."""
    return a.shape[::-1] if _by_column(a) else a.shape


def _by_column(x: Tensor) -> bool:
    return x.stride(0) == 1 and x.stride(1) != 1


def _in_cpp(a: Tensor, b: Tensor | None, dtype: torch.dtype) -> bool:
    pair = [t for t in (a, b) if t is not None]
    return (
        a.device.type == "cpu"
        and dtype in (torch.float32, torch.bfloat16)
        and all(t.dtype in DTYPES and t.stride(1 - _by_column(a)) == 1 for t in pair)
        and native() is not None
    )


def _in_torch(a, b, scale, dtype, statistics, full) -> Tensor:
    out = _buffer(a, torch.promote_types(wide(a), dtype)).copy_(a)
    if b is not None:
        out.sub_(b)
    if statistics is not None:
        by_column = _by_column(out)  # in the order of memory
        fill_statistics(statistics, out.mT if by_column else out, a.mT if by_column else a, full)
    if scale is not None:
        out.mul_(scale)
    return out if out.dtype == dtype else _buffer(a, dtype).copy_(out)


def _buffer(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the shape and order of ``like``, uninitialised, every line of memory an odd number of cache lines from the
    last: 4096 bytes apart they would all fall into one set of the cache, and products take a fifth longer.
    """
    lines, length = like.mT.shape if _by_column(like) else like.shape
    pitch = (-(-length * dtype.itemsize // 64) | 1) * 64 // dtype.itemsize
    if like.device.type != "cpu":
        flat = torch.empty(lines * pitch, dtype=dtype, device=like.device)
    else:
        flat = _local.__dict__.get(dtype)
        if flat is None or flat.numel() < lines * pitch:
            with torch.inference_mode(False):  # it outlives the mode, if one is on
                flat = _local.__dict__[dtype] = torch.empty(max(lines * pitch, PANEL), dtype=dtype, device="cpu")
    out = flat[: lines * pitch].view(lines, pitch)[:, :length]
    return out.mT if _by_column(like) else out
