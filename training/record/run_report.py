"""The end of a run: its best weights and its teacher on the tests, as a table, results.json and report.html."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from eval.measures.costs import measure_costs
from eval.measures.figures import Column, Figures, best_models, figure_columns, format_figure, model_figures
from eval.measures.retrieval_examples import retrieval_examples
from eval.measures.retrieval_set import encode_retrieval_set
from eval.pages.report import Report, model_colours, write_report
from eval.towers.models import ClipModel, load_model
from longclip_teacher.atomic_files import write_json
from training.build import DATACOMPDR, frozen_teacher, validation_teacher
from training.distributed import Runtime
from training.record.curves import run_facts, training_curves
from training.record.evaluate import evaluate_tests, judged_model, test_sets
from training.settings.tree import TrainConfig, config_from_toml

__all__ = ["report_run"]


def report_run(config: TrainConfig, runtime: Runtime, teacher: ClipModel | None) -> None:
    """Evaluate, print, and write results.json and report.html into the run's folder; nothing if there are no tests.

    A named teacher that training did without, because its features were stored, is loaded now. So is the whole teacher
    of a run of one tower, whose figures are those of that tower with the teacher's other one, and which says so.
    """
    if not config.data.tests and config.data.zeroshot is None:
        return
    whole_teacher = validation_teacher(config, runtime.device)
    teacher = whole_teacher or teacher
    stored_elsewhere = config.teacher.cache == DATACOMPDR  # by teachers that nobody has named
    if teacher is None and config.distils and config.teacher.checkpoint is not None and not stored_elsewhere:
        teacher = frozen_teacher(config).to(runtime.device)
    out_dir = config.run.out_dir
    best = out_dir / "best.safetensors"
    trained = judged_model(load_model(out_dir, device=str(runtime.device)), config, whole_teacher)
    models: dict[str, ClipModel] = {config.run.train: trained}
    if teacher is not None:
        models["teacher"] = teacher
    title = _trained_title(config)
    results = {name: evaluate_tests(model, config) for name, model in models.items()}
    # the file of a run of one tower holds a whole student: its size is not that of what is judged
    costs = measure_costs(models, {config.run.train: best} if config.run.stage == "both" else {})
    content: dict[str, Any] = {name: {**results[name], "cost": costs[name]} for name in models}
    write_json(
        out_dir / "results.json",
        {"weights": str(best), "steps": config.run.max_steps, "judged": title, "models": content},
    )

    sets = test_sets(config)
    columns = figure_columns(sets, zeroshot=config.data.zeroshot is not None)
    figures: dict[str, Figures] = {
        title if name == config.run.train else name: {**model_figures(results[name]), **costs[name]} for name in models
    }
    console = Console(highlight=False, soft_wrap=True)
    console.print(_table(columns, figures, f"best weights of {out_dir}; costs at batch 1, the best of a row is bold"))

    write_report(
        out_dir / "report.html",
        Report(
            title=f"Run {out_dir.name}",
            # a finished run may be judged on other sets than it was trained with
            paragraphs=[_summary(config_from_toml(out_dir / "config.toml"), teacher is not None)],
            columns=columns,
            models=figures,
            sections={"Training": training_curves({title: out_dir}, model_colours(figures))},
            examples={
                f"The {title} on {name}": retrieval_examples(encode_retrieval_set(trained, found))
                for name, found in sets.items()
            },
            facts=run_facts(out_dir),
        ),
    )
    console.print(f"Report: {out_dir / 'report.html'}", markup=False)


def _table(columns: Sequence[Column], figures: Mapping[str, Figures], caption: str) -> Table:
    """The figures as a table: a row for each, so that any number of tests fits a terminal, and a column per model."""
    table = Table(box=box.SIMPLE_HEAD, caption=caption)
    table.add_column("")
    for name in figures:
        table.add_column(name, justify="right")
    for column in columns:
        best_names = best_models(column, figures)
        cells = ((name, format_figure(values[column.key], column.unit)) for name, values in figures.items())
        marked = (f"[bold]{cell}[/bold]" if name in best_names else cell for name, cell in cells)
        table.add_row(f"{column.title}, {column.unit}" if column.unit in ("%", "ms") else column.title, *marked)
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
