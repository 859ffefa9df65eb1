"""Row kernel for student-teacher divergences over a large vocabulary, value and gradient in one launch.

With x = z·log2(e) (so that every exponential is one exp2), and references Mx, My that are running maxima,

    u = x − Mx,  v = y − My,  l = Σ 2^u,  A = Σ 2^u·(u − v)
    KL(x‖y) = A/lx − log2 lx + log2 ly,      d KL / d x = q·(u − v − A/lx)          (in bits; × ln 2 for nats)

One online pass over a row gathers (Mx, lx, My, ly, A), a second writes the gradient; neither subtracts two large
numbers, because u and v are small wherever q is not. Reverse KL has x = student, forward KL x = teacher, whose
gradient q − p needs no A. Strict mixtures (0 < π < 1) put a pass for Σφ and Σw between the two:

    m = π·p + (1−π)·q,  φ = a·p·(lp − lm) + b·q·(lq − lm),  w = b·q·(lq − lm) − (1−π)·q/m·(a·p + b·q)
    D = Σφ,  dD / ds = w − q·Σw

Legend: N rows, V shared vocabulary, Vs student columns, S slices per row.

Traffic. A row of both tensors is 608 KB in bf16 at V = 151936, too large for one multiprocessor and, times every
resident program, for the L2. So a row is cut in S slices, and the work is a queue of items (phase, row, slice) in which
phase k of row r stands `skew` rows behind phase k−1, far enough that none has to wait: resident programs / (phases·S).
On an H200 that is 27 rows of 13 slices: the second read comes 16 MB after the first and is meant to hit the L2, so that
device memory sees read s, read t, write ds and nothing else. An item waits only for items before it in the queue, and
the queue is drawn in order from a counter, so the wait always ends however few programs fit on the device (and the
sequential interpreter can run it).

Latency. An item of 24 KB of each tensor lasts a few microseconds, and waits for most of them: for its place in the
queue, for memory, for its count to be seen. So tiles are copied to shared memory several turns ahead, and few registers
are taken, so that five programs share a multiprocessor.

Instructions per element, reverse KL in bf16 for sm_90: 16.2 and 12.3 in the loops (`python tests/aot.py`), of which 2.1
and 1.0 are exp2, and 6.4 around them (by hand from the listing, 619 of a thread for the two items of its 96 elements:
drawing, filling the pipeline, adding up, announcing). At 4 per clock and 32 lanes on 132 multiprocessors of 1.98 GHz,
35 take 1.3 ms for 8192 rows where the memory takes 1.7 ms.

Every sum has a fixed order (the last slice to arrive adds all S partial results by index): results are bitwise
repeatable. No autotuning: the gradient may overwrite the student, so a trial launch would destroy the input.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..launch import on_device, options
from .family import Spec

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FLOOR = tl.constexpr(-1e4 * 1.4426950408889634)  # log2-probability of an entry that only the other side supports
# Reference before any finite entry: finite, so that no −inf − (−inf) appears, and no further from 0 than u bears: the
# largest x·c less its rounding to fp32 is up to 2⁻²⁵ of it, and 2^u overflows from 128.
NOTHING = tl.constexpr(-(2.0**31))
NEVER = tl.constexpr(-1e5)  # any u below it has 2^u = 0: clamping there only keeps 0·inf away

REVERSE, FORWARD, MIXTURE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
PAD = tl.constexpr(-1e36)  # a logit past the end: finite, and below NOTHING after any sane scaling
PARTIALS = tl.constexpr(13)  # floats per slice: Mx lx My ly A c, infinities met, Bx By, top x y, argmax x y
RECORD = tl.constexpr(7)  # floats per row: Ms ls Mt lt, A/lx or Σw, stand-in for v = −inf, infinities met


class Launch(NamedTuple):
    warps: int
    lanes: int  # threads of a program: warps × warp size
    loads: int  # 16-byte loads of a thread from each tensor in a turn
    stages: int  # turns that overlap: all but one of their tiles are under way while one is used
    slice: int  # bytes of each tensor per work item: what is under way must fit the L2 whatever the dtype
    resident: int  # programs per multiprocessor; sets how many rows are under way
    registers: int | None = None  # a cap that makes `resident` programs fit

    def options(self, stats: bool, aligned: bool, capped: bool) -> dict[str, int]:
        if not self.registers:
            return options(self.warps)
        # Statistics hold twice as many sums (and Triton 3.9 more of them at once), rows that are not aligned an address
        # for every element, and tanh its terms.
        return options(self.warps, maxnreg=self.registers + 72 * stats + 32 * (not aligned) + 16 * capped)


# tests/aot.py compiles them: no spill, and registers that let `resident` programs share a multiprocessor.
UNALIGNED_LOADS = 8  # of single elements, where rows are not aligned: as many as spill nothing
LAUNCH = {
    "sm_80": Launch(4, 128, loads=2, stages=4, slice=24576, resident=5, registers=96),
    "sm_90": Launch(4, 128, loads=2, stages=4, slice=24576, resident=5, registers=96),
    "sm_100": Launch(4, 128, loads=2, stages=4, slice=24576, resident=5, registers=96),
    "gfx942": Launch(4, 256, loads=2, stages=1, slice=16384, resident=3),
}


@triton.jit
def _tanh(x):
    """tanh(x·ln2/2). Near 0 the formula subtracts 1 from 1 and a cap would multiply what is left of it; there,
    S. Moshier's polynomial (Cephes, tanhf)."""
    y = x * (LN2 / 2)
    z = y * y
    p = tl.fma(z, -5.70498872745e-3, 2.06390887954e-2)
    p = tl.fma(p, z, -5.37397155531e-2)
    p = tl.fma(p, z, 1.33314422036e-1)
    p = tl.fma(p, z, -3.33332819422e-1)
    return tl.where(tl.abs(y) < 0.625, tl.fma(p * z, y, y), 1 - 2 / (1 + tl.exp2(x)))


