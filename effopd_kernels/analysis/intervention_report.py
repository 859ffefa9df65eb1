"""What the interventions found, as tables, figures and the sections of a report."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import figures
from .evaluations import MEASURED, Z
from .plans import FINAL, KEPT, OWN, UNMATCHED
from .report import FIGURES, TABLES, Headline, Interval, Section, shown, write_report
from .tables import write_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {
    "scale": "Scaling the final update",
    "norm": "Score against update norm",
    "embeddings": "Embeddings of the base",
    "window": "A few layers at a time",
    "top": "The leading part of the rank",
    "bottom": "The rank without its leading part",
    "rescale": "Early checkpoints at the final norm",
}
LEADS = {
    "scale": "W0 + α·ΔW of the final checkpoint on every tensor: α = 0 is the base, α = 1 the trained model.",
    "norm": "Every checkpoint as it is, placed by the Frobenius norm of its whole update.",
    "embeddings": "The final model with the base's embeddings, and head where that is a tensor of its own.",
    "window": "The base with a window of layers taken from the final checkpoint: their MLPs, their attention, both.",
    "top": "Every matrix's final update truncated to its leading singular triplets; vectors keep their final values. "
    "Norm that of NAME: rescaled, tensor by tensor, to the norm of NAME's whole update.",
    "bottom": "Every matrix's final update without its leading singular triplets; vectors keep their final values. "
    "Norm that of NAME: rescaled, tensor by tensor, to the norm of NAME's whole update.",
    "rescale": "Every checkpoint, and the same with each tensor's update rescaled to that tensor's final norm.",
}
HOW_TO_READ = {
    "scale": "A best value beyond α = 1 means that going on along the update would have paid; a flat stretch, that its "
    "length does not matter.",
    "norm": "The trajectory whose curve leaves the base's line sooner gets more out of each unit of movement.",
    "embeddings": "Equal bars for nothing and embeddings mean that training moved the embeddings to no effect. "
    "Thin lines: 95 % of what other prompts would give.",
    "window": "A point is a window, placed at its middle layer; the further from the base's line, the more of what was "
    "learned sits there.",
    "top": "A curve that reaches its final model's line early has its gain in few directions.",
    "bottom": "A curve that stays at the base's line has nothing in the directions that are left.",
    "rescale": "Where the right panel is near the final model's line from the start, the direction was there early and "
    "only length was missing.",
}
ACROSS = {
    "norm": None,
    "rescale": "norm",
    "top": "norm",
    "bottom": "norm",
}  # columns of a section's table, where they are not the trajectories
LINES = "Dotted: the base (grey) and the final models; bands: 95 % of what other prompts would give."
BLOCK_NAMES = {"mlp": "MLP", "attention": "attention", "both": "MLP and attention"}
HEADLINES = ("top", "rescale", "embeddings")
LABELS = {"accuracy": "accuracy", "teacher_kl": "KL to the teacher, nats per token"}
Row = Mapping[str, Any]


def write(folder: Path, rows: Sequence[Row], metric: str, settings: Row, lead: str, notes: Sequence[str] = ()) -> None:
    """tables/, figures/ and report.html into `folder`.

    Args:
        rows: of `evaluations.rows_of`. metric: the one drawn. settings, lead, notes: see `report.write_report`.
    """
    view = View(rows, metric)
    notes = [*notes, *view.losses()]
    write_table(folder / TABLES, "models", [r for r in rows if r["intervention"] in ("base", "final")])
    sections, headlines = [], [view.scores()]
    for name, title in TITLES.items():
        own = [{k: v for k, v in row.items() if k != "intervention"} for row in rows if row["intervention"] == name]
        if not own:
            continue
        write_table(folder / TABLES, name, own)
        drawn = [figures.save(figure, folder / FIGURES, stem) for stem, figure in FIGURES_OF[name](view, own)]
        what, telling = found(view, name, own)
        if telling and name in HEADLINES:
            shares = {row["trajectory"]: view.interval(row, "recovered") for row in telling}
            label = what[0].upper() + what[1:]
            headlines.append(Headline(label, shares, "Share of the final model's gain over the base.", 1.0))
        how = HOW_TO_READ[name] if name == "embeddings" else f"{HOW_TO_READ[name]} {LINES}"
        table = view.table(own, ACROSS.get(name, "trajectory"))
        note = f"{LABELS[metric]}; tables/{name}.csv has gains over the base, what they recover, and standard errors."
        sections.append(Section(title, f"{LEADS[name]} {said(what, telling)}", drawn, how, table, note))
    write_report(folder, "What edited models score", sections, settings, lead=lead, headlines=headlines, notes=notes)


class View:
    """Rows under one metric, and the lines every figure is read against: the base and the final models."""

    def __init__(self, rows: Sequence[Row], metric: str):
        self.metric = metric
        (self.base,) = (row for row in rows if row["intervention"] == "base")
        self.finals = {row["trajectory"]: row for row in rows if row["intervention"] == "final"}

    def interval(self, row: Row, column: str | None = None) -> Interval:
        column = column or self.metric
        value, error = row[column], row[f"{column}_se"]
        spread = 0.0 if math.isnan(error) else Z * error
        return Interval(value, row.get(f"{column}_low", value - spread), row.get(f"{column}_high", value + spread))

    def scores(self) -> Headline:
        return Headline(
            LABELS[self.metric],
            {**{t: self.interval(row) for t, row in self.finals.items()}, "base": self.interval(self.base)},
            "Final models and base on the same prompts. Whiskers: 95 % of what other prompts would give.",
            1.0 if self.metric == "accuracy" else None,
        )

    def losses(self) -> list[str]:
        """A sentence for every final model that gained nothing, or no more than the choice of prompts explains."""
        out = []
        for t, row in self.finals.items():
            scores = f"{LABELS[self.metric]}: {shown(row[self.metric])}, the base's {shown(self.base[self.metric])}"
            gain = self.interval(row, MEASURED)
            if row["recovered"] is None and gain.value <= 0:
                out.append(
                    f"The final model of {t} scores no better than the base ({scores}): there is no gain, so none of "
                    "its edits recovers a share."
                )
            elif row["recovered"] is None:
                out.append(
                    f"The final model of {t} scores better than the base ({scores}) by no more than the choice of "
                    f"prompts explains, {shown(gain)}: what its edits recover of that has no meaning and is left out; "
                    "score on more prompts."
                )
        return out

    def table(self, own: Sequence[Row], across: str | None) -> list[dict[str, Any]]:
        """The metric, one row per setting and one column for each value of `across`, or one column."""
        names = ["trajectory", *(name for name in list(own[0])[: list(own[0]).index(MEASURED)] if name != "trajectory")]
        out: dict[tuple, dict[str, Any]] = {}
        for row in own:
            about = {name.replace("_", " "): row[name] for name in names if name != across}
            column = row[across] if across else self.metric.replace("_", " ")
            out.setdefault(tuple(about.values()), about)[column] = self.interval(row)
        return list(out.values())

    def curves(self, rows: Sequence[Row], x: str, x_label: str, **axes_properties) -> "Figure":
        """The metric over `x` with its 95 % bands, one line per trajectory; dotted, the base and the final models."""
        of = {t: [row for row in rows if row["trajectory"] == t] for t in self.finals}
        intervals = {t: [self.interval(row) for row in own] for t, own in of.items() if own}
        figure = figures.lines(
            {t: ([row[x] for row in of[t]], [i.value for i in found]) for t, found in intervals.items()},
            x_label,
            LABELS[self.metric],
            bands={t: ([i.low for i in found], [i.high for i in found]) for t, found in intervals.items()},
            **axes_properties,
        )
        (axes,) = figure.axes
        axes.axhline(self.base[self.metric], color="#666666", linewidth=1, linestyle=":")
        for i, final in enumerate(self.finals.values()):
            axes.axhline(final[self.metric], color=figures.look(i)["color"], linewidth=1, linestyle=":")
        return figure

    def limits(self, rows: Sequence[Row]) -> tuple[float, float]:
        """One range for several figures."""
        ends = [v for row in (self.base, *self.finals.values(), *rows) for v in self.interval(row)[1:]]
        margin = 0.04 * (max(ends) - min(ends)) or 0.05
        return min(ends) - margin, max(ends) + margin


def scale(view: View, rows: Sequence[Row]) -> Iterator[tuple[str, "Figure"]]:
    yield "scale", view.curves(rows, "alpha", "α in W0 + α·ΔW")


def norm(view: View, rows: Sequence[Row]) -> Iterator[tuple[str, "Figure"]]:
    origin = [{**view.base, "trajectory": t, "update_norm": 0.0} for t in view.finals]
    yield "norm", view.curves([*origin, *rows], "update_norm", "‖ΔW‖, all tensors")


def embeddings(view: View, rows: Sequence[Row]) -> Iterator[tuple[str, "Figure"]]:
    choices = list(dict.fromkeys(row["of_the_base"] for row in rows))
    of = {t: [view.interval(r) for r in (*rows, view.base) if r["trajectory"] in (t, None)] for t in view.finals}
    values = {t: [i.value for i in own] for t, own in of.items()}
    errors = {t: ([i.low for i in own], [i.high for i in own]) for t, own in of.items()}
    yield "embeddings", figures.bars([*choices, "everything"], values, LABELS[view.metric], errors=errors)


def window(view: View, rows: Sequence[Row]) -> Iterator[tuple[str, "Figure"]]:
    placed = [{**row, "middle": (row["first_layer"] + row["last_layer"]) / 2} for row in rows]
    for block in dict.fromkeys(row["block"] for row in rows):
        own = [row for row in placed if row["block"] == block]
        figure = view.curves(own, "middle", "middle layer", title=BLOCK_NAMES[block], ylim=view.limits(rows))
        figure.axes[0].xaxis.get_major_locator().set_params(integer=True)
        yield f"window_{block}", figure


def truncation(part: str):
    def draw(view: View, rows: Sequence[Row]) -> Iterator[tuple[str, "Figure"]]:
        for matched in dict.fromkeys(row["norm"] for row in rows):
            own = [row for row in rows if row["norm"] == matched]
            label = f"share of the rank {'kept' if part == 'top' else 'dropped'}, from the top"
            figure = view.curves(own, KEPT[part], label, title=f"norm: {matched}", ylim=view.limits(rows), xscale="log")
            figure.axes[0].xaxis.set_major_formatter("{x:g}")
            yield f"{part}_{re.sub(r'[^A-Za-z0-9]+', '_', matched)}", figure

    return draw


def rescale(view: View, rows: Sequence[Row]) -> Iterator[tuple[str, "Figure"]]:
    views = [view]
    if view.metric != "teacher_kl" and "teacher_kl" in view.base:
        views.append(View([view.base, *view.finals.values()], "teacher_kl"))
    for of in views:
        for norm, stem in ((OWN, "before"), (FINAL, "after")):
            own = [row for row in rows if row["norm"] == norm]
            figure = of.curves(own, "progress", "training progress", title=f"norm: {norm}", ylim=of.limits(rows))
            yield f"rescale_{stem}" + ("" if of is view else f"_{of.metric}"), figure


FIGURES_OF = {
    "scale": scale,
    "norm": norm,
    "embeddings": embeddings,
    "window": window,
    "top": truncation("top"),
    "bottom": truncation("bottom"),
    "rescale": rescale,
}


def found(view: View, name: str, rows: Sequence[Row]) -> tuple[str, list[Row]]:
    """What to look at first, and each trajectory's row of it; those whose final model gained nothing have none."""
    rows = [row for row in rows if row["recovered"] is not None]
    of = {t: own for t in view.finals if (own := [row for row in rows if row["trajectory"] == t])}
    best = [max(own, key=lambda row: row[MEASURED]) for own in of.values()]
    if name in KEPT and rows:
        share = min((row[KEPT[name]] for row in rows), key=lambda f: abs(f - 0.1))
        chosen = [row for row in rows if row[KEPT[name]] == share and row["norm"] == UNMATCHED]
        return ("top {:.0%} of the rank" if name == "top" else "rank without its top {:.0%}").format(share), chosen
    if name == "rescale":
        last = [[row for row in own if row["norm"] == FINAL] for own in of.values()]
        return "first checkpoint at the final norm", [min(own, key=lambda row: row["step"]) for own in last]
    if name == "embeddings":
        return "final model with the base's embeddings", [row for row in rows if row["of_the_base"] == "embeddings"]
    return {"scale": ("best α", best), "window": ("best window", best)}.get(name, ("", []))


def said(what: str, rows: Sequence[Row]) -> str:
    """A sentence of it."""

    def where(row: Row) -> str:
        if "alpha" in row:
            return f" (α = {row['alpha']:g})"
        if "block" in row:
            return f" ({BLOCK_NAMES[row['block']]} of layers {row['first_layer']} to {row['last_layer']})"
        return ""

    shares = ", ".join(f"{row['trajectory']} {row['recovered']:.0%}{where(row)}" for row in rows)
    return f"Of the final model's gain the {what} recovers: {shares}." if shares else ""
