"""Checkpoints read through transformers, for architectures whose tensors it renames or fuses as it loads them.

A folder of a mixture of experts has three matrices per expert; the model has two tensors per layer. An edit is of what
the model has, so such folders are loaded whole, and the last one stays in memory.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor
from trl.trainer.utils import create_model_from_path

from ..errors import UserError
from .adapters import Adapter
from .checkpoints import Checkpoint
from .edits import live_tensors


class LoadedCheckpoint:
    """As much of a `Checkpoint` as an `EditableModel` reads."""

    def __init__(self, path: Path, loader: "Loader"):
        self.path, self._loader = path, loader

    def pair(self, name: str, base: Tensor) -> tuple[Tensor, Tensor]:
        return self._loader.tensors(self.path)[name], base


class Loader:
    """Holds one model's tensors at a time."""

    def __init__(self, **options):
        self._path, self._tensors, self._options = None, {}, options

    def tensors(self, path: Path) -> dict[str, Tensor]:
        if path != self._path:
            self._path, self._tensors = None, {}  # before the next is loaded beside it
            model = create_model_from_path(str(path), dtype="auto", device_map="cpu", **self._options)
            self._path, self._tensors = path, {n: t.detach() for n, t in live_tensors(model).items()}
        return self._tensors


def readable(
    trajectories: Mapping[str, Sequence[Checkpoint]], base: Checkpoint, live: Mapping[str, Tensor], **options
) -> Mapping[str, Sequence[Checkpoint | LoadedCheckpoint]]:
    """The trajectories themselves where their tensors have the names that the model gives them, else loaded ones.

    Args:
        live: the model's tensors by name. options: of `from_pretrained`.

    Raises:
        UserError: a LoRA adapter whose base is renamed or fused.
    """
    if set(live) <= set(base.shapes):
        return trajectories
    loader = Loader(**options)
    for checkpoint in (c for many in trajectories.values() for c in many):
        if isinstance(checkpoint, Adapter):
            raise UserError(f"{checkpoint.path} adapts tensors that transformers fuses; merge it into its model first")
    return {name: [LoadedCheckpoint(c.path, loader) for c in many] for name, many in trajectories.items()}
