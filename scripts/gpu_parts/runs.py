"""Training on the device: half precision, a resumed run bit for bit, DDP over nccl, and a real run as a command."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from eval.base.processes import leave_group
from gpu_parts.findings import Finding, Findings, Setting
from gpu_parts.numerics import tf32
from gpu_parts.sides import build_side, sizes
from longclip_teacher import create_teacher, save_teacher
from training.data.digit_scenes import write_digit_scenes
from training.main import main as train
from training.record.run_log import read_metrics
from training.settings.options import EMBEDDED_DATA, EMBEDDED_TEACHER

__all__ = ["nccl_part", "precision_part", "resume_part", "run_part"]

ROOT = Path(__file__).parents[2]
_NO_TESTS = ["--data.val", "None", "--data.zeroshot", "None", "--data.tests"]
_STEPS = 12
_ENDING = 10.0  # seconds that the real run may take to end after its signal


def precision_part(setting: Setting) -> Findings:
    """Steps on one batch in fp32, bf16 and fp16: they learn, agree at first, and the scaler skips few of them."""
    student, teachers, batch = sizes(setting)
    steps = 8 if setting.small else _STEPS
    yield None
    first: dict[str, float] = {}
    for precision in ("fp32", "bf16", "fp16"):
        side = build_side(student, teachers[0], batch // 4, precision, setting.torch_device, stored=True)
        with tf32(precision != "fp32"):
            losses = [float(side.step()) for _ in range(steps)]
        first[precision] = losses[0]
        fall = min(losses[1:]) - losses[0]
        told = " ".join(f"{loss:.3f}" for loss in losses)
        yield Finding(f"{student}, {precision}: change of the loss in {steps} steps", fall, "absolute", 0.0, note=told)
        if precision != "fp32":
            error = abs(first[precision] - first["fp32"]) / first["fp32"]
            yield Finding(f"{student}, {precision}: first loss against fp32", error, "relative", 2e-2)
        scaler = side.state.scaler
        if scaler.is_enabled():
            halvings = 16 - torch.tensor(scaler.get_scale()).log2().item()
            yield Finding(f"{student}, {precision}: steps that the scaler left out", halvings, "steps", steps / 2)


@contextmanager
def _checkout(num_train: int) -> Iterator[Path]:
    """A folder with digit scenes and a tiny teacher of random weights, as the current folder."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_digit_scenes(root / EMBEDDED_DATA, num_train=num_train, num_val=40, num_test=40, num_val_twins=40)
        torch.manual_seed(0)
        save_teacher(create_teacher("tiny"), root / EMBEDDED_TEACHER / "best.safetensors")
        before = Path.cwd()
        os.chdir(root)
        try:
            yield root
        finally:
            os.chdir(before)


def _train(*arguments: str) -> None:
    with patch.object(sys, "argv", ["training/main.py", *arguments]):
        train()


