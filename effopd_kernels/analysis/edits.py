"""A model edited in place, and back again bit for bit.

    W ← W0 + α · c · P(W_t − W0)    on the tensors an edit names;  W0 on all others

P is the whole update, the head of its singular value decomposition, or the tail; c is 1, or brings each tensor's P to
the Frobenius norm that tensor's final update has in some trajectory. Every intervention of the analysis is an `Edit`:
this formula with other arguments.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from ..checks import wide
from ..extrapolation import buffers, extrapolate, extrapolate_
from ..extrapolation.interrupts import Deferred
from ..lowrank import RSVD, batched_rsvd, low_rank_update
from ..lowrank.types import triplet_count
from .checkpoints import Checkpoint
from .roles import is_matrix

ROUNDING = 1e-6  # of an update's norm: a part that is smaller is fp32 rounding, and is not blown up to another norm


@dataclass(frozen=True)
class Edit:
    """Which tensors, and what becomes of them. No names, or α = 0: the base itself."""

    trajectory: str | None = None
    checkpoint: int = 0  # position in the trajectory
    names: tuple[str, ...] = ()
    alpha: float = 1.0
    part: str = "whole"  # "top": the leading ⌈fraction · min(m, n)⌉ triplets of every matrix; "bottom": all but them
    fraction: float = 1.0
    norm_of: str | None = None  # each tensor's part is rescaled to its norm in this trajectory's final update

    def key(self) -> str:
        """Equal for edits that write the same weights."""
        if not self.names or self.alpha == 0:
            return "base"
        text = json.dumps(asdict(self) | {"names": sorted(self.names)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class EditableModel:
    """A model whose weights are the base's except inside `edited`.

    Args:
        model: holds the base; its floating parameters and persistent buffers can be edited, tied ones once.
        trajectories: name → checkpoints in order of training.
        files: what W0 is read from by name where the model holds it rounded: an update is the difference of the files,
            and the edited weight is rounded once. None: W0 is what the model holds.
        max_fraction: the largest `Edit.fraction` that will be asked for; factors of that rank are kept in memory.
        place, directory: where the copy of the base is kept, see `extrapolation.buffers.allocate`.
        on_change: called after the weights have changed, for engines that hold copies of them.
    """

    def __init__(
        self,
        model: nn.Module,
        trajectories: Mapping[str, Sequence[Checkpoint]],
        *,
        files: Checkpoint | None = None,
        max_fraction: float = 1.0,
        place: str = "device",
        directory=None,
        on_change: Callable[[], None] = lambda: None,
    ):
        self.live = live_tensors(model)
        self.trajectories, self.files = trajectories, files
        self.max_fraction, self.on_change = max_fraction, on_change
        self.base = dict(zip(self.live, buffers.allocate(self.live, place, directory), strict=True))
        self._norms: dict[tuple[str, int], dict[str, float]] = {}
        self._factors: dict[tuple[str, int, str], RSVD] = {}
        with torch.no_grad():
            for name, copy in self.base.items():
                copy.copy_(self.live[name])

    @contextmanager
    def edited(self, edit: Edit) -> Iterator[None]:
        """The weights are the edit's inside and, bit for bit, the base's afterwards: after an exception, Ctrl-C or
        SIGTERM too, whenever they come: only putting the base back makes them wait."""
        with Deferred() as signals:
            try:
                with signals.open():
                    if edit.key() != "base":
                        self._write(edit)
                    self.on_change()
                    yield
            finally:
                self._restore(edit.names)

    def norms(self, trajectory: str, checkpoint: int = -1) -> dict[str, float]:
        """‖W_t − W0‖_F per tensor."""
        place = trajectory, checkpoint % len(self.trajectories[trajectory])
        if place not in self._norms:
            self._norms[place] = {n: _norm(_difference(*self._pair(place, n, self.base_of(n)))) for n in self.live}
        return self._norms[place]

    def factor_seconds(self, trajectory: str, checkpoint: int) -> float:
        """About how long factoring every matrix of an update will take: one of median size is timed, and the others
        cost in proportion to m · n · rank."""
        place = trajectory, checkpoint
        cost = {n: t.numel() * self._rank(t, self.max_fraction) for n, t in self.live.items() if is_matrix(n, t.shape)}
        cost = {name: c for name, c in cost.items() if (*place, name) not in self._factors}
        if not cost:
            return 0.0
        median = sorted(cost, key=cost.get)[len(cost) // 2]
        update = _difference(*self._pair(place, median, self.base_of(median)))
        start = time.perf_counter()
        self._factor((*place, median), update)
        return (time.perf_counter() - start) * sum(cost.values()) / cost[median]

    def base_of(self, name: str) -> Tensor:
        """W0 of one tensor, unrounded, on the device of the live one."""
        base = self.base[name] if self.files is None else self.files.read(name)
        return base.to(self.live[name].device)

    @torch.no_grad()
    def _write(self, edit: Edit) -> None:
        place = edit.trajectory, edit.checkpoint
        for name in edit.names:
            param, base = self.live[name], self.base_of(name)
            a, b = self._pair(place, name, base)
            whole = edit.part == "whole" or not is_matrix(name, param.shape)
            if whole and edit.norm_of is None and b is not None:
                extrapolate_([param], [b], [a], edit.alpha, stats=False)  # α = 1 is W_t bit for bit
                continue
            part = _difference(a, b)
            length = _norm(part)
            if not whole:
                part = self._project(edit, (*place, name), part)
            alpha = edit.alpha
            if edit.norm_of is not None:
                norm = _norm(part)
                alpha *= self.norms(edit.norm_of)[name] / norm if norm > ROUNDING * length else 0.0
            param.copy_(extrapolate(base, part, alpha))

    def _project(self, edit: Edit, place: tuple[str, int, str], update: Tensor) -> Tensor:
        """The head of a matrix's update, or what is left without it, (..., m, n), in the update's place."""
        svd, rank = self._factor(place, update), self._rank(update, edit.fraction)
        if edit.part == "top":
            return low_rank_update(update.zero_(), svd, rank=rank, out=update)
        return low_rank_update(update, svd, rank=rank, alpha=-1.0, out=update)

    def _factor(self, place: tuple[str, int, str], update: Tensor) -> RSVD:
        if place not in self._factors:
            self._factors[place] = batched_rsvd(update, self._rank(update, self.max_fraction))
        return self._factors[place]

    @staticmethod
    def _rank(matrix: Tensor, fraction: float) -> int:
        return triplet_count(fraction, min(matrix.shape[-2:]))

    def _pair(self, place: tuple[str, int], name: str, base: Tensor) -> tuple[Tensor, Tensor | None]:
        """(a, b) with ΔW = a − b, b None for zero, on the device of the base's tensor."""
        trajectory, checkpoint = place
        a, b = self.trajectories[trajectory][checkpoint].pair(name, base)
        return a.to(base.device), b

    @torch.no_grad()
    def _restore(self, names: Sequence[str]) -> None:
        for name in names:
            self.live[name].copy_(self.base[name])


def live_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name → floating parameter or persistent buffer; a tied one under its first name only."""
    out, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and id(tensor) not in seen:
            seen.add(id(tensor))
            out[name] = tensor
    return out


def _difference(a: Tensor, b: Tensor | None) -> Tensor:
    """a − b in fp32 (fp64 for fp64), which is exact for bf16 tensors of one magnitude."""
    if b is None:
        return a
    return a.to(wide(a, b)) - b.to(wide(a, b))


def _norm(update: Tensor) -> float:
    return float(torch.linalg.vector_norm(update, dtype=torch.float64))
