"""What the interventions found, as tables, figures and the sections of a report."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import figures
from .evaluations import MEASURED, Z
from .figures import Interval, Picture
from .plans import FINAL, KEPT, OWN, UNMATCHED
from .report import Headline, Part, Section, shown, write_report

LINES = "Dotted: the base (grey) and the final models; bands: 95 % of what other prompts would give."
BLOCK_NAMES = {"mlp": "MLP", "attention": "attention", "both": "MLP and attention"}
LABELS = {"accuracy": "accuracy", "teacher_kl": "KL to the teacher, nats per token"}
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Presentation:
    """How one intervention is presented.

    Attributes:
        title, lead, how_to_read: as in `report.Section`.
        draw: its figures by name.
        highlight: what to look at first, and each trajectory's row of it, from the rows that have a share to recover.
        across: the column whose values become the table's columns; None where the metric is the only one.
        headline: whether the highlight is also a number at the top.
    """

    title: str
    lead: str
    how_to_read: str
    draw: "Callable[[View, Sequence[Row]], Iterator[tuple[str, Picture]]]"
    highlight: Callable[[Sequence[Row]], tuple[str, list[Row]]] = lambda rows: ("", [])
    across: str | None = "trajectory"
    headline: bool = False


def write(folder: Path, rows: Sequence[Row], metric: str, settings: Row, lead: str, notes: Sequence[str] = ()) -> None:
    """tables/, figures/ and report.html into `folder`.

    Args:
        rows: of `evaluations.rows_of`. metric: the one drawn. settings, lead, notes: see `report.write_report`.
    """
    view = View(rows, metric)
    tables = {"models": [r for r in rows if r["intervention"] in ("base", "final")]}
    sections, headlines = [], [view.scores()]
    for name, presentation in PRESENTATIONS.items():
        own = [{k: v for k, v in row.items() if k != "intervention"} for row in rows if row["intervention"] == name]
        if not own:
            continue
        tables[name] = own
        what, highlighted = presentation.highlight([row for row in own if row["recovered"] is not None])
        if highlighted and presentation.headline:
            shares = {row["trajectory"]: view.interval(row, "recovered") for row in highlighted}
            explained = "Share of the final model's gain over the base."
            headlines.append(Headline(what[0].upper() + what[1:], shares, explained, 1.0))
        note = f"{LABELS[metric]}; tables/{name}.csv has gains over the base, what they recover, and standard errors."
        table = view.table(own, presentation.across)
        about = f"{presentation.lead} {highlight_sentence(what, highlighted)}"
        drawn = dict(presentation.draw(view, own))
        sections.append(Section(presentation.title, about, drawn, presentation.how_to_read, table, note))
    part = Part(sections, headlines, tables)
    write_report(folder, "What edited models score", [part], settings, lead=lead, notes=[*notes, *view.losses()])


class View:
    """Rows under one metric, and the lines every figure is read against: the base and the final models."""

    def __init__(self, rows: Sequence[Row], metric: str):
        self.metric = metric
        (self.base,) = (row for row in rows if row["intervention"] == "base")
        self.finals = {row["trajectory"]: row for row in rows if row["intervention"] == "final"}

    def interval(self, row: Row, column: str | None = None) -> Interval:
        column = column or self.metric
        value, spread = row[column], Z * row[f"{column}_se"]
        return Interval(value, row.get(f"{column}_low", value - spread), row.get(f"{column}_high", value + spread))

    def scores(self) -> Headline:
        return Headline(
            LABELS[self.metric],
            {**{t: self.interval(row) for t, row in self.finals.items()}, "base": self.interval(self.base)},
            "Final models and base on the same prompts. Whiskers: 95 % of what other prompts would give.",
            1.0 if self.metric == "accuracy" else None,
        )

    def losses(self) -> list[str]:
        """A sentence for every final model that gained nothing, no number, or no more than other prompts explain."""
        out = []
        for t, row in self.finals.items():
            if row["recovered"] is not None:
                continue
            scores = f"{LABELS[self.metric]}: {shown(row[self.metric])}, the base's {shown(self.base[self.metric])}"
            gain = self.interval(row, MEASURED)
            if not math.isfinite(gain.value):
                whose = f"the final model of {t}" if math.isfinite(self.base[self.metric]) else "the base"
                out.append(
                    f"The score of {whose} is not a finite number ({scores}), as where weights have diverged: there is "
                    f"no gain, so none of the edits of {t} recovers a share."
                )
            elif gain.value <= 0:
                out.append(
                    f"The final model of {t} scores no better than the base ({scores}): there is no gain, so none of "
                    "its edits recovers a share."
                )
            else:
                how = f"by no more than the choice of prompts explains, {shown(gain)}"
                if math.isnan(gain.low):
                    how = "on one prompt, which does not tell what others would give"
                out.append(
                    f"The final model of {t} scores better than the base ({scores}) {how}: what its edits recover of "
                    "that has no meaning and is left out; score on more prompts."
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

    def curves(self, rows: Sequence[Row], x: str, x_label: str, **options) -> Picture:
        """The metric over `x` with its 95 % bands, one line per trajectory; dotted, the base and the final models."""
        curves = {
            t: ([row[x] for row in own], [self.interval(row) for row in own]) for t, own in by_trajectory(rows).items()
        }
        finals = [(final[self.metric], figures.look(i)["color"]) for i, final in enumerate(self.finals.values())]
        levels = [(self.base[self.metric], figures.GREY), *finals]
        return figures.lines(curves, x_label, LABELS[self.metric], levels=levels, **options)

    def limits(self, rows: Sequence[Row]) -> tuple[float, float]:
        """One range for several figures."""
        ends = [v for row in (self.base, *self.finals.values(), *rows) for v in self.interval(row)]
        ends = [v for v in ends if math.isfinite(v)] or [0.0]  # a model whose logits overflow has a KL of NaN
        margin = 0.04 * (max(ends) - min(ends)) or 0.05
        return min(ends) - margin, max(ends) + margin


def scale(view: View, rows: Sequence[Row]) -> Iterator[tuple[str, Picture]]:
    yield "scale", view.curves(rows, "alpha", "α in W0 + α·ΔW")


def norm(view: View, rows: Sequence[Row]) -> Iterator[tuple[str, Picture]]:
    origin = [{**view.base, "trajectory": t, "update_norm": 0.0} for t in view.finals]
    yield "norm", view.curves([*origin, *rows], "update_norm", "‖ΔW‖, all tensors")


def embeddings(view: View, rows: Sequence[Row]) -> Iterator[tuple[str, Picture]]:
    choices = list(dict.fromkeys(row["of_the_base"] for row in rows))
    bars = {t: [view.interval(row) for row in (*own, view.base)] for t, own in by_trajectory(rows).items()}
    yield "embeddings", figures.bars([*choices, "everything"], bars, LABELS[view.metric])


def window(view: View, rows: Sequence[Row]) -> Iterator[tuple[str, Picture]]:
    placed = [{**row, "middle": (row["first_layer"] + row["last_layer"]) / 2} for row in rows]
    for block in dict.fromkeys(row["block"] for row in rows):
        own = [row for row in placed if row["block"] == block]
        properties = {"title": BLOCK_NAMES[block], "ylim": view.limits(rows)}
        yield f"window_{block}", view.curves(own, "middle", "middle layer", whole=True, **properties)


def truncation(part: str):
    def draw(view: View, rows: Sequence[Row]) -> Iterator[tuple[str, Picture]]:
        for i, matched in enumerate(dict.fromkeys(row["norm"] for row in rows)):
            own = [row for row in rows if row["norm"] == matched]
            label = f"share of the rank {'kept' if part == 'top' else 'dropped'}, from the top"
            properties = {"title": f"norm: {matched}", "ylim": view.limits(rows), "xscale": "log"}
            figure = view.curves(own, KEPT[part], label, x_format="{x:g}", **properties)
            yield f"{part}_{i}_{re.sub(r'[^A-Za-z0-9]+', '_', matched)}", figure  # i: α and β both become _

    return draw


def rescale(view: View, rows: Sequence[Row]) -> Iterator[tuple[str, Picture]]:
    views = [view]
    if view.metric != "teacher_kl" and "teacher_kl" in view.base:
        views.append(View([view.base, *view.finals.values()], "teacher_kl"))
    for of in views:
        for norm, stem in ((OWN, "before"), (FINAL, "after")):
            own = [row for row in rows if row["norm"] == norm]
            figure = of.curves(own, "progress", "training progress", title=f"norm: {norm}", ylim=of.limits(rows))
            yield f"rescale_{stem}" + ("" if of is view else f"_{of.metric}"), figure


def best_of_each(rows: Sequence[Row]) -> list[Row]:
    """Each trajectory's row that gained most, of those whose gain is a number."""
    rows = [row for row in rows if math.isfinite(row[MEASURED])]
    return [max(own, key=lambda row: row[MEASURED]) for own in by_trajectory(rows).values()]