def resume_part(setting: Setting) -> Findings:
    """A run of eight steps against one that goes on from its checkpoint of step four, with deterministic algorithms."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    with _checkout(300):
        yield None
        for precision in ("fp32",) if setting.small else ("fp32", "bf16", "fp16"):
            yield _resumed(setting, precision, deterministic=True)


def _resumed(setting: Setting, precision: str, *, deterministic: bool) -> Finding:
    common = [
        "--run.device", setting.device, "--run.precision", precision, "--run.max_steps", "8", "--run.log_every", "1",
        "--run.keep_every", "4", "--run.global_batch_size", "64", "--data.num_workers", "2", *_NO_TESTS,
    ]  # fmt: skip
    case, note = f"resumed run, {precision}: tensors that differ from a run without a stop", ""
    torch.use_deterministic_algorithms(deterministic)
    try:
        _train("--run.out_dir", f"runs/{precision}", *common)
    except RuntimeError as error:
        if not deterministic or "determinis" not in str(error):
            raise
        torch.use_deterministic_algorithms(True, warn_only=True)
        note = f"not all operations are deterministic: {str(error).splitlines()[0][:160]}"
        _train("--run.out_dir", f"runs/{precision}_again", *common)
        precision += "_again"
    checkpoint = f"runs/{precision}/checkpoints/step_4.pt"
    _train("--run.out_dir", f"runs/{precision}_resumed", *common, "--run.resume", checkpoint)
    torch.use_deterministic_algorithms(False)
    whole, resumed = (load_file(f"runs/{name}/last.safetensors") for name in (precision, f"{precision}_resumed"))
    differ = [name for name, value in whole.items() if not torch.equal(value, resumed[name])]
    return Finding(case, float(len(differ)), f"of {len(whole)}", 0, note=note)


def nccl_part(setting: Setting) -> Findings:
    """A step under DDP in a group of one process against one without a group, whole and in chunks."""
    device = setting.torch_device
    student, teachers, batch = sizes(setting)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    yield None

    def results(parallel: bool, accumulation: int) -> tuple[float, torch.Tensor]:
        side = build_side(student, teachers[0], batch // 4, "fp32", device, stored=False)
        if parallel:
            ids = [device.index or 0] if device.type == "cuda" else None
            side.module = DistributedDataParallel(side.distillation.distiller, device_ids=ids)
        loss = float(side.step(accumulation))
        return loss, torch.cat([value.detach().flatten() for value in side.distillation.distiller.parameters()]).cpu()

    with tf32(False):
        alone = {accumulation: results(False, accumulation) for accumulation in (1, 2)}
        with tempfile.TemporaryDirectory() as folder:
            dist.init_process_group(backend, init_method=f"file://{folder}/group", rank=0, world_size=1)
            for accumulation, (loss, weights) in alone.items():
                found, moved = results(True, accumulation)
                name = f"{backend.rpartition(':')[2]}, one process, {accumulation} chunk{'s' * (accumulation > 1)}"
                yield Finding(f"{name}: loss", abs(found - loss) / loss, "relative", 1e-5)
                # AdamW's first step has one size whatever the gradient's: a sign that differs is two of them
                share = float(((moved - weights).abs() > 1e-5).float().mean())
                yield Finding(f"{name}: weights that moved otherwise", share, "of 1", 1e-3)
            leave_group()


def run_part(setting: Setting) -> Findings:
    """Train as a user does, in a process of its own, until a signal ends it; then read the log that it leaves."""
    workers = max(1, min(14, (os.cpu_count() or 2) - 2))
    with _checkout(300 if setting.small else 3000) as root:
        teacher, student, batch = ("tiny", "tiny", 64) if setting.small else ("b16", "s0", 256)
        torch.manual_seed(0)
        save_teacher(create_teacher(teacher), root / "teacher.safetensors")
        shards = [] if setting.shards is None else ["--data.shards", setting.shards]
        call = [
            sys.executable, str(ROOT / "training/main.py"), *shards, "--teacher.checkpoint", "teacher.safetensors",
            "--student.variant", student, "--run.device", setting.device, "--run.precision", "bf16",
            "--run.global_batch_size", str(batch), "--run.epochs", "1000", "--run.log_every", "2",
            "--data.num_workers", str(workers), "--run.out_dir", "run", *_NO_TESTS,
        ]  # fmt: skip
        end = time.monotonic() + (yield None) - _ENDING
        first: float | None = None
        with Path("log").open("w+") as log:
            process = subprocess.Popen(call, stdout=log, stderr=subprocess.STDOUT)
            try:
                while process.poll() is None and time.monotonic() < end:
                    time.sleep(0.1)
                    if first is None and Path("run/metrics.jsonl").is_file():
                        first = time.monotonic()
                        end = min(end, first + setting.seconds)
                process.send_signal(signal.SIGTERM)
                code = process.wait(60)
            finally:
                process.kill()
            log.seek(0)
            lines = log.read().splitlines()
        print(*lines, sep="\n")
        name = f"{student} from {teacher} online, bf16, batch {batch}, {workers} loader processes"
        expected = 128 + signal.SIGTERM
        yield Finding(
            f"{name}: exit code after SIGTERM less {expected}", abs(code - expected), limit=0, note=(lines or [""])[-1]
        )
        yield from _of_log(name)


def _of_log(name: str) -> Iterator[Finding]:
    rows = read_metrics(Path("run")) if Path("run/metrics.jsonl").is_file() else []
    if len(rows) < 2:
        yield Finding(name, note="too few entries in its log to tell a rate")
        return
    for field, unit in (("samples_per_second", "samples/s"), ("data_wait_share", "of 1"), ("peak_memory_gb", "GB")):
        value = statistics.median(row[field] for row in rows[1:])
        yield Finding(f"{name}: {field}", value, unit, note=f"median of {len(rows) - 1} entries")
    fall = rows[-1]["loss"] - rows[0]["loss"]
    yield Finding(f"{name}: change of the loss", fall, "absolute", 0.0, note=f"after {rows[-1]['step']} steps")
