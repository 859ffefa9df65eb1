"""The two functions users import: `extrapolate_` for a list of weights in place, `extrapolate` with gradients."""

import math
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..checks import overlaps_itself, readable
from ..gradients import transformed
from ..launch import uploaded
from . import cpu, ops, reference  # noqa: F401  (ops registers torch.ops.effopd.extrapolate*)
from .arguments import as_float, listed
from .shards import local, placed_alike

Alpha = float | Sequence[float] | Tensor
Tensors = Iterable[Tensor]
Masters = Iterable[Tensor | None] | None
ONE_OR_EACH = "a number, or one per tensor"


class ExtrapolationStats(NamedTuple):
    """Per tensor, fp32, on the parameters' device, of the local shards; reading one is what synchronises.

    Attributes:
        delta_sq: (L,) ‖current − anchor‖².
        weight_sq: (L,) ‖W‖² of the parameters as written.
        nonfinite: (L,) elements of W that are inf or NaN.
    """

    delta_sq: Tensor
    weight_sq: Tensor
    nonfinite: Tensor


@overload
def extrapolate_(
    params: Tensors, anchors: Tensors, currents: Tensors, alpha: Alpha, *,
    masters: Masters = None, stats: Literal[True] = True,
) -> ExtrapolationStats: ...  # fmt: skip
@overload
def extrapolate_(
    params: Tensors, anchors: Tensors, currents: Tensors, alpha: Alpha, *,
    masters: Masters = None, stats: bool,
) -> ExtrapolationStats | None: ...  # fmt: skip
@torch.no_grad()
def extrapolate_(
    params: Tensors,
    anchors: Tensors,
    currents: Tensors,
    alpha: Alpha,
    *,
    masters: Masters = None,
    stats: bool = True,
) -> ExtrapolationStats | None:
    """Write ``anchor + alpha * (current - anchor)`` into every parameter of a list, in place.

    Args:
        params: L floating tensors (bf16, fp16, fp32, fp64), plain or DTensor. A DTensor's local shard is written and
            nothing is communicated; anchors and currents are then DTensors placed alike, or the local shards.
            Memory that is listed twice, as tied weights are in a state_dict, is written once, as its first row says.
        anchors, currents: L tensors of the shapes and devices of params, any mix of floating dtypes. currents may
            be params themselves.
        alpha: a number, or one per tensor (sequence or (L,) tensor). 0 gives anchor and 1 current, bit for bit.
        masters: per tensor an fp32 copy that the optimizer owns, or None: written first, in the same pass.
        stats: also measure what was written, in the same pass.

    Returns:
        `ExtrapolationStats`, or None if not stats. Values are computed in fp32 and rounded once; those
        of fp64 inputs in fp64, and to a parameter of 16 bits by way of fp32.

    Raises:
        ValueError: lengths, shapes, devices or placements disagree, alpha is not finite, or a tensor cannot be written
            for the memory that its elements share with each other or with what is read. TypeError: a tensor is not
            floating, alpha not real.
    """
    params, anchors, currents = listed("params", params), listed("anchors", anchors), listed("currents", currents)
    masters = [None] * len(params) if masters is None else listed("masters", masters)
    alphas = _one_alpha_per_tensor(alpha, len(params))
    columns = [params, anchors, currents, masters]
    alike = cpu.alike(*columns)
    if not alike:
        whole, columns = columns, [[None if t is None else local(t) for t in ts] for ts in columns]
        _check(*columns)
        _check_placements(*whole)
    apart = _plainly_apart(*columns)
    if not apart:
        _check_memory(*columns)
    if alike and apart:
        out = _call(*columns, alphas, stats)
    else:
        firsts = range(len(params)) if apart else _firsts(columns[0], columns[3])
        out = _call_by_group(columns, firsts, alphas, stats)
    return ExtrapolationStats(*out.unbind(1)) if stats else None


@overload
def extrapolate(w0: Tensor, delta: Tensor, alpha: float | Tensor) -> Tensor: ...


@overload
def extrapolate(w0: Sequence[Tensor], delta: Sequence[Tensor], alpha: Alpha) -> list[Tensor]: ...


