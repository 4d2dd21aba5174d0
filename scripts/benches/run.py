"""run: a complete training run from the teacher cache against the same preset with every saving off."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benches.measure import BenchOptions, Row
from longclip_teacher.errors import InputError
from training.record.run_log import read_metrics
from training.settings.options import EMBEDDED_DATA, EMBEDDED_TEACHER
from training.settings.tree import parse_config

__all__ = ["bench_run"]

_ROOT = Path(__file__).parents[2]
_STEPS, _FULL_STEPS, _LOG_EVERY = 30, 100, 10
_NO_TESTS = ["--data.val", "None", "--data.zeroshot", "None", "--data.tests"]
_EVERY_SAVING_OFF = ["--speed.reference", "True"]


@dataclass
class _Run:
    samples_per_second: float  # median over the log's intervals, without the first
    peak_gb: float  # peak of rank 0


def bench_run(options: BenchOptions) -> Iterator[Row]:
    """Run both sides in turn under torchrun. The cache is made first, and the second row includes its cost."""
    shards = options.shards or f"{EMBEDDED_DATA}/train/*.tar"
    teacher = options.teacher or EMBEDDED_TEACHER
    steps = _FULL_STEPS if options.full else _STEPS
    data = ["--data.shards", shards, "--teacher.checkpoint", teacher, *_NO_TESTS]
    with tempfile.TemporaryDirectory() as folder:
        cache = str(Path(folder, "cache"))
        start = time.perf_counter()
        _call(options, "scripts/cache_teacher.py", "--shards", shards, "--teacher", teacher, "--out", cache)
        cache_seconds = time.perf_counter() - start
        ours, baseline = [], []
        for number in range(options.rounds):
            ours.append(_train(Path(folder, f"on{number}"), options, steps, [*data, "--teacher.cache", cache]))
            baseline.append(_train(Path(folder, f"off{number}"), options, steps, [*data, *_EVERY_SAVING_OFF]))
    ours_rate, baseline_rate = (statistics.median(r.samples_per_second for r in runs) for runs in (ours, baseline))
    peak = max(run.peak_gb for run in ours)
    name = f"{options.preset}, {options.processes} processes"
    yield Row(name, "samples/s", ours_rate, baseline_rate, ours_rate / baseline_rate, None, peak)
    config = parse_config([options.preset])
    if config.run.max_steps is not None:
        num_samples = config.run.max_steps * config.run.global_batch_size
        whole, whole_baseline = cache_seconds + num_samples / ours_rate, num_samples / baseline_rate
        case = f"{name}: its {config.run.max_steps} steps at these rates, teacher pass ({cache_seconds:.0f} s) included"
        yield Row(case, "s", whole, whole_baseline, whole_baseline / whole, None, peak)


def _train(out_dir: Path, options: BenchOptions, steps: int, arguments: list[str]) -> _Run:
    _call(
        options, "training/main.py", options.preset, "--run.out_dir", str(out_dir), "--run.max_steps", str(steps),
        "--run.log_every", str(_LOG_EVERY), "--run.eval_every", "0", "--run.precision", options.precision,
        "--run.device", options.device.type, *arguments,
    )  # fmt: skip
    rows = read_metrics(out_dir)[1:]
    rates = [row["samples_per_second"] for row in rows]
    return _Run(statistics.median(rates), max(row["peak_memory_gb"] for row in rows))


def _call(options: BenchOptions, script: str, *arguments: str) -> None:
    """Run one of our commands under torchrun. An error is the last line of its output."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.processes}"]
    done = subprocess.run(
        [sys.executable, *torchrun, str(_ROOT / script), *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        told = [line for line in done.stderr.splitlines() if line.startswith("error:")] or done.stderr.splitlines()[-1:]
        raise InputError(f"{script} failed: {told[0] if told else 'no output'}")
