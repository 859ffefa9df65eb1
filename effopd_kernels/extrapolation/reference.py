"""Extrapolation along a weight update, by definition.

    W = A + α·(C − A)        A anchor, C current weights, α = 0 gives A and α = 1 gives C, bit for bit

α > 1 goes beyond the current weights in the direction training took (arXiv 2605.11739). Values are computed in fp32
(fp64 for fp64 tensors) and rounded once to the parameter's dtype. Shape legend: L tensors in a list.
"""

import torch
from torch import Tensor

from ..checks import wide


def extrapolate_(params, anchors, currents, alphas: Tensor, masters, with_stats: bool) -> Tensor:
    """Write anchor + α·(current − anchor) into each master (when given) and parameter; alphas (L,) fp64.

    Returns fp32 statistics (L, 3): ‖C − A‖², ‖W‖² of what was written to the parameter, and how many of its elements
    are not finite; empty (0, 3) when not with_stats.
    """
    rows = []
    for i, (param, anchor, current) in enumerate(zip(params, anchors, currents, strict=True)):
        dtype = wide(anchor, current)
        delta = current.to(dtype) - anchor.to(dtype)
        alpha = alphas[i].to(dtype)
        value = anchor.to(dtype) + alpha * delta
        # A + 0·(C − A) loses the sign of −0 and turns an infinite C into NaN: the ends are copies.
        value = torch.where(alpha == 1, current.to(dtype), torch.where(alpha == 0, anchor.to(dtype), value))
        if masters:
            masters[i].copy_(value)
        param.copy_(value)
        if with_stats:
            rows.append(torch.stack([delta.square().sum(), param.to(dtype).square().sum(), (~param.isfinite()).sum()]))
    return torch.stack(rows).float() if rows else alphas.new_empty((0, 3), dtype=torch.float32)


def extrapolate_forward(w0: Tensor, delta: Tensor, alpha: Tensor) -> Tensor:
    """w0 + α·delta in w0's dtype; w0 and delta of one shape, alpha a scalar tensor."""
    dtype = wide(w0, delta)
    return (w0.to(dtype) + alpha.to(dtype) * delta.to(dtype)).to(w0.dtype).contiguous()


def extrapolate_backward(grad: Tensor, delta: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """∂/∂delta = α·grad in delta's dtype, and ∂/∂α = Σ grad·delta in alpha's dtype (accumulated in fp32 or fp64)."""
    dtype = wide(grad, delta)
    g = grad.to(dtype)
    return (alpha.to(dtype) * g).to(delta.dtype).contiguous(), (g * delta.to(dtype)).sum().to(alpha.dtype)
