"""How concentrated updates are: the paper's Table 1, what it lacks, and energy curves."""

import math
from pathlib import Path
from typing import Any

import torch

from . import figures
from .findings import CHECKPOINT, GROUPS, Findings, Row, finite, grouped, interval, mean, norms
from .measure import GRID
from .report import FIGURES, TABLES, Headline, Interval, Section
from .tables import write_table

AVERAGED = (
    "spectral_norm", "spectral_norm_low", "spectral_norm_high",
    "spectral_to_frobenius", "spectral_to_frobenius_low", "spectral_to_frobenius_high",
    "effective_rank", "effective_rank_error", "top_fraction_norm_ratio", "top_fraction_norm_ratio_high",
    "participation_ratio", "stable_rank", "noise_edge", "rank_above_noise",
)  # fmt: skip
TITLE = "How concentrated it is"


def spectra(found: Findings, folder: Path) -> tuple[list[Section], list[Headline]]:
    """Write the tables spectra and energy and their figures; return the report's part."""
    rows = [row for row in found.rows if "spectral_norm" in row and finite(row)]
    if not rows:
        return [], []
    table = _averages(rows, found.types())
    write_table(folder / TABLES, "spectra", table)
    if not any(r["update_norm"] for r in rows):
        return [Section(TITLE, "No matrix of attention or MLP moved.")], []
    ends = {t: found.last(t, table) for t in found.trajectories}
    top = f"top\u2011{100 * found.options.top_fraction:g}%"  # a hyphen that does not break
    sections = [_table(found, folder, ends, top), *_progress(found, folder, table), *_energy(found, folder)]
    whole = {t: own[0] for t, own in ends.items() if own}
    how = "exact" if all(row["quantities"] == "exact" for row in whole.values()) else "sampled, ± 2 standard errors"
    return sections, [
        Headline("Spectral / Frobenius norm", {t: _ratio(r) for t, r in whole.items()},
                 "Mean over the MLP and attention matrices that moved, between certified bounds: the part along one "
                 "direction.", 1.0),
        Headline("Effective rank", {t: _rank(r) for t, r in whole.items()},
                 f"exp of the entropy of σ / Σσ ({how}){_limited(whole)}."),
        Headline(f"{top.capitalize()} subspace norm ratio", {t: _top(r) for t, r in whole.items()},
                 "Part of ‖ΔW‖ in the leading directions, between certified bounds.", 1.0),
    ]  # fmt: skip


def _averages(rows: list[Row], types: list[str]) -> list[dict[str, Any]]:
    """Of MLP and attention together, apart, and by type: means over the matrices that moved, of what they did, and the
    entries of all that did not change.
    """
    out = []
    for key, own in grouped(rows, *CHECKPOINT).items():
        groups = {name: [r for r in own if inside(r)] for name, inside in GROUPS.items()}
        groups |= {kind: [r for r in own if r["type"] == kind] for kind in types}
        for name, members in groups.items():
            if not members:
                continue
            moved = [r for r in members if r["update_norm"] > 0]
            out.append(
                dict(zip(CHECKPOINT, key, strict=True))
                | {"group": name, "matrices": len(members), "matrices_moved": len(moved)}
                | {column: mean(moved, column) for column in AVERAGED}
                | {
                    "unchanged_fraction": norms(members)["unchanged_fraction"],
                    "quantisation_limited": sum(bool(r["quantisation_limited"]) for r in moved),
                    "quantities": "exact" if all(r["spectrum"] == "exact" for r in members) else "sampled",
                }
            )
    return out


def _ratio(row: Row) -> Interval:
    return interval(row, "spectral_to_frobenius", "spectral_to_frobenius_low", "spectral_to_frobenius_high")


def _rank(row: Row) -> Interval:
    return interval(row, "effective_rank", error="effective_rank_error")


def _top(row: Row) -> Interval:
    return interval(row, "top_fraction_norm_ratio", None, "top_fraction_norm_ratio_high")


def _limited(whole: dict[str, Row]) -> str:
    counts = [
        f"{r['quantisation_limited']} of {r['matrices_moved']} matrices of {t}"
        for t, r in whole.items()
        if r["matrices_moved"]
    ]
    return f"; in {', '.join(counts)} it counts rounding noise" if counts else ""


