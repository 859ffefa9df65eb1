"""The truncated SVD of every update between two checkpoints, streamed.

A reader thread fetches the next pair of matrices while others are factored: on the CPU side by side, on a GPU equal
shapes as a group, in the caller's thread, whose device and stream no other has. Of both, as many pairs as fit a limit
are held at a time.
"""

import itertools
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from ..checks import FLOATS
from ..tensor_files import FileCheckpoint
from .arguments import as_batch, check_align_to, check_pair, settings_for
from .decompose import Settings, decompose_group
from .rsvd import finished
from .types import RSVD
from .workers import side_by_side, submitted, without_autocast

HELD_BYTES = 2 << 30  # of pairs: waiting for their like on a GPU, in work on the CPU


class MappingCheckpoint:
    """Tensors already in memory, in the mapping's order."""

    def __init__(self, tensors: Mapping[str, Tensor], label: str):
        for name, tensor in tensors.items():
            if not isinstance(name, str):
                raise TypeError(f"the names of {label} must be strings, got {name!r}")
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{label}[{name!r}] must be a tensor, got {type(tensor).__name__}")
        self._tensors, self.label = tensors, label
        self.shapes = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
        self.devices = {t.device for t in tensors.values()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name].detach()


def update_svd(
    current: "Mapping[str, Tensor] | str | Path",
    anchor: "Mapping[str, Tensor] | str | Path",
    rank: int,
    *,
    include: "str | Callable[[str], bool] | None" = None,
    oversample: int | None = None,
    power_iters: int = 2,
    tol: float | None = None,
    seed: int = 0,
    align_to: Mapping[str, RSVD] | None = None,
    route: str | None = None,
    clip_rank: bool = True,
    strict: bool = True,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> dict[str, RSVD]:
    """The ``rank`` leading triplets of current[name] − anchor[name] for every matrix (two or more dimensions; leading
    ones are a batch).

    Args:
        current, anchor: W_t and W_0, in this order: mappings of names to tensors, or paths of safetensors files or
            folders, which are read one tensor at a time.
        rank, oversample, power_iters, tol, seed, route, clip_rank: as for `batched_rsvd`, with the same result bit for
            bit on CPU; small matrices are clipped by default.
        include: a regular expression to search in names, or a predicate; default every matrix.
        align_to: earlier results by name; signs follow them.
        strict: whether a matrix that only one side has is an error; otherwise it is left out.
        device: where to compute; default where the tensors are.
        progress: show a progress bar; default only on a terminal.

    Returns:
        name → `RSVD`, in the order of ``current``.

    Raises:
        ValueError: matrices missing on one side (all are listed), unequal shapes, damaged shards, a device that is not
            there: before any work is done.
        TypeError: a selected matrix is not floating, ``align_to`` no mapping. FileNotFoundError: a folder or shard that
            is not there.
    """
    device = None if device is None else _usable(device)
    sides = _opened(current, "current"), _opened(anchor, "anchor")
    if not isinstance(align_to, Mapping | None):
        raise TypeError(f"align_to must be a mapping of names to earlier results, got {type(align_to).__name__}")
    align_to = {} if align_to is None else align_to
    names = _matching_names(*sides, include, strict)
    settings: dict[str, Settings] = {}
    for name in names:
        shape = torch.Size(sides[0].shapes[name][0])
        settings[name] = settings_for(shape, rank, oversample, power_iters, tol, seed, route, clip_rank)
        check_align_to(align_to.get(name), shape, f"align_to[{name!r}]")

    from tqdm import tqdm

    found: dict[str, RSVD] = {}
    hidden = None if progress is None else not progress
    if sys.stderr is None:  # as in programs without a console
        hidden = True
    with tqdm(total=len(names), desc="update_svd", unit="matrix", disable=hidden) as bar:

        def factor(group: list[tuple[str, Tensor, Tensor]]) -> tuple[list, list[RSVD]]:
            x = [matrix for _, a, _ in group for matrix in as_batch(a)]
            y = [matrix for _, _, b in group for matrix in as_batch(b)]
            return group, _factor(x, y, settings[group[0][0]])  # of one shape, so of one rank

        groups = _groups(_pairs(*sides, names, device))
        if all(d.type == "cpu" for d in ([device] if device else sides[0].devices)):
            factored = side_by_side(factor, groups, at_once=_at_once(*sides, names))
        else:
            factored = map(torch.no_grad()(factor), groups)
        for group, svds in factored:
            parts = iter(svds)
            for name, a, _ in group:
                own = itertools.islice(parts, a.shape[:-2].numel())
                found[name] = finished(_stacked(own, a.shape[:-2]), rank, align_to.get(name))
            bar.update(len(group))
    return {name: found[name] for name in names}


def _stacked(svds: Iterable[RSVD], batch: torch.Size) -> RSVD:
    """Those of single matrices as one of a batch of that shape."""
    return RSVD(*(torch.stack(field).reshape((*batch, *field[0].shape)) for field in zip(*svds, strict=True)))


def _usable(device: torch.device | str) -> torch.device:
    """The device, "cuda" by its index. Raises ValueError for what is none, or none of this computer."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"device must be one that PyTorch can use here, got {device!r}: {reason}") from error


def _opened(source: "Mapping[str, Tensor] | str | Path", label: str) -> MappingCheckpoint | FileCheckpoint:
    """Raises FileNotFoundError or ValueError (a damaged shard, by name), TypeError for anything else than a mapping or
    a path.
    """
    if isinstance(source, Mapping):
        return MappingCheckpoint(source, label)
    if isinstance(source, str | Path):
        return FileCheckpoint(source)
    raise TypeError(
        f"{label} must be a mapping of names to tensors or the path of safetensors files, got {type(source).__name__}"
    )


def _matching_names(
    current: MappingCheckpoint | FileCheckpoint,
    anchor: MappingCheckpoint | FileCheckpoint,
    include: "str | Callable[[str], bool] | None",
    strict: bool,
) -> list[str]:
    """Names of the matrices to factor, after checking that both sides fit."""
    try:
        wanted = include if callable(include) else re.compile("" if include is None else include).search
        if not callable(include):
            wanted("")  # which is an error for a pattern of bytes
    except (re.error, TypeError) as error:
        raise ValueError(f"include must be a regular expression or a predicate, got {include!r}: {error}") from error
    mine, theirs = (
        [
            name
            for name, (shape, _) in side.shapes.items()
            if len(shape) >= 2 and shape[:-2].count(0) == 0 and wanted(name)
        ]
        for side in (current, anchor)
    )
    missing = [f"{name} (not in {anchor.label})" for name in mine if name not in anchor.shapes]
    missing += [f"{name} (not in {current.label})" for name in theirs if name not in current.shapes]
    if missing and strict:
        raise ValueError(
            f"{len(missing)} matrices are on one side only; strict=False leaves them out: {', '.join(missing)}"
        )
    names = [name for name in dict.fromkeys([*mine, *theirs]) if name in current.shapes and name in anchor.shapes]
    for name in names:
        (shape, dtype), (other_shape, other_dtype) = current.shapes[name], anchor.shapes[name]
        if shape != other_shape:
            raise ValueError(f"{name!r} is {shape} in {current.label} and {other_shape} in {anchor.label}")
        for side, kind in ((current, dtype), (anchor, other_dtype)):
            if kind not in FLOATS:
                raise TypeError(
                    f"{name!r} in {side.label} is {kind}, not bf16, fp16, fp32 or fp64; `include` can leave it out"
                )
    return names


def _pairs(current, anchor, names: list[str], device) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Read pairs one ahead of their use."""

    def read(name: str) -> tuple[str, Tensor, Tensor]:
        return name, current.read(name), anchor.read(name)

    def moved(name: str, a: Tensor, b: Tensor) -> tuple[str, Tensor, Tensor]:
        target = a.device if device is None else device
        a, b = a.to(target), b.to(target)
        check_pair(a, b, f"current[{name!r}]", f"anchor[{name!r}]")
        return name, a, b

    with ThreadPoolExecutor(1) as reader:
        ahead = None
        for name in names:
            this, ahead = ahead, submitted(reader, read, name)
            if this is not None:
                yield moved(*this.result())
        if ahead is not None:
            yield moved(*ahead.result())


def _at_once(current, anchor, names: list[str]) -> int:
    """How many pairs of the largest size fit HELD_BYTES; at least one."""
    sizes = (
        sum(math.prod(side.shapes[name][0]) * side.shapes[name][1].itemsize for side in (current, anchor))
        for name in names
    )
    return max(1, min(torch.get_num_threads(), HELD_BYTES // max([1, *sizes])))


def _groups(pairs: Iterator[tuple[str, Tensor, Tensor]]) -> Iterator[list[tuple[str, Tensor, Tensor]]]:
    """Equal shapes, dtypes and strides together; on CPU, where a group is hardly faster, one by one."""
    waiting: dict[tuple, list] = {}
    size = 0
    for pair in pairs:
        _, a, b = pair
        if a.device.type == "cpu":
            yield [pair]
            continue
        waiting.setdefault((a.shape[-2:], a.dtype, b.dtype, a.stride()[-2:], b.stride()[-2:]), []).append(pair)
        size += a.nbytes + b.nbytes
        if size > HELD_BYTES:
            yield from waiting.values()
            waiting, size = {}, 0
    yield from waiting.values()


@without_autocast
def _factor(x: list[Tensor], y: list[Tensor], settings: Settings) -> list[RSVD]:
    """One RSVD per matrix; alone on CPU, as a group elsewhere."""
    size = 1 if x[0].device.type == "cpu" else len(x)
    svds = []
    for i in range(0, len(x), size):
        svd, _ = decompose_group(x[i : i + size], y[i : i + size], settings)
        svds += [RSVD(*fields) for fields in zip(*svd, strict=True)]
    return svds
