"""Ways to a basis Q (B, M, L) that holds the leading right singular vectors of X (N × M, N ≥ M), and how one is
chosen.

    subspace   Q ← orth(XᵀX Q), two products with the pair per iteration
    gram       G = XᵀX once, then Q ← orth(G Q) without touching the pair
    exact      eigenvectors of G in fp64 (for fp64 input: LAPACK's SVD)
    direct     no basis: LAPACK's SVD in fp64 is the answer; on the CPU, for few entries or most of the triplets

The last iteration of the first two is shifted, Q ← (XᵀX − c) Q, which damps what is left of the unwanted directions at
no cost (Feng, Yu, Xie & Tang 2024, arXiv 2404.09276; here from Ritz values of the same product), and keeps the leading
Ritz directions only: all L columns served the first K to converge, but not all need go through the fp32 products that
follow.

Whatever the route, :mod:`decompose` ends with two fp32 products with the pair itself, and only they decide σ: the first
damps what rounding brought into Q from outside the subspace, and an error δ of the subspace costs δ² in σ. Therefore
the iterations may run in 16 bits. Halko, Martinsson & Tropp 2011, algorithms 4.4 and 5.1.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import ops, panels
from .difference import Difference
from .orth import basis

ROUTES = ("subspace", "gram", "exact")
SMALL = 1 << 14  # entries, for which LAPACK takes less time than other routes
GRAM_ITERATIONS = 4  # iterations in the Gram per requested power iteration: they cost a tenth of one on the pair


def small(x: Tensor) -> bool:
    """Whether x (..., m, n) are so few entries each that `choose` leaves them to LAPACK."""
    return _for_lapack(x) and x.shape[-2:].numel() <= SMALL


def _for_lapack(x: Tensor) -> bool:
    """On the CPU, and of a dtype next to which the rounding of LAPACK's fp64 is nothing."""
    return x.device.type == "cpu" and x.dtype != torch.float64


def choose(x: Tensor, rank: int, width: int) -> str:
    """The fastest accurate route for x (m × n)."""
    m, n = sorted(x.shape)
    if small(x) or (_for_lapack(x) and rank > 0.6 * m and n <= 2 * m):
        return "direct"
    if m <= 512 or width > 0.3 * m:
        return "exact"
    # On CPU products in 16 bits keep iterations on the pair cheap for longer than on a GPU, where a Gram is one launch.
    return "subspace" if rank <= (96 if x.device.type == "cpu" else 16) else "gram"


def iterate(
    apply: Callable[[Tensor], Tensor], q: Tensor, iterations: int, rank: int, kept: int, half: bool = False
) -> Tensor:
    """Q ← XᵀX Q for orthonormal Q (B, M, L), as ``apply`` takes the product, so many times. After the last the columns
    (B, M, kept) are nearly Ritz vectors, the leading ones first. ``half``: apply rounds Q to 16 bits.
    """
    if iterations <= 0:
        return q
    for _ in range(iterations - 1):
        q = basis(apply(q))
    if half:
        q = panels.rounded(q)  # so that Ritz values and shift are of the very Q of the product
    return _leading(apply(q), q, rank, kept, 1 + 1 / iterations)


def _leading(z: Tensor, q: Tensor, rank: int, kept: int, beyond: float) -> Tensor:
    """(XᵀX − c) Q W of the leading Ritz vectors Q W, given Z = XᵀX Q.

    Ritz values θ lie below the σ² that they approximate, so c ≤ θ_k/2 ≤ σ_k²/2 lets no unwanted direction outgrow a
    wanted one, on any spectrum. Best is c a little below σ²_{L+1}: ``beyond`` times θ_L, which after few iterations is
    well below σ_L².
    """
    h = (q.mT @ z).double()  # in fp32 small Ritz values of spectra that fall off quickly would come in any order
    values, w = (t.to(q.dtype) for t in ops.eigh((h + h.mT) / 2))
    shift = torch.minimum(beyond * values[:, -1:], values[:, rank - 1 : rank] / 2).clamp_min(0)
    lengths = values.clamp_min(torch.finfo(values.dtype).eps * values[:, :1])
    return torch.addcmul(z, q, shift.unsqueeze(-1), value=-1) @ (w / lengths.unsqueeze(-2))[..., :kept]


def gram(x: Difference, q: Tensor, iterations: int, rank: int, kept: int) -> Tensor:
    g = x.gram(double=False)
    return iterate(lambda q: g @ q, basis(g @ q), max(1, GRAM_ITERATIONS * iterations) - 1, rank, kept)


def exact(x: Difference, kept: int) -> Tensor:
    if x.dtype == torch.float64:
        return torch.stack([torch.linalg.svd(x.dense(i), full_matrices=False)[2][:kept].mT for i in range(len(x.x))])
    return ops.eigh(x.gram(double=True))[1][..., :kept].float()
