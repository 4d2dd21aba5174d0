"""Train every variant of a grid with every seed, and tabulate the results."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from eval.base.arguments import answer_early, read_options
from longclip_teacher.errors import InputError, run_command


@dataclass
class Options:
    """Run an ablation: what each setting changes, over several seeds, on the same data, steps and tests.

    python scripts/ablate.py scripts/grids/digits_smoke.toml --dry-run          # print the commands, run nothing
    python scripts/ablate.py scripts/grids/stamps.toml --processes 2
    python scripts/ablate.py scripts/grids/stamps.toml --at-once 8 --set run.device=cuda
    python scripts/ablate.py scripts/grids/stamps.toml --set data.shards='data/other/*.tar' --only none crd
    sbatch --array=1-8 --wrap 'python scripts/ablate.py GRID.toml'              # each task takes its share
    python scripts/ablate.py scripts/grids/stamps.toml --report                 # the table of the finished runs

    Each variant and seed is a run of training/main.py in OUT/VARIANT/seed_N. A finished run is not repeated and keeps
    only its weights. A stopped run resumes from its last checkpoint. A failed run leaves failed.json while the others
    continue (the exit code is then 1). The results are OUT/table.md, table.csv, table.png and results.json, with the
    commands in OUT/commands.txt. The top of scripts/ablation_grid.py describes the format of a grid.
    """

    grid: tyro.conf.Positional[Path]
    """TOML file of the grid."""
    out: Path | None = None
    """Folder for the runs and the table. Default: runs/ and the grid's name."""
    processes: int = 1
    """Training processes per run, under torchrun. 1 uses plain python."""
    at_once: int = 1
    """Runs that train side by side. They share the device: a GPU has room for several small ones, and each needs one to
    two CPU cores for its data."""
    set: tuple[str, ...] = ()
    """section.field=VALUE for every variant without a value of its own, or NAME=VALUE for one of the grid's values.
    Put several values in one word: "data.tests='a=folder:x b=folder:y'"."""
    only: tuple[str, ...] = ()
    """Run only these variants and the stages they need. The table includes the baseline too."""
    part: str | None = None
    """K/N: run the K-th of N shares of the runs, K from 1. In a SLURM job array the task's own share is the default."""
    dry_run: bool = False
    """Print the commands and run nothing."""
    report: bool = False
    """Run nothing and write the table of the finished runs."""

    def check(self) -> None:
        """Raise InputError for options that cannot work together."""
        if self.processes < 1:
            raise InputError(f"--processes {self.processes}: give 1 or more")
        if self.at_once < 1:
            raise InputError(f"--at-once {self.at_once}: give 1 or more")
        if self.dry_run and self.report:
            raise InputError("--dry-run prints commands and --report writes the table: give one of them")

    @property
    def folder(self) -> Path:
        """The folder of the runs."""
        return self.out or Path("runs") / self.grid.stem


if __name__ == "__main__":
    answer_early(Options)  # --help and refused options end here: the imports below take seconds

from ablation_grid import Grid, Job, check_jobs, make_jobs, read_grid
from ablation_runs import RECORD, comparison_conditions, config_differences, gather
from ablation_table import write_table
from eval.base.consoles import plain_console
from eval.base.launch import passing_signals, run_passing_signals
from longclip_teacher.atomic_files import json_text, write_json, write_text, written_into
from longclip_teacher.folder_lock import folder_lock
from training.generations import write_text_generation
from training.record.run_log import read_metrics

LOG, FAILURE = "log.txt", "failed.json"  # in a run's folder
_TAIL = 15  # lines of a failed run's log that failed.json keeps

console = plain_console(stderr=True, soft_wrap=True)


def main() -> None:
    """Run the command."""
    options = read_options(Options)
    grid = read_grid(options.grid, options.set)
    jobs = make_jobs(grid, options.folder)
    chosen, share = grid.chosen(options.only), share_of(options.part, os.environ)
    mine = [job for job in share_jobs(grid, jobs, *share) if job.variant.name in chosen]
    if not options.report:
        check_jobs(mine, options.processes)
    if options.dry_run:
        for job in mine:
            print(shlex.join(job.command(options.processes)))
        return
    failed: list[Job] = []
    if not options.report:
        commands = "".join(shlex.join(job.command(options.processes)) + "\n" for job in jobs)
        write_text(options.folder / "commands.txt", commands)
        failed = run_jobs(mine, options.processes, options.at_once)
    if options.report or share == (1, 1):
        report(options.folder, grid, [job for job in jobs if job.variant.name in chosen | {grid.baseline}])
    else:
        say(f"part {share[0]} of {share[1]} is done; once all parts are, --report writes the table")
    for job in failed:
        say(f"failed: {job.folder / FAILURE}, its full log is {LOG} beside it")
    if failed:
        raise SystemExit(1)


