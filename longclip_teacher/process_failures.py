"""Failures of the processes around a program, each in one line: workers that load data, and the other ranks."""

from __future__ import annotations

import multiprocessing
import re
import signal
import threading
import traceback

__all__ = ["explain_failure", "is_lost_rank", "kill_children"]

_TOO_SMALL = (
    "the shared memory of this machine or container (/dev/shm) is too small for the processes that load data: give the "
    "container more (docker run --shm-size 8g), or load without them (--data.num_workers 0, elsewhere --num-workers 0)"
)
_MEMORY = ": if memory ran out (dmesg says so), lower --data.num_workers; the last checkpoint is as it was"
_SHARED_MEMORY = re.compile(r"shared memory\(shm\)|Bus error|/torch_\d+_\d+")
_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? (?P<pids>[\d, ]+)\) (?P<how>[^.]*)")
_LOST_RANK = re.compile(r"Connection (closed|reset) by peer|Broken pipe|[Tt]imed out|NCCL")


def explain_failure(error: BaseException) -> str | None:
    """Return what a failure of another process means and what to do, in one line; None for any other error.

    If a worker dies or a rank is lost, torch raises a RuntimeError of many lines. multiprocessing raises a bare OSError
    if /dev/shm has no room for its semaphores, and an error of the connection if a worker dies while it sends.
    """
    text = str(error)
    if isinstance(error, (OSError, EOFError)):
        frames = traceback.extract_tb(error.__traceback__)
        raised_in = frames[-1].filename if frames else ""
        if raised_in.endswith("multiprocessing/synchronize.py"):
            return _TOO_SMALL
        return f"a process that loads data has ended{_MEMORY}" if "/multiprocessing/" in raised_in else None
    if not isinstance(error, RuntimeError):
        return None
    if _SHARED_MEMORY.search(text):
        return _TOO_SMALL
    if worker := _WORKER.search(text):
        return f"a process that loads data (pid {worker['pids']}) {worker['how'].strip()}{_MEMORY}"
    if is_lost_rank(error):
        return (
            "another process of this run has ended or cannot be reached: its own error line says why, or dmesg if it "
            "was killed; the last checkpoint is as it was"
        )
    return None


def is_lost_rank(error: BaseException | None) -> bool:
    """Return whether a collective failed because another process is gone."""
    raised = isinstance(error, RuntimeError) and ("gloo" in str(error) or type(error).__name__.startswith("Dist"))
    return raised and _LOST_RANK.search(str(error)) is not None


def kill_children() -> None:
    """Kill the worker processes that are left: a program that ends on an error does not wait for them.

    A worker that hangs ignores the request to end, and Python would wait for it forever.
    """
    children = multiprocessing.active_children()
    if children and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch raises an error for a worker that is killed
    for child in children:
        child.kill()
