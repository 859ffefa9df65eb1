"""What a rank holds of a tensor: the local shard of a DTensor, the tensor itself otherwise. Nothing communicates."""

from torch import Tensor

__all__ = ["copies", "local"]


def local(tensor: Tensor) -> Tensor:
    """The memory this rank owns, detached: a view of a plain tensor, or the local shard of a DTensor.

    Raises ValueError for a DTensor with pending partial sums, whose local values are not its values.
    """
    if not hasattr(tensor, "placements"):
        return tensor.detach()
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(f"a DTensor placed {tensor.placements} holds partial sums: redistribute it first")
    return tensor.detach().to_local()


def copies(tensor: Tensor, world_size: int) -> float:
    """How many ranks of world_size hold the same elements; a plain tensor is taken to be replicated on all."""
    if not hasattr(tensor, "placements"):
        return float(world_size)
    shards = 1
    for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
        shards *= size if placement.is_shard() else 1
    return world_size / shards
