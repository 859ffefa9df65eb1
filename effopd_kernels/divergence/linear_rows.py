"""The ops under the losses from hidden states: divergences and gradients by chunks of rows, without N×V logits.

N tokens, V vocabulary (the shared prefix), D hidden size (student and teacher may differ). Rows are taken in chunks:

    for each chunk      s = h_s·W_sᵀ (V wide)                                               1 GEMM unit
                        for each tile of it    t = h_t·W_tᵀ                                 1 GEMM unit
                                               the row kernel overwrites s by g = dloss/ds
                        dh = g·W_s,  dW_s += gᵀ·h_s                                         2 GEMM units

Four GEMM units in all and none in backward. The student's chunk lives until its gradient GEMMs; the teacher's logits
are needed one tile at a time. Both sizes come from one budget in bytes: more chunks would only read W and dW again.
A teacher known at k entries has no logits: three units.

Where each token's factor in the loss comes only in backward, dh is made without it, and dW of kept gradients of logits
where all of them fit the budget; else the rows are taken a second time.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..native import native
from . import ops

BLOCK = 4 << 20  # of an operand, which a CPU's caches hold
WIDE_BLOCK = 2 * BLOCK  # of operands that are cast: MKL repacks the hidden states for each, the larger the fewer
FEW = 32  # rows of a product that reads the head for them alone
PITCH = 64  # elements, of which a GPU's rows of logits are multiples
TILE = 256  # rows that a GPU's GEMM takes at a time, at most: of 2,731 it computes 2,816
# On CPUs with AMX, repacking the operands dominates a GEMM; with AVX2 alone, MKL is faster when the large matrix comes
# first. There (in fp32 too, where MKL allocates 130 MB for it) it pays to compute W·hᵀ and to transpose logits and
# gradients. With AVX-512 and no AMX that costs 4 to 7 %.
TILES = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()  # not public, so it may go
TRANSPOSES = TILES or torch.backends.cpu.get_cpu_capability() == "AVX2"

_REST = (
    "int chunk_bytes, SymInt? num_valid, bool grad_hidden, bool grad_weight, bool grad_bias, bool with_stats, "
    "bool keep) -> (Tensor loss, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias, Tensor stats, Tensor kept)"
)
torch.library.define(
    "effopd::linear_divergence_rows",
    "(Tensor student_hidden, Tensor student_weight, Tensor? student_bias, "
    f"Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias, {ops.ARGS}, "
    f"ScalarType student_dtype, ScalarType teacher_dtype, ScalarType? logits_dtype, {_REST}",
)
torch.library.define(
    "effopd::linear_topk_rows",
    f"(Tensor hidden, Tensor weight, Tensor? bias, {ops.TOPK_ARGS}, ScalarType dtype, {_REST}",
)
torch.library.define(
    "effopd::head_gradients",
    "(Tensor kept, Tensor hidden, Tensor weight, Tensor? bias, Tensor? mask, Tensor factor, ScalarType dtype, "
    "SymInt? num_valid, bool grad_weight, bool grad_bias) -> (Tensor grad_weight, Tensor grad_bias)",
)


def without_autocast(device: str) -> AbstractContextManager:
    return torch.amp.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def pieces(total: int, limit: int) -> list[slice]:
    """[0, total) in the fewest slices of at most `limit` (at least 1) each: whole tiles of GEMMs if they fit, else near
    equal.
    """
    if not total:
        return []
    count = -(-total // max(limit, 1))
    size = -(-total // count // TILE) * TILE
    edges = [*range(0, total, size), total] if size <= limit else [total * i // count for i in range(count + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


def student_bytes(chunk_bytes: int) -> int:
    """For the student's logits where the teacher has some too, of which fewer are needed at a time."""
    return chunk_bytes * 3 // 4


