"""GPU kernels of the low-rank maths: products with differences that are never written, and small eigenproblems.

Shape legend: B matrices of equal shape, dtype and strides; N rows, M columns of each; L sketch columns.
X_b = scale_b · (x_b − base_b), subtracted in fp32 between the load and the matrix unit. Matrices are reached by a
table of addresses, so a batch is not stacked, and by two strides of which one is 1, so a transpose is not made.

Traffic of X Q in bf16: 4 bytes per entry of the pair and 2·L operations on it; an H200 turns ~180 bf16 operations per
byte it reads, so up to L ≈ 300 columns the product costs no more than reading the pair, and first-pass statistics
(~15 operations per entry) hide behind it too. Rows are cut at SPAN columns whatever the batch is, and the cuts are
added in order: a matrix's result is bitwise the same alone and in any batch.

Precision: `fast` rounds both operands to bf16, else three TF32 products make an fp32 one (fp32 units on AMD). The Gram
of 16-bit pairs takes three bf16 products of X = hi + lo, whose dropped lo·lo is below 2^-18 of the result's terms.
fp64 is left to the reference.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device_cache import device_cache
from ..launch import on_device, options, uploaded
from . import reference, signs

SPAN = 2048  # columns that one program multiplies
COLUMNS = 128  # of an output tile
GRAM_TILE = 128
STATS_ROWS, STATS_WARPS = 8, 4
MAX_GRID = 65535  # programs along a grid's second and third dimension
JACOBI_LIMIT = 512  # largest L of the batched eigenproblem
# Entries of half the rows at a time (on CUDA twice as many spill with Triton 3.9), and the launch: ptxas, left to
# itself, spills to make room for two programs.
JACOBI = {"cuda": (2048, options(16, maxnreg=128)), "hip": (4096, options(16))}
# L from which a matrix alone is left to LAPACK's way, twice that for four, and so on: ours takes time as L³, however
# many matrices; LAPACK's, latencies mostly, about as L for each (an estimate, to be measured).
JACOBI_ALONE = 100
HALF_DTYPE = torch.bfloat16  # of rounded operands
# Statistics keep fp64 sums per row and need the smaller tile. Three TF32 products hold each operand twice, and every
# program splits Q anew: the more rows it has, the better, and where matrix units read shared memory they have room.
_TILES = {
    "rounded": {"ROWS": 128, "BLOCK": 64},
    "rounded, statistics": {"ROWS": 64, "BLOCK": 32},
    "exact": {"ROWS": 128, "BLOCK": 32},
    "exact, before Hopper": {"ROWS": 64, "BLOCK": 32},
    "gram": {"BLOCK": 32},
    "gram of fp32, before Hopper": {"BLOCK": 16},
}
_STAGES = {**dict.fromkeys(_TILES, 2), "rounded": 3, "exact": 3, "exact, before Hopper": 3}
_REGISTERS = {**dict.fromkeys(_TILES, 255), "rounded, statistics": 128}
CUDA = {k: {**v, **options(8, num_stages=_STAGES[k], maxnreg=_REGISTERS[k])} for k, v in _TILES.items()}
HIP = {k: {**v, **options(8, num_stages=1)} for k, v in _TILES.items()}  # 64 KB of shared memory: one stage
CONFIG, PRECISION = (HIP, "ieee") if torch.version.hip else (CUDA, "tf32x3")
# bytes of shared memory besides tiles on their way
_BESIDE = {
    **dict.fromkeys(_TILES, 32 << 10),
    "exact": 64 << 10,
    "gram": 64 << 10,
    "gram of fp32, before Hopper": 64 << 10,
}
_HOPPER = 200 << 10  # a program's shared memory there, and on what came after it for data centres, is larger

_TL_DTYPE = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _ulp_squared(x):
    """(unit in the last place of x)²: the exponent field alone, read as a float, times eps. fp64: squares of fp32 ulps
    of small weights underflow."""
    if x.dtype == tl.bfloat16:
        step = (x.to(tl.int16, bitcast=True) & 0x7F80).to(tl.bfloat16, bitcast=True).to(tl.float32) * 0.0078125
    elif x.dtype == tl.float16:
        step = (x.to(tl.int16, bitcast=True) & 0x7C00).to(tl.float16, bitcast=True).to(tl.float32) * 0.0009765625
    else:
        step = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True) * 1.1920928955078125e-07
    wide = step.to(tl.float64)
    return wide * wide


@triton.jit
def _tile_statistics(x, d, inside, squares, largest, same, ulps, broken, FULL: tl.constexpr, AXIS: tl.constexpr = 1):
    """Adds a tile of differences d (and of x, for FULL) to statistics per row or, along axis 0, per column: whichever
    lies along memory, so that a thread adds up its own. Squares in fp64: no ‖Δ‖ is too small."""
    wide = d.to(tl.float64)
    squares += tl.sum(wide * wide, AXIS)
    largest = tl.maximum(largest, tl.max(tl.abs(d), AXIS))
    broken += tl.sum((tl.abs(d) < float("inf")).to(tl.int32) ^ 1, AXIS)
    if FULL:
        same += tl.sum(((d == 0) & inside).to(tl.int32), AXIS)
        ulps += tl.sum(_ulp_squared(x), AXIS)
    return squares, largest, same, ulps, broken


@triton.jit
def _store_statistics(out, squares, largest, same, ulps, broken):
    tl.store(out, tl.sum(squares, 0))
    tl.store(out + 1, tl.max(largest, 0).to(tl.float64))
    tl.store(out + 2, tl.sum(same, 0).to(tl.float64))
    tl.store(out + 3, tl.sum(ulps, 0))
    tl.store(out + 4, tl.sum(broken, 0).to(tl.float64))


@triton.jit
def _matrix(address_ptr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(address_ptr).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _skinny_kernel(
    address_ptr, scale_ptr, q_ptr, y_ptr, partial_ptr, B, N, M, L, x_n, x_m, base_n, base_m,
    X: tl.constexpr, BASE: tl.constexpr, ALIGNED: tl.constexpr, STATS: tl.constexpr, FULL: tl.constexpr,
    BY_COLUMN: tl.constexpr, PRECISION: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Part of Y_b = X_b Q_b: rows of one tile, columns of one span, into y (spans, B, N, L). BY_COLUMN: X's columns lie
    along memory, not its rows."""
    SUMS: tl.constexpr = BLOCK if BY_COLUMN else ROWS
    tile, span, b = tl.program_id(0), tl.program_id(1), tl.program_id(2) % B
    l0 = tl.program_id(2) // B * COLUMNS
    n = tile * ROWS + tl.arange(0, ROWS)
    c = l0 + tl.arange(0, COLUMNS)
    k = tl.arange(0, BLOCK)
    n64 = n.to(tl.int64)[:, None]
    x_rows = _matrix(address_ptr + b, X, ALIGNED) + n64 * x_n
    if BASE is not None:
        base_rows = _matrix(address_ptr + B + b, BASE, ALIGNED) + n64 * base_n
    q_b = q_ptr + b.to(tl.int64) * M * L
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    if STATS:
        squares, ulps = tl.zeros([SUMS], tl.float64), tl.zeros([SUMS], tl.float64)
        largest = tl.zeros([SUMS], tl.float32)
        same, broken = tl.zeros([SUMS], tl.int32), tl.zeros([SUMS], tl.int32)
    for start in range(span * SPAN, tl.minimum(span * SPAN + SPAN, M), BLOCK):
        m = start + k
        m64 = m.to(tl.int64)
        inside = (n[:, None] < N) & (m[None, :] < M)
        x = tl.load(x_rows + m64[None, :] * x_m, mask=inside, other=0.0)
        d = x.to(tl.float32)
        if BASE is not None:
            d -= tl.load(base_rows + m64[None, :] * base_m, mask=inside, other=0.0).to(tl.float32)
        if STATS:
            squares, largest, same, ulps, broken = _tile_statistics(
                x, d, inside, squares, largest, same, ulps, broken, FULL, 0 if BY_COLUMN else 1
            )
        if scale_ptr is not None:
            d *= tl.load(scale_ptr + b).to(tl.float32)
        q = tl.load(q_b + m64[:, None] * L + c[None, :], mask=(m[:, None] < M) & (c[None, :] < L), other=0.0)
        acc = tl.dot(d.to(q_ptr.dtype.element_ty), q, acc, input_precision=PRECISION)
    y_rows = y_ptr + ((span.to(tl.int64) * B + b) * N + n64) * L
    tl.store(y_rows + c[None, :], acc, mask=(n[:, None] < N) & (c[None, :] < L))
    if STATS and l0 == 0:
        out = partial_ptr + ((b * tl.num_programs(0) + tile) * tl.num_programs(1) + span) * 5
        _store_statistics(out, squares, largest, same, ulps, broken)


