"""The main job on embedded data: a tiny teacher distilled into a tiny student, with two controls and one table."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import joblib
import tyro
from rich import box
from rich.table import Table
from rich.text import Text

from eval.base.arguments import answer_early, read_options
from longclip_teacher.errors import InputError, run_command
from training.settings.options import EMBEDDED_DATA, EMBEDDED_TEACHER
from training.settings.tree import TrainConfig, parse_config


def _processes() -> int:
    """Return the number of cores, at most four, but not three, which does not divide the batch."""
    cores = joblib.cpu_count(only_physical_cores=True)
    return 4 if cores >= 4 else 2 if cores >= 2 else 1


@dataclass
class Options:
    """Distil Long-CLIP into a student that reads 248 tokens, from scratch, on the CPU, in a quarter of an hour.

    The script writes pictures of handwritten digits with long captions, trains a tiny teacher and distils it into a
    tiny student. It trains the same student without the teacher (undistilled) and with captions cut at 77 tokens
    (cut77), and compares them all. It prints one table and leaves OUT/results.json and OUT/report.html. Existing
    results are reused: a stopped quickstart continues where it was, and a second one does not train the teacher again.
    """

    out: Path = Path("runs/quickstart")
    """Folder for the students, the figures and the report."""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(aliases=["--seed"])] = (0,)
    """Train every student once per seed. With several seeds the table shows means and standard deviations."""
    processes: int = _processes()
    """Training processes, one thread each. The number must divide the batch of 128."""
    steps: int | None = None
    """Training steps of each student. Default: those of the preset digit_scenes."""
    teacher_steps: int | None = None
    """Training steps of the teacher, if it has to be trained. Default: those of the preset tiny_teacher."""
    data: Path = EMBEDDED_DATA
    """Folder of the digit scenes. They are written if it does not exist."""
    teacher: Path = Path(EMBEDDED_TEACHER)
    """The teacher's run folder. The teacher is trained if it has no weights."""

    def check(self) -> None:
        """Raise InputError for impossible options, before any work."""
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"--seeds {' '.join(map(str, self.seeds))}: give different whole numbers from 0")
        batch = student_config(self).run.global_batch_size
        if self.processes < 1 or batch % self.processes:
            raise InputError(f"--processes {self.processes}: give a number that divides the batch of {batch}")
        for name, steps in (("steps", self.steps), ("teacher-steps", self.teacher_steps)):
            if steps is not None and steps < 1:
                raise InputError(f"--{name} {steps}: give 1 or more")

    def run_dir(self, student: str, seed: int) -> Path:
        """Return the run folder of a student; seed 0 has the plain name."""
        return self.out / (student if seed == 0 else f"{student}_seed{seed}")

    def training_arguments(self) -> list[str]:
        """Return the arguments that all trainings share and that differ from the presets."""
        return [
            *("--data.shards", f"{self.data}/train/*.tar", "--data.val", f"{self.data}/val_twins"),
            *("--data.tests", f"twins=folder:{self.data}/twins", f"random=folder:{self.data}/random"),
            *("--data.zeroshot", f"{self.data}/digits/val"),
            *("--data.zeroshot_templates", f"{self.data}/digits/templates.txt"),
            *("--data.zeroshot_classnames", f"{self.data}/digits/classnames.txt"),
            *("--run.device", "cpu", "--run.resume", "auto"),
        ]


def student_config(options: Options) -> TrainConfig:
    """Return the students' preset with this data."""
    return parse_config(["digit_scenes", *options.training_arguments(), "--data.num_workers", "0"])


if __name__ == "__main__":
    answer_early(Options)  # --help and refused options end here: the imports below take seconds

import torch

from eval.base.consoles import plain_console
from eval.base.launch import run_passing_signals
from eval.measures.costs import Cost, cost_conditions, measure_costs
from eval.measures.figures import Column, best_models, figure_columns, figure_conditions, format_figure, model_figures
from eval.measures.retrieval_examples import retrieval_examples
from eval.measures.retrieval_set import encode_retrieval_set
from eval.pages.behaviour_page import chart_of_cuts
from eval.pages.report import Report, model_colours, write_report
from eval.towers.models import load_model
from longclip_teacher.atomic_files import write_json
from longclip_teacher.folder_lock import folder_lock
from mobileclip_student import MobileCLIP, reparameterize, save_student
from training.data.digit_scenes import is_outdated, write_digit_scenes
from training.record.curves import run_provenance, training_curves
from training.record.evaluate import evaluate_tests, test_sets

