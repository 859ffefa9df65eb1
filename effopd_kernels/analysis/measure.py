"""What is measured on one tensor: norms in every checkpoint, and of attention and MLP matrices the spectrum of ΔW too.

Error bars of a leading σ. With the triplets at hand UᵀΔ = S Vᵀ, so (ΔV)ᵀΔV = S² + GᵀG with G = ΔV − US, and

    σ̃_i² ≤ σ_i² ≤ σ̃_i² + ‖G‖² + τ²        τ ≥ ‖Δ(1 − VVᵀ)‖, from `lowrank.slq.Spectrum.rest_norm`

by Weyl, and the same summed over i ≤ p by Ky Fan. ‖G‖ is in the triplets' residuals.

Shape legend: T checkpoints of all trajectories; G grid points of an energy curve; V tokens.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..lowrank import RSVD, Flag, ops, principal_cosines, subspace_alignment
from ..lowrank.decompose import Settings, decompose_group, oriented
from ..lowrank.metrics import SAMPLED, measured
from ..lowrank.panels import exact_gram, row_squares, squares_of_rows
from ..lowrank.routes import choose
from ..lowrank.slq import Sampling, Spectrum
from ..lowrank.statistics import add_statistics
from ..lowrank.types import least_rounding, triplet_count
from ..tensor_files import EVERY
from .checkpoints import Checkpoint
from .comparison import Comparison
from .roles import Role, role_of

# Columns beyond the rank, and iterations. What the first saves over the second is inside the error bars of all but
# directions: of a spectrum as flat as Adam's they are 30 degrees off near the rank, which nothing would tell.
QUICK, CONVERGED = (32, 2), (64, 4)
PROBES, STEPS, MORE_STEPS = 16, 4, 12  # at least; more for the bounds on square matrices, or behind few known triplets
MOST_STEPS = 24
TOP_FRACTION = 0.01  # of the rank, whose part of the norm is told
GRAM_SIDE = 1536  # shorter sides up to which, by count, the Gram costs less than the products it stands for
_LOG = [10 ** (i / 12) for i in range(-36, 0)]
GRID = sorted({0.0, 1.0, *_LOG, *(1 - f for f in _LOG)})  # rank fractions of energy curves: f with each 1 − f
BLOCK = 1 << 21  # entries of a tensor at a time, of which norms alone are wanted
TOKEN_COLUMNS = ("shift", "relative_shift", "cosine")


class Options(NamedTuple):
    """What to compute."""

    rank: int = 64
    ks: tuple[int, ...] = (1, 8, 64)  # subspaces whose alignment is followed
    exact: bool = False  # the whole spectrum of every matrix
    seed: int = 0
    device: str | None = None  # where to compute; None is the CPU


@dataclass
class Measured:
    """One tensor's contribution, small enough to send between ranks."""

    tensor: str
    rows: list[dict[str, Any]] = field(default_factory=list)  # per checkpoint and matrix
    alignment: list[dict[str, Any]] = field(default_factory=list)  # per checkpoint, matrix and k
    energy: list[tuple[str, int, list[float]]] = field(default_factory=list)  # trajectory, position, (G,)
    directions: Tensor | None = None  # (T, T) inner products of sign-aligned u₁, summed over the tensor's matrices
    tokens: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # trajectory → column → (V,)


def measure(comparison: Comparison, name: str, options: Options, embedding: bool = False) -> Measured:
    """Read one tensor in the base and in every checkpoint, one at a time, and measure it.

    Args:
        embedding: it is the token embedding; every row is measured in the last checkpoint of every trajectory.
    """
    role, shape = role_of(name), comparison.base.shapes[name][0]
    spectral = role.part in ("attention", "mlp") and len(shape) >= 2 and min(shape[-2:]) > 1
    found = (
        _spectra(comparison, name, role, options) if spectral else _sizes(comparison, name, role, options, embedding)
    )
    for row in found.rows:
        row["relative_update"] = relative(row["update_norm"], row["weight_norm"])
        if math.isnan(row["weight_norm"]):  # the base's fault: `Findings` says so
            row["non_finite"] = 0
    return found


