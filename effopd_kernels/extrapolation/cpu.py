"""In-place extrapolation on the CPU: one call of the C++ kernel for all contiguous tensors of the usual dtypes, and
torch.lerp for the others, with statistics block by block while the block is in cache.

torch.lerp(A, C, α, out=W) is a single pass that computes bf16 and fp16 in fp32 and rounds once (checked bit for bit
against fp32 arithmetic and, for rounding, against fp64). It loses the sign of −0 at α = 0 and 1: the ends are copies.
"""

from itertools import compress

import torch
from torch import Tensor

from ..checks import wide
from ..native import DTYPES, native
from . import reference
from .shards import PLAIN

# How the kernel reads a list of tensors, at a tenth of what their attributes take in Python (csrc/tensors.h).
EXCHANGE = getattr(Tensor, "__dlpack_c_exchange_api__", None)
BLOCK = 1 << 18  # elements: three fp32 blocks fit the second-level caches of two cores


def extrapolate_(params, anchors, currents, alphas: Tensor, masters, with_stats: bool, instruction_set=-1) -> Tensor:
    """The CPU backend of `reference.extrapolate_`. instruction_set: the kernel's, −1 the best; None for torch.lerp."""
    stats = alphas.new_empty((len(params) if with_stats else 0, 3), dtype=torch.float32)
    rows = list(zip(params, anchors, currents, *([masters] if masters else []), strict=True))
    fits = [False] * len(rows)
    if instruction_set is not None and EXCHANGE is not None and native() is not None:
        if _cpp(params, anchors, currents, masters, alphas, stats, instruction_set):
            return stats
        rows = [_lying_flat(row) for row in rows]
        fits = [all(t.dtype in DTYPES and t.is_contiguous() for t in row) for row in rows]
        chosen, where = list(compress(rows, fits)), torch.tensor(fits, device="cpu")
        columns = [[row[k] for row in chosen] for k in range(4 if masters else 3)]
        some = stats.new_empty((len(chosen) if with_stats else 0, 3))
        done = _cpp(*columns[:3], columns[3] if masters else [], alphas[where], some, instruction_set)
        assert done
        if with_stats:
            stats[where] = some
    for i, (row, alpha) in enumerate(zip(rows, alphas.tolist(), strict=True)):
        if fits[i]:
            continue
        param, anchor, current, master = row if masters else (*row, None)
        if with_stats:
            stats[i] = stats.new_tensor(_in_blocks(param, anchor, current, alpha, master))
        else:
            _write(param, anchor, current, alpha, master)
    return stats


def _lying_flat(row: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Contiguous views of the tensors, if all have the same strides without gaps (transposed, channels_last); else they
    themselves."""
    strides = row[0].stride()
    if all(t.stride() == strides for t in row):
        order = sorted(range(len(strides)), key=lambda d: -strides[d])
        if row[0].permute(order).is_contiguous():
            return tuple(t.permute(order) for t in row)
    return row


def alike(params: list, anchors: list, currents: list, masters: list) -> bool:
    """Whether these are four equally long lists of plain floating tensors on the CPU (masters: or all None), those of a
    row of one shape: one quick look, which may say False where only a look at each tensor can tell."""
    here = params and type(params[0]) in PLAIN and params[0].is_cpu and EXCHANGE is not None and native() is not None
    return bool(here) and native().alike(EXCHANGE, PLAIN, params, anchors, currents, masters)


def _cpp(params, anchors, currents, masters, alphas: Tensor, stats: Tensor, instruction_set: int) -> bool:
    """False, with nothing done, if a tensor is not contiguous or of another dtype than the kernel's."""
    alphas = alphas.to(torch.float64).contiguous()
    return native().extrapolate(
        EXCHANGE, params, anchors, currents, masters, alphas.data_ptr(), stats.data_ptr() if len(stats) else 0,
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


def extrapolate_forward(w0: Tensor, delta: Tensor, alpha: Tensor) -> Tensor:
    """`reference.extrapolate_forward`: in one pass, or of 16 bits, to which `torch.add` would round alpha too, block by
    block while the block is in cache.
    """
    dtype, alpha = wide(w0, delta), alpha.item()
    if w0.dtype == delta.dtype == dtype:
        return torch.add(w0, delta, alpha=alpha).contiguous()
    out = torch.empty_like(w0, memory_format=torch.contiguous_format)
    for o, w, d in zip(*(t.reshape(-1).split(BLOCK) for t in (out, w0, delta)), strict=True):
        o.copy_(torch.add(w.to(dtype), d.to(dtype), alpha=alpha))
    return out


def extrapolate_backward(grad: Tensor, delta: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.extrapolate_backward`, the sum block by block while the block is in cache."""
    if grad.dtype != delta.dtype:
        return reference.extrapolate_backward(grad, delta, alpha)
    dtype, blocks = wide(grad), zip(*(t.reshape(-1).split(BLOCK) for t in (grad, delta)), strict=True)
    total = sum((g.to(dtype) * d.to(dtype)).sum().item() for g, d in blocks)
    return torch.mul(grad, alpha.item()).contiguous(), alpha.new_tensor(total)


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
