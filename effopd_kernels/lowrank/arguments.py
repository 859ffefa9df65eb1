"""What the public functions share: checks before any work, and what was asked for as `Settings`."""

import torch
from torch import Tensor

from ..checks import FLOATS, below_infinity, is_integer, is_number, shown
from . import routes
from .decompose import Settings
from .types import RSVD


def as_batch(a: Tensor) -> Tensor:
    """(..., m, n) as (B, m, n)."""
    return a.reshape(a.shape[:-2].numel(), *a.shape[-2:])


def check_pair(a: Tensor, base: Tensor | None, name: str = "a", base_name: str = "base") -> None:
    """Raise for anything that is not one floating matrix (or a batch), or two of one shape, on one device."""
    given = {name: a} if base is None else {name: a, base_name: base}
    for label, tensor in given.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS:
            found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{label} must be a tensor of bf16, fp16, fp32 or fp64, got {found}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{label} must be dense, got layout {tensor.layout}")
        if tensor.ndim < 2:
            raise ValueError(
                f"{label} must be a matrix or a batch of matrices (..., m, n), not of shape {tuple(tensor.shape)}"
            )
    if base is None:
        return
    if a.shape != base.shape:
        raise ValueError(f"{name} {tuple(a.shape)} and {base_name} {tuple(base.shape)} must have one shape")
    if a.device != base.device:
        raise ValueError(f"{name} is on {a.device} and {base_name} on {base.device}; both must be on one device")


def check_align_to(align_to: "RSVD | Tensor | None", shape: torch.Size, name: str = "align_to") -> None:
    """Raise for what is neither None nor an earlier result of (a batch of) matrices (..., m, n)."""
    previous = align_to.U if isinstance(align_to, RSVD) else align_to
    if previous is None:
        return
    if not isinstance(previous, Tensor) or previous.dtype not in FLOATS:
        found = previous.dtype if isinstance(previous, Tensor) else type(previous).__name__
        raise TypeError(f"{name} must be an RSVD or its U, got {found}")
    if previous.shape[:-1] != shape[:-1]:
        raise ValueError(f"{name} has U of shape {tuple(previous.shape)}; it must be {(*shape[:-1], 'k')}")


def settings_for(shape: torch.Size, rank, oversample, power_iters, tol, seed, route, clip_rank) -> Settings:
    """What was asked for of matrices (..., m, n), with the rank there is. Raises for options out of range."""
    m, n = shape[-2:]
    for name, value in (
        ("rank", rank),
        ("oversample", 0 if oversample is None else oversample),
        ("power_iters", power_iters),
    ):
        if not is_integer(value) or value < 0:
            raise ValueError(f"{name} must be an integer ≥ 0, got {shown(value)}")
    if rank > min(m, n) and not clip_rank:
        raise ValueError(
            f"rank {rank} exceeds min(m, n) = {min(m, n)} of a {m} × {n} matrix; clip_rank=True takes that instead"
        )
    if tol is not None and not (is_number(tol) and tol > 0 and below_infinity(tol)):
        raise ValueError(f"tol must be a finite number > 0 or None, got {shown(tol)}")
    check_seed(seed)
    if route not in (None, *routes.ROUTES):
        raise ValueError(f"route must be one of {', '.join(routes.ROUTES)} or None, got {shown(route)}")
    return Settings(
        rank=int(min(rank, m, n)),
        oversample=None if oversample is None else int(oversample),
        power_iters=int(power_iters),
        tol=None if tol is None else float(tol),
        seed=int(seed),
        route=route,
    )


def check_seed(seed: int) -> None:
    if not is_integer(seed):
        raise TypeError(f"seed must be an integer, got {shown(seed)}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must be an integer of 64 bits, got {seed}")
