"""What ranks tell each other during an event: small numbers and scores, never a parameter.

Every exchange is one `all_gather_object` on a gloo group of its own, so it needs no GPU stream and a rank that failed
can say so while the others are still on their way to the exchange. Shapes: R ranks.
"""

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from numbers import Real
from typing import Any, TypeVar

import torch.distributed as dist

from .records import Scores

T = TypeVar("T")
TIMEOUT = timedelta(hours=1)  # for the slowest rank's share of the prompts


class RankFailed(RuntimeError):
    """Another rank reported an error; this rank's weights were restored too."""


class Ranks:
    """The ranks that take a decision together; alone when torch.distributed is not initialised.

    Args:
        process_group: whom to decide with; None for all ranks, in which case a gloo group is made, and the
            constructor must be called by all of them.
        report_s: how long a failed rank tries to tell the others.
    """

    def __init__(self, process_group=None, report_s: float = 60.0):
        if not (isinstance(report_s, Real) and report_s > 0):
            raise ValueError(f"report_s must be a number of seconds above 0, got {report_s!r}")
        self.report_s = min(report_s, threading.TIMEOUT_MAX)
        self.group, self.size, self.rank = process_group, 1, 0
        if not (dist.is_available() and dist.is_initialized()):
            return
        self.size, self.rank = dist.get_world_size(process_group), dist.get_rank(process_group)
        if self.rank < 0:
            raise ValueError("this rank is not in process_group: construct the controller on those that are")
        if self.size > 1 and process_group is None:
            self.group = dist.new_group(backend="gloo", timeout=TIMEOUT)

    def gather(self, value: T, error: BaseException | None = None) -> list[T]:
        """Every rank's value, in rank order. If any rank passes an error, all others raise `RankFailed` naming it."""
        if self.size == 1:
            return [value]
        message = f"{type(error).__name__}: {error}" if error is not None else None
        answers: list = [None] * self.size
        dist.all_gather_object(answers, (value, message), group=self.group)
        failed = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(answers) if text is not None]
        if failed and error is None:
            raise RankFailed("; ".join(failed))
        return [value for value, _ in answers]

    def attempt(self, action: Callable[[], T]) -> list[T]:
        """What action() returned on every rank; a rank on which it raises raises that, all others `RankFailed`."""
        value = error = None
        try:
            value = action()
        except Exception as failure:
            error = failure
        values = self.gather(value, error)
        if error is not None:
            raise error
        return values

    def agree(self, settings: Mapping[str, Any]) -> None:
        """Raises ValueError on every rank, naming the setting and two values of it, unless all ranks have the same."""
        first, *others = self.gather(dict(settings))
        for rank, other in enumerate(others, 1):
            for name, value in first.items():
                if other[name] != value:
                    raise ValueError(
                        f"all ranks must have the same settings, but {name} is {value!r} on rank 0 and "
                        f"{other[name]!r} on rank {rank}"
                    )

    def agree_on_moving(self, moving: Sequence[str], still: Sequence[str]) -> Counter[str]:
        """How many ranks have each of the parameters that move: they may hold different ones, as the stages of a
        pipeline do. Raises ValueError on every rank, naming a parameter that moves on one and stays on another."""
        every = self.gather((moving, still))
        sides = zip(*every, strict=True)
        moves, stays = ({name: rank for rank, names in enumerate(side) for name in names} for side in sides)
        if torn := sorted(moves.keys() & stays.keys()):
            raise ValueError(f"{torn[0]} is trained on rank {moves[torn[0]]} and frozen on rank {stays[torn[0]]}")
        return Counter(name for names, _ in every for name in names)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sums over ranks, the same bits on every rank."""
        return [sum(column) for column in zip(*self.gather(list(values)), strict=True)]

    def merge(self, scores: Scores) -> Scores:
        """Scores of all ranks' prompts in rank order; tokens add up and the slowest rank gives the time."""
        if self.size == 1:
            return scores
        every = self.gather(scores)
        values = tuple(v for s in every for v in s.values)
        return Scores(values, sum(s.tokens for s in every), max(s.seconds for s in every))

    def report(self, error: BaseException) -> bool:
        """Tell the other ranks that this one failed; they raise `RankFailed` at their next exchange. True if all know.

        If they do not come to it within `report_s`, they hang in a collective of the engine's that this rank left: then
        it is this process's end that tells them.
        """
        told = []

        def tell():
            with contextlib.suppress(Exception):  # the others are gone already: nobody is left to be told
                told.append(self.gather(None, error))

        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        thread.join(self.report_s)
        return bool(told)


def share(items: Sequence[T], rank: int | None = None, size: int | None = None) -> Sequence[T]:
    """This rank's contiguous part of items, maybe empty: merged scores then come in their order, as on one process.
    rank and size, given both or neither, are torch.distributed's by default. Raises ValueError for others and TypeError
    for items that cannot be sliced."""
    if (rank is None) != (size is None):
        raise ValueError(f"give both rank and size or neither, got rank {rank} and size {size}")
    if rank is None:
        ranks = dist.is_available() and dist.is_initialized()
        rank, size = (dist.get_rank(), dist.get_world_size()) if ranks else (0, 1)
    if not 0 <= rank < size:
        raise ValueError(f"rank must be at least 0 and below size, got rank {rank} and size {size}")
    if isinstance(items, Mapping) or not (hasattr(items, "__len__") and hasattr(items, "__getitem__")):
        raise TypeError(f"items must be a sequence, as a list of prompts, got a {type(items).__name__}")
    return items[rank * len(items) // size : (rank + 1) * len(items) // size]
