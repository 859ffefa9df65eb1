"""Module allocation: which layers and which kinds of modules an update moved, and by how much."""

import math
from typing import Any

from . import figures
from .comparison import CHECKPOINT
from .figures import Picture
from .findings import Findings, Row, finite, fraction, grouped, norms
from .report import Headline, Part, Section, shown

THIRDS = ("outside", "whole", "bottom", "middle", "top")


def allocation(found: Findings) -> Part:
    """The tables tensors, allocation, depth, types and totals, and what they say."""
    places = _sums(found.rows, "layer", "type")
    depth, types = _sums(found.rows, "third"), _sums(found.rows, "type")
    totals = [checkpoint | norms(rows) for checkpoint, rows in grouped(found.rows, *CHECKPOINT)]
    by_third = {t: {r["third"]: r for r in rows} for t, rows in found.last(depth).items()}
    by_type = {t: {r["type"]: r for r in rows} for t, rows in found.last(types).items()}
    sections = [_where(found, places), _shares(found, by_third, by_type)]
    if len(totals) > len(found.trajectories):
        sections.append(_growth(found, totals, depth))
    tables = {"tensors": found.rows, "allocation": places, "depth": depth, "types": types, "totals": totals}
    return Part(sections, _headlines(found, totals, by_third), tables)


def _sums(rows: list[Row], *keys: str) -> list[dict[str, Any]]:
    """Norms by the given columns in every checkpoint, with the share of its ‖ΔW‖² and of its parameters."""
    out = []
    for checkpoint, every in grouped(rows, *CHECKPOINT):
        whole = norms(every)
        for place, own in grouped(every, *keys):
            sums = norms(own)
            shares = {
                "share_of_update": _share_of_update(sums, whole),
                "share_of_parameters": fraction(sums["parameters"], whole["parameters"]),
            }
            out.append(checkpoint | place | sums | shares)
    return out


def _share_of_update(part: Row, whole: Row) -> float:
    """Of ‖ΔW‖²; zero where nothing moved."""
    return fraction(part["update_norm"] ** 2, whole["update_norm"] ** 2) if whole["update_norm"] else 0.0


def _headlines(found: Findings, totals: list[Row], by_third: dict[str, dict[str, Row]]) -> list[Headline]:
    ends = {t: rows[0] for t, rows in found.last(totals).items()}
    mlp = {t: norms([r for r in rows if r["part"] == "mlp"]) for t, rows in found.last(found.rows).items()}
    size = {t: row["relative_update"] for t, row in ends.items()}
    out = [Headline("Size of the update, ‖ΔW‖ / ‖W‖", size, "Over all tensors, at the last checkpoint.")]
    if found.middle:
        middle = {t: rows["middle"]["share_of_update"] for t, rows in by_third.items()}
        out.append(Headline("Middle third of the depth", middle, "Its share of ‖ΔW‖².", full=1.0))
    return [
        *out,
        Headline(
            "MLP",
            {t: _share_of_update(mlp[t], row) for t, row in ends.items()},
            "Share of ‖ΔW‖² in MLP matrices, experts included.",
            full=1.0,
        ),
        Headline(
            "Entries that did not change",
            {t: row["unchanged_fraction"] for t, row in ends.items()},
            "Bit for bit as in the base. " + _why_unchanged(found),
            full=1.0,
        ),
    ]


def _why_unchanged(found: Findings) -> str:
    """Frozen modules are one thing, updates below the precision another: the share in what moved tells them apart."""
    ends = found.last(r for r in found.rows if finite(r))
    if not any(ends.values()):
        return "No tensor is finite."
    if all(r["update_norm"] for rows in ends.values() for r in rows):
        return "Updates too small for the weights' precision, or none."
    moved = {t: [r for r in rows if r["update_norm"]] for t, rows in ends.items()}
    shares = ", ".join(f"{t} {shown(norms(own)['unchanged_fraction'])}" for t, own in moved.items() if own)
    return f"In the tensors that moved: {shares}." if shares else "No tensor moved."


