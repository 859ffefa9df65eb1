"""The truncated SVD of a group of equally shaped differences: first pass, basis, final projection, certificates.

    Q from one of three routes;   Y = X Q = U₀ R;   XᵀU₀ = V S Wᵀ;   U = U₀ W;   ρ = ‖X V − U S‖ by column

Xᵀu_i = σ_i v_i by construction, so σ̃_i ≤ σ_i and ‖X‖² − Σσ̃² is the squared norm of what was left out; the last product
measures how far the triplets are from being singular. The factorisation proper happens on the short side. A fourth
route is LAPACK's SVD of the whole.

Shape legend: B matrices; N ≥ M long and short side; L sketch columns; K′ of them kept for the projection; K = rank.
"""

import functools
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import wide
from . import ops, orth, panels, routes, signs
from .difference import Difference, resolves
from .statistics import MAX_ABS, NON_FINITE, SUM_SQUARES
from .types import BIASED, ROUNDING, RSVD, Flag, least_rounding
from .workers import side_by_side

NARROW = 16  # short sides below which fp32 input is factored in fp64
MAX_ROUNDS = 8  # of power iterations, while `tol` is not met
TOGETHER = 32  # small matrices of the CPU; of all that is done with them no bit depends on the others
_SCALE_BEYOND = 40  # |log₂ max |Δ|| up to which fp32 squares and their sums are safe as they are


