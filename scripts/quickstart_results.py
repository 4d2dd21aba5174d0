"""The results of the quickstart: its table, the words around it, and results.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from rich import box
from rich.table import Table
from rich.text import Text

from eval.base.consoles import plain_console
from eval.measures.figures import Column, best_models, figure_columns, format_figure
from longclip_teacher.atomic_files import write_json

__all__ = ["Comparison", "Figures", "columns", "explain", "print_table", "write_results"]

Figures: TypeAlias = dict[str, float]
TWINS_CEILING = (25.0, "the most that a model reading 77 tokens can reach (25%)")
# results.json: the twin figures have no prefix
JSON_NAMES = {"twins_i2t_r1": "i2t_r1", "twins_t2i_r1": "t2i_r1"}


@dataclass(frozen=True)
class Comparison:
    """The figures of all models. With several seeds they are means."""

    models: Mapping[str, Figures]
    """With the costs of the saved files: students in the form that was trained, `reparameterized` the distilled one as
    it is used, and the exported ones."""
    shown: Mapping[str, Figures]
    """The rows of the table: each model with the costs that it has in use."""
    spreads: Mapping[str, Figures]
    """Standard deviations; empty with one seed."""
    by_seed: Mapping[int, Mapping[str, Figures]]
    """The percentages of each seed's students."""
    conditions: list[str]
    """On what and how the figures were measured."""


def columns() -> list[Column]:
    """Return the table's columns."""
    return figure_columns(["twins", "random"], references={"twins": TWINS_CEILING})


def explain(models: Mapping[str, Figures], num_pictures: Mapping[str, int]) -> list[str]:
    """Explain the tests, of so many pictures, and the results to someone who sees them for the first time."""

    def both(name: str, test: str) -> str:
        return " / ".join(format_figure(models[name][f"{test}_{way}_r1"], "%") for way in ("i2t", "t2i"))

    gains = " / ".join(
        f"{models['distilled'][key] - models['undistilled'][key]:+.1f}" for key in ("twins_i2t_r1", "twins_t2i_r1")
    )
    fused, plain = models["reparameterized"], models["distilled"]
    notes = [
        "Figures in % say how often the right answer ranks first among all. The first of two is from picture to "
        "caption, the second from caption to picture.",
        f"The twin test has {num_pictures['twins']} pictures in families of four whose captions share their first 77 "
        "tokens. A model that reads 77 tokens sees one caption four times, so by construction it cannot pass 25% "
        f"there. The student cut at 77 tokens reaches {both('cut77', 'twins')}. To pass 25%, a model must read to the "
        "end.",
        f"With the teacher, the student reaches {both('distilled', 'twins')} on the twin test. Without it, after the "
        f"same number of steps, it reaches {both('undistilled', 'twins')}: a difference of {gains} points.",
        f"The random test has {num_pictures['random']} unrelated pictures, which the beginning of a caption usually "
        f"tells apart. The student cut at 77 tokens reaches {both('cut77', 'random')} there, the one that reads "
        f"everything {both('distilled', 'random')}.",
        "A trained student is used with its parallel branches merged (reparameterized), which does not change its "
        f"answers: the merged distilled student reaches {both('reparameterized', 'twins')} on the twin test, with "
        f"{format_figure(fused['params'], 'count')} parameters instead of {format_figure(plain['params'], 'count')} "
        f"and {format_figure(fused['image_ms'], 'ms')} ms per picture instead of "
        f"{format_figure(plain['image_ms'], 'ms')}. The table shows the parameters and milliseconds of the merged "
        "students, results.json those of both forms.",
    ]
    if "distilled_onnx" in models:
        notes.append(
            _explain_exports(models["teacher_onnx"], models["distilled_onnx"], both("distilled_onnx", "twins"))
        )
    return notes


def _explain_exports(teacher: Figures, student: Figures, twins: str) -> str:
    """Compare the exported student with the exported teacher."""
    faster = " and ".join(
        f"a {what} {teacher[key] / student[key]:.1f} times as fast ({format_figure(student[key], 'ms')} ms against "
        f"{format_figure(teacher[key], 'ms')} ms)"
        for what, key in (("picture", "image_ms"), ("caption", "text_ms"))
    )
    return (
        f"Exported to ONNX, as scripts/export.py does it, the merged student reaches {twins} on the twin test. "
        f"Compared with the exported teacher, it encodes {faster}."
    )


def print_table(compared: Comparison, notes: list[str]) -> None:
    """Print the table, under it how its figures were measured, and the notes, on stdout."""
    output = plain_console()
    padding = 1 if output.width >= 92 else 0  # to fit a terminal of 80 columns
    caption = Text("\n".join(["The best of each column is bold.", *compared.conditions]))
    table = Table(
        box=box.SIMPLE_HEAD, padding=(0, padding, 0, 0), pad_edge=False, caption=caption, caption_justify="left"
    )
    table.add_column("", no_wrap=True)
    headings = {"twins_i2t_r1": "twins\nI→T %", "twins_t2i_r1": "twins\nT→I %", "random_i2t_r1": "random\nI→T %"}
    headings |= {"random_t2i_r1": "random\nT→I %", "zeroshot_top1": "zero-\nshot %", "params": "param-\neters"}
    headings |= {"bytes": "file", "image_ms": "image\nms", "text_ms": "text\nms"}
    for column in columns():
        table.add_column(headings[column.key], justify="right")
    for name, figures in compared.shown.items():
        cells = []
        for column in columns():
            text = format_figure(figures[column.key], column.unit)
            spread = compared.spreads.get(name, {}).get(column.key)
            below = "" if spread is None else f"\n±{format_figure(spread, column.unit)}"
            cells.append(Text.assemble((text, "bold" if name in best_models(column, compared.shown) else ""), below))
        table.add_row(name, *cells)
    output.print(table)
    for note in notes:
        output.print(note)


def write_results(path: Path, compared: Comparison, seconds: float) -> None:
    """Write results.json. With several seeds, each seed's figures and the spreads stand beside the means."""

    def named(models: Mapping[str, Figures]) -> dict[str, Figures]:
        return {
            name: {JSON_NAMES.get(key, key): value for key, value in figures.items()}
            for name, figures in models.items()
        }

    content: dict[str, Any] = {"seconds": round(seconds, 1), "models": named(compared.models)}
    if len(compared.by_seed) > 1:
        content["standard_deviations"] = named(compared.spreads)
        content["seeds"] = {str(seed): named(figures) for seed, figures in compared.by_seed.items()}
    write_json(path, content)
