"""The page of a comparison: tables, recall by caption length, latency against recall, the worst failures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eval.base.environment import provenance
from eval.measures.bootstrap import INTERVAL_METHOD, Estimate, bootstrap_recalls
from eval.measures.compare_measures import examples_of
from eval.measures.figures import WAYS, Column, best_models, format_figure
from eval.measures.query_bins import query_bins
from eval.measures.recall import RECALL_AT
from eval.pages.behaviour_page import behaviour_charts, behaviour_tables
from eval.pages.charts import line_chart, scatter_chart
from eval.pages.compare_tables import COST_METHOD, Comparison, Summary, queries_of
from eval.pages.report import Chart, PlainTable, Report, model_colours

__all__ = ["comparison_report"]


def comparison_report(comparison: Comparison, summary: Summary) -> Report:
    """Return the page's content."""
    names = list(summary.figures)
    colours = model_colours(names)
    sections = {
        "Recall against caption length": _length_charts(comparison, colours),
        **{
            f"What is read of a caption: {test}": behaviour_charts(found, colours)
            for test, found in comparison.behaviours.items()
        },
        "Recall against time": _time_charts(comparison, summary, colours),
    }
    tables = {
        "What was compared": _model_table(comparison),
        **{f"{test}: R@1, R@5, R@10": _recall_table(comparison, summary, test) for test in comparison.sets},
        **_difference_tables(comparison, summary),
        **_agreement_tables(comparison),
    }
    for found in comparison.behaviours.values():
        tables |= behaviour_tables(found)
    return Report(
        title=f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0],
        paragraphs=_paragraphs(comparison),
        warnings=comparison.warnings(),
        columns=summary.columns,
        models=summary.figures,
        spreads=summary.spreads,
        intervals={
            name: {key: (found.low, found.high) for key, found in intervals.items()}
            for name, intervals in summary.intervals.items()
        },
        tables=tables,
        sections=sections,
        examples={
            f"Worst failures of {name} on {test}": examples_of(comparison.retrieval(name, test)[0])
            for test in comparison.sets
            for name in names
        },
        provenance=_provenance(comparison),
    )


def _paragraphs(comparison: Comparison) -> list[str]:
    seeds = [name for name, checkpoints in comparison.checkpoints.items() if len(checkpoints) > 1]
    tests = [
        f"{name} has {len(found.images)} pictures and {len(found.captions)} captions. {found.description}"
        for name, found in comparison.sets.items()
    ]
    several = (
        [f"Models trained with several seeds: {', '.join(seeds)}. Failures are shown for the first seed."]
        if seeds
        else []
    )
    return [
        *comparison.behaviour_words(),
        "Every model saw the same pictures and captions. Recall (R@1) is the share of queries for which a right "
        "answer ranks first among all of the test.",
        *tests,
        *several,
        INTERVAL_METHOD,
        f"Times and parameters: {COST_METHOD} {comparison.cost_conditions}.",
    ]


# --- tables ---


def _model_table(comparison: Comparison) -> PlainTable:
    rows = [
        [name, "\n".join(checkpoints), _settings(comparison.settings[name]) or "–", comparison.read_as[name]]
        for name, checkpoints in comparison.checkpoints.items()
    ]
    meaning = "The weights of each model, the settings given for reading them, and the resulting model."
    return PlainTable(meaning, ["model", "weights", "settings", "read as"], rows)


def _settings(given: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in given.items())


def _recall_table(comparison: Comparison, summary: Summary, test: str) -> PlainTable:
    keys = [(way, k, f"{test}_{way}_r{k}") for way in WAYS for k in RECALL_AT]
    rows, best = [], set()
    for row, (name, figures) in enumerate(summary.figures.items()):
        cells = [name]
        for _, _, key in keys:
            found = summary.intervals[name][key]
            cells.append(f"{format_figure(figures[key], '%')}\n{_span(found)}")
            if name in best_models(Column(key, key, "%", ""), summary.figures):
                best.add((row, len(cells) - 1))
        rows.append(cells)
    figures = comparison.retrieval(comparison.first, test)[0]["figures"]
    cut = {name: comparison.retrieval(name, test)[0]["figures"]["num_truncated"] for name in summary.figures}
    told = ", ".join(f"{name} {count}" for name, count in cut.items())
    return PlainTable(
        f"Percentage of queries with a right answer among the first 1, 5 and 10 of {figures['num_texts']} captions or "
        f"{figures['num_images']} pictures, with 95% intervals. Captions longer than the model's context: {told}.",
        ["model", *(f"{WAYS[way]} R@{k}" for way, k, _ in keys)],
        rows,
        best,
    )


def _difference_tables(comparison: Comparison, summary: Summary) -> dict[str, PlainTable]:
    others = [name for name in summary.figures if name != comparison.first]
    if not others or not comparison.sets:
        return {}
    keys = [(test, way, f"{test}_{way}_r1") for test in comparison.sets for way in WAYS]
    rows, sure = [], set()
    for row, name in enumerate(others):
        cells = [name]
        for _, _, key in keys:
            found = summary.differences[name][key]
            cells.append(f"{_signed(found.value)}\n{_signed(found.low)} to {_signed(found.high)}")
            if found.low > 0 or found.high < 0:
                sure.add((row, len(cells) - 1))
        rows.append(cells)
    meaning = (
        f"R@1 minus that of {comparison.first}, in points, with the 95% interval of the difference. Both models saw "
        "the same pictures, so this is more precise than comparing two intervals. Bold: the interval excludes 0, for "
        "the weights compared here."
    )
    header = ["model", *(f"{test} {WAYS[way]}" for test, way, _ in keys)]
    return {f"Difference from {comparison.first}": PlainTable(meaning, header, rows, sure)}


