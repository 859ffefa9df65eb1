"""torch.library ops of this idea, and which backend serves which device.

effopd::extrapolate_          a list of tensors in place: CUDA one Triton launch per dtype mix, CPU one C++ call
effopd::extrapolate           w0 + α·delta with gradients for all three: CUDA Triton, CPU PyTorch in cache
effopd::extrapolate_backward  its two reductions in one pass
"""

import torch
from torch import Tensor

from ..checks import wide
from ..native import TRITON
from . import cpu, reference

LIBRARY = torch.library.Library("effopd", "FRAGMENT")

LIBRARY.define(
    "extrapolate_(Tensor(a!)[] params, Tensor[] anchors, Tensor[] currents, Tensor alphas, Tensor(b!)[] masters, "
    "bool with_stats) -> Tensor"
)
LIBRARY.define("extrapolate(Tensor w0, Tensor delta, Tensor alpha) -> Tensor")
LIBRARY.define("extrapolate_backward(Tensor grad, Tensor delta, Tensor alpha) -> (Tensor, Tensor)")

LIBRARY.impl("extrapolate_", reference.extrapolate_, "CompositeExplicitAutograd")
LIBRARY.impl("extrapolate_", cpu.extrapolate_, "CPU")
LIBRARY.impl("extrapolate", reference.extrapolate_forward, "CompositeExplicitAutograd")
LIBRARY.impl("extrapolate_backward", reference.extrapolate_backward, "CompositeExplicitAutograd")
LIBRARY.impl("extrapolate", cpu.extrapolate_forward, "CPU")
LIBRARY.impl("extrapolate_backward", cpu.extrapolate_backward, "CPU")


def _triton_in_place(params, anchors, currents, alphas, masters, with_stats):
    from .triton_kernels import launch_extrapolate  # imported at first use: importing this package needs no Triton

    stats = alphas.new_empty((len(params) if with_stats else 0, 3), dtype=torch.float32)
    launch_extrapolate(params, anchors, currents, alphas, masters or None, stats if with_stats else None)
    return stats


def _triton_forward(w0, delta, alpha):
    from .triton_kernels import launch_extrapolate_forward

    run = reference.extrapolate_forward if wide(w0, delta) == torch.float64 else launch_extrapolate_forward
    return run(w0, delta, alpha)


def _triton_backward(grad, delta, alpha):
    from .triton_kernels import launch_extrapolate_backward

    run = reference.extrapolate_backward if wide(grad, delta) == torch.float64 else launch_extrapolate_backward
    return run(grad, delta, alpha)


if TRITON:
    LIBRARY.impl("extrapolate_", _triton_in_place, "CUDA")
    LIBRARY.impl("extrapolate", _triton_forward, "CUDA")
    LIBRARY.impl("extrapolate_backward", _triton_backward, "CUDA")


@torch.library.register_fake("effopd::extrapolate_", lib=LIBRARY)
def _(params, anchors, currents, alphas, masters, with_stats):
    return alphas.new_empty((len(params) if with_stats else 0, 3), dtype=torch.float32)


@torch.library.register_fake("effopd::extrapolate", lib=LIBRARY)
def _(w0, delta, alpha):
    return torch.empty_like(w0, memory_format=torch.contiguous_format)


@torch.library.register_fake("effopd::extrapolate_backward", lib=LIBRARY)
def _(grad, delta, alpha):
    return torch.empty_like(delta, memory_format=torch.contiguous_format), torch.empty_like(alpha)


def _save_for_backward(ctx, inputs, output):
    _, delta, alpha = inputs
    ctx.save_for_backward(delta, alpha)


def _backward(ctx, grad: Tensor):
    delta, alpha = ctx.saved_tensors
    grad_delta = grad_alpha = None
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        differentiated = torch.is_grad_enabled()  # a second time: by rules that PyTorch knows
        both = reference.extrapolate_backward if differentiated else torch.ops.effopd.extrapolate_backward
        grad_delta, grad_alpha = both(grad, delta, alpha)
    return grad, grad_delta, grad_alpha


torch.library.register_autograd("effopd::extrapolate", _backward, setup_context=_save_for_backward, lib=LIBRARY)
