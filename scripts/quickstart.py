"""The main job on embedded data: a tiny teacher distilled into a tiny student, with two controls and one table."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated

import joblib
import tyro
from rich.text import Text

from eval.base.arguments import answer_early, read_options
from longclip_teacher.errors import InputError, run_command
from longclip_teacher.packages import ONNX, missing_packages
from training.settings.options import EMBEDDED_DATA, EMBEDDED_TEACHER
from training.settings.tree import TrainConfig, parse_config


def _processes() -> int:
    """Return the number of cores, at most four, but not three, which does not divide the batch."""
    cores = joblib.cpu_count(only_physical_cores=True)
    return 4 if cores >= 4 else 2 if cores >= 2 else 1


@dataclass
class Options:
    """Distil Long-CLIP into a student that reads 248 tokens, from scratch, in nine minutes on two CPU cores.

    The script writes pictures of handwritten digits with long captions, trains a tiny teacher, stores its features and
    distils them into a tiny student. It trains the same student without the teacher (undistilled) and with captions cut
    at 77 tokens (cut77), and compares them all. It prints one table and leaves OUT/results.json and OUT/report.html.
    Existing results are reused: a stopped quickstart continues where it was, and a second one does not train the
    teacher again.
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

    @property
    def cache(self) -> Path:
        """The folder of the teacher's features of the training data."""
        return self.out / "teacher_cache"

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
from eval.benchmarks.protocols import RetrievalSet
from eval.measures.costs import Cost, cost_conditions, measure_costs
from eval.measures.figures import figure_conditions, model_figures
from eval.measures.retrieval_examples import retrieval_examples
from eval.measures.retrieval_set import encode_retrieval_set
from eval.pages.behaviour_page import chart_of_cuts
from eval.pages.report import Report, model_colours, write_report
from eval.towers.exported_model import ExportedModel, exported_in_memory
from eval.towers.models import ClipModel, load_model
from longclip_teacher import LongCLIP
from longclip_teacher.folder_lock import folder_lock
from mobileclip_student import MobileCLIP, reparameterize, save_student
from quickstart_results import Comparison, Figures, columns, explain, print_table, write_results
from training.data.digit_scenes import is_outdated, write_digit_scenes
from training.record.curves import run_provenance, training_curves
from training.record.evaluate import evaluate_tests, test_sets

STUDENTS = {  # what distinguishes each student; data, steps, seed and optimiser are the same
    "distilled": [],
    "undistilled": ["--teacher.checkpoint", "None", "--teacher.cache", "None"],  # drops the losses that need a teacher
    "cut77": ["--student.context_length", "77"],
}
EXPORTED = {"teacher_onnx": "teacher", "distilled_onnx": "distilled"}
WEIGHTS = "best.safetensors"
TESTED_TOGETHER = ["--data.tests", "--data.zeroshot", "None"]  # the tests come at the end, for all models
TRAINING_SCRIPT = Path(__file__).resolve().parent.parent / "training" / "main.py"
CACHE_SCRIPT = Path(__file__).resolve().parent / "cache_teacher.py"
STORED_CROPS = 2  # of each picture: 200 steps of 128 are 1.6 passes over 16,000

console = plain_console(stderr=True, soft_wrap=True)


def main() -> None:
    """Run the command."""
    options = read_options(Options)
    with folder_lock(options.out):  # the runs it starts lock their own folders
        run(options)


def run(options: Options) -> None:
    """Make what is missing, compare, report."""
    torch.set_num_threads(1)  # for these small tensors a second thread gains nothing and stalls on a busy machine
    started = time.monotonic()
    with_exports = can_export()
    make_data(options.data)
    make_teacher(options)
    make_cache(options)
    for seed in options.seeds:
        for student in STUDENTS:
            make_student(options, student, seed)
    say("comparing", "all models on both tests")
    compared = compare(options, with_exports)
    seconds = time.monotonic() - started
    sets = test_sets(student_config(options))
    notes = explain(compared.models, {name: len(found.images) for name, found in sets.items()})
    notes.append(explain_vocabulary(options))
    notes.append(f"The run took {seconds:.0f} seconds with {options.processes} training processes.")
    write_results(options.out / "results.json", compared, seconds)
    write_page(options, compared, sets, notes)
    print_table(compared, notes)
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
    run_training("tiny_teacher", options.teacher, options, options.teacher_steps, TESTED_TOGETHER)


