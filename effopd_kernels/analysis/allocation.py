"""Module allocation: which layers and which kinds of modules an update moved, and by how much."""

import math
from pathlib import Path
from typing import Any

from . import figures
from .findings import CHECKPOINT, Findings, Row, grouped, norms, share
from .report import FIGURES, TABLES, Headline, Section, shown
from .tables import write_table

THIRDS = ("outside", "whole", "bottom", "middle", "top")


def allocation(found: Findings, folder: Path) -> tuple[list[Section], list[Headline]]:
    """Write the tables tensors, allocation, depth, types and totals and their figures; return the report's part."""
    places = _sums(found.rows, "layer", "type")
    depth, types = _sums(found.rows, "third"), _sums(found.rows, "type")
    totals = [
        dict(zip(CHECKPOINT, key, strict=True)) | norms(rows) for key, rows in grouped(found.rows, *CHECKPOINT).items()
    ]
    for name, rows in {
        "tensors": found.rows, "allocation": places, "depth": depth, "types": types, "totals": totals,
    }.items():  # fmt: skip
        write_table(folder / TABLES, name, rows)

    ends = {t: found.last(t, totals)[0] for t in found.trajectories}
    by_third = {t: {r["third"]: r for r in found.last(t, depth)} for t in found.trajectories}
    by_type = {t: {r["type"]: r for r in found.last(t, types)} for t in found.trajectories}
    return (
        [
            _where(found, folder, places),
            _shares(found, folder, by_third, by_type),
            *([_growth(found, folder, totals, depth)] if len(totals) > len(found.trajectories) else []),
        ],
        [
            Headline(
                "Size of the update, ‖ΔW‖ / ‖W‖",
                {t: row["relative_update"] for t, row in ends.items()},
                "Over all tensors, at the last checkpoint.",
            ),
            *([Headline(
                "Middle third of the depth",
                {t: rows["middle"]["share_of_update"] for t, rows in by_third.items()},
                "Its share of ‖ΔW‖².",
                full=1.0,
            )] if found.middle else []),
            Headline(
                "MLP",
                {t: share(norms([r for r in found.last(t) if r["part"] == "mlp"])["update_norm"] ** 2,
                          ends[t]["update_norm"] ** 2) for t in found.trajectories},
                "Share of ‖ΔW‖² in MLP matrices, experts included.",
                full=1.0,
            ),
            Headline(
                "Entries that did not change",
                {t: row["unchanged_fraction"] for t, row in ends.items()},
                "Bit for bit as in the base. " + _why_unchanged(found),
                full=1.0,
            ),
        ],
    )  # fmt: skip


def _why_unchanged(found: Findings) -> str:
    """Frozen modules are one thing, updates below the precision another: the share in what moved tells them apart."""
    moved = {t: [r for r in found.last(t) if r["update_norm"]] for t in found.trajectories}
    if all(len(own) == len(found.last(t)) for t, own in moved.items()):
        return "Updates too small for the weights' precision, or none."
    shares = ", ".join(f"{t} {shown(norms(own)['unchanged_fraction'])}" for t, own in moved.items() if own)
    return f"In the tensors that moved: {shares}." if shares else "No tensor moved."


def _sums(rows: list[Row], *keys: str) -> list[dict[str, Any]]:
    """Norms by the given columns in every checkpoint, with the share of its ‖ΔW‖² and of its parameters."""
    wholes = {key: norms(own) for key, own in grouped(rows, *CHECKPOINT).items()}
    out = []
    for key, own in grouped(rows, *CHECKPOINT, *keys).items():
        sums, whole = norms(own), wholes[key[: len(CHECKPOINT)]]
        out.append(
            dict(zip((*CHECKPOINT, *keys), key, strict=True))
            | sums
            | {
                "share_of_update": share(sums["update_norm"] ** 2, whole["update_norm"] ** 2),
                "share_of_parameters": share(sums["parameters"], whole["parameters"]),
            }
        )
    return out


