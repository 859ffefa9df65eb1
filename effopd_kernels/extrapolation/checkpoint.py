"""A controller's state on disk: safetensors shards for the anchor, one JSON file for the scalars.

    effopd.json                              scalars, and the size and CRC-32 of every shard
    anchor-<token>-00000-of-00002.safetensors   one per rank that holds a part of its own (one in all for replicas)

Shards get a name no earlier save used, and effopd.json, renamed into place last, is what makes them count: a process
killed at any moment leaves the previous state or the new one, whole.
"""

import json
import logging
import os
import secrets
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from .distributed import Ranks

__all__ = ["CheckpointError", "check", "crc32", "load", "newest_intact", "save"]

INDEX = "effopd.json"
logger = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A saved state that is missing, truncated or altered; the message names the file."""


def save(directory: str | os.PathLike, anchor: Mapping[str, Tensor], scalars: dict, ranks: Ranks, sharded: bool):
    """Write one state; every rank calls it, and none waits for one that could not. Only rank 0 writes an anchor that is
    not sharded."""
    directory = Path(directory)
    token = ranks.gather(secrets.token_hex(4))[0]
    count = ranks.size if sharded else 1

    def write_shard() -> dict | None:
        directory.mkdir(parents=True, exist_ok=True)
        if ranks.rank >= count:
            return None
        path = directory / f"anchor-{token}-{ranks.rank:05d}-of-{count:05d}.safetensors"
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in anchor.items()}, path)
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


def load(directory: str | os.PathLike, ranks: Ranks) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """This rank's anchor and the scalars. Raises `CheckpointError` on every rank if any rank's part is not intact."""
    anchor, scalars, error = {}, {}, None
    try:
        index = _index(Path(directory))
        shards = index["shards"]
        if len(shards) not in (1, ranks.size):
            raise CheckpointError(f"{directory} was saved sharded by {len(shards)} ranks, this run has {ranks.size}")
        path = _intact(Path(directory), shards[ranks.rank if len(shards) > 1 else 0])
        anchor, scalars = load_file(path), index["scalars"]
    except (CheckpointError, OSError) as failure:
        error = str(failure)
    errors = [e for e in ranks.gather(error) if e is not None]
    if errors:
        raise CheckpointError("; ".join(dict.fromkeys(errors)))
    return anchor, scalars


def check(directory: str | os.PathLike) -> None:
    """Verify a saved state, all shards of it; `CheckpointError` names what is missing, truncated or altered."""
    for shard in _index(Path(directory))["shards"]:
        _intact(Path(directory), shard)


def newest_intact(directories: Iterable[str | os.PathLike]) -> Path | None:
    """The first of directories (newest first) that passes `check`; those that do not are named in a warning."""
    for directory in directories:
        try:
            check(directory)
        except CheckpointError as error:
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


def _intact(directory: Path, shard: dict) -> Path:
    path = directory / shard["file"]
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if path.stat().st_size != shard["bytes"]:
        raise CheckpointError(f"{path} is truncated: {path.stat().st_size} of {shard['bytes']} bytes")
    if crc32(path) != shard["crc32"]:
        raise CheckpointError(f"{path} is corrupted: its checksum is not the one saved with it")
    return path


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
