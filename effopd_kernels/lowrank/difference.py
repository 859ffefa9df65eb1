"""A group of equally shaped differences X = scale · (x − base), and the products that are taken with it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..checks import wide
from . import ops
from .panels import over_panels
from .types import least_rounding


def resolves(frobenius: Tensor, s: Tensor) -> Tensor:
    """Whether singular values s can be taken from the fp32 Gram of a matrix of this Frobenius norm: rounding moves σ²
    by at most `ROUNDING` ε ‖X‖², and by a hundredth of that where it averages out.
    """
    return s.square() >= 64 * least_rounding(frobenius.square(), torch.float32)


@dataclass(frozen=True)
class Difference:
    """B differences of N × M views. ``scale`` is a (B,) tensor of powers of two, or None for 1. ``known_gram``
    (B, M, M) is (x − base)ᵀ(x − base) where it was taken, and stands for two products with the pair.
    """

    x: list[Tensor]
    base: list[Tensor]
    scale: Tensor | None = None
    known_gram: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic and of the results: fp64 for fp64 input, else fp32."""
        return wide(self.x[0])

    @property
    def mT(self) -> "Difference":
        return replace(self, x=[v.mT for v in self.x], base=[v.mT for v in self.base], known_gram=None)

    def apply(self, q: Tensor) -> Tensor:
        """X Q, (B, N, L)."""
        return ops.skinny(self.x, self.base, q, self.scale)

    def gram_apply(self, q: Tensor, fast: bool = False) -> Tensor:
        """XᵀX Q, (B, M, L)."""
        if self.known_gram is not None:
            z = ops.skinny(list(self.known_gram), [], q, None)
            return z if self.scale is None else z.mul_(self.scale.square().to(z.dtype)[:, None, None])
        return ops.gram_apply(self.x, self.base, q, self.scale, fast)

    def project(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """(Y = X Q, XᵀY), (B, N, L) and (B, M, L)."""
        return ops.project(self.x, self.base, q, self.scale)

    def gram(self, double: bool) -> Tensor:
        """XᵀX, (B, M, M)."""
        return ops.gram(self.x, self.base, self.scale, double)

    def dense(self, index: int) -> Tensor:
        """One difference in full, for matrices small enough for LAPACK."""
        out = torch.empty(self.x[index].shape, dtype=self.dtype, device=self.x[index].device)

        def copy(rows: slice, panel: Tensor) -> None:
            out[rows] = panel

        self._over_panels(index, copy)
        return out

    def distance(self, u: Tensor, s: Tensor, v: Tensor) -> Tensor:
        """‖X − U diag(s) Vᵀ‖_F entry by entry, (B,) fp64. Where ‖X‖² − Σs² would cancel, this does not."""

        def left_over(i: int) -> Tensor:
            us = u[i] * s[i]

            def squares(rows: slice, panel: Tensor) -> Tensor:
                left = torch.addmm(panel, us[rows], v[i].mT, alpha=-1)
                return torch.linalg.vector_norm(left, dtype=torch.float64).square()

            return self._over_panels(i, squares)

        return torch.stack([left_over(i) for i in range(len(self.x))]).sqrt()

    def _over_panels(self, i: int, function):
        scale = None if self.scale is None else self.scale[i]
        return over_panels(function, self.x[i], self.base[i] if self.base else None, scale, self.dtype)
