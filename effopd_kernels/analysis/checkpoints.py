"""Checkpoints on disk as the analyses see them: names, shapes, and for each tensor the pair whose difference is ΔW.

Nothing but headers is read until a tensor is asked for, so everything that can be wrong with a set of folders is found
before any work.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..extrapolation.selection import plain_name
from ..lowrank.checkpoints import open_checkpoint
from .roles import role_of, token_embedding

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
LISTED = 10  # names in an error message
# Hugging Face's checkpoint-500, and what other trainers write; an epoch is no step, bf16 or final-v3 no number of them.
_STEPS = re.compile(r"(?:^|[-_.])(?:checkpoint|ckpt|step|iter|iteration)[-_=]?(\d+)$")
# bitsandbytes, GPTQ and AWQ, compressed-tensors, MXFP4: their scales have names that the base does not have.
_PACKED = re.compile(r"weight(_packed)?$|_blocks$")
_STATE_DICT = (
    'python -c "import torch, safetensors.torch as s; '
    "s.save_file({{k: v.clone() for k, v in torch.load('{file}', weights_only=True).items()}}, '{out}')\""
)
_MODEL = (
    'python -c "from transformers import AutoModelForCausalLM as M; '
    "M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
)
_CONVERSIONS = {  # what a folder may hold instead → the command
    "pytorch_model.bin": _MODEL,
    "pytorch_model-*.bin": _MODEL,
    "zero_to_fp32.py": "python {file} {folder} {folder}-safetensors --safe_serialization",  # DeepSpeed's own
    "pytorch_model_fsdp_*": "accelerate merge-weights {file} {folder}-safetensors",
    "*model*.bin": _STATE_DICT,  # an adapter's too
    "*model*.pt": _STATE_DICT,
    "consolidated*.pth": _STATE_DICT,
}


class Checkpoint:
    """The weights in a folder or safetensors file.

    Attributes:
        path, label: where it is, and its folder's name. config: its config.json, or {}.
        shapes: name → (shape, dtype), without what wrappers (DDP, compile) put into names.
        step: optimizer steps taken, from trainer_state.json or a name such as checkpoint-500; None if neither says.

    Raises:
        UserError: no such folder, no safetensors in it, a shard missing or damaged (named).
    """

    def __init__(self, path: str | Path):
        self.path, self.label = Path(path), printable(Path(path).name or path)
        self.config = read_json(self.path / "config.json")
        self.step = _step(self.path)
        try:
            self._file = open_checkpoint(path, str(path))
        except (FileNotFoundError, ValueError) as error:
            raise UserError(_conversion(self.path) or str(error)) from error
        self._stored = {plain_name(name): name for name in self._file.shapes}
        self.shapes = {name: self._file.shapes[stored] for name, stored in self._stored.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, in fresh memory. Raises UserError where the file has been cut short since it was opened."""
        try:
            return self._file.read(self._stored[name])
        except ValueError as error:
            raise UserError(str(error)) from error

    def pair(self, name: str, base: Tensor) -> tuple[Tensor, Tensor | None]:
        """(a, b) with ΔW = a − b; b None stands for zero. ``base`` is the base's tensor of that name."""
        return self.read(name), base

    def merged(self, name: str, base: Tensor) -> Tensor:
        """The weight itself, whatever it is stored as, in the base's dtype."""
        a, b = self.pair(name, base)
        return a.to(base.dtype) if b is not None else (base.float() + a).to(base.dtype)

    def alias(self, name: str, source: str) -> None:
        """Let ``name`` be the tensor ``source``, as tied weights are."""
        self._stored[name], self.shapes[name] = self._stored[source], self.shapes[source]


@dataclass(frozen=True)
class Comparison:
    """A base, trajectories that started from it, and the tensors they share."""

    base: Checkpoint
    trajectories: Mapping[str, Sequence[Checkpoint]]  # in order of training
    progress: Mapping[str, Sequence[float]]  # of each checkpoint, 1 for the last
    names: Sequence[str]  # floating tensors, in the order they lie in the base
    notes: Sequence[str]  # what was left out, in sentences

    def checkpoints(self) -> list[tuple[str, int, Checkpoint]]:
        """(trajectory, position, checkpoint) of all."""
        return [(t, i, c) for t, many in self.trajectories.items() for i, c in enumerate(many)]


def compare(base: str | Path, trajectories: Mapping[str, Sequence[str | Path]]) -> Comparison:
    """Open all of them and check that they fit.

    Args:
        trajectories: name → folders; LoRA adapters stand for base + s·B·A. They are put in the order of their steps,
            or left in the order given, with a note, where one has no step.

    Raises:
        UserError: what `Checkpoint` raises; tensors missing or of other shapes (the first ten are listed); quantised
            weights; the base an adapter.
    """
    from .adapters import Adapter, is_adapter

    if is_adapter(base):
        raise UserError(f"--base {base} is a LoRA adapter; give the model that it was trained from")
    start = Checkpoint(base)
    opened = {
        name: [Adapter(path, start) if is_adapter(path) else Checkpoint(path) for path in paths]
        for name, paths in trajectories.items()
    }
    notes = [note for name, checkpoints in opened.items() for note in _order(name, checkpoints)]
    every = [c for checkpoints in opened.values() for c in checkpoints]
    notes += _tie(start, every)
    for checkpoint in every:
        _check(start, checkpoint)
    names = [name for name, (shape, dtype) in start.shapes.items() if dtype in FLOATS and 0 not in shape]
    if left := [name for name, (_, dtype) in start.shapes.items() if dtype not in FLOATS]:
        notes.append(f"Not floating, so left out: {listed(left)}.")
    if other := [name for name in names if role_of(name).type == "other"]:
        notes.append(f'No known module name, so grouped as "other": {listed(other)}.')
    return Comparison(start, opened, {name: _progress(c) for name, c in opened.items()}, names, notes)


