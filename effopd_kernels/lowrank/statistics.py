"""What one reading of a difference Δ = x − base tells besides its products, five numbers in fp64:

    Σ Δ², max |Δ|, how many entries have Δ = 0, Σ ulp(x)², how many are not finite

Kernels fill them in themselves; this is what PyTorch does in their place.
"""

import torch
from torch import Tensor

from ..checks import wide

SUM_SQUARES, MAX_ABS, UNCHANGED, SUM_ULP_SQUARES, NON_FINITE = range(5)

# The exponent field alone, read as a float, is the power of two at or below |x|; times eps, its unit in the last place.
_EXPONENT = {
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}


def ulp(x: Tensor) -> Tensor:
    """Distance from |x| to the next larger number of x's dtype; 0 for zeros and denormals, which no weight of interest
    is.
    """
    integer, mask = _EXPONENT[x.dtype]
    return (x.view(integer) & mask).view(x.dtype).to(wide(x)).mul_(torch.finfo(x.dtype).eps)


def fill_statistics(row: Tensor, delta: Tensor, x: Tensor, full: bool) -> None:
    """Those of a panel of differences into ``row`` (5,), which is zero; ``x`` are the entries it was made from."""
    if delta.numel() == 0:
        return
    largest = torch.maximum(-delta.amin(), delta.amax())  # aminmax would copy a panel whose rows lie apart
    row[SUM_SQUARES] = _sum_squares(delta, largest)
    row[MAX_ABS] = largest
    if delta.device.type != "cpu" or not largest.isfinite():
        row[NON_FINITE] = (~delta.isfinite()).sum()
    if full:
        # Of the bits, without the sign of −0: counting floats that are not zero takes ten times as long.
        row[UNCHANGED] = delta.numel() - torch.count_nonzero(delta.abs().view(_EXPONENT[delta.dtype][0]))
        steps = ulp(x)
        row[SUM_ULP_SQUARES] = _sum_squares(steps, steps.amax())


def _sum_squares(x: Tensor, largest: Tensor) -> Tensor:
    """Σ x² in fp64. Row norms in fp32 are exact enough (their errors average out) and eight times faster, while squares
    stay in range.
    """
    if x.dtype == torch.float32 and x.device.type == "cpu" and not 1e-12 < float(largest) < 1e12:
        x = x.double()
    return torch.linalg.vector_norm(x, dim=1).double().square_().sum()


def add_statistics(to: Tensor, found: Tensor) -> None:
    """Those of further rows (5,) to those of the rows before."""
    largest = torch.maximum(to[MAX_ABS], found[MAX_ABS])
    to.add_(found)[MAX_ABS] = largest
