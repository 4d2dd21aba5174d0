"""The curves of long_captions.py as one PNG, with a panel for each kind of edit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from longclip_teacher.atomic_files import atomic_file

__all__ = ["plot_long_captions"]

# Two hues that stay apart for colour-blind readers, and two marks that stay apart in print
_WAYS = {"i2t": ("image to text", "#0072b2", "o", -0.19), "t2i": ("text to image", "#d55e00", "s", 0.19)}
_EDITS = {"original": "original", "first_dropped": "first\ndropped", "shuffled": "shuffled"}


def plot_long_captions(result: dict[str, Any], path: Path) -> None:
    """Draw the result of `long_caption_behaviour` to the PNG at `path`, and make its folder."""
    figure = Figure(figsize=(11, 6.4), layout="constrained", dpi=130)
    (edits, growth, alone), (cut, padding, note) = figure.subplots(2, 3)
    figure.suptitle(f"{result['protocol']}, {result['num_texts']} captions: what the model reads of them")
    _bars(edits, result)
    _curve(growth, result["first_sentences"], "k", "the first k sentences")
    _curve(alone, result["only_sentence"], "k", "sentence k alone")
    _curve(cut, result["cut"], "num_tokens", "cut at this many tokens")
    _padding(padding, result["padding"])
    recall_panels = (edits, growth, alone, cut)
    top = max(panel.get_ylim()[1] for panel in recall_panels)
    for panel in recall_panels:
        panel.set_ylim(0, min(105, top))
        panel.set_ylabel("R@1 %")
    _note(note, result, edits)
    with atomic_file(path) as temporary:
        figure.savefig(temporary)


def _bars(axes: Axes, result: dict[str, Any]) -> None:
    for way, (name, colour, _, shift) in _WAYS.items():
        heights = [result[edit][way]["r1"] for edit in _EDITS]
        bars = axes.bar([place + shift for place in range(len(_EDITS))], heights, 0.36, color=colour, label=name)
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.margins(y=0.12)
    axes.set_xticks(range(len(_EDITS)), list(_EDITS.values()))
    _finish(axes, "sentences dropped, shuffled")


def _curve(axes: Axes, steps: list[dict[str, Any]], key: str, title: str) -> None:
    for way, (_, colour, mark, _) in _WAYS.items():
        points = [(step[key], step[way]["r1"]) for step in steps if step[way]]
        axes.plot(*zip(*points, strict=True), color=colour, marker=mark, markersize=4)
    axes.set_xticks([step[key] for step in steps])
    axes.set_xlabel("tokens" if key == "num_tokens" else "k")
    _finish(axes, title)


def _padding(axes: Axes, steps: list[dict[str, float]]) -> None:
    lengths = [step["num_tokens"] for step in steps]
    for key, name, mark in (("mean_cosine", "mean", "o"), ("min_cosine", "lowest", "v")):
        axes.plot(lengths, [step[key] for step in steps], color="#555555", marker=mark, markersize=5, label=name)
    axes.set_xticks(lengths)
    axes.ticklabel_format(axis="y", useOffset=False)
    low = min((step["min_cosine"] for step in steps), default=1.0)
    axes.set_ylim(low - max(0.1 * (1 - low), 1e-5), 1 + max(0.1 * (1 - low), 1e-5))
    axes.set_xlabel("tokens padded to")
    axes.set_ylabel("cosine to no padding")
    axes.legend(frameon=False)
    _finish(axes, "the same short text, padded")


def _note(axes: Axes, result: dict[str, Any], drawn: Axes) -> None:
    """Draw the legend of all panels, and the relative changes as words."""
    axes.axis("off")
    axes.legend(*drawn.get_legend_handles_labels(), loc="upper left", frameon=False)
    lines = ["relative change of R@1"]
    for edit, name in (("first_dropped", "first sentence dropped"), ("shuffled", "sentences shuffled")):
        lines.append(f"\n{name}")
        for way, (way_name, *_) in _WAYS.items():
            change = result["relative_change"][edit][way]
            lines.append(f"  {way_name}: {'-' if change is None else f'{change:+.1f}%'}")
    axes.text(0.04, 0.7, "\n".join(lines), transform=axes.transAxes, va="top", fontsize=9)


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
