"""report.html: what a run gave, as one page that needs nothing else: table, bars, training curves, retrieval examples.

The page loads nothing from anywhere: pictures are data: URIs, charts are inline SVG, and a content security policy in
its head forbids the rest.
"""

from __future__ import annotations

import base64
import io
import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from eval.images import open_image
from eval.retrieval_examples import Answer, Example
from training.charts import NUM_COLOURS, Points, line_chart
from training.figures import Column, Figures, best_models, format_figure
from training.run_log import read_metrics, write_text

__all__ = ["Report", "run_facts", "write_report"]

_THUMBNAIL_PX = 224
_PIXEL_ART_PX = 64  # pictures up to this size are shown enlarged, pixel by pixel
_COMPARABLE = 0.3  # captions with a smaller share of common words are shown as they are
_CONTEXT_WORDS = 4  # common words shown on each side of a difference

_CURVES = {  # (group, key in metrics.jsonl): title, meaning; in the order of the page
    ("train", "loss"): (
        "Loss",
        "What training makes small: the weighted sum of the terms below. Runs with different terms or weights cannot "
        "be compared by it.",
    ),
    ("train", "clip_long"): (
        "Contrastive, long captions",
        "How hard it is to find each picture's own long caption in the batch, and the reverse.",
    ),
    ("train", "clip_short"): (
        "Contrastive, short captions",
        "The same with short captions and a coarse version of the picture's features.",
    ),
    ("train", "crd_long"): (
        "Distillation, long captions",
        "How far the student's view of which captions fit which pictures is from the teacher's (KL divergence).",
    ),
    ("train", "crd_short"): ("Distillation, short captions", "The same with short captions."),
    ("train", "fd"): (
        "Distance to the teacher's features",
        "Mean squared distance between the student's and the teacher's features.",
    ),
    ("val", "i2t_r1"): ("Validation: picture → caption", "Percent of pictures whose caption is ranked first."),
    ("val", "t2i_r1"): ("Validation: caption → picture", "Percent of captions whose picture is ranked first."),
    ("val", "zeroshot_top1"): ("Validation: zero-shot class", "Percent of labelled pictures put into the right class."),
    ("train", "lr"): ("Learning rate", "Size of the steps: a short warm-up, then a slow decrease."),
}


@dataclass(frozen=True)
class Report:
    """What the page tells. Everything but title and paragraphs may be left empty."""

    title: str
    paragraphs: Sequence[str]
    """Plain text at the top: what was done, what the tests are, what came out."""
    columns: Sequence[Column] = ()
    models: Mapping[str, Figures] = field(default_factory=dict)
    """Figures by model, in the order of the table."""
    spreads: Mapping[str, Figures] = field(default_factory=dict)
    """Standard deviations of figures that are means over several seeds, by model."""
    runs: Mapping[str, Path] = field(default_factory=dict)
    """Run folders whose metrics.jsonl gives curves, by the name of the model that the run made."""
    examples: Mapping[str, Sequence[Example]] = field(default_factory=dict)
    """Retrieval examples under a heading that names model and test."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """How it was made: command, commit, machine."""


def write_report(path: Path, report: Report) -> None:
    """Write the page atomically. Raises InputError if a picture of the examples cannot be read."""
    colours = {name: index for index, name in enumerate(dict.fromkeys([*report.models, *report.runs]))}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.jinja").render(
        report=report,
        colours={name: index % NUM_COLOURS for name, index in colours.items()},
        rows=_table(report),
        bars=_bars(report),
        curves=_curves(report.runs, colours),
        galleries={heading: _gallery(examples) for heading, examples in report.examples.items() if examples},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)


def run_facts(run_dir: Path) -> dict[str, str]:
    """Command, commit and machine of a run, from its environment.json; empty without one."""
    path = run_dir / "environment.json"
    if not path.exists():
        return {}
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    commit = record["commit"] or "not in a git checkout"
    return {
        "command": shlex.join(record["command"]),
        "commit": commit + (" with uncommitted changes (git.diff)" if record["uncommitted_changes"] else ""),
        "machine": f"{record['machine']}, {record['cpu_count']} CPUs, {record['gpu'] or 'no GPU'}",
        "processes": f"{record['world_size']}, {record['threads']} threads each",
        "software": f"Python {record['python']}, "
        + ", ".join(f"{name} {version}" for name, version in record["packages"].items() if version),
    }


# --- table and bars --------------------------------------------------------------------------------------------------


class _Cell(NamedTuple):
    text: str
    spread: str
    is_best: bool


class _Bar(NamedTuple):
    name: str
    text: str
    percent: float


def _table(report: Report) -> dict[str, list[_Cell]]:
    best = {column.key: best_models(column, report.models) for column in report.columns}
    rows = {}
    for name, figures in report.models.items():
        spreads = report.spreads.get(name, {})
        rows[name] = [
            _Cell(
                format_figure(figures.get(column.key), column.unit),
                "" if spreads.get(column.key) is None else format_figure(spreads[column.key], column.unit),
                name in best[column.key],
            )
            for column in report.columns
        ]
    return rows


def _bars(report: Report) -> list[tuple[Column, list[_Bar]]]:
    """The percentages, drawn from 0 to 100."""
    charts = []
    for column in report.columns:
        values = {name: figures.get(column.key) for name, figures in report.models.items()}
        bars = [_Bar(name, format_figure(value, "%"), value) for name, value in values.items() if value is not None]
        if column.unit == "%" and bars:
            charts.append((column, bars))
    return charts


# --- curves ----------------------------------------------------------------------------------------------------------


class _Chart(NamedTuple):
    title: str
    meaning: str
    svg: Markup


def _curves(runs: Mapping[str, Path], colours: Mapping[str, int]) -> list[_Chart]:
    """A chart for each measure that some run recorded at two steps or more."""
    records = {group: {name: read_metrics(run, group) for name, run in runs.items()} for group in ("train", "val")}
    charts = []
    for (group, key), (title, meaning) in _CURVES.items():
        lines = {name: points for name, rows in records[group].items() if (points := _points(rows, key))}
        if any(len(points) > 1 for points in lines.values()):
            charts.append(_Chart(title, meaning, Markup(line_chart(lines, colours, title))))
    return charts


def _points(rows: Iterable[Mapping[str, float]], key: str) -> Points:
    return [(row["step"], row[key]) for row in rows if key in row and math.isfinite(row[key])]


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
    """Of the query, where that is a picture; otherwise it is a caption."""
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
    """The picture in the page, not larger than it is shown; encoded anew, so that no untrusted bytes get there."""
    image = open_image(path)
    image.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    is_small = max(image.size) <= _PIXEL_ART_PX
    buffer = io.BytesIO()
    image.save(buffer, **({"format": "PNG"} if is_small else {"format": "JPEG", "quality": 85}))
    kind = "png" if is_small else "jpeg"
    return _Picture(f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", is_small)


def _differences(caption: str, right: str) -> list[_Words]:
    """A caption in parts that are the right caption's and parts that differ; long common parts are shortened.

    A caption that has little in common with the right one, or is the right one, comes back whole and unmarked.
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
