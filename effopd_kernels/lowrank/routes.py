"""Three ways to a basis Q (B, M, L) that holds the leading right singular vectors of X (N × M, N ≥ M), and how one is
chosen.

    subspace   Q ← orth(XᵀX Q), two products with the pair per iteration
    gram       G = XᵀX once, then Q ← orth(G Q) without touching the pair
    exact      eigenvectors of G in fp64 (for fp64 input: LAPACK's SVD)

Whatever the route, :mod:`decompose` ends with two fp32 products with the pair itself, and only they decide σ: the first
damps what rounding brought into Q from outside the subspace, and an error δ of the subspace costs δ² in σ. Therefore
the iterations may run in bf16. Halko, Martinsson & Tropp 2011, algorithms 4.4 and 5.1.
"""

import functools

import torch
from torch import Tensor

from . import ops
from .difference import Difference
from .orth import basis

ROUTES = ("subspace", "gram", "exact")
GRAM_ITERATIONS = 4  # iterations in the Gram per requested power iteration: they cost a tenth of one on the pair


def choose(n: int, m: int, rank: int, width: int, device: torch.device) -> str:
    """The fastest accurate route for X (n × m, n ≥ m)."""
    if m <= 512 or width > 0.3 * m:
        return "exact"
    # On CPU bf16 products make iterating on the pair cheaper for longer than on a GPU, where the Gram is one launch.
    return "subspace" if rank <= (96 if device.type == "cpu" else 16) else "gram"


def signs(seed: int, rows: int, columns: int, like: Tensor) -> Tensor:
    """The test matrix of a shape, (rows, columns) of ±1: drawn on the CPU, so every device and batch gets the same.

    Signs do as well as Gaussians here and come 64 to a draw, which makes them free.
    """
    return _signs(seed, rows, columns).to(like.device, like.dtype)


@functools.lru_cache(maxsize=8)  # a model has few shapes
def _signs(seed: int, rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**63), 2**63 - 1, (rows, -(-columns // 64)), generator=generator)
    bits = words.view(torch.uint8).unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.reshape(rows, -1)[:, :columns].to(torch.int8).mul_(2).sub_(1)


def iterate(x: Difference, q: Tensor, iterations: int, fast: bool) -> Tensor:
    """Q ← orth(XᵀX Q)."""
    for _ in range(iterations):
        q = basis(x.gram_apply(q, fast))
    return q


def gram(x: Difference, q: Tensor, iterations: int) -> Tensor:
    g = x.gram(double=False)
    for _ in range(max(1, GRAM_ITERATIONS * iterations)):
        q = basis(g @ q)
    return q


def exact(x: Difference, width: int) -> Tensor:
    if x.dtype == torch.float64:
        return torch.stack([torch.linalg.svd(x.dense(i), full_matrices=False)[2][:width].mT for i in range(len(x.x))])
    return ops.eigh(x.gram(double=True))[1][..., :width].float()
