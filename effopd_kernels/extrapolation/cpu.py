"""In-place extrapolation on the CPU: one call of the C++ kernel for all contiguous tensors of the usual dtypes, and
torch.lerp for the others, with statistics block by block while the block is in cache.

torch.lerp(A, C, α, out=W) is a single pass that computes bf16 and fp16 in fp32 and rounds once (checked bit for bit
against fp32 arithmetic and, for rounding, against fp64). It loses the sign of −0 at α = 0 and 1: the ends are copies.
"""

import torch
from torch import Tensor

from ..native import DTYPES, native
from .reference import wide

BLOCK = 1 << 18  # elements: three fp32 blocks fit the second-level caches of two cores


def extrapolate_(params, anchors, currents, alphas: Tensor, masters, with_stats: bool, instruction_set=-1) -> Tensor:
    """The CPU backend of `reference.extrapolate_`. instruction_set: the kernel's, −1 the best; None for torch.lerp."""
    stats = alphas.new_empty((len(params) if with_stats else 0, 3), dtype=torch.float32)
    lists = [params, anchors, currents, *([masters] if masters else [])]
    if instruction_set is None or native() is None:
        fits = [False] * len(params)
    elif all({t.dtype for t in column} <= DTYPES.keys() and all(t.is_contiguous() for t in column) for column in lists):
        _cpp(*lists, alphas=alphas, stats=stats, instruction_set=instruction_set)
        return stats
    else:
        fits = [all(t.dtype in DTYPES and t.is_contiguous() for t in row) for row in zip(*lists, strict=True)]
    if any(fits):
        chosen = ([t for t, fit in zip(column, fits, strict=True) if fit] for column in lists)
        where = torch.tensor(fits, device="cpu")
        some = stats.new_empty((sum(fits) if with_stats else 0, 3))
        _cpp(*chosen, alphas=alphas[where], stats=some, instruction_set=instruction_set)
        if with_stats:
            stats[where] = some
    for i, (alpha, anchor, current, param) in enumerate(zip(alphas.tolist(), anchors, currents, params, strict=True)):
        if fits[i]:
            continue
        master = masters[i] if masters else None
        if with_stats:
            stats[i] = stats.new_tensor(_in_blocks(param, anchor, current, alpha, master))
        else:
            _write(param, anchor, current, alpha, master)
    return stats


def _cpp(params, anchors, currents, masters=(), *, alphas: Tensor, stats: Tensor, instruction_set: int) -> None:
    columns = (params, anchors, currents, *([masters] if masters else []))
    codes = [[DTYPES[t.dtype] << 2 * k for t in column] for k, column in enumerate(columns)]
    dtypes = list(map(sum, zip(*codes, strict=True)))
    addresses = [[t.data_ptr() for t in column] for column in (params, anchors, currents, masters)]
    alphas = alphas.to(torch.float64).contiguous()
    native().extrapolate(
        *addresses, [t.numel() for t in params], dtypes, alphas.data_ptr(), stats.data_ptr() if len(stats) else 0,
        torch.get_num_threads(), instruction_set,
    )  # fmt: skip


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
