"""What a rank holds of a tensor: the local shard of a DTensor, the tensor itself otherwise. Nothing communicates."""

from torch import Tensor, nn

__all__ = ["local", "replicas", "reshard"]

PLAIN = (Tensor, nn.Parameter)  # the common case, decided without an attribute look-up that fails


def local(tensor: Tensor) -> Tensor:
    """The memory this rank owns: a plain tensor itself, or the local shard of a DTensor (use under no_grad).

    Raises ValueError for a DTensor with pending partial sums, whose local values are not its values.
    """
    if type(tensor) in PLAIN or not hasattr(tensor, "placements"):
        return tensor
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(f"a DTensor placed {tensor.placements} holds partial sums: redistribute it first")
    return tensor.to_local()


def replicas(tensor: Tensor, world_size: int) -> float:
    """How many ranks of world_size hold the same elements; a plain tensor is taken to be replicated on all."""
    shards = 1
    if hasattr(tensor, "placements"):
        for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
            shards *= size if placement.is_shard() else 1
    return world_size / shards


def reshard(module: nn.Module | None) -> None:
    """Drop what FSDP2 gathered. After a forward without backward the root module keeps its full parameters, and would
    go on computing with them after the shards were rewritten."""
    for part in module.modules() if module is not None else ():
        if hasattr(part, "reshard") and hasattr(part, "unshard"):
            part.reshard()
