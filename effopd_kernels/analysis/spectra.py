"""How concentrated updates are: the paper's Table 1, what it lacks, and energy curves."""

import math
from typing import Any

import torch

from . import figures
from .comparison import CHECKPOINT
from .figures import Interval
from .findings import GROUPS, WHOLE, Findings, Row, finite, grouped, interval, mean, norms
from .matrix import GRID, TOP_FRACTION
from .report import Headline, Part, Section

AVERAGED = (
    "spectral_norm", "spectral_norm_low", "spectral_norm_high",
    "spectral_to_frobenius", "spectral_to_frobenius_low", "spectral_to_frobenius_high",
    "effective_rank", "effective_rank_error", "top_fraction_norm_ratio", "top_fraction_norm_ratio_high",
    "participation_ratio", "participation_ratio_error", "stable_rank", "noise_edge",
    "rank_above_noise", "rank_above_noise_error", "rank_above_noise_low", "rank_above_noise_high",
)  # fmt: skip
TITLE = "How concentrated it is"
# Of what is drawn: the figure's name, the column, and how the axis is labelled.
RATIO = ("spectra_ratio", "spectral_to_frobenius", "spectral / Frobenius norm")
RANK = ("spectra_rank", "effective_rank", "effective rank")


def spectra(found: Findings) -> Part:
    """The tables spectra and energy, and what they say."""
    rows = [row for row in found.rows if "spectral_norm" in row and finite(row)]
    if not rows:
        return Part()
    table = _averages(rows, found.types())
    if not any(r["update_norm"] for r in rows):
        return Part([Section(TITLE, "No matrix of attention or MLP moved.")], tables={"spectra": table})
    whole = [r for r in table if r["group"] == WHOLE]
    top = f"top\u2011{100 * TOP_FRACTION:g}%"  # a hyphen that does not break
    sections, tables = [_last(found, table, top)], {"spectra": table}
    if max(map(len, found.each(whole).values())) > 1:
        sections.append(_progress(found, whole))
    if energy := _energy(found):
        tables["energy"] = energy
        if any(r["progress"] == 1 for r in energy):  # else no last checkpoint moved
            sections.append(_curves(found, energy))
    return Part(sections, _headlines({t: own[0] for t, own in found.last(whole).items() if own}, top), tables)


def _averages(rows: list[Row], types: list[str]) -> list[dict[str, Any]]:
    """Of MLP and attention together, apart, and by type: means over the matrices that moved (zeros in a checkpoint in
    which none did), of what they did, and the entries of all that did not change.
    """
    out = []
    for checkpoint, own in grouped(rows, *CHECKPOINT):
        still = not any(r["update_norm"] for r in own)
        groups = {name: [r for r in own if inside(r)] for name, inside in GROUPS.items()}
        groups |= {kind: [r for r in own if r["type"] == kind] for kind in types}
        for name, members in groups.items():
            if not members:
                continue
            moved = [r for r in members if r["update_norm"] > 0]
            out.append(
                checkpoint
                | {"group": name, "matrices": len(members), "matrices_moved": len(moved)}
                | {column: mean(members if still else moved, column) for column in AVERAGED}
                | {
                    "unchanged_fraction": norms(members)["unchanged_fraction"],
                    "quantisation_limited": sum(bool(r["quantisation_limited"]) for r in moved),
                    "quantities": "exact" if all(r["spectrum"] == "exact" for r in members) else "sampled",
                }
            )
    return out


def _headlines(whole: dict[str, Row], top: str) -> list[Headline]:
    """Of MLP and attention together, at the last checkpoint."""
    how = "exact" if all(row["quantities"] == "exact" for row in whole.values()) else "sampled, ± 2 standard errors"
    noisy = ", ".join(
        f"{r['quantisation_limited']} of {r['matrices_moved']} matrices of {t}"
        for t, r in whole.items() if r["matrices_moved"]
    )  # fmt: skip
    limited = f"; in {noisy} it counts rounding noise" if noisy else ""
    return [
        Headline(
            "Spectral / Frobenius norm",
            {t: interval(r, "spectral_to_frobenius") for t, r in whole.items()},
            "Mean over the MLP and attention matrices that moved, between certified bounds: the part along one "
            "direction.",
            full=1.0,
        ),
        Headline(
            "Effective rank",
            {t: interval(r, "effective_rank") for t, r in whole.items()},
            f"exp of the entropy of σ / Σσ ({how}){limited}.",
        ),
        Headline(
            f"{top.capitalize()} subspace norm ratio",
            {t: interval(r, "top_fraction_norm_ratio") for t, r in whole.items()},
            "Part of ‖ΔW‖ in the leading directions, between certified bounds.",
            full=1.0,
        ),
    ]


