"""Line charts and scatter plots as SVG for an HTML page, in the colours of its CSS variables: light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

__all__ = ["NUM_COLOURS", "Band", "Points", "group_chart", "line_chart", "scatter_chart"]

NUM_COLOURS = 6  # the page defines --line-0 ... --line-5, --ink and --rule
_INK, _RULE = "#00000a", "#00000b"  # placeholders that matplotlib accepts, replaced in its output
_LINES = [f"#0000{index:02x}" for index in range(0x10, 0x10 + NUM_COLOURS)]
_DASHES = [
    "-",
    (0, (5, 1.5)),
    (0, (2, 1.2)),
    (0, (6, 1.5, 1.5, 1.5)),
    (0, (1, 1)),
    (0, (9, 2)),
]  # colour alone is not enough
_SETTINGS: Any = {"svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 11, "font.family": "sans-serif"}

Points = Sequence[tuple[float, float]]  # (x, y)
Band = Sequence[tuple[float, float]]  # (low, high) of each point of a line

_LABEL_GAP = 0.075  # between two labels of a scatter plot, as a share of its height
_WIDE_RANGE = 8  # from this ratio of the largest x to the smallest, the x axis is logarithmic


def line_chart(
    lines: Mapping[str, Points],
    colours: Mapping[str, int],
    title: str,
    *,
    x_label: str = "step",
    y_label: str | None = None,
    bands: Mapping[str, Band] | None = None,
) -> str:
    """Return an `<svg>` element with one line per name, in the page's colour number `colours[name]`.

    `bands` shades an interval around the lines that it names. The numbers must be finite. The same input gives the
    same text.
    """
    figure, axes = _canvas()
    for name, points in lines.items():
        index = colours[name] % NUM_COLOURS
        x, y = [x for x, _ in points], [y for _, y in points]
        if bands and name in bands:
            low, high = [low for low, _ in bands[name]], [high for _, high in bands[name]]
            axes.fill_between(x, low, high, color=_LINES[index], alpha=0.14, linewidth=0)
        axes.plot(
            x,
            y,
            color=_LINES[index],
            linestyle=_DASHES[index],
            linewidth=1.6,
            marker="o" if len(points) < 12 else None,
            markersize=3.5,
        )
    _style(axes, x_label, y_label)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    return _svg(figure, title)


def scatter_chart(
    points: Mapping[str, tuple[float, float]], colours: Mapping[str, int], title: str, *, x_label: str, y_label: str
) -> str:
    """Return an `<svg>` element with a labelled point (x, y) for each name. The numbers must be finite.

    The x axis is logarithmic if the values are positive and far apart.
    """
    figure, axes = _canvas()
    xs = [x for x, _ in points.values()]
    is_wide = min(xs) > 0 and max(xs) >= _WIDE_RANGE * min(xs)
    middle = (min(xs) * max(xs)) ** 0.5 if is_wide else (min(xs) + max(xs)) / 2
    for name, (x, y) in points.items():
        axes.plot([x], [y], color=_LINES[colours[name] % NUM_COLOURS], marker="o", markersize=7, linestyle="")
    axes.margins(x=0.12, y=0.15)
    if is_wide:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_ylim()
    for side in (False, True):  # labels are on the side with more room, one below the other
        names = [name for name, (x, _) in points.items() if (x > middle) == side]
        last = float("inf")
        for name in sorted(names, key=lambda name: -points[name][1]):
            x, y = points[name]
            last = min(y, last - _LABEL_GAP * (high - low))
            axes.annotate(
                name,
                (x, last),
                textcoords="offset points",
                xytext=(-8 if side else 8, 0),
                ha="right" if side else "left",
                va="center",
                color=_INK,
                fontsize=10,
            )
    _style(axes, x_label, y_label)
    return _svg(figure, title)


def group_chart(
    groups: Sequence[str],
    values: Mapping[str, Sequence[tuple[float, float, float] | None]],
    colours: Mapping[str, int],
    title: str,
    *,
    y_label: str,
    level: float | None = None,
    is_curve: bool = False,
) -> str:
    """Return an `<svg>` element with a point and an interval (value, low, high) of each name in each group.

    `level` draws a dashed line across, and `is_curve` a line through the points of a name. A name has no point in a
    group that is None.
    """
    figure, axes = _canvas()
    if level is not None:
        axes.axhline(level, color=_INK, linewidth=0.8, linestyle=(0, (4, 3)))
    for place, (name, found) in enumerate(values.items()):
        index = colours[name] % NUM_COLOURS
        shift = 0.7 * ((place + 0.5) / len(values) - 0.5)
        points = [(number + shift, *point) for number, point in enumerate(found) if point is not None]
        x, y = [point[0] for point in points], [point[1] for point in points]
        axes.vlines(
            x, [point[2] for point in points], [point[3] for point in points], color=_LINES[index], linewidth=1.4
        )
        linestyle = _DASHES[index] if is_curve else ""
        axes.plot(x, y, color=_LINES[index], marker="o", markersize=4.5, linestyle=linestyle, linewidth=1.2)
    _style(axes, "", y_label)
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.set_xticks(range(len(groups)), groups)
    return _svg(figure, title)


def _canvas() -> tuple[Figure, Axes]:
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(4.8, 2.9), layout="constrained")
        return figure, figure.add_subplot()


def _svg(figure: Figure, title: str) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context(_SETTINGS):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_page(buffer.getvalue(), title)


def _style(axes: Axes, x_label: str, y_label: str | None) -> None:
    axes.set_xlabel(x_label, color=_INK)
    if y_label is not None:
        axes.set_ylabel(y_label, color=_INK)
    axes.tick_params(colors=_INK, length=0, which="both")
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(axis="y", color=_RULE, linewidth=0.7)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_RULE)


def _for_page(svg: str, title: str) -> str:
    """Turn matplotlib's file into an element of the page: no XML head, no style sheet, CSS variables for colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    label = re.sub(r"[^\w .,:()%-]", "", title)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    names = {_INK: "--ink", _RULE: "--rule"} | {colour: f"--line-{index}" for index, colour in enumerate(_LINES)}
    for colour, name in names.items():
        svg = svg.replace(colour, f"var({name})")
    # element ids must be unique on a page with several charts
    prefix = re.sub(r"\W", "", title)
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
