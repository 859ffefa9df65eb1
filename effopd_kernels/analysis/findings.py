"""What was measured, gathered from all tensors and ranks, and the sums and averages that every analysis takes of it."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .comparison import Comparison
from .figures import Interval
from .matrix import Options
from .measure import Measured, relative
from .roles import TYPES, depth, third
from .wording import listed

Row = Mapping[str, Any]
WHOLE = "MLP and attention"
GROUPS: dict[str, Callable[[Row], bool]] = {
    WHOLE: lambda row: row["part"] in ("mlp", "attention"),
    "attention": lambda row: row["part"] == "attention",
    "MLP": lambda row: row["part"] == "mlp",
}


class Findings:
    """Rows in the order trajectory, checkpoint, tensor, however the work was shared out.

    Attributes:
        comparison: with notes on the base's tensors that are not finite, and on dtypes that differ.
        rows, alignment: as in `Measured`, of all tensors. energy: (trajectory, position) → curves (G,).
        middle: whether the depth has a middle third; one or two layers have none.
        directions: (T, T) inner products, or None without matrices. tokens: trajectory → column → (V,).
    """

    def __init__(self, comparison: Comparison, options: Options, measured: Iterable[Measured]):
        self.options = options
        order = {name: i for i, name in enumerate(comparison.names)}
        tensors = sorted(measured, key=lambda m: order[m.tensor])
        self.trajectories = list(comparison.trajectories)
        self.rows = self._sorted(row for m in tensors for row in m.rows)
        self.alignment = self._sorted(row for m in tensors for row in m.alignment)
        self.energy: dict[tuple[str, int], list[list[float]]] = {}
        for trajectory, position, curve in (part for m in tensors for part in m.energy):
            self.energy.setdefault((trajectory, position), []).append(curve)
        products = [m.directions for m in tensors if m.directions is not None]
        self.directions: Tensor | None = torch.stack(products).sum(0) if products else None
        self.tokens = next((m.tokens for m in tensors if m.tokens), {})
        layers = depth(comparison.names)
        for row in self.rows:
            row["third"] = third(row["layer"], layers)
        broken = dict.fromkeys(row["tensor"] for row in self.rows if math.isnan(row["weight_norm"]))
        notes = list(comparison.notes)
        if broken:
            notes.append(f"NaN or infinite in the base, so left out of all sums and averages: {listed(list(broken))}.")
        self.comparison = replace(comparison, notes=[*notes, *_roundings(comparison)])
        self.middle = any(row["third"] == "middle" for row in self.rows)

    def each(self, rows: Iterable[Row]) -> dict[str, list[Row]]:
        """trajectory → its rows."""
        own: dict[str, list[Row]] = {trajectory: [] for trajectory in self.trajectories}
        for row in rows:
            own[row["trajectory"]].append(row)
        return own

    def last(self, rows: Iterable[Row]) -> dict[str, list[Row]]:
        """trajectory → the rows of its last checkpoint."""
        return self.each(row for row in rows if row["progress"] == 1)

    def curves(self, rows: Iterable[Row], x: str, y: str) -> dict[str, tuple[list[float], list[float]]]:
        """Two columns, for every trajectory that has rows."""
        return {t: ([r[x] for r in own], [r[y] for r in own]) for t, own in self.each(rows).items() if own}

    def types(self) -> list[str]:
        """The module types there are, in the usual order."""
        found = {row["type"] for row in self.rows}
        return [kind for kind in TYPES if kind in found]

    def _sorted(self, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        place = {t: i for i, t in enumerate(self.trajectories)}
        return sorted(rows, key=lambda row: (place[row["trajectory"]], row["progress"]))


def _roundings(comparison: Comparison) -> list[str]:
    """A sentence for every pair of dtypes of a base's and a checkpoint's tensor."""
    paths: dict[tuple[torch.dtype, torch.dtype], dict[str, None]] = {}
    for _, _, checkpoint in comparison.checkpoints():
        for name in comparison.names:
            pair = comparison.base.shapes[name][1], checkpoint.shapes[name][1]
            if pair[0] != pair[1]:
                paths.setdefault(pair, {})[str(checkpoint.path)] = None
    out = []
    for pair, own in paths.items():
        coarser = max(pair, key=lambda dtype: torch.finfo(dtype).eps)
        unless = ", unless training began with the rounded weights" if coarser == pair[0] else ""
        base, other, coarser = (str(dtype).removeprefix("torch.") for dtype in (*pair, coarser))
        out.append(
            f"{base} in the base is {other} in {listed(list(own))}: ΔW contains what rounding to {coarser} changed"
            f"{unless}."
        )
    return out


def finite(row: Row) -> bool:
    return math.isfinite(row["update_norm"]) and math.isfinite(row["weight_norm"])


def grouped(rows: Iterable[Row], *keys: str) -> list[tuple[dict[str, Any], list[Row]]]:
    """Columns, and the rows that have the same values there, in order of first appearance."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [(dict(zip(keys, values, strict=True)), own) for values, own in groups.items()]


def norms(rows: Sequence[Row]) -> dict[str, Any]:
    """Totals over tensors: counts add, norms add in squares. Tensors that are not finite are left out; NaN, which
    reports print as a dash, where none is left."""
    rows = [row for row in rows if finite(row)]
    parameters = sum(row["parameters"] for row in rows)
    sums = (sum(row[key] ** 2 for row in rows) if rows else math.nan for key in ("update_norm", "weight_norm"))
    update, weight = map(math.sqrt, sums)
    return {
        "parameters": parameters,
        "update_norm": update,
        "weight_norm": weight,
        "relative_update": relative(update, weight),
        "unchanged_fraction": fraction(sum(r["unchanged_fraction"] * r["parameters"] for r in rows), parameters),
    }


def mean(rows: Sequence[Row], key: str) -> float:
    """The average of a column over the rows that have it; NaN, which reports print as a dash, where none has."""
    values = [row[key] for row in rows if row.get(key) is not None and row[key] == row[key]]
    return sum(values) / len(values) if values else math.nan


def interval(row: Row, key: str) -> Interval:
    """A column between those that bound it, or ± two standard errors, where the row has them."""
    value, spread = row[key], 2 * row.get(f"{key}_error", 0.0)
    return Interval(value, row.get(f"{key}_low", value - spread), row.get(f"{key}_high", value + spread))


def fraction(part: float, whole: float) -> float:
    """NaN of nothing."""
    return part / whole if whole else math.nan