def tenth_of_the_rank(part: str) -> Callable[[Sequence[Row]], tuple[str, list[Row]]]:
    """The share of the rank nearest to 10 %, its norm as it falls."""

    def highlight(rows: Sequence[Row]) -> tuple[str, list[Row]]:
        share = min((row[KEPT[part]] for row in rows), key=lambda f: abs(f - 0.1), default=0.1)
        what = "top {:.0%} of the rank" if part == "top" else "rank without its top {:.0%}"
        return what.format(share), [row for row in rows if row[KEPT[part]] == share and row["norm"] == UNMATCHED]

    return highlight


def first_at_final_norm(rows: Sequence[Row]) -> list[Row]:
    early = [row for row in rows if row["norm"] == FINAL and row["progress"] < 1]  # the last is the final model
    at_final = by_trajectory(early)
    return [min(own, key=lambda row: row["step"]) for own in at_final.values()]


def by_trajectory(rows: Sequence[Row]) -> dict[str, list[Row]]:
    own: dict[str, list[Row]] = {}
    for row in rows:
        own.setdefault(row["trajectory"], []).append(row)
    return own


def highlight_sentence(what: str, rows: Sequence[Row]) -> str:
    """What the rows of a highlight recover, as a sentence; nothing where there are none."""

    def where(row: Row) -> str:
        if "alpha" in row:
            return f" (α = {row['alpha']:g})"
        if "block" in row:
            return f" ({BLOCK_NAMES[row['block']]} of layers {row['first_layer']} to {row['last_layer']})"
        return ""

    def share(value: float) -> str:
        return f"{value:.0%}" if math.isfinite(value) else shown(value)

    shares = ", ".join(f"{row['trajectory']} {share(row['recovered'])}{where(row)}" for row in rows)
    return f"Of the final model's gain the {what} recovers: {shares}." if shares else ""


