"""Reading named tensors one at a time from safetensors files.

Files are read with plain reads into fresh memory, not mapped: of a mapped file every page touched counts as this
process's memory until the file is closed, and two checkpoints would never fit a small limit. A header is checked
against its file before any work.
"""

import json
import math
import mmap
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .native import native

EVERY = slice(None)
_MAPPED_FROM = 1 << 20  # bytes
_POINTER = b"version https://git-lfs"
_SHARD = re.compile(r"(.*-)(\d+)-of-(\d+)\.safetensors")
_FEW_BITS = re.compile(r"[FIU][1-8](_\w+)?")  # such as F4 and F6_E2M3, which PyTorch has no whole entries of
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}


class Entry(NamedTuple):
    """Where a tensor lies in a file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    def part(self, rows: slice) -> "Entry":
        start, stop, _ = rows.indices(self.shape[0])
        each = (self.stop - self.start) // self.shape[0]
        return self._replace(
            shape=(stop - start, *self.shape[1:]), start=self.start + start * each, stop=self.start + stop * each
        )


class _Unsupported(ValueError):
    """A file that is not damaged, but not one that is read either."""


class FileCheckpoint:
    """A safetensors file or a folder of them, of which those are read that transformers would: model.safetensors, else
    what the index names; without one, numbered shards alone, else all. Names in the order they lie on disk.
    """

    devices = frozenset({torch.device("cpu")})

    def __init__(self, path: str | Path):
        self.label = str(path)
        self._entries: dict[str, Entry] = {}
        for shard in _shards(Path(path)):
            for name, entry in _header(shard).items():
                if name in self._entries:
                    raise ValueError(f"tensor {name!r} is in both {self._entries[name].path} and {shard}")
                self._entries[name] = entry
        self.shapes = {name: (entry.shape, entry.dtype) for name, entry in self._entries.items()}

    def read(self, name: str, rows: slice = EVERY) -> Tensor:
        """The tensor, or those of its first dimension, start:stop, that are asked for."""
        entry = self._entries[name]
        if rows != EVERY:
            entry = entry.part(rows)
        raw = _pages(entry.stop - entry.start)
        view, done = memoryview(raw.numpy()), 0
        with open(entry.path, "rb", buffering=0) as file:
            file.seek(entry.start)
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise ValueError(f"{entry.path}: the file ended inside tensor {name!r}")
                done += count
        return raw.view(entry.dtype).view(entry.shape)


def _pages(size: int) -> Tensor:
    """Uninitialised bytes. Among the small blocks of several threads malloc may keep twice as much as is in use, so
    large ones are the extension's, which has the pages of the last few that were freed, or go back to the system.
    """
    if size >= _MAPPED_FROM and hasattr(native(), "fresh_bytes"):
        return torch.from_dlpack(native().fresh_bytes(size))[0]
    if size < _MAPPED_FROM or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.empty(size, dtype=torch.uint8, device="cpu")
    pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # of 2 MB: 512 times fewer faults
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


def _shards(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder")
    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
            if not all(isinstance(name, str) for name in names):
                raise TypeError("its weight_map maps to what is no file's name")
            if outside := [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]:
                raise ValueError(f"its weight_map leads out of the folder, to {outside[0]!r}")
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ValueError(f"{index}: not a safetensors index ({error})") from error
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{index} names shards that are not there: {', '.join(missing)}")
        return [path / name for name in names]
    found = sorted(file for file in path.glob("*.safetensors") if file.is_file())  # a pipe would be waited for
    if not found:
        # A run's folder, or a model's in the hub's cache, whose files are in snapshots/<commit>.
        below = sorted({str(f.parent) for depth in ("*", "*/*") for f in path.glob(f"{depth}/*.safetensors")})
        instead = f"; there are in {', '.join(below[:3])}" if below else ""
        raise FileNotFoundError(f"{path}: no *.safetensors in this folder{instead}")
    numbered = [match for file in found if (match := _SHARD.fullmatch(file.name))]
    every = {f"{m[1]}{i:0{len(m[2])}}-of-{m[3]}.safetensors" for m in numbered for i in range(1, int(m[3]) + 1)}
    if missing := sorted(every - {file.name for file in found}):
        raise FileNotFoundError(f"{path} lacks shards that the others' names count: {', '.join(missing)}")
    return [path / name for name in sorted(every)] or found  # beside shards lies what is in another format


def _header(path: Path) -> dict[str, Entry]:
    """The entries of one file by position, after checking that one follows the other from the header to the end."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                raise _Unsupported(f"{path}: a Git LFS pointer, not the file it stands for; run `git lfs pull` there")
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError(f"its header would take {length} of {size} bytes")
            header = json.loads(file.read(length))
        if not isinstance(header.pop("__metadata__", None), dict | None):
            raise ValueError("its __metadata__ is no object")
        entries = {name: _entry(path, name, about, 8 + length) for name, about in header.items()}
        entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
        end = 8 + length
        for name, entry in entries.items():
            if entry.start != end:
                raise ValueError(f"tensor {name!r} begins at byte {entry.start}, what is before it ends at {end}")
            end = entry.stop
        if end != size:
            raise ValueError(f"its tensors end at byte {end}, the file at {size}")
    except _Unsupported:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = "damaged or truncated" if path.suffix == ".safetensors" else "not a"
        raise ValueError(f"{path}: {what} safetensors file: {error}") from error
    return entries


def _entry(path: Path, name: str, about: dict, offset: int) -> Entry:
    name.encode()  # half of a surrogate pair, which JSON allows and no table takes, is a ValueError
    if about["dtype"] not in _DTYPES:
        if _FEW_BITS.fullmatch(about["dtype"]):
            raise _Unsupported(
                f"{path}: tensor {name!r} is quantised ({about['dtype']}); dequantise the checkpoint first"
            )
        raise ValueError(f"tensor {name!r} has unknown dtype {about['dtype']!r}")
    dtype, shape, offsets = _DTYPES[about["dtype"]], tuple(about["shape"]), tuple(about["data_offsets"])
    if any(type(size) is not int or not 0 <= size < 2**63 for size in (*shape, *offsets)):
        raise ValueError(f"tensor {name!r} has shape {shape} and offsets {offsets}")
    start, stop = (offset + position for position in offsets)
    expected = math.prod(shape) * dtype.itemsize
    if stop - start != expected:
        raise ValueError(f"tensor {name!r} {shape} {dtype} needs {expected} bytes, its offsets give {stop - start}")
    return Entry(path, dtype, shape, start, stop)
