"""Draw the figures of the report: small enough for a phone, in colours that follow light and dark mode."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from types import MappingProxyType
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tools.page.run import Points, Run, by_number
from tools.partition_heatmap import draw_table

PALETTE = {  # in the light, in the dark
    "ink": ("#1b1f24", "#e7eaee"),
    "line": ("#d5dae1", "#3a424d"),
    "c0": ("#0b62c4", "#62a8ff"),
    "c1": ("#c2410c", "#ff9a56"),
    "c2": ("#15803d", "#4fd27f"),
    "c3": ("#9d1fb0", "#e38bf2"),
    "c4": ("#0e7490", "#36cfe6"),
    "c5": ("#946200", "#f2c14b"),
    "c6": ("#be123c", "#ff8095"),
    "c7": ("#4b5563", "#aab4c0"),
}
INK, LINE = (PALETTE[name][0] for name in ("ink", "line"))
COLOURS = [PALETTE[f"c{i}"][0] for i in range(8)]
GREY = COLOURS[7]
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
SMALL, WIDE = 4.2, 9.4  # inches wide: 403 and 902 pixels of CSS
SMALLEST = 9.5  # points: 12.7 pixels, 11.5 where a phone of 390 leaves a figure 366
MOST_ROWS, MOST_LINES, MOST_NAMED, POINTS_MARKED = 100, 8, 8, 30
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "text.parse_math": False,  # a $ in a name is a $
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": SMALLEST,
    "ytick.labelsize": SMALLEST,
    "legend.frameon": False,
    "legend.fontsize": SMALLEST,
    "lines.linewidth": 1.7,
    "lines.markersize": 4,
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Picture:
    """A figure of the page with the name of its PNG file, its content in words, and a note below it."""

    name: str
    figure: Figure
    alt: str
    note: str = ""
    wide: bool = False

    def svg(self) -> str:
        """Return the figure as SVG in the page's colours."""
        out = StringIO()
        with rc_context(STYLE | {"svg.hashsalt": f"{self.name} {self.alt}"}):
            self.figure.savefig(out, format="svg", transparent=True, dpi=200, metadata={"Date": None})
        body = out.getvalue().partition("<svg ")[2]
        body = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|\n\s*", " ", body, flags=re.DOTALL)
        body = re.sub(r'<g id="[^"]*"', "<g", body)
        return themed(body.partition(">")[2].rpartition("</svg>")[0])

    @property
    def size(self) -> tuple[float, float]:
        """Return width and height in points."""
        width, height = self.figure.get_size_inches()
        return width * 72, height * 72


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    label: str
    points: Points
    colour: str
    dashes: int = 0

    def words(self) -> str:
        x, y = self.points
        return f"{self.label} {y[0]:.4g} at {x[0]:g}, {y[-1]:.4g} at {x[-1]:g}"


def themed(text: str) -> str:
    """Replace the palette's colours by the page's variables, which follow light and dark mode."""
    for name, (light, _) in PALETTE.items():
        text = text.replace(light, f"var(--{name})")
    return text


def new_axes(title: str, xlabel: str, ylabel: str, width: float = SMALL, height: float = 3.0) -> Axes:
    axes = Figure(figsize=(width, height), layout="constrained").subplots()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return axes


def finish(name: str, axes: Axes, alt: str, note: str = "", wide: bool = False) -> Picture:
    """Add the legend and return the picture."""
    figure = axes.figure
    assert isinstance(figure, Figure)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        widest = 34 + 5.4 * max(map(len, map(str, labels)))  # points
        columns = max(1, int(figure.get_figwidth() * 72 / widest))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=1.8, columnspacing=1.2)
    return Picture(name, figure, f"{axes.get_title(loc='left')}. {alt}", note, wide)


def by_round(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))


def draw_curves(
    name: str,
    title: str,
    ylabel: str,
    curves: Sequence[Curve],
    marks: Mapping[int, str] = MappingProxyType({}),
    xlabel: str = "round",
    zero: bool = False,
) -> Picture | None:
    """Draw lines over rounds (or over xlabel), with marks at some rounds; returns None if there is nothing to draw."""
    curves = [curve for curve in curves if len(curve.points[0])]
    if not curves:
        return None
    axes = new_axes(title, xlabel, ylabel)
    for curve in curves:
        marker = "o" if len(curve.points[0]) <= POINTS_MARKED else None
        faint: dict[str, Any] = {"lw": 0.8, "alpha": 0.5} if not curve.label else {}
        style: dict[str, Any] = {"linestyle": DASHES[curve.dashes], "color": curve.colour, "label": curve.label or None}
        axes.plot(*curve.points, marker=marker, **style, **faint)
    draw_marks(axes, marks)
    if xlabel == "round":
        by_round(axes)
    if zero:
        axes.set_ylim(bottom=0)
    return finish(name, axes, "; ".join(curve.words() for curve in curves if curve.label))


def draw_marks(axes: Axes, marks: Mapping[int, str]) -> None:
    """Draw a thin vertical line at each marked round, with its word above the axes."""
    for i, (at, word) in enumerate(sorted(marks.items())):
        axes.axvline(at, color=INK, lw=0.8, ls=(0, (2, 2)))
        side = "center" if len(marks) == 1 else ("right", "left", "center")[i % 3]
        place: dict[str, Any] = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points"}
        axes.annotate(word, (at, 1), (0, 2 + 11 * (i > 1)), ha=side, va="bottom", fontsize=SMALLEST, **place)
    if marks:
        axes.set_title(axes.get_title(loc="left"), loc="left", pad=16 + 11 * (len(marks) > 2))


