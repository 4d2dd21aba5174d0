"""Measure the most memory that this process has held."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch

__all__ = ["peak_memory_gb"]


def peak_memory_gb(device: torch.device | None = None) -> float:
    """Return the most memory that this process has held so far, in 1e9 bytes: of tensors on a GPU, else resident.

    NaN on Windows, which does not report it.
    """
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":
        return math.nan
    status = Path("/proc/self/status")  # on Linux getrusage's figure is inherited from the parent
    for line in status.read_text().splitlines() if status.is_file() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e9
    import resource  # does not exist on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9  # bytes on macOS, kilobytes on Linux
