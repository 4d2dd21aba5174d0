"""report.html: the results of models as one self-contained page: table, bars, charts, retrieval examples.

The page loads nothing: pictures are data: URIs, charts are inline SVG, and a content security policy in its head
forbids the rest.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from eval.base.images import open_image
from eval.measures.figures import Column, Figures, best_models, format_figure
from eval.measures.retrieval_examples import Answer, Example
from eval.pages.charts import NUM_COLOURS
from longclip_teacher.atomic_files import write_text

__all__ = ["Chart", "PlainTable", "Report", "model_colours", "write_report"]

_THUMBNAIL_PX = 224
_PIXEL_ART_PX = 64  # pictures up to this size are shown enlarged, pixel by pixel
_COMPARABLE = 0.3  # captions with a smaller share of common words are shown unmarked
_CONTEXT_WORDS = 4  # common words shown on each side of a difference


@dataclass(frozen=True)
class Chart:
    """A chart: `svg` from eval.pages.charts, which shows these models in their `model_colours`."""

    title: str
    meaning: str
    """One or two sentences for a newcomer."""
    svg: str
    models: Sequence[str]


@dataclass(frozen=True)
class PlainTable:
    """A table of text beside the main one. The first cell of a row is its heading. Text after a line break in a cell is
    printed small below the rest."""

    meaning: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: Collection[tuple[int, int]] = ()
    """(row, cell) of the cells in bold."""


@dataclass(frozen=True)
class Report:
    """The content of the page. Everything but title and paragraphs may be empty."""

    title: str
    paragraphs: Sequence[str]
    """Plain text at the top: what was done, what the tests are, what the results are."""
    columns: Sequence[Column] = ()
    models: Mapping[str, Figures] = field(default_factory=dict)
    """Figures by model, in the order of the table."""
    conditions: Sequence[str] = ()
    """Plain text under the table: on what and how its figures were measured."""
    spreads: Mapping[str, Figures] = field(default_factory=dict)
    """Standard deviations of figures that are means over several seeds, by model."""
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)
    """Confidence intervals (low, high) of figures, by model."""
    warnings: Sequence[str] = ()
    """What the reader must know before believing a figure; shown above the table."""
    tables: Mapping[str, PlainTable] = field(default_factory=dict)
    """Further tables, each under its heading."""
    sections: Mapping[str, Sequence[Chart]] = field(default_factory=dict)
    """Charts, under the heading of each group of them."""
    examples: Mapping[str, Sequence[Example]] = field(default_factory=dict)
    """Retrieval examples under headings that name model and test."""
    provenance: Mapping[str, str] = field(default_factory=dict)
    """How it was made: command, commit, machine."""


def model_colours(names: Iterable[str]) -> dict[str, int]:
    """Return the page's colour number of each model, by its place in the table."""
    return {name: index % NUM_COLOURS for index, name in enumerate(names)}


