"""Spectra as weighted nodes, and their estimate by stochastic Lanczos quadrature.

tr f(XᵀX) = E zᵀ f(XᵀX) z for z uniform on a sphere, and for each z the Lanczos process gives a Gauss quadrature: nodes
are eigenvalues θ of its tridiagonal T, weights ‖z‖² (e₁ᵀy)². Ubaru, Chen & Saad 2017, algorithm 1. The leading triplets
are taken out first and counted exactly (as in Hutch++, Meyer et al. 2021): only the rest, which is small and even, is
sampled.

Steps are taken until the quadrature is as exact as the sample. Of a spectrum that reaches down to zero the sum of
σ = √λ comes in as 1/T: what T steps lack is T − 1 times what the last of them changed.

The same nodes bound the rest from above. The quadrature is exact for λᵈ up to d = 2T − 1, and zᵀ(XᵀX)ᵈz ≥ λ₁ᵈ (v₁ᵀz)²,
where v₁ᵀz is a standard normal number for Gaussian z: the largest of P probes gives λ₁ unless all P of them are small.

Shape legend: M short side; P probes; T steps; K leading triplets.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..native import has_products, native
from .decompose import Settings, decompose_group
from .difference import Difference, resolves
from .types import RSVD, least_rounding

FAILURE = 1e-9  # probability that `Spectrum.rest_norm` is not a bound


class Sampling(NamedTuple):
    """How a spectrum is sampled."""

    probes: int
    least: int  # steps, at least and at most
    most: int
    seed: int


class Spectrum(NamedTuple):
    """Singular values known one by one, and the rest as one weighted set of nodes per probe."""

    leading: Tensor  # (K,) fp64, descending
    nodes: Tensor | None = None  # (P, T) fp64 singular values
    weights: Tensor | None = None  # (P, T), summing to M − K for every probe
    lengths: Tensor | None = None  # (P,) ‖z‖² of the Gaussian probe over M − K
    coarser: "tuple[Tensor, Tensor] | None" = None  # nodes and weights of one step fewer, (P, T − 1)

    def sums(self, f: Callable[[Tensor], Tensor], unit: Tensor) -> Tensor:
        """Σ_i f(σ_i / unit) over the whole spectrum, one estimate per probe: (P, F), or (1, F) where nothing was
        sampled.
        """
        known = f(self.leading / unit).sum(0, keepdim=True)
        if self.nodes is None:
            return known
        return known + (self.weights.unsqueeze(-1) * f(self.nodes / unit)).sum(1)

    def quadrature_error(self, f: Callable[["Spectrum"], Tensor]) -> Tensor:
        """How far f of this spectrum is from what more steps would give."""
        if self.coarser is None:
            return torch.zeros_like(f(self))
        nodes, weights = self.coarser
        return nodes.shape[1] * (f(self) - f(self._replace(nodes=nodes, weights=weights))).abs()

    def count_error(self, x: Tensor) -> Tensor:
        """How far the number of σ above x may be from that of the nodes, over the probes' mean.

        Both measures have the same moments, so by Chebyshev, Markov and Stieltjes they differ by no more than the most
        that any such measure has in x itself: 1 / Σ_j p_j(x)² of its orthonormal polynomials, which in terms of nodes
        is 1 / Σ_j ℓ_j(x)² / w_j with Lagrange's.
        """
        if self.nodes is None or self.rest_norm() <= x:
            return x.new_zeros(())
        # Nodes below rounding are one, and a node without weight is none.
        zero, squares = self.nodes == 0, self.nodes.square()
        weights = torch.where(zero, 0.0, self.weights)
        weights[:, 0] += (self.weights * zero).sum(1)
        held = weights > 1e-12 * weights.sum(1, keepdim=True)
        other = held.unsqueeze(1) & ~torch.eye(held.shape[1], dtype=torch.bool, device=held.device)
        apart = squares.unsqueeze(2) - squares.unsqueeze(1)
        lagrange = torch.where(other, (x.square() - squares).unsqueeze(1) / apart, 1.0).prod(2)
        return (1 / torch.where(held, lagrange.square() / weights, 0.0).sum(1)).mean()

    def rest_norm(self) -> float:
        """An upper bound on the spectral norm of X(1 − VVᵀ), the matrix without its leading right singular vectors; it
        fails with probability `FAILURE`, over the seed.
        """
        if self.nodes is None or not self.nodes.any():
            return 0.0
        probes, degree = len(self.nodes), 2 * self.nodes.shape[1] - 1
        largest = self.nodes.amax()
        moments = self.lengths * (self.weights * (self.nodes / largest) ** (2 * degree)).sum(1)
        # P(|v₁ᵀz| < t for all probes) = erf(t/√2)^P
        smallest = torch.special.erfinv(largest.new_tensor(FAILURE ** (1 / probes))) * math.sqrt(2)
        return float(largest * (moments.amax() / smallest**2) ** (1 / (2 * degree)))


def sampled_spectrum(x: Difference, k: int, sampling: Sampling, svd: RSVD | None = None) -> Spectrum:
    """The k leading σ, and quadrature nodes of the rest of the spectrum of one difference (N, M). With ``svd``, of that
    difference, its triplets are the leading ones.
    """
    m, (probes, least, most, seed) = x.x[0].shape[1], sampling
    if svd is None:
        found, _ = decompose_group(x.x, x.base, Settings(min(k, m), seed=seed))
        svd = RSVD(*(field[0] for field in found))
    k = svd.S.shape[-1]
    s, v = svd.S.double(), svd.Vh.mT.contiguous()
    floor = least_rounding(svd.frobenius_norm, v.dtype)  # below it nodes are rounding
    s = torch.where(s > floor, s, 0.0)
    if k == m:
        return Spectrum(s)
    scale = torch.exp2(-s[:1].log2().floor())
    mean_rest = ((svd.frobenius_norm.square() - s.square().sum()).clamp_min(0) / (m - k)).sqrt()
    x = replace(x, scale=scale, known_gram=x.known_gram if resolves(svd.frobenius_norm, mean_rest) else None)
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(m, probes, generator=generator, dtype=torch.float32, device="cpu").to(v.device, v.dtype)
    rules, squares = _lanczos(x, v, z, least, min(most, m - k))
    rules = [(torch.where(n / scale > floor, n / scale, 0.0), w * (m - k)) for n, w in rules]
    return Spectrum(s, *rules[-1], squares / (m - k), rules[-2] if len(rules) > 1 else None)


def _lanczos(x: Difference, v: Tensor, z: Tensor, least: int, most: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Nodes and weights (P, t), each probe's summing to 1, of (1 − VVᵀ) XᵀX (1 − VVᵀ) for starting vectors z (M, P)
    after the last steps t = … T, two at least where T ≥ 2, and ‖z‖² (P,) outside V; with full reorthogonalisation.
    """
    z = _outside(v, _outside(v, z))
    length = torch.linalg.vector_norm(z, dim=0)
    q = z.new_empty(most + 1, *z.shape)
    diagonal, off = z.new_empty(2, most, len(length))
    rules = []
    torch.div(z, length, out=q[0])
    step = step_in_cpp if _in_cpp(x, q, v) else _step
    for t in range(most):
        step(x, v, q, t, diagonal, off)
        if t + 1 >= min(least, most) - 1:  # the last two are wanted
            rules.append(_quadrature(diagonal[: t + 1], off[:t]))
        if t + 1 >= max(least, 2):
            before, now = ((nodes * weights).sum(1) for nodes, weights in rules[-2:])
            if t * (now.mean() - before.mean()).abs() <= now.std() / math.sqrt(len(length)):
                break
    return rules, length.double().square()