def _agreement_tables(comparison: Comparison) -> dict[str, PlainTable]:
    """Return a table per test, with means over several seeds."""
    meaning = (
        f"How well a model's features agree with those of {comparison.teacher}. Cosine: after the best linear map, "
        "measured on pictures that it was not fitted on; in brackets what a constant would reach. CKA: 1 if the "
        "features differ only by rotation and scale. Neighbours: the percentage of the ten nearest that both models "
        "name. Kept: R@1 in % of the teacher's."
    )
    header = [
        "model",
        *("cosine, pictures", "cosine, captions", "CKA, pictures", "CKA, captions"),
        *("neighbours: picture, pictures", "caption, captions", "picture, captions"),
        *(f"kept: {words}" for words in WAYS.values()),
    ]
    tables = {}
    for test in comparison.sets:
        rows = []
        for name, seeds in comparison.measured.items():
            found = [seed["agreement"][test] for seed in seeds if test in seed["agreement"]]
            if found:
                rows.append([name, *_agreement_cells(found)])
        if rows:
            tables[f"Agreement with {comparison.teacher} on {test}"] = PlainTable(meaning, header, rows)
    return tables


def _agreement_cells(seeds: list[Mapping[str, Any]]) -> list[str]:
    def shown(digits: int, *path: str) -> str:
        """Return the mean over the seeds of the value at `path`, or a dash if a seed has none."""
        values = [_at(seed, path) for seed in seeds]
        return "–" if None in values else f"{np.mean([value for value in values if value is not None]):.{digits}f}"

    return [
        *(f"{shown(3, kind, 'mapped_cosine', 'mean')}\n({shown(3, kind, 'mapped_cosine', 'of_constant')})"
          for kind in ("image", "text")),
        *(shown(3, kind, "linear_cka") for kind in ("image", "text")),
        *(shown(1, "neighbour_overlap", pair) for pair in ("image_image", "text_text", "image_text")),
        *(shown(1, "retention", "overall", way, "retention") for way in WAYS),
    ]  # fmt: skip


def _at(content: Mapping[str, Any], path: Sequence[str]) -> float | None:
    for key in path[:-1]:
        content = content[key]
    return content[path[-1]]


# --- charts ---


def _length_charts(comparison: Comparison, colours: Mapping[str, int]) -> list[Chart]:
    charts = []
    for test in comparison.sets:
        for way, words in WAYS.items():
            ranks, picture = queries_of(comparison, test, way)
            first = comparison.retrieval(comparison.first, test)[0]
            num_tokens, owner = np.array(first["num_tokens"], dtype=float), np.array(first["caption_image"])
            if way == "i2t":
                num_tokens = np.bincount(owner, num_tokens) / np.bincount(owner)
            bins = query_bins(num_tokens)
            if len(bins) < 2:
                continue
            lines: dict[str, list[tuple[float, float]]] = {name: [] for name in ranks}
            bands: dict[str, list[tuple[float, float]]] = {name: [] for name in ranks}
            for queries in bins:
                hits = {name: (found[:, queries] == 1).mean(axis=0) for name, found in ranks.items()}
                for name, found in bootstrap_recalls(hits, picture[queries]).recalls.items():
                    lines[name].append((float(num_tokens[queries].mean()), found.value))
                    bands[name].append((found.low, found.high))
            title = f"{test}, {words}"
            sizes = sorted({len(queries) for queries in bins})
            span = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else f"{sizes[0]}"
            meaning = (
                f"R@1 of the queries in groups of {span} by length of the caption"
                f"{' (the mean of a picture’s captions)' if way == 'i2t' else ''}, "
                f"in tokens of {comparison.first}; shaded: 95% intervals."
            )
            svg = line_chart(lines, colours, title, x_label="tokens", y_label="R@1 %", bands=bands)
            charts.append(Chart(title, meaning, svg, list(lines)))
    return charts


def _time_charts(comparison: Comparison, summary: Summary, colours: Mapping[str, int]) -> list[Chart]:
    charts = []
    for test in comparison.sets:
        points = {
            name: (
                figures["image_ms"] + figures["text_ms"],
                float(np.mean([figures[f"{test}_{way}_r1"] for way in WAYS])),
            )
            for name, figures in summary.figures.items()
        }
        meaning = (
            "Higher is better, further left is faster: the mean R@1 of both directions against the milliseconds to "
            "encode one picture and one caption of 100 tokens."
        )
        title = f"{test}, latency"
        svg = scatter_chart(points, colours, title, x_label="ms for a picture and a caption", y_label="R@1 %")
        charts.append(Chart(test, meaning, svg, list(points)))
    return charts


# --- how it was made ---


def _provenance(comparison: Comparison) -> dict[str, str]:
    rows = provenance(comparison.environment)
    for name, found in comparison.sets.items():
        rows[f"test {name}"] = (
            f"{found.name}: {found.description} Pictures and captions have the sha256 {comparison.set_digests[name]}"
        )
    rows["precision"] = comparison.precision
    return rows


def _span(found: Estimate) -> str:
    return f"{format_figure(found.low, '%')}–{format_figure(found.high, '%')}"


def _signed(value: float) -> str:
    """Return the value with its sign. A value that rounds to zero has none."""
    return f"{value:+.1f}".replace("-", "−") if abs(value) >= 0.05 else "0.0"
