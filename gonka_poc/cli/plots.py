"""Plots by matplotlib (the extra `tools`), light and dark, and histograms in the terminal."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gonka_poc.cli.artifact_file import writing
from gonka_poc.errors import ToolError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
NUM_BINS = 40
# float16 vectors of length 1: what is nearer than this is the same, and a logarithmic axis needs a least value
SAME = 1e-5
TERMINAL_WIDTH = 50


@dataclass(frozen=True)
class Theme:
    """Colours of a plot; those of `series` can be told apart without colour vision."""

    paper: str
    ink: str
    grid: str
    series: tuple[str, ...]


LIGHT = Theme("#ffffff", "#1f2328", "#d8dee4", ("#0969da", "#cf4a00", "#8250df", "#1a7f64", "#bf3989", "#6e7781"))
DARK = Theme("#0d1117", "#e6edf3", "#30363d", ("#58a6ff", "#ff9b50", "#c297ff", "#4ecfae", "#f778ba", "#8b949e"))


def theme_of(name: str) -> Theme:
    """LIGHT or DARK by name."""
    return DARK if name == "dark" else LIGHT


def distance_histogram(
    series: Mapping[str, np.ndarray],
    thresholds: Mapping[str, float],
    title: str,
    theme: Theme,
    kinds: Sequence[int] | None = None,
) -> Figure:
    """L2 distances, one row per series over a common axis; each threshold is a line with its name.

    Series of the same of `kinds` have the same colour; without them each has its own.
    """
    figure, rows = _empty(title, len(series), theme)
    drawn = [np.maximum(values[values != 0], SAME) for values in series.values()]
    ends = [*(float(values.max()) for values in drawn if len(values)), *thresholds.values(), 10 * SAME]
    bins = np.geomspace(SAME / 1.5, 1.5 * max(ends), NUM_BINS)
    for i, (axes, name, values) in enumerate(zip(rows, series, drawn, strict=True)):
        colour = theme.series[(kinds[i] if kinds else i) % len(theme.series)]
        axes.hist(values, bins, color=colour, edgecolor=theme.paper, linewidth=0.5)
        # logarithmic, so that a few tampered nonces of many, hundreds of times further away, are visible
        axes.set_xscale("log")
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(0, 2 * max(len(values), 5))
        axes.set_title(f"{_plain(name)} ({len(series[name])})", color=colour, loc="left", fontsize="medium")
        _mark(axes, thresholds, theme)
        num_same = int((series[name] == 0).sum())
        if num_same:
            text = f"{num_same} at distance 0, which has no place on this axis"
            axes.set_title(text, color=theme.ink, loc="right", fontsize="small")
    rows[-1].set_xlabel("L2 distance", color=theme.ink)
    _legend(rows[0], theme)
    return figure


def value_histogram(values: np.ndarray, marks: Mapping[str, float], title: str, theme: Theme) -> Figure:
    """Threshold distances on a linear axis, with marks."""
    figure, (axes,) = _empty(title, 1, theme)
    axes.hist(values, NUM_BINS, color=theme.series[0], edgecolor=theme.paper, linewidth=0.5, alpha=0.75)
    axes.set_xlabel("distance to the target", color=theme.ink)
    _mark(axes, marks, theme)
    _legend(axes, theme)
    return figure


def stacked_bars(
    bars: Mapping[str, Mapping[str, float]], title: str, label: str, theme: Theme, known: Sequence[str] = ()
) -> Figure:
    """Horizontal bars of named parts; a part has the same colour in all bars, and one of `known` in all plots."""
    figure, (axes,) = _empty(title, 1, theme)
    drawn = {name for parts in bars.values() for name in parts}
    names = list(dict.fromkeys([*known, *(name for parts in bars.values() for name in parts)]))
    ends = np.zeros(len(bars))
    for i, name in enumerate(names):
        if name not in drawn:
            continue
        values = np.array([parts.get(name, 0.0) for parts in bars.values()])
        colour = theme.series[i % len(theme.series)]
        # more parts than colours: the later ones are hatched
        hatch = "//" if i >= len(theme.series) else None
        style = {"color": colour, "hatch": hatch, "edgecolor": theme.paper, "linewidth": 0.5}
        axes.barh(list(bars), values, left=ends, label=name, **style)
        ends = ends + values
    axes.invert_yaxis()
    axes.set_ylabel("")
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=theme.grid, linewidth=0.6)
    axes.set_xlabel(label, color=theme.ink)
    _legend(axes, theme)
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Write `figure` to `path`. Raises ArtifactFileError."""
    with writing(path):
        figure.savefig(path, format="png", dpi=DPI, facecolor=figure.get_facecolor())


def as_svg(figure: Figure) -> bytes:
    """`figure` as an SVG document."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", dpi=DPI, facecolor=figure.get_facecolor(), metadata={"Date": None})
    return buffer.getvalue()


def terminal_histogram(values: np.ndarray, mark: float, rows: int = 20) -> list[str]:
    """One line per bin: its lower end, a bar, its count; an arrow marks the bin of `mark`."""
    counts, edges = np.histogram(values, rows)
    longest = max(int(counts.max()), 1)
    lines = []
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        pointer = " <-" if low <= mark < high else ""
        bar = "█" * round(TERMINAL_WIDTH * int(count) / longest)
        lines.append(f"{low:.4f} {bar:<{TERMINAL_WIDTH}} {count}{pointer}")
    return lines


def _empty(title: str, num_rows: int, theme: Theme) -> tuple[Figure, list[Any]]:
    """A figure with `num_rows` rows of axes. Raises ToolError if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure as NewFigure
    except ImportError as error:
        raise ToolError("plots need matplotlib, which is not installed: pip install matplotlib") from error
    figure = NewFigure(figsize=(9, 4.8 if num_rows == 1 else 1.2 + 1.6 * num_rows), layout="constrained")
    figure.set_facecolor(theme.paper)
    figure.suptitle(_plain(title), color=theme.ink)
    rows = list(figure.subplots(num_rows, sharex=True, squeeze=False)[:, 0])
    for axes in rows:
        axes.set_facecolor(theme.paper)
        axes.set_ylabel("nonces", color=theme.ink)
        axes.tick_params(which="both", colors=theme.ink)
        axes.grid(axis="y", color=theme.grid, linewidth=0.6)
        axes.set_axisbelow(True)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(theme.ink)
    return figure, rows


def _mark(axes: Any, marks: Mapping[str, float], theme: Theme) -> None:
    for style, (name, value) in zip(itertools.cycle(("--", ":", "-.")), marks.items(), strict=False):
        axes.axvline(value, color=theme.ink, linestyle=style, linewidth=1.4, label=f"{name} {value:.5g}")


def _legend(axes: Any, theme: Theme) -> None:
    handles, names = axes.get_legend_handles_labels()
    style = {"loc": "outside lower left", "ncols": 3, "frameon": False, "labelcolor": theme.ink}
    axes.figure.legend(handles, [_plain(name) for name in names], **style)


def _plain(text: str) -> str:
    """`text` with dollar signs escaped, which matplotlib would read as mathematics."""
    return text.replace("$", r"\$")
