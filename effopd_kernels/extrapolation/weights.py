"""Which weights an `EffOPDController` moves, and by which of two ways: as they are, or through LoRA products."""

import logging
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from ..checks import FLOATS
from . import buffers
from .adapters import refuse_curved
from .dense import DenseWeights
from .lora import LoraWeights, is_lora_name
from .masters import check_given, find_masters, given_masters, no_masters
from .selection import is_frozen, left_out, matching, named_tensors, plain_name, select
from .shards import reshard

logger = logging.getLogger(__name__)


def weights_of(params, include, exclude, optimizer, masters, place, directory) -> DenseWeights | LoraWeights:
    """What `EffOPDController` is to move; its arguments say what each of these means."""
    if place not in buffers.PLACES:
        raise ValueError(f"anchor_device must be one of {buffers.PLACES}, got {place!r}")
    if place == "disk" and directory is None:
        raise ValueError('anchor_device="disk" needs anchor_dir')
    module = params if isinstance(params, nn.Module) else None
    _refuse_fsdp1(module)
    reshard(module)
    everything = named_tensors(params)
    unfrozen = {name: t for name, t in everything.items() if not is_frozen(t)}
    chosen = select(unfrozen, include, exclude)
    _check_movable(chosen)
    if any(map(is_lora_name, chosen)):
        return _lora_weights(module, chosen)
    if module is not None:
        refuse_curved(module, chosen)
    if others := left_out(unfrozen, include, exclude):
        logger.warning(
            "%d matrices in layers do not move (%s, ...), for their names are not known as attention's or an MLP's: "
            "give include, or exclude them",
            len(others),
            others[0],
        )
    if masters is not None:
        tied = module.named_parameters(remove_duplicate=False) if module is not None else ()
        check_given(chosen, everything.keys() | {plain_name(name) for name, _ in tied}, masters)
        find = partial(given_masters, chosen, masters)
    elif optimizer is not None:
        find = partial(find_masters, chosen, optimizer)
    else:
        find = no_masters
    return DenseWeights(
        chosen,
        find,
        place,
        directory,
        module=module,
        # Named tensors that do not move are trained too, and a validation loss must not leave them its gradients.
        trained=everything.values if module is None else module.parameters,
        frozen=matching({name: t for name, t in everything.items() if is_frozen(t)}, include, exclude),
    )


def _refuse_fsdp1(module: nn.Module | None) -> None:
    for part in module.modules() if module is not None else ():
        # One rank alone has NO_SHARD, whatever was asked for.
        if hasattr(part, "_fsdp_wrapped_module") and part.sharding_strategy.name != "NO_SHARD":
            raise ValueError(
                f"the model is in FullyShardedDataParallel ({part.sharding_strategy.name}), whose ranks hold parts of "
                "flattened parameters: shard with FSDP2 (fully_shard)"
            )


def _check_movable(chosen: Mapping[str, Tensor]) -> None:
    """Raises ValueError for a tensor without values here, or of a kind that is not extrapolated."""
    for name, t in chosen.items():
        if hasattr(t, "ds_id") and t.numel() == 0:
            raise ValueError(
                f"{name} is partitioned by DeepSpeed ZeRO-3 and empty here: shard with FSDP2, or use ZeRO-1 or 2"
            )
    for name, t in chosen.items():
        if t.dtype not in FLOATS or t.is_meta or t.layout != torch.strided:
            kind = "without data (meta)" if t.is_meta else t.dtype if t.layout == torch.strided else t.layout
            raise ValueError(f"{name} is {kind}: EffOPD moves dense bf16, fp16, fp32 and fp64 parameters; exclude it")


def _lora_weights(module: nn.Module | None, chosen: Mapping[str, Tensor]) -> LoraWeights:
    if module is None:
        raise ValueError("LoRA factors cannot be extrapolated one by one: pass the PeftModel as params")
    weights = LoraWeights(module, chosen)
    if dense := [name for name in chosen if not is_lora_name(name)]:
        raise ValueError(f"{dense[0]} is trained beside LoRA adapters: exclude it, or train without LoRA")
    return weights
