"""Shared parts of the benches: rows, interleaved medians, memory, the machine."""

from __future__ import annotations

import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from eval.base.peak_memory import peak_memory_gb
from eval.base.processes import leave_out_cudnn_attention

__all__ = ["BenchOptions", "Row", "in_own_process", "machine", "medians", "peak_memory_gb", "synchronize"]

Result = TypeVar("Result")


@dataclass
class Row:
    """One case: ours against the baseline, medians of interleaved rounds."""

    case: str
    unit: str
    ours: float
    baseline: float
    ratio: float
    """Above 1 if ours is better."""
    max_abs_diff: float | None
    """Largest difference between the two results, if both compute the same."""
    peak_gb: float | None
    """Peak resident memory of the case's process in GB of 1e9 bytes, including libraries and inputs. None if the
    process measures several cases in turns."""


@dataclass
class BenchOptions:
    """The options of a bench."""

    full: bool
    """Use the sizes of the largest benchmark instead of the small ones."""
    rounds: int
    """Rounds per case, at least 1; the figures are their medians."""
    device: torch.device
    """Device of the models; data and tokenizer benches use the CPU."""
    precision: str
    """fp32, bf16 or fp16: autocast on both sides."""
    preset: str = "digit_scenes"
    """For `run` only: the preset that both sides train."""
    shards: str | None = None
    """For `run` only: shard pattern. None is the embedded data."""
    teacher: str | None = None
    """For `run` only: weights of the teacher. None is the embedded teacher."""
    processes: int = 2
    """For `run` only: processes under torchrun."""
    checkout: Path | None = None
    """For `mobileclip` only: folder of MobileCLIP's training code."""


def medians(
    functions: list[Callable[[], Any]],
    rounds: int,
    device: torch.device | None = None,
    names: Sequence[str] | None = None,
) -> list[float]:
    """Return the median seconds of each function. They take turns, so a slow minute of the machine affects all of
    them. With `names`, stderr tells each call as it is done."""
    seconds: list[list[float]] = [[] for _ in functions]
    for round_number in range(rounds):
        for number, (function, taken) in enumerate(zip(functions, seconds, strict=True)):
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            taken.append(time.perf_counter() - start)
            if names is not None:
                told = f"round {round_number + 1} of {rounds}: {names[number]}: {taken[-1]:.2f} s"
                print(told, file=sys.stderr, flush=True)
    return [statistics.median(taken) for taken in seconds]


def synchronize(device: torch.device | None) -> None:
    """Wait for a GPU's work. Do nothing on the CPU."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def in_own_process(function: Callable[..., Result], *args: Any) -> Result:
    """Return function(*args) from a fresh process, because the peak memory of a process never falls."""
    # on both sides: else each would be timed while it plans for new shapes; a spawned process has torch's default
    with multiprocessing.get_context("spawn").Pool(1, leave_out_cudnn_attention) as pool:
        return pool.apply(function, args)


def machine() -> dict[str, Any]:
    """Describe the machine that produced the figures."""
    return {
        "cpu": cpu_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def cpu_name() -> str:
    """Return the processor's name if the system reports it, else its architecture."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
