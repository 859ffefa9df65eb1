"""What is measured on one matrix of an update: its spectrum, and the alignment of its directions.

Error bars of a leading σ. With the triplets at hand UᵀΔ = S Vᵀ, so (ΔV)ᵀΔV = S² + GᵀG with G = ΔV − US, and

    σ̃_i² ≤ σ_i² ≤ σ̃_i² + ‖G‖² + τ²        τ ≥ ‖Δ(1 − VVᵀ)‖, from `lowrank.slq.Spectrum.rest_norm`

by Weyl, and the same summed over i ≤ p by Ky Fan. ‖G‖ is in the triplets' residuals.

Shape legend: G grid points of an energy curve; D rows of a basis; K columns.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..lowrank import RSVD, Flag, principal_cosines, subspace_alignment
from ..lowrank.decompose import Settings, decompose_group, oriented
from ..lowrank.metrics import SAMPLED, spectrum_and_metrics
from ..lowrank.panels import exact_gram
from ..lowrank.routes import choose
from ..lowrank.slq import Sampling, Spectrum
from ..lowrank.types import least_rounding, triplet_count

# Columns beyond the rank, and iterations. What the first saves over the second is inside the error bars of all but
# directions: of a spectrum as flat as Adam's they are 30 degrees off near the rank, which nothing would tell.
QUICK, CONVERGED = (32, 2), (64, 4)
PROBES, STEPS, MORE_STEPS = 16, 4, 12  # at least; more for the bounds on square matrices, or behind few known triplets
MOST_STEPS = 24
TOP_FRACTION = 0.01  # of the rank, whose part of the norm is told
GRAM_SIDE = 1536  # shorter sides up to which, by count, the Gram costs less than the products it stands for
_LOG = [10 ** (i / 12) for i in range(-36, 0)]
GRID = sorted({0.0, 1.0, *_LOG, *(1 - f for f in _LOG)})  # rank fractions of energy curves: f with each 1 − f


class Options(NamedTuple):
    """What to compute."""

    rank: int = 64
    ks: tuple[int, ...] = (1, 8, 64)  # subspaces whose alignment is followed
    exact: bool = False  # the whole spectrum of every matrix
    seed: int = 0
    device: str | None = None  # where to compute; None is the CPU


def spectrum_of(
    a: Tensor, b: Tensor | None, options: Options, effort: tuple[int, int] = QUICK
) -> tuple[RSVD, Spectrum, dict[str, Any], float | None]:
    """(factors, spectrum, row, ‖b‖) of a − b. ‖b‖ is None unless the reading that took the Gram gave it, too."""
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
    spectrum, metrics = spectrum_and_metrics(a, b, top, sampling, svd, statistics, gram)
    # Entries or σ that fp32 does not hold are not finite, though the factors of a narrow matrix are taken in fp64.
    if not (metrics["frobenius_norm"].isfinite() and spectrum.leading.isfinite().all()):
        svd = svd._replace(flags=svd.flags | Flag.NON_FINITE)
    return svd, spectrum, _row(metrics, svd, spectrum, m, exact), base_norm


def _row(metrics: dict[str, Tensor], svd: RSVD, spectrum: Spectrum, m: int, exact: bool) -> dict[str, Any]:
    """Metrics with bounds: zeros for a matrix (short side m) that did not move, NaN and None for one not finite."""
    row = {name: value.item() for name, value in metrics.items()}
    bad = bool(svd.flags & Flag.NON_FINITE)
    if svd.flags & Flag.ZERO:
        row |= {name: 0.0 for name, value in row.items() if value != value}
    if bad:
        row |= {name: math.nan for name in row if name != "unchanged_fraction"}
        row |= {"rank_above_noise": None, "quantisation_limited": None}
    norm, errors = row.pop("frobenius_norm"), {f"{name}_error": row.pop(f"{name} error", 0.0) for name in SAMPLED}
    low, high, top_high = _bounds(svd, spectrum, row["spectral_norm"], triplet_count(TOP_FRACTION, m), exact)
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
    return row


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
    s = svd.S.double()
    gap, rest = float(svd.triplet_residual.square().sum()), spectrum.rest_norm() ** 2
    beyond = float(svd.residual_norm) ** 2  # Weyl with the Frobenius norm of the rest holds too

    def upper(count: int) -> float:
        head = float(s[:count].square().sum())
        return min(math.sqrt(head + min(gap + count * rest, beyond)), norm) + rounding

    return max(float(s[0]) - rounding, 0.0), upper(1), upper(top)


def energy_curve(spectrum: Spectrum, m: int, row: dict[str, Any]) -> list[float]:
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


def alignment_rows(svd: RSVD, final: RSVD, ks: tuple[int, ...]) -> list[dict[str, Any]]:
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
