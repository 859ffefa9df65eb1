"""Optimizers that step an fp32 copy of each parameter: the copy must jump too, or the next step undoes the jump.

A master is recognised by what it is, whatever its name: a wider tensor of the parameter's shape whose rounding is the
parameter, bit for bit. It is looked for where optimizers keep one: in the parameter's own state (Transformer Engine's
FusedAdam), in groups of masters beside the parameter groups (apex's) and in the latter, in the parameter's place (apex
O2 and hand-written loops). Under accelerate's mixed precision and FSDP2's `MixedPrecisionPolicy` the parameters are the
fp32 masters themselves.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from .selection import plain_name
from .shards import local, placed_alike


def unwrapped(optimizer) -> list:
    """The optimizer, or those of a list, in wrappers such as accelerate's. Raises TypeError for what is none."""
    if isinstance(optimizer, (list, tuple)) and optimizer:
        return [inner for each in optimizer for inner in unwrapped(each)]
    while not hasattr(optimizer, "param_groups") or hasattr(optimizer, "optimizer"):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            kind = f"the class {optimizer.__name__}" if isinstance(optimizer, type) else f"a {type(optimizer).__name__}"
            raise TypeError(f"optimizer must be an optimizer, with param_groups, or a list of them, got {kind}")
        optimizer = inner
    return [optimizer]


def state_owner(optimizer):
    """Whose `state` it is: of torch's ZeroRedundancyOptimizer the inner optimizer's, which steps this rank's
    parameters."""
    return getattr(optimizer, "optim", optimizer)


def no_masters() -> tuple[dict[Any, Tensor], list[Any]]:
    """As `find_masters`, where nothing is known of an optimizer."""
    return {}, []


def find_masters(named: Mapping[Any, Tensor], optimizer) -> tuple[dict[Any, Tensor], list[Any]]:
    """name → master for the parameters that have one, and the names no optimizer has anything to do with.

    If one of those moves all the same, something this function cannot read steps it (DeepSpeed's flattened partitions).
    Raises ValueError for a master in a ZeroRedundancyOptimizer: it is on one rank, and the others would not jump alike.
    """
    masters, unstepped = {}, list(named)
    for each in unwrapped(optimizer):
        found, unstepped = _masters_in(each, {name: named[name] for name in unstepped})
        masters |= found
    return masters, unstepped


def _masters_in(optimizer, named: Mapping[Any, Tensor]) -> tuple[dict[Any, Tensor], list[Any]]:
    owner = state_owner(optimizer)
    stepped = [t for group in optimizer.param_groups for t in group["params"]]
    ids = {id(t) for t in stepped}
    wider = _ByRounding(stepped)
    beside = _masters_beside_groups(owner)
    masters, unstepped = {}, []
    for name, param in named.items():
        state = owner.state.get(param, {})
        # Where several round to the parameter, as moments and masters of zeros do, a name tells.
        keys = sorted(state, key=lambda key: "master" not in str(key))
        candidates = [t for t in (beside.get(id(param)), *map(state.get, keys)) if isinstance(t, Tensor)]
        master = next((t for t in candidates if is_master(t, param)), None)
        if master is None and id(param) not in ids:
            master = wider.take_master_of(param)
        if master is not None:
            if owner is not optimizer and getattr(optimizer, "world_size", 1) > 1:
                raise ValueError(
                    f"the fp32 master of {name} is on this rank alone ({type(optimizer).__name__}), where the others "
                    "cannot move it: train fp32 parameters, or shard with FSDP2"
                )
            masters[name] = master
        elif id(param) not in ids:
            unstepped.append(name)
    return masters, unstepped