@triton.jit
def _load(
    row_ptr, start, cols, V, pre, CAPPED: tl.constexpr, MASKED: tl.constexpr, LANES: tl.constexpr, POLICY: tl.constexpr
):
    """The tile of logits at `start`, in fp32, PAD past V; with a soft cap, tanh(scale·x/cap), where
    pre = 2·log2e·scale/cap. bf16 is loaded in pairs, which a shift and a mask widen."""
    if MASKED:
        x = tl.load(row_ptr + cols, mask=cols < V, other=0.0, eviction_policy=POLICY).to(tl.float32)
    elif row_ptr.dtype.element_ty == tl.bfloat16 and cols.shape[1] > LANES:
        HALF: tl.constexpr = cols.shape[1] // 2
        pairs = tl.arange(0, cols.shape[0])[:, None] * HALF + tl.arange(0, HALF)[None, :]
        pair = tl.load((row_ptr + start).to(tl.pointer_type(tl.int32)) + pairs, eviction_policy=POLICY)
        first, second = (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)
        x = tl.reshape(tl.join(first, second), cols.shape)
    else:
        x = tl.load(row_ptr + cols, eviction_policy=POLICY).to(tl.float32)
    if CAPPED:
        x = _tanh(x * pre)
    if MASKED:
        x = tl.where(cols < V, x, PAD)
    return x


