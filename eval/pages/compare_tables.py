"""The results of a comparison: figures with their intervals, as JSON and as a Markdown table.

Shapes: N pictures, M captions, Q queries (N pictures or M captions).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import mean, stdev
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from eval.benchmarks.protocols import RetrievalSet
from eval.measures.behaviour_figures import Behaviour
from eval.measures.bootstrap import INTERVAL_METHOD, Estimate, bootstrap_recalls
from eval.measures.figures import COST_COLUMNS, WAYS, Column, best_models, figure_columns, format_figure
from eval.measures.recall import RECALL_AT
from eval.pages.behaviour_words import METHOD, behaviour_words

__all__ = ["Comparison", "Summary", "comparison_json", "comparison_markdown", "queries_of", "summarise"]

COST_METHOD = (
    "each model is measured as it was loaded; a student's branches are fused only if its description says so. A time "
    "covers one picture, or one caption of 100 tokens, in the tower alone:"
)


@dataclass(frozen=True)
class Comparison:
    """Everything that was measured."""

    checkpoints: Mapping[str, Sequence[str]]
    """The weights of each model: one, or one for each of its seeds."""
    settings: Mapping[str, Mapping[str, Any]]
    """The settings that the user gave for reading each model, by name; empty if the file alone decides."""
    read_as: Mapping[str, str]
    """The description of each model's first checkpoint, in one phrase."""
    measured: Mapping[str, Sequence[Mapping[str, Any]]]
    """By model and seed: `retrieval`, `zeroshot`, `agreement` and `behaviour`, each by the test's name."""
    sets: Mapping[str, RetrievalSet]
    set_digests: Mapping[str, str]
    zeroshot: Sequence[str]
    costs: Mapping[str, Mapping[str, Any]]
    cost_conditions: str
    """Batch, precision, device, threads and repeats of the times in `costs`."""
    teacher: str | None
    precision: str
    environment: Mapping[str, Any]

    @property
    def first(self) -> str:
        """The model that the others are compared with."""
        return next(iter(self.measured))

    def retrieval(self, model: str, test: str) -> list[Mapping[str, Any]]:
        """Return what eval.measures.compare_measures.measure_retrieval gave, one per seed."""
        return [seed["retrieval"][test] for seed in self.measured[model]]

    @cached_property
    def behaviours(self) -> dict[str, Behaviour]:
        """What the models read of long captions, by test; empty if that was not measured."""
        return {
            test: Behaviour(
                test, {name: [seed["behaviour"][test] for seed in self.measured[name]] for name in self.measured}
            )
            for test in self.sets
            if all(test in seed["behaviour"] for seeds in self.measured.values() for seed in seeds)
        }

    def behaviour_words(self) -> list[str]:
        """Return what each model reads of the captions of each test, in sentences."""
        found = [
            words
            for behaviour in self.behaviours.values()
            for name in self.measured
            for words in behaviour_words(behaviour, name)
        ]
        return [*found, METHOD] if found else []

    def warnings(self) -> list[str]:
        """Return what makes figures doubtful: counts that differ from the protocol's, and lost pictures."""
        found: dict[str, None] = {}
        for seeds in self.measured.values():
            for seed in seeds:
                for kind in ("retrieval", "zeroshot"):
                    for test, measured in seed[kind].items():
                        figures = measured["figures"] if kind == "retrieval" else measured
                        if figures["count_mismatch"]:
                            found[f"{test}: {figures['count_mismatch']}."] = None
                        if figures["num_unreadable"]:
                            lost = f"{figures['num_unreadable']} unreadable pictures were left out"
                            found[f"{test}: {lost}, the first: {figures['unreadable'][0]}."] = None
        return list(found)


@dataclass(frozen=True)
class Summary:
    """The figures by model and key (such as urban_i2t_r1), and their uncertainty."""

    columns: list[Column]
    """The columns of the table; `figures` also has R@5 and R@10."""
    figures: dict[str, dict[str, Any]]
    spreads: dict[str, dict[str, float]]
    """Standard deviations between seeds."""
    intervals: dict[str, dict[str, Estimate]]
    differences: dict[str, dict[str, Estimate]]
    """Paired differences between retrieval figures and the first model's."""


def queries_of(
    comparison: Comparison, test: str, way: str
) -> tuple[dict[str, Float[np.ndarray, "S Q"]], Int[np.ndarray, " Q"]]:
    """Return the ranks [S,Q] of each model's S seeds, and each query's picture."""
    ranks = {
        name: np.array([measured["ranks"][way] for measured in comparison.retrieval(name, test)])
        for name in comparison.measured
    }
    owner = np.array(comparison.retrieval(comparison.first, test)[0]["caption_image"])
    return ranks, (owner if way == "t2i" else np.arange(owner.max() + 1))


def summarise(comparison: Comparison) -> Summary:
    """Return means over the seeds, their spread, and the intervals."""
    names = list(comparison.measured)
    figures: dict[str, dict[str, Any]] = {name: {} for name in names}
    spreads: dict[str, dict[str, float]] = {name: {} for name in names}
    intervals: dict[str, dict[str, Estimate]] = {name: {} for name in names}
    differences: dict[str, dict[str, Estimate]] = {name: {} for name in names}
    for test in comparison.sets:
        for way in WAYS:
            ranks, picture = queries_of(comparison, test, way)
            for k in RECALL_AT:
                key = f"{test}_{way}_r{k}"
                estimates = bootstrap_recalls(
                    {name: (found <= k).mean(axis=0) for name, found in ranks.items()}, picture
                )
                for name in names:
                    figures[name][key] = estimates.recalls[name].value
                    intervals[name][key] = estimates.recalls[name]
                    differences[name][key] = estimates.differences[name]
                    if len(ranks[name]) > 1:
                        spreads[name][key] = stdev(100 * (found <= k).mean() for found in ranks[name])
    for test in comparison.zeroshot:
        for name in names:
            _add_zeroshot(test, [seed["zeroshot"][test] for seed in comparison.measured[name]], figures[name],
                          spreads[name], intervals[name])  # fmt: skip
    for name in names:
        figures[name] |= comparison.costs[name]
    return Summary(_columns(comparison), figures, spreads, intervals, differences)


