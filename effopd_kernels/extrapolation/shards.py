"""What a rank holds of a tensor: the local shard of a DTensor, the tensor itself otherwise. Nothing communicates."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

PLAIN = (Tensor, nn.Parameter)  # the common case, decided without an attribute look-up that fails


def _is_dtensor(tensor: Tensor | None) -> bool:
    return type(tensor) not in PLAIN and hasattr(tensor, "placements")  # by type first: a miss takes longer


def local(tensor: Tensor) -> Tensor:
    """The memory this rank owns: a plain tensor itself, or the local shard of a DTensor (use under no_grad).

    Raises ValueError for a DTensor with pending partial sums, whose local values are not its values.
    """
    if not _is_dtensor(tensor):
        return tensor
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(f"a DTensor placed {tensor.placements} holds partial sums: redistribute it first")
    return tensor.to_local()


def placed_alike(a: Tensor, b: Tensor) -> bool:
    """Whether two DTensors have the same placements: every rank gives the same answer, where the parts that ranks hold
    may coincide on some of them alone. True where either is none."""
    return not (_is_dtensor(a) and _is_dtensor(b)) or a.placements == b.placements


class Part(NamedTuple):
    """A box of a tensor of shape `whole`: it begins at `offset` and has `shape`; each an int per dimension."""

    offset: Sequence[int]
    shape: Sequence[int]
    whole: Sequence[int]

    def common(self, other: "Part") -> tuple[tuple[int, int], ...] | None:
        """(first, end) per dimension of the whole of what both hold; None if that is nothing."""
        bounds = [[(o, o + n) for o, n in zip(p.offset, p.shape, strict=True)] for p in (self, other)]
        box = tuple((max(a, b), min(m, n)) for (a, m), (b, n) in zip(*bounds, strict=True))
        return box if all(first < end for first, end in box) else None

    def index(self, box: Sequence[tuple[int, int]]) -> tuple[slice, ...]:
        """Where in this part such a box is."""
        return tuple(slice(first - o, end - o) for (first, end), o in zip(box, self.offset, strict=True))


def part_of(tensor: Tensor) -> Part:
    """What `local(tensor)` is of the whole tensor: one box, as torch.distributed.checkpoint takes it to be."""
    shape, offset = tuple(local(tensor).shape), (0,) * tensor.dim()
    if hasattr(tensor, "placements"):
        (chunk,) = tensor.__create_chunk_list__()  # what it asks a DTensor
        offset = tuple(chunk.offsets)
    return Part(offset, shape, tuple(tensor.shape))


def check_same(saved: Mapping[str, Sequence[int]], here: Mapping[str, Sequence[int]]) -> None:
    """Raises ValueError unless both have the same names and, by name, shapes."""
    missing, unexpected = sorted(set(here) - set(saved)), sorted(set(saved) - set(here))
    if missing or unexpected:
        raise ValueError(f"anchor of other weights: missing {missing[:3]}, unexpected {unexpected[:3]}")
    for name, shape in here.items():
        if tuple(saved[name]) != tuple(shape):
            raise ValueError(f"anchor of {name} is {tuple(saved[name])}, here it is {tuple(shape)}")


def checksum(tensor: Tensor) -> tuple[torch.Size, int]:
    """The shape, and the sum of the bits as integers: in any order the same number, where the tensor is."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().flatten().view(integers)
    return tensor.shape, sum(int(part.sum(dtype=torch.int64)) for part in bits.split(1 << 24))


def replicas(tensor: Tensor, holders: int) -> float:
    """How many of the ranks that hold (some of) tensor hold the same elements; those of a plain one all do."""
    shards = 1
    if hasattr(tensor, "placements"):
        for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
            shards *= 1 if placement.is_replicate() else size  # is_shard() is False for torch's _StridedShard
    return holders / shards


def reshard(module: nn.Module | None) -> None:
    """Drop what FSDP2 gathered. After a forward without backward the root module keeps its full parameters, and would
    go on computing with them after the shards were rewritten."""
    for part in module.modules() if module is not None else ():
        if hasattr(part, "reshard") and hasattr(part, "unshard"):
            part.reshard()
