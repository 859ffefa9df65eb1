"""Where A and W_t are kept: beside the parameters, in pinned host memory, or in memory-mapped safetensors files."""

import json
import math
import os
import tempfile
import weakref
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["PLACES", "allocate"]

PLACES = ("device", "host", "disk")
SAFETENSORS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def allocate(like: Mapping[str, Tensor], place: str, directory: str | os.PathLike | None = None) -> list[Tensor]:
    """Uninitialised tensors of the shapes and dtypes of `like`.

    place: "device" (the one each tensor is on), "host" (pinned where there is CUDA) or "disk": one file in `directory`
    in safetensors layout, mapped so that writing a tensor writes the file and the page cache decides what stays in
    memory; the file is removed with the last of its tensors.
    """
    if place == "device":
        return [torch.empty_like(t, requires_grad=False) for t in like.values()]
    if place == "host":
        pin = torch.cuda.is_available()
        return [torch.empty(t.shape, dtype=t.dtype, pin_memory=pin) for t in like.values()]
    return _mapped(like, directory)


def _mapped(like: Mapping[str, Tensor], directory) -> list[Tensor]:
    # Wide dtypes first: safetensors allows no gaps, and this keeps every tensor aligned to its element size.
    order = sorted(like, key=lambda name: -like[name].element_size())
    entries, end = {}, 0
    for name in order:
        start, end = end, end + like[name].numel() * like[name].element_size()
        entries[name] = {
            "dtype": SAFETENSORS[like[name].dtype],
            "shape": list(like[name].shape),
            "data_offsets": [start, end],
        }
    header = json.dumps(entries).encode()
    header += b" " * (-(len(header) + 8) % 64)
    base = 8 + len(header)
    os.makedirs(directory, exist_ok=True)
    descriptor, path = tempfile.mkstemp(prefix="effopd-", suffix=".safetensors", dir=directory)
    with os.fdopen(descriptor, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(base + end)
    storage = torch.UntypedStorage.from_file(path, shared=True, nbytes=base + end)
    weakref.finalize(storage, _remove, path)
    out = {}
    for name in order:
        dtype, shape = like[name].dtype, like[name].shape
        start = (base + entries[name]["data_offsets"][0]) // dtype.itemsize
        flat = torch.empty(0, dtype=dtype).set_(storage, start, (math.prod(shape),))
        out[name] = flat.view(shape)
    return [out[name] for name in like]


def _remove(path: str) -> None:
    if os.path.exists(path):
        os.unlink(path)
