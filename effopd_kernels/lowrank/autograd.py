"""The gradient of a truncated SVD: of the triplets themselves, not of the algorithm that found them.

With A = U S Vᵀ + A⊥ and ḡ the incoming gradients, Ā = U K Vᵀ + x Vᵀ + U yᵀ:

    inside the subspace      K = diag(ḡ_S) + ½ (a + b)/(σ_j − σ_i) + ½ (a − b)/(σ_j + σ_i)   off the diagonal,
                             a = UᵀḡU − ḡUᵀU,  b = VᵀḡV − ḡVᵀV
    with the complement      [σ_i I, −A⊥; −A⊥ᵀ, σ_i I] [x_i; y_i] = [P_U⊥ ḡU_i; P_V⊥ ḡV_i]   for every triplet

The second line is the first-order perturbation u̇⊥, v̇⊥ transposed; :mod:`coupling` solves it. A loss on σ alone needs
none of it: Ā = U diag(ḡ_S) Vᵀ.

All of it holds for triplets of A, and what the forward pass found are near ones: an error of a triplet is multiplied by
1/(σ_i − σ_{k+1}). Where its residual is more than `RESOLVED` of that gap, backward first factors the matrix anew, more
closely, and turns what comes for the complement from the one basis to the other.

Inside a cluster of equal σ, 0/0 counts as 0 where a + b = 0 and ḡ_S is even, as for every loss that feels the subspace
but not the basis chosen in it; otherwise the gradient of a loss on vectors does not exist, and an error says so. The
matrix A_k = U S Vᵀ itself has a gradient there too, but (U, S, V) cannot carry it (the symmetric part of K needs more
than the diagonal ḡ_S), so :func:`low_rank_part` is a function of its own: K = UᵀḠV.

Shape legend: B matrices; N ≥ M long and short side; K = rank.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..gradients import differentiable_once, keepable
from .alignment import reconstruct
from .coupling import complement
from .decompose import Rest, Settings, decompose, decompose_group, oriented
from .types import RSVD, least_rounding
from .workers import side_by_side, without_autocast

RESOLVED = 1e-2  # part of the gap beyond the rank: the relative error of a gradient is about as large
CLOSER = 1e-4  # residuals of a further decomposition, over σ; what that does not resolve is factored in full,
FULL_SIDE = 2048  # up to this short side: beyond it takes minutes


class _Saved(NamedTuple):
    """Of B matrices, the long side first."""

    tall: bool
    x: list[Tensor]
    base: list[Tensor]
    u: Tensor
    s: Tensor
    v: Tensor
    rest: Rest
    residual: Tensor  # (B, K) fp64, of the triplets
    rounding: Tensor  # (B, 1) fp64, below which no residual comes
    settings: Settings


def _of_the_pair(gradient: Callable[..., Tensor]) -> Callable:
    """gradient(saved, *upstream) → Ā with the long side first, as the backward pass of a and base."""

    @functools.wraps(gradient)
    @without_autocast
    def backward(ctx, *upstream):
        if all(grad is None for grad in upstream):
            return None, None, None
        *pair, u, s, vh, rest_s, rest_v, residual, norm = ctx.saved_tensors  # once: checkpoints unpack no twice
        with torch.no_grad():
            saved = _oriented(pair, u, s, vh, Rest(rest_s, rest_v), residual, norm, ctx.settings)
            grads = _to_pair(pair, gradient(saved, *upstream), ctx.needs_input_grad)
        return *differentiable_once(grads, (*pair, *upstream)), None

    return backward


class TruncatedSVD(torch.autograd.Function):
    """a, base (B, m, n) → the fields of `RSVD`; U, S and Vh are differentiable."""

    @staticmethod
    def forward(ctx, a: Tensor, base: Tensor | None, settings: Settings):
        svd, rest = decompose(a, base, settings)
        _save(ctx, a, base, svd, rest, settings)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(svd.residual_norm, svd.frobenius_norm, svd.triplet_residual, svd.flags)
        return tuple(svd)

    @staticmethod
    @_of_the_pair
    def backward(saved, grad_u, grad_s, grad_vh, *_):
        u, s, v = saved.u, saved.s, saved.v
        if not s.shape[-1]:
            return u @ v.mT
        grad_v = None if grad_vh is None else grad_vh.mT
        if not saved.tall:
            grad_u, grad_v = grad_v, grad_u
        if grad_u is None and grad_v is None:
            return (u * grad_s.unsqueeze(-2)) @ v.mT
        grad_u, grad_s, grad_v = (
            torch.zeros_like(value) if grad is None else grad for grad, value in ((grad_u, u), (grad_s, s), (grad_v, v))
        )
        # Inside the subspace by the vectors that the loss is of, where nothing then cancels that a loss does not feel.
        core = _inside(u, s, v, grad_u, grad_s, grad_v)
        found, turns = _resolved(saved, (grad_u != 0).any(-2) | (grad_v != 0).any(-2))
        if turns:
            grad_u, grad_v = grad_u.clone(), grad_v.clone()
        for i, turn in turns.items():
            grad_u[i], grad_v[i] = grad_u[i] @ turn, grad_v[i] @ turn
        left, right = _complement(found, grad_u, grad_v)
        return torch.cat([u @ core, left, found.u], -1) @ torch.cat([v, found.v, right], -1).mT


class LowRankPart(torch.autograd.Function):
    """a, base (B, m, n) → the best approximations of rank k, (B, m, n). At full rank its gradient is the identity."""

    @staticmethod
    def forward(ctx, a: Tensor, base: Tensor | None, settings: Settings):
        svd, rest = decompose(a, base, settings)
        _save(ctx, a, base, svd, rest, settings)
        return reconstruct(svd)

    @staticmethod
    @_of_the_pair
    def backward(saved, grad):
        grad = grad if saved.tall else grad.mT
        if saved.v.shape[-2] == saved.v.shape[-1]:  # the whole matrix, zero σ included
            return grad
        if not saved.s.shape[-1]:
            return torch.zeros_like(grad)
        saved, _ = _resolved(saved, (grad != 0).any(-1).any(-1, keepdim=True).expand_as(saved.s))
        u, s, v = saved.u, saved.s, saved.v
        across, down = grad @ v, grad.mT @ u
        # ḡU = ḠVΣ and ḡV = ḠᵀUΣ. Every triplet is solved for by itself, so Σ may come last: dependence on what is
        # beyond the rank then shows for zero σ, too.
        left, right = (side * s.unsqueeze(-2) for side in _complement(saved, across, down))
        return torch.cat([u @ (u.mT @ across) + left, u], -1) @ torch.cat([v, right], -1).mT


def _save(ctx, a: Tensor, base: Tensor | None, svd: RSVD, rest: Rest, settings: Settings) -> None:
    pair, ctx.settings = [a] if base is None else [a, base], settings
    bounds = svd.triplet_residual, svd.frobenius_norm
    ctx.save_for_backward(*map(keepable, pair), svd.U, svd.S, svd.Vh, *rest, *bounds)


def _oriented(
    pair: list[Tensor], u: Tensor, s: Tensor, vh: Tensor, rest: Rest, residual: Tensor, norm: Tensor, settings: Settings
) -> _Saved:
    tall = pair[0].shape[-2] >= pair[0].shape[-1]
    x, *base = ([oriented(matrix, tall) for matrix in stack] for stack in pair)
    u, v = (u, vh.mT) if tall else (vh.mT, u)
    rounding = 2 * least_rounding(norm, s.dtype).unsqueeze(-1)
    return _Saved(tall, x, base[0] if base else [], u, s, v, rest, residual, rounding, settings)


def _complement(saved: _Saved, grad_u: Tensor, grad_v: Tensor) -> tuple[Tensor, Tensor]:
    return complement(saved.x, saved.base, saved.u, saved.s, saved.v, saved.rest, grad_u, grad_v)


def _resolved(saved: _Saved, used: Tensor) -> tuple[_Saved, dict[int, Tensor]]:
    """The same with triplets of which those that are ``used`` (B, K) are told from what is beyond the rank, as far as
    that can be had; and by the index of each matrix that was factored anew for it, the rotation (K, K) that takes what
    comes for the former triplets to the latter.

    Raises RuntimeError where the gap is too small for it.
    """
    found, settings, anew = saved, saved.settings._replace(oversample=None), set()
    further = [{"tol": min(settings.tol or CLOSER, CLOSER)}]
    if saved.v.shape[-2] <= FULL_SIDE:
        further.append({"route": "exact"})
    for how in further:
        if lacking := _unresolved(found, used, RESOLVED).nonzero()[:, 0].tolist():
            found = _factored_anew(found, lacking, settings._replace(**how))
            anew.update(lacking)
    if (lost := _unresolved(found, used, 10 * RESOLVED).nonzero()[:, 0]).numel():
        i = int(lost[0])
        raise RuntimeError(
            f"the {saved.s.shape[-1]} leading triplets of matrix {i} of the batch are not told from those beyond (σ = "
            f"{found.s[i, -1]:.6g} and {found.rest.s[i, 0]:.6g}), so their gradient is not known: choose a rank at a "
            "gap of the spectrum, or route='exact'."
        )
    return found, {i: _turn(saved, found, i) for i in sorted(anew)}


def _turn(before: _Saved, now: _Saved, i: int) -> Tensor:
    """The rotation nearest to the former vectors as combinations of the latter."""
    both = before.u[i].mT @ now.u[i] + before.v[i].mT @ now.v[i]
    left, _, right = torch.linalg.svd(both.double())
    return (left @ right).to(both.dtype)


def _unresolved(saved: _Saved, used: Tensor, share: float) -> Tensor:
    """(B,): whether the residual of one that is used is more than a ``share`` of the gap, and not only rounding. Where
    nothing is known of what is beyond the rank, the gap counts as none.
    """
    known = saved.rest.s.shape[-1] > 0 or saved.s.shape[-1] == saved.v.shape[-2]
    beyond = saved.rest.s[:, :1] if saved.rest.s.shape[-1] else torch.zeros_like(saved.s[:, :1])
    gap = (saved.s - beyond).double() if known else 0.0
    return (used & (saved.residual > share * gap) & (saved.residual > saved.rounding)).any(-1)


def _factored_anew(saved: _Saved, which: list[int], settings: Settings) -> _Saved:
    pairs = [([saved.x[i]], [saved.base[i]] if saved.base else []) for i in which]
    factor = side_by_side if saved.s.device.type == "cpu" else map
    fields = {name: getattr(saved, name).clone() for name in ("u", "s", "v", "residual")}
    rest = Rest(*(t.clone() for t in saved.rest))
    for i, (svd, beyond) in zip(which, factor(lambda pair: decompose_group(*pair, settings), pairs), strict=True):
        found = {"u": svd.U, "s": svd.S, "v": svd.Vh.mT, "residual": svd.triplet_residual}
        for name, value in found.items():
            fields[name][i] = value[0]
        if rest.s.shape[-1] < beyond.s.shape[-1]:  # of the others nothing is known there, as zeros say
            more = beyond.s.shape[-1] - rest.s.shape[-1]
            rest = Rest(*(torch.nn.functional.pad(t, (0, more)) for t in rest))
        for t, value in zip(rest, beyond, strict=True):
            t[i] = 0
            t[i, ..., : value.shape[-1]] = value[0]
    return saved._replace(**fields, rest=rest)


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
