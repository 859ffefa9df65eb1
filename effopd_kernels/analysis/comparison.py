"""A base, the checkpoints that were trained from it, and whether they fit.

Nothing but headers, and heads that a config says are tied, is read until a tensor is asked for, so everything that can
be wrong with a set of folders is found before any work.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checks import FLOATS
from ..errors import UserError
from .adapters import Adapter, is_adapter
from .checkpoints import Checkpoint
from .roles import role_of, token_embedding
from .wording import counted, listed

CHECKPOINT = ("trajectory", "checkpoint", "step", "progress")
# bitsandbytes, GPTQ and AWQ, compressed-tensors, MXFP4: their scales have names that the base does not have. Other
# methods (HQQ, quanto, torchao, AQLM) have other names, but a config that says so.
_PACKED = re.compile(r"weight(_packed)?$|_blocks$")
# What transformers once stored and now computes: rotary frequencies, causal masks and the number that masks.
_FREQUENCIES = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
_PREDICTS = re.compile(r"(^|\.)mtp(_\w+)?\.")  # further tokens: transformers does not load it, so it saves none
_MASK = re.compile(r"(^|\.)att(n|ention)\.(masked_)?bias$")


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

    def about(self, trajectory: str, position: int) -> dict[str, Any]:
        """What names a checkpoint in every table: the columns `CHECKPOINT`."""
        checkpoint, progress = self.trajectories[trajectory][position], self.progress[trajectory][position]
        return dict(zip(CHECKPOINT, (trajectory, checkpoint.label, checkpoint.step, progress), strict=True))


def compare(base: str | Path, trajectories: Mapping[str, Sequence[str | Path]]) -> Comparison:
    """Open all of them and check that they fit.

    Args:
        trajectories: name → folders; LoRA adapters stand for base + s·B·A. They are put in the order of their steps,
            or left in the order given, with a note, where one has no step.

    Raises:
        UserError: what `Checkpoint` raises; tensors missing or of other shapes (the first ten are listed); quantised
            weights; the base an adapter.
    """
    if is_adapter(base):
        raise UserError(f"--base {base} is a LoRA adapter; give the model that it was trained from")
    start = Checkpoint(base)
    opened = _opened(start, trajectories)
    notes = [note for name, checkpoints in opened.items() for note in _order(name, checkpoints)]
    every = [c for checkpoints in opened.values() for c in checkpoints]
    notes += _leave_out([start, *every], "Computed by transformers", _computed)
    notes += _leave_out([start, *every], "For further tokens, not loaded by transformers", _predicts([start, *every]))
    notes += _tie(start, every)
    for checkpoint in every:
        _check(start, checkpoint)
    names = [name for name, (shape, dtype) in start.shapes.items() if dtype in FLOATS and 0 not in shape]
    if not names:
        raise UserError(f"{start.path} has no floating tensor with entries; there is nothing to compare")
    if left := [name for name, (_, dtype) in start.shapes.items() if dtype not in FLOATS]:
        notes.append(f"Not floating, so left out: {listed(left)}.")
    if other := [name for name in names if role_of(name).type == "other"]:
        notes.append(f'No known module name, so grouped as "other": {listed(other)}.')
    return Comparison(start, opened, {name: _progress(c) for name, c in opened.items()}, names, notes)


def _opened(base: Checkpoint, trajectories: Mapping[str, Sequence[str | Path]]) -> dict[str, list[Checkpoint]]:
    """All, under the longest names that one of them has. Adapters last: they are of the base as it is then named."""
    plain = {t: [None if is_adapter(path) else Checkpoint(path) for path in paths] for t, paths in trajectories.items()}
    for other in filter(None, itertools.chain(*plain.values())):
        base.lengthen_names(other.shapes)
    opened = {
        t: [found or Adapter(path, base) for found, path in zip(plain[t], paths, strict=True)]
        for t, paths in trajectories.items()
    }
    for other in filter(None, itertools.chain(*plain.values())):
        other.lengthen_names(base.shapes)
    return opened


def _leave_out(every: Sequence[Checkpoint], what: str, chosen: Callable[[str, tuple[int, ...]], bool]) -> list[str]:
    """Drop what a file may hold or not, where not all do."""
    found = dict.fromkeys(name for c in every for name, (shape, _) in c.shapes.items() if chosen(name, shape))
    left = [name for name in found if not all(name in c.shapes for c in every)]
    for checkpoint in every:
        for name in left:
            checkpoint.shapes.pop(name, None)
    return [f"{what} and not in every file, so left out: {listed(left)}."] if left else []


def _predicts(every: Sequence[Checkpoint]) -> Callable[[str, tuple[int, ...]], bool]:
    """Whether a tensor predicts further tokens: by its name or, as DeepSeek's and GLM's, behind the last layer."""
    texts = [c.config.get("text_config") or c.config for c in every]
    layers = [text.get("num_hidden_layers") for text in texts if text.get("num_nextn_predict_layers")]
    last = max((n for n in layers if isinstance(n, int)), default=math.inf)
    return lambda name, _: bool(_PREDICTS.search(name)) or (role_of(name).layer or 0) >= last


def _computed(name: str, shape: tuple[int, ...]) -> bool:
    mask = shape == () or (len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3])
    return bool(_FREQUENCIES.search(name) or (mask and _MASK.search(name)))


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
    tied on all sides, it counts once. What a config says of a head that is stored has to be true: transformers, too,
    leaves weights that differ untied.
    """
    every = [base, *others]
    heads = dict.fromkeys(name for c in every for name in c.shapes if role_of(name).type == "head")
    dropped = []
    for head in heads:
        embeddings = [c for c in every if not isinstance(c, Adapter) and _is_embedding(c, head)]
        tied = [c for c in every if _alias_missing(c, head) or (base if isinstance(c, Adapter) else c) in embeddings]
        if len(tied) == len(every):
            dropped.append(head)
            for checkpoint in every:
                checkpoint.shapes.pop(head, None)
    return [f"Tied to the embedding, so counted once: {listed(dropped)}."] if dropped else []


