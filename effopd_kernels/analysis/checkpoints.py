"""A checkpoint on disk as the analyses see it: names, shapes, and for each tensor the pair whose difference is ΔW."""

import os
import re
import shlex
from collections import Counter
from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from torch import Tensor

from ..commands import json_object
from ..errors import UserError
from ..extrapolation.selection import plain_name
from ..tensor_files import EVERY, FileCheckpoint
from .wording import printable

# Hugging Face's checkpoint-500, and what other trainers write; an epoch is no step, bf16 or final-v3 no number of them.
_STEPS = re.compile(r"(?:^|[-_.])(?:checkpoint|ckpt|step|iter|iteration)[-_=]?(\d+)$")
_STATE_DICT = (
    'python -c "import sys, torch, safetensors.torch as s; s.save_file({{k: v.clone() for k, v in '
    'torch.load(sys.argv[1], weights_only=True).items()}}, sys.argv[2])" {file} {out}'
)
_MODEL = (
    'python -c "import sys; from transformers import AutoModelForCausalLM as M; '
    'M.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])" {folder} {converted}'
)
_CONVERSIONS = {  # what a folder may hold instead → the command
    "pytorch_model.bin": _MODEL,
    "pytorch_model-*.bin": _MODEL,
    "zero_to_fp32.py": "python {file} {folder} {converted} --safe_serialization",  # DeepSpeed's own
    "pytorch_model_fsdp_*": "accelerate merge-weights {file} {converted}",
    "*model*.bin": _STATE_DICT,  # an adapter's too
    "*model*.pt": _STATE_DICT,
    "consolidated*.pth": _STATE_DICT,
}


class Checkpoint:
    """The weights in a folder or safetensors file.

    Attributes:
        path, label: where it is, and its folder's name, of `.` too. config: its config.json, or {}.
        shapes: name → (shape, dtype), without what wrappers (DDP, compile) put into names.
        step: optimizer steps taken, from trainer_state.json or a name such as checkpoint-500; None if neither says.

    Raises:
        UserError: no such folder, no safetensors in it, a shard missing or damaged (named), two tensors of one name.
    """

    def __init__(self, path: str | Path):
        self.path, self.label = Path(path), printable(Path(os.path.abspath(path)).name or path)
        if not self.path.exists():
            raise UserError(f"{path}: no such file or folder; give a local folder, hub ids are not downloaded")
        self.config = read_json(self.path / "config.json")
        self.step = _step(self.path)
        try:
            self._file = FileCheckpoint(path)
        except (FileNotFoundError, ValueError) as error:
            raise UserError(_conversion(self.path) or str(error)) from error
        self._stored: dict[str, str] = {}
        for stored in self._file.shapes:
            if (other := self._stored.setdefault(plain_name(stored), stored)) != stored:
                raise UserError(f"{path} holds both {other} and {stored}, which name one tensor; leave one of them out")
        self.shapes = {name: self._file.shapes[stored] for name, stored in self._stored.items()}

    def read(self, name: str, rows: slice = EVERY) -> Tensor:
        """One tensor, or rows start:stop of it, in memory of its own. Raises UserError where the file has been cut
        short since it was opened.
        """
        try:
            return self._file.read(self._stored[name], rows)
        except ValueError as error:
            raise UserError(str(error)) from error

    def pair(self, name: str, base: Tensor, rows: slice = EVERY) -> tuple[Tensor, Tensor | None]:
        """(a, b) with ΔW = a − b; b None stands for zero. ``base`` is the base's tensor of that name, or rows of it."""
        return self.read(name, rows), base

    def alias(self, name: str, source: str) -> None:
        """Let ``name`` be the tensor ``source``, as tied weights are."""
        self._stored[name], self.shapes[name] = self._stored[source], self.shapes[source]

    def lengthen_names(self, others: Collection[str]) -> None:
        """Prefix every name with the first component of most ``others``, such as `transformer.`, if no name is one of
        ``others`` yet and some then are: files of a model without its head, as GPT-2's on the hub, lack that component.
        """
        if not others or not set(self.shapes).isdisjoint(others):
            return
        ((first, _),) = Counter(name.partition(".")[0] for name in others).most_common(1)
        longer = {name: f"{first}.{name}" for name in self.shapes}
        if not set(longer.values()).isdisjoint(others):
            self._stored = {longer[name]: stored for name, stored in self._stored.items()}
            self.shapes = {longer[name]: about for name, about in self.shapes.items()}


def read_json(path: Path) -> dict[str, Any]:
    """The file's object, {} where there is none. Raises UserError where it is not JSON, or no object."""
    return json_object(path) if path.is_file() else {}


def _step(path: Path) -> int | None:
    step = read_json(path / "trainer_state.json").get("global_step")
    if not (isinstance(step, int) or (isinstance(step, float) and step.is_integer())):
        found = _STEPS.search(path.resolve().name)
        step = found and found[1]
    return None if step is None or abs(int(step)) >= 2**63 else int(step)  # a time of day; tables hold 64 bits


def _conversion(path: Path) -> str | None:
    """What to do where a folder, or the file given, holds weights in another format only."""
    folder, files = (path, sorted(path.glob("*"))) if path.is_dir() else (path.parent, [path] * path.is_file())
    if any(file.suffix == ".safetensors" for file in files):
        return None
    for pattern, command in _CONVERSIONS.items():
        if file := next((file for file in files if fnmatch(file.name, pattern)), None):
            paths = dict(folder=folder, converted=f"{folder}-safetensors", file=file)
            paths["out"] = file.with_suffix(".safetensors")
            command = command.format(**{name: shlex.quote(str(where)) for name, where in paths.items()})
            return f"{folder} holds {file.name} and no safetensors; convert it first: {command}"
    return None
