"""One look for all figures. Each is a single panel that stays legible at the width of a phone; reports lay them out.

A trajectory keeps its colour, marker and dash in every figure, so that print without colour and eyes that see fewer
colours can follow it.
"""

import math
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")  # Okabe & Ito 2008
MARKERS, DASHES = "osD^vPX", ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 2, 1, 2)), (0, (3, 1)), (0, (7, 3)))
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.labelcolor": "#222222",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "svg.hashsalt": "effopd",  # equal figures are equal files
}
GREY = "#666666"
WIDTH, HEIGHT, DPI = 4.8, 3.3, 150  # inches, dots per inch
LEGEND = 0.5  # inches of the height, of two rows
CHARACTERS = 50  # of a line as wide as the figure
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Interval(NamedTuple):
    """A number with its error bars."""

    value: float
    low: float
    high: float


Values = Sequence[float] | Sequence[Interval]


@dataclass(frozen=True)
class Picture:
    """What to draw: the name of one of this module's functions and its arguments. Any process can: see `painter`."""

    kind: str
    arguments: tuple
    options: dict[str, Any]

    def draw(self) -> "Figure":
        """One panel under this module's style; with a legend where two things or more have a label."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        with _style():
            figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
            FigureCanvasAgg(figure)
            axes = figure.subplots()
            globals()[self.kind].__wrapped__(axes, *self.arguments, **self.options)
            axes.set_title(_wrapped(axes.get_title("left")))
            _legend(figure, *axes.get_legend_handles_labels())
        return figure


def described(paint: Callable[..., None]) -> Callable[..., Picture]:
    """Of a function that paints into axes, one that takes the other arguments and returns the `Picture`."""

    @wraps(paint)
    def picture(*arguments: Any, **options: Any) -> Picture:
        return Picture(paint.__name__, arguments, options)

    return picture


def save(figure: "Figure", folder: Path, name: str) -> None:
    """Write ``folder/name.png`` and ``folder/name.svg``."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    folder.mkdir(parents=True, exist_ok=True)
    with _style():  # by the canvases' own methods: ``savefig`` draws everything twice
        figure.canvas.print_png(folder / f"{name}.png")
        figure.set_layout_engine("none")  # as laid out now, for both files
        FigureCanvasSVG(figure).print_svg(folder / f"{name}.svg", metadata={"Date": None})


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # said of each letter of a name in each figure
        yield


def look(index: int) -> dict:
    """Keyword arguments for ``axes.plot`` of the trajectory number ``index``."""
    looks = {"color": COLOURS, "marker": MARKERS, "linestyle": DASHES}  # more markers: the seventh colour is the first
    return {key: values[index % len(values)] for key, values in looks.items()}


@described
def lines(
    axes: "Axes",
    curves: Mapping[str, tuple[Sequence[float], Values]],
    x_label: str,
    y_label: str,
    *,
    levels: Sequence[tuple[float, str]] = (),
    markers: bool = True,
    drawstyle: str = "default",
    whole: bool = False,
    x_format: str | None = None,
    **axes_properties,
) -> None:
    """One line per trajectory, with a legend where there are several.

    Args:
        curves: trajectory → (x, y), with a band around y where it is of `Interval`.
        levels: height and colour of dotted lines across, such as what chance gives.
        whole: no tick between whole numbers of x.
        x_format: of the numbers at the ticks of x, such as "{x:g}".
        axes_properties: as for ``Axes.set``: xscale, ylim, title, ...
    """
    for i, (name, (x, y)) in enumerate(curves.items()):
        style = look(i) | {"drawstyle": drawstyle} | ({} if markers else {"marker": ""})
        y, ends = _ends(y)
        axes.plot(x, y, label=name, **style)
        if ends:
            axes.fill_between(x, *ends, color=style["color"], alpha=0.18, linewidth=0)
    if not any(math.isfinite(v) for line in axes.lines for v in line.get_ydata()):
        axes_properties.pop("xscale", None)  # matplotlib has no ticks for a logarithmic axis with no point
    if axes_properties.get("ylim") == (0, None):  # or a curve that is flat would run along the upper edge
        axes.update_datalim([(0, 0)], updatex=False)
        axes.autoscale_view()
    for height, colour in levels:
        axes.axhline(height, color=colour, linestyle=":", linewidth=1.1)
    axes.set(xlabel=x_label, ylabel=y_label, **axes_properties)
    if axes.get_xscale() == "log":
        _label_powers(axes.xaxis)
    if whole:
        axes.xaxis.get_major_locator().set_params(integer=True)
    if x_format is not None:
        axes.xaxis.set_major_formatter(x_format)