def listed(names: Sequence[str]) -> str:
    """The first ten, and how many more there are."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def printable(text: str | Path) -> str:
    """With bytes of a path or argument that are no text, which no table, figure or terminal takes, as \\udcff."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def read_json(path: Path) -> dict[str, Any]:
    """The file's object, {} where there is none. Raises UserError where it is not JSON."""
    try:
        return json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error


def _order(trajectory: str, checkpoints: list[Checkpoint]) -> list[str]:
    """Put them in the order of their steps, if all are known. Returns what a reader must know of the order."""
    notes = []
    if unknown := [c.label for c in checkpoints if c.step is None]:
        if len(checkpoints) > 1:
            notes.append(
                f"The checkpoints of {trajectory} are in the order given, {checkpoints[-1].label} last: no step is "
                f"known of {listed(unknown)}."
            )
    else:
        checkpoints.sort(key=lambda c: c.step)
    count = Counter(c.path.resolve() for c in checkpoints)
    if twice := [str(path) for path, n in count.items() if n > 1]:
        notes.append(f"Given more than once in {trajectory}: {listed(twice)}.")
    return notes


def _tie(base: Checkpoint, others: Sequence[Checkpoint]) -> list[str]:
    """A head that is the embedding may be stored or not. Stored on one side only, the other side's is its embedding;
    tied on all sides, it counts once.
    """
    every = [base, *others]
    heads = dict.fromkeys(name for c in every for name in c.shapes if role_of(name).type == "head")
    dropped = []
    for head in heads:
        tied = [c for c in every if _alias_missing(c, head) or c.config.get("tie_word_embeddings")]
        if len(tied) == len(every):
            dropped.append(head)
            for checkpoint in every:
                checkpoint.shapes.pop(head, None)
    return [f"Tied to the embedding, so counted once: {listed(dropped)}."] if dropped else []


def _alias_missing(checkpoint: Checkpoint, head: str) -> bool:
    """Whether a head that is not stored could be, and now is, the embedding."""
    if (
        head in checkpoint.shapes
        or not head.endswith("weight")
        or checkpoint.config.get("tie_word_embeddings") is False
    ):
        return False
    embedding = token_embedding({name: shape for name, (shape, _) in checkpoint.shapes.items()})
    if embedding is not None:
        checkpoint.alias(head, embedding)
    return embedding is not None


def _check(base: Checkpoint, other: Checkpoint) -> None:
    """Raise UserError unless both hold the same tensors."""
    kinds = [c.config.get("model_type") for c in (base, other)]
    for checkpoint, opposite in ((base, other), (other, base)):
        _check_floating(checkpoint, opposite)
    why = (
        f" ({other.path} is a {kinds[1]}, the base a {kinds[0]})" if None not in kinds and kinds[0] != kinds[1] else ""
    )
    for here, there in ((base, other), (other, base)):
        if missing := [name for name in there.shapes if name not in here.shapes]:
            raise UserError(
                f"{len(missing)} tensors of {there.path} are not in {here.path}{why}: {listed(missing)}; checkpoints "
                "must hold the same tensors as the base"
            )
    unequal = {name: shape for name, (shape, _) in other.shapes.items() if shape != base.shapes[name][0]}
    if unequal:
        each = [f"{name} {list(shape)}, the base's {list(base.shapes[name][0])}" for name, shape in unequal.items()]
        todo = ""
        if all(role_of(n).type in ("embedding", "head") and s[1:] == base.shapes[n][0][1:] for n, s in unequal.items()):
            rows = max(shape[0] for shape in unequal.values())
            todo = f"; resize the base's vocabulary first, with resize_token_embeddings({rows})"
        raise UserError(
            f"{len(unequal)} tensors of {other.path} have other shapes than the base's{why}: {listed(each)}{todo}"
        )


def _check_floating(checkpoint: Checkpoint, other: Checkpoint) -> None:
    """Raise UserError where a weight is quantised: what is packed by its name or dtype, or floating in the other."""
    for name, (_, dtype) in checkpoint.shapes.items():
        floating = name in other.shapes and other.shapes[name][1] in FLOATS
        if dtype not in FLOATS and ("float8" in str(dtype) or _PACKED.search(name) or floating):
            raise UserError(f"{name} of {checkpoint.path} is quantised ({dtype}); dequantise the checkpoint first")


def _progress(checkpoints: Sequence[Checkpoint]) -> list[float]:
    steps = [c.step for c in checkpoints]
    if None in steps or len(set(steps)) < len(steps) or steps[-1] <= 0:
        steps = range(1, len(steps) + 1)
    return [step / steps[-1] for step in steps]


def _step(path: Path) -> int | None:
    step = read_json(path / "trainer_state.json").get("global_step")
    if isinstance(step, int):
        return step
    found = _STEPS.search(path.resolve().name)
    return int(found[1]) if found else None


def _conversion(path: Path) -> str | None:
    """What to do where a folder, or the file given, holds weights in another format only."""
    folder, files = (path, sorted(path.glob("*"))) if path.is_dir() else (path.parent, [path] * path.is_file())
    if any(file.suffix == ".safetensors" for file in files):
        return None
    for pattern, command in _CONVERSIONS.items():
        if file := next((file for file in files if fnmatch(file.name, pattern)), None):
            command = command.format(folder=folder, file=file, out=file.with_suffix(".safetensors"))
            return f"{folder} holds {file.name} and no safetensors; convert it first: {command}"
    return None