def draw_spread(run: Run, key: str, title: str, marks: Mapping[int, str]) -> Picture | None:
    """Draw the spread of a figure over the clients: min to max, p10 to p90, and the median."""
    bands = {name: run.series("evaluate", f"{key}_spread.{name}") for name in ("min", "p10", "median", "p90", "max")}
    x, middle = bands["median"]
    if not len(x) or len({len(found) for found, _ in bands.values()}) > 1:
        return None
    axes = new_axes(title, "round", key.replace("_", " "))
    for low, high, alpha in (("min", "max", 0.2), ("p10", "p90", 0.35)):
        label = f"{low} to {high}"
        axes.fill_between(x, bands[low][1], bands[high][1], color=COLOURS[0], alpha=alpha, lw=0, label=label)
        if len(x) == 1:
            axes.vlines(x, bands[low][1], bands[high][1], color=COLOURS[0], alpha=2 * alpha, lw=8)
    axes.plot(x, middle, color=COLOURS[0], label="median", marker="o" if len(x) <= POINTS_MARKED else None)
    draw_marks(axes, marks)
    by_round(axes)
    last = ", ".join(f"{name} {y[-1]:.3f}" for name, (_, y) in bands.items())
    return finish(f"spread-{key}", axes, f"In round {x[-1]} over clients: {last}")


def draw_stack(name: str, title: str, ylabel: str, parts: dict[str, Points]) -> Picture | None:
    """Draw the parts of a round stacked on each other."""
    rounds = sorted({int(x) for found, _ in parts.values() for x in found})
    if not rounds:
        return None
    filled = [
        np.array([dict(zip(x.tolist(), y, strict=True)).get(number, 0.0) for number in rounds])
        for x, y in parts.values()
    ]
    axes = new_axes(title, "round", ylabel)
    if len(rounds) <= 2 * POINTS_MARKED:
        below = np.zeros(len(rounds))
        for i, (label, values) in enumerate(zip(parts, filled, strict=True)):
            axes.bar(rounds, values, bottom=below, color=COLOURS[i], label=label, width=0.8)
            below += values
    else:
        axes.stackplot(rounds, filled, colors=COLOURS, labels=list(parts), lw=0)
    by_round(axes)
    medians = ", ".join(f"{label} {np.median(values):.3g}" for label, values in zip(parts, filled, strict=True))
    return finish(name, axes, f"Medians: {medians}")


def grouped(table: np.ndarray, most: int) -> tuple[np.ndarray, int]:
    """Return a table of at most `most` rows, each the sum of equally many neighbours, and how many these are."""
    size = -(-len(table) // most)
    return np.add.reduceat(table, np.arange(0, len(table), size)), size


def draw_classes(run: Run) -> Picture | None:
    """Draw how many training samples of each class each client holds."""
    held = {name: counts for name, counts in run.roster("label_hist").items() if counts}
    if not held or len({len(counts) for counts in held.values()}) > 1:
        return None
    table, together = grouped(np.array(list(held.values()), float), MOST_ROWS)
    columns, beside = grouped(table.T, MOST_ROWS)
    table = columns.T
    wide = table.shape[0] > 30 or table.shape[1] > 12
    height = min(6.0, max(3.2, 1.4 + 0.24 * len(table)))
    axes = new_axes("Samples by client and class", "class", "client", WIDE if wide else SMALL, height)
    axes.grid(visible=False)
    top = max(1.0, float(table.max()))
    fits = table.shape[1] <= 10 and top < 1000
    draw_table(axes, table, [str(i * beside) for i in range(table.shape[1])], top, SMALLEST if fits else None)
    if len(held) <= 30:
        axes.set_yticks(range(len(held)), list(held))
    notes = [f"Each row is the sum of {together} of the {len(held):,} clients, by id."] if together > 1 else []
    notes += [f"Each column is the sum of {beside} classes."] if beside > 1 else []
    if together > 1:
        axes.set_ylabel(f"clients, {together} a row")
    total = int(table.sum())
    return finish(
        "classes", axes, f"{len(held)} clients, {total:,} training samples in all", " ".join(notes), wide=wide
    )


def draw_setting(key: str, values: Sequence[str], results: Sequence[float], objective: str) -> Picture:
    """Draw the objective of every run over the values of one setting, and the median of each."""
    found: dict[str, list[float]] = {}
    for name, figure in sorted(zip(values, results, strict=True), key=lambda pair: _as_number(pair[0])):
        found.setdefault(name, []).append(figure)
    places = [_as_number(name)[0] for name in found]
    on_scale = len(found) > MOST_NAMED and np.isfinite(places).all()
    axes = new_axes(f"{objective[0].upper()}{objective[1:]} by {key}", key, objective)
    at = places if on_scale else list(range(len(found)))
    for place, figures in zip(at, found.values(), strict=True):
        axes.plot([place] * len(figures), figures, "o", color=COLOURS[0], alpha=0.6)
    axes.plot(at, [np.median(figures) for figures in found.values()], color=COLOURS[1], lw=1 if on_scale else None)
    if on_scale and min(places) > 0 and max(places) > 50 * min(places):
        axes.set_xscale("log")
    if not on_scale:
        axes.set_xticks(at, [name if len(name) <= 16 else f"{name[:15]}…" for name in found])
        axes.set_xlim(-0.5, len(found) - 0.5)
        axes.tick_params(axis="x", labelrotation=90 if sum(map(len, found)) > 36 else 0)
    words = "; ".join(f"{name}: {np.median(figures):.4g}" for name, figures in list(found.items())[:MOST_NAMED])
    return finish(f"setting-{key}", axes, f"Medians: {words}")


def _as_number(name: str) -> tuple[float, list[tuple[str, int]]]:
    try:
        return float(name), []
    except ValueError:
        return float("inf"), by_number(name)