def write_report(path: Path, report: Report) -> None:
    """Write the page atomically. Raise InputError if a picture of the examples cannot be read."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.jinja").render(
        report=report,
        colours=model_colours(report.models),
        rows=_table(report),
        bars=_bars(report),
        sections={heading: _shown_charts(charts) for heading, charts in report.sections.items() if charts},
        galleries={heading: _gallery(examples) for heading, examples in report.examples.items() if examples},
    )
    write_text(path, page)


# --- table and bars --------------------------------------------------------------------------------------------------


class _Cell(NamedTuple):
    text: str
    spread: str
    interval: str
    is_best: bool


class _Bar(NamedTuple):
    name: str
    text: str
    percent: float
    interval: tuple[float, float] | None


def _table(report: Report) -> dict[str, list[_Cell]]:
    best = {column.key: best_models(column, report.models) for column in report.columns}
    rows = {}
    for name, figures in report.models.items():
        spreads, intervals = report.spreads.get(name, {}), report.intervals.get(name, {})
        rows[name] = [
            _Cell(
                format_figure(figures.get(column.key), column.unit),
                "" if spreads.get(column.key) is None else format_figure(spreads[column.key], column.unit),
                "–".join(format_figure(end, column.unit) for end in intervals.get(column.key, ())),
                name in best[column.key],
            )
            for column in report.columns
        ]
    return rows


def _bars(report: Report) -> list[tuple[Column, list[_Bar]]]:
    """Return the percentages as bars from 0 to 100."""
    charts = []
    for column in report.columns:
        bars = [
            _Bar(name, format_figure(value, "%"), value, report.intervals.get(name, {}).get(column.key))
            for name, figures in report.models.items()
            if (value := figures.get(column.key)) is not None
        ]
        if column.unit == "%" and bars:
            charts.append((column, bars))
    return charts


# --- charts ----------------------------------------------------------------------------------------------------------


class _ShownCharts(NamedTuple):
    models: list[str]
    charts: list[tuple[Chart, Markup]]


def _shown_charts(charts: Sequence[Chart]) -> _ShownCharts:
    """Return the charts, with the models of their common legend. matplotlib has escaped the text in the SVG."""
    models = dict.fromkeys(name for chart in charts for name in chart.models)
    return _ShownCharts(list(models), [(chart, Markup(chart.svg)) for chart in charts])


# --- retrieval examples ----------------------------------------------------------------------------------------------


class _Words(NamedTuple):
    text: str
    differs: bool


class _ShownAnswer(NamedTuple):
    answer: Answer
    picture: _Picture | None
    words: list[_Words]


class _ShownExample(NamedTuple):
    example: Example
    picture: _Picture | None
    """The query, if it is a picture; otherwise it is a caption."""
    answers: list[_ShownAnswer]
    place: int
    """Rank of the best right answer."""


class _Picture(NamedTuple):
    uri: str
    is_small: bool


def _gallery(examples: Sequence[Example]) -> list[_ShownExample]:
    gallery = []
    for example in examples:
        right = next(answer for answer in example.answers if answer.is_right)
        shown = [
            _ShownAnswer(answer, _picture(answer.content), [])
            if isinstance(answer.content, Path)
            else _ShownAnswer(answer, None, _differences(answer.content, str(right.content)))
            for answer in example.answers
        ]
        query = _picture(example.query) if isinstance(example.query, Path) else None
        gallery.append(_ShownExample(example, query, shown, right.rank))
    return gallery


def _picture(path: Path) -> _Picture:
    """Return the picture for the page, no larger than displayed, encoded anew so that no untrusted bytes get there."""
    image = open_image(path)
    image.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    is_small = max(image.size) <= _PIXEL_ART_PX
    buffer = io.BytesIO()
    image.save(buffer, **({"format": "PNG"} if is_small else {"format": "JPEG", "quality": 85}))
    kind = "png" if is_small else "jpeg"
    return _Picture(f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", is_small)


def _differences(caption: str, right: str) -> list[_Words]:
    """Split a caption into parts that it shares with the right caption and parts that differ. Shorten long shared
    parts.

    A caption that has little in common with the right one, or equals it, comes back complete and unmarked.
    """
    words, right_words = caption.split(), right.split()
    matcher = SequenceMatcher(None, right_words, words, autojunk=False)
    if words == right_words or matcher.ratio() < _COMPARABLE:
        return [_Words(caption, False)]
    parts = []
    for kind, _, _, start, end in matcher.get_opcodes():
        if kind == "equal":
            parts.append(_Words(_shorten(words[start:end], start == 0, end == len(words)), False))
        elif start < end:
            parts.append(_Words(" ".join(words[start:end]), True))
    return parts


def _shorten(common: list[str], is_start: bool, is_end: bool) -> str:
    before = [] if is_start else common[:_CONTEXT_WORDS]
    after = [] if is_end else common[-_CONTEXT_WORDS:]
    if len(common) <= len(before) + len(after) + 1:
        return " ".join(common)
    return " ".join([*before, "…", *after])
