"""What the public functions share: checks before any work, the reduction's factor per row, the answer's shape.

To type checkers they return Any: whether a loss comes alone or in a pair hangs on `return_stats` (or `return_entropy`).
"""

import math
from numbers import Integral, Real

import torch
from torch import Tensor

from ..checks import below_infinity, readable, wide
from ..gradients import keepable
from ..launch import uploaded
from .autograd import DivergenceStats
from .family import Divergence, Spec

COLDEST = 1e-6  # the least temperature: logits that are divided by less may leave the kernels' range


def gathered(tensor: Tensor | None) -> Tensor | None:
    """A sharded tensor (DTensor) in full on every rank; any other as it is. Its gradient is the ranks' mean: what data
    parallelism makes of their losses, and where all computed the same loss, the gradient of that.
    """
    if not isinstance(tensor, Tensor) or not hasattr(tensor, "placements"):  # traced, it has no methods
        return tensor
    if tensor.dtype == torch.bool:  # which torch.compile gathers into integers, and ~ of those is another mask
        return gathered(tensor.byte()).bool()
    from torch.distributed.tensor import Partial, Replicate

    # By steps that torch.compile traces: in torch 2.10 it does neither `full_tensor` with placements nor hooks.
    ndim = tensor.device_mesh.ndim
    full = tensor.redistribute(placements=[Replicate()] * ndim).to_local(grad_placements=[Partial()] * ndim)
    return _MeanGradient.apply(full, tensor.device_mesh.size())


class _MeanGradient(torch.autograd.Function):
    """A tensor as it is; the sum over ranks of its gradient becomes their mean."""

    @staticmethod
    def forward(ctx, x, ranks):
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad / ctx.ranks, None


def check_positive(**numbers: float) -> None:
    """Raise TypeError for what is no constant number (a Python or NumPy one, or a real tensor of one element), and
    ValueError for one that is not above zero, or infinite.
    """
    for name, number in numbers.items():
        if isinstance(number, Tensor):
            if number.numel() != 1 or number.is_complex() or number.requires_grad:
                kind = "that requires a gradient" if number.requires_grad else f"{tuple(number.shape)} {number.dtype}"
                raise TypeError(f"{name} must be one constant real number, got a tensor {kind}")
        elif not isinstance(number, Real):
            raise TypeError(f"{name} must be a number, got {number!r}")
        if not (number > 0 and below_infinity(number)):
            raise ValueError(f"{name} must be positive and finite, got {number}")


def as_floats(**numbers: float | None) -> list[float]:
    """The numbers as floats, a softcap that is None or 0 as 0: none. Raises as `check_positive`, and ValueError for a
    temperature below COLDEST.
    """
    given = {
        name: number
        for name, number in numbers.items()
        if not (name.endswith("softcap") and (number is None or (isinstance(number, Real) and number == 0)))
    }
    check_positive(**given)
    for name, number in given.items():
        if name.endswith("temperature") and number < COLDEST:
            raise ValueError(f"{name} must be at least {COLDEST}, got {number}")
    return [float(given.get(name, 0)) for name in numbers]


def check_whole(**numbers: int | None) -> None:
    """Raise TypeError for a number that is given and has a fraction, or could; ValueError for one beyond 64 bits."""
    for name, number in numbers.items():
        if number is not None and not isinstance(number, (Integral, torch.SymInt)):
            raise TypeError(f"{name} must be an int, got {number!r}")
        if isinstance(number, Integral) and number >= 2**63:
            raise ValueError(f"{name} must be an int of 64 bits, got {number}")


def check_num_valid(mask: Tensor | None, num_valid: int | None) -> None:
    """Raise TypeError or ValueError for a promise that is given and is no number of tokens, or less than the mask keeps
    as far as that can be read.
    """
    if num_valid is None:
        return
    if mask is None:
        raise ValueError("num_valid is the number of tokens that mask keeps, got it without a mask")
    check_whole(num_valid=num_valid)
    if isinstance(num_valid, Integral) and num_valid < 0:
        raise ValueError(f"num_valid must not be negative, got {num_valid}")
    if readable(mask) and num_valid < (kept := int(mask.sum())):
        raise ValueError(f"num_valid is {num_valid} but mask keeps {kept} tokens")


def chunk_budget(chunk_bytes: int | None, device: torch.device) -> int:
    """Bytes of logits that may be alive at a time, by default more where memory is. Raises TypeError or ValueError for
    a budget that is given and no int above zero.
    """
    if chunk_bytes is None:
        return (208 if device.type == "cpu" else 1024) << 20
    check_whole(chunk_bytes=chunk_bytes)
    check_positive(chunk_bytes=chunk_bytes)
    return int(chunk_bytes)


