"""In-place extrapolation on the CPU: one torch.lerp per tensor, statistics block by block while the block is in cache.

torch.lerp(A, C, α, out=W) is a single pass that computes bf16 and fp16 in fp32 and rounds once (checked bit for bit
against fp32 arithmetic and, for rounding, against fp64). It loses the sign of −0 at α = 0 and 1: the ends are copies.
"""

import torch
from torch import Tensor

from .reference import wide

BLOCK = 1 << 18  # elements: three fp32 blocks fit the second-level caches of two cores


def extrapolate_(params, anchors, currents, alphas: Tensor, masters, with_stats: bool) -> Tensor:
    """The CPU backend of `reference.extrapolate_`."""
    stats = alphas.new_empty((len(params) if with_stats else 0, 3), dtype=torch.float32)
    for i, (alpha, anchor, current, param) in enumerate(zip(alphas.tolist(), anchors, currents, params, strict=True)):
        master = masters[i] if masters else None
        if with_stats:
            stats[i] = torch.tensor(_in_blocks(param, anchor, current, alpha, master))
        else:
            _write(param, anchor, current, alpha, master)
    return stats


def _write(param, anchor, current, alpha, master) -> None:
    """The master is written first; the working copy is the master rounded."""
    if master is not None:
        _write(master, anchor, current, alpha, None)
        if master.dtype == wide(anchor, current):
            param.copy_(master)
            return
    if alpha in (0.0, 1.0):
        param.copy_(current if alpha else anchor)
    elif anchor.dtype == current.dtype == param.dtype:
        torch.lerp(anchor, current, alpha, out=param)
    else:
        dtype = wide(anchor, current)
        param.copy_(torch.lerp(anchor.to(dtype), current.to(dtype), alpha))


def _in_blocks(param, anchor, current, alpha, master) -> tuple[float, float, float]:
    """Write one tensor block by block; returns ‖current − anchor‖², ‖param‖² and the count of non-finite elements."""
    tensors = [t for t in (param, anchor, current, master) if t is not None]
    if all(t.is_contiguous() for t in tensors):
        blocks = zip(*(t.view(-1).split(BLOCK) for t in tensors), strict=True)
    else:
        blocks = [tensors]
    dtype = wide(anchor, current)
    delta_sq = weight_sq = nonfinite = 0.0
    for block in blocks:
        # δ is read before the write: param may be the very tensor that holds current.
        delta_sq += _sum_of_squares(block[2].to(dtype) - block[1].to(dtype))
        _write(*block[:3], alpha, block[3] if master is not None else None)
        square = _sum_of_squares(block[0].to(dtype))
        weight_sq += square
        if square - square != 0:  # inf or NaN in the sum: an element is not finite, or only its square
            nonfinite += (~block[0].isfinite()).sum().item()
    return delta_sq, weight_sq, nonfinite


def _sum_of_squares(x: Tensor) -> float:
    x = x.reshape(-1)
    return torch.dot(x, x).item()
