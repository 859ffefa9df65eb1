"""GPU kernels of the extrapolation: a whole list of weights in one launch, and the differentiable form.

    W = A + α·(C − A)  in fp32, rounded once;  α = 1 copies C and α = 0 copies A, bit for bit.

Legend: L tensors in a list, cut in chunks of CHUNK elements; one program serves one chunk.

Traffic in bf16: read A, read C, write W, 6 bytes and ~21 instructions per element (fp32 masters: 4 bytes more). At the
4.3 TB/s an H200 copies at, 41 instructions per element would fit in that time, so the statistics are free: they
need no further read. The partial sums are 12 bytes per chunk. Statistics are added in a fixed order (chunk sums, then
one program per tensor over its chunks), never by float atomics: they repeat bit for bit. Tiles are copied to shared
memory some turns ahead, so that memory is always busy; a turn's tile is read before any later one is written, which is
what lets the parameters be their own currents.
"""

from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device_cache import device_cache
from ..launch import on_device, options, uploaded
from . import reference

CHUNK = 32768
MOST = 4096  # tensors of a launch: each program looks its own up among all, and beyond 16,384 registers spill
LANES = 256  # threads of a program: 8 warps, or 4 waves of 64
CUDA, HIP = options(8), options(4)
LAUNCH = HIP if torch.version.hip else CUDA
# 16-byte loads of a thread from each tensor in a turn; turns that overlap: all tiles but one are under way while one is
# used. Where addresses are no multiples of 16, loads are of single elements.
LOADS, STAGES = (2, 1) if torch.version.hip else (1, 4)
UNALIGNED_LOADS = 8
PER_THREAD = 16  # elements of the differentiable form

