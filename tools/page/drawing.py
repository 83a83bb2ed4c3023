"""Draw the figures of the report: small enough for a phone, in colours that follow light and dark mode."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from matplotlib import rc_context, rc_params_from_file
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tools.cli import by_number
from tools.page.run import Points, Run
from tools.partition_heatmap import draw_table

FOLDER = Path(__file__).parent
# The colours of light mode by name. The page replaces them by its variables, which follow light and dark mode.
PALETTE = dict(re.findall(r"--(ink|line|c\d):(#\w+)", (FOLDER / "page.css").read_text().partition("@media")[0]))
INK, LINE, *COLOURS = PALETTE.values()
GREY = COLOURS[7]
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
SMALL, WIDE = 4.2, 9.4  # inches wide: 403 and 902 pixels of CSS
MOST_ROWS, MOST_LINES, MOST_NAMED, POINTS_MARKED = 100, 8, 8, 30
STYLE: dict[Any, Any] = dict(rc_params_from_file(FOLDER / "page.mplstyle", use_default_template=False))
SMALLEST = STYLE["xtick.labelsize"]


@dataclass(frozen=True)
class Picture:
    """A figure of the page with the name of its PNG file, its content in words, and a note below it."""

    name: str
    figure: Figure
    alt: str
    note: str = ""
    wide: bool = False

    def svg(self) -> str:
        """Return the figure as SVG in the page's colours, with its content in words for screen readers."""
        out = StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        with rc_context(STYLE | {"svg.hashsalt": f"{self.name} {self.alt}"}):
            self.figure.savefig(out, format="svg", transparent=True, dpi=200, metadata=nothing)
        drawn = re.sub(r"<style[^>]*>.*?</style>|\n\s*", " ", out.getvalue(), flags=re.DOTALL).partition("<svg ")[2]
        drawn = re.sub(r'<g id="[^"]*"', "<g", drawn)
        return themed(f'<svg role="img" aria-label="{escape(self.alt)}" {drawn.rstrip()}')


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
    for name, light in PALETTE.items():
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
    if not parts:
        return None
    axes = new_axes(title, "round", ylabel)
    every = np.unique(np.concatenate([rounds for rounds, _ in parts.values()]))
    edges = np.arange(every[0], every[-1] + 2) - 0.5
    below = np.zeros(len(edges) - 1)
    medians = []
    for colour, (label, (rounds, values)) in zip(COLOURS, parts.items(), strict=False):
        top = below.copy()
        top[rounds - every[0]] += values
        axes.stairs(top, edges, baseline=below, fill=True, color=colour, label=label)
        below = top
        medians.append(f"{label} {np.median(values):.3g}")
    by_round(axes)
    return finish(name, axes, f"Medians: {', '.join(medians)}")


def grouped(table: np.ndarray, most: int) -> tuple[np.ndarray, int]:
    """Add up neighbouring rows until at most `most` are left.

    Return the new table, and how many old rows make one new row; for the last new row there may be fewer.
    """
    size = -(-len(table) // most)
    return np.add.reduceat(table, np.arange(0, len(table), size)), size


def draw_classes(run: Run) -> Picture | None:
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
    notes = [f"Each row is the sum of up to {together} of the {len(held):,} clients, by id."] if together > 1 else []
    notes += [f"Each column is the sum of up to {beside} classes."] if beside > 1 else []
    if together > 1:
        axes.set_ylabel(f"clients, {together} per row")
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


def _as_number(name: str) -> tuple[float, list[tuple[str, int, str]]]:
    try:
        return float(name), []
    except ValueError:
        return float("inf"), by_number(name)
