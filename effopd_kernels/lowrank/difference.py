"""A group of equally shaped differences X = scale · (x − base), and the products that are taken with it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import ops
from .reference import panels


@dataclass(frozen=True)
class Difference:
    """B differences of N × M views. ``scale`` is a (B,) tensor of powers of two, or None for 1."""

    x: list[Tensor]
    base: list[Tensor]
    scale: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic and of the results: fp64 for fp64 input, else fp32."""
        return torch.promote_types(self.x[0].dtype, torch.float32)

    @property
    def mT(self) -> Difference:
        return replace(self, x=[v.mT for v in self.x], base=[v.mT for v in self.base])

    def apply(self, q: Tensor, fast: bool = False) -> Tensor:
        """X Q, (B, N, L)."""
        return ops.skinny(self.x, self.base, q, self.scale, fast)

    def gram_apply(self, q: Tensor, fast: bool = False) -> Tensor:
        """XᵀX Q, (B, M, L)."""
        return ops.gram_apply(self.x, self.base, q, self.scale, fast)

    def gram(self, double: bool) -> Tensor:
        """XᵀX, (B, M, M)."""
        return ops.gram(self.x, self.base, self.scale, double)

    def dense(self, index: int) -> Tensor:
        """One difference in full, for matrices small enough for LAPACK."""
        out = torch.empty(self.x[index].shape, dtype=self.dtype, device=self.x[index].device)
        for rows, panel in self._panels(index):
            out[rows] = panel
        return out

    def distance(self, u: Tensor, s: Tensor, v: Tensor) -> Tensor:
        """‖X − U diag(s) Vᵀ‖_F entry by entry, (B,) fp64. Where ‖X‖² − Σs² would cancel, this does not."""
        squares = torch.zeros(len(self.x), dtype=torch.float64, device=u.device)
        for i in range(len(self.x)):
            us = u[i] * s[i]
            for rows, panel in self._panels(i):
                left = torch.addmm(panel, us[rows], v[i].mT, alpha=-1)
                squares[i] += torch.linalg.vector_norm(left, dtype=torch.float64).square()
        return squares.sqrt()

    def _panels(self, i: int):
        scale = None if self.scale is None else self.scale[i]
        return panels(self.x[i], self.base[i] if self.base else None, scale, self.dtype)
