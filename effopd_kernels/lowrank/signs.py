"""The test matrix Ω of a sketch: a few random signs in every row, zeros elsewhere.

It starts iterations as well as a Gaussian one (Tropp, Yurtsever, Udell & Cevher 2019, "Streaming low-rank matrix
approximation", sec. 3.3), and X Ω takes as many additions an entry as there are signs, not L products. One sign falls
into each block of columns, which makes the columns of a row distinct (Nelson & Nguyen 2013, OSNAP).
"""

import functools

import torch
from torch import Tensor

from ..device_cache import device_cache

PER_ROW = 8  # does for any L


# Both cached: a model has few shapes.
@functools.lru_cache(maxsize=8)
def sparse(seed: int, rows: int, columns: int) -> Tensor:
    """Where the signs of Ω (rows, columns) are, and which: column << 1 | negative, (rows, at most PER_ROW) int32. Drawn
    on the CPU, so every device and batch gets the same.
    """
    count = min(PER_ROW, columns)
    begin = torch.arange(count + 1, device="cpu") * columns // max(count, 1)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(2**62, (rows, count), generator=generator, device="cpu")
    column = begin[:-1] + (drawn >> 1) % begin.diff()
    return (column << 1 | drawn & 1).int()


@device_cache(maxsize=8)
def dense(seed: int, rows: int, columns: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same as a matrix (rows, columns) of −1, 0 and 1, to be read only."""
    places = sparse(seed, rows, columns).long().to(device)
    omega = torch.zeros(rows, columns, dtype=dtype, device=device)
    return omega.scatter_(1, places >> 1, (1 - 2 * (places & 1)).to(dtype))
