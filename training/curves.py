"""A report's training curves and facts, from what runs leave behind: metrics.jsonl and environment.json."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from eval.charts import Points, line_chart
from eval.environment import environment_facts
from eval.report import Chart
from training.run_log import read_metrics

__all__ = ["run_facts", "training_curves"]

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


def training_curves(runs: Mapping[str, Path], colours: Mapping[str, int]) -> list[Chart]:
    """A chart for each measure that some run recorded at two steps or more; `runs` are folders by model."""
    records = {group: {name: read_metrics(run, group) for name, run in runs.items()} for group in ("train", "val")}
    charts = []
    for (group, key), (title, meaning) in _CURVES.items():
        lines = {name: points for name, rows in records[group].items() if (points := _points(rows, key))}
        if any(len(points) > 1 for points in lines.values()):
            charts.append(Chart(title, meaning, line_chart(lines, colours, title), list(runs)))
    return charts


def run_facts(run_dir: Path) -> dict[str, str]:
    """Command, commit and machine of a run, from its environment.json; empty without one."""
    path = run_dir / "environment.json"
    if not path.exists():
        return {}
    return environment_facts(json.loads(path.read_text(encoding="utf-8")))


def _points(rows: Iterable[Mapping[str, float]], key: str) -> Points:
    return [(row["step"], row[key]) for row in rows if key in row and math.isfinite(row[key])]
