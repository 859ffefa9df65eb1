"""What a truncated SVD comes back as: factors, error bounds, flags."""

import math
from enum import IntFlag
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Bounds are widened by this many ε ‖A‖_F, for the rounding of the products they were computed from.
ROUNDING = 8
# ε ‖A‖_F by which σ̃ may be off where roundings do not average out: 25 was measured on 100,000 × 200 equal entries.
BIASED = 32


def least_rounding(norm: Tensor, dtype: torch.dtype) -> Tensor:
    """What the rounding of products in ``dtype`` may do to numbers from a matrix of this Frobenius norm."""
    # In fp64, to which fp32's factors are computed too, nothing finer is at hand: residuals of 16 ε ‖A‖ were seen.
    return (4 if dtype == torch.float64 else 1) * ROUNDING * torch.finfo(dtype).eps * norm


def triplet_count(fraction: float, rank: int) -> int:
    """⌈fraction · rank⌉, as exact numbers: 28 for 0.28 of 100, whose product is a little above 28 in floating point."""
    return math.ceil(fraction * rank - 1e-9)


def check_svd(svd: Any) -> None:
    if not isinstance(svd, RSVD):
        raise TypeError(f"svd must be an RSVD, as batched_rsvd returns it, got {type(svd).__name__}")


class Flag(IntFlag):
    """Bits of ``RSVD.flags``.

    NON_FINITE: the matrix has NaN or infinite entries; its factors and norms are NaN.
    ZERO: the matrix is exactly zero: σ = 0, factors are columns of the identity.
    RANK_DEFICIENT: σ_k is at rounding level: its vectors are orthonormal but arbitrary.
    CLUSTERED: σ_k and σ_{k+1} agree to 1e-3: the k-th subspace itself is poorly determined.
    TOL_NOT_MET: ``tol`` was asked for and not reached.
    CLIPPED: the rank asked for exceeded min(m, n).
    """

    NON_FINITE = 1
    ZERO = 2
    RANK_DEFICIENT = 4
    CLUSTERED = 8
    TOL_NOT_MET = 16
    CLIPPED = 32


class RSVD(NamedTuple):
    """A ≈ U diag(S) Vh, with what bounds its error. Batch dimensions lead; k triplets, σ descending.

    U: (..., m, k) orthonormal columns; fp32 (fp64 for fp64 input), as S and Vh.
    S: (..., k) singular values.
    Vh: (..., k, n) orthonormal rows.
    residual_norm: (...) fp64, at least ‖A − U S Vh‖_F.
    frobenius_norm: (...) fp64, ‖A‖_F.
    triplet_residual: (..., k) fp64, at least ‖A v_i − σ_i u_i‖ and ‖Aᵀ u_i − σ_i v_i‖.
    flags: (...) int32, bits of `effopd_kernels.lowrank.Flag`.

    Bounds are of factors in fp32, whose rounding fp64 knows. Of fp64 input they hold up to fp64's own: of 20,000 × 60
    equal entries, whose roundings all go one way, 3,100 ε ‖A‖_F were seen beyond them.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    residual_norm: Tensor
    frobenius_norm: Tensor
    triplet_residual: Tensor
    flags: Tensor

    @property
    def mT(self) -> "RSVD":
        """The same decomposition, of Aᵀ."""
        return self._replace(U=self.Vh.mT, Vh=self.U.mT)

    def rounding(self) -> Tensor:
        """(...) fp64, by how much rounding may have moved any σ̃: usually as little as the residual leaves room for."""
        least = least_rounding(self.frobenius_norm, self.S.dtype)
        return torch.maximum(least, torch.minimum(self.residual_norm, BIASED / ROUNDING * least))

    def bounds(self) -> tuple[Tensor, Tensor]:
        """(lower, upper), each (..., k) fp64: the exact i-th singular value lies between.

        U_kᵀA has singular values S, so σ̃_i ≤ σ_i; and A Aᵀ = (U_k S Vh)(·)ᵀ + R Rᵀ, so by Weyl σ_i² ≤ σ̃_i² + ‖R‖².
        Both are widened by the rounding of the arithmetic.
        """
        s, rounding = self.S.double(), self.rounding().unsqueeze(-1)
        upper = torch.hypot(s, self.residual_norm.unsqueeze(-1).expand_as(s)) + rounding
        return (s - rounding).clamp_min(0), upper
