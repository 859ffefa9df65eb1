"""What a jump does to an optimizer's state: nothing ("keep", as published), or its next step starts afresh ("reset").

Moments keep their use after a jump along the update. A copy of the weights would undo it: the copy stays where it was,
and a schedule-free optimizer goes on averaging it into the weights.
"""

import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .masters import find_masters, is_master, state_owner, unwrapped
from .shards import local


def check_policy(policy: str, optimizer) -> None:
    """Raises ValueError for a policy that is none, "reset" without an optimizer, and "keep" for a schedule-free one,
    which steps a second copy of the weights and averages it into them: steps after a jump would take it back. TypeError
    for what is no optimizer."""
    if policy not in ("keep", "reset"):
        raise ValueError(f'optimizer_policy must be "keep" or "reset", got {policy!r}')
    if policy == "reset" and optimizer is None:
        raise ValueError('optimizer_policy="reset" needs optimizer')
    for each in unwrapped(optimizer) if optimizer is not None else ():
        if policy == "keep" and "ScheduleFree" in type(each).__name__:
            raise ValueError(
                f"{type(each).__name__} keeps a copy of the weights that does not jump, and would undo jumps: use "
                'optimizer_policy="reset"'
            )


@torch.no_grad()
def copy_of_weights(params: list[Tensor], optimizer) -> str | None:
    """Where an optimizer keeps what is nearly a parameter and no master of it, by its class and the key; None where it
    does not. Moments are nothing like the weights, so a few rows of the first parameter with a state tell.
    """
    for each in unwrapped(optimizer):
        states = getattr(state_owner(each), "state", {})
        stepped = ((p, s) for p in params if isinstance(s := states.get(p), Mapping) and s)
        param, state = next(((p, s) for p, s in stepped if (_some_rows(p) != 0).any()), (None, {}))
        for key, value in state.items():
            if isinstance(each, torch.optim.ASGD) or not _comparable(value, param) or is_master(value, param):
                continue  # ASGD's average is read by nobody but its user
            weight, other = _some_rows(param), _some_rows(value)
            if (other - weight).norm() < 0.1 * weight.norm():
                return f"{type(each).__name__}'s {key!r}"
    return None


def _comparable(value: Any, param: Tensor) -> bool:
    alike = isinstance(value, Tensor) and (value.shape, value.device) == (param.shape, param.device)
    return alike and value.is_floating_point() and value.layout == torch.strided and not value.is_meta


def _some_rows(tensor: Tensor) -> Tensor:
    return torch.atleast_1d(local(tensor).detach())[:16].float()


def reset_before_next_step(optimizer, reset: Callable[[], None]) -> None:
    """Have the optimizer call `reset` before each of its steps, for as long as the object whose method it is lives.

    What stays then is a hook that does nothing: the object may be collected while a step goes through the hooks, and
    to remove one there would make the step raise.

    Raises TypeError for an optimizer that is not one of torch's, which has no such hook.
    """
    optimizers, method = unwrapped(optimizer), weakref.WeakMethod(reset)
    for each in optimizers:
        if not isinstance(each, torch.optim.Optimizer):
            raise TypeError(f'optimizer_policy="reset" needs a torch.optim.Optimizer, not a {type(each).__name__}')
    for each in optimizers:
        each.register_step_pre_hook(lambda *_: (alive := method()) and alive())


@torch.no_grad()
def reset_state(params: list[Tensor], optimizer) -> None:
    """Let the optimizer start afresh with these parameters: it forgets moments and step counts, not fp32 masters. LBFGS
    has one memory of all its parameters, and forgets that.

    What a parameter starts from is the optimizer's own business (zeros, the learning rate, tables that parameters
    share), so it is given the chance to make it. A step count in a parameter group goes on: others share it.
    """
    for each in unwrapped(optimizer):
        if isinstance(each, torch.optim.LBFGS):
            named, own = dict(enumerate(params)), {id(p) for group in each.param_groups for p in group["params"]}
            masters, _ = find_masters(named, each)
            if masters or any(id(p) in own for p in params):
                each.state.clear()
        else:
            _reset_states(params, state_owner(each))


def _reset_states(params: list[Tensor], optimizer) -> None:
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    masters, _ = find_masters(dict(enumerate(params)), optimizer)
    for i, param in enumerate(params):
        master = masters.get(i)
        for key in (param, master):
            state = optimizer.state.get(key)
            if not state:
                continue
            if any(value is master for value in state.values()):
                # Without this entry the optimizer would make another master, from the rounded parameter.
                _zero(state, master)
            else:
                del optimizer.state[key]
                optimizer.state.update(_state_from_construction(optimizer, groups.get(id(key), {}), key))


def _zero(state: dict | list, master: Tensor) -> None:
    """Tensors but master, and counts, however deep."""
    for key, value in state.items() if isinstance(state, dict) else enumerate(state):
        if isinstance(value, Tensor) and value is not master:
            value.zero_()
        elif isinstance(value, (dict, list)):
            _zero(value, master)
        elif type(value) is int:
            state[key] = 0


def _state_from_construction(optimizer, group: Mapping[str, Any], param: Tensor) -> dict[Tensor, dict[str, Any]]:
    """{param: state} for an optimizer that makes states when it is constructed, as Adagrad does, and {} for the many
    that make them at the first step."""
    known = inspect.signature(type(optimizer).__init__).parameters
    options = {k: v for k, v in {**optimizer.defaults, **group}.items() if k in known and k != "params"}
    stand_in = torch.empty_like(param, requires_grad=True)
    try:
        made = type(optimizer)([stand_in], **options).state
    except Exception:  # it cannot be constructed like torch's, and then it will not expect a state that it has not made
        return {}
    return {param: made[stand_in]} if stand_in in made else {}
