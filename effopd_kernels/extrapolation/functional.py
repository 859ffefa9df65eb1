"""The two functions users import: `extrapolate_` for a list of weights in place, `extrapolate` with gradients."""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..checks import readable
from . import cpu, ops, reference  # noqa: F401  (ops registers torch.ops.effopd.extrapolate*)
from .shards import local

Alpha = float | Sequence[float] | Tensor
Tensors = Iterable[Tensor]
Masters = Iterable[Tensor | None] | None


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
        anchors, currents: L tensors of the shapes and devices of params, any mix of floating dtypes. currents may
            be params themselves.
        alpha: a number, or one per tensor (sequence or (L,) tensor). 0 gives anchor and 1 current, bit for bit.
        masters: per tensor an fp32 copy that the optimizer owns, or None: written first, in the same pass.
        stats: also measure what was written, in the same pass.

    Returns:
        `ExtrapolationStats`, or None if not stats. Values are computed in fp32 and rounded once; those
        of fp64 inputs in fp64, and to a parameter of 16 bits by way of fp32.

    Raises:
        ValueError: lengths, shapes, devices or placements disagree; TypeError: a tensor is not floating.
    """
    params, anchors, currents = _listed("params", params), _listed("anchors", anchors), _listed("currents", currents)
    masters = [None] * len(params) if masters is None else _listed("masters", masters)
    alphas = _one_alpha_per_tensor(alpha, len(params))
    columns = [params, anchors, currents, masters]
    groups = [range(len(params))]
    if not cpu.alike(*columns):
        columns = [[None if t is None else local(t) for t in ts] for ts in columns]
        _check(*columns)
        groups = _groups(columns[0], masters)
    if len(groups) == 1:
        out = _call(*columns, alphas, stats)
    else:
        device = columns[0][0].device if params else "cpu"
        out = torch.empty((len(params), 3), dtype=torch.float32, device=device)
        for index in groups:
            some = torch.stack([alphas[i] for i in index])  # a list as an index is copied to the device, which waits
            part = _call(*([column[i] for i in index] for column in columns), some, stats)
            if stats:
                for i, row in zip(index, part.to(out.device), strict=True):
                    out[i] = row
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
        ValueError: shapes or lengths disagree; TypeError: a tensor is not floating.
    """
    if isinstance(w0, Tensor):
        if not isinstance(delta, Tensor):
            raise TypeError(f"delta must be a tensor, as w0 is, got a {type(delta).__name__}")
        for name, tensor in (("w0", w0), ("delta", delta)):
            if not tensor.is_floating_point():
                raise TypeError(f"{name} is {tensor.dtype}: only floating tensors can be extrapolated")
        if w0.shape != delta.shape:
            raise ValueError(f"w0 has shape {tuple(w0.shape)} but delta has {tuple(delta.shape)}")
        if not isinstance(alpha, Tensor):  # filled in on the device: a copy would wait for it
            if not hasattr(alpha, "__float__"):  # which text has not
                raise TypeError(f"alpha must be a number or a scalar tensor, got {alpha!r}")
            alpha = torch.full((), float(alpha), dtype=torch.float64, device=w0.device)
        if alpha.numel() != 1:
            raise ValueError(f"alpha must be a scalar for one tensor, got shape {tuple(alpha.shape)}")
        alpha = alpha.reshape(()).to(w0.device)
        # The op has rules for a plain backward pass alone; what it is composed of has them all.
        transformed = torch._C._are_functorch_transforms_active() or any(map(_is_dual, (w0, delta, alpha)))
        run = reference.extrapolate_forward if transformed else torch.ops.effopd.extrapolate
        return run(w0, delta, alpha)
    w0, delta = _listed("w0", w0), _listed("delta", delta)
    if len(w0) != len(delta):
        raise ValueError(f"{len(w0)} tensors in w0 but {len(delta)} in delta")
    one_each = not isinstance(alpha, Real) and not (isinstance(alpha, Tensor) and alpha.ndim == 0)
    if one_each and not isinstance(alpha, Tensor):
        alpha = _numbers(alpha)
    if one_each and len(alpha) != len(w0):
        raise ValueError(f"{len(alpha)} alphas for {len(w0)} tensors")
    return [extrapolate(w, d, alpha[i] if one_each else alpha) for i, (w, d) in enumerate(zip(w0, delta, strict=True))]


def _is_dual(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None


def _listed(name: str, tensors) -> list:
    """The argument as a list; TypeError unless it is a sequence. Whether it holds tensors is checked later."""
    if not isinstance(tensors, Iterable) or isinstance(tensors, (str, Mapping)):
        raise TypeError(f"{name} must be a sequence of tensors, got a {type(tensors).__name__}")
    return list(tensors)


def _numbers(alpha) -> list:
    """alpha, where it is no tensor and not one number, as one per tensor."""
    if not isinstance(alpha, Iterable) or isinstance(alpha, str):
        raise TypeError(f"alpha must be a number, or one per tensor, got {alpha!r}")
    return list(alpha)


def _one_alpha_per_tensor(alpha, count: int) -> Tensor:
    """(count,) fp64; numbers are checked, a tensor on an accelerator is not (that would synchronise)."""
    if isinstance(alpha, Tensor):
        if alpha.ndim > 1 or (alpha.ndim == 1 and len(alpha) != count):
            raise ValueError(f"alpha has shape {tuple(alpha.shape)} for {count} tensors: give a number or ({count},)")
        if readable(alpha) and not alpha.isfinite().all():
            raise ValueError(f"alpha must be finite, got {alpha}")
        return alpha.detach().to(torch.float64).expand(count)
    if isinstance(alpha, Real):
        alphas = torch.full((count,), float(alpha), dtype=torch.float64, device="cpu")
    else:
        alphas = torch.tensor([float(x) for x in _numbers(alpha)], dtype=torch.float64, device="cpu")
    if len(alphas) != count:
        raise ValueError(f"{len(alphas)} alphas for {count} tensors")
    if not alphas.isfinite().all():
        raise ValueError(f"alpha must be finite, got {alpha}")
    return alphas


def _call(params, anchors, currents, masters, alphas: Tensor, stats: bool) -> Tensor:
    masters = [] if masters[0] is None else masters
    alphas = alphas.to(params[0].device, non_blocking=True)
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


def _groups(params, masters) -> list[list[int]]:
    """Indices that one op call can serve: one device, all with masters or all without."""
    groups: dict[tuple, list[int]] = {}
    for i, (param, master) in enumerate(zip(params, masters, strict=True)):
        groups.setdefault((param.device, master is None), []).append(i)
    return list(groups.values())
