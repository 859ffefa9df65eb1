"""The weights that move, and the two buffers EffOPD needs: the anchor A, and during an event W_t.

Every candidate is computed from A and W_t directly, so nothing is compounded, and rolling back is writing α = 1, which
is W_t bit for bit. Where an optimizer keeps fp32 masters, A and W_t are the masters' values and both are written.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..checks import FLOATS
from . import buffers
from .cpu import BLOCK
from .functional import extrapolate_
from .masters import no_masters
from .selection import is_frozen, named_tensors
from .shards import Part, check_same, local, part_of, replicas, reshard

logger = logging.getLogger(__name__)

DEVICE_BLOCK = 1 << 24  # elements of a slope at a time, off the CPU
STAGED_BYTES = 1 << 28  # of each buffer at a time, when it is not on the parameters' device


class DenseWeights:
    """Named tensors extrapolated element by element: plain ones, or the local shards of DTensors.

    Args:
        named: name → tensor as the engine holds it.
        find_masters: see `masters.find_masters`; asked now, for W_0 is what the masters hold, and at every event, as
            many optimizers create masters at their first step.
        place, directory: where the two buffers are kept, see `buffers.allocate`.
        module: whose parameters they are, where FSDP2 may have gathered copies of them.
        trained: () → every tensor that a backward pass may give a gradient; `named` ones by default.
        frozen: name → parameter that would be among `named` if it were trained.
    """

    def __init__(
        self,
        named: Mapping[str, Tensor],
        find_masters: Callable[[], tuple[Mapping[str, Tensor], list[str]]] = no_masters,
        place: str = "device",
        directory=None,
        module: nn.Module | None = None,
        trained: Callable[[], Iterable[Tensor]] | None = None,
        frozen: Mapping[str, Tensor] | None = None,
    ):
        self.names, self.tensors = list(named), list(named.values())
        self.dtypes = [t.dtype for t in self.tensors]
        masters, _ = find_masters()
        self.masters: list[Tensor | None] = [masters.get(name) for name in self.names]
        self._find_masters, self._place, self._directory = find_masters, place, directory
        self._module, self._trained, self._frozen = module, trained or named.values, frozen or {}
        self.anchors = self._copy()
        self.currents: list[Tensor] | None = None
        self.holders: Mapping[str, int] = {}  # name → ranks that have it; all, where not said

    @property
    def still(self) -> list[str]:
        """Parameters that would move if they were trained."""
        return list(self._frozen)

    @property
    def wanted(self) -> dict[str, Part]:
        """What this rank holds of each tensor."""
        return {name: part_of(t) for name, t in zip(self.names, self.tensors, strict=True)}

    @property
    def parts(self) -> dict[str, Part] | None:
        """As `wanted`; None, on all ranks alike, where every one holds all of them."""
        sharded = any(t.device_mesh.size() > 1 for t in self.tensors if hasattr(t, "device_mesh"))
        return self.wanted if sharded else None

    def hold(self) -> None:
        """Keep W_t. Raises ValueError for a parameter that is no longer the model's, or of another dtype now, and for
        one that moved though the optimizer steps no copy of it we can see: its next step would undo a jump."""
        reshard(self._module)
        if self._module is not None:
            there = named_tensors(self._module)
            replaced = [n for n, t in zip(self.names, self.tensors, strict=True) if there.get(n) is not t]
            if replaced:
                raise ValueError(
                    f"{replaced[0]} ({len(replaced)} of {len(self.names)}) is not the model's parameter any more: make "
                    "the controller after what replaces parameters (fully_shard, accelerate.prepare, resizing)"
                )
        for name, tensor, dtype in zip(self.names, self.tensors, self.dtypes, strict=True):
            if tensor.dtype != dtype:
                raise ValueError(
                    f"{name} is {tensor.dtype} and was {dtype} when the controller was made: make the controller after "
                    "what changes dtypes"
                )
        thawed = [name for name, t in self._frozen.items() if t.requires_grad]
        if thawed:
            logger.warning(
                "%d parameters that were frozen when the controller was made are trained now (%s, ...), but jumps do "
                "not move them: make the controller while they are trained, and freeze them then",
                len(thawed),
                thawed[0],
            )
            self._frozen = {}  # said once
        masters, unstepped = self._find_masters()
        for name, tensor, anchor in zip(self.names, self.tensors, self.anchors, strict=True):
            if name in unstepped and not torch.equal(local(tensor), anchor.to(tensor.device, tensor.dtype)):
                raise ValueError(
                    f"the optimizer steps neither {name} nor an fp32 master of it that could be found, so it would "
                    "undo a jump: pass a list of all optimizers if another one steps it, or masters={name: tensor}"
                )
        self.masters = [masters.get(name) for name in self.names]
        self.currents = self._copy()

    def write(self, alpha: float) -> list[Tensor]:
        """W ← A + α(W_t − A); α = 1 is W_t, bit for bit.

        Returns per tensor of this rank ‖W_t − A‖², ‖W‖² and the count of non-finite elements: three (L,) tensors.
        """
        reshard(self._module)
        stats = []
        for part in self._staged():
            params, masters = (
                [None if ts[i] is None else local(ts[i]) for i in part] for ts in (self.tensors, self.masters)
            )
            anchors, currents = (
                [ts[i].to(p.device, non_blocking=True) for i, p in zip(part, params, strict=True)]
                for ts in (self.anchors, self.currents)
            )
            stats.append(extrapolate_(params, anchors, currents, alpha, masters=masters))
        torch.clear_autocast_cache()  # inside torch.autocast it would go on serving casts of the old weights
        return [torch.cat([column.cpu() for column in columns]) for columns in zip(*stats, strict=True)]

    def write_for_slope(self, alpha: float) -> None:
        """As `write`, such that a backward pass leaves what `slope` needs."""
        # A parameter that was frozen since the last event adds what it moved before to δ, but nothing to the slope.
        if not all(t.requires_grad or is_frozen(t) for t in self.tensors):
            raise ValueError('search="gradient" needs the parameters themselves, with requires_grad')
        self.write(alpha)

    @torch.no_grad()
    def slope(self, world_size: int) -> float:
        """This rank's part of ∂L/∂α = Σ ∂L/∂W·(W_t − A), after `write_for_slope` and a backward pass."""
        total = 0.0
        columns = self.tensors, self.anchors, self.currents, self._replicas(world_size)
        for tensor, anchor, current, count in zip(*columns, strict=True):
            if tensor.grad is not None:
                total += _along(local(_placed_as(tensor, tensor.grad)), anchor, current) / count
        return total

    def trained(self) -> list[Tensor]:
        """Every parameter that a backward pass may give a gradient."""
        return list(self._trained())

    def restore(self) -> None:
        """W ← W_t, and forget W_t."""
        if self.currents is not None:
            self.write(1.0)
        self.currents = None

    @torch.no_grad()
    def settle(self) -> None:
        """A ← W, in the memory of W_t: after the decision nothing is allocated, which could fail, and where masters
        appeared since the last event its dtypes are theirs."""
        reshard(self._module)
        for current, source in zip(self.currents, self._sources(), strict=True):
            current.copy_(local(source))
        self.anchors, self.currents = self.currents, None

    def fold(self) -> bool:
        """False: jumps are in the weights themselves. See `LoraWeights.fold`."""
        return False

    def norms(self, world_size: int) -> tuple[float, float]:
        """This rank's part of ‖W_t − A‖² and ‖W_t‖², such that summing over ranks counts every element once."""
        delta_sq, weight_sq, _ = self.write(1.0)
        share = 1.0 / delta_sq.new_tensor(self._replicas(world_size), dtype=torch.float64)
        return float((delta_sq * share).sum()), float((weight_sq * share).sum())

    def state(self) -> dict[str, Tensor]:
        """The anchor's local parts by name."""
        return dict(zip(self.names, self.anchors, strict=True))

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError when names or shapes are not those of the weights, TypeError when dtypes cannot be, before
        anything is changed.
        """
        check_same({n: t.shape for n, t in state.items()}, {n: a.shape for n, a in self.state().items()})
        if strange := next((n for n, t in state.items() if t.dtype not in FLOATS), None):
            raise TypeError(f"{strange} in the controller's state is {state[strange].dtype}, which no anchor is")
        if any(state[n].dtype != a.dtype for n, a in zip(self.names, self.anchors, strict=True)):  # there were masters
            like = {n: a.to(state[n].dtype) for n, a in zip(self.names, self.anchors, strict=True)}
            self.anchors = buffers.allocate(like, self._place, self._directory)
        for name, anchor in zip(self.names, self.anchors, strict=True):
            anchor.copy_(state[name])

    def _replicas(self, world_size: int) -> list[float]:
        holders = [self.holders.get(name, world_size) for name in self.names]
        return list(map(replicas, self.tensors, holders))

    def _sources(self) -> list[Tensor]:
        return [t if m is None else m for t, m in zip(self.tensors, self.masters, strict=True)]

    @torch.no_grad()
    def _copy(self) -> list[Tensor]:
        sources = {name: local(t) for name, t in zip(self.names, self._sources(), strict=True)}
        out = buffers.allocate(sources, self._place, self._directory)
        for copy, source in zip(out, sources.values(), strict=True):
            copy.copy_(source)
        return out

    def _staged(self) -> Iterator[list[int]]:
        """All indices at once, or as many as are staged at a time."""
        part, size = [], 0
        for i, (anchor, tensor) in enumerate(zip(self.anchors, self.tensors, strict=True)):
            away = anchor.device != tensor.device
            if away and part and size + anchor.nbytes > STAGED_BYTES:
                yield part
                part, size = [], 0
            part.append(i)
            size += anchor.nbytes if away else 0
        yield part


def _along(gradient: Tensor, anchor: Tensor, current: Tensor) -> float:
    """Σ gradient·(current − anchor) in fp32, some rows at a time: no temporary is as large as a large tensor."""
    block = BLOCK if gradient.is_cpu else DEVICE_BLOCK
    total, columns = 0.0, [torch.atleast_1d(t) for t in (gradient, anchor, current)]
    rows = max(1, block * len(columns[0]) // max(1, gradient.numel()))
    for g, a, c in zip(*(t.split(rows) for t in columns), strict=True):
        delta = c.to(g.device).float() - a.to(g.device).float()
        total += float((g.float() * delta).sum())
    return total


def _placed_as(tensor: Tensor, gradient: Tensor) -> Tensor:
    """gradient in the placements of tensor: that of a replicated one (a norm under sequence parallelism) may be partial
    sums."""
    if any(placement.is_partial() for placement in getattr(gradient, "placements", ())):
        return gradient.redistribute(placements=tensor.placements)
    return gradient