def _where(found: Findings, places: list[Row]) -> Section:
    ends = found.last(places)
    layered = {t: [r for r in rows if r["layer"] is not None] for t, rows in ends.items()}
    drawn = {}
    for column, label in (("relative_update", "‖ΔW‖ / ‖W‖"), ("update_norm", "‖ΔW‖")):
        drawn |= {f"allocation_{column}_{i}": figure for i, figure in enumerate(_maps(found, layered, column, label))}
    peaks = [sentence for t, rows in layered.items() if (sentence := _peak(t, rows))]
    return Section(
        "Where the update went",
        "; ".join(peaks) + "." if peaks else "",
        drawn,
        "Each cell is one kind of module in one layer, the first layer at the bottom; brighter moved more, on one "
        "scale for all trajectories, first relative to the weights, white where those were zero, then in "
        "absolute terms.",
        [
            {"trajectory": t, "outside the layers": r["type"], "‖ΔW‖": r["update_norm"],
             "‖ΔW‖ / ‖W‖": r["relative_update"], "share of ‖ΔW‖²": r["share_of_update"]}
            for t, rows in ends.items() for r in rows if r["layer"] is None
        ],
        "Every tensor is in tables/tensors, sums by layer and type in tables/allocation.",
    )  # fmt: skip


def _maps(found: Findings, layered: dict[str, list[Row]], column: str, label: str) -> list[Picture]:
    """A heat map over layer and type for each trajectory, on one scale; none where nothing has a finite value."""
    kinds = [k for k in found.types() if any(r["type"] == k for rows in layered.values() for r in rows)]
    layers = sorted({r["layer"] for rows in layered.values() for r in rows})
    cells = {t: {(r["layer"], r["type"]): r[column] for r in rows} for t, rows in layered.items()}
    values = [v for of in cells.values() for v in of.values() if math.isfinite(v)]
    if not values:
        return []
    return [
        figures.heat_map(
            [[of.get((i, k), math.nan) for k in kinds] for i in layers], list(map(str, layers)), kinds, label,
            limits=(0.0, max(values) or 1.0), title=trajectory, row_label="layer",
        )
        for trajectory, of in cells.items()
    ]  # fmt: skip


def _peak(trajectory: str, layered: list[Row]) -> str:
    finite = [r for r in layered if math.isfinite(r["relative_update"])]
    top = max(finite, key=lambda r: r["relative_update"], default=None)
    if top is None or not top["relative_update"]:
        return ""
    return (
        f"{trajectory} moved {top['type']} of layer {top['layer']} most for its size, "
        f"by {top['relative_update']:.2g} of its norm"
    )


def _shares(found: Findings, by_third: dict[str, dict[str, Row]], by_type: dict[str, dict[str, Row]]) -> Section:
    thirds = [name for name in THIRDS if any(name in rows for rows in by_third.values())]

    def column(rows: dict[str, Row], names: list[str], key: str) -> list[float]:
        return [rows[name][key] if name in rows else 0.0 for name in names]

    drawn = {}
    for stem, data, names in (("thirds", by_third, thirds), ("types", by_type, found.types())):
        values = {t: column(rows, names, "share_of_update") for t, rows in data.items()}
        size = column(next(iter(data.values())), names, "share_of_parameters")
        drawn[f"allocation_{stem}"] = figures.bars(names, values, "share of ‖ΔW‖²", marks={"share of parameters": size})
    lead = "; ".join(
        f"{t} put {rows['middle']['share_of_update']:.0%} of ‖ΔW‖² into the middle third of the depth"
        for t, rows in by_third.items()
        if found.middle and rows["middle"]["update_norm"] > 0
    )
    return Section(
        "Shares of the depth and of module types",
        lead + "." if lead else "",
        drawn,
        "A bar is the part of ‖ΔW‖² that lies there, the line across it the part of the parameters: above its line, "
        "training chose the place.",
        [
            {"trajectory": t, "part of the depth": name, "share of ‖ΔW‖²": rows[name]["share_of_update"],
             "share of parameters": rows[name]["share_of_parameters"], "‖ΔW‖ / ‖W‖": rows[name]["relative_update"]}
            for t, rows in by_third.items() for name in thirds if name in rows
        ],
        "By type, and for every checkpoint: tables/types and tables/depth.",
    )  # fmt: skip


def _growth(found: Findings, totals: list[Row], depth: list[Row]) -> Section:
    def over_training(rows: list[Row], column: str, label: str) -> Picture:
        curves = found.curves(rows, "progress", column)
        return figures.lines(curves, "training progress", label, ylim=(0, None), xlim=(0, 1.03))

    start = [{"trajectory": t, "progress": 0.0, "relative_update": 0.0} for t in found.trajectories]
    drawn = {"allocation_growth": over_training([*start, *totals], "relative_update", "‖ΔW‖ / ‖W‖")}
    if found.middle:
        middle = [r for r in depth if r["third"] == "middle"]
        drawn["allocation_middle"] = over_training(middle, "share_of_update", "middle third's share of ‖ΔW‖²")
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