def _is_embedding(checkpoint: Checkpoint, head: str) -> bool:
    """Whether the config ties a head, and it is, bit for bit, the embedding where both are stored."""
    if not (head.endswith("weight") and checkpoint.config.get("tie_word_embeddings")):  # a bias is its own
        return False
    embedding = token_embedding({name: shape for name, (shape, _) in checkpoint.shapes.items()})
    if embedding is None or head not in checkpoint.shapes:
        return True
    if checkpoint.shapes[head] != checkpoint.shapes[embedding]:
        return False
    blocks = (slice(i, i + 4096) for i in range(0, checkpoint.shapes[head][0][0], 4096))
    pairs = ([checkpoint.read(name, rows).view(torch.uint8) for name in (head, embedding)] for rows in blocks)
    return all(torch.equal(*pair) for pair in pairs)


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
                f"{here.path} lacks {counted(missing, 'tensor')} of {there.path}{why}: {listed(missing)}; checkpoints "
                "must hold the same tensors as the base"
            )
    unequal = {name: shape for name, (shape, _) in other.shapes.items() if shape != base.shapes[name][0]}
    if unequal:
        each = [f"{name} {list(shape)}, the base's {list(base.shapes[name][0])}" for name, shape in unequal.items()]
        todo = ""
        if all(role_of(n).type in ("embedding", "head") and s[1:] == base.shapes[n][0][1:] for n, s in unequal.items()):
            rows = max(shape[0] for shape in unequal.values())
            todo = f"; resize the base's vocabulary first, with resize_token_embeddings({rows})"
        elif all(len(s) > 2 and s == base.shapes[n][0][:-2] + base.shapes[n][0][:-3:-1] for n, s in unequal.items()):
            todo = "; they lie turned, as transformers saves some: load the base with it, save it again and give that"
        raise UserError(
            f"{other.path} has {counted(unequal, 'tensor')} of another shape than the base's{why}: {listed(each)}{todo}"
        )


def _check_floating(checkpoint: Checkpoint, other: Checkpoint) -> None:
    """Raise UserError where a weight is quantised: what is packed by its name or dtype, floating in the other, or a
    matrix of whole numbers in a model whose config says how it is quantised.
    """
    said = checkpoint.config.get("quantization_config") is not None
    for name, (shape, dtype) in checkpoint.shapes.items():
        floating = name in other.shapes and other.shapes[name][1] in FLOATS
        packed = "float8" in str(dtype) or _PACKED.search(name) or (said and len(shape) > 1)
        if dtype not in FLOATS and (packed or floating):
            raise UserError(f"{name} of {checkpoint.path} is quantised ({dtype}); dequantise the checkpoint first")


def _progress(checkpoints: Sequence[Checkpoint]) -> list[float]:
    steps = [c.step for c in checkpoints]
    if None in steps or len(set(steps)) < len(steps) or steps[-1] <= 0:
        steps = range(1, len(steps) + 1)
    return [step / steps[-1] for step in steps]