@triton.jit
def _stats_kernel(
    address_ptr, partial_ptr, B, N, M, x_n, x_m, base_n, base_m,
    X: tl.constexpr, BASE: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr,
    SPAN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The statistics alone; N is the dimension of the larger stride."""
    tile, span, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tile * ROWS + tl.arange(0, ROWS)
    n64 = n.to(tl.int64)[:, None]
    x_rows = _matrix(address_ptr + b, X, ALIGNED) + n64 * x_n
    if BASE is not None:
        base_rows = _matrix(address_ptr + B + b, BASE, ALIGNED) + n64 * base_n
    squares, ulps = tl.zeros([ROWS], tl.float64), tl.zeros([ROWS], tl.float64)
    largest = tl.zeros([ROWS], tl.float32)
    same, broken = tl.zeros([ROWS], tl.int32), tl.zeros([ROWS], tl.int32)
    for start in range(span * SPAN, tl.minimum(span * SPAN + SPAN, M), BLOCK):
        m = start + tl.arange(0, BLOCK)
        inside = (n[:, None] < N) & (m[None, :] < M)
        x = tl.load(x_rows + m.to(tl.int64)[None, :] * x_m, mask=inside, other=0.0)
        d = x.to(tl.float32)
        if BASE is not None:
            d -= tl.load(base_rows + m.to(tl.int64)[None, :] * base_m, mask=inside, other=0.0).to(tl.float32)
        squares, largest, same, ulps, broken = _tile_statistics(
            x, d, inside, squares, largest, same, ulps, broken, FULL
        )
    out = partial_ptr + ((b * tl.num_programs(0) + tile) * tl.num_programs(1) + span) * 5
    _store_statistics(out, squares, largest, same, ulps, broken)


@triton.jit
def _gram_kernel(
    address_ptr, scale_ptr, g_ptr, B, N, M, x_n, x_m, base_n, base_m,
    X: tl.constexpr, BASE: tl.constexpr, ALIGNED: tl.constexpr, HALF: tl.constexpr,
    PRECISION: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile on or below the diagonal of G_b = X_bᵀ X_b, and its mirror image."""
    index, b = tl.program_id(0), tl.program_id(1)
    i = ((tl.sqrt((8 * index + 1).to(tl.float32)) - 1) / 2).to(tl.int32)
    i += ((i + 1) * (i + 2) // 2 <= index).to(tl.int32)  # the root may round either way
    i -= (i * (i + 1) // 2 > index).to(tl.int32)
    j = index - i * (i + 1) // 2
    row, column = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
    x_b = _matrix(address_ptr + b, X, ALIGNED)
    if BASE is not None:
        base_b = _matrix(address_ptr + B + b, BASE, ALIGNED)
    acc = tl.zeros([TILE, TILE], tl.float32)
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)
        n64 = n.to(tl.int64)
        in_left = (row[:, None] < M) & (n[None, :] < N)
        in_right = (n[:, None] < N) & (column[None, :] < M)
        left_at = row.to(tl.int64)[:, None]
        right_at = column.to(tl.int64)[None, :]
        left = tl.load(x_b + left_at * x_m + n64[None, :] * x_n, mask=in_left, other=0.0).to(tl.float32)
        right = tl.load(x_b + n64[:, None] * x_n + right_at * x_m, mask=in_right, other=0.0).to(tl.float32)
        if BASE is not None:
            left -= tl.load(base_b + left_at * base_m + n64[None, :] * base_n, mask=in_left, other=0.0).to(tl.float32)
            right -= tl.load(base_b + n64[:, None] * base_n + right_at * base_m, mask=in_right, other=0.0).to(
                tl.float32
            )
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + b).to(tl.float32)
            left, right = left * scale, right * scale
        if HALF is not None:
            left_hi, right_hi = left.to(HALF), right.to(HALF)
            left_lo = (left - left_hi.to(tl.float32)).to(HALF)
            right_lo = (right - right_hi.to(tl.float32)).to(HALF)
            acc = tl.dot(left_lo, right_hi, acc)
            acc = tl.dot(left_hi, right_lo, acc)
            acc = tl.dot(left_hi, right_hi, acc)
        else:
            acc = tl.dot(left, right, acc, input_precision=PRECISION)
    mirror = tl.trans(acc)
    if i == j:  # its two halves are sums of the same terms in another order
        acc = tl.where(row[:, None] >= column[None, :], acc, mirror)
        mirror = acc
    g_b = g_ptr + b.to(tl.int64) * M * M
    inside = (row[:, None] < M) & (column[None, :] < M)
    tl.store(g_b + row.to(tl.int64)[:, None] * M + column[None, :], acc, mask=inside)
    if i != j:
        inside = (column[:, None] < M) & (row[None, :] < M)
        tl.store(g_b + column.to(tl.int64)[:, None] * M + row[None, :], mirror, mask=inside)


@triton.jit
def _jacobi_kernel(w_ptr, value_ptr, L, SWEEPS, tolerance, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """One-sided Jacobi on a positive semidefinite matrix: rotate pairs of rows of [G | I] until the rows of the left
    part are orthogonal. They are then λ_i v_iᵀ, and the right part holds the v_i: λ_i = w_i · v_i.

    L is even. In each of L − 1 steps of a sweep the rows form L/2 disjoint pairs (row 0 stays, the others go round).
    """
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    w = w_ptr + tl.program_id(0).to(tl.int64) * (2 * L * L)
    k = tl.arange(0, HALF)
    pair = k < L // 2
    sweep = 0
    off = 1.0
    while (sweep < SWEEPS) & (off > tolerance):
        worst = tl.zeros([HALF], dtype)
        for step in range(0, L - 1):
            first = tl.where(k == 0, 0, 1 + (k - 1 + step) % (L - 1))
            second = 1 + (L - 2 - k + step) % (L - 1)
            p = w + first[:, None] * (2 * L)
            q = w + second[:, None] * (2 * L)
            pp, qq = tl.zeros([HALF, BLOCK], dtype), tl.zeros([HALF, BLOCK], dtype)
            pq = tl.zeros([HALF, BLOCK], dtype)
            for start in range(0, L, BLOCK):
                c = start + tl.arange(0, BLOCK)
                inside = pair[:, None] & (c[None, :] < L)
                wp = tl.load(p + c[None, :], mask=inside, other=0.0)
                wq = tl.load(q + c[None, :], mask=inside, other=0.0)
                pp += wp * wp
                qq += wq * wq
                pq += wp * wq
            pp, qq, pq = tl.sum(pp, 1), tl.sum(qq, 1), tl.sum(pq, 1)
            size = tl.sqrt(pp) * tl.sqrt(qq)
            # rows that are rounding noise have no direction: turning them would never end
            noise = tl.max(tl.maximum(pp, qq), 0) * (tolerance * tolerance)
            live = tl.minimum(pp, qq) > noise
            cosine = tl.where(live, tl.abs(pq) / tl.where(live, size, 1.0), 0.0)
            worst = tl.maximum(worst, cosine)
            turn = cosine > tolerance
            zeta = (qq - pp) / tl.where(turn, 2 * pq, 1.0)
            t = tl.where(zeta >= 0, 1.0, -1.0) / (tl.abs(zeta) + tl.sqrt(1 + zeta * zeta))
            t = tl.where(turn, t, 0.0)
            cos = 1 / tl.sqrt(1 + t * t)
            sin = cos * t
            tl.debug_barrier()
            for start in range(0, 2 * L, BLOCK):
                c = start + tl.arange(0, BLOCK)
                inside = pair[:, None] & (c[None, :] < 2 * L)
                wp = tl.load(p + c[None, :], mask=inside, other=0.0)
                wq = tl.load(q + c[None, :], mask=inside, other=0.0)
                tl.store(p + c[None, :], cos[:, None] * wp - sin[:, None] * wq, mask=inside)
                tl.store(q + c[None, :], sin[:, None] * wp + cos[:, None] * wq, mask=inside)
            tl.debug_barrier()  # the next step pairs other rows
        off = tl.max(worst, 0).to(tl.float32)
        sweep += 1
    for start in range(0, L, HALF):
        r = start + k
        value = tl.zeros([HALF], dtype)
        for column in range(0, L, BLOCK):
            c = column + tl.arange(0, BLOCK)
            at = w + r[:, None] * (2 * L) + c[None, :]
            inside = (r[:, None] < L) & (c[None, :] < L)
            value += tl.sum(tl.load(at, mask=inside, other=0.0) * tl.load(at + L, mask=inside, other=0.0), 1)
        tl.store(value_ptr + tl.program_id(0) * L + r, value, mask=r < L)


@device_cache(maxsize=256)
def _on_device(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """Cached, so that products with the same matrices again copy nothing and wait for nothing."""
    return uploaded(torch.tensor(addresses, dtype=torch.int64, device="cpu"), device)


@lru_cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may take."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else 1 << 20


def launch_config(kind: str, itemsize: int, shared: int) -> dict[str, int]:
    """The launch of a kernel on pairs of so many bytes an entry, with as many turns overlapping, up to the best number,
    as ``shared`` bytes of shared memory hold: a GeForce has less than half of an H100's.
    """
    if kind == "exact" and shared < _HOPPER:
        kind = "exact, before Hopper"
    if kind == "gram" and shared < _HOPPER and itemsize > 4:
        kind = "gram of fp32, before Hopper"  # of transposed pairs, more spills
    config = CONFIG[kind]
    if kind.startswith("gram"):
        loaded = 2 * GRAM_TILE * config["BLOCK"] * itemsize
    else:
        loaded = config["BLOCK"] * (config["ROWS"] * itemsize + COLUMNS * (2 if kind.startswith("rounded") else 4))
    fitting = 1 + (shared - _BESIDE[kind]) // loaded
    return {**config, "num_stages": max(1, min(config["num_stages"], fitting))}


class _Pair:
    """What every kernel takes of a batch of differences: addresses, strides and compile-time facts."""

    def __init__(self, x: list[Tensor], base: list[Tensor]):
        tensors = [*x, *base]
        self.device, self.itemsize = x[0].device, sum(group[0].element_size() for group in (x, base) if group)
        self.addresses = _on_device(tuple(t.data_ptr() for t in tensors), self.device)
        self.strides = (*x[0].stride(), *(base[0].stride() if base else (0, 0)))
        self.constants = {
            "X": _TL_DTYPE[x[0].dtype],
            "BASE": _TL_DTYPE[base[0].dtype] if base else None,
            "ALIGNED": all(t.data_ptr() % 16 == 0 for t in tensors),
        }

    def config(self, kind: str) -> dict[str, int]:
        return CONFIG[kind] if torch.version.hip else launch_config(kind, self.itemsize, _shared_memory(self.device))


def _served(x: list[Tensor], base: list[Tensor], *others: Tensor) -> bool:
    """Whether the kernels take these: not fp64, every matrix of one dtype and layout, and no more than a grid holds."""
    alike = all(t.dtype == group[0].dtype and t.stride() == group[0].stride() for group in (x, base) for t in group)
    fits = len(x) * max([1, *(triton.cdiv(q.shape[2], COLUMNS) for q in others)]) <= MAX_GRID
    return fits and alike and all(t.dtype in _TL_DTYPE for t in (*x[:1], *base[:1], *others)) and x[0].numel() > 0


def _sum_partials(partial: Tensor) -> Tensor:
    """(B, programs, 5) → (B, 5): sums, and a maximum in the second place."""
    result = partial.sum(1)
    result[:, 1] = partial[..., 1].amax(1)
    return result


def _multiply(
    x: list[Tensor], base: list[Tensor], q: Tensor, scale: Tensor | None, fast: bool, stats: bool = False, full=False
) -> tuple[Tensor, Tensor | None]:
    (N, M), B, L = x[0].shape, len(x), q.shape[2]
    pair = _Pair(x, base)
    config = pair.config(("rounded, statistics" if stats else "rounded") if fast else "exact")
    tiles, spans = triton.cdiv(N, config["ROWS"]), triton.cdiv(M, SPAN)
    q = (q.to(HALF_DTYPE) if fast else q).contiguous()
    y = q.new_empty((spans, B, N, L), dtype=torch.float32)
    partial = q.new_empty((B, tiles * spans, 5), dtype=torch.float64) if stats else None
    with on_device(pair.device):
        _skinny_kernel[(tiles, spans, B * triton.cdiv(L, COLUMNS))](
            pair.addresses, scale, q, y, partial, B, N, M, L, *pair.strides, **pair.constants,
            STATS=stats, FULL=full, BY_COLUMN=pair.strides[0] == 1, PRECISION=PRECISION, SPAN=SPAN, COLUMNS=COLUMNS,
            **config,
        )  # fmt: skip
    return y[0] if spans == 1 else y.sum(0), None if partial is None else _sum_partials(partial)


def launch_skinny(x: list[Tensor], base: list[Tensor], q: Tensor, scale: Tensor | None, fast: bool = False) -> Tensor:
    """Y_b = X_b q_b: x_b (N, M), q (B, M, L) fp32 → (B, N, L) fp32. ``fast``: as in `reference.gram_apply`."""
    if not _served(x, base, q) or q.numel() == 0:
        return reference.skinny(x, base, q, scale)
    return _multiply(x, base, q, scale, fast)[0]


def launch_gram_apply(x: list[Tensor], base: list[Tensor], q: Tensor, scale: Tensor | None, fast: bool) -> Tensor:
    """Z_b = X_bᵀ (X_b q_b), two readings of the pair: (B, M, L) → (B, M, L)."""
    y = launch_skinny(x, base, q, scale, fast)
    return launch_skinny([t.mT for t in x], [t.mT for t in base], y, scale, fast)


def launch_project(x: list[Tensor], base: list[Tensor], q: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """(Y_b = X_b q_b, X_bᵀ Y_b), two readings of the pair: (B, M, L) → (B, N, L), (B, M, L)."""
    y = launch_skinny(x, base, q, scale)
    return y, launch_skinny([t.mT for t in x], [t.mT for t in base], y, scale)


def launch_sketch(x: list[Tensor], base: list[Tensor], columns: int, seed: int, full: bool) -> tuple[Tensor, Tensor]:
    """(X_bᵀ (X_b Ω) of the unscaled differences, Ω (M, columns) of :mod:`signs`; their statistics as in
    :func:`launch_stats`) from two readings."""
    B, M = len(x), x[0].shape[1]
    q = signs.dense(seed, M, columns, x[0].device).expand(B, M, columns)
    if not _served(x, base, q) or q.numel() == 0:
        return reference.sketch(x, base, columns, seed, full)
    y, statistics = _multiply(x, base, q, None, True, True, full)
    return launch_skinny([t.mT for t in x], [t.mT for t in base], y, None, True), statistics


def launch_stats(x: list[Tensor], base: list[Tensor], full: bool) -> Tensor:
    """(B, 5) fp64: Σ Δ², max |Δ|, and entries with Δ = 0, Σ ulp(x)² (both only when full), non-finite entries."""
    if not _served(x, base):
        return reference.stats(x, base, full)
    if x[0].stride(1) != 1:  # read along memory
        x, base = [t.mT for t in x], [t.mT for t in base]
    (N, M), B = x[0].shape, len(x)
    pair = _Pair(x, base)
    tiles, spans = triton.cdiv(N, STATS_ROWS), triton.cdiv(M, SPAN)
    partial = torch.empty((B, tiles * spans, 5), dtype=torch.float64, device=pair.device)
    with on_device(pair.device):
        _stats_kernel[(tiles, spans, B)](
            pair.addresses, partial, B, N, M, *pair.strides, **pair.constants,
            FULL=full, SPAN=SPAN, ROWS=STATS_ROWS, BLOCK=256, **options(STATS_WARPS),
        )  # fmt: skip
    return _sum_partials(partial)


def launch_gram(x: list[Tensor], base: list[Tensor], scale: Tensor | None, double: bool) -> Tensor:
    """G_b = X_bᵀ X_b, (B, M, M) fp32, exactly symmetric."""
    if double or not _served(x, base):
        return reference.gram(x, base, scale, double)
    (N, M), B = x[0].shape, len(x)
    pair = _Pair(x, base)
    tiles = triton.cdiv(M, GRAM_TILE)
    g = torch.empty((B, M, M), dtype=torch.float32, device=pair.device)
    sixteen_bits = all(t.dtype != torch.float32 for t in (*x[:1], *base[:1]))
    with on_device(pair.device):
        _gram_kernel[(tiles * (tiles + 1) // 2, B)](
            pair.addresses, scale, g, B, N, M, *pair.strides, **pair.constants,
            HALF=_TL_DTYPE[HALF_DTYPE] if sixteen_bits else None, PRECISION=PRECISION, TILE=GRAM_TILE,
            **pair.config("gram"),
        )  # fmt: skip
    return g


def launch_eigh(g: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, (B, L) and eigenvectors in columns (B, L, L) of positive semidefinite g (B, L, L), fp32
    or fp64. One program per matrix, which stays in the L2: 40·L³ bytes and 9·L³ operations a sweep, ~8 sweeps. That is
    slow but the same for 1 matrix or 100, where PyTorch takes one after another."""
    B, L = g.shape[:2]
    if not 2 <= L <= JACOBI_LIMIT or B * JACOBI_ALONE**2 < L**2:
        return reference.eigh(g)
    even = L + L % 2  # an extra row and column of zeros meets every row at right angles and stays what it is
    w = g.new_zeros((B, even, 2 * even))
    w[:, :L, :L] = g
    w[:, :, even:].diagonal(dim1=-2, dim2=-1).fill_(1)
    values = g.new_empty((B, even))
    half = triton.next_power_of_2(even // 2)
    tile, launch = JACOBI["hip" if torch.version.hip else "cuda"]
    with on_device(g.device):
        _jacobi_kernel[(B,)](
            w, values, even, 20, L * torch.finfo(g.dtype).eps,
            HALF=half, BLOCK=min(2 * half, tile // half), **launch,
        )  # fmt: skip
    values, order = values[:, :L].sort(dim=-1, descending=True)
    vectors = w[:, :L, even : even + L].gather(1, order[..., None].expand(B, L, L))
    return values, vectors.mT.contiguous()
