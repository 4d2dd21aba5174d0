"""Which classes a classifier confuses: recall per class, the most confused pairs, and a plot of all.

Shapes: N pictures, C classes. A confusion matrix [C,C] counts pictures: rows are true classes, columns the answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Int64
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from torch import Tensor

from longclip_teacher.atomic_files import atomic_file
from longclip_teacher.errors import InputError

__all__ = ["check_plot_path", "confused_pairs", "confusion_matrix", "draw_confusion", "mean_recall", "recall_by_class"]

PLOT_SUFFIXES = (".png", ".svg")
MAX_LABELLED = 40  # classes whose names fit beside the matrix
MAX_NUMBERED = 15  # classes whose percentages fit into the cells
MAX_LABEL_CHARACTERS = 28
_SHADES = ListedColormap(matplotlib.colormaps["Blues"](np.linspace(0.25, 1, 256)))  # a rare confusion is not white
Matrix = Int64[np.ndarray, "C C"]


def confusion_matrix(targets: Int64[Tensor, " N"], answers: Int64[Tensor, " N"], num_classes: int) -> Matrix:
    """Return how many pictures of each class (rows) got each answer (columns)."""
    from sklearn.metrics import confusion_matrix as count_confusions  # slow to import and needed only here

    return count_confusions(targets.cpu().numpy(), answers.cpu().numpy(), labels=np.arange(num_classes))


def recall_by_class(matrix: Matrix, classnames: Sequence[str]) -> list[dict[str, Any]]:
    """Return {class, num_images, accuracy in percent} of each class that has pictures."""
    totals, hits = matrix.sum(axis=1), matrix.diagonal()
    return [
        {"class": classnames[row], "num_images": int(totals[row]), "accuracy": float(hits[row] * 100 / totals[row])}
        for row in np.flatnonzero(totals).tolist()
    ]


def mean_recall(matrix: Matrix) -> float:
    """Return the mean, over the classes that have pictures, of the share of right answers, in percent."""
    totals = matrix.sum(axis=1)
    present = totals > 0
    return float((matrix.diagonal()[present] / totals[present]).mean() * 100)


def confused_pairs(matrix: Matrix, classnames: Sequence[str], limit: int = 20) -> list[list[Any]]:
    """Return [true class, answer, number of pictures] of the most frequent wrong answers, most frequent first."""
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    most = np.argsort(-wrong, axis=None, kind="stable")[:limit]
    rows, columns = np.unravel_index(most, wrong.shape)
    return [
        [classnames[row], classnames[column], int(wrong[row, column])]
        for row, column in zip(rows, columns, strict=True)
        if wrong[row, column]
    ]


def check_plot_path(path: Path) -> None:
    """Raise InputError for a file that `draw_confusion` cannot write, before any other work."""
    if path.suffix.lower() not in PLOT_SUFFIXES or path.is_dir():
        raise InputError(f"--plot {path}: name a file that ends in {' or '.join(PLOT_SUFFIXES)}")


def draw_confusion(matrix: Matrix, classnames: Sequence[str], title: str, path: Path) -> None:
    """Draw the matrix, each row as shares of its class's pictures, to a .png or .svg file.

    Classes that have no picture and were never the answer are left out. Up to 40 classes are named, up to 15 have
    percentages in their cells. Zero is white, and colours follow the square root of the share, so a rare confusion
    stays visible among a thousand classes.
    """
    check_plot_path(path)
    shown = np.flatnonzero(matrix.sum(axis=1) + matrix.sum(axis=0))
    counts = matrix[np.ix_(shown, shown)]
    shares = np.ma.masked_equal(counts * 100 / np.maximum(counts.sum(axis=1, keepdims=True), 1), 0)
    num_classes = len(shown)
    side = float(np.clip(2.5 + 0.34 * num_classes, 5, 12 if num_classes <= MAX_LABELLED else 9))
    with matplotlib.rc_context({"svg.hashsalt": "confusion", "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=(side + 1, side), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(shares, cmap=_SHADES, norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
        axes.set(xlabel="answer", ylabel="true class")
        axes.set_title(title, parse_math=False)
        _mark_classes(axes, shown.tolist(), classnames)
        if num_classes <= MAX_NUMBERED:
            _write_percentages(axes, shares)
        figure.colorbar(image, label="% of the true class's pictures", ticks=[0, 1, 5, 10, 25, 50, 75, 100], shrink=0.8)
        dots_per_inch = 100 if num_classes <= MAX_LABELLED else 200  # a cell of 1000 still has a pixel
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
        with atomic_file(path) as temporary:
            figure.savefig(temporary, dpi=dots_per_inch, metadata=metadata)


def _mark_classes(axes: Axes, shown: list[int], classnames: Sequence[str]) -> None:
    if len(shown) > MAX_LABELLED:
        number_at = FuncFormatter(lambda place, _: str(shown[int(place)]) if 0 <= place < len(shown) else "")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=10, integer=True))
            axis.set_major_formatter(number_at)
            axis.set_label_text(f"{axis.get_label_text()}, by class number")
        return
    names = [classnames[number] for number in shown]
    short = [name if len(name) <= MAX_LABEL_CHARACTERS else f"{name[: MAX_LABEL_CHARACTERS - 1]}…" for name in names]
    places = range(len(names))
    axes.set_xticks(places, short, rotation=90 if len(names) > 5 else 0, parse_math=False)
    axes.set_yticks(places, short, parse_math=False)


def _write_percentages(axes: Axes, shares: np.ndarray) -> None:
    for row, column in np.ndindex(shares.shape):
        if shares[row, column] >= 0.5:
            colour = "white" if shares[row, column] > 40 else "black"
            axes.text(column, row, f"{shares[row, column]:.0f}", ha="center", va="center", color=colour, fontsize=9)
