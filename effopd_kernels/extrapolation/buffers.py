"""Where A and W_t are kept: beside the parameters, in pinned host memory, or in memory-mapped files."""

import os
import tempfile
from collections.abc import Mapping

import torch
from torch import Tensor

PLACES = ("device", "host", "disk")


@torch.inference_mode(False)  # the caller's may be on, and its tensors could not be written to outside of it
def allocate(like: Mapping[str, Tensor], place: str, directory: str | os.PathLike[str] | None = None) -> list[Tensor]:
    """Uninitialised tensors of the shapes and dtypes of `like`.

    place: "device" (the one each tensor is on), "host" (pinned where there is CUDA) or "disk": one file in `directory`,
    mapped so that writing a tensor writes the file and the page cache decides what stays in memory. The file has no
    name, so that it goes with the last of its tensors, however the process ends.
    """
    if place == "device":
        return [torch.empty_like(t, requires_grad=False) for t in like.values()]
    if place == "host":
        pin = torch.cuda.is_available()
        return [torch.empty(t.shape, dtype=t.dtype, device="cpu", pin_memory=pin) for t in like.values()]
    return _mapped(like, directory)


def _mapped(like: Mapping[str, Tensor], directory) -> list[Tensor]:
    # Wide dtypes first: this keeps every tensor aligned to its element size.
    order = sorted(like, key=lambda name: -like[name].element_size())
    starts, size = {}, 0
    for name in order:
        starts[name], size = size // like[name].element_size(), size + like[name].nbytes
    os.makedirs(directory, exist_ok=True)
    descriptor, path = tempfile.mkstemp(prefix="effopd-", dir=directory)
    try:
        if hasattr(os, "posix_fallocate"):  # a full disk is an error now, not a bus error while writing
            os.posix_fallocate(descriptor, 0, max(size, 1))
        storage = torch.UntypedStorage.from_file(path, shared=True, nbytes=max(size, 1))
    finally:
        os.close(descriptor)
        os.unlink(path)
    return [
        torch.empty(0, dtype=t.dtype, device="cpu").set_(storage, starts[name], (t.numel(),)).view(t.shape)
        for name, t in like.items()
    ]
