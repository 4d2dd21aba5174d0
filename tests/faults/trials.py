"""Rows of the battery, and the forked processes in which their trials run.

A row does the same thing many times with random inputs and says after each trial what went wrong, if anything did. Its
trials run in processes forked from one that has imported everything. Every trial has its own random numbers, which
depend on the seed, the row and the trial's number alone, and its own folder.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import pytest

__all__ = ["Row", "Trial", "forked", "last_line", "outcomes", "prepared"]

Trial: TypeAlias = Callable[[random.Random, Path, Path], "str | None"]
"""Called with random numbers, an empty folder and the row's material. Returns what went wrong, None if nothing did."""


def _nothing(material: Path) -> None:
    """A row that needs no material."""


@dataclass(frozen=True)
class Row:
    """One kind of fault, or of clean input."""

    name: str
    what: str
    """What is done, and what must hold; a line of the table."""
    trial: Trial
    full: int
    """Trials of a full run."""
    few: int
    """Trials among the tests."""
    off: str
    """What switches the defence off; a part of the table."""
    switch_off: Callable[[pytest.MonkeyPatch], None]
    """Replaces the function that defends."""
    num_off: int = 10
    """Trials with the defence off, at least one of which must fail."""
    prepare: Callable[[Path], None] = _nothing
    """Fills the folder of material, once per run of the row."""
    seconds: float = 60
    """The longest that a trial may take. One that takes longer hangs."""
    per_process: int = 1
    """Trials in one forked process."""
    found: str = ""
    """Defects that the row found, which were mended; a part of the table."""


def prepared(row: Row, material: Path) -> None:
    """Make the material of a row. Raises RuntimeError if that fails."""
    material.mkdir(parents=True)
    failure = forked(lambda: row.prepare(material), material.with_suffix(".log"), 600)
    if failure is not None:
        raise RuntimeError(f"no material for {row.name}: {failure}")


def outcomes(row: Row, num_trials: int, seed: int, material: Path, *, defended: bool = True) -> Iterator[str | None]:
    """Run trials 0 .. num_trials - 1, and yield what went wrong in each, None if nothing did."""
    number = 0
    while number < num_trials:
        last = min(number + row.per_process, num_trials)
        for outcome in _in_one_process(row, range(number, last), seed, material, defended):
            number += 1
            yield outcome


def _in_one_process(row: Row, numbers: range, seed: int, material: Path, defended: bool) -> Iterator[str | None]:
    """Yield the outcomes of trials of one forked process. One that dies or hangs has failed the trial that it was in,
    and its other trials are left to the next process."""
    reading, writing = os.pipe()
    log = material.with_suffix(".log")
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _become_child(log)
        try:
            with os.fdopen(writing, "w") as report, pytest.MonkeyPatch.context() as patch:
                if not defended:
                    row.switch_off(patch)
                for number in numbers:
                    report.write(json.dumps(_outcome(row, number, seed, material)) + "\n")
                    report.flush()
        finally:
            os._exit(0)
    os.close(writing)
    try:
        with os.fdopen(reading, "rb", buffering=0) as report:
            for _ in numbers:
                ended, _, _ = select.select([report], [], [], row.seconds)
                line = report.readline() if ended else b""
                if not line:
                    yield f"it died ({last_line(log)})" if ended else f"no end within {row.seconds:g} s"
                    return
                yield json.loads(line)
    finally:
        _end(pid)


def _outcome(row: Row, number: int, seed: int, material: Path) -> str | None:
    folder = Path(tempfile.mkdtemp(prefix="trial-", dir=material.parent))
    try:
        return row.trial(random.Random(f"{seed} {row.name} {number}"), folder, material)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def forked(function: Callable[[], None], log: Path, seconds: float) -> str | None:
    """Call `function` in a process of its own, and return what went wrong there, None if nothing did."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            _become_child(log)
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    ended, _, _ = select.select([pidfd := os.pidfd_open(pid)], [], [], seconds)
    os.close(pidfd)
    status = _end(pid)
    if not ended:
        return f"no end within {seconds:g} s"
    return None if status == 0 else f"status {status}: {last_line(log)}"


def _become_child(log: Path) -> None:
    """Lead a group of processes, and write what would go to the screen into `log`."""
    os.setpgid(0, 0)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)


def _end(pid: int) -> int:
    """End a child and all that it has started, and return its exit status."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    if not ended:
        _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def last_line(log: Path) -> str:
    """The last line of what a process printed."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    return lines[-1][:200] if lines else "it said nothing"