def _where(found: Findings, folder: Path, places: list[dict[str, Any]]) -> Section:
    cells = {t: {(r["layer"], r["type"]): r for r in found.last(t, places)} for t in found.trajectories}
    kinds = [k for k in found.types() if any(key[1] == k for c in cells.values() for key in c)]
    inside = [k for k in kinds if any(key[0] is not None and key[1] == k for c in cells.values() for key in c)]
    drawn = []
    for column, label in (("relative_update", "‖ΔW‖ / ‖W‖"), ("update_norm", "‖ΔW‖")):
        grids = {
            t: [[c[i, k][column] if (i, k) in c else math.nan for k in inside] for i in range(found.layers)]
            for t, c in cells.items()
        }
        finite = [v for grid in grids.values() for line in grid for v in line if math.isfinite(v)]
        limits = (0.0, max(finite) or 1.0) if finite else None
        for i, (trajectory, grid) in enumerate(grids.items() if finite else ()):
            figure = figures.heat_map(
                grid, [str(i) for i in range(found.layers)], inside, label,
                limits=limits, title=trajectory, row_label="layer",
            )  # fmt: skip
            drawn.append(figures.save(figure, folder / FIGURES, f"allocation_{column}_{i}"))
    outside = [
        {"trajectory": t, "outside the layers": r["type"], "‖ΔW‖": r["update_norm"],
         "‖ΔW‖ / ‖W‖": r["relative_update"], "share of ‖ΔW‖²": r["share_of_update"]}
        for t in found.trajectories for (layer, _), r in cells[t].items() if layer is None
    ]  # fmt: skip
    peaks = []
    for t in found.trajectories:
        layered = [r for (layer, _), r in cells[t].items() if layer is not None and math.isfinite(r["relative_update"])]
        if layered and (top := max(layered, key=lambda r: r["relative_update"]))["relative_update"]:
            peaks.append(
                f"{t} moved {top['type']} of layer {top['layer']} most for its size, "
                f"by {top['relative_update']:.2g} of its norm"
            )
    return Section(
        "Where the update went",
        "; ".join(peaks) + "." if peaks else "",
        drawn,
        "Each cell is one kind of module in one layer, the first layer at the bottom; brighter moved more, on one "
        "scale for all trajectories, first relative to the weights, white where those were zero, then in "
        "absolute terms.",
        outside,
        "Every tensor is in tables/tensors, sums by layer and type in tables/allocation.",
    )


def _shares(found: Findings, folder: Path, by_third: dict, by_type: dict) -> Section:
    thirds = [name for name in THIRDS if any(name in rows for rows in by_third.values())]
    kinds = found.types()

    def column(rows: dict, names: list[str], key: str) -> list[float]:
        return [rows[name][key] if name in rows else 0.0 for name in names]

    drawn = []
    for stem, data, names in (("allocation_thirds", by_third, thirds), ("allocation_types", by_type, kinds)):
        values = {t: column(rows, names, "share_of_update") for t, rows in data.items()}
        size = column(next(iter(data.values())), names, "share_of_parameters")
        figure = figures.bars(names, values, "share of ‖ΔW‖²", marks={"share of parameters": size})
        drawn.append(figures.save(figure, folder / FIGURES, stem))
    lead = "; ".join(
        f"{t} put {by_third[t]['middle']['share_of_update']:.0%} of ‖ΔW‖² into the middle third of the depth"
        for t in found.trajectories
        if found.middle and by_third[t]["middle"]["update_norm"] > 0
    )
    table = [
        {"trajectory": t, "part of the depth": name, "share of ‖ΔW‖²": rows[name]["share_of_update"],
         "share of parameters": rows[name]["share_of_parameters"], "‖ΔW‖ / ‖W‖": rows[name]["relative_update"]}
        for t, rows in by_third.items() for name in thirds if name in rows
    ]  # fmt: skip
    return Section(
        "Shares of the depth and of module types",
        lead + "." if lead else "",
        drawn,
        "A bar is the part of ‖ΔW‖² that lies there, the line across it the part of the parameters: above its line, "
        "training chose the place.",
        table,
        "By type, and for every checkpoint: tables/types and tables/depth.",
    )


def _growth(found: Findings, folder: Path, totals: list[Row], depth: list[Row]) -> Section:
    def over_training(rows: list[Row], column: str, start: list[float]) -> dict[str, tuple[list[float], list[float]]]:
        own = {t: [r for r in rows if r["trajectory"] == t] for t in found.trajectories}
        return {
            t: ([0.0] * len(start) + [r["progress"] for r in rs], start + [r[column] for r in rs])
            for t, rs in own.items()
        }

    middle = [r for r in depth if r["third"] == "middle" and found.middle]
    drawn = []
    for stem, curves, label in (
        ("allocation_growth", over_training(totals, "relative_update", [0.0]), "‖ΔW‖ / ‖W‖"),
        ("allocation_middle", over_training(middle, "share_of_update", []), "middle third's share of ‖ΔW‖²"),
    ):
        if any(y for _, y in curves.values()):
            figure = figures.lines(curves, "training progress", label, ylim=(0, None), xlim=(0, 1.03))
            drawn.append(figures.save(figure, folder / FIGURES, stem))
    return Section(
        "How the update grew",
        "",
        drawn,
        "The distance from the base over training"
        + (", and how much of it lies in the middle third of the depth" if found.middle else "")
        + ": a curve that flattens has settled.",
        [{"trajectory": r["trajectory"], "checkpoint": r["checkpoint"], "‖ΔW‖": r["update_norm"],
          "‖ΔW‖ / ‖W‖": r["relative_update"], "unchanged entries": r["unchanged_fraction"]} for r in totals],
    )  # fmt: skip