def _table(found: Findings, folder: Path, ends: dict[str, list[Row]], top: str) -> Section:
    kinds = [k for k in found.types() if any(r["group"] == k for own in ends.values() for r in own)]
    by_kind = {t: {r["group"]: r for r in own} for t, own in ends.items()}

    def bars(stem: str, read: Any, label: str) -> str:
        cells = {
            t: [read(rows[k]) if k in rows else Interval(*[math.nan] * 3) for k in kinds] for t, rows in by_kind.items()
        }
        figure = figures.bars(
            kinds,
            {t: [c.value for c in own] for t, own in cells.items()},
            label,
            errors={t: ([c.low for c in own], [c.high for c in own]) for t, own in cells.items()},
        )
        return figures.save(figure, folder / FIGURES, stem)

    return Section(
        TITLE,
        "Averages over the matrices that moved, at the last checkpoint; unchanged entries are counted in all. Where "
        "the rank above the noise is far below the effective rank, the spectrum is mostly rounding of the weights' "
        "dtype: trust the participation ratio there.",
        [
            bars("spectra_ratio", _ratio, "spectral / Frobenius norm"),
            bars("spectra_rank", _rank, "effective rank"),
            bars("spectra_top", _top, f"{top} subspace norm ratio"),
        ],
        "Higher norm ratios and lower ranks mean that few directions carry the update; no bar, that nothing moved. The "
        "thin lines are error bounds, for the effective rank two standard errors.",
        [
            {
                "trajectory": t,
                "matrices": r["group"],
                "moved": f"{r['matrices_moved']} of {r['matrices']}",
                "spectral norm": interval(r, "spectral_norm", "spectral_norm_low", "spectral_norm_high"),
                "spectral / Frobenius": _ratio(r),
                "effective rank": _rank(r),
                f"{top} norm ratio": _top(r),
                "participation ratio": r["participation_ratio"],
                "rank above noise": r["rank_above_noise"],
                "unchanged entries": r["unchanged_fraction"],
                "rounding-limited": f"{r['quantisation_limited']} of {r['matrices_moved']}",
            }
            for t, own in ends.items()
            for r in own
        ],
        "For every checkpoint: tables/spectra; for every matrix: tables/tensors.",
    )


def _progress(found: Findings, folder: Path, table: list[Row]) -> list[Section]:
    whole = {
        t: [r for r in table if r["trajectory"] == t and r["group"] == "MLP and attention"] for t in found.trajectories
    }
    if max(map(len, whole.values())) < 2:
        return []
    drawn = []
    for stem, read, label in (
        ("spectra_ratio_progress", _ratio, "spectral / Frobenius norm"),
        ("spectra_rank_progress", _rank, "effective rank"),
    ):
        cells = {t: [read(r) for r in rows] for t, rows in whole.items()}
        x = {t: [r["progress"] for r in rows] for t, rows in whole.items()}
        figure = figures.lines(
            {t: (x[t], [c.value for c in own]) for t, own in cells.items()},
            "training progress",
            label,
            bands={t: ([c.low for c in own], [c.high for c in own]) for t, own in cells.items()},
            xlim=(0, 1.03),
        )
        drawn.append(figures.save(figure, folder / FIGURES, stem))
    return [
        Section(
            "Concentration over training",
            "",
            drawn,
            "The mean over the MLP and attention matrices that moved, its error bounds shaded: flat from the start is "
            "low-rank early.",
        )
    ]


def _energy(found: Findings, folder: Path) -> list[Section]:
    table, curves = [], {}
    for trajectory, position, _ in found.comparison.checkpoints():
        if not (parts := found.energy.get((trajectory, position))):
            continue
        checkpoint = found.comparison.trajectories[trajectory][position]
        progress = found.comparison.progress[trajectory][position]
        top = torch.tensor([curve for _, curve in parts], dtype=torch.float64).mean(0)
        # The bottom f of the rank holds what the top 1 − f does not.
        bottom = torch.tensor(
            [[(1 - min(1.0, c) ** 2) ** 0.5 for c in curve] for _, curve in parts], dtype=torch.float64
        )
        bottom = bottom.mean(0).flip(0)
        table += [
            {"trajectory": trajectory, "checkpoint": checkpoint.label, "step": checkpoint.step, "progress": progress,
             "rank_fraction": f, "top": t, "bottom": b}
            for f, t, b in zip(GRID, top.tolist(), bottom.tolist(), strict=True)
        ]  # fmt: skip
        if progress == 1:
            curves[trajectory] = (top.tolist(), bottom.tolist())
    if not table:
        return []
    write_table(folder / TABLES, "energy", table)
    if not curves:  # no last checkpoint moved
        return []
    drawn = []
    for i, stem in enumerate(("top", "bottom")):
        figure = figures.lines(
            {t: (GRID[1:], both[i][1:]) for t, both in curves.items()},
            f"{stem} fraction of the rank",
            "part of ‖ΔW‖",
            markers=False,
            xscale="log",
            ylim=(0, 1.02),
            xlim=(1e-3, 1),
        )
        drawn.append(figures.save(figure, folder / FIGURES, f"energy_{stem}"))
    at = {f: min(range(len(GRID)), key=lambda i: abs(GRID[i] - f)) for f in (0.01, 0.1)}
    lead = "; ".join(
        f"{t}'s top 1% of the rank holds {both[0][at[0.01]]:.0%} of ‖ΔW‖, its top 10% {both[0][at[0.1]]:.0%}"
        for t, both in curves.items()
    )
    return [
        Section(
            "Energy by rank",
            lead + ".",
            drawn,
            "How much of the update's norm the leading and the trailing directions hold, averaged over the "
            "MLP and attention matrices that moved: the steeper the curve of the top rises, the lower the rank.",
        )
    ]
