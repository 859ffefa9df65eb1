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

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .head_products import FEW, TILE, add_product, hidden_gradient, pieces, project

PITCH = 64  # elements, of which a GPU's rows of logits are multiples

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


def student_bytes(chunk_bytes: int) -> int:
    """For the student's logits where the teacher has some too, of which fewer are needed at a time."""
    return chunk_bytes * 3 // 4


def _logits(N: int, V: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialised logits (N, V). On a GPU every row starts at a multiple of PITCH elements, whatever V is, so that
    GEMMs and the row kernel can load vectors."""
    return ops.empty_rows(N, _pitched(V, like.device), like, dtype)[:, :V]


def _pitched(V: int, device: torch.device) -> int:
    return V if device.type == "cpu" else -(-V // PITCH) * PITCH


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
    if mask_N is None:
        return _Tokens(N, None, None)
    if num_valid is None:
        return _Tokens(N, mask_N.nonzero().squeeze(1), None)  # on a GPU the one synchronisation
    num_valid = min(num_valid, N)
    index = torch.nonzero_static(mask_N, size=num_valid, fill_value=0).squeeze(1)
    return _Tokens(N, index, torch.arange(num_valid, device=mask_N.device) < mask_N.sum())


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
