"""At which global steps EffOPD acts, which step sizes it then tries, and how many tokens it may spend on them."""

import math
from collections.abc import Callable, Collection, Sequence
from numbers import Integral

from ..checks import is_integer
from .arguments import as_float
from .records import EffOPDEvent

LEAST_WAIT = 2  # steps between events of the adaptive schedule: what one costs that validates on two batches of prompts


def schedule_of(schedule: str | int | Collection[int]) -> Callable[[int, Sequence[EffOPDEvent]], bool]:
    """(step, the events so far) → bool for "pow2" (1, 2, 4, 8, ..., published), an int n (n, 2n, 3n, ...), a collection
    of steps, or "adaptive", which tries more often where jumps pay and hardly ever where they do not.

    Raises ValueError for anything else, an empty collection, or steps below 1.
    """
    if isinstance(schedule, str) and schedule == "pow2":
        return lambda step, events: step > 0 and step & (step - 1) == 0
    if isinstance(schedule, str) and schedule == "adaptive":
        return _adaptive
    if is_integer(schedule) and schedule > 0:
        return lambda step, events: step > 0 and step % schedule == 0
    if isinstance(schedule, Collection) and not isinstance(schedule, str):
        steps = list(schedule)
        if steps and all(isinstance(step, Integral) and step > 0 for step in steps):
            listed = frozenset(steps)
            return lambda step, events: step in listed
    raise ValueError(
        f'schedule must be "pow2", "adaptive", a positive int, or a collection of steps >= 1, got {schedule!r}'
    )


def _adaptive(step: int, events: Sequence[EffOPDEvent]) -> bool:
    """A jump of α over n steps gains (α − 1)·n: if that is n or more, the next event comes after n/2 steps, else 2n."""
    if not events:
        return step >= LEAST_WAIT
    *_, before, last = 0, *(event.step for event in events[-2:])
    waited = last - before
    return step >= last + (max(LEAST_WAIT, waited // 2) if events[-1].alpha >= 2 else 2 * waited)


def alphas_of(alphas: Sequence[float], search: str) -> tuple[float, ...]:
    """The candidates as floats. Raises ValueError unless all are finite and none is the anchor (0) or W_t (1), and for
    search="gradient", which looks between 1 and the largest, if none is above 1."""
    try:
        values = tuple(map(as_float, alphas))
    except TypeError as error:
        raise ValueError(f"alphas must be a sequence of numbers, got {alphas!r}") from error
    if not values or not all(math.isfinite(a) and a not in (0.0, 1.0) for a in values):
        raise ValueError(f"alphas must be finite and neither 0 nor 1, at least one, got {alphas}")
    if search == "gradient" and max(values) < 1:
        raise ValueError(f"alphas must reach above 1 for a gradient search, got {alphas}")
    return values


def budget_of(max_val_tokens: int | None) -> int | None:
    """Tokens of the whole run, None for no limit. Raises ValueError for anything else but a positive int."""
    if max_val_tokens is None or (is_integer(max_val_tokens) and max_val_tokens > 0):
        return max_val_tokens
    raise ValueError(f"max_val_tokens must be a positive int, or None for no limit, got {max_val_tokens!r}")
