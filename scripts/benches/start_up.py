"""start-up: how long every command takes to print its --help and to refuse an option.

Each is measured against two baselines: a python that does nothing, which is the least that a command can take, and one
that imports torch, which is what a command takes if it runs its imports before it reads its options.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benches.measure import BenchOptions, Row

__all__ = ["COMMANDS", "bench_start_up"]

ROOT = Path(__file__).parents[2]
COMMANDS = [
    path.relative_to(ROOT).as_posix()
    for folder in ("training", "eval", "scripts")
    for path in sorted((ROOT / folder).glob("*.py"))
    if "run_command(main)" in path.read_text(encoding="utf-8")
]
"""The path of every command of the project."""
ANSWERS = {"--help": "--help", "an unknown option": "--no-such-option"}
_BASELINES = {"python alone": ("-c", "pass"), "importing torch": ("-c", "import torch")}

# a process's peak memory counts that of the process that started it: a bare python starts it, not this one with torch
_LAUNCHER = """
import json, os, subprocess, sys, time
start = time.perf_counter()
null = subprocess.DEVNULL
process = subprocess.Popen([sys.executable, *sys.argv[1:]], stdout=null, stderr=null)
usage = os.wait4(process.pid, 0)[2]
print(json.dumps([time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss]))
"""


@dataclass
class _Run:
    """One process from start to end."""

    seconds: float
    cpu_seconds: float
    """User and system time of the process, which the load of the machine changes little."""
    peak_gb: float


def bench_start_up(options: BenchOptions) -> Iterator[Row]:
    """Measure both answers of each command in seconds of wall clock and CPU. Command and baselines take turns."""
    for command in COMMANDS:
        for name, argument in ANSWERS.items():
            calls = {"ours": (command, argument), **_BASELINES}
            runs: dict[str, list[_Run]] = {call: [] for call in calls}
            for _ in range(options.rounds):
                for call, arguments in calls.items():
                    runs[call].append(_run(arguments))
            for unit, field in (("s", "seconds"), ("CPU s", "cpu_seconds")):
                median = {call: statistics.median(getattr(run, field) for run in runs[call]) for call in calls}
                for baseline in _BASELINES:
                    yield Row(
                        case=f"{command}, {name}, against {baseline}",
                        unit=unit,
                        ours=median["ours"],
                        baseline=median[baseline],
                        ratio=median[baseline] / median["ours"],
                        max_abs_diff=None,  # they compute nothing
                        peak_gb=max(run.peak_gb for run in runs["ours"]),
                    )


def _run(arguments: tuple[str, ...]) -> _Run:
    """Run python to its end and discard its output."""
    done = subprocess.run(
        [sys.executable, "-c", _LAUNCHER, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    seconds, cpu_seconds, peak = json.loads(done.stdout)
    unit = 1 if sys.platform == "darwin" else 1024  # unit of ru_maxrss in bytes
    return _Run(seconds, cpu_seconds, peak * unit / 1e9)