class _ByRounding:
    """Tensors by what their first and last rows round to: many small experts would be compared pair by pair."""

    def __init__(self, tensors: list[Tensor]):
        self.tensors, self.found = tensors, {}  # dtype → shape, device, rounded rows → tensors, in order

    def take_master_of(self, param: Tensor) -> Tensor | None:
        """The first that is one, and no other parameter's then: equal ones have masters of their own, in order."""
        if param.dtype not in self.found:
            of_dtype = self.found[param.dtype] = {}
            for t in self.tensors:
                if t.is_floating_point() and t.element_size() > param.element_size() and not t.is_meta:
                    of_dtype.setdefault(self._key(t, param.dtype), []).append(t)
        alike = self.found[param.dtype].get(self._key(param, param.dtype), [])
        master = next((t for t in alike if is_master(t, param)), None)
        if master is not None:
            alike[:] = [t for t in alike if t is not master]
        return master

    def _key(self, tensor: Tensor, dtype: torch.dtype) -> tuple:
        whole = torch.atleast_1d(local(tensor).detach())
        rows = torch.cat([whole[:1], whole[-1:]]).to(dtype).double() + 0.0  # −0 is 0
        return tensor.shape, tensor.device, rows.nan_to_num(torch.inf, torch.inf, -torch.inf).cpu().numpy().tobytes()


def _masters_beside_groups(optimizer) -> dict[int, Any]:
    """id of a parameter → what apex's FusedAdam keeps for it in groups of masters, in the order of its own."""
    groups = zip(optimizer.param_groups, getattr(optimizer, "param_groups_master", None) or (), strict=False)
    return {id(p): m for g, masters in groups for p, m in zip(g["params"], masters["params"], strict=False)}


def check_given(named: Mapping[str, Tensor], known: Collection[str], masters: Mapping[str, Tensor]) -> None:
    """Raises ValueError for a name that is no parameter's, for what cannot be the master of one that moves (`named`),
    and where only some of those of lower precision have one; masters of parameters that do not move may be there.
    TypeError for what is no mapping of names."""
    if not isinstance(masters, Mapping):
        raise TypeError(f"masters must be a dict of tensors by name, got a {type(masters).__name__}")
    unknown = [name for name in masters if plain_name(name) not in known]
    if unknown:
        some = ", ".join(list(named)[:3])
        raise ValueError(f"masters names {unknown[0]}, which is none of the {len(known)} parameters ({some}, ...)")
    masters = {plain_name(name): master for name, master in masters.items()}
    for name, param in named.items():
        master = masters.get(name)
        if master is None:
            if masters and param.element_size() < 4:
                raise ValueError(
                    f"masters leaves out {name}, which moves and is {param.dtype}: give the masters of all that move"
                )
        elif not (isinstance(master, Tensor) and _could_be_master(master, param)):
            raise ValueError(
                f"masters: {name} is {_described(param)}, so its master is of that shape, there, and of a wider dtype; "
                f"got {_described(master)}"
            )


def given_masters(named: Mapping[str, Tensor], masters: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """As `find_masters`, of those that move; ValueError for a tensor that is not a master of its parameter."""
    moving = {plain: master for name, master in masters.items() if (plain := plain_name(name)) in named}
    for name, master in moving.items():
        if not is_master(master, named[name]):
            raise ValueError(
                f"{name} is not its master rounded to {named[name].dtype}, bit for bit: W_t could not be restored"
            )
    return moving, []


@torch.no_grad()
def is_master(master: Tensor, param: Tensor) -> bool:
    """Whether param is master rounded, bit for bit, and master is the wider one."""
    if not _could_be_master(master, param):
        return False
    master, param = local(master), local(param)
    # most candidates are moments: one row tells them apart
    return _rounds_to(*(torch.atleast_1d(t)[:1] for t in (master, param))) and _rounds_to(master, param)


def _could_be_master(master: Tensor, param: Tensor) -> bool:
    there = master.shape == param.shape and master.device == param.device
    there = there and placed_alike(master, param) and local(master).shape == local(param).shape
    return there and master.is_floating_point() and master.element_size() > param.element_size()


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    placed = f", placed {value.placements}" if hasattr(value, "placements") else ""
    return f"{tuple(value.shape)} {value.dtype} on {value.device}{placed}"


def _rounds_to(master: Tensor, param: Tensor) -> bool:
    rounded = master.to(param.dtype)
    return torch.equal(rounded, param) or bool(((rounded == param) | (rounded.isnan() & param.isnan())).all())
