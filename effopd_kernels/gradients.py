"""What gradients computed by hand share, those of the losses and of singular vectors: they have no derivative."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def keepable(tensor: Tensor | None) -> Tensor | None:
    """The tensor, or where it was made in inference mode, as a teacher's logits may have been, another on its memory: a
    graph refuses to keep the former. torch.compile cannot trace the question; there the refusal, which says what to do,
    stays.
    """
    if tensor is None or torch.compiler.is_compiling() or not tensor.is_inference():
        return tensor
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor)


def transformed(*tensors: Tensor | None) -> bool:
    """Whether a transform of torch.func is active, or one of the tensors carries a tangent of forward mode."""
    if torch._C._are_functorch_transforms_active():
        return True
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


class _DifferentiableOnce(torch.autograd.Function):
    """The identity, in a graph that refuses to be differentiated: silence would mean a second derivative of 0."""

    @staticmethod
    def forward(grad, anchor):
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad_output):
        raise RuntimeError(
            "effopd_kernels' losses and singular value decompositions are differentiable once: their gradient has no "
            "derivative of its own"
        )


def anchor_of(tensors) -> Tensor | None:
    """An empty tensor whose graph reaches every one of them without keeping any one's memory alive; None when autograd
    records nothing.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    nothing = [t[None][:0].flatten().float() for t in tensors if t is not None and t.requires_grad]
    return torch.cat(nothing) if nothing else None


def differentiable_once(grads, dependencies):
    """`grads` as backward returns them; under create_graph=True, so that differentiating them raises RuntimeError.

    dependencies: what they were computed from, the upstream gradient included, or `anchor_of` it. Through these PyTorch
    finds the way to what raises.
    """
    anchor = anchor_of(dependencies)
    if anchor is None:
        return tuple(grads)
    return tuple(g if g is None else _DifferentiableOnce.apply(g.detach(), anchor) for g in grads)
