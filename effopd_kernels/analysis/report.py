"""report.html: one file that needs no network and no script, read top to bottom, on a phone and in print.

It stands beside the folders ``figures`` and ``tables`` that its numbers and pictures come from; the pictures are inside
it as data, so it can be sent alone.
"""

import base64
import html
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import figures
from .figures import Interval, Picture
from .painter import Painter
from .tables import Rows, write_table

PARTS = REPORT_NAME, FIGURES, TABLES = "report.html", "figures", "tables"
_STYLE = Path(__file__).with_name("report.css")


@dataclass(frozen=True)
class Headline:
    """One number that matters, for every trajectory: shown as a bar, with a whisker where it is an `Interval`."""

    label: str
    values: Mapping[str, float | Interval]  # trajectory → number ≥ 0
    explained: str  # what the number says, in a few words
    full: float | None = None  # the number a bar across the whole width stands for; default the largest shown


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        title, lead: what it is about, and one or two sentences of what was found.
        figures: name of its files → figure.
        how_to_read: one sentence under the figures, where there are any.
        table: rows of equal keys, each value a number, string, bool, None or `Interval`; keys become the header.
        table_note: one sentence under the table, such as where the rest of its rows are.
    """

    title: str
    lead: str = ""
    figures: Mapping[str, Picture] = field(default_factory=dict)
    how_to_read: str = ""
    table: Sequence[Mapping[str, Any]] | None = None
    table_note: str = ""


@dataclass(frozen=True)
class Part:
    """What one analysis found: its part of the report, and its tables by name."""

    sections: Sequence[Section] = ()
    headlines: Sequence[Headline] = ()
    tables: Mapping[str, Rows] = field(default_factory=dict)


def shown(value: Any) -> str:
    """A value as the report prints it: three significant digits, more below 1 where they would make it 1, thousands
    separated, a dash for what is not there."""
    if isinstance(value, Interval):
        if math.isnan(value.low):
            return shown(value.value)
        return f"{shown(value.value)} [{shown(value.low)}, {shown(value.high)}]"
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if size >= 999.5 and size < 1e7:
        text = f"{value:,.0f}"
    elif 0.9995 <= value < 1 - 1e-6:  # a share of almost all
        text = f"{value:.{math.ceil(-math.log10(1 - value))}f}"
    elif value == 0 or 1e-3 <= size < 999.5:
        text = f"{value:.3g}"
    else:
        mantissa, exponent = f"{value:.2e}".split("e")
        text = f"{float(mantissa):g}e{int(exponent)}"
    return text.replace("-", "−")


def write_report(
    folder: Path,
    title: str,
    parts: Sequence[Part],
    settings: Mapping[str, Any],
    *,
    lead: str = "",
    notes: Sequence[str] = (),
    painter: Painter | None = None,
) -> None:
    """Write ``report.html``, ``figures`` and ``tables`` into ``folder``.

    Args:
        lead: one paragraph under the title: what was compared.
        notes: what a reader must know before trusting a number, such as tensors left out; shown at the top.
        settings: shown at the end, with the versions of what computed them.
        painter: what draws the figures, while this process writes the tables.
    """
    sections = [section for part in parts for section in part.sections]
    every = [(figure, folder / FIGURES, name) for section in sections for name, figure in section.figures.items()]
    with (painter or Painter()).drawing(every):
        for name, rows in (table for part in parts for table in part.tables.items()):
            write_table(folder / TABLES, name, rows)
    contents = "".join(f'<li><a href="#{_anchor(s.title)}">{_text(s.title)}</a></li>' for s in sections)
    body = [
        f"<header><h1>{_text(title)}</h1>{_paragraph(lead)}</header>",
        "".join(f'<p class="note">{_text(note)}</p>' for note in notes),
        _headlines([headline for part in parts for headline in part.headlines]),
        f"<nav><ul>{contents}</ul></nav>",
        *(_section(section, folder / FIGURES) for section in sections),
        _settings({**settings, **versions()}),
    ]
    (folder / REPORT_NAME).write_text(
        _PAGE.format(title=_text(title), style=_STYLE.read_text("utf-8"), body="\n".join(filter(None, body))),
        "utf-8",
        "backslashreplace",  # paths may hold bytes that are no text
    )


def versions() -> dict[str, str]:
    """What computed the numbers, and when."""
    import torch

    from .. import __version__

    threads = f"{torch.get_num_threads()} threads"
    return {
        "effopd_kernels": __version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "machine": f"{platform.machine()}, {threads}",
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _headlines(headlines: Sequence[Headline]) -> str:
    cards = []
    for headline in headlines:
        intervals = {n: v if isinstance(v, Interval) else Interval(v, v, v) for n, v in headline.values.items()}
        full = headline.full or max((h for i in intervals.values() for h in i if math.isfinite(h)), default=0) or 1.0
        bar = len(intervals) > 1 or headline.full is not None  # a number alone has nothing to be held against
        rows = "".join(_bar(name, i, full if bar else None, k) for k, (name, i) in enumerate(intervals.items()))
        cards.append(f'<div class="card"><h3>{_text(headline.label)}</h3>{rows}{_paragraph(headline.explained)}</div>')
    return f'<section class="cards">{"".join(cards)}</section>' if cards else ""


def _bar(name: str, interval: Interval, full: float | None, index: int) -> str:
    def percent(value: float) -> str:
        return f"{100 * min(max(value / full, 0), 1) if math.isfinite(value) else 0:.2f}%"

    # The bounds in words too: a bar alone tells nothing to a screen reader.
    parts = [f"<span>{_text(name)}</span><b>{shown(interval.value)}</b>{_bounds(interval)}"]
    if full is not None:
        colour = figures.look(index)["color"]
        parts.append(f'<div><u style="width:{percent(interval.value)};background:{colour}"></u>')
        if _bounds(interval):
            ends = f"left:{percent(interval.low)};right:calc(100% - {percent(interval.high)})"
            parts.append(f'<i style="{ends}"></i>')
        parts.append("</div>")
    return f'<div class="bar">{"".join(parts)}</div>'


def _bounds(interval: Interval) -> str:
    """The error bars, where there are any and they are wider than what is printed of the number."""
    ends = [shown(interval.low), shown(interval.high)]
    return "" if set(ends) <= {shown(interval.value), shown(None)} else f"<small>{' – '.join(ends)}</small>"


def _section(section: Section, folder: Path) -> str:
    pictures = "".join(_picture(folder / f"{name}.svg", section) for name in section.figures)
    parts = [f'<section id="{_anchor(section.title)}"><h2>{_text(section.title)}</h2>', _paragraph(section.lead)]
    if pictures:
        parts.append(f'<div class="figures">{pictures}</div>')
    if pictures and section.how_to_read:
        parts.append(f'<p class="how"><b>How to read it.</b> {_text(section.how_to_read)}</p>')
    if section.table:
        parts.append(_table(section.table) + _paragraph(section.table_note, "how"))
    return "".join([*parts, "</section>"])


def _picture(path: Path, section: Section) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    name = path.stem.replace("_", " ")
    return f'<img alt="{_text(section.title)}: {_text(name)}" src="data:image/svg+xml;base64,{data}">'


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    header = list(dict.fromkeys(key for row in rows for key in row))
    words = {key for key in header if any(isinstance(row.get(key), str) for row in rows)}

    def cell(key: str, value: Any) -> str:
        inner = shown(value.value) + _bounds(value) if isinstance(value, Interval) else _text(shown(value))
        return f'<td class="word">{inner}</td>' if key in words else f"<td>{inner}</td>"

    head = "".join(f"<th{' class=word' * (key in words)}>{_text(key)}</th>" for key in header)
    body = "".join(f"<tr>{''.join(cell(key, row.get(key)) for key in header)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _settings(settings: Mapping[str, Any]) -> str:
    rows = "".join(f"<dt>{_text(key)}</dt><dd>{_text(shown(value))}</dd>" for key, value in settings.items())
    return f'<section id="settings"><h2>Settings and versions</h2><dl>{rows}</dl></section>'


def _paragraph(text: str, kind: str = "") -> str:
    return f"<p{f' class={kind}' if kind else ''}>{_text(text)}</p>" if text else ""


def _anchor(title: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in title.lower())


def _text(text: str) -> str:
    return html.escape(str(text))


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
