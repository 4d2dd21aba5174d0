"""The results of an ablation as one table: Markdown, CSV, JSON and a plot."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ablation_grid import Grid
from ablation_runs import Difference, Row
from longclip_teacher.atomic_files import atomic_file, write_json, write_text

__all__ = ["write_table"]

INTERVAL = (
    "Brackets: 95% interval of the mean difference from the baseline, paired by seed (Student's t over the differences "
    "of the seeds that both have). The interval covers other seeds, not other pictures, and needs at least two seeds. "
    "Among variants that change nothing, one in twenty has an interval that excludes zero."
)


def write_table(out: Path, grid: Grid, rows: Sequence[Row]) -> str:
    """Write table.md, table.csv, results.json and table.png to `out`. Return the Markdown."""
    markdown = _markdown(grid, rows)
    write_text(out / "table.md", markdown)
    write_text(out / "table.csv", _csv(rows))
    write_json(out / "results.json", _json(grid, rows))
    _plot(out / "table.png", grid, rows)
    return markdown


def _keys(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for run in row.runs for key in run.figures))


def _titles(rows: Sequence[Row]) -> dict[str, str]:
    """Headings by column."""
    titles = {"score": "zero-shot", "zeroshot_top1": "zero-shot", "minutes": "minutes"}
    for key in _keys(rows):
        for end, way in (("_i2t_r1", "I→T"), ("_t2i_r1", "T→I")):
            if key.endswith(end):
                titles[key] = f"{key.removesuffix(end)} {way} R@1"
    if (first := _keys(rows)[1]).endswith("_i2t_r1"):
        titles["score"] = f"{first.removesuffix('_i2t_r1')} mean R@1"
    return titles


def _markdown(grid: Grid, rows: Sequence[Row]) -> str:
    titles = _titles(rows)
    keys = [key for key in (*_keys(rows), "minutes") if key != "score"]
    header = ["variant", "group", "seeds", titles["score"], f"against {grid.baseline}", *(titles[key] for key in keys)]
    header.append(f"what differs from {grid.baseline}")
    right = ["---:"] * (len(header) - 3)
    lines = [_line(header), _line(["---", "---", *right, "---"])]
    for row in rows:
        apart = f" **not the same: {row.apart}**" if row.apart else ""
        cells = [row.variant.name, row.variant.group, str(len(row.runs)), _spread(row.values("score"))]
        cells += [_difference(row.differences.get("score")), *(_spread(row.values(key)) for key in keys)]
        lines.append(_line([*cells, row.settings + apart]))
    notes = [
        "Percentages; ± is the standard deviation between the seeds. Sorted by the mean of the first test's two "
        "directions. Minutes are training time, including a variant's stages.",
        INTERVAL,
        *_missing(grid, rows),
    ]
    return "\n".join([*lines, "", *(f"{note}  " for note in notes)]) + "\n"


def _missing(grid: Grid, rows: Sequence[Row]) -> list[str]:
    found = {row.variant.name: len(row.runs) for row in rows}
    short = [
        f"{variant.name} ({found.get(variant.name, 0)} of {len(grid.seeds)})"
        for variant in grid.rows
        if found.get(variant.name, 0) < len(grid.seeds)
    ]
    return [f"Not all seeds have finished: {', '.join(short)}."] if short else []


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def _difference(found: Difference | None) -> str:
    if found is None:
        return "–"
    return f"{found.value:+.1f}" + ("" if found.low is None else f" [{found.low:+.1f}, {found.high:+.1f}]")


def _csv(rows: Sequence[Row]) -> str:
    """Return one line per variant, with mean, sd, difference, low and high of each figure."""
    keys, text = [*_keys(rows), "minutes"], io.StringIO()
    parts = ("mean", "sd", "difference", "low", "high")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["variant", "group", "seeds", *(f"{key}_{part}" for key in keys for part in parts), "settings"])
    for row in rows:
        cells: list[Any] = [row.variant.name, row.variant.group, len(row.runs)]
        for key in keys:
            values, found = row.values(key), row.differences.get(key)
            cells += [mean(values) if values else None, stdev(values) if len(values) > 1 else None]
            cells += [None] * 3 if found is None else [found.value, found.low, found.high]
        writer.writerow([*cells, row.settings])
    return text.getvalue()


def _json(grid: Grid, rows: Sequence[Row]) -> dict[str, Any]:
    variants = {}
    for row in rows:
        keys = [key for key in (*_keys(rows), "minutes") if row.values(key)]
        variants[row.variant.name] = {
            "group": row.variant.group,
            "settings": row.settings,
            "differs": row.apart,
            "mean": {key: mean(row.values(key)) for key in keys},
            "standard_deviation": {key: stdev(row.values(key)) for key in keys if len(row.values(key)) > 1},
            "difference": {
                key: {"value": found.value, "interval": None if found.low is None else [found.low, found.high]}
                for key, found in row.differences.items()
            },
            "seeds": {str(run.seed): {**run.figures, "minutes": run.minutes} for run in row.runs},
            "facts": row.runs[0].conditions,
        }
    return {"baseline": grid.baseline, "intervals": INTERVAL, "variants": variants}


def _plot(path: Path, grid: Grid, rows: Sequence[Row]) -> None:
    """Plot one line per variant, best on top: a dot per seed, a diamond for the mean, a dashed rule for the
    baseline."""
    groups = list(dict.fromkeys(variant.group for variant in grid.rows))
    colours = {group: f"C{number % 10}" for number, group in enumerate(groups)}  # matplotlib's ten
    figure = Figure(figsize=(8, 1.4 + 0.28 * len(rows)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for place, row in enumerate(rows):
        values, group = row.values("score"), row.variant.group
        axes.plot(values, [place] * len(values), "o", color=colours[group], alpha=0.45, markersize=4)
        axes.plot([mean(values)], [place], "D", color=colours[group], markersize=7)
        if row.variant.name == grid.baseline:
            axes.axvline(mean(values), color="#888888", linewidth=0.9, linestyle="--", zorder=0)
    axes.set_yticks(range(len(rows)), [row.variant.name for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(f"{_titles(rows)['score']}, % (diamond: mean; dots: seeds; dashed: {grid.baseline})")
    axes.grid(axis="x", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    handles = [Line2D([], [], color=colours[group], marker="D", linestyle="", label=group) for group in groups if group]
    if handles:
        figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8)
    with atomic_file(path) as temporary:
        figure.savefig(temporary)