MATCHED = (
    "vectors keep their final values. Norm that of NAME: rescaled, tensor by tensor, to the norm of NAME's whole "
    "update."
)
PRESENTATIONS = {
    "scale": Presentation(
        "Scaling the final update",
        "W0 + α·ΔW of the final checkpoint on every tensor: α = 0 is the base, α = 1 the trained model.",
        "A best value beyond α = 1 means that going on along the update would have paid; a flat stretch, that its "
        f"length does not matter. {LINES}",
        scale,
        lambda rows: ("best α", best_of_each(rows)),
    ),
    "norm": Presentation(
        "Score against update norm",
        "Every checkpoint as it is, placed by the Frobenius norm of its whole update.",
        f"The trajectory whose curve leaves the base's line sooner gets more out of each unit of movement. {LINES}",
        norm,
        across=None,
    ),
    "embeddings": Presentation(
        "Embeddings of the base",
        "The final model with the base's embeddings, and head where that is a tensor of its own.",
        "Equal bars for nothing and embeddings mean that training moved the embeddings to no effect. "
        "Thin lines: 95 % of what other prompts would give.",
        embeddings,
        lambda rows: (
            "final model with the base's embeddings",
            [row for row in rows if row["of_the_base"] == "embeddings"],
        ),
        headline=True,
    ),
    "window": Presentation(
        "A few layers at a time",
        "The base with a window of layers taken from the final checkpoint: their MLPs, their attention, both.",
        "A point is a window, placed at its middle layer; the further from the base's line, the more of what was "
        f"learned sits there. {LINES}",
        window,
        lambda rows: ("best window", best_of_each(rows)),
    ),
    "top": Presentation(
        "The leading part of the rank",
        f"Every matrix's final update truncated to its leading singular triplets; {MATCHED}",
        f"A curve that reaches its final model's line early has its gain in few directions. {LINES}",
        truncation("top"),
        tenth_of_the_rank("top"),
        across="norm",
        headline=True,
    ),
    "bottom": Presentation(
        "The rank without its leading part",
        f"Every matrix's final update without its leading singular triplets; {MATCHED}",
        f"A curve that stays at the base's line has nothing in the directions that are left. {LINES}",
        truncation("bottom"),
        tenth_of_the_rank("bottom"),
        across="norm",
    ),
    "rescale": Presentation(
        "Early checkpoints at the final norm",
        "Every checkpoint, and the same with each tensor's update rescaled to that tensor's final norm.",
        "Where the right panel is near the final model's line from the start, the direction was there early and "
        f"only length was missing. {LINES}",
        rescale,
        lambda rows: ("first checkpoint at the final norm", first_at_final_norm(rows)),
        across="norm",
        headline=True,
    ),
}
