"""The end of a run: its best weights and its teacher on the tests, as a table, results.json and report.html."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from eval.base.consoles import plain_console
from eval.base.processes import Runtime, agreed, bytes_of_main
from eval.benchmarks.named_sets import parse_sets
from eval.measures.costs import cost_conditions, measure_costs
from eval.measures.figures import (
    Column,
    Figures,
    best_models,
    figure_columns,
    figure_conditions,
    format_figure,
    model_figures,
)
from eval.measures.retrieval_examples import retrieval_examples
from eval.measures.retrieval_set import encode_retrieval_set
from eval.pages.report import Report, model_colours, write_report
from eval.towers.models import ClipModel, load_model
from longclip_teacher.atomic_files import json_text
from longclip_teacher.errors import InputError
from mobileclip_student import MobileCLIP, reparameterize
from training.build import frozen_teacher, validation_teacher
from training.generations import verified_file, verified_text, write_text_generation
from training.record.curves import run_provenance, training_curves
from training.record.evaluate import evaluate_tests, evaluated_model
from training.record.exported import read_exported
from training.settings.options import DATACOMPDR
from training.settings.tree import TrainConfig, config_from_toml

__all__ = ["Judged", "judge_run", "report_run", "write_run_page"]

_FUSED = "reparameterized"


@dataclass(frozen=True)
class Judged:
    """What a run is judged by: models by name, and the JSON of `evaluate_tests` of each."""

    models: dict[str, ClipModel]
    results: dict[str, dict[str, Any]]
    fused: ClipModel | None
    """The trained student with its branches merged."""


def judge_run(config: TrainConfig, runtime: Runtime, teacher: ClipModel | None) -> Judged | None:
    """Evaluate the best weights of a run, and its teacher, on all processes together. None if there are no tests.

    A named teacher that training did without, because its features were stored, is loaded now. So is the whole teacher
    of a run of one tower, whose figures are those of that tower with the teacher's other one.
    """
    if not config.data.tests and config.data.zeroshot is None:
        return None

    def load() -> tuple[dict[str, ClipModel], ClipModel | None]:
        whole_teacher = validation_teacher(config, runtime.device)
        saved = load_model(weights, device=str(runtime.device))
        models: dict[str, ClipModel] = {config.run.train: evaluated_model(saved, config, whole_teacher)}
        if (found := whole_teacher or teacher or _teacher_of_cache(config, runtime)) is not None:
            models["teacher"] = found
        fused = reparameterize(saved) if isinstance(saved, MobileCLIP) else None
        return models, None if fused is None else evaluated_model(fused, config, whole_teacher)

    with _best_weights(config, runtime) as weights:
        models, fused = agreed(load)
    return Judged(models, {name: evaluate_tests(model, config) for name, model in models.items()}, fused)


@contextmanager
def _best_weights(config: TrainConfig, runtime: Runtime) -> Iterator[Path]:
    """The run's folder on rank 0, and elsewhere a copy of the best weights in it: other nodes may not see that
    folder."""
    out_dir = config.run.out_dir
    if runtime.world_size == 1:
        yield out_dir
        return
    content = bytes_of_main(out_dir / "best.safetensors")
    if runtime.is_main:
        yield out_dir
        return
    with TemporaryDirectory() as folder:
        copy = Path(folder, "best.safetensors")
        copy.write_bytes(content.getbuffer())
        yield copy


def report_run(config: TrainConfig, runtime: Runtime, judged: Judged) -> None:
    """Print what was judged, and write results.json and report.html into the run's folder.

    results.json gives the cost of the student as it was trained (`cost`) and with its branches merged
    (`cost_reparameterized`). Table and page show the second: that is how a student is used. The percentages are the
    same for both.
    """
    models, results = judged.models, judged.results
    out_dir, trained_as = config.run.out_dir, config.run.train
    best = out_dir / "best.safetensors"
    timed = dict(models)
    if judged.fused is not None:
        timed[_FUSED] = judged.fused
    # the file of a run of one tower holds a whole student: its size is not that of what is evaluated
    costs = measure_costs(timed, dict.fromkeys((trained_as, _FUSED), best) if config.run.stage == "both" else {})
    content: dict[str, Any] = {name: {**results[name], "cost": costs[name]} for name in models}
    conditions = [figure_conditions(results[trained_as]), f"ms: {cost_conditions(runtime.device)}"]
    title = _trained_title(config)
    if _FUSED in costs:
        content[trained_as]["cost_reparameterized"] = costs[_FUSED]
        conditions.append(f"{title}: parameters and ms with branches merged (reparameterized), as it is used")
    written: dict[str, Any] = {"weights": str(best), "steps": config.run.max_steps, "judged": title}
    written |= {"tests": config.data.tests, "conditions": conditions, "models": content}
    write_text_generation(out_dir / "results.json", json_text(written))

    shown = write_run_page(out_dir, models[trained_as])
    console = plain_console(soft_wrap=True)
    note = f"Best weights of {out_dir}. The best of each row is bold."
    console.print(_table(shown.columns, shown.models, [note, *shown.conditions]))
    console.print(f"Report: {out_dir / 'report.html'}")


def write_run_page(out_dir: Path, model: ClipModel) -> Report:
    """Write the report.html of a run that was judged, and return its content.

    The figures are those of results.json and of the files that were exported of these weights. `model` finds the
    examples: the run's best weights, in any form. Raises InputError for results of another version and for missing
    tests.
    """
    # a finished run may be evaluated on other sets than those it was trained with
    config = config_from_toml(verified_file(out_dir / "config.toml"))
    path = out_dir / "results.json"
    try:
        results = json.loads(verified_text(path))
        title, conditions, sets = results["judged"], results["conditions"], parse_sets(results["tests"], "--data.tests")
        trained, models = results["models"][config.run.train], results["models"]
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is of another version: evaluate the run again") from None
    exported = read_exported(out_dir)
    shown = {title if name == config.run.train else name: _shown_figures(found) for name, found in models.items()}
    figures = shown | {name: _shown_figures(found) for name, found in exported.models.items()}
    columns = figure_columns(sets, zeroshot="zeroshot" in trained)
    report = Report(
        title=f"Run {out_dir.name}",
        paragraphs=[_summary(config, "teacher" in models)],
        columns=columns,
        models=figures,
        conditions=[*conditions, *exported.conditions],
        sections={"Training": training_curves({title: out_dir}, model_colours(figures))},
        examples={
            f"The {title} on {name}": retrieval_examples(encode_retrieval_set(model, found))
            for name, found in sets.items()
        },
        provenance=run_provenance(out_dir),
    )
    write_report(out_dir / "report.html", report)
    return report


def _shown_figures(judged: Mapping[str, Any]) -> Figures:
    """A model's figures from its JSON in results.json; a student's costs are those of its merged form."""
    costs = judged.get("cost_reparameterized", judged["cost"])
    return {**model_figures({name: found for name, found in judged.items() if not name.startswith("cost")}), **costs}


def _teacher_of_cache(config: TrainConfig, runtime: Runtime) -> ClipModel | None:
    """The named teacher whose stored features a run learnt from; None where nobody has named it."""
    teacher = config.teacher
    if not config.distils or teacher.checkpoint is None or teacher.cache == DATACOMPDR:
        return None
    return frozen_teacher(config).to(runtime.device)


def _table(columns: Sequence[Column], figures: Mapping[str, Figures], caption: Sequence[str]) -> Table:
    """A row per figure, so that any number of tests fits a terminal."""
    table = Table(box=box.SIMPLE_HEAD, caption=Text("\n".join(caption)), caption_justify="left")
    table.add_column("")
    for name in figures:
        table.add_column(name, justify="right")
    for column in columns:
        best_names = best_models(column, figures)
        cells = ((name, format_figure(values.get(column.key), column.unit)) for name, values in figures.items())
        marked = (Text(cell, "bold" if name in best_names else "") for name, cell in cells)
        title = f"{column.title}, {column.unit}" if column.unit in ("%", "ms") else column.title
        table.add_row(title, *marked)
    return table


def _trained_title(config: TrainConfig) -> str:
    """What the trained model's figures are the figures of."""
    if config.run.stage == "both":
        return config.run.train
    other = "text" if config.run.stage == "image" else "image"
    return f"student's {config.run.stage} tower + teacher's {other} tower"


def _summary(config: TrainConfig, has_teacher: bool) -> str:
    student, tower, data = f"student {config.student.variant}", config.run.stage, config.data
    if config.run.train == "teacher":
        what = f"A Long-CLIP teacher ({config.teacher.init or config.teacher.variant}) was trained"
    elif tower != "both":
        what = f"The {tower} tower of the {student} was distilled from that of the teacher {config.teacher.checkpoint}"
    elif has_teacher:
        what = f"The {student} was distilled from the teacher {config.teacher.checkpoint}"
    else:
        what = f"The {student} was trained without a teacher"
    sources = [str(data.images)] if data.images is not None else data.captions or data.shards
    whose = "the best weights" if tower == "both" else f"the {_trained_title(config)}, at the best weights"
    return (
        f"{what} on {', '.join(sources)}. The figures are those of {whose} by the mean R@1 on "
        f"{data.val or 'no validation set (the last weights)'}. The whole configuration is in config.toml."
    )