@described
def paths(
    axes: "Axes", curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], x_label: str, y_label: str
) -> None:
    """Ways through a plane, one per trajectory, fainter at the start, with a ring around the end."""
    for i, (name, (x, y)) in enumerate(curves.items()):
        style = look(i)
        axes.plot(x, y, color=style["color"], linestyle=style["linestyle"], linewidth=1, alpha=0.5)
        shades = [0.35 + 0.65 * j / max(1, len(x) - 1) for j in range(len(x))]
        axes.scatter(x, y, color=style["color"], marker=style["marker"], alpha=shades, s=26)
        axes.scatter(x[-1:], y[-1:], facecolors="none", edgecolors=style["color"], s=110, linewidths=1.4)
        axes.plot([], [], label=name, **style)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.margins(0.1)


@described
def bars(
    axes: "Axes",
    groups: Sequence[str],
    values: Mapping[str, Values],
    y_label: str,
    *,
    marks: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Bars in groups, one of each group per trajectory: ``values[trajectory][i]`` belongs to ``groups[i]``, and has an
    error bar where it is an `Interval`.

    Args:
        marks: label → a height per group to hold bars against.
    """
    width = 0.8 / len(values)
    for i, (name, heights) in enumerate(values.items()):
        x = [j + (i - (len(values) - 1) / 2) * width for j in range(len(groups))]
        heights, ends = _ends(heights)
        again = {"hatch": "///", "edgecolor": "white"} if i >= len(COLOURS) else {}
        axes.bar(x, heights, width * 0.94, label=name, color=COLOURS[i % len(COLOURS)], **again)
        if ends:
            axes.vlines(x, *ends, color="#222222", linewidth=1)
    for label, heights in (marks or {}).items():
        middle = range(len(groups))
        axes.hlines(heights, [x - 0.46 for x in middle], [x + 0.46 for x in middle], color="#222222", label=label)
    crowded = len(groups) * max(map(len, groups)) > 40  # characters that fit side by side
    axes.set(ylabel=y_label)
    axes.set_xticks(range(len(groups)), groups, rotation=40 if crowded else 0, ha="right" if crowded else "center")
    axes.grid(axis="x", visible=False)


@described
def heat_map(
    axes: "Axes",
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    *,
    limits: tuple[float, float],
    title: str,
    row_label: str,
) -> None:
    """``values[row][column]``, the first row at the bottom; NaN stays blank. ``limits`` make several comparable."""
    import numpy

    axes.figure.set_figheight(min(7.5, max(HEIGHT, 1.2 + 0.16 * len(rows))))
    grid = numpy.ma.masked_invalid(numpy.asarray(values, dtype=float))
    low, high = limits
    mesh = axes.pcolormesh(grid, cmap="viridis", vmin=low, vmax=high, edgecolors="white", linewidth=0.4)
    step = max(1, -(-len(rows) // 16))
    axes.set_yticks([i + 0.5 for i in range(0, len(rows), step)], rows[::step])
    axes.set_xticks([i + 0.5 for i in range(len(columns))], columns, rotation=40, ha="right")
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set(title=title, ylabel=row_label)
    axes.figure.colorbar(mesh, ax=axes, label=label, pad=0.02).outline.set_visible(False)


def _legend(figure: "Figure", handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Above the axes, where no curve can run through it, in as many columns as fit; for many rows the figure grows."""
    for columns in (3, 2, 1) if len(labels) > 1 else ():
        legend = figure.legend(
            handles, map(_wrapped, labels), loc="outside upper left", ncols=columns, borderaxespad=0, columnspacing=1.4
        )
        size = legend.get_window_extent(figure.canvas.get_renderer())
        if size.width <= figure.bbox.width or columns == 1:
            figure.set_figheight(figure.get_figheight() + max(0, size.height / DPI - LEGEND))
            return
        legend.remove()


def _wrapped(label: str) -> str:
    return textwrap.fill(label, CHARACTERS)


def _label_powers(axis: "Axis") -> None:
    """As matplotlib does, but in Unicode: to set the first 2×10⁻³ as mathematics takes it longer than all the rest."""
    from matplotlib.ticker import LogFormatterSciNotation

    class Powers(LogFormatterSciNotation):
        def __call__(self, x: float, pos: int | None = None) -> str:
            text = super().__call__(x, pos).removeprefix(r"$\mathdefault{").removesuffix("}$").replace(r"\times", "×")
            return re.sub(r"\^{(.+)}", lambda power: power[1].translate(SUPERSCRIPTS), text)

    axis.set_major_formatter(Powers())
    axis.set_minor_formatter(Powers())


def _ends(values: Values) -> tuple[Sequence[float], list[Sequence[float]]]:
    """The numbers, and of intervals (low, high) too."""
    if not values or not isinstance(values[0], Interval):
        return values, []
    numbers, *ends = zip(*values, strict=True)
    return numbers, ends