def _outside(v: Tensor, y: Tensor) -> Tensor:
    return torch.addmm(y, v, v.mT @ y, alpha=-1)


def _step(x: Difference, v: Tensor, q: Tensor, t: int, diagonal: Tensor, off: Tensor) -> None:
    """Step t of the Lanczos vectors q (T + 1, M, P), which has q[0 … t]: fills in q[t + 1], diagonal[t] and off[t], of
    (T, P) each.
    """
    # Once outside is enough here: V is nearly invariant, so little of the product lies in it.
    y = _outside(v, x.gram_apply(q[t].unsqueeze(0))[0])
    torch.sum(q[t] * y, 0, out=diagonal[t])
    past = q[: t + 1]
    for _ in range(2):
        y = y - ((past * y).sum(1, keepdim=True) * past).sum(0)
    beta = torch.linalg.vector_norm(y, dim=0)
    # Where an invariant subspace was found the rest is rounding. Zero vectors decouple T, with no weight.
    alive = beta > torch.finfo(beta.dtype).eps * diagonal[0]
    off[t] = torch.where(alive, beta, 0.0)
    q[t + 1] = torch.where(alive, y / torch.where(alive, beta, 1.0), 0.0)


def _in_cpp(x: Difference, q: Tensor, v: Tensor) -> bool:
    """Whether `step_in_cpp` can do it: from a Gram, for 16 probes and even sizes."""
    return (
        x.known_gram is not None
        and q.device.type == "cpu"
        and q.dtype == torch.float32
        and q.shape[2] == 16
        and q.shape[1] % 2 == v.shape[1] % 2 == 0
        and has_products()
    )


def step_in_cpp(x: Difference, v: Tensor, q: Tensor, t: int, diagonal, off, instruction_set: int = -1) -> None:
    """As :func:`_step`, of contiguous tensors, in one kernel. instruction_set: the multiplier's, −1 the best."""
    scale = 1.0 if x.scale is None else x.scale.item() ** 2
    native().lanczos_step(
        x.known_gram.data_ptr(), q.shape[1], scale, v.data_ptr(), v.shape[1], q.data_ptr(), t,
        diagonal.data_ptr(), off.data_ptr(), instruction_set,
    )  # fmt: skip


def _quadrature(diagonal: Tensor, off: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values and weights (P, t) from the diagonal (t, P) of T and what stands beside it, (t − 1, P)."""
    side = off.mT.double()
    t = torch.diag_embed(diagonal.mT.double()) + torch.diag_embed(side, 1) + torch.diag_embed(side, -1)
    theta, y = torch.linalg.eigh(t)
    return theta.clamp_min(0).sqrt(), y[:, 0].square()