class Settings(NamedTuple):
    """What :func:`batched_rsvd` was asked for, checked."""

    rank: int
    oversample: int | None = None
    power_iters: int = 2
    tol: float | None = None
    seed: int = 0
    route: str | None = None

    def width(self, m: int) -> int:
        """Columns L of the sketch for a short side m; unless told, a multiple of 16, which products like."""
        if self.oversample is None:
            return min(m, _multiple_of_16(self.rank + max(self.rank, 32)))
        return min(m, self.rank + self.oversample)

    def kept(self, width: int) -> int:
        """Columns K′ of the projection: half of the oversampling has done its work in the iterations."""
        return min(width, _multiple_of_16((self.rank + width + 1) // 2))


def _multiple_of_16(x: int) -> int:
    return -(-x // 16) * 16


class Rest(NamedTuple):
    """Ritz pairs beyond the rank: they precondition the gradient's solve."""

    s: Tensor  # (B, K′ − K)
    v: Tensor  # (B, M, K′ − K), on the short side


def decompose(a: Tensor, base: Tensor | None, settings: Settings) -> tuple[RSVD, Rest]:
    """Factor a (B, m, n) − base. On CPU side by side, such that none depends on its batch; elsewhere as one group."""
    if not len(a):
        m, n = a.shape[-2:]
        svd, rest = _blank(0, max(m, n), min(m, n), settings, wide(a), a.device)
        return svd if m >= n else svd.mT, rest
    x, y = a.detach(), None if base is None else base.detach()
    size = len(a)
    if a.device.type == "cpu":  # small ones share the time that steps take to start
        size = TOGETHER if settings.route is None and routes.small(a) else 1
    groups = [(list(x[i : i + size]), [] if y is None else list(y[i : i + size])) for i in range(0, len(x), size)]
    factor = side_by_side if a.device.type == "cpu" else map
    svds, rests = zip(*factor(lambda group: decompose_group(*group, settings), groups), strict=True)
    return RSVD(*map(torch.cat, zip(*svds, strict=True))), Rest(*map(torch.cat, zip(*rests, strict=True)))


def decompose_group(
    x: list[Tensor],
    base: list[Tensor],
    settings: Settings,
    statistics: Tensor | None = None,
    known_gram: Tensor | None = None,
) -> tuple[RSVD, Rest]:
    """Factor x_b − base_b, all (m, n), without stacking them. Fields lead with (B,).

    Args:
        statistics: (B, 5) fp64, where those of `ops.stats` are put, in full, from the same reading as the first pass.
        known_gram: (B, M, M), the Gram on the short side, from a reading that has filled in ``statistics``.
    """
    tall = x[0].shape[0] >= x[0].shape[1]
    pair = Difference([oriented(v, tall) for v in x], [oriented(v, tall) for v in base], known_gram=known_gram)
    if settings.route is None:  # by the dtype given: what is narrow goes on in fp64
        settings = settings._replace(route=routes.choose(x[0], settings.rank, settings.width(min(x[0].shape))))
    if min(x[0].shape) < NARROW and x[0].dtype != torch.float64:
        if statistics is not None:
            statistics.copy_(ops.stats(pair.x, pair.base, True))
        return _in_double(x, base, settings)
    svd, rest = _decompose_tall(pair, settings, statistics)
    return with_signs(svd if tall else svd.mT), rest


def _decompose_tall(x: Difference, settings: Settings, wanted: Tensor | None) -> tuple[RSVD, Rest]:
    """As `decompose_group`; those that are zero or not finite are set apart."""
    (n, m), k = x.x[0].shape, settings.rank
    start, statistics = _first_pass(x, settings, wanted)
    frobenius, largest = statistics[:, SUM_SQUARES].sqrt(), statistics[:, MAX_ABS]
    bad = (statistics[:, NON_FINITE] > 0) | ~largest.isfinite()
    zero = ~bad & (largest == 0)
    if k and not (bad | zero).any():
        return _factor(x, start, frobenius, largest, settings)

    svd, rest = _blank(len(x.x), n, m, settings, x.dtype, frobenius.device)
    svd.frobenius_norm.copy_(frobenius)
    if not k:
        svd.residual_norm.copy_(frobenius + least_rounding(frobenius, x.dtype))
    svd.flags[zero] = int(Flag.ZERO | Flag.RANK_DEFICIENT) if k else int(Flag.ZERO)
    for field in svd[:-1]:
        field[bad] = float("nan")
    svd.flags[bad] = int(Flag.NON_FINITE)
    index = (~bad & ~zero).nonzero()[:, 0]
    if k and len(index):
        some = Difference(*([group[i] for i in index.tolist() if group] for group in (x.x, x.base)))
        start = None if start is None else start[index]
        found = _factor(some, start, frobenius[index], largest[index], settings)
        for fields, values in zip((svd, rest), found, strict=True):
            for field, value in zip(fields, values, strict=True):
                field[index] = value
    return svd, rest


def _first_pass(x: Difference, settings: Settings, wanted: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """(XᵀX Ω of the unscaled X where iterations start from it, statistics (B, 5)), from one reading of the pair or,
    with its Gram, none. The statistics are in full, and put into ``wanted`` too, where that is given.
    """
    if x.known_gram is not None:
        return None, wanted
    start, full = None, wanted is not None
    if settings.rank and settings.route == "subspace" and settings.power_iters:
        start, statistics = ops.sketch(x.x, x.base, settings.width(x.x[0].shape[1]), settings.seed, full)
    else:
        statistics = ops.stats(x.x, x.base, full)
    if full:
        wanted.copy_(statistics)
    return start, statistics


def _factor(
    x: Difference, start: Tensor | None, frobenius: Tensor, largest: Tensor, settings: Settings
) -> tuple[RSVD, Rest]:
    """The SVD of nonzero, finite x, scaled to where fp32 can square entries."""
    scale = power_of_two(largest)
    if (scale != 1).any():
        start, x = None, replace(x, known_gram=None)  # both were taken of the unscaled X
    x = replace(x, scale=scale)
    if x.known_gram is not None and settings.tol is None:
        found = _from_gram(x, frobenius, settings)
        if found is not None:
            return found
        x = replace(x, known_gram=None)
    if settings.route == "direct":
        svd, rest = _direct(x, frobenius * scale, settings)
    else:
        q = _first_basis(x, start, settings)
        svd, rest = _triplets(x, q, frobenius * scale, settings, may_iterate=settings.route != "exact")
    return _unscaled(svd, rest, scale, settings.kept(settings.width(x.x[0].shape[1])) - settings.rank)


def _from_gram(x: Difference, frobenius: Tensor, settings: Settings) -> tuple[RSVD, Rest] | None:
    """Rayleigh–Ritz in a right subspace V, as cheap iterations with G = XᵀX leave it: X V = U S by construction, and
    Xᵀu_i − σ_i v_i is (G v_i − σ_i² v_i) / σ_i. None where G's rounding would show in σ_k. Nothing beyond the rank,
    not even whether σ_k is clustered.
    """
    k, width, scale = settings.rank, settings.width(x.x[0].shape[1]), frobenius.unsqueeze(-1)
    q = orth.basis(torch.stack([panels.times_signs(g, width, settings.seed) for g in x.known_gram]))
    q = orth.orthonormal(routes.iterate(x.gram_apply, q, settings.power_iters, k, settings.kept(width)))[..., :k]
    u, s, w = orth.svd_of_tall(x.apply(q), k)
    if not resolves(frobenius, s[:, -1]).all():
        return None
    v = orth.times(q, w.double())
    gap = torch.addcmul(x.gram_apply(v), v, s.square().to(v.dtype).unsqueeze(-2), value=-1)
    rounding = least_rounding(scale, v.dtype)
    rho = (gap.double().square().sum(-2).sqrt() + rounding * scale) / s + rounding
    residual = _residual_norm(x, u, s.to(u.dtype), v, frobenius, torch.finfo(v.dtype).eps)
    flags = _flags(s, k, rounding, torch.ones_like(frobenius, dtype=torch.bool))
    svd = RSVD(u, s.to(u.dtype), v.mT, residual, frobenius, rho, flags)
    return svd, Rest(s[:, :0].to(u.dtype), v[..., :0])


def with_signs(svd: RSVD) -> RSVD:
    """The same triplets, in place, such that the largest |u_i| is positive."""
    if svd.U.numel():
        sign = torch.where(-svd.U.amin(-2, keepdim=True) > svd.U.amax(-2, keepdim=True), -1.0, 1.0).to(svd.U.dtype)
        svd.U.mul_(sign)
        svd.Vh.mul_(sign.mT)
    return svd


def _in_double(x: list[Tensor], base: list[Tensor], settings: Settings) -> tuple[RSVD, Rest]:
    """Products with a handful of columns sum thousands of entries one by one, which fp32 does not bear."""
    svd, rest = decompose_group([v.double() for v in x], [v.double() for v in base], settings)
    rounding = least_rounding(svd.frobenius_norm, torch.float32)
    svd = svd._replace(
        U=svd.U.float(),
        S=svd.S.float(),
        Vh=svd.Vh.float(),
        residual_norm=svd.residual_norm + rounding,
        triplet_residual=svd.triplet_residual + rounding.unsqueeze(-1),
    )
    return svd, Rest(*(v.float() for v in rest))


def oriented(v: Tensor, tall: bool) -> Tensor:
    """The long side first, one stride 1."""
    v = v.detach() if 1 in v.stride() else v.detach().contiguous()
    return v if tall else v.mT


def power_of_two(largest: Tensor) -> Tensor:
    """(B,) exact scales that bring entries as small as 1e-25 or as large as 1e30 to where fp32 can square them; 1 for
    usual ones.
    """
    exponent = largest.clamp_min(torch.finfo(torch.float32).tiny).log2().floor().clamp(-126, 126)
    return torch.where(exponent.abs() > _SCALE_BEYOND, torch.exp2(-exponent), 1.0)


def _first_basis(x: Difference, start: Tensor | None, settings: Settings) -> Tensor:
    """Q (B, M, L), by the route that was chosen; ``start`` is XᵀX Ω where that was taken."""
    m = x.x[0].shape[1]
    width = settings.width(m)
    kept, iterations = settings.kept(width), settings.power_iters
    if settings.route == "exact":
        return routes.exact(x, kept)
    omega = signs.dense(settings.seed, m, width, x.x[0].device, x.dtype).expand(len(x.x), m, width)
    if settings.route == "gram":
        return routes.gram(x, omega, iterations, settings.rank, kept)
    if iterations == 0:
        return omega
    if start is None:
        start = x.gram_apply(omega, fast=True)
    apply, half = functools.partial(x.gram_apply, fast=True), x.dtype == torch.float32
    return routes.iterate(apply, orth.basis(start), iterations - 1, settings.rank, kept, half)


def _direct(x: Difference, frobenius: Tensor, settings: Settings) -> tuple[RSVD, Rest]:
    """The SVD of the whole difference in fp64: all that is off is its rounding to X's dtype."""
    k, kept, dtype = settings.rank, settings.kept(settings.width(x.x[0].shape[1])), x.dtype
    # One by one: LAPACK's bits may depend on where in memory a matrix lies.
    alone = (torch.linalg.svd(x.dense(i).double(), full_matrices=False) for i in range(len(x.x)))
    u, s, vh = map(torch.stack, zip(*alone, strict=True))
    rounding = least_rounding(frobenius, dtype)
    residual = torch.linalg.vector_norm(s[:, k:], dim=-1) + rounding
    triplets = rounding.unsqueeze(-1).repeat(1, k)
    flags = _flags(s[:, :kept], k, rounding.unsqueeze(-1), torch.ones_like(frobenius, dtype=torch.bool))
    u, s, vh = u[..., :k].to(dtype), s[:, :kept].to(dtype), vh[:, :kept].to(dtype)
    return RSVD(u, s[:, :k], vh[:, :k], residual, frobenius, triplets, flags), Rest(s[:, k:], vh[:, k:].mT)


def _triplets(x: Difference, q: Tensor, frobenius: Tensor, settings: Settings, may_iterate: bool) -> tuple[RSVD, Rest]:
    """Rayleigh–Ritz in span(q), certified; while ``tol`` is not met, iterate on."""
    k, tol = settings.rank, settings.tol
    eps = torch.finfo(q.dtype).eps
    rounding = least_rounding(frobenius, q.dtype).unsqueeze(-1)
    for _ in range(MAX_ROUNDS):
        u, s, v = _ritz(x, q, k)
        leading = s[:, :k]
        gap = torch.addcmul(x.apply(v[..., :k]), u, leading.to(u.dtype).unsqueeze(-2), value=-1)
        rho = gap.double().square().sum(-2).sqrt() + rounding
        met = ((rho <= (tol or torch.inf) * leading) | (rho <= 2 * rounding)).all(-1)
        if met.all() or not may_iterate:
            break
        q = routes.iterate(x.gram_apply, orth.orthonormal(v), max(1, settings.power_iters), k, v.shape[-1])

    v, further = v[..., :k], v[..., k:]
    residual = _residual_norm(x, u, leading.to(u.dtype), v, frobenius, eps)
    svd = RSVD(u, leading.to(u.dtype), v.mT, residual, frobenius, rho, _flags(s, k, rounding, met))
    return svd, Rest(s[:, k:].to(u.dtype), further)


def _flags(s: Tensor, k: int, rounding: Tensor, met: Tensor) -> Tensor:
    deficient = s[:, k - 1] <= rounding[:, 0]
    flags = ~met * int(Flag.TOL_NOT_MET) + deficient * int(Flag.RANK_DEFICIENT)
    if s.shape[-1] > k:
        flags += (~deficient & (s[:, k] > 0.999 * s[:, k - 1])) * int(Flag.CLUSTERED)
    return flags.int()


def _ritz(x: Difference, q: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(U of the k leading triplets, σ of all in fp64, V of all) of U₀U₀ᵀX, U₀ = orth(X q). Beyond k those at rounding
    level are zero.
    """
    if x.dtype == torch.float32:
        y, z = x.project(q)
        found = orth.svd_of_projection(y, z, k)
        if found is not None:
            return found
    else:
        y = x.apply(q)
    left = orth.orthonormal(y)
    right = x.mT.apply(left)
    v, s, w = orth.svd_of_tall(right, k)
    s[:, k:] = torch.where(s[:, k:] > 1e-4 * s[:, :1], s[:, k:], 0.0)
    further = (right @ w[..., k:]) * torch.where(s[:, k:] > 0, 1 / s[:, k:], 0.0).to(w.dtype).unsqueeze(-2)
    return orth.times(left, w[..., :k].double()), s, torch.cat([v, further], -1)


def _residual_norm(x: Difference, u: Tensor, s: Tensor, v: Tensor, frobenius: Tensor, eps: float) -> Tensor:
    """‖X − U S Vᵀ‖_F from ‖X‖² − Σs², or entry by entry where that difference would be rounding; rounded up."""
    total = frobenius.square()
    squares = total - s.double().square().sum(-1)
    norm = (squares.clamp_min(0) + 2 * BIASED * eps * total).sqrt()
    cancels = squares < 1e-4 * total
    if cancels.any():
        norm = torch.where(cancels, x.distance(u, s, v) + ROUNDING * eps * frobenius, norm)
    return norm


def _unscaled(svd: RSVD, rest: Rest, scale: Tensor, further: int) -> tuple[RSVD, Rest]:
    column = scale.unsqueeze(-1)
    svd = svd._replace(
        S=(svd.S.double() / column).to(svd.S.dtype),
        residual_norm=svd.residual_norm / scale,
        frobenius_norm=svd.frobenius_norm / scale,
        triplet_residual=svd.triplet_residual / column,
    )
    return svd, Rest(rest.s[:, :further] / column.to(rest.s.dtype), rest.v[..., :further])


def _blank(
    count: int, n: int, m: int, settings: Settings, dtype: torch.dtype, device: torch.device
) -> tuple[RSVD, Rest]:
    """The answer for zero matrices (n, m), n ≥ m: columns of the identity and zeros."""
    k, further = settings.rank, settings.kept(settings.width(m)) - settings.rank
    like = torch.empty(0, dtype=dtype, device=device)
    norm = torch.zeros(count, dtype=torch.float64, device=device)
    svd = RSVD(
        torch.eye(n, k, dtype=dtype, device=device).repeat(count, 1, 1),
        like.new_zeros(count, k),
        torch.eye(k, m, dtype=dtype, device=device).repeat(count, 1, 1),
        norm,
        norm.clone(),
        norm.new_zeros(count, k),
        norm.new_zeros(count, dtype=torch.int32),
    )
    return svd, Rest(like.new_zeros(count, further), like.new_zeros(count, m, further))