_TL_DTYPE = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _sum_by_lane(x, LANES: tl.constexpr):
    """Sum of each thread's own elements of a (loads, lanes·vector) tile: no communication."""
    return tl.sum(tl.sum(tl.reshape(x, (x.shape[0], LANES, x.shape[1] // LANES)), 2), 0)


@triton.jit
def _extrapolate_kernel(
    table_ptr, alpha_ptr, partial_ptr, L,
    P: tl.constexpr, A: tl.constexpr, C: tl.constexpr, MASTER: tl.constexpr, STATS: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, LOADS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
    STAGES: tl.constexpr, L_POW2: tl.constexpr,
):  # fmt: skip
    """table (7, L) int64: first chunk, elements, addresses of parameter, anchor, current and master, row."""
    pid = tl.program_id(0)
    index = tl.arange(0, L_POW2)
    first_chunks = tl.load(table_ptr + index, mask=index < L, other=9223372036854775807)
    i = tl.sum((first_chunks <= pid).to(tl.int32), 0) - 1
    entry = table_ptr + i
    start = (pid - tl.load(entry)) * CHUNK  # int64: a tensor may hold more than 2^31 elements
    numel = tl.load(entry + L) - start
    param = tl.load(entry + 2 * L).to(tl.pointer_type(P)) + start
    anchor = tl.load(entry + 3 * L).to(tl.pointer_type(A)) + start
    current = tl.load(entry + 4 * L).to(tl.pointer_type(C)) + start
    master = tl.load(entry + 5 * L).to(tl.pointer_type(tl.float32)) + start
    if ALIGNED:
        param, anchor, current = tl.multiple_of(param, 16), tl.multiple_of(anchor, 16), tl.multiple_of(current, 16)
        master = tl.multiple_of(master, 16)
    alpha = tl.load(alpha_ptr + i)
    length = tl.minimum(numel, CHUNK).to(tl.int32)
    tile = tl.arange(0, LOADS)[:, None] * (LANES * VECTOR) + tl.arange(0, LANES * VECTOR)[None, :]
    BLOCK: tl.constexpr = LOADS * LANES * VECTOR
    delta_sq = tl.zeros([LANES], tl.float32)
    weight_sq = tl.zeros([LANES], tl.float32)
    broken = tl.zeros([LANES], tl.int32)
    whole = length // BLOCK * BLOCK
    for MASKED in tl.static_range(2):  # whole blocks, then the tail
        first, last = whole if MASKED else 0, length if MASKED else whole
        for begin in tl.range(first, last, BLOCK, num_stages=1 if MASKED else STAGES):
            at = begin + tile
            if MASKED:
                a = tl.load(anchor + at, mask=at < length, other=0.0)
                c = tl.load(current + at, mask=at < length, other=0.0)
            else:
                a = tl.load(anchor + at)
                c = tl.load(current + at)
            delta = c.to(tl.float32) - a.to(tl.float32)
            value = tl.fma(delta, alpha, a.to(tl.float32))
            if MASTER:
                # A + 0·(C − A) loses the sign of −0 and turns an infinite C into NaN: the ends are copies
                value = tl.where(alpha == 1, c.to(tl.float32), tl.where(alpha == 0, a.to(tl.float32), value))
                if MASKED:
                    tl.store(master + at, value, mask=at < length)
                else:
                    tl.store(master + at, value)
            w = tl.where(alpha == 1, c.to(P), tl.where(alpha == 0, a.to(P), value.to(P)))
            if MASKED:
                tl.store(param + at, w, mask=at < length)
            else:
                tl.store(param + at, w)
            if STATS:
                written = w.to(tl.float32)
                delta_sq += _sum_by_lane(delta * delta, LANES)
                weight_sq += _sum_by_lane(written * written, LANES)
                broken += _sum_by_lane((tl.abs(written) < float("inf")).to(tl.int32) ^ 1, LANES)
    if STATS:
        tl.store(partial_ptr + 3 * pid, tl.sum(delta_sq, 0))
        tl.store(partial_ptr + 3 * pid + 1, tl.sum(weight_sq, 0))
        tl.store(partial_ptr + 3 * pid + 2, tl.sum(broken, 0).to(tl.float32))


@triton.jit
def _sum_chunks_kernel(partial_ptr, table_ptr, row_ptr, stats_ptr, L, chunks, BLOCK: tl.constexpr):
    """Adds the chunk sums of tensor i, in order, into its row of stats (·, 3)."""
    i = tl.program_id(0)
    begin = tl.load(table_ptr + i).to(tl.int32)
    end = chunks
    if i + 1 < L:
        end = tl.load(table_ptr + i + 1).to(tl.int32)
    sum0, sum1, sum2 = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for at in range(begin, end, BLOCK):
        index = at + tl.arange(0, BLOCK)
        inside = index < end
        sum0 += tl.load(partial_ptr + 3 * index, mask=inside, other=0.0)
        sum1 += tl.load(partial_ptr + 3 * index + 1, mask=inside, other=0.0)
        sum2 += tl.load(partial_ptr + 3 * index + 2, mask=inside, other=0.0)
    out = stats_ptr + 3 * tl.load(row_ptr + i)
    tl.store(out, tl.sum(sum0, 0))
    tl.store(out + 1, tl.sum(sum1, 0))
    tl.store(out + 2, tl.sum(sum2, 0))


@triton.jit
def _forward_kernel(w0_ptr, delta_ptr, alpha_ptr, out_ptr, numel, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    w0 = tl.load(w0_ptr + at, mask=at < numel).to(tl.float32)
    delta = tl.load(delta_ptr + at, mask=at < numel).to(tl.float32)
    value = tl.fma(delta, tl.load(alpha_ptr).to(tl.float32), w0)
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=at < numel)


@triton.jit
def _backward_kernel(grad_ptr, delta_ptr, alpha_ptr, grad_delta_ptr, partial_ptr, numel, BLOCK: tl.constexpr):
    """grad_delta = α·grad, and this block's Σ grad·delta."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    grad = tl.load(grad_ptr + at, mask=at < numel, other=0.0).to(tl.float32)
    delta = tl.load(delta_ptr + at, mask=at < numel, other=0.0).to(tl.float32)
    scaled = grad * tl.load(alpha_ptr).to(tl.float32)
    tl.store(grad_delta_ptr + at, scaled.to(grad_delta_ptr.dtype.element_ty), mask=at < numel)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(grad * delta, 0))


@device_cache(maxsize=16)
def _table(columns: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """The device's copy (7, L) of a list's first chunks, sizes, addresses and rows in alphas and statistics.

    Cached: extrapolating a list again copies nothing, so any launch but the first can be captured in a CUDA graph.
    """
    return uploaded(torch.tensor(columns, dtype=torch.int64, device="cpu"), device)


def _mix_of_all(params, anchors, currents, masters) -> tuple | None:
    """The one group that the whole list is, where it is one: for thousands of tensors asking each by each takes longer
    than the launch."""
    columns = (params, anchors, currents, *([masters] if masters else []))
    dtypes = [{t.dtype for t in column} for column in columns]
    served = all(len(d) == 1 for d in dtypes) and all(d <= _TL_DTYPE.keys() for d in dtypes)
    served = served and (not masters or dtypes[3] == {torch.float32})
    for column in columns:
        served = served and all(t.is_contiguous() for t in column) and not any(t.data_ptr() % 16 for t in column)
    return (*(d.pop() for d in dtypes[:3]), True) if served and all(t.numel() for t in params) else None


def launch_extrapolate(
    params: list[Tensor],
    anchors: list[Tensor],
    currents: list[Tensor],
    alphas: Tensor,
    masters: list[Tensor] | None,
    stats_out: Tensor | None,
) -> None:
    """Write anchor + α·(current − anchor) into each parameter, and its fp32 master if given; one launch per dtype mix
    and `MOST` tensors.

    Lists of L tensors of equal shapes; currents may be the params themselves. alphas (L,) on the device.
    stats_out (L, 3) fp32: ‖C − A‖², ‖W‖² as written to the parameter, elements of W that are not finite.
    fp64 and non-contiguous tensors are left to the reference. Nothing here waits for the device.
    """
    groups: dict[tuple, list[int]] = {}
    alike = _mix_of_all(params, anchors, currents, masters)
    if alike:
        groups[alike] = list(range(len(params)))
    for i, columns in enumerate(() if alike else zip(params, anchors, currents, masters or params, strict=True)):
        *dtypes, master_dtype = (t.dtype for t in columns)
        served = all(d in _TL_DTYPE for d in dtypes) and all(t.is_contiguous() for t in columns)
        served &= not masters or master_dtype == torch.float32
        if params[i].numel() == 0:
            if stats_out is not None:
                stats_out[i].zero_()
        elif served:
            aligned = all(t.data_ptr() % 16 == 0 for t in columns)
            groups.setdefault((*dtypes, aligned), []).append(i)
        else:
            one = slice(i, i + 1)
            master = masters[one] if masters else []
            row = reference.extrapolate_(
                params[one], anchors[one], currents[one], alphas[one], master, stats_out is not None
            )
            if stats_out is not None:
                stats_out[i] = row[0]

    narrow = alphas.float().contiguous()
    parts = [(mix, group[i : i + MOST]) for mix, group in groups.items() for i in range(0, len(group), MOST)]
    for (p, a, c, aligned), group in parts:
        addresses = [tuple(t[i].data_ptr() for i in group) for t in (params, anchors, currents, masters or params)]
        sizes = tuple(params[i].numel() for i in group)
        *first_chunks, chunks = accumulate((-(-size // CHUNK) for size in sizes), initial=0)
        table = _table((tuple(first_chunks), sizes, *addresses, tuple(group)), alphas.device)
        rows = table[6]
        partial = narrow.new_empty(3 * chunks if stats_out is not None else 0)
        widest = max(d.itemsize for d in (p, a, c, *([torch.float32] if masters else [])))
        loads, vector, stages = (LOADS, 16 // widest, STAGES) if aligned else (UNALIGNED_LOADS, 1, 1)
        with on_device(alphas.device):
            _extrapolate_kernel[(chunks,)](
                table, narrow if len(group) == len(params) else narrow[rows], partial, len(group),
                P=_TL_DTYPE[p], A=_TL_DTYPE[a], C=_TL_DTYPE[c], MASTER=bool(masters), STATS=stats_out is not None,
                ALIGNED=aligned, CHUNK=CHUNK, LOADS=loads, LANES=LANES, VECTOR=vector, STAGES=stages,
                L_POW2=triton.next_power_of_2(len(group)), **LAUNCH,
            )  # fmt: skip
            if stats_out is not None:
                _sum_chunks_kernel[(len(group),)](
                    partial, table, rows, stats_out, len(group), chunks, BLOCK=1024, **options(4)
                )


def launch_extrapolate_forward(w0: Tensor, delta: Tensor, alpha: Tensor) -> Tensor:
    """w0 + α·delta in w0's dtype; alpha a scalar tensor on the same device."""
    w0, delta = w0.contiguous(), delta.contiguous()
    out = torch.empty_like(w0)
    block = PER_THREAD * LANES
    if w0.numel():
        with on_device(w0.device):
            _forward_kernel[(triton.cdiv(w0.numel(), block),)](w0, delta, alpha, out, w0.numel(), BLOCK=block, **LAUNCH)
    return out


def launch_extrapolate_backward(grad: Tensor, delta: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """∂/∂delta = α·grad in delta's dtype and ∂/∂α = Σ grad·delta in alpha's, from one read of both."""
    grad, delta = grad.contiguous(), delta.contiguous()
    grad_delta = torch.empty_like(delta)
    block = PER_THREAD * LANES
    programs = triton.cdiv(grad.numel(), block)
    partial = torch.empty(programs, dtype=torch.float32, device=grad.device)
    if programs:
        with on_device(grad.device):
            _backward_kernel[(programs,)](grad, delta, alpha, grad_delta, partial, grad.numel(), BLOCK=block, **LAUNCH)
    return grad_delta, partial.sum(dtype=torch.float64).to(alpha.dtype)
