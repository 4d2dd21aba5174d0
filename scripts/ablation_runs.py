"""The finished runs of an ablation, read from their folders into rows. Runs that cannot be compared are refused.

A row is a variant: its runs, one per seed, and its difference from the baseline, paired by seed.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy.stats import t as student_t

from ablation_grid import COMPARED_FIELDS, Grid, Job, Variant
from eval.benchmarks.named_sets import parse_sets, set_digest
from eval.benchmarks.protocols import load_retrieval_set
from eval.measures.figures import model_figures
from longclip_teacher.errors import InputError
from training.data.index import ShardIndex, expand_patterns, is_remote
from training.generations import verified_text
from training.record.run_log import read_metrics
from training.settings.tree import TrainConfig, config_to_toml, without_removed

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "RECORD",
    "Difference",
    "Row",
    "Run",
    "comparison_conditions",
    "config_differences",
    "gather",
    "paired_difference",
]

RECORD = "ablation.json"  # in a run's folder: its conditions
_ELSEWHERE = (  # settings that decide where and how a run is executed, not its results
    *("run.out_dir", "run.resume", "run.device", "run.seed", "run.log_every", "run.save_every", "run.keep_every"),
    "data.num_workers",
)


@dataclass(frozen=True)
class Run:
    """A finished run of one variant and seed."""

    folder: Path
    seed: int
    figures: dict[str, float]
    """Percentages by column; `score` is the mean of both directions of the first test."""
    minutes: float
    """Training time, including its stages."""
    conditions: dict[str, Any]
    """The values that must equal those of the runs it is compared with, by field (COMPARED_FIELDS)."""
    settings: dict[str, Any]
    """The configuration by section.field, without settings that do not affect the results."""


@dataclass(frozen=True)
class Difference:
    """Mean difference from the baseline over their common seeds, and its 95% interval if there are two or more."""

    value: float
    low: float | None
    high: float | None
    num_seeds: int


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    variant: Variant
    runs: tuple[Run, ...]
    settings: str
    """How its configuration differs from the baseline's."""
    apart: str
    """The declared conditions in which it differs from the baseline."""
    differences: dict[str, Difference]

    def values(self, key: str) -> list[float]:
        """Return a figure, or the minutes, for every seed that has it."""
        if key == "minutes":
            return [run.minutes for run in self.runs]
        return [run.figures[key] for run in self.runs if key in run.figures]


# --- conditions ------------------------------------------------------------------------------------------------------


def comparison_conditions(config: TrainConfig) -> dict[str, Any]:
    """Return what decides whether another run can be compared with this one, by field, as plain data for JSON.

    Shards are identified by the hashes of their manifests, test and validation sets by their content. The number of
    steps comes from the run's log, not from here.
    """
    data = config.data
    uses_shards = data.images is None and not data.captions
    val = None if data.val is None else [data.val_protocol, _val_digest(data.val_protocol, data.val)]
    zeroshot = (str(data.zeroshot), str(data.zeroshot_classnames), data.zeroshot_templates)
    return {
        "data.shards": _shards(tuple(data.shards)) if uses_shards else None,
        "data.images": None if data.images is None else str(data.images),
        "data.captions": list(data.captions) or None,
        "data.epoch_samples": data.epoch_samples,
        "data.val": val,
        "data.tests": _test_digests(tuple(data.tests)),
        "data.zeroshot": None if data.zeroshot is None else " ".join(zeroshot),
        "run.global_batch_size": config.run.global_batch_size,
        "run.stage": config.run.stage,
    }


@cache
def _shards(patterns: tuple[str, ...]) -> str:
    paths = expand_patterns(patterns)
    if any(map(is_remote, paths)):
        return f"{len(paths)} shards from {paths[0]} to {paths[-1]}"
    index = ShardIndex(paths)
    told = "\n".join(
        index.sha256(shard) or f"{Path(path).name} {index.file_status(shard)[0]}" for shard, path in enumerate(paths)
    )
    return (
        f"{index.num_samples} samples in {len(paths)} shards, sha256 {hashlib.sha256(told.encode()).hexdigest()[:12]}"
    )


@cache
def _val_digest(protocol: str, folder: Path) -> str:
    return set_digest(load_retrieval_set(protocol, folder))[:12]


@cache
def _test_digests(tests: tuple[str, ...]) -> dict[str, str]:
    sets = parse_sets(tests, "--data.tests")
    return {name: f"{found.name}, sha256 {set_digest(found)[:12]}" for name, found in sets.items()}


def config_differences(job: Job) -> list[tuple[str, Any, Any]]:
    """Return (field, value there, value here) where the configuration in the run's folder differs from the job's."""
    there, here = _settings(job.folder / "config.toml"), _flat(tomllib.loads(config_to_toml(job.config)))
    return [(key, value, here[key]) for key, value in there.items() if key in here and value != here[key]]


# --- reading ---------------------------------------------------------------------------------------------------------


