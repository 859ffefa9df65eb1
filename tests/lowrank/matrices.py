"""Matrices of known spectrum, and the fp64 facts a factorisation is held against.

The spectra are RandLAPACK's generators (polynomial, exponential, step, spiked, Kahan) and sklearn's low-rank plus tail.
"""

import math

import torch
from torch import Tensor

SPECTRA = {
    "polynomial": lambda i: 1 / (1 + i),
    "exponential": lambda i: torch.exp(-i / 15),
    "step": lambda i: torch.where(i < 12, 1.0, 1e-3),
    "spiked": lambda i: torch.where(i < 3, 10.0 / (1 + i), 0.05 + 0 * i),
}


def with_spectrum(m: int, n: int, s: Tensor, seed: int = 0) -> Tensor:
    """(m, n) fp64 with singular values s and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(side, len(s), dtype=torch.float64, generator=generator))[0] for side in (m, n))
    return (u * s) @ v.mT


def spectrum(name: str, m: int, n: int, seed: int = 0) -> Tensor:
    """A matrix of a named spectrum, (m, n) fp64."""
    return with_spectrum(m, n, SPECTRA[name](torch.arange(min(m, n), dtype=torch.float64)), seed)


def kahan(n: int, theta: float = 1.2) -> Tensor:
    """Kahan's upper triangular matrix (n, n) fp64: nearly rank-deficient in a way that pivoting does not see."""
    upper = torch.eye(n, dtype=torch.float64) - math.cos(theta) * torch.ones(n, n, dtype=torch.float64).triu(1)
    return upper * (math.sin(theta) ** torch.arange(n, dtype=torch.float64)).unsqueeze(1)


def low_rank_with_tail(m: int, n: int, effective_rank: int, tail: float, seed: int = 0) -> Tensor:
    """sklearn's make_low_rank_matrix: a bell-shaped head of the spectrum plus a slowly decaying tail."""
    i = torch.arange(min(m, n), dtype=torch.float64) / effective_rank
    return with_spectrum(m, n, (1 - tail) * torch.exp(-(i**2)) + tail * torch.exp(-0.1 * i), seed)


def bf16_pair(m: int, n: int, rank: int, ratio: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(current, base) bf16: weights of size 0.02 and an update of a given rank, ‖update‖ / ‖base‖ = ratio, rounded."""
    generator = torch.Generator().manual_seed(seed)
    base = (0.02 * torch.randn(m, n, generator=generator)).bfloat16()
    update = with_spectrum(m, n, torch.ones(rank, dtype=torch.float64), seed + 1)
    update *= ratio * base.double().norm() / update.norm()
    return (base.double() + update).bfloat16(), base


def assert_certified(svd, exact: Tensor) -> None:
    """Every bound the result claims, against an fp64 SVD of the exact difference (..., m, n)."""
    if exact.ndim > 2:
        for i in range(len(exact)):
            assert_certified(type(svd)(*(field[i] for field in svd)), exact[i])
        return
    k = svd.S.shape[-1]
    own = 1e-14 * exact.norm()  # the rounding of these fp64 checks themselves
    u, s, v = svd.U.double(), svd.S.double(), svd.Vh.double().mT
    truth = torch.linalg.svdvals(exact)
    lower, upper = svd.bounds()
    assert (lower <= truth[:k] + own).all() and (truth[:k] <= upper + own).all()
    # ‖A v − σ u‖ and ‖Aᵀ u − σ v‖, and by them a singular value within ρ of every σ̃.
    rho = torch.maximum((exact @ v - u * s).norm(dim=0), (exact.mT @ u - v * s).norm(dim=0))
    assert (rho <= svd.triplet_residual + own).all(), (rho / svd.triplet_residual).max()
    assert ((truth.unsqueeze(0) - s.unsqueeze(1)).abs().amin(1) <= svd.triplet_residual + own).all()
    residual = (exact - (u * s) @ v.mT).norm()
    assert residual <= svd.residual_norm + own, residual / svd.residual_norm
    assert abs(svd.frobenius_norm / exact.norm() - 1) < 1e-6
    assert orthogonality(svd.U) < 1e-6 and orthogonality(svd.Vh.mT) < 1e-6
    assert (s.diff() <= 0).all()


def orthogonality(q: Tensor) -> float:
    """max |QᵀQ − I|."""
    q = q.double()
    return (q.mT @ q - torch.eye(q.shape[-1], dtype=torch.float64)).abs().max().item() if q.numel() else 0.0
