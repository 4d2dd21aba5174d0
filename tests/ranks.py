"""Processes that know of each other as under torchrun, for the tests that compare two with one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

__all__ = ["ends_of_ranks", "run_ranks", "start_ranks", "wait_until"]


def run_ranks(command: list[str], world_size: int, *, timeout: float = 600) -> None:
    """Run a Python program in `world_size` processes, each with one thread; all of them must end well.

    `timeout` in seconds ends a run that hangs. A busy machine takes ten times as long as an idle one.
    """
    processes = start_ranks(command, world_size)
    try:
        assert [process.wait(timeout=timeout) for process in processes] == [0] * world_size
    finally:
        for process in processes:
            process.kill()


def ends_of_ranks(
    command: list[str], world_size: int, *, cwd: Path | None = None, timeout: float = 600
) -> list[subprocess.CompletedProcess[str]]:
    """Run a Python program in `world_size` processes, and return how each of them ends and what it prints."""
    processes = start_ranks(command, world_size, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        ends = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *end)
        for process, end in zip(processes, ends, strict=True)
    ]


def start_ranks(
    command: list[str],
    world_size: int,
    *,
    cwd: Path | None = None,
    stdout: IO[str] | int | None = None,
    stderr: IO[str] | int | None = None,
) -> list[subprocess.Popen[str]]:
    """Start a Python program in `world_size` processes, each with one thread and a session, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tests = Path(__file__).parent
    # The programs import helpers from tests/; the packages come first, since tests/ has folders of the same names.
    search = [str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in search if path),
    }
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)},
            cwd=cwd,
            stdout=stdout,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
        for rank in range(world_size)
    ]


def wait_until(holds: Callable[[], bool], what: str) -> None:
    """Wait until `holds()`; `what` is said if it never does."""
    deadline = time.monotonic() + 100
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
