"""Rows of whose teacher k entries are known by their ids: the vocabulary as k + 1 buckets, the last of which is all
others together. The divergence of the buckets is the row kernel's (`triton_kernels`, with whose numbers in base 2 all
is done here).

    marks    a bit per entry, set for the known ones            N·V/8 bytes
    others   (max, Σ 2^u, and if asked Σ 2^u·u; u = z − max)    reads the logits and the marks
             of each slice of a row
    buckets  log-weights of the k + 1, from the slices' sums    k scattered reads a row
    spread   gradient of all as if others                       reads the logits, writes their gradient
    place    that of the known ones over it                     k scattered writes a row

The marks, written and read, add an eighth to what reading logits in bf16 moves, and let any k be left out in one pass.
Out of the whole sum they could not be taken afterwards: that cancels where they hold nearly everything.

N rows, V vocabulary, S slices per row.
"""

import torch
import triton
import triton.language as tl

from ..launch import on_device, options
from . import reference
from .family import Spec, TopKSpec
from .triton_kernels import (
    LN2,
    NEVER,
    NOTHING,
    PAD,
    _by_lane,
    _load,
    _place_of,
    _tanh,
    _tile_max,
    _tile_sum,
    base_two,
    for_any_strides,
    launch_divergence_rows,
    launch_for,
    tiles,
)

BLOCK = 256  # known entries at a time
WORD = tl.constexpr(32)


@triton.jit
def _start_of(row, T, stride, sequence_stride):
    sequence, place = _place_of(row, T)
    return sequence * sequence_stride + place * stride


