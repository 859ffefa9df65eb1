"""How concentrated an update is, and how much of what its spectrum shows is rounding.

    p_i = σ_i / Σσ                    effective rank exp(−Σ p log p)           Roy & Vetterli 2007
    ‖Δ‖_F⁴ / ‖ΔᵀΔ‖_F²                 participation ratio of σ²
    √(mean ulp²/12) · (√m + √n)       noise edge: the largest σ of rounding errors uniform within an ulp
    (Marchenko–Pastur)

bf16 checkpoints round every weight: a rank-16 update shows an effective rank of hundreds, all of it below the noise
edge.

Shape legend: B matrices; N ≥ M long and short side.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import is_integer, is_number, shown
from . import ops
from .arguments import as_batch, check_pair, check_seed
from .decompose import oriented, power_of_two
from .difference import Difference
from .slq import Sampling, Spectrum, sampled_spectrum
from .statistics import MAX_ABS, NON_FINITE, SUM_SQUARES, SUM_ULP_SQUARES, UNCHANGED
from .types import RSVD, triplet_count
from .workers import without_autocast

TRACY_WIDOM = 3.27  # 99.9 % quantile of the law of the largest eigenvalue of noise (Johnstone 2001)
LEAST_STEPS = 4  # of Lanczos; fewer make a poor bound on the rest
SAMPLED = ("effective_rank", "participation_ratio", "rank_above_noise")  # metrics that "slq" only estimates
LIMITED = 0.1  # share of Σσ below the noise edge from which a spectrum is called quantisation-limited


class SpectralMetrics(NamedTuple):
    """Metrics of every matrix of a batch, each (...) fp64 unless said; NaN where a matrix has non-finite entries.

    A zero matrix has norms and ranks 0 and NaN for the ratios.

    spectral_norm: σ₁.
    frobenius_norm, spectral_to_frobenius: ‖Δ‖_F, σ₁ / ‖Δ‖_F.
    effective_rank: exp(−Σ p log p), p_i = σ_i / Σσ.
    top_fraction_norm_ratio: ‖Δ_top‖_F / ‖Δ‖_F, Δ_top the leading ⌈top_fraction · min(m, n)⌉ triplets.
    participation_ratio: ‖Δ‖_F⁴ / ‖ΔᵀΔ‖_F².
    stable_rank: ‖Δ‖_F² / σ₁².
    noise_edge: the spectral norm that rounding ``a`` to its dtype alone would give.
    rank_above_noise: int64, the number of σ above what noise passes in fewer than one matrix in a thousand.
    unchanged_fraction: of entries with Δ = 0 exactly; above ~0.2 the edge overestimates the noise.
    quantisation_limited: bool, a tenth or more of Σσ is below the edge: the effective rank counts rounding.
    standard_error: of the sampled metrics by name, with method="slq" only: the jackknife's over probes, and what the
        quadrature lacks, which for rank_above_noise is a bound: as many σ as its nodes do not tell from the threshold.
    """

    spectral_norm: Tensor
    frobenius_norm: Tensor
    spectral_to_frobenius: Tensor
    effective_rank: Tensor
    top_fraction_norm_ratio: Tensor
    participation_ratio: Tensor
    stable_rank: Tensor
    noise_edge: Tensor
    rank_above_noise: Tensor
    unchanged_fraction: Tensor
    quantisation_limited: Tensor
    standard_error: "dict[str, Tensor] | None" = None


def spectral_metrics(
    a: Tensor,
    *,
    base: Tensor | None = None,
    top_fraction: float = 0.01,
    method: str = "exact",
    probes: int = 16,
    steps: int = 20,
    seed: int = 0,
) -> SpectralMetrics:
    """Spectral metrics of every matrix of ``a − base``, one by one: small ones take a few milliseconds each. They are
    constants: no gradient flows through them, nor a tangent of forward mode.

    Args:
        a, base: (..., m, n) as for `batched_rsvd`.
        top_fraction: share of min(m, n) that counts as the top, at least one.
        method: "exact" takes every σ from an fp64 Gram matrix (down to 6e-8 σ₁; smaller ones count as zero). "slq"
            samples: the leading triplets by `batched_rsvd`, the rest by stochastic Lanczos quadrature with ``probes``
            vectors, of as many steps as make the quadrature as exact as the sample, at most ``steps``; for screening,
            see ``standard_error``. It pays for short sides above 512, below which "exact" is the faster one. σ₁ is too
            large by no more than rounding; of flat spectra, such as noise, it was up to 4 % too small (`batched_rsvd`
            bounds it), and what is taken from it is off with it.
        seed: of the samples.

    Raises:
        TypeError, ValueError: as `batched_rsvd`; ``top_fraction`` outside (0, 1], an unknown method, fewer than two
            probes or one step.
    """
    check_pair(a, base)
    if not (is_number(top_fraction) and 0 < top_fraction <= 1):
        raise ValueError(f"top_fraction must be a number in (0, 1], got {shown(top_fraction)}")
    if method not in ("exact", "slq"):
        raise ValueError(f'method must be "exact" or "slq", got {method!r}')
    if min(a.shape[-2:]) == 0:
        raise ValueError(f"a has no entries per matrix: shape {tuple(a.shape)}")
    for name, value, least in (("probes", probes, 2), ("steps", steps, 1)):
        if not is_integer(value) or value < least:
            raise ValueError(f"{name} must be an integer ≥ {least}, got {shown(value)}")
    check_seed(seed)
    top = triplet_count(top_fraction, min(a.shape[-2:]))
    bases = [None] * a.shape[:-2].numel() if base is None else list(as_batch(base))
    sampling = Sampling(int(probes), LEAST_STEPS, int(steps), int(seed)) if method == "slq" else None
    rows = [spectrum_and_metrics(x, y, top, sampling)[1] for x, y in zip(as_batch(a), bases, strict=True)]
    return _stacked(rows, a, sampling is not None)


@without_autocast
def spectrum_and_metrics(
    x: Tensor,
    y: Tensor | None,
    top: int,
    sampling: Sampling | None = None,
    svd: RSVD | None = None,
    statistics: Tensor | None = None,
    known_gram: Tensor | None = None,
) -> tuple[Spectrum, dict[str, Tensor]]:
    """The spectrum of one x − y (m, n), empty where that is zero or not finite, and its metrics by name.

    With ``sampling`` the leading triplets are those of ``svd`` if given, and "<name> error" stands beside what was
    sampled; without, every σ is exact. ``statistics`` (5,): those of `ops.stats` in full, and ``known_gram`` (M, M)
    that on the short side, where they were taken; with the latter the participation ratio is exact too.
    """
    tall = x.shape[0] >= x.shape[1]
    difference = Difference(
        [oriented(x, tall)],
        [] if y is None else [oriented(y, tall)],
        known_gram=None if known_gram is None else known_gram.unsqueeze(0),
    )
    if statistics is None:
        statistics = ops.stats(difference.x, difference.base, True)[0]
    usable = 0 < statistics[MAX_ABS] < math.inf and statistics[NON_FINITE] == 0
    if not usable:
        spectrum = Spectrum(statistics.new_zeros(0))
    elif sampling is None:
        spectrum = exact_spectrum(difference, statistics[MAX_ABS])
    else:
        oriented_svd = svd if tall or svd is None else svd.mT
        spectrum = sampled_spectrum(difference, max(top, 16), sampling, oriented_svd)
    values = _metrics(spectrum, statistics, x.shape, top, sampling is not None)
    if usable and known_gram is not None and power_of_two(statistics[MAX_ABS].unsqueeze(0)) == 1:  # squares in range
        squares = statistics[SUM_SQUARES] / torch.linalg.vector_norm(known_gram, dtype=torch.float64)
        values |= {"participation_ratio": squares**2, "participation_ratio error": torch.zeros_like(squares)}
    return spectrum, values


def exact_spectrum(x: Difference, largest: Tensor) -> Spectrum:
    """Every σ, from the eigenvalues of the fp64 Gram.

    Products of fp32 entries are exact in fp64, so λ is known to a few ε λ₁; what lies below is below the resolution of
    fp32 entries too, and a thousand such σ would count, so it is cut off.
    """
    scale = power_of_two(largest.unsqueeze(0))
    squares = torch.linalg.eigvalsh(Difference(x.x, x.base, scale).gram(double=True))[0].flip(0)
    floor = 16 * torch.finfo(torch.float64).eps * squares[0]
    return Spectrum(torch.where(squares > floor, squares, 0.0).sqrt() / scale)


def _metrics(spectrum: Spectrum, statistics: Tensor, shape: torch.Size, top: int, sampled: bool) -> dict[str, Tensor]:
    """All metrics of one matrix; with ``sampled``, also "<name> error"."""
    m, n = shape
    edge, threshold = _noise(statistics, m, n)
    s = spectrum.leading
    first = s[0] if len(s) else edge.new_zeros(())
    unit = torch.where(first > 0, first, 1.0)
    squares = statistics[SUM_SQUARES] / unit**2
    sums = _sums(spectrum, unit, threshold)
    values = {
        "spectral_norm": first,
        "frobenius_norm": statistics[SUM_SQUARES].sqrt(),
        # 0/0 = NaN for a zero matrix
        "spectral_to_frobenius": first / unit / squares.sqrt(),
        "top_fraction_norm_ratio": torch.linalg.vector_norm(s[:top] / unit) / squares.sqrt(),
        "stable_rank": squares,
        "noise_edge": edge,
        "unchanged_fraction": statistics[UNCHANGED] / (m * n),
    } | _from_sums(sums.mean(0), squares)
    values["rank_above_noise"] = values["rank_above_noise"].round().long()
    if statistics[NON_FINITE] > 0 or not statistics[MAX_ABS].isfinite():
        keep = ("rank_above_noise", "quantisation_limited", "unchanged_fraction", "noise_edge")
        values |= {name: squares.new_full((), math.nan) for name in values if name not in keep}
    if sampled:

        def estimates(sums: Tensor) -> Tensor:
            found = _from_sums(sums, squares)
            return torch.stack([found[name] for name in SAMPLED])

        lacks = spectrum.quadrature_error(lambda s: estimates(_sums(s, unit, threshold).mean(0)))
        lacks[SAMPLED.index("rank_above_noise")] = spectrum.count_error(threshold)  # a step's last change tells nothing
        errors = torch.hypot(_jackknife(estimates, sums), lacks)
        values |= {f"{name} error": error for name, error in zip(SAMPLED, errors, strict=True)}
    return values


def _noise(statistics: Tensor, m: int, n: int) -> tuple[Tensor, Tensor]:
    """The noise edge, and the threshold above which a σ counts as no noise. The edge is where the largest σ of noise
    lies in the limit; of finite noise it passes it now and then.
    """
    roots = math.sqrt(m) + math.sqrt(n)
    edge = (statistics[SUM_ULP_SQUARES] / (12 * m * n)).sqrt() * roots
    return edge, edge * math.sqrt(1 + TRACY_WIDOM * (1 / math.sqrt(m) + 1 / math.sqrt(n)) ** (1 / 3) / roots)


def _sums(spectrum: Spectrum, unit: Tensor, threshold: Tensor) -> Tensor:
    """One estimate per probe, (P, 5), of sums over t = σ/σ₁, whose fourth powers stay in range."""

    def terms(t: Tensor) -> Tensor:
        above = t > threshold / unit
        return torch.stack([t, torch.special.xlogy(t, t), t**4, above, t * ~above], -1)

    return spectrum.sums(terms, unit)


def _from_sums(sums: Tensor, squares: Tensor) -> dict[str, Tensor]:
    """What `_sums` (..., 5) and Σt² tell, each (...)."""
    total, t_log_t, fourth, above, below = sums.unbind(-1)
    return {
        "effective_rank": torch.where(total > 0, (total.log() - t_log_t / total).exp(), 0.0),
        "participation_ratio": torch.where(fourth > 0, squares.square() / fourth, 0.0),
        "rank_above_noise": above,
        "quantisation_limited": (below >= LIMITED * total) & (total > 0),
    }


def _jackknife(f: Callable[[Tensor], Tensor], samples: Tensor) -> Tensor:
    """Standard error (F,) of f of the mean of P samples, from the P means that leave one out; f makes them (F, P)."""
    count = max(2, len(samples))
    left_out = f((samples.sum(0) - samples) / (count - 1))
    return ((count - 1) / count * (left_out - left_out.mean(-1, keepdim=True)).square().sum(-1)).sqrt()


def _stacked(rows: list[dict[str, Tensor]], a: Tensor, sampled: bool) -> SpectralMetrics:
    def column(name: str) -> Tensor:
        dtype = {"rank_above_noise": torch.int64, "quantisation_limited": torch.bool}.get(name, torch.float64)
        values = [row[name] for row in rows]
        flat = torch.stack(values).to(dtype) if values else torch.empty(0, dtype=dtype, device=a.device)
        return flat.reshape(a.shape[:-2])

    error = {name: column(name + " error") for name in SAMPLED} if sampled else None
    return SpectralMetrics(*(column(name) for name in SpectralMetrics._fields[:-1]), error)
