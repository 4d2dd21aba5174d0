"""Training curves of runs and how each was made, from metrics.jsonl and environment.json of runs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from eval.base.environment import provenance
from eval.pages.charts import Points, line_chart
from eval.pages.report import Chart
from longclip_teacher.errors import InputError
from training.generations import verified_text
from training.losses.table import LOSSES
from training.record.run_log import read_metrics

__all__ = ["run_provenance", "training_curves"]

_WHAT_IS_COMPARED = {
    "long": ("long captions", "The student with the teacher on pictures and their long captions."),
    "short": ("short captions", "The student with the teacher on pictures and their short captions."),
    "sub": (
        "single sentences",
        "The student with the teacher on pictures and single sentences of their long captions.",
    ),
    "image": ("image tower", "The student's image tower with the teacher's."),
    "text": ("text tower", "The student's text tower with the teacher's."),
}


def _losses() -> dict[tuple[str, str], tuple[str, str]]:
    """A curve for each loss of the table; the contrastive and the relational one have meanings of their own below."""
    return {
        ("train", loss.option(part)): (
            (f"{loss.title}, {_WHAT_IS_COMPARED[part][0]}", _WHAT_IS_COMPARED[part][1])
            if len(loss.parts) > 1
            else (loss.title, "The student sees a part of each picture, the teacher all of it.")
        )
        for loss in LOSSES
        if loss.name not in ("clip", "crd")
        for part in loss.parts
    }


_CURVES = {  # (group, key in metrics.jsonl): title, meaning; in the order of the page
    ("train", "loss"): (
        "Loss",
        "What training minimises: the weighted sum of the terms below. It does not compare runs with different terms "
        "or weights.",
    ),
    ("train", "clip_long"): (
        "Contrastive, long captions",
        "How hard it is to find each picture's own long caption in the batch, and the reverse.",
    ),
    ("train", "clip_short"): (
        "Contrastive, short captions",
        "The same with short captions and a coarse version of the picture's features.",
    ),
    ("train", "clip_sub"): ("Contrastive, single sentences", "The same with single sentences of the long captions."),
    ("train", "crd_long"): (
        "Distillation, long captions",
        "How far the student's view of which captions fit which pictures is from the teacher's (KL divergence).",
    ),
    ("train", "crd_short"): ("Distillation, short captions", "The same with short captions."),
    **_losses(),
    ("val", "i2t_r1"): ("Validation: picture → caption", "Percent of pictures whose caption is ranked first."),
    ("val", "t2i_r1"): ("Validation: caption → picture", "Percent of captions whose picture is ranked first."),
    ("val", "agreement"): (
        "Validation: agreement with the teacher",
        "100 times the mean cosine of the trained tower's features and the teacher's.",
    ),
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


def run_provenance(run_dir: Path) -> dict[str, str]:
    """Command, commit and machine of a run, from its environment.json; empty without one. Raises InputError for a
    damaged one."""
    path = run_dir / "environment.json"
    if not path.exists():
        return {}
    try:
        return provenance(json.loads(verified_text(path)))
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not what a run writes ({error}): remove it") from None


def _points(rows: Iterable[Mapping[str, float]], key: str) -> Points:
    return [(row["step"], row[key]) for row in rows if key in row and math.isfinite(row[key])]