def _spectra(comparison: Comparison, name: str, role: Role, options: Options) -> Measured:
    found, base = Measured(name), comparison.base.read(name).to(options.device)
    effort = CONVERGED if any(len(own) > 1 for own in comparison.trajectories.values()) else QUICK
    first: dict[str, dict[int, Tensor]] = {}  # trajectory → position → u₁ of every matrix
    weights: dict[int, float] = {}  # ‖W‖ of every matrix
    for trajectory, checkpoints in comparison.trajectories.items():
        last, finals = len(checkpoints) - 1, []
        for position in (last, *range(last)):  # the last first: the others' subspaces are held against its
            a, b = _pair(checkpoints[position], name, base, options.device)
            where = comparison.about(trajectory, position)
            for i, (label, place, w, x, y) in enumerate(_matrices(name, role, base, a, b)):
                named = _named(label, place, x)
                svd, spectrum, row, base_norm = _spectrum(x, y, options, effort)
                if i not in weights:  # only a bf16 checkpoint, no adapter, has a Gram: its b is the base
                    weights[i] = _norms(_statistics(w, None), w)["update_norm"] if base_norm is None else base_norm
                found.rows.append({**where, **named, **row, "weight_norm": weights[i]})
                if position == last:
                    finals.append(svd)
                if row["non_finite"] or row["update_norm"] == 0:
                    continue
                found.energy.append((trajectory, position, _energy(spectrum, min(x.shape), row)))
                found.alignment += [{**where, **named, **r} for r in _alignment(svd, finals[i], options.ks)]
                first.setdefault(trajectory, {}).setdefault(position, {})[i] = svd.U[:, 0].float().cpu()
    found.directions = _directions(comparison, first)
    return found


def _sizes(comparison: Comparison, name: str, role: Role, options: Options, embedding: bool) -> Measured:
    """Norms alone, and every token's, from blocks of rows that are read in all checkpoints while they are in cache."""
    shape, checkpoints = comparison.base.shapes[name][0], comparison.checkpoints()
    like = torch.empty(shape, device="meta")
    totals = torch.zeros(1 + len(checkpoints), 5, dtype=torch.float64, device=options.device or "cpu")
    tokens: dict[str, list[Tensor]] = {}
    for rows in _blocks(shape):
        base = comparison.base.read(name, rows).to(options.device)
        add_statistics(totals[0], _statistics(base, None))
        for total, (trajectory, position, checkpoint) in zip(totals[1:], checkpoints, strict=True):
            a, b = _pair(checkpoint, name, base, options.device, rows)
            add_statistics(total, _statistics(a, b))
            if embedding and position == len(comparison.trajectories[trajectory]) - 1:
                tokens.setdefault(trajectory, []).append(_tokens(a, b, base))
    weight_norm = _norms(totals[0], like)["update_norm"]
    return Measured(
        name,
        [
            {**comparison.about(*at), **_named(name, role, like), **_norms(total, like), "weight_norm": weight_norm}
            for total, (*at, _) in zip(totals[1:], checkpoints, strict=True)
        ],
        tokens={t: dict(zip(TOKEN_COLUMNS, torch.cat(parts, 1), strict=True)) for t, parts in tokens.items()},
    )


