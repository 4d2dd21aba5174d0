"""The main job on embedded data: a tiny teacher distilled into a tiny student, two controls, one table."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import joblib
import torch
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from eval.base.atomic_files import write_json
from eval.cost import measure_costs
from eval.measures.figures import Column, best_models, figure_columns, format_figure, model_figures
from eval.measures.retrieval_examples import retrieval_examples
from eval.measures.retrieval_set import encode_retrieval_set
from eval.pages.report import Report, model_colours, write_report
from eval.towers.models import ClipModel, load_model
from longclip_teacher.errors import InputError, run_command
from mobileclip_student import MobileCLIP, reparameterize, save_student
from training.data.digit_scenes import is_outdated, write_digit_scenes
from training.record.curves import run_facts, training_curves
from training.record.evaluate import evaluate_tests, test_sets
from training.settings.options import EMBEDDED_DATA, EMBEDDED_TEACHER
from training.settings.tree import TrainConfig, parse_config

STUDENTS = {  # what sets each student apart; data, steps, seed and optimiser are the same
    "distilled": [],
    "undistilled": ["--teacher.checkpoint", "None"],  # the losses that need a teacher fall away
    "cut77": ["--student.context_length", "77"],
}
WEIGHTS = "best.safetensors"
TWINS_CEILING = (25.0, "the most that a model can reach that reads 77 tokens (25%)")
# design of results.json: the twin figures carry no prefix
JSON_NAMES = {"twins_i2t_r1": "i2t_r1", "twins_t2i_r1": "t2i_r1"}
TRAINING_SCRIPT = Path(__file__).resolve().parent.parent / "training" / "main.py"

console = Console(stderr=True, highlight=False, soft_wrap=True)
Figures = dict[str, float]


def _processes() -> int:
    """As many as the machine has cores, at most four; not three, which does not divide the batch."""
    cores = joblib.cpu_count(only_physical_cores=True)
    return 4 if cores >= 4 else 2 if cores >= 2 else 1


@dataclass
class Options:
    """Long-CLIP distilled into a student that reads 248 tokens, from nothing, on the CPU, in a quarter of an hour.

    Writes pictures of handwritten digits with long captions; trains a tiny teacher; distils it into a tiny student;
    trains the same student without the teacher (undistilled) and with captions cut at 77 tokens (cut77); compares them
    all. Prints one table; leaves OUT/results.json and OUT/report.html. What is there already is used again: a
    quickstart that was stopped goes on where it was, and a second one trains no second teacher.
    """

    out: Path = Path("runs/quickstart")
    """Folder for the students, the figures and the report."""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(aliases=["--seed"])] = (0,)
    """Train every student once a seed; with several, the table has means and standard deviations."""
    processes: int = _processes()
    """Training processes, one thread each; a divisor of the batch of 128."""
    steps: int | None = None
    """Training steps of each student; unset, those of the preset digit_scenes."""
    teacher_steps: int | None = None
    """Training steps of the teacher, if it has to be trained; unset, those of the preset tiny_teacher."""
    data: Path = EMBEDDED_DATA
    """Digit scenes; written if the folder is not there."""
    teacher: Path = Path(EMBEDDED_TEACHER)
    """The teacher's run folder; trained if it has no weights."""

    def check(self) -> None:
        """InputError for what cannot work, before any work."""
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"--seeds {' '.join(map(str, self.seeds))}: give different whole numbers from 0")
        batch = student_config(self).run.global_batch_size
        if self.processes < 1 or batch % self.processes:
            raise InputError(f"--processes {self.processes}: give a number that divides the batch of {batch}")
        for name, steps in (("steps", self.steps), ("teacher-steps", self.teacher_steps)):
            if steps is not None and steps < 1:
                raise InputError(f"--{name} {steps}: give 1 or more")

    def run_dir(self, student: str, seed: int) -> Path:
        """Run folder of a student; seed 0 has the plain name."""
        return self.out / (student if seed == 0 else f"{student}_seed{seed}")

    def training_arguments(self) -> list[str]:
        """What all trainings share, where it differs from the presets."""
        return [
            *("--data.shards", f"{self.data}/train/*.tar", "--data.val", f"{self.data}/val_twins"),
            *("--data.tests", f"twins=folder:{self.data}/twins", f"random=folder:{self.data}/random"),
            *(
                "--data.zeroshot",
                f"{self.data}/digits/val",
                "--data.zeroshot_templates",
                f"{self.data}/digits/templates.txt",
            ),
            *("--data.zeroshot_classnames", f"{self.data}/digits/classnames.txt"),
            *("--run.device", "cpu", "--run.resume", "auto"),
        ]


