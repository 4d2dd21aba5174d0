"""Several processes that want to write one folder at the same time."""

from __future__ import annotations

import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from faults.checkpoints import checkpoint_value, save, weights_value
from faults.runs import ended, start_ranks
from faults.trials import Row
from longclip_teacher import folder_lock
from longclip_teacher.errors import InputError

__all__ = ["ROWS", "lock_nothing"]

_REFUSED = 2


def trial(draws: random.Random, folder: Path, material: Path) -> str | None:
    """Two or three processes save into a folder; one of them may be killed. What they do is logged beside it."""
    target, log = folder / "run", folder / "log"
    pids: list[int] = []
    waits = [draws.random() < 0.5 for _ in range(draws.randint(2, 3))]
    for number, wait in enumerate(waits):
        delays = [draws.uniform(0, 0.05) for _ in range(3)]
        pids += start_ranks(partial(_write, target, log, number, wait, delays), 1)
    killed = draws.choice([None, draws.randrange(len(pids))])
    if killed is not None:
        time.sleep(draws.uniform(0, 0.2))
        os.kill(pids[killed], signal.SIGKILL)
    status = ended(pids)
    for number, (wait, code) in enumerate(zip(waits, status, strict=True)):
        if code not in {0} | (set() if wait else {_REFUSED}) | ({-signal.SIGKILL} if number == killed else set()):
            return f"process {number} of {waits} ended with {code}"
    inside: str | None = None
    for line in log.read_text().splitlines() if log.is_file() else ():
        word, number_read = line.split()
        if word == "begin" and inside not in (None, str(killed)):
            return f"two at once: {log.read_text().split()}"
        inside = number_read if word == "begin" else None
    with folder_lock.folder_lock(target):  # the lock of a killed process holds nobody up
        save(target, 9)
    return None if (checkpoint_value(target), weights_value(target)) == (9, 9) else "the last save is not there"


def _write(target: Path, log: Path, number: int, wait: bool, delays: list[float]) -> None:
    time.sleep(delays[0])
    try:
        with folder_lock.folder_lock(target, wait=wait), log.open("a", buffering=1) as file:
            file.write(f"begin {number}\n")
            time.sleep(delays[1])
            save(target, number + 1)
            time.sleep(delays[2])
            file.write(f"end {number}\n")
    except InputError as error:
        is_told = "is in use by process" in str(error) and "\n" not in str(error)
        raise SystemExit(_REFUSED if is_told else 1) from None


def lock_nothing(patch: pytest.MonkeyPatch) -> None:
    """Give every process the lock."""
    patch.setattr(folder_lock, "try_lock", lambda descriptor: True)


ROWS = [
    Row(
        "two at once",
        "two or three processes save into one folder, one of them may be killed: one writes at a time, the others wait "
        "or end in one line, and the lock of a killed one holds nobody up",
        trial,
        full=40,
        few=5,
        off="every process gets the lock",
        switch_off=lock_nothing,
        num_off=10,
        per_process=10,
    ),
]
