"""Throughput of a training step beside the device's measured peak, eager and compiled, and memory by batch size."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from benches.measure import medians, synchronize
from benches.step import Side
from eval.base.peak_memory import peak_memory_gb
from eval.measures.costs import count_flops
from gpu_parts.findings import Finding, Findings, Setting
from gpu_parts.numerics import tf32
from gpu_parts.sides import build_side, sizes
from training.data.samples import Batch

__all__ = ["compiled_part", "memory_part", "rate", "step_part"]

_STEPS, _ROUNDS = 5, 3
_PEAK_TIMES = 10


def matmul_peak(setting: Setting, mode: str) -> float:
    """Operations per second of a large square product of random matrices."""
    device, size = setting.torch_device, 256 if setting.small else 8192
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mode, torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    with tf32(mode == "tf32"):
        for _ in range(2):
            left @ right
        synchronize(device)
        begun = time.perf_counter()
        for _ in range(_PEAK_TIMES):
            left @ right
        synchronize(device)
    return 2 * size**3 * _PEAK_TIMES / (time.perf_counter() - begun)


def rate(side: Side, setting: Setting) -> float:
    """Samples per second, after steps that warm up. Steps are queued as in training, without waiting between them."""
    steps, rounds, warm_up = (1, 1, 1) if setting.small else (_STEPS, _ROUNDS, 2)
    for _ in range(warm_up):
        side.step()

    def several() -> None:
        for _ in range(steps):
            side.step()

    return steps * len(side.batch.keys) / medians([several], rounds, setting.torch_device)[0]


def step_part(setting: Setting) -> Findings:
    """The peak, then eager steps from stored features and with the teacher online."""
    yield None
    peaks = {mode: matmul_peak(setting, mode) for mode in ("bf16", "fp16", "tf32", "fp32")}
    for mode, peak in peaks.items():
        yield Finding(f"matrix product, {mode}", peak / 1e12, "TFLOP/s")
    student, teachers, batch = sizes(setting)
    cases = [(teacher, stored, "bf16") for teacher in teachers for stored in (True, False)]
    cases += [(teachers[0], True, "fp16"), (teachers[0], True, "fp32")]
    for teacher, stored, precision in cases:
        yield from _measured(setting, student, teacher, stored, precision, batch, peaks)


def _measured(
    setting: Setting, student: str, teacher: str, stored: bool, precision: str, batch: int, peaks: dict[str, float]
) -> Iterator[Finding]:
    device = setting.torch_device
    _forget(device)
    side = build_side(student, teacher, batch, precision, device, stored=stored)
    with tf32(True):
        flops = count_flops(side.step)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with tf32(True):
        found = rate(side, setting)
    name = f"{student} from {teacher}, {'stored' if stored else 'online'}, {precision}, batch {batch}"
    peak = peaks["tf32" if precision == "fp32" else precision]
    note = f"{flops / batch / 1e9:.1f} GFLOP a sample, peak {peak_memory_gb(device):.1f} GB"
    yield Finding(name, found, "samples/s", note=note)
    yield Finding(f"{name}: share of the measured peak", found * flops / batch / peak, "of 1")


def compiled_part(setting: Setting) -> Findings:
    """The same steps with torch.compile: seconds until the first ones are done, and the rate from then on."""
    student, teachers, batch = sizes(setting)
    device = setting.torch_device
    yield None
    with tf32(True):
        for teacher, stored in ((teachers[0], True), (teachers[0], False)):
            _forget(device)
            side = build_side(student, teacher, batch, "bf16", device, stored=stored, compiled=True)
            begun = time.perf_counter()
            losses = [float(side.step()) for _ in range(2)]
            seconds = time.perf_counter() - begun
            name = f"{student} from {teacher}, {'stored' if stored else 'online'}, bf16, batch {batch}, compiled"
            yield Finding(f"{name}: first two steps", seconds, "s")
            yield Finding(name, rate(side, setting), "samples/s")
            eager = build_side(student, teacher, batch, "bf16", device, stored=stored)
            differences = [abs(ours - float(eager.step())) for ours in losses]
            yield Finding(f"{name}: loss of the first step against eager", differences[0], "absolute", 5e-2)


def memory_part(setting: Setting) -> Findings:
    """Memory and rate by batch size from stored features, until the device is full."""
    device = setting.torch_device
    student, teachers, _ = sizes(setting)
    first = 16 if setting.small else 64
    yield None
    side = build_side(student, teachers[0], first, "bf16", device, stored=True)
    drawn = side.batch
    for times in (1, 2) if setting.small else (1, 4, 16, 32, 64):
        _forget(device)
        name = f"{student} from {teachers[0]}, stored, bf16, batch {first * times}"
        side.batch = _repeated(drawn, times)
        try:
            found = rate(side, setting)
        except torch.OutOfMemoryError:
            yield Finding(name, note="does not fit")
            return
        yield Finding(name, peak_memory_gb(device), "GB", note=f"{found:.0f} samples/s")


def _repeated(batch: Batch, times: int) -> Batch:
    """The batch several times over: drawing thousands of random pictures takes longer than the steps."""
    assert batch.teacher is not None
    return replace(
        batch,
        images=batch.images.repeat(times, 1, 1, 1),
        long_tokens=batch.long_tokens.repeat(times, 1),
        short_tokens=batch.short_tokens.repeat(times, 1),
        keys=batch.keys * times,
        draws=batch.draws * times,
        teacher={name: value.repeat(times, 1) for name, value in batch.teacher.items()},
    )


def _forget(device: torch.device) -> None:
    """Give back the memory of the case before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
