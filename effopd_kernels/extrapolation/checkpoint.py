"""A controller's state on disk: safetensors shards for the anchor, one JSON file for the scalars.

    effopd.json                              scalars, and the size and CRC-32 of every shard
    anchor-<token>-00000-of-00002.safetensors   one per rank that holds a part of its own (one in all for replicas)

Each of several shards says in its header, under "parts", name → [offset, shape of the whole tensor]: from these, any
number of ranks put together the parts that they hold, each reading no more than those.

Shards get a name no earlier save used, and effopd.json, renamed into place last, is what makes them count: a process
killed at any moment leaves the previous state or the new one, whole.
"""

import json
import logging
import os
import secrets
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .distributed import Ranks, T
from .shards import Part, check_same

INDEX = "effopd.json"
logger = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A saved state that is missing, truncated or altered; the message names the file."""


def save(
    directory: str | os.PathLike[str],
    anchor: Mapping[str, Tensor],
    scalars: dict,
    ranks: Ranks,
    parts: Mapping[str, Part] | None,
):
    """Write one state; every rank calls it, and none waits for one that could not.

    parts: what this rank's `anchor` is of the whole; None if every rank has all of it, and then only rank 0 writes.
    """
    directory = Path(directory)
    token = ranks.gather(secrets.token_hex(4))[0]
    count = 1 if parts is None else ranks.size
    header = None if parts is None else {"parts": json.dumps({n: [p.offset, p.whole] for n, p in parts.items()})}

    def write_shard() -> dict | None:
        directory.mkdir(parents=True, exist_ok=True)
        if ranks.rank >= count:
            return None
        path = directory / f"anchor-{token}-{ranks.rank:05d}-of-{count:05d}.safetensors"
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in anchor.items()}, path, header)
        _flush(path)
        return {"file": path.name, "bytes": path.stat().st_size, "crc32": crc32(path)}

    shards = [e for e in ranks.attempt(write_shard) if e is not None]

    def write_index() -> None:
        if ranks.rank != 0:
            return
        body = {"scalars": scalars, "shards": shards}
        temporary = directory / f"{INDEX}.tmp"
        temporary.write_text(json.dumps({**body, "crc32": _crc32_of_json(body)}))
        _flush(temporary)
        os.replace(temporary, directory / INDEX)
        _flush(directory)
        keep = {shard["file"] for shard in shards}
        for old in directory.glob("anchor-*.safetensors"):
            if old.name not in keep:
                old.unlink()

    ranks.attempt(write_index)  # nobody returns before the state counts


def load(
    directory: str | os.PathLike[str], ranks: Ranks, parts: Mapping[str, Part] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """This rank's part of the anchor, whoever saved it, and the scalars; every rank calls it.

    parts: name → the part that this rank holds; None for all of every tensor.

    Raises, on every rank if on any, `CheckpointError` if the state is not intact; ValueError if it is not of the
    tensors of `parts`.
    """
    directory = Path(directory)

    def verify() -> dict[str, Any]:
        index = _index(directory)
        for shard in index["shards"][ranks.rank :: ranks.size]:  # each is read once, not by all who need some of it
            _check_intact(directory, shard)
        return index

    index = _on_all(ranks, verify)
    paths = [directory / shard["file"] for shard in index["shards"]]
    return _on_all(ranks, lambda: _assemble(paths, ranks, parts)), index["scalars"]


def _on_all(ranks: Ranks, action: Callable[[], T]) -> T:
    """action(); what it raises on any rank is raised on all."""
    value = error = None
    try:
        value = action()
    except (CheckpointError, OSError, SafetensorError, ValueError) as failure:
        error = failure
    message = None if error is None else (isinstance(error, ValueError), str(error) or repr(error))
    errors = [e for e in ranks.gather(message) if e is not None]
    if errors:
        kind = ValueError if all(other_weights for other_weights, _ in errors) else CheckpointError
        raise kind("; ".join(dict.fromkeys(text for _, text in errors))) from error
    return value


def _assemble(paths: Sequence[Path], ranks: Ranks, wanted: Mapping[str, Part] | None) -> dict[str, Tensor]:
    """The wanted part of each tensor, from as few of the files as hold it."""
    nearest = ranks.rank * len(paths) // ranks.size  # this rank's own, if as many saved
    out, have = {}, {}
    for path in paths[nearest:] + paths[:nearest]:
        with torch.device("cpu"), safe_open(path, "pt") as file:  # whatever the caller's default device is
            saved = _parts(file)
            if wanted is None:
                wanted = {name: Part((0,) * len(p.whole), p.whole, p.whole) for name, p in saved.items()}
            check_same({n: p.whole for n, p in saved.items()}, {n: p.whole for n, p in wanted.items()})
            for name, want in wanted.items():
                source, box = file.get_slice(name), want.common(saved[name])
                if name not in out:
                    nothing = source[tuple(slice(0, 0) for _ in want.shape)]  # but of their dtype
                    out[name], have[name] = nothing.new_empty(tuple(want.shape)), {}
                if box is not None and box not in have[name]:  # it may be a replica
                    out[name][want.index(box)] = found = source[saved[name].index(box)]
                    have[name][box] = found.numel()
        lacking = [name for name in out if sum(have[name].values()) != out[name].numel()]
        if not lacking:
            return out
    raise CheckpointError(f"the shards of {paths[0].parent} do not make up all of {lacking[0]}")


def _parts(file) -> dict[str, Part]:
    """name → what a shard holds of it: all, unless its header says otherwise."""
    shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    noted = (file.metadata() or {}).get("parts")
    if noted is None:
        return {name: Part([0] * len(shape), shape, shape) for name, shape in shapes.items()}
    return {name: Part(offset, shapes[name], whole) for name, (offset, whole) in json.loads(noted).items()}


def check(directory: str | os.PathLike[str]) -> None:
    """Verify a saved state, all shards of it; `CheckpointError` names what is missing, truncated or altered."""
    for shard in _index(Path(directory))["shards"]:
        _check_intact(Path(directory), shard)


def newest_intact(directories: Iterable[str | os.PathLike[str]]) -> Path | None:
    """The first of directories (newest first) that passes `check`; those that do not are named in a warning. TypeError
    for what is no sequence of directories, as a single one."""
    if not isinstance(directories, Iterable) or isinstance(directories, (str, bytes)):
        raise TypeError(f"directories must be a sequence of them, newest first, got {directories!r}")
    for directory in directories:
        try:
            check(directory)
        except (CheckpointError, OSError) as error:  # OSError: no folder at all, or a disk that fails
            logger.warning("%s: trying the one before it", error)
        else:
            return Path(directory)
    return None


def _index(directory: Path) -> dict[str, Any]:
    path = directory / INDEX
    try:
        index = json.loads(path.read_text())
        body = {"scalars": index["scalars"], "shards": index["shards"]}
        intact = index["crc32"] == _crc32_of_json(body)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (ValueError, KeyError, TypeError):  # not JSON, not UTF-8, or not ours
        intact = False
    if not intact:
        raise CheckpointError(f"{path} is corrupted")
    return body


def _check_intact(directory: Path, shard: dict) -> None:
    path = directory / shard["file"]
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if path.stat().st_size != shard["bytes"]:
        raise CheckpointError(f"{path} is truncated: {path.stat().st_size} of {shard['bytes']} bytes")
    if crc32(path) != shard["crc32"]:
        raise CheckpointError(f"{path} is corrupted: its checksum is not the one saved with it")


def crc32(path: Path) -> int:
    """Of a file's content."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


def _crc32_of_json(body: dict) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _flush(path: Path) -> None:
    """Onto the disk, so that a rename never overtakes the content it makes valid."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
