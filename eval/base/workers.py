"""Processes that another has started end with it. A DataLoader's workers leave signals to it and fail aloud."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.data import get_worker_info

__all__ = ["START_METHOD", "STOP_SIGNALS", "end_with_parent", "share_tensors", "worker_options"]

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""The signals that ask a run to end."""

START_METHOD = "fork" if sys.platform == "linux" else None
"""How workers are started; None is Python's own choice. Python 3.14 would take them from a server on Linux, where they
do not inherit what this process does with signals: one to the group of processes would end them."""
_PR_SET_PDEATHSIG = 1  # of Linux's prctl
_SHARED_MEMORY = Path("/dev/shm")
Result = TypeVar("Result")


def worker_options(num_workers: int) -> dict[str, Any]:
    """A DataLoader's options for its processes."""
    context = START_METHOD if num_workers else None  # torch refuses one without workers
    return {"num_workers": num_workers, "worker_init_fn": _start_worker, "multiprocessing_context": context}


def _start_worker(_: int) -> None:
    """The worker dies with its parent, and ignores the signals that the parent handles. A parent
    that finishes its step after SIGTERM still needs its workers, and the signal may be sent to the whole group."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) not in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL)


def end_with_parent(number: signal.Signals) -> None:
    """On Linux, let this process get signal `number` when its parent dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def share_tensors(result: Result) -> Result:
    """As `collate_fn`, or at its end: move the tensors of a worker's result into shared memory, and return it.

    The DataLoader would do so later, in a thread whose errors nobody sees: if /dev/shm is full, it would wait forever.
    Here the error reaches the parent.
    """
    if get_worker_info() is not None:
        for tensor in _tensors(result):
            _check_room(tensor.nbytes)
            tensor.share_memory_()
    return result


def _check_room(num_bytes: int) -> None:
    """Raise RuntimeError as torch does if /dev/shm is too full. Before 2.8 torch itself dies of a bus error."""
    if not _SHARED_MEMORY.is_dir():
        return
    room = os.statvfs(_SHARED_MEMORY)
    if room.f_bavail * room.f_frsize < num_bytes:
        raise RuntimeError(f"unable to allocate {num_bytes} bytes of shared memory(shm)")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if dataclasses.is_dataclass(value):
        parts = [getattr(value, field.name) for field in dataclasses.fields(value)]
    elif isinstance(value, Mapping):
        parts = list(value.values())
    else:
        parts = list(value) if isinstance(value, (list, tuple)) else []
    for part in parts:
        yield from _tensors(part)
