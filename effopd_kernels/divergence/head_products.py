"""Products of hidden states with a head, in the order and dtype in which each device multiplies fastest.

N tokens, V vocabulary, D hidden size.
"""

import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..native import native
from . import ops

BLOCK = 4 << 20  # of an operand, which a CPU's caches hold
WIDE_BLOCK = 2 * BLOCK  # of operands that are cast: MKL repacks the hidden states for each, the larger the fewer
FEW = 32  # rows of a product that reads the head for them alone
TILE = 256  # rows that a GPU's GEMM takes at a time, at most: of 2,731 it computes 2,816
# On CPUs with AMX, repacking the operands dominates a GEMM; with AVX2 alone, MKL is faster when the large matrix comes
# first. There (in fp32 too, where MKL allocates 130 MB for it) it pays to compute W·hᵀ and to transpose logits and
# gradients. With AVX-512 and no AMX that costs 4 to 7 %.
TILES = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()  # not public, so it may go
TRANSPOSES = TILES or torch.backends.cpu.get_cpu_capability() == "AVX2"


def pieces(total: int, limit: int) -> list[slice]:
    """[0, total) in the fewest slices of at most `limit` (at least 1) each: whole tiles of GEMMs if they fit, else near
    equal.
    """
    if not total:
        return []
    count = -(-total // max(limit, 1))
    size = -(-total // count // TILE) * TILE
    edges = [*range(0, total, size), total] if size <= limit else [total * i // count for i in range(count + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


def _blocks(
    N: int, head_VD: Tensor, like: Tensor, dtype: torch.dtype, size: int = BLOCK
) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the vocabulary, each with scratch (slice, N) in the dtype of `like`. The scratch takes about `size`
    bytes, together with the slice of the head where that has to be cast to `dtype`.
    """
    V, D = head_VD.shape
    rows = max(size // dtype.itemsize // max(N if head_VD.dtype == dtype else N + D, 1), 1)
    scratch = ops.empty_rows(1, min(rows, V) * N, like)
    for cols in pieces(V, rows):
        yield cols, scratch[0, : (cols.stop - cols.start) * N].view(-1, N)


def _caster(dtype: torch.dtype, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A function that casts to `dtype`, if needed, into one buffer that its every call reuses: fresh pages cost a CPU
    more than the cast."""
    room = torch.empty(0, dtype=dtype, device=device)
    return lambda x: x if x.dtype == dtype else room.resize_(x.shape).copy_(x)


def _product_dtype(dtype: torch.dtype, rows: int, device: torch.device) -> torch.dtype:
    """The dtype to multiply in: fp32 in place of bf16 and fp16 on a CPU where PyTorch multiplies these in plain loops,
    or the processor multiplies them more slowly than fp32. Not the latter for few rows: reading the head takes the time
    there, and a cast would multiply its bytes by five.
    """
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    if device.type != "cpu" or name is None:
        return dtype
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda: False)  # not public either
    slow = dtype == torch.bfloat16 and not TILES and native() is not None and not native().multiplies_bf16()
    return dtype if supported() and not (slow and rows > FEW) else torch.float32


def project(out_NV: Tensor, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> None:
    """out = hidden·weightᵀ + bias, rounded once to out's dtype, which may be wider or narrower than the operands'."""
    device, dtype = out_NV.device, torch.promote_types(out_NV.dtype, hidden_ND.dtype)
    product_dtype, (V, D) = _product_dtype(dtype, len(hidden_ND), device), weight_VD.shape
    alike = out_NV.dtype == hidden_ND.dtype == product_dtype
    if alike and not (TRANSPOSES and device.type == "cpu"):
        # In parts on a CPU: MKL packs whatever it is given, up to 50 MB of a head.
        for cols in pieces(V, 4 * BLOCK // dtype.itemsize // max(D, 1) if device.type == "cpu" else V):
            _product(hidden_ND, weight_VD[cols].T, None if bias_V is None else bias_V[cols], out_NV[:, cols])
    elif device.type == "cuda" and out_NV.dtype == torch.float32 and hidden_ND.itemsize == 2:
        torch.mm(hidden_ND, weight_VD.T, out_dtype=out_NV.dtype, out=out_NV)
        if bias_V is not None:
            out_NV += bias_V
    elif not (TRANSPOSES and device.type == "cpu"):  # there is no GEMM of these dtypes: one in a wider, by pieces
        hidden, cast = hidden_ND.to(product_dtype), _caster(product_dtype, device)
        for cols, block in _blocks(len(hidden), weight_VD, hidden, product_dtype, WIDE_BLOCK):
            bias = None if bias_V is None else bias_V[cols].to(product_dtype)
            _product(hidden, cast(weight_VD[cols]).T, bias, block := block.view(len(hidden), -1))
            out_NV[:, cols] = block
    else:
        # Repacked is the second operand: here the few hidden states, and the head is used as it lies.
        N = len(hidden_ND)
        short = -N % (32 if product_dtype.itemsize == 2 else 16)  # of whole tiles: a GEMM is slow beside them
        hidden = F.pad(hidden_ND.to(product_dtype), (0, 0, 0, short if 4 * short < N else 0))
        cast = _caster(product_dtype, device)
        for cols, block in _blocks(len(hidden), weight_VD, hidden, product_dtype):
            bias = None if bias_V is None else bias_V[cols, None].to(product_dtype)
            _product(cast(weight_VD[cols]), hidden.T, bias, block)
            ops.transpose(block[:, :N], out_NV[:, cols])


def _product(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)


def hidden_gradient(grad_NV: Tensor, weight_VD: Tensor) -> Tensor:
    """grad·weight (N, D), in their dtype or a wider one."""
    device = grad_NV.device
    dtype = _product_dtype(grad_NV.dtype, len(grad_NV), device)
    if dtype == grad_NV.dtype:
        return grad_NV @ weight_VD
    (N, V), D = grad_NV.shape, weight_VD.shape[1]
    result = grad_NV.new_zeros(N, D, dtype=dtype)
    grad_in, weight_in = _caster(dtype, device), _caster(dtype, device)
    for cols in pieces(V, WIDE_BLOCK // dtype.itemsize // max(N + D, 1)):
        result.addmm_(grad_in(grad_NV[:, cols]), weight_in(weight_VD[cols]))
    return result


def add_product(acc_VD: Tensor, grad_NV: Tensor, hidden_ND: Tensor, first: bool) -> None:
    """acc += gradᵀ·hidden, or = for the first; acc may be fp32 and the operands narrower."""
    beta, device = 0 if first else 1, acc_VD.device  # 0 leaves unread what stood there
    dtype = _product_dtype(acc_VD.dtype, len(grad_NV), device)
    alike = acc_VD.dtype == grad_NV.dtype == dtype
    if alike and not (TRANSPOSES and device.type == "cpu" and acc_VD.itemsize == 2):
        acc_VD.addmm_(grad_NV.T, hidden_ND, beta=beta)
    elif device.type == "cuda":
        torch.addmm(acc_VD, grad_NV.T, hidden_ND, out_dtype=acc_VD.dtype, beta=beta, out=acc_VD)
    else:  # gradᵀ at hand too
        hidden, cast = hidden_ND.to(dtype), _caster(dtype, device)
        product = hidden_ND.new_empty(0, dtype=dtype)
        for cols, block in _blocks(len(grad_NV), acc_VD, grad_NV, dtype):
            ops.transpose(grad_NV[:, cols], block)
            if acc_VD.dtype == dtype:
                acc_VD[cols].addmm_(cast(block), hidden, beta=beta)
            else:
                torch.mm(cast(block), hidden, out=product.resize_(len(block), hidden.shape[1]))
                acc_VD[cols] = product if first else product.add_(acc_VD[cols])