STUDENTS = {  # what distinguishes each student; data, steps, seed and optimiser are the same
    "distilled": [],
    "undistilled": ["--teacher.checkpoint", "None"],  # drops the losses that need a teacher
    "cut77": ["--student.context_length", "77"],
}
WEIGHTS = "best.safetensors"
TWINS_CEILING = (25.0, "the most that a model reading 77 tokens can reach (25%)")
# results.json: the twin figures have no prefix
JSON_NAMES = {"twins_i2t_r1": "i2t_r1", "twins_t2i_r1": "t2i_r1"}
TRAINING_SCRIPT = Path(__file__).resolve().parent.parent / "training" / "main.py"

console = plain_console(stderr=True, soft_wrap=True)
Figures = dict[str, float]


def main() -> None:
    """Run the command."""
    options = read_options(Options)
    with folder_lock(options.out):  # the runs it starts lock their own folders
        run(options)


def run(options: Options) -> None:
    """Make what is missing, compare, report."""
    torch.set_num_threads(1)  # for these small tensors a second thread gains nothing and stalls on a busy machine
    started = time.monotonic()
    make_data(options.data)
    make_teacher(options)
    for seed in options.seeds:
        for student in STUDENTS:
            make_student(options, student, seed)
    say("comparing", "all models on both tests")
    by_seed = {seed: evaluate_students(options, seed) for seed in options.seeds}
    teacher_results = evaluate_tests(load_model(options.teacher), student_config(options))
    costs, fused_costs = costs_of_models(options)
    means, spreads = summarise(model_figures(teacher_results), by_seed)
    models = {name: means[name] | costs[name] for name in means}
    shown = {name: means[name] | fused_costs.get(name, costs[name]) for name in ("teacher", *STUDENTS)}
    seconds = time.monotonic() - started
    notes = explain(options, models, seconds)
    conditions = [
        figure_conditions(teacher_results),
        f"ms: {cost_conditions('cpu')}; students with branches merged (reparameterized), as they are used",
    ]
    write_results(options, models, spreads, by_seed, seconds)
    report(options, shown, spreads, conditions, notes)
    print_table(shown, spreads, conditions, notes)
    plain_console(soft_wrap=True).print(f"Report: {options.out / 'report.html'}")


# --- making ----------------------------------------------------------------------------------------------------------


def make_data(data: Path) -> None:
    """Write the digit scenes if they do not exist."""
    if data.exists():
        age = ", though another version of the code wrote it: delete it to write it again" if is_outdated(data) else ""
        say("data", f"reusing {data}{age}")
        return
    say("data", f"writing digit scenes to {data}: pictures of handwritten digits with captions of about 100 tokens")
    write_digit_scenes(data, show_progress=sys.stderr.isatty())


def make_teacher(options: Options) -> None:
    """Train the tiny teacher if it does not exist. Another quickstart that trains it is waited for."""
    weights = options.teacher / WEIGHTS
    if not weights.exists():
        with folder_lock(options.teacher, wait=True):
            pass
    if weights.exists():
        say("teacher", f"reusing {options.teacher}")
        return
    say("teacher", f"training the tiny Long-CLIP teacher in {options.teacher}: the longest part, needed only once")
    run_training("tiny_teacher", options.teacher, options, options.teacher_steps, [])