def make_spec(
    divergence: Divergence,
    temperature: float,
    teacher_temperature: float | None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
) -> Spec:
    """The numbers of a row op. Raises as `as_floats`, and TypeError for what is no `Divergence`."""
    if not isinstance(divergence, Divergence):
        raise TypeError(f"divergence must be a Divergence such as REVERSE_KL or jsd(0.5), got {divergence!r}")
    numbers = as_floats(
        temperature=temperature,
        teacher_temperature=temperature if teacher_temperature is None else teacher_temperature,
        student_logit_scale=student_logit_scale,
        teacher_logit_scale=teacher_logit_scale,
        student_softcap=student_softcap,
        teacher_softcap=teacher_softcap,
    )
    return Spec(*map(float, (divergence.a, divergence.b, divergence.pi)), *numbers)


def check_tokens(tokens: Tensor, mask: Tensor | None, weight: Tensor | None, reduction: str, num_tokens) -> None:
    """Raise ValueError or TypeError for a mask, weight, reduction or num_tokens that does not fit tokens (..., any)."""
    shape, device = tokens.shape[:-1], tokens.device
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    if num_tokens is not None and reduction != "mean":
        raise ValueError(f'num_tokens is the normaliser of reduction="mean", got it with reduction={reduction!r}')
    if isinstance(num_tokens, Tensor) and (num_tokens.numel() != 1 or num_tokens.is_complex()):
        raise ValueError(f"num_tokens must be one number, got {tuple(num_tokens.shape)} {num_tokens.dtype}")
    if num_tokens is not None and not isinstance(num_tokens, (Tensor, Real)):
        raise TypeError(f"num_tokens must be a number, got {num_tokens!r}")
    if isinstance(num_tokens, Real) and not 0 <= num_tokens <= torch.finfo(torch.float32).max:
        raise ValueError(f"num_tokens must be finite in fp32 and not negative, got {num_tokens}")
    for name, tensor in (("mask", mask), ("weight", weight), ("num_tokens", num_tokens)):
        if isinstance(tensor, Tensor) and tensor.layout != torch.strided:
            raise TypeError(f"{name} must be dense, got layout {tensor.layout}")
    for name, tensor in (("mask", mask), ("weight", weight)):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if name == "weight" and tensor.is_complex():
            raise TypeError(f"weight must be real, got {tensor.dtype}")
        if name == "mask" and tensor.dtype != torch.bool:
            raise TypeError(f"mask must be bool with True for tokens that count, got {tensor.dtype}")
        if tensor.shape != shape:
            raise ValueError(f"{name} must have the tokens' shape {tuple(shape)}, got {tuple(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} but the tokens are on {device}")


def row_factor(
    tokens: Tensor, teacher: Tensor, mask: Tensor | None, weight: Tensor | None, reduction: str, num_tokens
) -> tuple[Tensor | None, Tensor | None]:
    """The mask (N,) and each row's factor in the loss (N,), either None where it has no effect.

    tokens (..., any) gives shape and device, and with the teacher's, if wider than fp32, the factor's dtype. Raises as
    `check_tokens`.
    """
    check_tokens(tokens, mask, weight, reduction, num_tokens)
    shape, device = tokens.shape[:-1], tokens.device
    dtype = wide(tokens, teacher)
    if mask is not None:
        mask = mask.reshape(-1)
    if weight is not None:
        weight = keepable(weight.detach().reshape(-1).to(dtype))
        weight = weight if mask is None else weight.masked_fill(~mask, 0)
    if reduction != "mean":
        return mask, weight
    if weight is None:
        weight = torch.ones(math.prod(shape), device=device, dtype=dtype) if mask is None else mask.to(dtype)
    if num_tokens is None:
        total = weight.sum()
    elif isinstance(num_tokens, Tensor):
        total = num_tokens.detach().reshape(())
        if total.device != device:  # its clone is out of the caller's reach, who may go on counting while it is copied
            total = uploaded(total.clone(), device)
    else:  # filled there: a copy would wait for the device
        total = torch.full((), float(num_tokens), dtype=dtype, device=device)
    return mask, weight / total.masked_fill(total == 0, 1)  # no tokens: a loss of 0, not 0/0


def answer(loss: Tensor, rows: Tensor, stats: Tensor, shape: torch.Size, reduction: str, return_stats: bool):
    """What a public function returns: the loss, by itself or with its `DivergenceStats`, in the tokens' shape."""
    loss = loss.reshape(shape) if reduction == "none" else loss
    if not return_stats:
        return loss
    return loss, DivergenceStats(*(s.detach().reshape(shape) for s in (rows, *stats)))
