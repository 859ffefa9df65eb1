"""torch.library ops of this idea, and which backend serves which device.

effopd::extrapolate_          a list of tensors in place: CUDA one Triton launch per dtype mix, CPU torch.lerp
effopd::extrapolate           w0 + α·delta with gradients for all three: CUDA Triton, elsewhere the reference
effopd::extrapolate_backward  its two reductions in one pass
"""

import torch
from torch import Tensor

from . import cpu, reference

try:
    from . import triton_kernels
except ImportError:  # no Triton on this machine: the reference serves every device
    triton_kernels = None

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


def _extrapolate_cuda(params, anchors, currents, alphas, masters, with_stats):
    stats = alphas.new_empty((len(params) if with_stats else 0, 3), dtype=torch.float32)
    triton_kernels.launch_extrapolate(
        params, anchors, currents, alphas.float(), masters or None, stats if with_stats else None
    )
    return stats


if triton_kernels is not None:
    LIBRARY.impl("extrapolate_", _extrapolate_cuda, "CUDA")


@torch.library.register_fake("effopd::extrapolate_", lib=LIBRARY)
def _(params, anchors, currents, alphas, masters, with_stats):
    return alphas.new_empty((len(params) if with_stats else 0, 3), dtype=torch.float32)


@torch.library.register_fake("effopd::extrapolate", lib=LIBRARY)
def _(w0, delta, alpha):
    return torch.empty_like(w0)


@torch.library.register_fake("effopd::extrapolate_backward", lib=LIBRARY)
def _(grad, delta, alpha):
    return torch.empty_like(delta), torch.empty_like(alpha)


def _save_for_backward(ctx, inputs, output):
    _, delta, alpha = inputs
    ctx.save_for_backward(delta, alpha)


def _backward(ctx, grad: Tensor):
    delta, alpha = ctx.saved_tensors
    grad_delta = grad_alpha = None
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        grad_delta, grad_alpha = torch.ops.effopd.extrapolate_backward(grad, delta, alpha)
    return grad, grad_delta, grad_alpha


torch.library.register_autograd("effopd::extrapolate", _backward, setup_context=_save_for_backward, lib=LIBRARY)
