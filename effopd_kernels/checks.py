"""Helpers for checks of arguments, which run before any work, and the dtypes that are computed with."""

import math
import sys
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # what is computed with


def wide(*tensors: Tensor) -> torch.dtype:
    """The dtype of arithmetic on these floating tensors: fp64 if one of them is, else fp32."""
    return torch.float64 if torch.float64 in [t.dtype for t in tensors] else torch.float32


def below_infinity(number: "Real | Tensor") -> bool:
    """Whether a number is none of infinity, NaN and an integer that no float can hold."""
    return number < math.inf and not (isinstance(number, int) and number > sys.float_info.max)


def readable(tensor: Tensor) -> bool:
    """Whether it has values that a check may look at: on a GPU looking would wait for it, traced, fake and batched
    (vmap) tensors have none.
    """
    if tensor.device.type != "cpu" or torch.compiler.is_compiling() or isinstance(tensor, FakeTensor):
        return False
    return tensor.numel() > 0 and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def shown(value: Any) -> str:
    """A value in an error message: a tensor by its shape and dtype, not its entries."""
    return f"a tensor {tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else repr(value)


def is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def check_float(**tensors: Tensor) -> None:
    """Raise TypeError unless all are dense tensors of FLOATS, and ValueError unless they are on one device."""
    (first_name, first), *_ = tensors.items()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name} must be bfloat16, float16, float32 or float64, got {tensor.dtype}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be dense, got layout {tensor.layout}")
        if tensor.device != first.device:
            raise ValueError(f"{first_name} is on {first.device} but {name} is on {tensor.device}")


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether elements of it may share memory, as those of an expanded tensor do: writing one would write another."""
    strides = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    return steps_overlap(strides)


def steps_overlap(steps: Iterable[tuple[int, int]], extent: int = 1) -> bool:
    """Whether a run of ``extent`` elements, repeated by these (stride, count), the least stride first, may overlap."""
    for stride, count in steps:
        if stride < extent:
            return True
        extent += (count - 1) * stride
    return False