def _add_zeroshot(
    test: str,
    seeds: Sequence[Mapping[str, Any]],
    figures: dict[str, Any],
    spreads: dict[str, float],
    intervals: dict[str, Estimate],
) -> None:
    """Add accuracy. It counts only pictures, so its interval follows from the number right; with seeds, ± must do."""
    for kind in ("top1", "top5"):
        key, values = f"{test}_{kind}", [float(seed[kind]) for seed in seeds]
        figures[key] = mean(values)
        if len(values) > 1:
            spreads[key] = stdev(values)
            continue
        num_images = seeds[0]["num_images"]
        hits = np.arange(num_images) < round(values[0] * num_images / 100)
        intervals[key] = bootstrap_recalls({key: hits.astype(float)}, np.arange(num_images)).recalls[key]


def _columns(comparison: Comparison) -> list[Column]:
    meaning = "Share of pictures assigned to the right class by comparing them with sentences that name the classes."
    return [
        *figure_columns(comparison.sets, zeroshot=False, cost=False),
        *(Column(f"{test}_top1", f"{test} zero-shot", "%", meaning) for test in comparison.zeroshot),
        *COST_COLUMNS,
    ]


# --- JSON ---


def comparison_json(comparison: Comparison, summary: Summary) -> dict[str, Any]:
    """Return results.json: for each model its checkpoints, the figures (percent) with intervals, and the seeds' own
    JSON."""
    models = {}
    for name, seeds in comparison.measured.items():
        models[name] = {
            "checkpoints": list(comparison.checkpoints[name]),
            "settings": dict(comparison.settings[name]),
            "read_as": comparison.read_as[name],
            "figures": {
                key: {
                    "value": value,
                    "interval": _ends(summary.intervals[name].get(key)),
                    "standard_deviation": summary.spreads[name].get(key),
                }
                for key, value in summary.figures[name].items()
                if key not in comparison.costs[name]
            },
            "difference_to_first": {
                key: {"value": found.value, "interval": _ends(found)}
                for key, found in summary.differences[name].items()
            },
            "cost": dict(comparison.costs[name]),
            "seeds": [
                {kind: {test: found.get("figures", found) for test, found in seed[kind].items()} for kind in seed}
                for seed in seeds
            ],
        }
    return {
        "first": comparison.first,
        "teacher": comparison.teacher,
        "precision": comparison.precision,
        "intervals": INTERVAL_METHOD,
        "cost_conditions": comparison.cost_conditions,
        "sets": {
            name: {
                "protocol": found.name,
                "definition": found.description,
                "num_images": len(found.images),
                "num_texts": len(found.captions),
                "sha256": comparison.set_digests[name],
                "count_mismatch": found.count_mismatch,
            }
            for name, found in comparison.sets.items()
        },
        "warnings": comparison.warnings(),
        "behaviour": {test: found.summary() for test, found in comparison.behaviours.items()},
        "models": models,
        "environment": dict(comparison.environment),
    }


def _ends(estimate: Estimate | None) -> list[float] | None:
    return None if estimate is None else [estimate.low, estimate.high]


# --- Markdown ---


def comparison_markdown(comparison: Comparison, summary: Summary) -> str:
    """Return table.md: one row per model, the best of a column in bold, intervals in brackets."""
    best = {column.key: best_models(column, summary.figures) for column in summary.columns}
    header = ["model", *(_heading(column) for column in summary.columns)]
    lines = [_row(header), _row(["---", *("---:" for _ in summary.columns)])]
    for name, figures in summary.figures.items():
        cells = [name]
        for column in summary.columns:
            text = format_figure(figures.get(column.key), column.unit)
            text = f"**{text}**" if name in best[column.key] else text
            if (spread := summary.spreads[name].get(column.key)) is not None:
                text += f" ± {format_figure(spread, column.unit)}"
            if (found := summary.intervals[name].get(column.key)) is not None:
                text += f" [{format_figure(found.low, column.unit)}, {format_figure(found.high, column.unit)}]"
            cells.append(text)
        lines.append(_row(cells))
    notes = [
        *comparison.behaviour_words(),
        *(
            f"{name}: {', '.join(comparison.checkpoints[name])}; {comparison.read_as[name]}."
            for name in summary.figures
        ),
        f"In brackets: {INTERVAL_METHOD}",
        f"Times and parameters: {COST_METHOD} {comparison.cost_conditions}.",
        *(
            f"{name}: {found.name}, {len(found.images)} pictures, {len(found.captions)} captions, "
            f"sha256 {comparison.set_digests[name][:12]}."
            for name, found in comparison.sets.items()
        ),
        *(f"Warning: {warning}" for warning in comparison.warnings()),
    ]
    return "\n".join([*lines, "", *(f"{note}  " for note in notes)]) + "\n"


def _heading(column: Column) -> str:
    title = column.title + (", R@1" if column.key.endswith("_r1") else "")
    return f"{title}, {column.unit}" if column.unit in ("%", "ms") else title


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