def main() -> None:
    """The command."""
    options = tyro.cli(Options, description=Options.__doc__)
    options.check()
    torch.set_num_threads(1)  # for these small tensors a second thread gains nothing, and stalls on a busy machine
    started = time.monotonic()
    make_data(options.data)
    make_teacher(options)
    for seed in options.seeds:
        for student in STUDENTS:
            make_student(options, student, seed)
    say("comparing", "all models on both tests")
    by_seed = {seed: evaluate_students(options, seed) for seed in options.seeds}
    teacher = evaluate(options, load_model(options.teacher))
    costs = costs_of_models(options)
    means, spreads = summarise(teacher, by_seed)
    models = {name: means[name] | costs[name] for name in means}
    seconds = time.monotonic() - started
    notes = explain(options, models, seconds)
    print_table(models, spreads, notes)
    write_results(options, models, spreads, by_seed, seconds)
    report(options, models, spreads, notes)
    Console(soft_wrap=True).print(f"Report: {options.out / 'report.html'}", highlight=False)


# --- making ----------------------------------------------------------------------------------------------------------


def make_data(data: Path) -> None:
    """The digit scenes, if they are not there."""
    if data.exists():
        age = ", though of another version than this code: delete it to have it made anew" if is_outdated(data) else ""
        say("data", f"{data} is there and is used again{age}")
        return
    say("data", f"writing digit scenes to {data}: pictures of handwritten digits with captions of about 100 tokens")
    write_digit_scenes(data, show_progress=sys.stderr.isatty())


def make_teacher(options: Options) -> None:
    """The tiny teacher, if it is not there."""
    if (options.teacher / WEIGHTS).exists():
        say("teacher", f"{options.teacher} is there and is used again")
        return
    say("teacher", f"training the tiny Long-CLIP teacher in {options.teacher}: the longest part, needed only once")
    run_training("tiny_teacher", options.teacher, options, options.teacher_steps, [])


