"""How gradients computed ahead of time enter autograd, the same way from logits and from hidden states.

A public function hands over a module-level `run(tensors, row_scale, spec, needs, with_stats)`, which returns the
per-row divergence D (N,), the gradients of row_scale·D for each needed tensor, and the stats. A scalar loss computes
its gradients in the forward, where the row is still in cache; backward only scales them. With reduction "none" the
upstream gradient differs per row. Hidden states' gradients are scaled row by row; a head's, which sum over rows, are
made of the gradients of logits, kept where all fit the budget; any others are computed in backward.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..gradients import anchor_of, differentiable_once, keepable


class DivergenceStats(NamedTuple):
    """Per token, fp32 (fp64 for fp64 logits), of the mask's shape, detached, 0 where masked; entropies in nats."""

    divergence: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    top1_agreement: Tensor


def keeps_graph() -> bool:
    """Whether the backward pass that runs leaves its graph for another; True outside of one."""
    return getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()


def in_kept_backward() -> bool:
    """Whether a backward pass is running, and leaves its graph for another."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() >= 0 and keeps_graph()


def _scaled(grads: tuple[Tensor, ...], factor: Tensor) -> tuple[Tensor, ...]:
    """factor·grads: in fresh memory, since a graph that is kept must keep its gradients too; else in their own."""
    fresh = torch.compiler.is_compiling() or keeps_graph()
    if fresh or torch._C._functorch.is_legacy_batchedtensor(factor):  # many at a time: is_grads_batched
        return tuple(grad * factor for grad in grads)
    for grad in grads:
        torch.ops.effopd.scale_(grad, factor)
    return grads


def apply(function: type[torch.autograd.Function], *args):
    """function.apply(*args). Where nothing requires a gradient torch.compile takes its forward alone: it cannot trace
    more.
    """
    wanted = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args)
    return function.apply(*args) if wanted or not torch.compiler.is_compiling() else function.forward(*args)


class _WithGradients(torch.autograd.Function):
    """The identity on `value`, whose gradients with respect to `inputs` are known already, but for a factor `unit`, or
    None where they are not needed. Used also where none is: PyTorch then refuses forward-mode derivatives. anchor: of
    the inputs (`anchor_of`), which are not kept themselves.
    """

    @staticmethod
    def forward(value, unit, anchor, *grads_and_inputs):
        return value.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1 : 2 + len(inputs) // 2])

    @staticmethod
    def backward(ctx, grad_output):
        unit, anchor, *grads = ctx.saved_tensors
        factor = grad_output if unit is None else grad_output * unit
        scaled = iter(_scaled(tuple(g for g in grads if g is not None), factor))
        found = [g if g is None else next(scaled) for g in grads]
        return None, None, None, *(None for _ in grads), *differentiable_once(found, (anchor, grad_output))


class _PerRow(torch.autograd.Function):
    """Per-row divergences (N,) and stats; gradients wait for the upstream gradient of each row."""

    @staticmethod
    def forward(run, spec, needs, with_stats, *tensors):
        rows, _, stats, *_ = run(tensors, None, spec, (False,) * len(needs), with_stats)
        return rows, stats

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.run, ctx.spec, ctx.needs, _, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, grad_output, _):
        tensors = ctx.saved_tensors
        with torch.no_grad():
            _, grads, *_ = ctx.run(tensors, grad_output, ctx.spec, ctx.needs, False)
        grads = differentiable_once(grads, (*tensors[: len(grads)], grad_output))
        return None, None, None, None, *grads, *(None for _ in tensors[len(grads) :])


class _PerToken(torch.autograd.Function):
    """`_PerRow` from hidden states and a head. Returns besides, for backward alone, the gradients of hidden states and,
    with `keep`, of logits, all but for the rows' upstream gradients.
    """

    @staticmethod
    def forward(run, spec, needs, with_stats, keep, dtype, *tensors):
        ahead, keep = (needs[0], False, False), keep and any(needs[1:])
        rows, (grad_h, *_), stats, kept = run(tensors, None, spec, ahead, with_stats, keep)
        return rows, stats, rows.new_empty(0) if grad_h is None else grad_h, kept

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.run, ctx.spec, ctx.needs, _, ctx.keep, ctx.dtype, *tensors = inputs
        again = any(ctx.needs[1:]) and not ctx.keep  # else no teacher's
        ctx.save_for_backward(*(tensors if again else (*tensors[:3], tensors[-1])), *output[2:])
        ctx.mark_non_differentiable(*output[1:])
        if not torch.compiler.is_compiling():  # a trace drops what is not used, and may not know the call
            ctx.set_materialize_grads(False)  # for what has none, zeros as large as the logits

    @staticmethod
    def backward(ctx, grad_output, *_):
        if grad_output is None:
            return (None,) * len(ctx.needs_input_grad)
        *tensors, grad_h, kept = ctx.saved_tensors
        inputs, mask = tensors[:3], tensors[-1]
        factor = grad_output if mask is None else grad_output.masked_fill(~mask, 0)  # NaN upstream of what is masked
        grads = [None, None, None]
        with torch.no_grad():
            if ctx.needs[0]:
                grads[0] = (grad_h * factor[:, None]).to(grad_h.dtype)
            if any(ctx.needs[1:]):
                if ctx.keep:
                    args = kept, *inputs, mask, factor, ctx.dtype, ctx.spec[-1], *ctx.needs[1:]
                    head = torch.ops.effopd.head_gradients(*args)
                else:
                    head = ctx.run(tensors, factor, ctx.spec, (False, *ctx.needs[1:]), False)[1][1:]
                grads[1:] = (grad if need else None for grad, need in zip(head, ctx.needs[1:], strict=True))
        grads = differentiable_once(grads, (*inputs, grad_output))
        return *[None] * 6, *grads, *[None] * (len(ctx.needs_input_grad) - 9)


def reduced_loss(
    run: Any,
    tensors: tuple,
    spec: tuple,
    scale_N: Tensor | None,
    *,
    num_inputs: int,
    per_row: bool,
    with_stats: bool,
    dtype: torch.dtype,
    keep: bool | None = None,
):
    """(loss, per-row divergence, stats), where loss is Σ scale·D, or with `per_row` scale·D (N,).

    The first `num_inputs` of `tensors` are differentiable, the last is the mask (N,); `scale_N` None is 1. `dtype` is
    what gradients per logit are held in: in fp16 their factor 1/tokens would take them below its range before a loss
    scale could lift them, so the largest factor waits for backward. `keep`, per row from hidden states: `may_keep`.
    """
    inputs = tensors[:num_inputs]
    needs = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in inputs)
    if per_row:
        if keep is None:
            rows, stats_3N = apply(_PerRow, run, spec, needs, with_stats, *map(keepable, tensors))
        else:
            rows, stats_3N, *_ = apply(_PerToken, run, spec, needs, with_stats, keep, dtype, *map(keepable, tensors))
        # A copy for the statistics: the loss may be written to, as by `loss *= advantages`.
        return rows if scale_N is None else rows * scale_N, rows.detach().clone() if with_stats else rows, stats_3N
    detached = tuple(t if t is None else t.detach() for t in tensors)
    unit, row_scale = None, scale_N
    if dtype == torch.float16 and scale_N is not None and scale_N.numel():
        unit = scale_N.abs().amax()
        unit = unit.masked_fill(unit == 0, 1)
        row_scale = scale_N / unit
    rows, grads, stats_3N, *_ = run(detached, row_scale, spec, needs, with_stats)
    loss = (rows if scale_N is None else rows * scale_N).sum()
    return apply(_WithGradients, loss, unit, anchor_of(inputs), *grads, *inputs), rows, stats_3N