def _last(found: Findings, table: list[Row], top: str) -> Section:
    """Every group at the last checkpoint, those of a type as bars."""
    ends = found.last(table)
    groups = {t: {r["group"]: r for r in own} for t, own in ends.items()}
    kinds = [k for k in found.types() if any(k in rows for rows in groups.values())]
    nothing = Interval(math.nan, math.nan, math.nan)
    drawn = {}
    bars = (RATIO, RANK, ("spectra_top", "top_fraction_norm_ratio", f"{top} subspace norm ratio"))
    for stem, column, label in bars if kinds else ():
        heights = {
            t: [interval(rows[k], column) if k in rows else nothing for k in kinds] for t, rows in groups.items()
        }
        drawn[stem] = figures.bars(kinds, heights, label)
    return Section(
        TITLE,
        "Averages over the matrices that moved, at the last checkpoint; unchanged entries are counted in all. Where "
        "the rank above the noise is far below the effective rank, the spectrum is mostly rounding of the weights' "
        "dtype: trust the participation ratio there.",
        drawn,
        "Higher norm ratios and lower ranks mean that few directions carry the update; no bar, that nothing moved. The "
        "thin lines are error bounds, for the effective rank two standard errors.",
        [
            {
                "trajectory": t,
                "matrices": r["group"],
                "moved": f"{r['matrices_moved']} of {r['matrices']}",
                "spectral norm": interval(r, "spectral_norm"),
                "spectral / Frobenius": interval(r, "spectral_to_frobenius"),
                "effective rank": interval(r, "effective_rank"),
                f"{top} norm ratio": interval(r, "top_fraction_norm_ratio"),
                "participation ratio": interval(r, "participation_ratio"),
                "rank above noise": interval(r, "rank_above_noise"),
                "unchanged entries": r["unchanged_fraction"],
                "rounding-limited": f"{r['quantisation_limited']} of {r['matrices_moved']}",
            }
            for t, own in ends.items()
            for r in own
        ],
        "For every checkpoint: tables/spectra; for every matrix: tables/tensors.",
    )


def _progress(found: Findings, whole: list[Row]) -> Section:
    drawn = {}
    for stem, column, label in (RATIO, RANK):
        curves = {
            t: ([r["progress"] for r in own], [interval(r, column) for r in own])
            for t, own in found.each(r for r in whole if r["matrices_moved"]).items()
        }
        drawn[f"{stem}_progress"] = figures.lines(curves, "training progress", label, xlim=(0, 1.03))
    return Section(
        "Concentration over training",
        "",
        drawn,
        "The mean over the MLP and attention matrices that moved, its error bounds shaded: flat from the start is "
        "low-rank early.",
    )


def _energy(found: Findings) -> list[dict[str, Any]]:
    """The part of ‖ΔW‖ in the leading and in the trailing directions, averaged over the matrices that moved."""
    table = []
    for trajectory, position, _ in found.comparison.checkpoints():
        if not (curves := found.energy.get((trajectory, position))):
            continue
        top = torch.tensor(curves, dtype=torch.float64).mean(0)
        # The bottom f of the rank holds what the top 1 − f does not.
        rest = [[(1 - min(1.0, part) ** 2) ** 0.5 for part in curve] for curve in curves]
        bottom = torch.tensor(rest, dtype=torch.float64).mean(0).flip(0)
        table += [
            found.comparison.about(trajectory, position) | {"rank_fraction": f, "top": t, "bottom": b}
            for f, t, b in zip(GRID, top.tolist(), bottom.tolist(), strict=True)
        ]
    return table


def _curves(found: Findings, energy: list[Row]) -> Section:
    ends = {t: own for t, own in found.last(energy).items() if own}
    drawn = {
        f"energy_{end}": figures.lines(
            {t: (GRID[1:], [r[end] for r in own[1:]]) for t, own in ends.items()},
            f"{end} fraction of the rank",
            "part of ‖ΔW‖",
            markers=False,
            xscale="log",
            ylim=(0, 1.02),
            xlim=(1e-3, 1),
        )
        for end in ("top", "bottom")
    }

    def held(own: list[Row], share: float) -> str:
        return f"{min(own, key=lambda r: abs(r['rank_fraction'] - share))['top']:.0%}"

    lead = "; ".join(
        f"{t}'s top 1% of the rank holds {held(own, 0.01)} of ‖ΔW‖, its top 10% {held(own, 0.1)}"
        for t, own in ends.items()
    )
    return Section(
        "Energy by rank",
        lead + ".",
        drawn,
        "How much of the update's norm the leading and the trailing directions hold, averaged over the "
        "MLP and attention matrices that moved: the steeper the curve of the top rises, the lower the rank.",
    )