def make_student(options: Options, student: str, seed: int) -> None:
    """One student; a finished run is found finished, a stopped one goes on."""
    out_dir = options.run_dir(student, seed)
    say(student, f"training in {out_dir}")
    # the tests come at the end, all models together; validation on the way costs seconds and gives a curve
    steps = options.steps or student_config(options).run.max_steps or 1
    arguments = ["--teacher.checkpoint", str(options.teacher), "--run.seed", str(seed), *STUDENTS[student]]
    arguments += ["--data.tests", "--data.zeroshot", "None", "--run.eval_every", str(max(1, steps // 4))]
    run_training("digit_scenes", out_dir, options, options.steps, arguments)


def run_training(preset: str, out_dir: Path, options: Options, steps: int | None, arguments: list[str]) -> None:
    """Run training/main.py in its own processes; its progress passes through. Raises InputError if it fails."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(options.processes)]
    command = [sys.executable, *launcher, str(TRAINING_SCRIPT), preset, "--run.out_dir", str(out_dir)]
    command += [*options.training_arguments(), *arguments]
    if steps is not None:
        command += ["--run.max_steps", str(steps)]
    code = launch(command)
    if code != 0:
        raise InputError(
            f"training {out_dir} failed with exit code {code}: its own 'error:' line is further up; once that is "
            "mended, the same command goes on from the last checkpoint"
        )


def launch(command: list[str]) -> int:
    """The exit code of a command run to its end; what it prints goes to stderr, stdout is for the table alone."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # a process a core is faster than threads
    return subprocess.run(command, env=environment, stdout=sys.stderr.fileno()).returncode


def say(step: str, message: str) -> None:
    """A line of progress on stderr."""
    console.print(f"[bold]{step}[/bold]: {message}")


# --- comparing -------------------------------------------------------------------------------------------------------


def student_config(options: Options) -> TrainConfig:
    """The students' preset with this data."""
    return parse_config(["digit_scenes", *options.training_arguments(), "--data.num_workers", "0"])


def evaluate(options: Options, model: ClipModel) -> Figures:
    """Percentages of a model on the tests."""
    return model_figures(evaluate_tests(model, student_config(options)))


def evaluate_students(options: Options, seed: int) -> dict[str, Figures]:
    """Percentages of the students of a seed; makes the reparameterized student, which is saved beside them."""
    fused_dir = options.run_dir("reparameterized", seed)
    distilled = load_model(options.run_dir("distilled", seed))
    assert isinstance(distilled, MobileCLIP)
    fused_dir.mkdir(parents=True, exist_ok=True)
    save_student(reparameterize(distilled), fused_dir / WEIGHTS)
    return {name: evaluate(options, load_model(options.run_dir(name, seed))) for name in (*STUDENTS, "reparameterized")}


def costs_of_models(options: Options) -> dict[str, dict[str, Any]]:
    """Parameters, bytes and milliseconds; those of the students do not depend on the seed."""
    folders = {"teacher": options.teacher}
    folders |= {name: options.run_dir(name, options.seeds[0]) for name in (*STUDENTS, "reparameterized")}
    models = {name: load_model(folder) for name, folder in folders.items()}
    return measure_costs(models, {name: folder / WEIGHTS for name, folder in folders.items()})


def summarise(
    teacher: Figures, by_seed: Mapping[int, Mapping[str, Figures]]
) -> tuple[dict[str, Figures], dict[str, Figures]]:
    """Means over the seeds, and the standard deviations where there is more than one."""
    means, spreads = {"teacher": teacher}, {}
    runs = list(by_seed.values())
    for name, figures in runs[0].items():
        values = {key: [run[name][key] for run in runs] for key in figures}
        means[name] = {key: mean(value) for key, value in values.items()}
        if len(runs) > 1:
            spreads[name] = {key: stdev(value) for key, value in values.items()}
    return means, spreads


# --- telling ---------------------------------------------------------------------------------------------------------


def columns() -> list[Column]:
    """The table's columns."""
    return figure_columns(["twins", "random"], references={"twins": TWINS_CEILING})


def explain(options: Options, models: Mapping[str, Figures], seconds: float) -> list[str]:
    """What the tests are and what came out, for someone who sees this for the first time."""

    def both(name: str, test: str) -> str:
        return " / ".join(format_figure(models[name][f"{test}_{way}_r1"], "%") for way in ("i2t", "t2i"))

    gains = " / ".join(
        f"{models['distilled'][key] - models['undistilled'][key]:+.1f}" for key in ("twins_i2t_r1", "twins_t2i_r1")
    )
    num_twins, num_random = (len(found.images) for found in test_sets(student_config(options)).values())
    fused, plain = models["reparameterized"], models["distilled"]
    return [
        "All figures in % count how often the right answer is ranked first among all; the first of two is from picture "
        "to caption, the second from caption to picture.",
        f"The twin test has {num_twins} pictures in families of four whose captions share their first 77 tokens. A "
        "model that reads 77 tokens sees one caption four times, so by construction it cannot pass 25% there, whatever "
        f"it has learnt: the student cut at 77 tokens reaches {both('cut77', 'twins')}. To pass it a model must read "
        "to the end.",
        f"Learning from the teacher gives the student {both('distilled', 'twins')} on the twin test; the same student "
        f"after the same number of steps without the teacher has {both('undistilled', 'twins')}: {gains} points.",
        f"The random test has {num_random} unrelated pictures, which the beginning of a caption usually tells apart: "
        f"the student cut at 77 tokens has {both('cut77', 'random')} there, the one that reads everything "
        f"{both('distilled', 'random')}.",
        "reparameterized is the distilled student with its parallel branches merged into one, for use: the same "
        f"figures, {format_figure(fused['params'], 'count')} parameters instead of "
        f"{format_figure(plain['params'], 'count')}, {format_figure(fused['image_ms'], 'ms')} ms a picture instead of "
        f"{format_figure(plain['image_ms'], 'ms')}.",
        f"{seconds:.0f} seconds in all, {options.processes} training processes; milliseconds are those of one thread.",
    ]


def print_table(models: Mapping[str, Figures], spreads: Mapping[str, Figures], notes: list[str]) -> None:
    """The table and what it says, on stdout."""
    output = Console(highlight=False)
    padding = 1 if output.width >= 92 else 0  # it fits a terminal of 80 columns
    table = Table(
        box=box.SIMPLE_HEAD, padding=(0, padding, 0, 0), pad_edge=False, caption="The best of each column is bold."
    )
    table.add_column("", no_wrap=True)
    headings = {"twins_i2t_r1": "twins\nI→T %", "twins_t2i_r1": "twins\nT→I %", "random_i2t_r1": "random\nI→T %"}
    headings |= {"random_t2i_r1": "random\nT→I %", "zeroshot_top1": "zero-\nshot %", "params": "param-\neters"}
    headings |= {"bytes": "file", "image_ms": "image\nms", "text_ms": "text\nms"}
    for column in columns():
        table.add_column(headings[column.key], justify="right")
    for name, figures in models.items():
        cells = []
        for column in columns():
            text = format_figure(figures[column.key], column.unit)
            text = f"[bold]{text}[/bold]" if name in best_models(column, models) else text
            spread = spreads.get(name, {}).get(column.key)
            cells.append(text if spread is None else f"{text}\n±{format_figure(spread, column.unit)}")
        table.add_row(name, *cells)
    output.print(table)
    for note in notes:
        output.print(note, markup=False)


def write_results(
    options: Options,
    models: Mapping[str, Figures],
    spreads: Mapping[str, Figures],
    by_seed: Mapping[int, Mapping[str, Figures]],
    seconds: float,
) -> None:
    """results.json; with several seeds `models` are means, with each seed's figures and the spreads beside them."""

    def named(models: Mapping[str, Figures]) -> dict[str, Figures]:
        return {
            name: {JSON_NAMES.get(key, key): value for key, value in figures.items()}
            for name, figures in models.items()
        }

    content: dict[str, Any] = {"seconds": round(seconds, 1), "models": named(models)}
    if len(by_seed) > 1:
        content["standard_deviations"] = named(spreads)
        content["seeds"] = {str(seed): named(figures) for seed, figures in by_seed.items()}
    write_json(options.out / "results.json", content)


def report(options: Options, models: Mapping[str, Figures], spreads: Mapping[str, Figures], notes: list[str]) -> None:
    """report.html."""
    seed = options.seeds[0]
    distilled = load_model(options.run_dir("distilled", seed))
    sets = test_sets(student_config(options))
    runs = {name: options.run_dir(name, seed) for name in STUDENTS}
    facts = run_facts(runs["distilled"])
    facts["command"] = shlex.join(["python", *sys.argv])
    write_report(
        options.out / "report.html",
        Report(
            title="Quickstart: a small model that reads long captions",
            paragraphs=[
                "A teacher that reads captions of 248 tokens (Long-CLIP, tiny here) was distilled into a small student "
                "(MobileCLIP, tiny here), so that it reads 248 tokens too. The pictures are boards of real handwritten "
                "digits, each with a caption of about 100 tokens that says what stands where.",
                *notes,
            ],
            columns=columns(),
            models=models,
            spreads=spreads,
            sections={"Training": training_curves(runs, model_colours(models))},
            examples={
                f"The distilled student on the {name} test": retrieval_examples(encode_retrieval_set(distilled, found))
                for name, found in sets.items()
            },
            facts=facts,
        ),
    )


if __name__ == "__main__":
    run_command(main)