@triton.jit(do_not_specialize=["k"])
def _mark_kernel(ids_ptr, marks_ptr, k, words, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + row * k + at, mask=at < k, other=-1).to(tl.int32)
    tl.atomic_or(marks_ptr + row * words + ids // WORD, 1 << (ids % WORD), mask=ids >= 0, sem="relaxed")


@triton.jit(do_not_specialize=["T"])
def _others_kernel(
    student_ptr, marks_ptr, mask_ptr, part_ptr, T, V, words, student_stride, student_sequence, c, pre,
    CAPPED: tl.constexpr, STATS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, LOADS: tl.constexpr,
    STAGES: tl.constexpr, SLICE: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    row, piece = tl.program_id(0) // S, tl.program_id(0) % S
    if mask_ptr is not None and tl.load(mask_ptr + row) == 0:
        return
    s_row = student_ptr + _start_of(row, T, student_stride, student_sequence)
    marks = marks_ptr + row.to(tl.int64) * words
    cols0 = tl.arange(0, LOADS)[:, None] * (LANES * VECTOR) + tl.arange(0, LANES * VECTOR)[None, :]
    TILE: tl.constexpr = LOADS * LANES * VECTOR
    begin = piece * SLICE
    end = tl.minimum(begin + SLICE, V)
    whole = begin + tl.maximum(end - begin, 0) // TILE * TILE
    m = tl.zeros([LANES], tl.float32) + NOTHING
    total = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    for MASKED in tl.static_range(2):
        first, last = whole if MASKED else begin, end if MASKED else whole
        for start in tl.range(first, last, TILE, num_stages=1 if MASKED else STAGES):
            cols = start + cols0
            x = _load(s_row, start, cols, V, pre, CAPPED, MASKED, LANES, "evict_last")
            first_of = start + tl.arange(0, LOADS)[:, None] * (LANES * VECTOR) + tl.arange(0, LANES)[None, :] * VECTOR
            word = tl.load(marks + first_of // WORD, mask=first_of < V, other=0)  # one for a thread's neighbours
            known = (word >> (first_of % WORD))[:, :, None] >> tl.arange(0, VECTOR)[None, None, :]
            x = tl.where((known & 1) != 0, PAD, _by_lane(x, LANES))
            new_m = tl.maximum(m, _tile_max(x) * c)
            factor = tl.exp2(m - new_m)
            u = tl.fma(x, c, -new_m[None, :, None])
            e = tl.exp2(u)
            if STATS:
                weighted = factor * tl.fma(m - new_m, total, weighted) + _tile_sum(e * tl.maximum(u, NEVER))
            total = total * factor + _tile_sum(e)
            m = new_m
    top = tl.max(m, 0)
    part = part_ptr + row.to(tl.int64) * (3 * S) + piece
    tl.store(part, top)
    tl.store(part + S, tl.sum(total * tl.exp2(m - top), 0))
    if STATS:
        tl.store(part + 2 * S, tl.sum(tl.exp2(m - top) * tl.fma(m - top, total, weighted), 0))


_any_others_kernel = for_any_strides(_others_kernel)


@triton.jit
def _known_logits(row_ptr, ids, pre, CAPPED: tl.constexpr):
    """Or tanh of them under a soft cap, as `_load` has it; −inf where the id is negative."""
    x = tl.load(row_ptr + ids, mask=ids >= 0, other=0.0).to(tl.float32)
    if CAPPED:
        x = _tanh(x * pre)
    return tl.where(ids >= 0, x, float("-inf"))


@triton.jit(do_not_specialize=["T", "k", "columns"])
def _buckets_kernel(
    student_ptr, ids_ptr, mask_ptr, part_ptr, record_ptr, bucket_ptr, T, k, columns, student_stride, student_sequence,
    c, pre, CAPPED: tl.constexpr, TAIL: tl.constexpr, STATS: tl.constexpr, S: tl.constexpr, S_POW2: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    if mask_ptr is not None and tl.load(mask_ptr + row) == 0:
        return
    s_row = student_ptr + _start_of(row, T, student_stride, student_sequence)
    row64 = row.to(tl.int64)
    ids_ptr += row64 * k
    bucket_ptr += row64 * columns
    most = tl.full((), float("-inf"), tl.float32)
    if TAIL:
        piece = tl.arange(0, S_POW2)
        part = part_ptr + row64 * (3 * S) + piece
        m = tl.load(part, mask=piece < S, other=NOTHING)
        total = tl.load(part + S, mask=piece < S, other=0.0)
        top = tl.max(m, 0)
        total1 = tl.sum(total * tl.exp2(m - top), 0)
        tl.store(record_ptr + 3 * row64, top)
        tl.store(record_ptr + 3 * row64 + 1, total1)
        if STATS:
            weighted = tl.load(part + 2 * S, mask=piece < S, other=0.0)
            mean = tl.sum(tl.exp2(m - top) * tl.fma(m - top, total, weighted), 0) / total1
            tl.store(record_ptr + 3 * row64 + 2, tl.where(total1 == 0, 0.0, (tl.log2(total1) - mean) * LN2))
        most = top + tl.log2(total1)
    for start in range(0, k, BLOCK):
        at = start + tl.arange(0, BLOCK)
        ids = tl.load(ids_ptr + at, mask=at < k, other=-1)
        most = tl.maximum(most, tl.max(_known_logits(s_row, ids, pre, CAPPED) * c, 0))
    most = tl.where(most == float("-inf"), 0.0, most)
    for start in range(0, k, BLOCK):
        at = start + tl.arange(0, BLOCK)
        ids = tl.load(ids_ptr + at, mask=at < k, other=-1)
        z = tl.fma(_known_logits(s_row, ids, pre, CAPPED), c, -most)
        tl.store(bucket_ptr + at, z * LN2, mask=at < k)
    if TAIL:
        tl.store(bucket_ptr + k, (top - most + tl.log2(total1)) * LN2)


@triton.jit(do_not_specialize=["T", "k", "columns"])
def _chain_kernel(
    student_ptr, ids_ptr, bucket_ptr, T, k, columns, student_stride, student_sequence, chain, pre, CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the known entries, times dz/dx of their logits. Before these may be overwritten."""
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + row.to(tl.int64) * k + at, mask=at < k, other=-1)
    grad = bucket_ptr + row.to(tl.int64) * columns + at
    g = tl.load(grad, mask=ids >= 0, other=0.0) * chain
    if CAPPED:
        s_row = student_ptr + _start_of(row, T, student_stride, student_sequence)
        tanh = _known_logits(s_row, ids, pre, CAPPED)
        g *= 1 - tanh * tanh
    tl.store(grad, g, mask=ids >= 0)


@triton.jit(do_not_specialize=["T", "columns"])
def _spread_kernel(
    student_ptr, grad_ptr, mask_ptr, record_ptr, bucket_ptr, T, V, columns, student_stride, student_sequence,
    grad_stride, grad_sequence, c, pre, chain,
    CAPPED: tl.constexpr, TAIL: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, LOADS: tl.constexpr,
    STAGES: tl.constexpr, SLICE: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    row, piece = tl.program_id(0) // S, tl.program_id(0) % S
    s_row = student_ptr + _start_of(row, T, student_stride, student_sequence)
    g_row = grad_ptr + _start_of(row, T, grad_stride, grad_sequence)
    cols0 = tl.arange(0, LOADS)[:, None] * (LANES * VECTOR) + tl.arange(0, LANES * VECTOR)[None, :]
    TILE: tl.constexpr = LOADS * LANES * VECTOR
    begin = piece * SLICE
    end = tl.minimum(begin + SLICE, V)
    live = TAIL
    if mask_ptr is not None:
        live = live & (tl.load(mask_ptr + row) != 0)
    if live:
        row64 = row.to(tl.int64)
        top, total = tl.load(record_ptr + 3 * row64), tl.load(record_ptr + 3 * row64 + 1)
        factor = tl.load(bucket_ptr + row64 * columns + columns - 1) * chain
        factor = tl.where(total == 0, 0.0, factor / total)
        whole = begin + tl.maximum(end - begin, 0) // TILE * TILE
        for MASKED in tl.static_range(2):
            first, last = whole if MASKED else begin, end if MASKED else whole
            for start in tl.range(first, last, TILE, num_stages=1 if MASKED else STAGES):
                cols = start + cols0
                x = _load(s_row, start, cols, V, pre, CAPPED, MASKED, LANES, "evict_first")
                g = tl.exp2(tl.fma(x, c, -top)) * factor
                if CAPPED:
                    g *= 1 - x * x
                g = g.to(grad_ptr.dtype.element_ty)
                if MASKED:
                    tl.store(g_row + cols, g, mask=cols < V, eviction_policy="evict_first")
                else:
                    tl.store(g_row + cols, g, eviction_policy="evict_first")
    else:
        for start in range(begin, end, TILE):
            cols = start + cols0
            tl.store(g_row + cols, tl.zeros_like(cols).to(grad_ptr.dtype.element_ty), mask=cols < V)


_any_spread_kernel = for_any_strides(_spread_kernel)


@triton.jit(do_not_specialize=["T", "k", "columns"])
def _place_kernel(ids_ptr, bucket_ptr, grad_ptr, T, k, columns, grad_stride, grad_sequence, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + row.to(tl.int64) * k + at, mask=at < k, other=-1)
    g = tl.load(bucket_ptr + row.to(tl.int64) * columns + at, mask=ids >= 0, other=0.0)
    g_row = grad_ptr + _start_of(row, T, grad_stride, grad_sequence)
    tl.store(g_row + ids, g.to(grad_ptr.dtype.element_ty), mask=ids >= 0)


def launch_topk_rows(
    student: torch.Tensor,
    ids: torch.Tensor,
    known: torch.Tensor | None,
    mask: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    spec: TopKSpec,
    grad_out: torch.Tensor | None,
    with_stats: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.topk_rows` of logits (N, V), or (B, T, V) with N = B·T, in bf16, fp16 or fp32, last dimension
    contiguous; ids (N, k) int64; known (N, k + tail) or None.

    grad_out, of the student's shape, or None receives the gradient, and may be `student` itself. Returns loss (N,) and
    stats (3, N), fp32, as `launch_divergence_rows`. Nothing here waits for the device.
    """
    *member, tail, temperature, scale, softcap = spec
    *sequences, T, V = student.shape
    N, k = ids.shape
    device = student.device
    if N == 0:
        empty = torch.empty(0, dtype=torch.float32, device=device)
        return empty, empty.new_empty((3, 0) if with_stats else 0)
    ids = (ids if mask is None else ids.masked_fill(~mask[:, None], -1)).contiguous()
    mask = None if mask is None else mask.contiguous()
    launch, _ = launch_for(device)
    T = T if sequences else None
    rows = [student] if grad_out is None else [student, grad_out]
    aligned, tiling = tiles(launch, rows)
    S, columns = triton.cdiv(V, tiling["SLICE"]), k + tail
    c, pre = base_two(temperature, scale, softcap)
    how = launch.options(False, aligned, softcap != 0)
    places = [(t.stride(-2), t.stride(0) if sequences else 0) for t in rows]
    buckets = torch.zeros(N, columns, dtype=torch.float32, device=device)
    record = buckets.new_empty(N, 3)  # of the others: reference, sum, entropy
    entropy = known is None and with_stats
    per_k = (N, triton.cdiv(k, BLOCK))
    torch._assert_async((ids < V).all(), f"ids must be token ids below {V}")  # nobody has looked; no waiting
    with on_device(device):
        part = None
        if tail:
            words = triton.cdiv(V, WORD.value)
            marks = torch.zeros(N, words, dtype=torch.int32, device=device)
            part = buckets.new_empty(N, 3, S)
            _mark_kernel[per_k](ids, marks, k, words, BLOCK=BLOCK, **options(4))
            (_others_kernel if aligned else _any_others_kernel)[(N * S,)](
                student, marks, mask, part, T, V, words, *places[0], c, pre,
                CAPPED=softcap != 0, STATS=entropy, S=S, **tiling, **how,
            )  # fmt: skip
        _buckets_kernel[(N,)](
            student, ids, mask, part, record, buckets, T, k, columns, *places[0], c, pre,
            CAPPED=softcap != 0, TAIL=tail, STATS=entropy, S=S, S_POW2=triton.next_power_of_2(S), BLOCK=BLOCK,
            **options(4),
        )  # fmt: skip
        if known is None:
            loss, grad, stats = reference.log_prob(buckets, mask, row_scale, record[:, 2] if entropy else None)
            buckets, stats = grad.contiguous(), loss.new_empty(0) if stats is None else stats
        else:
            over = None if grad_out is None else buckets
            rows = buckets, known.float().contiguous(), mask, row_scale
            loss, stats = launch_divergence_rows(*rows, Spec(*member), over, with_stats)
        if grad_out is None:
            return loss, stats
        chain, shape = scale / temperature, (T, k, columns)
        _chain_kernel[per_k](
            student, ids, buckets, *shape, *places[0], chain, pre, CAPPED=softcap != 0, BLOCK=BLOCK, **options(4)
        )
        (_spread_kernel if aligned else _any_spread_kernel)[(N * S,)](
            student, grad_out, mask, record, buckets, T, V, columns, *places[0], *places[1], c, pre, chain,
            CAPPED=softcap != 0, TAIL=tail, S=S, **tiling, **how,
        )  # fmt: skip
        _place_kernel[per_k](ids, buckets, grad_out, *shape, *places[1], BLOCK=BLOCK, **options(4))
    return loss, stats