def extrapolate(w0, delta, alpha):
    """``w0 + alpha * delta``, differentiable in all three, to any order, in forward mode and under `torch.func` too.

    ∂L/∂alpha = Σ ∂L/∂W · delta

    Args:
        w0, delta: tensors of one shape, or two equally long sequences of them; any floating dtypes.
        alpha: a number or scalar tensor, or for sequences one per tensor ((L,) tensor).

    Returns:
        A tensor like w0, or a list of them; computed in fp32 (fp64 for fp64) and rounded once.

    Raises:
        ValueError: shapes, devices or lengths disagree, or a number is not finite; TypeError: a tensor is not
            floating, alpha not real.
    """
    if isinstance(w0, Tensor):
        return _extrapolate_one(w0, delta, alpha)
    w0, delta = listed("w0", w0), listed("delta", delta)
    if len(w0) != len(delta):
        raise ValueError(f"{len(w0)} tensors in w0 but {len(delta)} in delta")
    one_each = _is_one_each(alpha)
    if not isinstance(alpha, Tensor):
        alpha = list(alpha) if one_each else _number(alpha, ONE_OR_EACH)
    if one_each and len(alpha) != len(w0):
        raise ValueError(f"{len(alpha)} alphas for {len(w0)} tensors")
    return [extrapolate(w, d, alpha[i] if one_each else alpha) for i, (w, d) in enumerate(zip(w0, delta, strict=True))]


def _extrapolate_one(w0: Tensor, delta, alpha) -> Tensor:
    if not isinstance(delta, Tensor):
        raise TypeError(f"delta must be a tensor, as w0 is, got a {type(delta).__name__}")
    for name, tensor in (("w0", w0), ("delta", delta)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}: only floating tensors can be extrapolated")
    if w0.shape != delta.shape:
        raise ValueError(f"w0 has shape {tuple(w0.shape)} but delta has {tuple(delta.shape)}")
    if w0.device != delta.device:
        raise ValueError(f"w0 is on {w0.device} but delta is on {delta.device}")
    if not isinstance(alpha, Tensor):  # filled in on the device: a copy would wait for it
        number = _number(alpha, "a number or a scalar tensor")
        alpha = torch.full((), number, dtype=torch.float64, device=w0.device)
    _check_real(alpha)
    if alpha.numel() != 1:
        raise ValueError(f"alpha must be a scalar for one tensor, got shape {tuple(alpha.shape)}")
    alpha = alpha.reshape(()).to(w0.device)
    # The op has rules for a plain backward pass alone; what it is composed of has them all.
    run = reference.extrapolate_forward if transformed(w0, delta, alpha) else torch.ops.effopd.extrapolate
    return run(w0, delta, alpha)


def _is_one_each(alpha) -> bool:
    """Whether it is meant as one alpha per tensor, and not as one number (an array or tensor of no dimension is)."""
    return isinstance(alpha, Iterable) and not isinstance(alpha, (str, bytes)) and getattr(alpha, "ndim", 1) > 0


def _number(alpha, wanted: str) -> float:
    """An alpha as a finite float; TypeError says what it should have been."""
    try:
        number = as_float(alpha)
    except TypeError:
        raise TypeError(f"alpha must be {wanted}, got {alpha!r}") from None
    if not math.isfinite(number):
        raise ValueError(f"alpha must be finite, got {number}")
    return number


def _check_real(alpha: Tensor) -> None:
    if alpha.is_complex():
        raise TypeError(f"alpha must be real, got a tensor of {alpha.dtype}")


def _one_alpha_per_tensor(alpha, count: int) -> Tensor:
    """(count,) fp64; numbers are checked, a tensor on an accelerator is not (that would synchronise)."""
    if isinstance(alpha, Tensor):
        _check_real(alpha)
        if alpha.ndim > 1 or (alpha.ndim == 1 and len(alpha) != count):
            raise ValueError(f"alpha has shape {tuple(alpha.shape)} for {count} tensors: give a number or ({count},)")
        if readable(alpha) and not alpha.isfinite().all():
            raise ValueError(f"alpha must be finite, got {alpha}")
        return alpha.detach().to(torch.float64).expand(count)
    if not _is_one_each(alpha):
        return torch.full((count,), _number(alpha, ONE_OR_EACH), dtype=torch.float64, device="cpu")
    alphas = [_number(x, ONE_OR_EACH) for x in alpha]
    if len(alphas) != count:
        raise ValueError(f"{len(alphas)} alphas for {count} tensors")
    return torch.tensor(alphas, dtype=torch.float64, device="cpu")


def _call_by_group(columns, firsts: Sequence[int], alphas: Tensor, stats: bool) -> Tensor:
    """One call of the op for each device, and for rows with masters and without. firsts: by row, the first one that
    writes the same memory; the others are not written, and have its statistics."""
    params, _, _, masters = columns
    groups: dict[tuple, list[int]] = {}
    for i in sorted(set(firsts)):
        groups.setdefault((params[i].device, masters[i] is None), []).append(i)
    if any(len(rows) == len(params) for rows in groups.values()):
        return _call(*columns, alphas, stats)
    out = torch.empty((len(params), 3), dtype=torch.float32, device=params[0].device if params else "cpu")
    for rows in groups.values():
        some = torch.stack([alphas[i] for i in rows])  # a list as an index is copied to the device, which waits
        part = _call(*([column[i] for i in rows] for column in columns), some, stats)
        if stats:
            for i, row in zip(rows, part.to(out.device), strict=True):
                out[i] = row
    for i, first in enumerate(firsts):
        if first != i:
            out[i] = out[first]
    return out


