"""The figures by which models are compared: their names, meanings and formats in reports and on the console."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = [
    "COST_COLUMNS",
    "WAYS",
    "Column",
    "Figures",
    "best_models",
    "figure_columns",
    "figure_conditions",
    "format_figure",
    "model_figures",
]

WAYS = {"i2t": "picture → caption", "t2i": "caption → picture"}
"""The directions of retrieval, in words."""
Unit = Literal["%", "count", "bytes", "ms"]
Figures = Mapping[str, float | None]  # by Column.key; None or absent: not measured


@dataclass(frozen=True)
class Column:
    """A figure of a model."""

    key: str
    title: str
    unit: Unit
    meaning: str
    """One sentence for a newcomer."""
    reference: tuple[float, str] | None = None
    """A value to show beside the models', and its description."""

    @property
    def higher_is_better(self) -> bool:
        """Percentages are successes, everything else is a cost."""
        return self.unit == "%"


_TIMING = "batch 1, float32, the median of repeated calls, with the machine and threads named below"
COST_COLUMNS = (
    Column("params", "parameters", "count", "Weights in the model; a student whose branches are fused has fewer."),
    Column("bytes", "file", "bytes", "Size of the weight file."),
    Column("image_ms", "picture", "ms", f"Milliseconds to encode one picture: {_TIMING}."),
    Column(
        "text_ms",
        "caption",
        "ms",
        f"Milliseconds to encode one caption of 100 tokens, cut if the model reads fewer: {_TIMING}.",
    ),
)


def figure_columns(
    tests: Iterable[str], *, zeroshot: bool = True, cost: bool = True, references: Mapping[str, tuple[float, str]] = {}
) -> list[Column]:
    """Return the columns of `model_figures` for retrieval tests of these names; `references` are by test."""
    columns = []
    for test in tests:
        for way, asked, found in (("i2t", "picture", "caption"), ("t2i", "caption", "picture")):
            meaning = (
                f"Share of the {asked}s of the {test} test for which the model ranks a right {found} first among all."
            )
            title = f"{test} {asked} → {found}"
            columns.append(Column(f"{test}_{way}_r1", title, "%", meaning, references.get(test)))
    if zeroshot:
        meaning = (
            "Share of pictures assigned to the right class by comparing them with sentences that name the classes."
        )
        columns.append(Column("zeroshot_top1", "zero-shot class", "%", meaning))
    return columns + list(COST_COLUMNS if cost else ())


def model_figures(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return the figures of `evaluate_tests`' results: R@1 both ways of each retrieval test, top-1 of `zeroshot`."""
    figures = {}
    for name, result in results.items():
        if name == "zeroshot":
            figures["zeroshot_top1"] = result["top1"]
        else:
            figures |= {f"{name}_{way}_r1": result[way]["r1"] for way in ("i2t", "t2i")}
    return figures


def figure_conditions(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Among how many pictures and captions the percentages of `evaluate_tests`' results were found, for a caption."""
    tests = ", ".join(
        f"{name} {result['num_images']} pictures and {result['num_texts']} captions"
        for name, result in results.items()
        if name != "zeroshot"
    )
    parts = [f"R@1 among {tests}"] if tests else []
    if (found := results.get("zeroshot")) is not None:
        parts.append(f"zero-shot top-1 of {found['num_images']} pictures in {found['num_classes']} classes")
    return f"%: {'; '.join(parts)}"


def best_models(column: Column, models: Mapping[str, Figures]) -> set[str]:
    """Return the models with the best value of a column, as displayed; none if fewer than two have one."""
    values = {name: value for name, figures in models.items() if (value := figures.get(column.key)) is not None}
    if len(values) < 2:
        return set()
    best = format_figure((max if column.higher_is_better else min)(values.values()), column.unit)
    return {name for name, value in values.items() if format_figure(value, column.unit) == best}


def format_figure(value: float | None, unit: Unit) -> str:
    """Format a figure for people: 62.7, 4.92 M, 13.8 MB, 1.25; a dash for None."""
    if value is None:
        return "–"
    if unit == "%":
        return f"{value:.1f}"
    if unit == "ms":
        return _three_digits(value)
    prefixes = ("", " k", " M", " G") if unit == "count" else (" B", " kB", " MB", " GB")
    thousands = 0
    while value >= 1000 and thousands < 3:
        value, thousands = value / 1000, thousands + 1
    number = _three_digits(value) if thousands else f"{value:.0f}"
    return number + prefixes[thousands]


def _three_digits(value: float) -> str:
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"