def make_cache(options: Options) -> None:
    """Store the teacher's features of the training data, once for all students. What is stored is kept."""
    say("teacher", f"storing its features of all pictures and captions in {options.cache}")
    arguments = ["--shards", f"{options.data}/train/*.tar", "--teacher", str(options.teacher)]
    arguments += ["--out", str(options.cache), "--views", str(STORED_CROPS), "--num-workers", "1", "--device", "cpu"]
    run_script(options, CACHE_SCRIPT, arguments, options.cache)


def make_student(options: Options, student: str, seed: int) -> None:
    """Train one student. A finished run is reused, a stopped one continues."""
    out_dir = options.run_dir(student, seed)
    say(student, f"training in {out_dir}")
    # validation on the way costs seconds and gives a curve
    steps = options.steps or student_config(options).run.max_steps or 1
    arguments = ["--teacher.checkpoint", str(options.teacher), "--teacher.cache", str(options.cache)]
    arguments += ["--run.seed", str(seed), *STUDENTS[student]]
    arguments += [*TESTED_TOGETHER, "--run.eval_every", str(max(1, steps // 2))]
    run_training("digit_scenes", out_dir, options, options.steps, arguments)


def run_training(preset: str, out_dir: Path, options: Options, steps: int | None, arguments: list[str]) -> None:
    """Train a model. A stopped run continues."""
    arguments = [preset, "--run.out_dir", str(out_dir), *options.training_arguments(), *arguments]
    if steps is not None:
        arguments += ["--run.max_steps", str(steps)]
    run_script(options, TRAINING_SCRIPT, arguments, out_dir)


def run_script(options: Options, script: Path, arguments: list[str], out: Path) -> None:
    """Run a script that fills `out` in its own processes, and pass on its progress. Raise InputError if it fails."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(options.processes)]
    code = launch([sys.executable, *launcher, str(script), *arguments])
    if code != 0:
        raise InputError(
            f"{script.name} failed with exit code {code} in {out}: see its own 'error:' line above; once that is "
            "fixed, the same command continues where it was"
        )


def launch(command: list[str]) -> int:
    """Run a command to its end and return its exit code. Its output goes to stderr; stdout is for the table."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # one process per core is faster than threads
    return run_passing_signals(command, env=environment, stdout=sys.stderr.fileno())


def say(step: str, message: str) -> None:
    """Print a line of progress on stderr."""
    console.print(Text.assemble((step, "bold"), f": {message}"))


# --- comparing -------------------------------------------------------------------------------------------------------


def can_export() -> bool:
    """Whether the packages are installed that the exported models need; say so if they are not."""
    if missing := missing_packages(ONNX):
        needs = f"it needs {', '.join(missing)}: pip install 'compact-longclip[export]'"
        say("exported models", f"left out of the table: {needs}")
    return not missing


@cache
def exported(folder: Path) -> ExportedModel:
    """Return the model of a run as it is after the export to ONNX."""
    model = load_model(folder)
    assert isinstance(model, LongCLIP | MobileCLIP)
    return exported_in_memory(model)


def compare(options: Options, with_exports: bool) -> Comparison:
    """Measure every model: percentages for each seed, costs for the first."""
    by_seed = {seed: evaluate_students(options, seed, with_exports) for seed in options.seeds}
    teachers: dict[str, ClipModel] = {"teacher": load_model(options.teacher)}
    if with_exports:
        teachers["teacher_onnx"] = exported(options.teacher)
    results = {name: evaluate_tests(teacher, student_config(options)) for name, teacher in teachers.items()}
    means, spreads = summarise({name: model_figures(result) for name, result in results.items()}, by_seed)
    costs, fused_costs = costs_of_models(options, with_exports)
    conditions = [
        figure_conditions(results["teacher"]),
        f"ms: {cost_conditions('cpu')}; students with branches merged (reparameterized), as they are used",
    ]
    if with_exports:
        conditions.append("_onnx: exported, in ONNX Runtime, both files together; the others in PyTorch")
    shown = ["teacher", *STUDENTS, *(name for name in EXPORTED if name in means)]
    return Comparison(
        models={name: means[name] | costs[name] for name in means},
        shown={name: means[name] | fused_costs.get(name, costs[name]) for name in shown},
        spreads=spreads,
        by_seed=by_seed,
        conditions=conditions,
    )


def evaluate_students(options: Options, seed: int, with_exports: bool) -> dict[str, Figures]:
    """Return the percentages of one seed's students. Save the reparameterized student beside the others."""
    distilled = load_model(options.run_dir("distilled", seed))
    assert isinstance(distilled, MobileCLIP)
    save_student(reparameterize(distilled), options.run_dir("reparameterized", seed) / WEIGHTS)
    models = {name: load_model(options.run_dir(name, seed)) for name in (*STUDENTS, "reparameterized")}
    if with_exports:
        models["distilled_onnx"] = exported(options.run_dir("distilled", seed))
    return {name: model_figures(evaluate_tests(model, student_config(options))) for name, model in models.items()}


def costs_of_models(options: Options, with_exports: bool) -> tuple[dict[str, Cost], dict[str, Cost]]:
    """Return parameters, bytes and milliseconds, which do not depend on the seed: of every model as it was saved or
    exported, and of the students with their branches merged, beside the size of the file that was trained."""
    folders = {"teacher": options.teacher}
    folders |= {name: options.run_dir(name, options.seeds[0]) for name in (*STUDENTS, "reparameterized")}
    models = {name: load_model(folder) for name, folder in folders.items()}
    files = {name: folder / WEIGHTS for name, folder in folders.items()}
    for name in STUDENTS:
        student = models[name]
        assert isinstance(student, MobileCLIP)
        models[f"{name}, merged"], files[f"{name}, merged"] = reparameterize(student), files[name]
    exports = {name: exported(folders[source]) for name, source in EXPORTED.items()} if with_exports else {}
    costs = measure_costs({**models, **exports}, files)
    for name, model in exports.items():
        costs[name]["bytes"] = model.num_bytes
    fused = {name: costs.pop(f"{name}, merged") for name in STUDENTS}
    return costs, fused


def explain_vocabulary(options: Options) -> str:
    """Say how large the models are without the table of the vocabulary, which is most of such small models."""
    millions = []
    for folder in (options.run_dir("reparameterized", options.seeds[0]), options.teacher):
        model = load_model(folder)
        assert isinstance(model, LongCLIP | MobileCLIP)
        text = model.text_encoder if isinstance(model, MobileCLIP) else model.text
        vocabulary = text.token_embedding.weight.numel()
        millions.append((sum(weight.numel() for weight in model.parameters()) - vocabulary) / 1e6)
    student, teacher = millions
    return (
        f"Without the table of its vocabulary, the merged student has {student:.2f} M parameters: "
        f"{student / teacher:.0%} of the teacher's {teacher:.2f} M."
    )


def summarise(
    teachers: Mapping[str, Figures], by_seed: Mapping[int, Mapping[str, Figures]]
) -> tuple[dict[str, Figures], dict[str, Figures]]:
    """Return the means over the seeds, and the standard deviations if there is more than one seed."""
    means, spreads = dict(teachers), {}
    runs = list(by_seed.values())
    for name, figures in runs[0].items():
        values = {key: [run[name][key] for run in runs] for key in figures}
        means[name] = {key: mean(value) for key, value in values.items()}
        if len(runs) > 1:
            spreads[name] = {key: stdev(value) for key, value in values.items()}
    return means, spreads


def write_page(options: Options, compared: Comparison, sets: Mapping[str, RetrievalSet], notes: list[str]) -> None:
    """Write report.html."""
    colours = model_colours(compared.shown)
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
            models=compared.shown,
            spreads=compared.spreads,
            conditions=compared.conditions,
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