def gather(grid: Grid, jobs: Sequence[Job]) -> list[Row]:
    """Return the rows of the finished runs among `jobs`, best first. Raise InputError for runs that cannot be
    compared."""
    runs: dict[str, list[Run]] = {}
    for job in jobs:
        if job.variant in grid.rows and all((folder / RECORD).exists() for folder in (*job.stages, job.folder)):
            runs.setdefault(job.variant.name, []).append(_read_run(job))
    if not runs:
        return []
    baseline = runs.get(grid.baseline, [])
    reference = (baseline or next(iter(runs.values())))[0]
    for name, found in runs.items():
        _check_comparable(grid.variants[name], found, reference)
    rows = [_row(grid.variants[name], tuple(found), baseline) for name, found in runs.items()]
    return sorted(rows, key=lambda row: -mean(row.values("score")))


def _read_run(job: Job) -> Run:
    settings = _settings(job.folder / "config.toml")
    results = _read_json(job.folder / "results.json")
    try:
        tests = [entry.partition("=")[0] for entry in settings["data.tests"]]
        names = tests + ([] if settings["data.zeroshot"] == "None" else ["zeroshot"])
        found = results["models"][settings["run.train"]]
        figures = model_figures({name: found[name] for name in names})
    except (KeyError, TypeError):
        raise InputError(
            f"{job.folder / 'results.json'} is not the results of a run: remove the folder and run again"
        ) from None
    first = [figures[f"{tests[0]}_{way}_r1"] for way in ("i2t", "t2i")] if tests else [figures["zeroshot_top1"]]
    folders = (*job.stages, job.folder)
    return Run(
        folder=job.folder,
        seed=job.seed,
        figures={"score": mean(first), **figures},
        minutes=sum(_seconds(folder) for folder in folders) / 60,
        conditions=_joined_conditions(folders),
        settings=settings,
    )


def _joined_conditions(folders: Sequence[Path]) -> dict[str, Any]:
    """Combine the conditions of a run and its stages: add their steps, join their data, keep the tests of the last."""
    conditions = [_read_json(folder / RECORD)["facts"] for folder in folders]
    joined = dict(conditions[-1])
    for field in ("data.shards", "data.images", "data.captions", "data.epoch_samples", "run.global_batch_size"):
        used = [part[field] for part in conditions if part[field] is not None]
        distinct = [value for number, value in enumerate(used) if value not in used[:number]]
        joined[field] = distinct[0] if len(distinct) == 1 else distinct or None
    return {**joined, "run.max_steps": sum(int(read_metrics(folder)[-1]["step"]) for folder in folders)}


def _seconds(folder: Path) -> float:
    """Return training time from the log: each line's samples over its rate, which holds however often the run
    stopped."""
    seconds, before = 0.0, 0.0
    for row in read_metrics(folder):
        seconds += (row["samples_seen"] - before) / row["samples_per_second"]
        before = row["samples_seen"]
    return seconds


def _settings(path: Path) -> dict[str, Any]:
    """Return the values of a run's config.toml by section.field, without settings that do not affect the results."""
    try:
        return _flat(without_removed(tomllib.loads(verified_text(path)), path))
    except InputError:
        raise
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"cannot read {path} ({error}): remove its folder and run again") from None


def _flat(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    flat = {f"{section}.{name}": value for section, fields in sections.items() for name, value in fields.items()}
    return {key: value for key, value in flat.items() if key not in _ELSEWHERE and not key.startswith("speed.")}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(verified_text(path))
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path} ({error}): remove its folder and run again") from None


# --- comparing -------------------------------------------------------------------------------------------------------


def _check_comparable(variant: Variant, runs: Sequence[Run], baseline: Run) -> None:
    """Compare every run with the baseline's, or with the variant's first run in the fields that `differs` names."""
    for run in runs:
        for field in COMPARED_FIELDS:
            other = runs[0] if field in variant.differs else baseline
            own, others = run.conditions[field], other.conditions[field]
            if own != others:
                raise InputError(
                    f"{run.folder} and {other.folder} cannot be compared: {field} is {own} in the first, "
                    f'{others} in the second; if intended, write differs = ["{field}"] in the variant'
                )


def _row(variant: Variant, runs: tuple[Run, ...], baseline: Sequence[Run]) -> Row:
    """Build the row, without differences while the baseline has no finished run."""
    first = runs[0]
    reference = baseline[0] if baseline else first
    changed = [key for key, value in first.settings.items() if value != reference.settings.get(key)]
    apart = [
        f"{field} {first.conditions[field]} against {reference.conditions[field]}"
        for field in variant.differs
        if first.conditions[field] != reference.conditions[field]
    ]
    differences = {}
    for key in first.figures if first is not reference else ():
        values, base = (
            {run.seed: run.figures[key] for run in found if key in run.figures} for found in (runs, baseline)
        )
        if set(values) & set(base):
            differences[key] = paired_difference(values, base)
    settings = ", ".join(f"{key} {_plain(first.settings[key])}" for key in changed)
    return Row(variant, runs, settings, "; ".join(apart), differences)


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference:
    """Return the mean of the differences by seed and its 95% interval: Student's t over the common seeds (at least
    one).

        Runs of the same seed see the same order of samples and the same crops, so pairing removes what they share.
    """
    differences = [values[seed] - baseline[seed] for seed in sorted(set(values) & set(baseline))]
    n = len(differences)
    if n < 2:
        return Difference(mean(differences), None, None, n)
    half = float(student_t.ppf(0.975, n - 1)) * stdev(differences) / n**0.5
    return Difference(mean(differences), mean(differences) - half, mean(differences) + half, n)
