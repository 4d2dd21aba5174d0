"""Line charts as SVG text for an HTML page, in the colours of its CSS variables and so of its light or dark mode."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

__all__ = ["NUM_COLOURS", "line_chart"]

NUM_COLOURS = 6  # the page defines --line-0 ... --line-5, --ink and --rule
_INK, _RULE = "#00000a", "#00000b"  # stand-ins that matplotlib takes, replaced in its output
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

Points = Sequence[tuple[float, float]]  # (step, value)


def line_chart(lines: Mapping[str, Points], colours: Mapping[str, int], title: str) -> str:
    """An `<svg>` element with a line for each name, in the page's colour number `colours[name]`.

    The numbers of `lines` must be finite. The same input gives the same text.
    """
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(4.8, 2.9), layout="constrained")
        axes = figure.add_subplot()
        for name, points in lines.items():
            index = colours[name] % NUM_COLOURS
            axes.plot(
                [step for step, _ in points],
                [value for _, value in points],
                color=_LINES[index],
                linestyle=_DASHES[index],
                linewidth=1.6,
                marker="o" if len(points) < 12 else None,
                markersize=3.5,
            )
        _style(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_page(buffer.getvalue(), title)


def _style(axes: Axes) -> None:
    axes.set_xlabel("step", color=_INK)
    axes.tick_params(colors=_INK, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(axis="y", color=_RULE, linewidth=0.7)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_RULE)


def _for_page(svg: str, title: str) -> str:
    """matplotlib's file as an element of the page: no XML head, no style sheet, CSS variables for colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    label = re.sub(r"[^\w .,:()%-]", "", title)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    names = {_INK: "--ink", _RULE: "--rule"} | {colour: f"--line-{index}" for index, colour in enumerate(_LINES)}
    for colour, name in names.items():
        svg = svg.replace(colour, f"var({name})")
    # element ids are the page's, and a page has several charts
    prefix = re.sub(r"\W", "", title)
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
