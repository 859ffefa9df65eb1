"""The weights that move, and the two buffers EffOPD needs: the anchor A, and during an event W_t.

Every candidate is computed from A and W_t directly, so nothing is compounded, and rolling back is writing α = 1, which
is W_t bit for bit. Where an optimizer keeps fp32 masters, A and W_t are the masters' values and both are written.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .functional import ExtrapolationStats, extrapolate_
from .shards import copies, local

__all__ = ["DenseWeights"]


class DenseWeights:
    """Named tensors extrapolated element by element: plain ones, or the local shards of DTensors.

    Args:
        named: name → tensor as the engine holds it.
        masters: name → the fp32 copy that an optimizer steps, where there is one.
    """

    def __init__(self, named: Mapping[str, Tensor], masters: Mapping[str, Tensor] | None = None):
        masters = masters or {}
        self.names = list(named)
        self.tensors = list(named.values())
        self.masters = [masters.get(name) for name in self.names]
        self.anchors = [t.clone() for t in self._sources()]
        self.currents: list[Tensor] | None = None

    def hold(self) -> None:
        """Keep W_t."""
        self.currents = [t.clone() for t in self._sources()]

    def write(self, alpha: float, stats: bool = False) -> ExtrapolationStats | None:
        """W ← A + α(W_t − A); α = 1 is W_t, bit for bit."""
        return extrapolate_(
            [local(t) for t in self.tensors], self.anchors, self.currents, alpha, masters=self.masters, stats=stats
        )

    @torch.no_grad()
    def anchor_here(self) -> None:
        """A ← W, and forget W_t."""
        for anchor, source in zip(self.anchors, self._sources(), strict=True):
            anchor.copy_(source)
        self.currents = None

    def replication(self, world_size: int) -> Tensor:
        """(L,) on how many ranks each tensor's local part is found: what sums over ranks are divided by."""
        return torch.tensor([copies(t, world_size) for t in self.tensors])

    @property
    def sharded(self) -> bool:
        """Whether other ranks hold parts of these tensors that this one does not."""
        return any(t.device_mesh.size() > 1 for t in self.tensors if hasattr(t, "device_mesh"))

    def state(self) -> dict[str, Tensor]:
        """The anchor's local parts by name."""
        return dict(zip(self.names, self.anchors, strict=True))

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError when names, shapes or dtypes are not those of the weights, before anything is changed."""
        missing, unexpected = sorted(set(self.names) - set(state)), sorted(set(state) - set(self.names))
        if missing or unexpected:
            raise ValueError(f"anchor of other weights: missing {missing[:3]}, unexpected {unexpected[:3]}")
        for name, anchor in zip(self.names, self.anchors, strict=True):
            got = state[name]
            if got.shape != anchor.shape or got.dtype != anchor.dtype:
                raise ValueError(
                    f"anchor of {name} is {tuple(got.shape)} {got.dtype}, here it is {tuple(anchor.shape)} "
                    f"{anchor.dtype} (saved with another number of ranks?)"
                )
        for name, anchor in zip(self.names, self.anchors, strict=True):
            anchor.copy_(state[name])

    def _sources(self) -> list[Tensor]:
        return [local(t if m is None else m) for t, m in zip(self.tensors, self.masters, strict=True)]
