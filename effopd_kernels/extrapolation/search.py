"""Choosing α by secants on the slope of a validation loss: what search="gradient" does.

    L(α) = loss at W = A + α·δ,      L'(α) = Σ ∂L/∂W·δ        one forward and one backward pass, no generation

The slope at α = 1 says whether to jump at all, and where it crosses zero how far. Losses are fixed-batch and
noise-free, so a few passes find the minimum along the line to well within the spacing of the published candidates.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn

from ..checks import overlaps_itself

TOLERANCE = 0.1  # of the slope at 1: where the line counts as flat
# DDP's (compiled), Trainer's and tensor parallelism's of transformers; FSDP2 has none of its own.
REDUCES_GRADIENTS = (
    "torch.nn.parallel.distributed",
    "transformers.trainer",
    "transformers.distributed.tensor_parallel",
)


class Point(NamedTuple):
    """One evaluation along the line."""

    alpha: float
    loss: float
    slope: float


def line_minimum(
    evaluate: Callable[[float], Point],
    limit: float,
    first: float = 3.0,
    max_passes: int = 6,
    another: Callable[[], bool] = lambda: True,
) -> list[Point]:
    """Evaluate L along α ∈ [1, limit] until its minimum is found; the best point is the one of least loss.

    From α = 1: a loss that rises there ends the search. Otherwise step out (to `first`, then where the secant points,
    at most trebling) until the far end of a bracket or `limit` is reached, then secants inside the bracket, kept a
    tenth of it away from its ends. The far end is where the slope is positive, the loss or slope is not finite, or the
    loss is above that of the near end, whatever the slope: reverse KL is flat again beyond its minimum, where the
    student is certain of something else. Stops when |slope| ≤ TOLERANCE·|slope at 1| at no higher loss, after
    max_passes, or when `another` forbids one more.
    """
    points = [evaluate(1.0)]
    low, high = points[0], None
    if _rises(low):
        return points
    flat = TOLERANCE * abs(low.slope)
    alpha = min(first, limit)
    while len(points) < max_passes and another():
        point = evaluate(alpha)
        points.append(point)
        higher = point.loss > low.loss
        rises = higher or _rises(point)
        if (abs(point.slope) <= flat and not higher) or (point.alpha == limit and not rises):
            break
        previous = low
        if rises:
            high = point
        else:
            low = point
        if high is None:
            alpha = min(max(_secant(previous, point), 1.5 * point.alpha), 3.0 * point.alpha, limit)
        else:
            alpha = _inside(low, high)
    return points


def _inside(low: Point, high: Point) -> float:
    guess, margin = _secant(low, high), 0.1 * (high.alpha - low.alpha)
    if high.loss > low.loss:  # its slope may be none of this minimum's, so at least halve the bracket
        guess = min(guess, 0.5 * (low.alpha + high.alpha))
    return min(max(guess, low.alpha + margin), high.alpha - margin)


def _rises(point: Point) -> bool:
    return not (math.isfinite(point.loss) and point.slope < 0.0)


def _secant(a: Point, b: Point) -> float:
    """Where the line through two slopes is zero; halfway (or beyond reach) where there is none."""
    if not (math.isfinite(b.slope) and math.isfinite(b.loss)):
        return 0.5 * (a.alpha + b.alpha)
    if b.slope <= a.slope:
        return math.inf
    return a.alpha - a.slope * (b.alpha - a.alpha) / (b.slope - a.slope)


def refuse_steps_in_backward(params: Iterable[Tensor]) -> None:
    """Raises ValueError where a backward pass does more than to leave gradients: it would train on the validation
    batch. Only hooks that are known to reduce gradients over ranks may stay."""
    for param in params:
        hooks = (getattr(param, "_post_accumulate_grad_hooks", None) or {}).values()
        others = [hook for hook in hooks if getattr(hook, "func", hook).__module__ not in REDUCES_GRADIENTS]
        if others or hasattr(param, "_in_backward_optimizers"):
            raise ValueError(
                'search="gradient" runs backward passes on validation batches, and there a hook of a parameter would '
                f'run that may train ({others[0] if others else "an optimizer in backward"}): use search="candidates"'
            )


@contextmanager
def gradients_aside(params: Iterable[Tensor]):
    """Afterwards each parameter has the gradient, or none, that it had before."""
    params = list(params)
    kept = [p.grad for p in params]
    # Into views of DDP's buckets (gradient_as_bucket_view) other backward passes write, too.
    values = [g.clone() if g is not None and _in_a_bucket(g) else None for g in kept]
    try:
        yield
    finally:
        for p, grad, value in zip(params, kept, values, strict=True):
            p.grad = grad if value is None else grad.copy_(value)


@contextmanager
def gradients_reduced(module: nn.Module | None):
    """FSDP2 reduces gradients, whatever `set_requires_gradient_sync` was last told: else they would reach no parameter,
    but stay with FSDP2, which adds them to those of the next training step."""
    parts = module.modules() if module is not None else ()
    states = [part._get_fsdp_state() for part in parts if hasattr(part, "_get_fsdp_state")]
    groups = [group for state in states for group in _parameter_groups(state) if group is not None]
    kept = [(group.reduce_grads, group.all_reduce_grads) for group in groups]
    try:
        for group in groups:
            group.reduce_grads = group.all_reduce_grads = True
        yield
    finally:
        for group, flags in zip(groups, kept, strict=True):
            group.reduce_grads, group.all_reduce_grads = flags


def _parameter_groups(fsdp_state) -> list:
    several = getattr(fsdp_state, "_fsdp_param_groups", None)
    return [fsdp_state._fsdp_param_group] if several is None else several  # before PyTorch had several


def _in_a_bucket(gradient: Tensor) -> bool:
    return not hasattr(gradient, "to_local") and gradient._is_view() and not overlaps_itself(gradient)


def summed(losses: Tensor | Iterable[Tensor], backward: bool) -> tuple[float, int]:
    """The sum of one scalar or of several, and how many they were; with `backward`, backpropagated too.

    Several may come from an iterator that computes each when asked: then only one graph is alive at a time. Raises
    TypeError for what is no scalar, ValueError where there is none, or none to backpropagate.
    """
    total, count = 0.0, 0
    for loss in losses if isinstance(losses, Iterable) and not isinstance(losses, Tensor) else [losses]:
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"loss_fn must return a scalar tensor, an iterable of them or Losses, got {what}")
        if backward and not loss.requires_grad:
            raise ValueError("loss_fn returned a loss without a gradient: compute it from the weights, not detached")
        if backward:
            loss.backward()
        total, count = total + float(loss.detach()), count + 1
    if not count:
        raise ValueError("loss_fn returned no loss")
    return total, count