def _blocks(shape: tuple[int, ...]) -> list[slice]:
    """Rows together, all of them where there are no rows."""
    if len(shape) < 2 or 0 in shape:
        return [EVERY]
    step = max(1, BLOCK * shape[0] // math.prod(shape))
    return [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def relative(update: float, weight: float) -> float:
    """‖ΔW‖ / ‖W‖; infinite where W is zero, unless it still is."""
    return update / weight if weight else update * math.inf if update else 0.0


def _pair(
    checkpoint: Checkpoint, name: str, base: Tensor, device: str | None, rows: slice = EVERY
) -> tuple[Tensor, Tensor | None]:
    a, b = checkpoint.pair(name, base, rows)
    return a.to(device), None if b is None else b.to(device)


def _matrices(name: str, role: Role, w: Tensor, a: Tensor, b: Tensor | None) -> Iterator[tuple]:
    """(name, role, w, a, b) of every matrix: a stack of experts one by one."""
    if w.ndim == 2:
        yield name, role, w, a, b
        return
    stacks = [[None] * w.shape[:-2].numel() if t is None else t.reshape(-1, *w.shape[-2:]).unbind() for t in (w, a, b)]
    for i, matrices in enumerate(zip(*stacks, strict=True)):
        yield f"{name}[{i}]", role._replace(expert=i), *matrices


def _named(name: str, role: Role, like: Tensor) -> dict[str, Any]:
    return {
        "tensor": name,
        "layer": role.layer,
        "type": role.type,
        "part": role.part,
        "expert": role.expert,
        "parameters": like.numel(),
    }


def _statistics(a: Tensor, b: Tensor | None) -> Tensor:
    """Those of `ops.stats` (5,), in full, for any shape."""
    x, y = (None if t is None else t.reshape(-1, t.shape[-1] if t.ndim else 1) for t in (a, b))
    return ops.stats([x], [] if y is None else [y], True)[0]


def _norms(statistics: Tensor, like: Tensor) -> dict[str, Any]:
    """The update's norm, the share that did not move, and what is wrong with it."""
    squares, largest, unchanged, _, bad = statistics.tolist()
    bad = int(bad) or int(not math.isfinite(largest))
    return {
        "update_norm": math.nan if bad else math.sqrt(squares),
        "unchanged_fraction": unchanged / like.numel(),
        "non_finite": bad,
    }


def _spectrum(
    a: Tensor, b: Tensor | None, options: Options, effort: tuple[int, int] = QUICK
) -> tuple[RSVD, Spectrum, dict[str, Any], float | None]:
    """(factors, spectrum, row, ‖b‖) of a − b. The row has metrics with bounds: zeros, not NaN, for a matrix that did
    not move. ‖b‖ is None unless the reading that took the Gram gave it, too.
    """
    n, m = max(a.shape), min(a.shape)
    top = triplet_count(TOP_FRACTION, m)
    rank = min(max(options.rank, top), m)  # the top are known one by one
    settings = Settings(rank, *effort, seed=options.seed)
    statistics = torch.zeros(6, dtype=torch.float64, device=a.device)
    exact = options.exact or choose(a, rank, settings.width(m)) in ("direct", "exact")
    gram = None if exact or m > GRAM_SIDE else exact_gram(*_tall(a, b), statistics)
    statistics, base_square = statistics[:5], statistics[5]
    base_norm = None
    if gram is not None:
        base_norm = math.sqrt(base_square) if base_square.isfinite() else math.nan
    grams = None if gram is None else gram.unsqueeze(0)
    found, _ = decompose_group([a], [] if b is None else [b], settings, statistics.unsqueeze(0), grams)
    svd = RSVD(*(field[0] for field in found))
    steps = STEPS if n >= 2 * m and rank >= 64 else MORE_STEPS
    sampling = None if exact else Sampling(PROBES, steps, MOST_STEPS, options.seed)
    spectrum, metrics = measured(a, b, top, sampling, svd, statistics, gram)
    row = {name: value.item() for name, value in metrics.items()}
    # Entries or σ that fp32 does not hold are not finite, though the factors of a narrow matrix are taken in fp64.
    bad = not (math.isfinite(row["frobenius_norm"]) and spectrum.leading.isfinite().all())
    if svd.flags & Flag.ZERO:
        row |= {name: 0.0 for name, value in row.items() if value != value}
    if bad:
        row |= {name: math.nan for name in row if name != "unchanged_fraction"}
        row |= {"rank_above_noise": None, "quantisation_limited": None}
        svd = svd._replace(flags=svd.flags | Flag.NON_FINITE)
    norm, errors = row.pop("frobenius_norm"), {f"{name}_error": row.pop(f"{name} error", 0.0) for name in SAMPLED}
    low, high, top_high = _bounds(svd, spectrum, row["spectral_norm"], top, exact)
    unit = norm or 1.0
    row = {
        "update_norm": norm,
        "non_finite": int(bad),
        **row,
        "spectral_norm_low": low,
        "spectral_norm_high": high,
        "spectral_to_frobenius_low": low / unit,
        "spectral_to_frobenius_high": high / unit,
        "top_fraction_norm_ratio_high": min(top_high / unit, 1.0),
        **errors,
        "spectrum": "exact" if exact else "sampled",
    }
    if (count := row["rank_above_noise"]) is not None:
        spread = 2 * row["rank_above_noise_error"]
        ends = max(count - spread, 0.0), min(count + spread, float(m))
        row["rank_above_noise_low"], row["rank_above_noise_high"] = ends
    return svd, spectrum, row, base_norm


def _tall(a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    tall = a.shape[0] >= a.shape[1]
    return oriented(a, tall), None if b is None else oriented(b, tall)


def _bounds(svd: RSVD, spectrum: Spectrum, first: float, top: int, exact: bool) -> tuple[float, float, float]:
    """(lower, upper) for σ₁ and the upper for ‖Δ_top‖_F."""
    norm = float(svd.frobenius_norm)
    rounding = float(svd.rounding())
    if math.isnan(first) or norm == 0:
        return first, first, norm
    if exact:
        return first - rounding, first + rounding, float(torch.linalg.vector_norm(spectrum.leading[:top])) + rounding
    s, gap, rest = svd.S.double(), float(svd.triplet_residual.square().sum()), spectrum.rest_norm() ** 2
    beyond = float(svd.residual_norm) ** 2  # Weyl with the Frobenius norm of the rest holds too

    def upper(count: int) -> float:
        head = float(s[:count].square().sum())
        return min(math.sqrt(head + min(gap + count * rest, beyond)), norm) + rounding

    return max(float(s[0]) - rounding, 0.0), upper(1), upper(top)


def _energy(spectrum: Spectrum, m: int, row: dict[str, Any]) -> list[float]:
    """‖Δ_r‖_F / ‖Δ‖_F at r = ⌈fraction · m⌉, as the top fraction counts, for the fractions of `GRID`; beyond the known
    σ, from the sampled density.
    """
    squares = spectrum.leading.double().square().cpu()
    if len(squares) < m and spectrum.nodes is not None:
        nodes, order = spectrum.nodes.flatten().sort(descending=True)
        reached = spectrum.weights.flatten()[order].cumsum(0) / len(spectrum.nodes)
        index = torch.searchsorted(reached, torch.arange(m - len(squares), dtype=torch.float64).to(reached) + 0.5)
        rest = nodes[index.clamp_max(len(nodes) - 1)].square().cpu()
        left = max(row["update_norm"] ** 2 - float(squares.sum()), 0.0)
        squares = torch.cat([squares, rest * (left / float(rest.sum()) if rest.any() else 0.0)])
    reached = torch.cat([squares.new_zeros(1), squares.cumsum(0)])
    reached = (reached / reached[-1]).clamp_max(1)
    return reached[[triplet_count(fraction, m) for fraction in GRID]].sqrt().tolist()


def _alignment(svd: RSVD, final: RSVD, ks: tuple[int, ...]) -> list[dict[str, Any]]:
    """Per k: the paper's mean |cos(u_i, u_i,final)|, principal angles, and what chance would give. Only up to the rank
    of both: a LoRA update of rank 16 has no 64 directions.
    """
    if final.flags & (Flag.NON_FINITE | Flag.ZERO):
        return []
    u, rows = svd.U, []
    ranks = [int((least_rounding(s.frobenius_norm, s.S.dtype) < s.S).sum()) for s in (svd, final)]
    for k in ks:
        if k > min(*ranks, u.shape[0] // 2):  # of half a space or more any two subspaces align
            continue
        itself = svd is final
        cosines = torch.ones(k) if itself else principal_cosines(u, final.U, k)
        angle = 0.0 if itself else _largest_angle(u[:, :k].double(), final.U[:, :k].double(), float(cosines[-1]))
        rows.append(
            {
                "k": k,
                "mean_cosine": 1.0 if itself else float(subspace_alignment(u, final.U, k)),
                "mean_principal_cosine": float(cosines.mean()),
                "largest_angle_degrees": math.degrees(angle),
                "chance_cosine": math.sqrt(2 / (math.pi * u.shape[0])),
            }
        )
    return rows


def _largest_angle(u: Tensor, v: Tensor, cosine: float) -> float:
    """In radians, between the spans of orthonormal columns (D, K), fp64; of small ones the sine knows more than the
    cosine, whose last place is worth 0.02 degrees in fp32.
    """
    rest = u - v @ (v.mT @ u)
    sine = math.sqrt(max(0.0, float(torch.linalg.eigvalsh(rest.mT @ rest)[-1])))
    return math.atan2(sine, cosine)


def _directions(comparison: Comparison, first: dict[str, dict[int, dict[int, Tensor]]]) -> Tensor:
    """(T, T) inner products of u₁, its sign turned towards the trajectory's last one, and that towards the first
    trajectory's. A checkpoint whose update has no direction counts as zero.
    """
    order = [(t, i) for t, i, _ in comparison.checkpoints()]
    products = torch.zeros(len(order), len(order), dtype=torch.float64)
    matrices = sorted({i for positions in first.values() for own in positions.values() for i in own})
    for i in matrices:
        held = {(t, p): own[i].double() for t, positions in first.items() for p, own in positions.items() if i in own}
        zero = torch.zeros_like(next(iter(held.values())))
        lasts = {t: held.get((t, len(c) - 1), zero) for t, c in comparison.trajectories.items()}
        reference = next(iter(lasts.values()))
        lasts = {t: -u if u @ reference < 0 else u for t, u in lasts.items()}
        aligned = [held.get(key, zero) for key in order]
        aligned = torch.stack([-u if u @ lasts[t] < 0 else u for (t, _), u in zip(order, aligned, strict=True)])
        products += aligned @ aligned.mT
    return products


def _tokens(a: Tensor, b: Tensor | None, base: Tensor) -> Tensor:
    """`TOKEN_COLUMNS` (3, V) fp64: per token ‖Δe‖, ‖Δe‖/‖e‖ and cos(e_t, e_0). Of a row that was zero and no longer is
    the second is infinite; of one that was or became zero the third is NaN.

    1 − cos = (‖Δ‖² − (‖e_t‖ − ‖e_0‖)²) / (2 ‖e_t‖ ‖e_0‖) keeps small angles, which the product of unit vectors loses.
    """
    # Of an update that is given as such the weight is base + a.
    squares = squares_of_rows(a, base.float() + a, base) if b is None else row_squares(a, b)
    shift, after, length = squares.sqrt().unbind(1)
    still = shift == 0
    cosine = 1 - torch.where(still, 0.0, (shift.square() - (after - length).square()) / (2 * length * after))
    return torch.stack([shift, torch.where(still, 0.0, shift / length), cosine.clamp(-1, 1)]).cpu()
