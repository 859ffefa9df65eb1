"""The gradient of a truncated SVD: of the triplets themselves, not of the algorithm that found them.

With A = U S Vᵀ + A⊥ and ḡ the incoming gradients, Ā = U K Vᵀ + x Vᵀ + U yᵀ:

    inside the subspace      K = diag(ḡ_S) + ½ (a + b)/(σ_j − σ_i) + ½ (a − b)/(σ_j + σ_i)   off the diagonal,
                             a = UᵀḡU − ḡUᵀU,  b = VᵀḡV − ḡVᵀV
    with the complement      [σ_i I, −A⊥; −A⊥ᵀ, σ_i I] [x_i; y_i] = [P_U⊥ ḡU_i; P_V⊥ ḡV_i]   for every triplet

The second line is the first-order perturbation u̇⊥, v̇⊥ transposed; :mod:`coupling` solves it. A loss on σ alone needs
none of it: Ā = U diag(ḡ_S) Vᵀ.

Inside a cluster of equal σ, 0/0 counts as 0 where a + b = 0 and ḡ_S is even, as for every loss that feels the subspace
but not the basis chosen in it; otherwise the gradient does not exist, and an error says so. The matrix A_k = U S Vᵀ
itself has a gradient there too, but (U, S, V) cannot carry it (the symmetric part of K needs more than the diagonal
ḡ_S), so :func:`low_rank_part` is a function of its own: K = UᵀḠV.

Shape legend: B matrices; N ≥ M long and short side; K = rank.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..gradients import differentiable_once, keepable
from .alignment import reconstruct
from .coupling import complement
from .decompose import Rest, Settings, decompose, oriented
from .types import RSVD
from .workers import without_autocast


def _of_the_pair(gradient: Callable[..., Tensor]) -> Callable:
    """gradient(saved, *upstream) → Ā with the long side first, as the backward pass of a and base."""

    @functools.wraps(gradient)
    @without_autocast
    def backward(ctx, *upstream):
        if all(grad is None for grad in upstream):
            return None, None, None
        *pair, u, s, vh, rest_s, rest_v = ctx.saved_tensors  # once: activation checkpoints unpack no twice
        with torch.no_grad():
            saved = _oriented(pair, u, s, vh, Rest(rest_s, rest_v))
            grads = _to_pair(pair, gradient(saved, *upstream), ctx.needs_input_grad)
        return *differentiable_once(grads, (*pair, *upstream)), None

    return backward


class TruncatedSVD(torch.autograd.Function):
    """a, base (B, m, n) → the fields of `RSVD`; U, S and Vh are differentiable."""

    @staticmethod
    def forward(ctx, a: Tensor, base: Tensor | None, settings: Settings):
        svd, rest = decompose(a, base, settings)
        _save(ctx, a, base, svd, rest)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(svd.residual_norm, svd.frobenius_norm, svd.triplet_residual, svd.flags)
        return tuple(svd)

    @staticmethod
    @_of_the_pair
    def backward(saved, grad_u, grad_s, grad_vh, *_):
        tall, x, base, u, s, v, rest = saved
        if not s.shape[-1]:
            return u @ v.mT
        grad_v = None if grad_vh is None else grad_vh.mT
        if not tall:
            grad_u, grad_v = grad_v, grad_u
        if grad_u is None and grad_v is None:
            return (u * grad_s.unsqueeze(-2)) @ v.mT
        grad_u, grad_s, grad_v = (
            torch.zeros_like(value) if grad is None else grad for grad, value in ((grad_u, u), (grad_s, s), (grad_v, v))
        )
        core = _inside(u, s, v, grad_u, grad_s, grad_v)
        left, right = complement(x, base, u, s, v, rest, grad_u, grad_v)
        return torch.cat([u @ core + left, u], -1) @ torch.cat([v, right], -1).mT


class LowRankPart(torch.autograd.Function):
    """a, base (B, m, n) → the best approximations of rank k, (B, m, n). At full rank its gradient is the identity."""

    @staticmethod
    def forward(ctx, a: Tensor, base: Tensor | None, settings: Settings):
        svd, rest = decompose(a, base, settings)
        _save(ctx, a, base, svd, rest)
        return reconstruct(svd)

    @staticmethod
    @_of_the_pair
    def backward(saved, grad):
        tall, x, base, u, s, v, rest = saved
        grad = grad if tall else grad.mT
        if v.shape[-2] == v.shape[-1]:  # the whole matrix, zero σ included
            return grad
        across, down = grad @ v, grad.mT @ u
        # ḡU = ḠVΣ and ḡV = ḠᵀUΣ. Every triplet is solved for by itself, so Σ may come last: dependence on what is
        # beyond the rank then shows for zero σ, too.
        left, right = (side * s.unsqueeze(-2) for side in complement(x, base, u, s, v, rest, across, down))
        return torch.cat([u @ (u.mT @ across) + left, u], -1) @ torch.cat([v, right], -1).mT


def _save(ctx, a: Tensor, base: Tensor | None, svd: RSVD, rest: Rest) -> None:
    pair = [a] if base is None else [a, base]
    ctx.save_for_backward(*map(keepable, pair), svd.U, svd.S, svd.Vh, *rest)


def _oriented(
    pair: list[Tensor], u: Tensor, s: Tensor, vh: Tensor, rest: Rest
) -> tuple[bool, list[Tensor], list[Tensor], Tensor, Tensor, Tensor, Rest]:
    """(tall, x, base, u, s, v, rest), with the long side first."""
    tall = pair[0].shape[-2] >= pair[0].shape[-1]
    x, *base = ([oriented(matrix, tall) for matrix in stack] for stack in pair)
    u, v = (u, vh.mT) if tall else (vh.mT, u)
    return tall, x, base[0] if base else [], u, s, v, rest


def _to_pair(pair: list[Tensor], gradient: Tensor, needs: tuple[bool, ...]) -> tuple[Tensor | None, Tensor | None]:
    """Ā to a and −Ā to base, each in its dtype and orientation."""
    a, base = pair[0], pair[-1]
    gradient = gradient if a.shape[-2] >= a.shape[-1] else gradient.mT
    return gradient.to(a.dtype) if needs[0] else None, -gradient.to(base.dtype) if needs[1] else None


def _inside(u: Tensor, s: Tensor, v: Tensor, grad_u: Tensor, grad_s: Tensor, grad_v: Tensor) -> Tensor:
    """K (B, K, K)."""
    a, b = u.mT @ grad_u, v.mT @ grad_v
    a, b = a - a.mT, b - b.mT
    size = (grad_u.abs().amax((-2, -1)) + grad_v.abs().amax((-2, -1)))[:, None, None]
    s_i, s_j = s.unsqueeze(-1), s.unsqueeze(-2)
    uneven = (grad_s.unsqueeze(-1) - grad_s.unsqueeze(-2)).abs()
    uneven = uneven > torch.finfo(s.dtype).eps ** 0.5 * grad_s.abs().amax(-1)[:, None, None]
    difference = _quotient(
        a + b, s_j - s_i, s, size, uneven, "the loss depends on the basis chosen in a cluster of equal"
    )
    total = _quotient(a - b, s_j + s_i, s, size, torch.zeros_like(uneven), "the loss depends on the vectors of zero")
    return (difference + total) / 2 + torch.diag_embed(grad_s)


def _quotient(numerator: Tensor, denominator: Tensor, s: Tensor, size: Tensor, also: Tensor, complaint: str) -> Tensor:
    """numerator / denominator with 0/0 = 0; an error where only the denominator vanishes, or where ``also`` is set."""
    eps = torch.finfo(s.dtype).eps
    vanishes = denominator.abs() <= 16 * eps * s[:, :1, None]
    matters = vanishes & ((numerator.abs() > eps**0.5 * size) | also)
    if matters.any():
        i, j, k = matters.nonzero()[0].tolist()
        raise RuntimeError(
            f"{complaint} singular values, where it has no gradient: matrix {i} of the batch, triplets {j + 1} and "
            f"{k + 1}, σ = {s[i, j]:.6g} and {s[i, k]:.6g}. Losses on S, subspace_overlap or low_rank_part have one."
        )
    return torch.where(vanishes, 0.0, numerator / torch.where(vanishes, 1.0, denominator))
