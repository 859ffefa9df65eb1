"""Three ways to a basis Q (B, M, L) that holds the leading right singular vectors of X (N × M, N ≥ M), and how one is
chosen.

    subspace   Q ← orth(XᵀX Q), two products with the pair per iteration
    gram       G = XᵀX once, then Q ← orth(G Q) without touching the pair
    exact      eigenvectors of G in fp64 (for fp64 input: LAPACK's SVD)

Whatever the route, :mod:`rsvd` ends with one fp32 projection of the pair itself, and only that decides σ: an error δ in
the subspace costs δ² in σ. Therefore the iterations may run in bf16. Halko, Martinsson & Tropp 2011, algorithms 4.4 and
5.1.
"""

import torch
from torch import Tensor

from . import ops
from .difference import Difference
from .orth import basis, orthonormal

ROUTES = ("subspace", "gram", "exact")
GRAM_ITERATIONS = 4  # iterations in the Gram per requested power iteration: they cost a tenth of one on the pair


def choose(n: int, m: int, rank: int, width: int, device: torch.device) -> str:
    """The fastest accurate route for X (n × m, n ≥ m)."""
    if m <= 512 or width > 0.3 * m:
        return "exact"
    # On CPU bf16 products make iterating on the pair cheaper for longer than on a GPU, where the Gram is one launch.
    return "subspace" if rank <= (96 if device.type == "cpu" else 16) else "gram"


def gaussian(seed: int, rows: int, columns: int, like: Tensor) -> Tensor:
    """The test matrix of a shape, (rows, columns): drawn on the CPU, so every device and every batch gets the same
    numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).to(like.device, like.dtype)


def iterate(x: Difference, q: Tensor, iterations: int) -> Tensor:
    """Q ← orth(XᵀX Q). The last round is in full precision: it damps what rounding brought in from outside the
    subspace.
    """
    for i in range(iterations):
        q = basis(x.gram_apply(q, fast=i < iterations - 1))
    return orthonormal(q)


def gram(x: Difference, q: Tensor, iterations: int) -> Tensor:
    g = x.gram(double=False)
    for _ in range(max(1, GRAM_ITERATIONS * iterations)):
        q = basis(g @ q)
    return orthonormal(q)


def exact(x: Difference, width: int) -> Tensor:
    if x.dtype == torch.float64:
        return torch.stack([torch.linalg.svd(x.dense(i), full_matrices=False)[2][:width].mT for i in range(len(x.x))])
    return ops.eigh(x.gram(double=True))[1][..., :width].float()