def _logits(N: int, V: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialised logits (N, V). On a GPU every row starts at a multiple of PITCH elements, whatever V is, so that
    GEMMs and the row kernel can load vectors."""
    return ops.empty_rows(N, _pitched(V, like.device), like, dtype)[:, :V]


def _pitched(V: int, device: torch.device) -> int:
    return V if device.type == "cpu" else -(-V // PITCH) * PITCH


def _blocks(
    N: int, head_VD: Tensor, like: Tensor, dtype: torch.dtype, size: int = BLOCK
) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the vocabulary, each with scratch (slice, N) in the dtype of `like`. The scratch takes about `size`
    bytes, together with the slice of the head where that has to be cast to `dtype`.
    """
    V, D = head_VD.shape
    rows = max(size // dtype.itemsize // max(N if head_VD.dtype == dtype else N + D, 1), 1)
    scratch = ops.empty_rows(1, min(rows, V) * N, like)
    for cols in pieces(V, rows):
        yield cols, scratch[0, : (cols.stop - cols.start) * N].view(-1, N)


def _caster(dtype: torch.dtype, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A function that casts to `dtype`, if needed, into one buffer that its every call reuses: fresh pages cost a CPU
    more than the cast."""
    room = torch.empty(0, dtype=dtype, device=device)
    return lambda x: x if x.dtype == dtype else room.resize_(x.shape).copy_(x)


def _product_dtype(dtype: torch.dtype, rows: int, device: torch.device) -> torch.dtype:
    """The dtype to multiply in: fp32 in place of bf16 and fp16 on a CPU where PyTorch multiplies these in plain loops,
    or the processor multiplies them more slowly than fp32. Not the latter for few rows: reading the head takes the time
    there, and a cast would multiply its bytes by five.
    """
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    if device.type != "cpu" or name is None:
        return dtype
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda: False)  # not public either
    slow = dtype == torch.bfloat16 and not TILES and native() is not None and not native().multiplies_bf16()
    return dtype if supported() and not (slow and rows > FEW) else torch.float32


def project(out_NV: Tensor, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> None:
    """out = hidden·weightᵀ + bias, rounded once to out's dtype, which may be wider or narrower than the operands'."""
    device, dtype = out_NV.device, torch.promote_types(out_NV.dtype, hidden_ND.dtype)
    product_dtype, (V, D) = _product_dtype(dtype, len(hidden_ND), device), weight_VD.shape
    alike = out_NV.dtype == hidden_ND.dtype == product_dtype
    if alike and not (TRANSPOSES and device.type == "cpu"):
        # In parts on a CPU: MKL packs whatever it is given, up to 50 MB of a head.
        for cols in pieces(V, 4 * BLOCK // dtype.itemsize // max(D, 1) if device.type == "cpu" else V):
            _product(hidden_ND, weight_VD[cols].T, None if bias_V is None else bias_V[cols], out_NV[:, cols])
    elif device.type == "cuda" and out_NV.dtype == torch.float32 and hidden_ND.itemsize == 2:
        torch.mm(hidden_ND, weight_VD.T, out_dtype=out_NV.dtype, out=out_NV)
        if bias_V is not None:
            out_NV += bias_V
    elif not (TRANSPOSES and device.type == "cpu"):  # there is no GEMM of these dtypes: one in a wider, by pieces
        hidden, cast = hidden_ND.to(product_dtype), _caster(product_dtype, device)
        for cols, block in _blocks(len(hidden), weight_VD, hidden, product_dtype, WIDE_BLOCK):
            bias = None if bias_V is None else bias_V[cols].to(product_dtype)
            _product(hidden, cast(weight_VD[cols]).T, bias, block := block.view(len(hidden), -1))
            out_NV[:, cols] = block
    else:
        # Repacked is the second operand: here the few hidden states, and the head is used as it lies.
        N = len(hidden_ND)
        short = -N % (32 if product_dtype.itemsize == 2 else 16)  # of whole tiles: a GEMM is slow beside them
        hidden = F.pad(hidden_ND.to(product_dtype), (0, 0, 0, short if 4 * short < N else 0))
        cast = _caster(product_dtype, device)
        for cols, block in _blocks(len(hidden), weight_VD, hidden, product_dtype):
            bias = None if bias_V is None else bias_V[cols, None].to(product_dtype)
            _product(cast(weight_VD[cols]), hidden.T, bias, block)
            ops.transpose(block[:, :N], out_NV[:, cols])


def _product(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)


def hidden_gradient(grad_NV: Tensor, weight_VD: Tensor) -> Tensor:
    """grad·weight (N, D), in their dtype or a wider one."""
    device = grad_NV.device
    dtype = _product_dtype(grad_NV.dtype, len(grad_NV), device)
    if dtype == grad_NV.dtype:
        return grad_NV @ weight_VD
    (N, V), D = grad_NV.shape, weight_VD.shape[1]
    result = grad_NV.new_zeros(N, D, dtype=dtype)
    grad_in, weight_in = _caster(dtype, device), _caster(dtype, device)
    for cols in pieces(V, WIDE_BLOCK // dtype.itemsize // max(N + D, 1)):
        result.addmm_(grad_in(grad_NV[:, cols]), weight_in(weight_VD[cols]))
    return result


def add_product(acc_VD: Tensor, grad_NV: Tensor, hidden_ND: Tensor, first: bool) -> None:
    """acc += gradᵀ·hidden, or = for the first; acc may be fp32 and the operands narrower."""
    beta, device = 0 if first else 1, acc_VD.device  # 0 leaves unread what stood there
    dtype = _product_dtype(acc_VD.dtype, len(grad_NV), device)
    alike = acc_VD.dtype == grad_NV.dtype == dtype
    if alike and not (TRANSPOSES and device.type == "cpu" and acc_VD.itemsize == 2):
        acc_VD.addmm_(grad_NV.T, hidden_ND, beta=beta)
    elif device.type == "cuda":
        torch.addmm(acc_VD, grad_NV.T, hidden_ND, out_dtype=acc_VD.dtype, beta=beta, out=acc_VD)
    else:  # gradᵀ at hand too
        hidden, cast = hidden_ND.to(dtype), _caster(dtype, device)
        product = hidden_ND.new_empty(0, dtype=dtype)
        for cols, block in _blocks(len(grad_NV), acc_VD, grad_NV, dtype):
            ops.transpose(grad_NV[:, cols], block)
            if acc_VD.dtype == dtype:
                acc_VD[cols].addmm_(cast(block), hidden, beta=beta)
            else:
                torch.mm(cast(block), hidden, out=product.resize_(len(block), hidden.shape[1]))
                acc_VD[cols] = product if first else product.add_(acc_VD[cols])


def compact(mask_N: Tensor, num_valid: int | None) -> tuple[Tensor, Tensor | None]:
    """Indices of the tokens that count and, where `num_valid` promises how many, which of the indices are real."""
    if num_valid is None:
        return mask_N.nonzero().squeeze(1), None  # on a GPU the one synchronisation
    num_valid = min(num_valid, len(mask_N))
    index = torch.nonzero_static(mask_N, size=num_valid, fill_value=0).squeeze(1)
    return index, torch.arange(num_valid, device=mask_N.device) < mask_N.sum()


class _Tokens(NamedTuple):
    """Those that count, of N."""

    N: int
    index: Tensor | None  # None: all of them
    valid: Tensor | None  # which indices are real, where they were only promised; None: all of them

    def kept(self, per_token: Tensor | None) -> Tensor | None:
        return per_token if per_token is None or self.index is None else per_token[self.index]

    def spread(self, rows: Tensor, dim: int = 0) -> Tensor:
        """By token again, with zeros for those that do not count."""
        if self.index is None:
            return rows
        shape = (*rows.shape[:dim], self.N, *rows.shape[dim + 1 :])
        return rows.new_zeros(shape).index_add_(dim, self.index, rows)  # absent ones repeat index 0 (with zeros)

    def rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Of those that count; zeros for those that are absent, which are masked for the kernel."""
        x = self.kept(x).to(dtype)
        return x if self.valid is None else x.masked_fill(~self.valid.view(-1, *[1] * (x.ndim - 1)), 0)

    def operands(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, V: int, dtype: torch.dtype):
        return self.rows(hidden, dtype), weight[:V].to(dtype), None if bias is None else bias[:V].to(dtype)


def _tokens(N: int, mask_N: Tensor | None, num_valid: int | None) -> _Tokens:
    return _Tokens(N, *((None, None) if mask_N is None else compact(mask_N, num_valid)))


def linear_divergence_rows(
    student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias, mask, row_scale,
    *args,
):  # fmt: skip
    *spec, dtype, teacher_dtype, logits_dtype, chunk_bytes, num_valid, grad_h, grad_w, grad_b, with_stats, keep = args
    needs = grad_h, grad_w, grad_b
    student, teacher = (student_hidden, student_weight, student_bias), (teacher_hidden, teacher_weight, teacher_bias)
    V = min(student_weight.shape[0], teacher_weight.shape[0])
    t_dtype = logits_dtype or teacher_dtype
    with without_autocast(student_hidden.device.type):
        tokens = _tokens(len(student_hidden), mask, num_valid)
        teacher, row_scale = tokens.operands(*teacher, V, teacher_dtype), tokens.kept(row_scale)

        def compare(chunk_rows: int, left: int):
            tile_rows = max(1, left // (V * t_dtype.itemsize))
            buffer = _logits(min(tile_rows, chunk_rows), V, teacher[0], t_dtype)

            def tiles(chunk: slice, logits: Tensor):
                for tile in pieces(len(logits), tile_rows):
                    rows = slice(chunk.start + tile.start, chunk.start + tile.stop)
                    t = buffer[: tile.stop - tile.start]
                    project(t, teacher[0][rows], *teacher[1:])
                    mask, scale = (None if x is None else x[rows] for x in (tokens.valid, row_scale))
                    found = torch.ops.effopd.divergence_rows_(
                        logits[tile], t, mask, scale, *spec, any(needs) or keep, with_stats
                    )
                    yield rows, *found

            return tiles

        dtypes, budgets = (dtype, logits_dtype or dtype, t_dtype), (student_bytes(chunk_bytes), chunk_bytes)
        return _linear_rows(student, V, tokens, compare, dtypes, budgets, needs, with_stats, keep)


def linear_topk_rows(hidden, weight, bias, ids, known, mask, row_scale, *args):
    *spec, dtype, chunk_bytes, num_valid, grad_h, grad_w, grad_b, with_stats, keep = args
    needs, V = (grad_h, grad_w, grad_b), weight.shape[0]
    with without_autocast(hidden.device.type):
        tokens = _tokens(len(hidden), mask, num_valid)
        ids, known, row_scale = map(tokens.kept, (ids, known, row_scale))

        def whole(chunk: slice, logits: Tensor):
            per_token = (None if x is None else x[chunk] for x in (ids, known, tokens.valid, row_scale))
            yield chunk, *torch.ops.effopd.topk_rows_(logits, *per_token, *spec, any(needs) or keep, with_stats)

        dtypes, budgets = (dtype, dtype, dtype), (chunk_bytes, chunk_bytes)
        student = hidden, weight, bias
        return _linear_rows(student, V, tokens, lambda *_: whole, dtypes, budgets, needs, with_stats, keep)


def _row_bytes(V: int, dtype: torch.dtype, s_dtype: torch.dtype) -> int:
    """Of the student's logits, with the gradient's cast; and alike with and without a gradient, so that forward and
    backward of reduction "none" take the same memory.
    """
    return V * (s_dtype.itemsize + (0 if s_dtype == dtype else dtype.itemsize))


def may_keep(
    hidden_ND: Tensor, num_valid: int | None, V: int, dtype: torch.dtype, s_dtype: torch.dtype, budget: int
) -> bool | None:
    """Whether the student's logits of all tokens are within `budget` bytes, so that their gradients may be kept for
    backward. Of a mask's tokens nothing is known but their number where that is promised: the answer, and with it the
    shape of what is kept, is the same for every mask.

    None: fp16 takes part, whose gradients all wait for backward, where a loss scale lifts them into its range.
    """
    if held_in(hidden_ND, dtype, s_dtype) == torch.float16:
        return None
    fit = _kept_rows(hidden_ND.shape[0], num_valid) <= budget // _row_bytes(V, dtype, s_dtype)
    if not torch.compiler.is_compiling():
        return bool(fit)
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # which takes a third of a second to import

    return guard_or_false(fit)  # no, where the data decides how many there are


def held_in(hidden_ND: Tensor, dtype: torch.dtype, s_dtype: torch.dtype) -> torch.dtype:
    """What gradients per logit or per token are held in, for `reduced_loss`: fp16 wherever that takes part."""
    return torch.float16 if torch.float16 in (hidden_ND.dtype, s_dtype) else dtype


def _kept_rows(N: int, num_valid: int | None) -> int:
    return N if num_valid is None else torch.sym_min(num_valid, N)


def _linear_rows(student, V, tokens, compare, dtypes, budgets, needs, with_stats, keep):
    """Rows of logits of the student's hidden states and head, a chunk at a time, and what becomes of their gradients.

    compare(chunk_rows, bytes left): a function of (chunk, its logits) that overwrites these by the gradient and yields
        (rows, loss, stats). dtypes: of the products, of the student's logits and the teacher's. budgets: bytes for the
        student's logits, and in all. keep: return the gradients of logits too, which `may_keep` allows.
    """
    full_V, D = student[1].shape
    device, (dtype, s_dtype, t_dtype) = student[0].device, dtypes
    h, w, b = tokens.operands(*student, V, dtype)
    n, row_bytes = h.shape[0], _row_bytes(V, dtype, s_dtype)
    chunks = pieces(n, n if keep else budgets[0] // row_bytes)
    chunk_rows = max((c.stop - c.start for c in chunks), default=0)

    loss = torch.zeros(n, device=device, dtype=_loss_dtype(s_dtype, t_dtype))
    stats = loss.new_zeros(3, n) if with_stats else loss.new_empty(0)
    acc_dtype = torch.promote_types(dtype, torch.float32)
    grad_h = torch.empty(n, D, device=device, dtype=student[0].dtype) if needs[0] else None
    grad_w = _weight_gradient(student[1], V, len(chunks), dtype, acc_dtype) if needs[1] else None
    grad_b = torch.zeros(full_V, device=device, dtype=acc_dtype) if needs[2] else None
    kept = _logits((n if tokens.valid is not None else tokens.N) if keep else 0, V, h, dtype)
    kept[n:] = 0

    def fill():  # a function, that its logits are gone when dW is rounded
        buffer = kept if keep and s_dtype == dtype else _logits(chunk_rows, V, h, s_dtype)
        against_teacher = compare(chunk_rows, budgets[1] - chunk_rows * row_bytes)
        for chunk in chunks:
            logits = buffer[: chunk.stop - chunk.start]
            project(logits, h[chunk], w, b)
            for rows, loss[rows], found in against_teacher(chunk, logits):
                if with_stats:
                    stats[:, rows] = found
            if not (keep or any(needs)):
                continue
            g = kept[chunk].copy_(logits) if keep and s_dtype != dtype else logits.to(dtype)
            if grad_h is not None:
                grad_h[chunk] = hidden_gradient(g, w)
            if grad_w is not None:
                add_product(grad_w[:V], g, h[chunk], first=chunk is chunks[0])
            if grad_b is not None:
                grad_b[:V] += logits.sum(0, dtype=acc_dtype)

    fill()
    grads = (
        tokens.spread(grad_h) if needs[0] else student[0].new_empty(0),
        grad_w.to(_summed_dtype(student[1])) if needs[1] else student[1].new_empty(0),
        grad_b.to(_summed_dtype(student[2])) if needs[2] else student[1].new_empty(0),
    )
    return tokens.spread(loss), *grads, tokens.spread(stats, 1) if with_stats else stats, kept


def head_gradients(kept, hidden, weight, bias, mask, factor, dtype, num_valid, needs_weight, needs_bias):
    """dW and db of kept gradients of logits (rows, V) whose tokens each have a factor (N,): it multiplies the hidden
    states, which are narrower.
    """
    V, acc_dtype = kept.shape[1], torch.promote_types(dtype, torch.float32)
    with without_autocast(hidden.device.type):
        tokens = _tokens(len(hidden), mask, num_valid)
        h, factor = tokens.rows(hidden, dtype), tokens.rows(factor, acc_dtype)
        g = kept[: len(h)]
        grad_w, grad_b = weight.new_empty(0), weight.new_empty(0)
        if needs_weight:
            grad_w = _weight_gradient(weight, V, int(len(h) > 0), dtype, acc_dtype)
            if len(h):
                add_product(grad_w[:V], g, (factor[:, None] * h).to(dtype), first=True)
            grad_w = grad_w.to(_summed_dtype(weight))
        if needs_bias:
            grad_b = torch.zeros(len(weight), device=hidden.device, dtype=acc_dtype)
            for rows in pieces(len(h), FEW if g.device.type == "cpu" else TILE):
                grad_b[:V] += factor[rows] @ g[rows].to(acc_dtype)
            grad_b = grad_b.to(_summed_dtype(bias))
    return grad_w, grad_b


def _weight_gradient(weight: Tensor, V: int, num_chunks: int, dtype: torch.dtype, acc_dtype: torch.dtype) -> Tensor:
    """Where dW is gathered: fp32 unless one product, rounded once, is all there is. What no product reaches is zero."""
    once = num_chunks == 1 and weight.dtype == dtype == _summed_dtype(weight)
    grad = ops.empty_rows(*weight.shape, weight, dtype if once else acc_dtype)
    grad[V if num_chunks else 0 :] = 0
    return grad


def _loss_dtype(s_dtype: torch.dtype, t_dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(torch.promote_types(s_dtype, t_dtype), torch.float32)


def _summed_dtype(parameter: Tensor) -> torch.dtype:
    """Of a gradient summed over tokens: fp32 for fp16, which it may leave until backward divides by their number."""
    return torch.float32 if parameter.dtype == torch.float16 else parameter.dtype


torch.library.impl("effopd::linear_divergence_rows", "CompositeExplicitAutograd", linear_divergence_rows)
torch.library.impl("effopd::linear_topk_rows", "CompositeExplicitAutograd", linear_topk_rows)
torch.library.impl("effopd::head_gradients", "CompositeExplicitAutograd", head_gradients)


def _fake_head(weight, bias, grad_w, grad_b):
    return (
        weight.new_empty(weight.shape, dtype=_summed_dtype(weight)) if grad_w else weight.new_empty(0),
        bias.new_empty(bias.shape, dtype=_summed_dtype(bias)) if grad_b else weight.new_empty(0),
    )


def _fake(student, V, dtypes, num_valid, grad_h, grad_w, grad_b, with_stats, keep):
    (hidden, weight, bias), (dtype, s_dtype, t_dtype) = student, dtypes
    N = hidden.shape[0]
    loss = hidden.new_empty(N, dtype=_loss_dtype(s_dtype, t_dtype))
    return (
        loss,
        hidden.new_empty(hidden.shape if grad_h else 0),
        *_fake_head(weight, bias, grad_w, grad_b),
        loss.new_empty((3, N) if with_stats else 0),
        hidden.new_empty(_kept_rows(N, num_valid) if keep else 0, _pitched(V, hidden.device), dtype=dtype)[:, :V],
    )


@torch.library.register_fake("effopd::linear_divergence_rows")
def _(student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, *args):
    *_, dtype, teacher_dtype, logits_dtype, _, num_valid, grad_h, grad_w, grad_b, with_stats, keep = args
    student = student_hidden, student_weight, student_bias
    V = min(student_weight.shape[0], teacher_weight.shape[0])
    dtypes = dtype, logits_dtype or dtype, logits_dtype or teacher_dtype
    return _fake(student, V, dtypes, num_valid, grad_h, grad_w, grad_b, with_stats, keep)


@torch.library.register_fake("effopd::linear_topk_rows")
def _(hidden, weight, bias, *args):
    *_, dtype, _, num_valid, grad_h, grad_w, grad_b, with_stats, keep = args
    dtypes = dtype, dtype, dtype
    return _fake((hidden, weight, bias), weight.shape[0], dtypes, num_valid, grad_h, grad_w, grad_b, with_stats, keep)


@torch.library.register_fake("effopd::head_gradients")
def _(kept, hidden, weight, bias, mask, factor, dtype, num_valid, grad_w, grad_b):
    return _fake_head(weight, bias, grad_w, grad_b)