def make_student(options: Options, student: str, seed: int) -> None:
    """Train one student. A finished run is reused, a stopped one continues."""
    out_dir = options.run_dir(student, seed)
    say(student, f"training in {out_dir}")
    # the tests come at the end, for all models together; validation on the way costs seconds and gives a curve
    steps = options.steps or student_config(options).run.max_steps or 1
    arguments = ["--teacher.checkpoint", str(options.teacher), "--run.seed", str(seed), *STUDENTS[student]]
    arguments += ["--data.tests", "--data.zeroshot", "None", "--run.eval_every", str(max(1, steps // 4))]
    run_training("digit_scenes", out_dir, options, options.steps, arguments)


def run_training(preset: str, out_dir: Path, options: Options, steps: int | None, arguments: list[str]) -> None:
    """Run training/main.py in its own processes and pass on its progress. Raise InputError if it fails."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(options.processes)]
    command = [sys.executable, *launcher, str(TRAINING_SCRIPT), preset, "--run.out_dir", str(out_dir)]
    command += [*options.training_arguments(), *arguments]
    if steps is not None:
        command += ["--run.max_steps", str(steps)]
    code = launch(command)
    if code != 0:
        raise InputError(
            f"training {out_dir} failed with exit code {code}: see its own 'error:' line above; once that is fixed, "
            "the same command continues from the last checkpoint"
        )


def launch(command: list[str]) -> int:
    """Run a command to its end and return its exit code. Its output goes to stderr; stdout is for the table."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # one process per core is faster than threads
    return run_passing_signals(command, env=environment, stdout=sys.stderr.fileno())


def say(step: str, message: str) -> None:
    """Print a line of progress on stderr."""
    console.print(Text.assemble((step, "bold"), f": {message}"))


# --- comparing -------------------------------------------------------------------------------------------------------


def evaluate_students(options: Options, seed: int) -> dict[str, Figures]:
    """Return the percentages of one seed's students. Save the reparameterized student beside the others."""
    distilled = load_model(options.run_dir("distilled", seed))
    assert isinstance(distilled, MobileCLIP)
    save_student(reparameterize(distilled), options.run_dir("reparameterized", seed) / WEIGHTS)
    models = {name: load_model(options.run_dir(name, seed)) for name in (*STUDENTS, "reparameterized")}
    return {name: model_figures(evaluate_tests(model, student_config(options))) for name, model in models.items()}


def costs_of_models(options: Options) -> tuple[dict[str, Cost], dict[str, Cost]]:
    """Return parameters, bytes and milliseconds, which do not depend on the seed: of every model as it was saved, and
    of the students with their branches merged, beside the size of the file that was trained."""
    folders = {"teacher": options.teacher}
    folders |= {name: options.run_dir(name, options.seeds[0]) for name in (*STUDENTS, "reparameterized")}
    models = {name: load_model(folder) for name, folder in folders.items()}
    files = {name: folder / WEIGHTS for name, folder in folders.items()}
    for name in STUDENTS:
        student = models[name]
        assert isinstance(student, MobileCLIP)
        models[f"{name}, merged"], files[f"{name}, merged"] = reparameterize(student), files[name]
    costs = measure_costs(models, files)
    return {name: costs[name] for name in folders}, {name: costs[f"{name}, merged"] for name in STUDENTS}


def summarise(
    teacher: Figures, by_seed: Mapping[int, Mapping[str, Figures]]
) -> tuple[dict[str, Figures], dict[str, Figures]]:
    """Return the means over the seeds, and the standard deviations if there is more than one seed."""
    means, spreads = {"teacher": teacher}, {}
    runs = list(by_seed.values())
    for name, figures in runs[0].items():
        values = {key: [run[name][key] for run in runs] for key in figures}
        means[name] = {key: mean(value) for key, value in values.items()}
        if len(runs) > 1:
            spreads[name] = {key: stdev(value) for key, value in values.items()}
    return means, spreads


# --- reporting -------------------------------------------------------------------------------------------------------


def columns() -> list[Column]:
    """Return the table's columns."""
    return figure_columns(["twins", "random"], references={"twins": TWINS_CEILING})


def explain(options: Options, models: Mapping[str, Figures], seconds: float) -> list[str]:
    """Explain the tests and the results to someone who sees them for the first time."""

    def both(name: str, test: str) -> str:
        return " / ".join(format_figure(models[name][f"{test}_{way}_r1"], "%") for way in ("i2t", "t2i"))

    gains = " / ".join(
        f"{models['distilled'][key] - models['undistilled'][key]:+.1f}" for key in ("twins_i2t_r1", "twins_t2i_r1")
    )
    num_twins, num_random = (len(found.images) for found in test_sets(student_config(options)).values())
    fused, plain = models["reparameterized"], models["distilled"]
    return [
        "Figures in % say how often the right answer ranks first among all. The first of two is from picture to "
        "caption, the second from caption to picture.",
        f"The twin test has {num_twins} pictures in families of four whose captions share their first 77 tokens. A "
        "model that reads 77 tokens sees one caption four times, so by construction it cannot pass 25% there. The "
        f"student cut at 77 tokens reaches {both('cut77', 'twins')}. To pass 25%, a model must read to the end.",
        f"With the teacher, the student reaches {both('distilled', 'twins')} on the twin test. Without it, after the "
        f"same number of steps, it reaches {both('undistilled', 'twins')}: a difference of {gains} points.",
        f"The random test has {num_random} unrelated pictures, which the beginning of a caption usually tells apart. "
        f"The student cut at 77 tokens reaches {both('cut77', 'random')} there, the one that reads everything "
        f"{both('distilled', 'random')}.",
        "A trained student is used with its parallel branches merged (reparameterized), which does not change its "
        f"answers: the merged distilled student reaches {both('reparameterized', 'twins')} on the twin test, with "
        f"{format_figure(fused['params'], 'count')} parameters instead of {format_figure(plain['params'], 'count')} "
        f"and {format_figure(fused['image_ms'], 'ms')} ms per picture instead of "
        f"{format_figure(plain['image_ms'], 'ms')}. The table shows the parameters and milliseconds of the merged "
        "students, results.json those of both forms.",
        f"The run took {seconds:.0f} seconds with {options.processes} training processes.",
    ]


def print_table(
    models: Mapping[str, Figures], spreads: Mapping[str, Figures], conditions: list[str], notes: list[str]
) -> None:
    """Print the table, under it how its figures were measured, and the notes, on stdout."""
    output = plain_console()
    padding = 1 if output.width >= 92 else 0  # to fit a terminal of 80 columns
    caption = Text("\n".join(["The best of each column is bold.", *conditions]))
    table = Table(
        box=box.SIMPLE_HEAD, padding=(0, padding, 0, 0), pad_edge=False, caption=caption, caption_justify="left"
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
            spread = spreads.get(name, {}).get(column.key)
            below = "" if spread is None else f"\n±{format_figure(spread, column.unit)}"
            cells.append(Text.assemble((text, "bold" if name in best_models(column, models) else ""), below))
        table.add_row(name, *cells)
    output.print(table)
    for note in notes:
        output.print(note)


def write_results(
    options: Options,
    models: Mapping[str, Figures],
    spreads: Mapping[str, Figures],
    by_seed: Mapping[int, Mapping[str, Figures]],
    seconds: float,
) -> None:
    """Write results.json. With several seeds `models` are means; each seed's figures and the spreads stand beside
    them.

    The costs are those of the saved files: `distilled`, `undistilled` and `cut77` in the form that was trained,
    `reparameterized` the distilled student as it is used.
    """

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


def report(
    options: Options,
    models: Mapping[str, Figures],
    spreads: Mapping[str, Figures],
    conditions: list[str],
    notes: list[str],
) -> None:
    """Write report.html."""
    sets, colours = test_sets(student_config(options)), model_colours(models)
    runs = {name: options.run_dir(name, options.seeds[0]) for name in STUDENTS}
    read = {name: load_model(folder) for name, folder in {"teacher": options.teacher, **runs}.items()}
    distilled, cuts = read["distilled"], chart_of_cuts(read, "twins", sets["twins"], colours)
    provenance = run_provenance(runs["distilled"]) | {"command": shlex.join(["python", *sys.argv])}
    write_report(
        options.out / "report.html",
        Report(
            title="Quickstart: a small model that reads long captions",
            paragraphs=[
                "A teacher that reads captions of 248 tokens (Long-CLIP, tiny here) was distilled into a small student "
                "(MobileCLIP, tiny here), so that it reads 248 tokens too. The pictures are boards of real handwritten "
                "digits, each with a caption of about 100 tokens that says what is where.",
                *notes,
            ],
            columns=columns(),
            models=models,
            spreads=spreads,
            conditions=conditions,
            sections={"What is read of a caption": [cuts], "Training": training_curves(runs, colours)},
            examples={
                f"The distilled student on the {name} test": retrieval_examples(encode_retrieval_set(distilled, found))
                for name, found in sets.items()
            },
            provenance=provenance,
        ),
    )


if __name__ == "__main__":
    run_command(main)