@triton.jit
def _place_of(row, T):
    """(sequence, place in it) of a row of (B, T, V) with N = B·T; of (N, V), where T is None, (0, row). In 64 bits, for
    a row starts beyond 2^31 elements long before N does."""
    sequence, place = tl.full((), 0, tl.int64), row.to(tl.int64)
    if T is not None:
        sequence, place = (row // T).to(tl.int64), (row % T).to(tl.int64)
    return sequence, place


@triton.jit
def _by_lane(x, LANES: tl.constexpr):
    """A tile as it is loaded, (loads, lanes·vector), as (loads, lanes, vector): a lane's elements are one thread's.
    Triton 3.6 would spread a tile that is loaded in three dimensions over threads in another order."""
    return tl.reshape(x, (x.shape[0], LANES, x.shape[1] // LANES))


@triton.jit
def _tile_sum(x):
    """Sum of each thread's own elements of a (loads, lanes, vector) tile: no communication."""
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def _tile_max(x):
    return tl.max(tl.max(x, 2), 0)


@triton.jit
def _argmax(x, cols, top):
    """Lowest column at which x equals `top`, per thread."""
    return tl.min(tl.min(tl.where(x == top[None, :, None], cols, 2147483647), 2), 0)


@triton.jit
def _rebase(mx, lx, my, ly, a, c, bx, by, new_mx, new_my, EXACT: tl.constexpr, PAIR: tl.constexpr, STATS: tl.constexpr):
    """Sums taken relative to (mx, my), restated relative to (new_mx, new_my): those that are taken. c = Σ 2^u over
    entries with y = −inf, whose u − v does not change with my; they spoil all that is not EXACT."""
    dx = mx - new_mx
    dy = my - new_my
    fx = tl.exp2(dx)
    fy = tl.exp2(dy)
    if PAIR:
        a = fx * (a + dx * lx - tl.where(my > NOTHING, dy, 0.0) * (lx - c) if EXACT else a + (dx - dy) * lx)
    if EXACT:
        c = fx * c
    if STATS:
        bx = fx * (bx + dx * lx)
        by = fy * (by + dy * ly)
    return fx * lx, fy * ly, a, c, bx, by


@triton.jit
def _larger(x, y, x2, y2):
    return tl.maximum(x, x2), tl.maximum(y, y2)


@triton.jit
def _add(lx, ly, a, lx2, ly2, a2):
    return lx + lx2, ly + ly2, a + a2


@triton.jit
def _reduce(mx, lx, my, ly, a, c, bx, by, EXACT: tl.constexpr, PAIR: tl.constexpr, STATS: tl.constexpr):
    """One state out of a vector of states (threads of a program, slices of a row); 0 for sums that are not taken.
    Several at a time, for threads wait for each other in every reduction."""
    top_x, top_y = tl.reduce((mx, my), 0, _larger)
    lx, ly, a, c, bx, by = _rebase(mx, lx, my, ly, a, c, bx, by, top_x, top_y, EXACT, PAIR, STATS)
    lx, ly, a = tl.reduce((lx, ly, a), 0, _add)
    if STATS:
        bx, by, c = tl.reduce((bx, by, c), 0, _add)
    else:
        bx, by = 0.0, 0.0
        c = tl.sum(c, 0) if EXACT else 0.0
    return top_x, lx, top_y, ly, a, c, bx, by


@triton.jit
def _statistics(
    x_side, y_side, cols0, begin, end, V, slot, S, EXACT: tl.constexpr, PAIR: tl.constexpr, STATS: tl.constexpr,
    LANES: tl.constexpr, STAGES: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """Online pass over columns [begin, end) of a row, partial sums into its slot; False if an infinity spoiled them."""
    x_row, kx, pre_x, CAP_X = x_side
    y_row, ky, pre_y, CAP_Y = y_side
    zero = tl.zeros([LANES], tl.float32)
    mx, my = zero + NOTHING, zero + NOTHING
    lx, ly, a, c, bx, by = zero, zero, zero, zero, zero, zero
    best_x, best_y = zero - float("inf"), zero - float("inf")
    arg_x, arg_y = tl.zeros([LANES], tl.int32), tl.zeros([LANES], tl.int32)
    TILE: tl.constexpr = cols0.shape[0] * cols0.shape[1]
    whole = begin if EXACT else begin + tl.maximum(end - begin, 0) // TILE * TILE
    for MASKED in tl.static_range(1 if EXACT else 0, 2):  # whole tiles, then the row's tail
        first, last = whole if MASKED else begin, end if MASKED else whole
        for start in tl.range(first, last, TILE, num_stages=1 if MASKED else STAGES):
            cols = start + cols0
            x = _by_lane(_load(x_row, start, cols, V, pre_x, CAP_X, MASKED, LANES, POLICY), LANES)
            y = _by_lane(_load(y_row, start, cols, V, pre_y, CAP_Y, MASKED, LANES, POLICY), LANES)
            top_x = _tile_max(x)
            top_y = _tile_max(y)
            new_mx = tl.maximum(mx, top_x * kx)
            new_my = tl.maximum(my, top_y * ky)
            lx, ly, a, c, bx, by = _rebase(mx, lx, my, ly, a, c, bx, by, new_mx, new_my, EXACT, PAIR, STATS)
            mx, my = new_mx, new_my
            u = tl.fma(x, kx, -mx[None, :, None])
            v = tl.fma(y, ky, -my[None, :, None])
            eu = tl.exp2(u)
            ev = tl.exp2(v)
            lx += _tile_sum(eu)
            ly += _tile_sum(ev)
            if EXACT:
                gone = v == float("-inf")
                c += _tile_sum(tl.where(gone, eu, 0.0))
                u = tl.maximum(u, NEVER)
                v = tl.where(gone, 0.0, v)
            if PAIR:
                a += _tile_sum(eu * (u - v))
            if STATS:
                bx += _tile_sum(eu * u)
                by += _tile_sum(ev * v)
                arg_x = tl.where(top_x > best_x, _argmax(x, _by_lane(cols, LANES), top_x), arg_x)
                arg_y = tl.where(top_y > best_y, _argmax(y, _by_lane(cols, LANES), top_y), arg_y)
                best_x, best_y = tl.maximum(best_x, top_x), tl.maximum(best_y, top_y)
    mx1, lx1, my1, ly1, a1, c1, bx1, by1 = _reduce(mx, lx, my, ly, a, c, bx, by, EXACT, PAIR, STATS)
    tl.store(slot, mx1)
    tl.store(slot + S, lx1)
    tl.store(slot + 2 * S, my1)
    tl.store(slot + 3 * S, ly1)
    tl.store(slot + 4 * S, a1)
    tl.store(slot + 5 * S, c1)
    tl.store(slot + 6 * S, 1.0 if EXACT else 0.0)
    if STATS:
        tl.store(slot + 7 * S, bx1)
        tl.store(slot + 8 * S, by1)
        top_x1 = tl.max(best_x, 0)
        top_y1 = tl.max(best_y, 0)
        tl.store(slot + 9 * S, top_x1)
        tl.store(slot + 10 * S, top_y1)
        tl.store(slot + 11 * S, tl.min(tl.where(best_x == top_x1, arg_x, 2147483647), 0).to(tl.float32))
        tl.store(slot + 12 * S, tl.min(tl.where(best_y == top_y1, arg_y, 2147483647), 0).to(tl.float32))
    return tl.abs(a1 + bx1 + by1) < float("inf")


@triton.jit
def _arrive(counter_ptr):
    """Announce a finished slice; returns how many came before. Orders the slice's stores before the count."""
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel")


@triton.jit
def _await(counter_ptr, count):
    while tl.atomic_add(counter_ptr, 0, sem="acquire") < count:
        pass


@triton.jit
def _finish_statistics(slots, k, ok, S, record, loss_ptr, stats_ptr, N, a, b, KIND: tl.constexpr, STATS: tl.constexpr):
    """The last slice of a row to arrive: adds the S partial results in order, writes the row's record and loss."""
    mx = tl.load(slots + k, mask=ok, other=NOTHING)
    lx = tl.load(slots + S + k, mask=ok, other=0.0)
    my = tl.load(slots + 2 * S + k, mask=ok, other=NOTHING)
    ly = tl.load(slots + 3 * S + k, mask=ok, other=0.0)
    part_a = tl.load(slots + 4 * S + k, mask=ok, other=0.0)
    part_c = tl.load(slots + 5 * S + k, mask=ok, other=0.0)
    bx, by = tl.zeros_like(mx), tl.zeros_like(mx)
    if STATS:
        bx = tl.load(slots + 7 * S + k, mask=ok, other=0.0)
        by = tl.load(slots + 8 * S + k, mask=ok, other=0.0)
    mx1, lx1, my1, ly1, a1, c1, bx1, by1 = _reduce(mx, lx, my, ly, part_a, part_c, bx, by, True, True, STATS)
    log_lx = tl.log2(lx1)
    log_ly = tl.log2(ly1)
    if STATS:
        best_x = tl.load(slots + 9 * S + k, mask=ok, other=float("-inf"))
        best_y = tl.load(slots + 10 * S + k, mask=ok, other=float("-inf"))
        arg_x = tl.load(slots + 11 * S + k, mask=ok, other=float("inf"))
        arg_y = tl.load(slots + 12 * S + k, mask=ok, other=float("inf"))
        top_x = tl.min(tl.where(best_x == tl.max(best_x, 0), arg_x, float("inf")), 0)
        top_y = tl.min(tl.where(best_y == tl.max(best_y, 0), arg_y, float("inf")), 0)
        entropy_x = (log_lx - bx1 / lx1) * LN2
        entropy_y = (log_ly - by1 / ly1) * LN2
        if KIND == FORWARD:
            entropy_x, entropy_y = entropy_y, entropy_x
        tl.store(stats_ptr, entropy_x)
        tl.store(stats_ptr + N, entropy_y)
        tl.store(stats_ptr + 2 * N, (top_x == top_y).to(tl.float32))
    floor = FLOOR + log_ly
    mean = (a1 - c1 * floor) / lx1
    if KIND == REVERSE:
        tl.store(loss_ptr, (mean - log_lx + log_ly) * LN2 * b)
    if KIND == FORWARD:
        tl.store(loss_ptr, (mean - log_lx + log_ly) * LN2 * a)
        mx1, my1, lx1, ly1 = my1, mx1, ly1, lx1
    if KIND == MIXTURE:
        lx1, ly1 = log_lx, log_ly
    tl.store(record, mx1)
    tl.store(record + 1, lx1)
    tl.store(record + 2, my1)
    tl.store(record + 3, ly1)
    tl.store(record + 4, mean)
    tl.store(record + 5, floor)
    tl.store(record + 6, tl.max(tl.load(slots + 6 * S + k, mask=ok, other=0.0), 0))


@triton.jit
def _log2(x, APPROXIMATE: tl.constexpr):
    """With lg2.approx, the unit that has exp2, in 1 instruction for 18, to 2⁻²² of 1 and of the result: what a logit is
    rounded to."""
    if APPROXIMATE:
        asm: tl.constexpr = "lg2.approx.ftz.f32 $0, $1;"
        return tl.inline_asm_elementwise(asm, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return tl.log2(x)


@triton.jit
def _exp2m1(x):
    """2^x − 1 for x ≤ 0: near 0 the series, where subtracting would leave rounding."""
    p = tl.fma(x, 1.5403530393e-04, 1.3333558146e-03)
    p = tl.fma(p, x, 9.6181291076e-03)
    p = tl.fma(p, x, 5.5504108665e-02)
    p = tl.fma(p, x, 2.4022650696e-01)
    p = tl.fma(p, x, 6.9314718056e-01)
    return tl.where(x > -0.25, p * x, tl.exp2(x) - 1)


@triton.jit
def _mixture(x, y, u_ref, v_ref, ks, kt, log_ls, log_lt, a, b, pi, rho, FAST: tl.constexpr, LG2: tl.constexpr):
    """q, φ and w in bits, of m = π·p + ρ·q with 0 < π < 1, ρ = 1 − π. FAST is exact enough for 16-bit logits; else what
    vanishes with p − q is taken from 2^−|lp − lq| − 1, as in the definition."""
    lq = tl.maximum(tl.fma(x, ks, -u_ref) - log_ls, NEVER, propagate_nan=tl.PropagateNan.ALL)
    lp = tl.maximum(tl.fma(y, kt, -v_ref) - log_lt, NEVER, propagate_nan=tl.PropagateNan.ALL)
    q = tl.exp2(lq)
    p = tl.exp2(lp)
    if FAST:
        lm = _log2(tl.maximum(pi * p + rho * q, 1e-37), LG2)
        lq_lm = lq - lm
        lp_lm = lp - lm
        difference = p - q
    else:
        d = lp - lq
        less = _exp2m1(-tl.abs(d))
        t = tl.where(d > 0, rho, pi) * less
        e = tl.exp2(-tl.abs(d))
        m = tl.where(d > 0, tl.fma(rho, e, pi), tl.fma(pi, e, rho))  # over the larger of p and q
        log_m = tl.fma(t - (m - 1), LOG2E, tl.log2(m))
        lq_lm = tl.where(d > 0, -d, 0.0) - log_m
        lp_lm = tl.where(d > 0, 0.0, d) - log_m
        difference = tl.where(d > 0, -p, q) * less
    k_difference = (a * rho - b * pi) * LOG2E * difference
    share = rho * tl.exp2(lq_lm)
    of_student = b * q * lq_lm
    return q, tl.fma(a * p, lp_lm, of_student - k_difference), tl.fma(-share, k_difference, of_student)


@triton.jit
def _gradient(
    student, teacher, g_row, cols0, begin, end, V, Vs, a, b, pi, rho, factor, ms, ls, mt, lt, mean, floor,
    EXACT: tl.constexpr, KIND: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr, FAST: tl.constexpr,
    LG2: tl.constexpr,
):  # fmt: skip
    s_row, ks, pre_s, CAP_S = student
    t_row, kt, pre_t, CAP_T = teacher
    TILE: tl.constexpr = cols0.shape[0] * cols0.shape[1]
    whole = begin if EXACT else begin + tl.maximum(tl.minimum(end, V) - begin, 0) // TILE * TILE
    for MASKED in tl.static_range(1 if EXACT else 0, 2):
        first, last = whole if MASKED else begin, end if MASKED else whole
        for start in tl.range(first, last, TILE, num_stages=1 if MASKED else STAGES):
            cols = start + cols0
            x = _load(s_row, start, cols, V, pre_s, CAP_S, MASKED, LANES, "evict_first")
            y = _load(t_row, start, cols, V, pre_t, CAP_T, MASKED, LANES, "evict_first")
            if KIND == MIXTURE:
                q, _, w = _mixture(x, y, ms, mt, ks, kt, ls, lt, a, b, pi, rho, FAST, LG2)
                g = tl.fma(-mean, q, w) * (factor * LN2)
            else:
                u = tl.fma(x, ks, -ms)
                v = tl.fma(y, kt, -mt)
                if KIND == REVERSE:
                    scale = factor * b * LN2 / ls
                    q = tl.exp2(u)
                    if EXACT:
                        u = tl.maximum(u, NEVER)
                        v = tl.where(v == float("-inf"), floor, v)
                    g = q * tl.fma(u - v, scale, -mean * scale)
                else:
                    g = tl.exp2(u) * (factor * a / ls) - tl.exp2(v) * (factor * a / lt)
            if CAP_S:
                g *= 1 - x * x
            g = g.to(g_row.dtype.element_ty)
            if MASKED:
                tl.store(g_row + cols, tl.where(cols < V, g, 0.0), mask=cols < Vs, eviction_policy="evict_first")
            else:
                tl.store(g_row + cols, g, eviction_policy="evict_first")  # the L2 is for rows yet to be read again


@triton.jit(do_not_specialize=["N", "T", "skew"])  # N changes at every step, and a compilation takes seconds
def _divergence_kernel(
    student_ptr, teacher_ptr, grad_ptr, mask_ptr, row_scale_ptr, loss_ptr, stats_ptr,
    partial_ptr, record_ptr, count_ptr,
    N, T, V, Vs, student_stride, teacher_stride, grad_stride,
    student_sequence, teacher_sequence, grad_sequence, skew,
    ks, kt, pre_s, pre_t, a, b, pi, rho, chain,
    KIND: tl.constexpr, GRAD: tl.constexpr, STATS: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr,
    LANES: tl.constexpr, VECTOR: tl.constexpr, LOADS: tl.constexpr, STAGES: tl.constexpr, SLICE: tl.constexpr,
    S: tl.constexpr, S_POW2: tl.constexpr, FAST: tl.constexpr, LG2: tl.constexpr,
):  # fmt: skip
    """One item of the queue. `chain` is scale/temperature, the factor of d loss / d logit that no row changes. T: rows
    of a sequence, None where all rows are a stride apart."""
    MIXED: tl.constexpr = KIND == MIXTURE
    PHASES: tl.constexpr = 1 + MIXED + GRAD
    TILE: tl.constexpr = LOADS * LANES * VECTOR
    # of loads that go to registers: copies to shared memory, ahead of their use, take no policy
    KEEP: tl.constexpr = "evict_last" if PHASES > 1 else "evict_first"

    ticket = tl.atomic_add(count_ptr, 1, sem="relaxed").to(tl.uint32)  # unsigned: divided in fewer instructions
    item = (ticket % (PHASES * S)).to(tl.int32)
    phase = item // S
    piece = item % S
    row = (ticket // (PHASES * S)).to(tl.int32) - phase * skew
    if (row < 0) | (row >= N):
        return
    live = True
    if mask_ptr is not None:
        live = tl.load(mask_ptr + row) != 0
    row64 = row.to(tl.int64)
    sequence, place = _place_of(row, T)
    s_row = student_ptr + sequence * student_sequence + place * student_stride
    t_row = teacher_ptr + sequence * teacher_sequence + place * teacher_stride
    student, teacher = (s_row, ks, pre_s, CAP_S), (t_row, kt, pre_t, CAP_T)  # what is known of a side: see `base_two`
    record = record_ptr + row64 * RECORD
    begin = piece * SLICE
    stop = tl.minimum(begin + SLICE, V)

    cols0 = tl.arange(0, LOADS)[:, None] * (LANES * VECTOR) + tl.arange(0, LANES * VECTOR)[None, :]

    if phase == 0:
        if live:
            slots = partial_ptr + row64 * (PARTIALS * S)
            x, y = (teacher, student) if KIND == FORWARD else (student, teacher)
            columns = cols0, begin, stop, V, slots + piece, S
            # Infinities are rare: only a slice that meets one is read again with the care they need.
            if not _statistics(x, y, *columns, False, not MIXED, STATS, LANES, STAGES, KEEP):
                _statistics(x, y, *columns, True, not MIXED, STATS, LANES, STAGES, KEEP)
            if _arrive(count_ptr + 1 + row) == S - 1:
                k = tl.arange(0, S_POW2)
                _finish_statistics(slots, k, k < S, S, record, loss_ptr + row, stats_ptr + row, N, a, b, KIND, STATS)
                _arrive(count_ptr + 1 + row)
        elif piece == 0:
            tl.store(loss_ptr + row, 0.0)
            if STATS:
                tl.store(stats_ptr + row, 0.0)
                tl.store(stats_ptr + N + row, 0.0)
                tl.store(stats_ptr + 2 * N + row, 0.0)
    elif MIXED and phase == 1:
        if live:
            _await(count_ptr + 1 + row, S + 1)
            ms, log_ls, mt, log_lt = tl.load(record), tl.load(record + 1), tl.load(record + 2), tl.load(record + 3)
            phi = tl.zeros([LANES], tl.float32)
            sum_w = tl.zeros([LANES], tl.float32)
            whole = begin + tl.maximum(stop - begin, 0) // TILE * TILE
            for MASKED in tl.static_range(2):
                first, last = whole if MASKED else begin, stop if MASKED else whole
                for start in tl.range(first, last, TILE, num_stages=1 if MASKED else STAGES):
                    cols = start + cols0
                    x = _load(s_row, start, cols, V, pre_s, CAP_S, MASKED, LANES, KEEP)
                    y = _load(t_row, start, cols, V, pre_t, CAP_T, MASKED, LANES, KEEP)
                    _, phi_here, w = _mixture(x, y, ms, mt, ks, kt, log_ls, log_lt, a, b, pi, rho, FAST, LG2)
                    phi += _tile_sum(_by_lane(phi_here, LANES))
                    sum_w += _tile_sum(_by_lane(w, LANES))
            slots = partial_ptr + row64 * (PARTIALS * S)
            tl.store(slots + piece, tl.sum(phi, 0))
            tl.store(slots + S + piece, tl.sum(sum_w, 0))
            if _arrive(count_ptr + 1 + N + row) == S - 1:
                k = tl.arange(0, S_POW2)
                tl.store(loss_ptr + row, tl.sum(tl.load(slots + k, mask=k < S, other=0.0), 0) * LN2)
                tl.store(record + 4, tl.sum(tl.load(slots + S + k, mask=k < S, other=0.0), 0))
                _arrive(count_ptr + 1 + N + row)
    elif GRAD:
        g_row = grad_ptr + sequence * grad_sequence + place * grad_stride
        end = tl.minimum(begin + SLICE, Vs)
        if live:
            _await(count_ptr + 1 + (N + row if MIXED else row), S + 1)
            ms, ls, mt, lt = tl.load(record), tl.load(record + 1), tl.load(record + 2), tl.load(record + 3)
            mean, floor = tl.load(record + 4), tl.load(record + 5)
            factor = chain
            if row_scale_ptr is not None:
                factor *= tl.load(row_scale_ptr + row).to(tl.float32)
            infinities = tl.load(record + 6) != 0
            for EXACT in tl.static_range(2):
                if infinities == EXACT:
                    _gradient(
                        student, teacher, g_row, cols0, begin, end, V, Vs, a, b, pi, rho, factor, ms, ls, mt, lt, mean,
                        floor, EXACT, KIND, LANES, STAGES, FAST, LG2,
                    )  # fmt: skip
        else:
            for start in range(begin, end, TILE):
                cols = start + cols0
                tl.store(g_row + cols, tl.zeros_like(cols).to(grad_ptr.dtype.element_ty), mask=cols < Vs)


def for_any_strides(kernel):
    """A kernel that is compiled alike whatever divides the strides of its rows, for where they are not aligned alike:
    told that some are multiples of 16, Triton would lay out the tiles of these for vectors, which none is read in then,
    and pass their elements between threads.
    """
    strides = [name for name in kernel.arg_names if name.endswith(("_stride", "_sequence"))]
    own = getattr(kernel, "do_not_specialize", None) or []  # the interpreter's kernels have none
    return triton.jit(do_not_specialize=[*own, *strides])(kernel.fn)


_any_divergence_kernel = for_any_strides(_divergence_kernel)


@lru_cache
def launch_for(device: torch.device) -> tuple[Launch, int]:
    """The launch configuration of a device and its number of multiprocessors."""
    if device.type != "cuda":  # the interpreter
        return LAUNCH["sm_90"], 1
    properties = torch.cuda.get_device_properties(device)
    newest_first = ((10, "sm_100"), (9, "sm_90"), (0, "sm_80"))
    arch = "gfx942" if torch.version.hip else next(arch for major, arch in newest_first if properties.major >= major)
    return LAUNCH[arch], properties.multi_processor_count


def tiling(launch: Launch, itemsize: int, aligned: bool) -> dict[str, int]:
    """How rows are read whose widest elements take `itemsize` bytes. Where they are not aligned, neighbouring threads
    take neighbouring elements: vectors would be loaded one element at a time, strided.
    """
    loads, vector, stages = (launch.loads, 16 // itemsize, launch.stages) if aligned else (UNALIGNED_LOADS, 1, 1)
    slices = {"SLICE": launch.slice // itemsize}
    return {"LANES": launch.lanes, "VECTOR": vector, "LOADS": loads, "STAGES": stages, **slices}


def tiles(launch: Launch, rows: list[torch.Tensor]) -> tuple[bool, dict[str, int]]:
    """Whether rows, (N, V·) or (B, T, V·), all begin at multiples of 16 elements and bytes; and how to read them."""
    itemsize = max(t.element_size() for t in rows)
    strides = (stride for t in rows for stride in (t.stride(-2), t.stride(0) if t.ndim == 3 else 0))
    aligned = all(stride % 16 == 0 for stride in strides) and all(t.data_ptr() % 16 == 0 for t in rows)
    return aligned, tiling(launch, itemsize, aligned)


def base_two(temperature: float, scale: float, softcap: float) -> tuple[float, float]:
    """(c, pre): c times a logit, or times tanh(pre·x·ln2/2) of it under a soft cap, is its log-weight in bits."""
    if softcap:
        return LOG2E.value * softcap / temperature, 2 * LOG2E.value * scale / softcap
    return LOG2E.value * scale / temperature, 0.0


def launch_divergence_rows(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    spec: Spec,
    grad_out: torch.Tensor | None,
    with_stats: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-row a·KL(p‖m) + b·KL(q‖m), m = π·p + (1−π)·q, and its gradient in the student's logits.

    student (N, Vs), teacher (N, Vt), or both (B, T, V·) with N = B·T: bf16, fp16 or fp32, last dimension contiguous.
    mask (N,) bool or None; row_scale (N,) or None. grad_out, of the student's shape, or None receives
    row_scale · dD/dstudent, and may be `student` itself.
    Returns loss (N,) fp32 and stats (3, N) fp32 (student entropy, teacher entropy, top-1 agreement; empty unless
    with_stats). Nothing here waits for the device, so the launch can be captured in a CUDA graph.
    """
    a, b, pi, *_ = spec
    mask = None if mask is None else mask.contiguous()
    row_scale = None if row_scale is None else row_scale.contiguous()
    *sequences, T, Vs = student.shape
    N, V = student.shape[:-1].numel(), min(Vs, teacher.shape[-1])
    loss = torch.empty(N, dtype=torch.float32, device=student.device)
    stats = torch.empty((3, N) if with_stats else (0,), dtype=torch.float32, device=student.device)
    if N == 0:
        return loss, stats
    launch, processors = launch_for(student.device)
    kind = REVERSE if pi == 1 else FORWARD if pi == 0 else MIXTURE
    grad = grad_out is not None
    phases = 1 + (kind is MIXTURE) + grad
    rows = [student, teacher, grad_out] if grad else [student, teacher]
    aligned, tiling = tiles(launch, rows)
    S, narrow = triton.cdiv(Vs if grad else V, tiling["SLICE"]), max(t.element_size() for t in rows) == 2
    skew = triton.cdiv(launch.resident * processors, phases * S) + 1
    # partial results, one record a row, and zeroed counters: the queue's, then one a row for each phase waited for
    partial = torch.empty(N * S * PARTIALS.value, dtype=torch.float32, device=student.device)
    record = torch.empty(N * RECORD.value, dtype=torch.float32, device=student.device)
    count = torch.zeros(1 + 2 * N, dtype=torch.int32, device=student.device)

    strides = [(t.stride(-2), t.stride(0) if t.ndim == 3 else 0) for t in rows] + [(0, 0)]
    ks, pre_s = base_two(spec.student_temperature, spec.student_scale, spec.student_softcap)
    kt, pre_t = base_two(spec.teacher_temperature, spec.teacher_scale, spec.teacher_softcap)
    capped = spec.student_softcap != 0, spec.teacher_softcap != 0
    kernel = _divergence_kernel if aligned else _any_divergence_kernel
    with on_device(student.device):
        kernel[((N + (phases - 1) * skew) * phases * S,)](
            student, teacher, grad_out, mask, row_scale, loss, stats, partial, record, count,
            N, T if sequences else None, V, Vs,
            *(row for row, _ in strides[:3]), *(sequence for _, sequence in strides[:3]), skew,
            ks, kt, pre_s, pre_t, a, b, pi, 1 - pi, spec.student_scale / spec.student_temperature,
            KIND=kind.value, GRAD=grad, STATS=with_stats, CAP_S=capped[0], CAP_T=capped[1],
            S=S, S_POW2=triton.next_power_of_2(S), FAST=narrow, LG2=student.is_cuda and not torch.version.hip,
            **tiling, **launch.options(with_stats, aligned, any(capped)),
        )  # fmt: skip
    return loss, stats


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, numel, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1:
        start = tl.program_id(0).to(tl.int64) * BLOCK
        while start < numel:
            at = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + at, mask=at < numel, other=0.0)
            tl.store(x_ptr + at, (x.to(tl.float32) * factor).to(x.dtype), mask=at < numel)
            start += tl.num_programs(0).to(tl.int64) * BLOCK


SCALE_BLOCK, SCALE_PROGRAMS = 4096, 4096  # elements per turn; programs, enough to fill any device several times over


def launch_scale(x: torch.Tensor, factor: torch.Tensor) -> None:
    """x ·= factor in place; x contiguous, bf16, fp16 or fp32, factor a scalar on its device.

    The factor is looked at on the device: where it is 1, as in a plain loss.backward(), x is neither read nor written,
    which spares two of the five tensors that value and gradient would move.
    """
    grid = min(SCALE_PROGRAMS, triton.cdiv(x.numel(), SCALE_BLOCK))
    if grid:
        with on_device(x.device):
            _scale_kernel[(grid,)](x, factor, x.numel(), BLOCK=SCALE_BLOCK, **options(4))