def report(out: Path, grid: Grid, jobs: Sequence[Job]) -> None:
    """Print the table and write its files."""
    rows = gather(grid, jobs)
    if not rows:
        say(f"no run in {out} has finished: there is no table yet")
        return
    plain_console(soft_wrap=True).print(write_table(out, grid, rows))
    say(f"Table: {out / 'table.md'}, table.csv, table.png, results.json")


def say(message: str) -> None:
    """Print a line on stderr."""
    console.print(message)


# --- shares of a job array -------------------------------------------------------------------------------------------


def share_of(part: str | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """Return (K, N): from --part K/N, else from this process's task in a SLURM job array, else (1, 1) for all runs."""
    if part is not None:
        match = re.fullmatch(r"(\d+)/(\d+)", part)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise InputError(f"--part {part}: write K/N with K from 1 to N, such as 2/8")
        return int(match[1]), int(match[2])
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return 1, 1
    task, first, count = (
        int(environment.get(f"SLURM_ARRAY_TASK_{name}", default))
        for name, default in (("ID", "0"), ("MIN", "0"), ("COUNT", "1"))
    )
    if not first <= task < first + count:
        raise InputError(
            f"SLURM task {task} of {count} from {first}: number the array without gaps, or give --part K/N"
        )
    return task - first + 1, count


def share_jobs(grid: Grid, jobs: Sequence[Job], k: int, n: int) -> list[Job]:
    """Return the k-th of n shares. A variant and its stages of one seed fall into one share, in their order."""
    families = grid.families()
    units = [(seed, number) for seed in grid.seeds for number in range(len(families))]
    mine = set(units[k - 1 :: n])
    number_of = {name: number for number, family in enumerate(families) for name in family}
    return [job for job in jobs if (job.seed, number_of[job.variant.name]) in mine]


# --- running ---------------------------------------------------------------------------------------------------------


@dataclass
class Clock:
    """Progress of this call, counted in steps (in runs if some have no known steps), and the time left."""

    jobs: Sequence[Job]
    started: float = field(default_factory=time.monotonic)
    done: float = 0.0

    def __post_init__(self) -> None:
        self._in_steps = all(job.config.run.max_steps is not None for job in self.jobs)
        self.total = sum(self._work(job) * (1 - self._share(job)) for job in self.jobs)
        self._before = {job.folder: self._share(job) for job in self.jobs}

    def eta(self, *running: Job) -> str:
        """Return the time left in readable form, or a dash while it is unknown."""
        done = self.done + sum(map(self._work_done, running))
        if done <= 0:
            return "–"
        left = (time.monotonic() - self.started) / done * (self.total - done)
        return f"{left / 3600:.1f} h" if left > 5400 else f"{left / 60:.0f} min" if left > 90 else f"{left:.0f} s"

    def finish(self, job: Job) -> None:
        """Count a run as done, however it ended."""
        self.done += self._work(job) * (1 - self._before[job.folder])

    def _work_done(self, job: Job) -> float:
        return self._work(job) * max(0.0, self._share(job) - self._before[job.folder])

    def _work(self, job: Job) -> float:
        return float(job.config.run.max_steps or 1) if self._in_steps else 1.0

    def _share(self, job: Job) -> float:
        """Return the share of its steps that its log reports."""
        rows = read_metrics(job.folder)
        return min(1.0, rows[-1]["step"] / job.config.run.max_steps) if rows and job.config.run.max_steps else 0.0


def run_jobs(jobs: Sequence[Job], processes: int, at_once: int) -> list[Job]:
    """Run what is not finished. Return the runs that failed, including those whose stages failed.

    Raise InputError, before any work, if a finished run has other settings than the grid.
    """
    finished = [job for job in jobs if is_finished(job)]
    waiting = [job for job in jobs if job not in finished]
    say(f"{len(jobs)} runs: {len(finished)} finished, {len(waiting)} to do")
    clock, running, failed = Clock(waiting), list[Job](), list[Job]()
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA {task.fields[eta]}"),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        bar = progress.add_task("runs", total=len(jobs), completed=len(finished), eta="–")

        def run(job: Job) -> Ended:
            running.append(job)
            progress.update(bar, description=", ".join(map(_name, running)))
            began = time.monotonic()
            problem = run_job(job, processes, lambda: progress.update(bar, eta=clock.eta(*running)))
            running.remove(job)
            return Ended(job, problem, time.monotonic() - began)

        for ended in map(run, waiting) if at_once == 1 else side_by_side(waiting, run, at_once):
            clock.finish(ended.job)
            eta = clock.eta(*running)
            progress.update(bar, advance=1, eta=eta)
            how = f"failed: {ended.problem}" if ended.problem else f"done in {ended.seconds:.0f} s"
            say(f"{_name(ended.job)} {how}, ETA {eta}")
            if ended.problem:
                failed.append(ended.job)
    return failed


@dataclass(frozen=True)
class Ended:
    """A run that has ended: what went wrong, or None, and how long it took."""

    job: Job
    problem: str | None
    seconds: float


def _name(job: Job) -> str:
    return f"{job.variant.name} seed {job.seed}"


def side_by_side(jobs: Iterable[Job], run: Callable[[Job], Ended], at_once: int) -> Iterator[Ended]:
    """Run as many jobs at once, in their order, but each after its stages."""
    waiting, running = list(jobs), dict[Future[Ended], Job]()
    # the programs end before the pool waits for its threads
    with ThreadPoolExecutor(at_once) as pool, passing_signals():
        while waiting or running:
            for job in list(waiting):
                ahead = {other.folder for other in (*waiting, *running.values())}
                if len(running) < at_once and ahead.isdisjoint(job.stages):
                    waiting.remove(job)
                    running[pool.submit(run, job)] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                del running[future]
                yield future.result()


def is_finished(job: Job) -> bool:
    """Return whether the run has its results, and record its conditions if so.

    Raise InputError if its settings differ from the grid's.
    """
    if not (job.folder / "results.json").exists():
        return False
    if changed := config_differences(job):
        key, there, here = changed[0]
        raise InputError(
            f"{job.folder} is a finished run with {key} = {there}, but {here} in the grid: change --out or remove it"
        )
    if not (job.folder / RECORD).exists():
        write_text_generation(job.folder / RECORD, json_text({"facts": comparison_conditions(job.config)}))
    return True


def run_job(job: Job, processes: int, tick: Callable[[], None]) -> str | None:
    """Train one run to its end. Return None, or what went wrong in one line; failed.json has the details.

    A run that another ablation trains is waited for.
    """
    with folder_lock(job.folder, beside=True, wait=True):  # its own lock is for the training
        return None if is_finished(job) else _run_job(job, processes, tick)


def _run_job(job: Job, processes: int, tick: Callable[[], None]) -> str | None:
    (job.folder / FAILURE).unlink(missing_ok=True)
    if missing := [folder for folder in job.stages if not (folder / RECORD).exists()]:
        return fail(job, processes, f"its stage {missing[0]} is not finished")
    with written_into(job.folder):
        job.folder.mkdir(parents=True, exist_ok=True)
        code = launch(job.command(processes), job.folder / LOG, tick)
    if code != 0:
        return fail(job, processes, f"exit code {code}")
    try:
        if not is_finished(job):
            return fail(job, processes, "it ended without results.json")
    except InputError as error:
        return fail(job, processes, str(error))
    shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)  # hundreds of them would fill a disk
    return None


def fail(job: Job, processes: int, problem: str) -> str:
    """Record the problem and the end of the log in the run's folder. Return the problem with the last error."""
    log = job.folder / LOG
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:] if log.exists() else []
    content: dict[str, Any] = {"problem": problem, "command": shlex.join(job.command(processes)), "log": lines}
    write_json(job.folder / FAILURE, content)
    told = [line for line in lines if line.startswith("error: ")] or lines
    return f"{problem} ({told[-1].strip()})" if told else problem


def launch(command: list[str], log_file: Path, tick: Callable[[], None]) -> int:
    """Run a command to its end and return its exit code. Append its output to `log_file` and call `tick` meanwhile."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ}  # one process per core is faster than threads
    with log_file.open("ab") as log:
        return run_passing_signals(command, env=environment, tick=tick, stdout=log, stderr=subprocess.STDOUT)


if __name__ == "__main__":
    run_command(main)
