"""Products of LoRA factors, layer by layer, and sums of them, without forming a matrix of a layer's size.

A layer's product is P = s·B·A (s scaling, A (r, in), B (out, r)). E experts in one parameter (peft's
`target_parameters`) have E products: factors are (E, r, in) and (E, out, r) here, E = 1 for a linear layer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 2.0**-12  # an eighth of what a product is rounded by in bf16

Factors = dict[str, tuple[Tensor, Tensor]]  # layer → (A (E, r, in), s·B (E, out, r)), fp32


@dataclass
class Term:
    """coefficient·P of each layer."""

    coefficient: float
    factors: Factors


def is_nonzero(term: Term) -> bool:
    """Whether it adds anything."""
    return term.coefficient != 0.0 and any(b.any() for _, b in term.factors.values())


@torch.no_grad()
def shortened(terms: list[Term]) -> Term:
    """Their sum as one product of the least rank that is within `TOLERANCE` of its norm, layer by layer.

    Products of a trained adapter at different steps have much in common: 24 of rank 8 came to ranks below 40. Of
    Σ c·B·A = (Q_b R_b)(Q_a R_a)ᵀ nothing larger than the factors is formed; fp64, for they are nearly dependent.
    """
    factors = {}
    for name in terms[0].factors:
        a = torch.cat([t.factors[name][0] for t in terms], 1).double()
        b = torch.cat([t.coefficient * t.factors[name][1] for t in terms], 2).double()
        (q_a, r_a), (q_b, r_b) = torch.linalg.qr(a.mT), torch.linalg.qr(b)
        u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
        tails = s.square().flip(-1).cumsum(-1).flip(-1).sqrt()  # the norm of all from here on
        rank = max(1, int((tails > TOLERANCE * tails[..., :1]).sum(-1).max()))
        root = s[..., :rank].sqrt()
        shorter_a, shorter_b = vh[..., :rank, :] @ q_a.mT * root.unsqueeze(-1), q_b @ u[..., :rank] * root.unsqueeze(-2)
        factors[name] = shorter_a.float(), shorter_b.float()
    return Term(1.0, factors)


def rank_of(terms: list[Term]) -> int:
    """Of the concatenated factors, the same for all layers."""
    return max(sum(t.factors[name][0].shape[1] for t in terms) for name in terms[0].factors)


def square_of_product(b: Tensor, a: Tensor) -> float:
    """‖B·A‖², from Gram matrices of the factors in fp64: nothing of size out × in."""
    a, b = a.double(), b.double()
    return max(float(((b.mT @ b) * (a @ a.mT)).sum()), 0.0)