def _call(params, anchors, currents, masters, alphas: Tensor, stats: bool) -> Tensor:
    masters = [] if masters[0] is None else masters
    device = params[0].device
    if device.type == "cuda" and readable(alphas) and (alphas == alphas[0]).all():
        alphas = torch.full_like(alphas, alphas[0].item(), device=device)  # a copy would wait
    alphas = uploaded(alphas, device)
    result = torch.ops.effopd.extrapolate_(params, anchors, currents, alphas, masters, stats)
    # Kernels write through addresses: autograd must hear that tensors it may have saved have changed.
    torch.autograd.graph.increment_version([t for t in (*params, *masters) if not t.is_inference()])
    return result


def _check(params, anchors, currents, masters) -> None:
    if not len(params) == len(anchors) == len(currents) == len(masters):
        raise ValueError(
            f"lists of different length: {len(params)} params, {len(anchors)} anchors, {len(currents)} currents, "
            f"{len(masters)} masters"
        )
    columns = {"params": params, "anchors": anchors, "currents": currents, "masters": masters}
    for name, tensors in columns.items():
        for i, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor) and not (tensor is None and tensors is masters):
                raise TypeError(f"{name}[{i}] must be a tensor, got {type(tensor).__name__}")
    # Thousands of tensors are compared as lists, in C; only where something differs is it looked for.
    shapes, devices = [t.shape for t in params], [t.device for t in params]
    for name, tensors in columns.items():
        if not any(t is None for t in tensors):
            alike = [t.shape for t in tensors] == shapes and [t.device for t in tensors] == devices
            kinds = {(t.dtype, t.layout) for t in tensors}
            if alike and all(dtype.is_floating_point and layout == torch.strided for dtype, layout in kinds):
                continue
        for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
            if tensor is None:
                continue
            if not tensor.is_floating_point() or tensor.layout != torch.strided:
                kind = f"{tensor.dtype}, {tensor.layout}"
                raise TypeError(f"{name}[{i}] is {kind}: only dense floating tensors can be extrapolated")
            if tensor is not param and (tensor.shape != param.shape or tensor.device != param.device):
                raise ValueError(
                    f"{name}[{i}] has shape {tuple(tensor.shape)} on {tensor.device}, params[{i}] "
                    f"{tuple(param.shape)} on {param.device} (local shards, for DTensors)"
                )


def _check_placements(params, anchors, currents, masters) -> None:
    """Raises ValueError for DTensors placed otherwise than their parameter, be their local shards of its shape."""
    for name, tensors in (("anchors", anchors), ("currents", currents), ("masters", masters)):
        for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
            if not placed_alike(tensor, param):
                raise ValueError(f"{name}[{i}] is placed {tensor.placements}, params[{i}] {param.placements}")


def _plainly_apart(params, anchors, currents, masters) -> bool:
    """Whether all lie in the usual order without gaps and no parameter is listed twice: one quick look, as most do."""
    if params and isinstance(params[0], FakeTensor):  # lies nowhere
        return True
    tensors = chain(params, anchors, currents, (m for m in masters if m is not None))
    return all(map(Tensor.is_contiguous, tensors)) and len(set(map(Tensor.data_ptr, params))) == len(params)


def _check_memory(params, anchors, currents, masters) -> None:
    """Raises ValueError for a tensor that cannot be written one element after the other."""
    for name, tensors in (("params", params), ("masters", masters)):
        for i, tensor in enumerate(tensors):
            if tensor is not None and overlaps_itself(tensor):
                raise ValueError(f"{name}[{i}] has elements that share memory, as an expanded tensor has: clone it")
    for name, tensors in (("anchors", anchors), ("currents", currents)):
        for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
            if tensor.data_ptr() == param.data_ptr() and tensor.numel() and _memory(tensor) != _memory(param):
                raise ValueError(f"{name}[{i}] is the memory of params[{i}] in another order: clone one of them")


def _memory(tensor: Tensor) -> tuple:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _firsts(params, masters) -> list[int]:
    """By row, the first one that writes the same parameter (and master)."""
    seen: dict[tuple, int] = {}
    rows = zip(params, masters, strict=True)
    return [seen.setdefault((_memory(p), None if m is None else _memory(m)), i) for i, (p, m) in enumerate(rows)]
