"""Checkpoints read through transformers, for architectures whose tensors it renames, fuses or turns as it loads them.

A folder of a mixture of experts has three matrices per expert; the model has two tensors per layer. An edit is of what
the model has, so such folders are loaded whole, and the last one stays in memory.
"""

from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from ..checks import FLOATS
from ..errors import UserError
from ..train.loading import load_model
from .adapters import Adapter
from .checkpoints import Checkpoint
from .edits import live_tensors
from .wording import listed


class LoadedCheckpoint:
    """As much of a `Checkpoint` as an `EditableModel` reads."""

    def __init__(self, file: Checkpoint, loader: "Loader"):
        self._file, self._loader = file, loader

    def read(self, name: str) -> Tensor:
        return self._loader.tensors(self._file)[name]

    def pair(self, name: str, base: Tensor) -> tuple[Tensor, Tensor]:
        return self.read(name), base


class Loader:
    """Holds one model's tensors at a time, in the widest dtype of its files' matrices; unrounded vectors that the files
    have in a wider one under the model's names, as the decay of a state may be."""

    def __init__(self, **options):
        self._file, self._tensors, self._options = None, {}, options

    def tensors(self, file: Checkpoint) -> dict[str, Tensor]:
        if file is not self._file:
            self._file, self._tensors = None, {}  # before the next is loaded beside it
            dtype = reduce(torch.promote_types, _matrix_dtypes(file))
            model = load_model(str(file.path), dtype=dtype, device_map="cpu", **self._options)
            self._file, self._tensors = file, {n: _unrounded(file, n, t) for n, t in live_tensors(model).items()}
        return self._tensors


def as_the_model_names_them(
    trajectories: Mapping[str, Sequence[Checkpoint]], base: Checkpoint, live: Mapping[str, Tensor], **options
) -> tuple[Mapping[str, Sequence[Checkpoint | LoadedCheckpoint]], Checkpoint | LoadedCheckpoint | None]:
    """The trajectories and the base as the model names their tensors: themselves where their names and shapes are the
    model's, else loaded. The base is None where the model holds it exactly.

    Args:
        live: the model's tensors by name. options: of `from_pretrained`.

    Raises:
        UserError: a LoRA adapter of tensors that are renamed or fused.
    """
    stored = {name: {base.shapes[name][1]} if name in base.shapes else _matrix_dtypes(base) for name in live}
    exact = all(torch.promote_types(t.dtype, dtype) == t.dtype for name, t in live.items() for dtype in stored[name])
    if all(name in base.shapes and base.shapes[name][0] == tensor.shape for name, tensor in live.items()):
        return trajectories, None if exact else base
    for checkpoint in (c for many in trajectories.values() for c in many if isinstance(c, Adapter)):
        lie = {name: checkpoint.shapes[name][0] for name in checkpoint.adapted if name in checkpoint.shapes}
        if other := [name for name, shape in lie.items() if name not in live or live[name].shape != shape]:
            raise UserError(
                f"{checkpoint.path} adapts tensors that transformers renames or fuses, {listed(other)}; merge it into "
                "its model first"
            )
    loader = Loader(**options)
    loaded = {
        name: [c if isinstance(c, Adapter) else LoadedCheckpoint(c, loader) for c in many]
        for name, many in trajectories.items()
    }
    return loaded, None if exact else LoadedCheckpoint(base, Loader(**options))  # which stays beside the other


def _unrounded(file: Checkpoint, name: str, tensor: Tensor) -> Tensor:
    shape, dtype = file.shapes.get(name, (None, tensor.dtype))
    wider = tensor.ndim < 2 and shape == tensor.shape and torch.promote_types(dtype, tensor.dtype) != tensor.dtype
    return file.read(name) if wider else tensor.detach()


def _matrix_dtypes(file: Checkpoint) -> set[torch.dtype]:
    return {dtype for shape, dtype in file.shapes.values() if dtype in FLOATS and len(shape) >= 2}
