"""The teacher pass by several processes that know nothing of each other, and are killed."""

from __future__ import annotations

import os
import random
import re
import resource
import signal
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch

from at_once import start
from cache_teacher import Options, cache
from eval.base.processes import Runtime
from faults.runs import ended
from faults.trials import Row, last_line
from longclip_teacher import create_teacher, load_teacher, save_teacher
from shard_files import write_folder

__all__ = ["ROWS"]

_SHARDS, _SAMPLES = 40, 6
_PARTS = (0, 1, 1, 2, 3)  # of the array, one of them started twice
_KILLS = 20
_LONGEST = 0.5  # seconds from one kill to the next
_DISK = 4096  # bytes that a file may have on the full disk: a record has fewer, a sidecar more
_MADE = re.compile(r"^\d+ of \d+: (\S+)$", re.MULTILINE)


def _material(material: Path) -> None:
    """Shards, a teacher, and what one process makes of them."""
    write_folder(material / "shards", range(_SHARDS * _SAMPLES), _SAMPLES)
    torch.manual_seed(0)
    save_teacher(create_teacher("tiny"), material / "teacher.safetensors")
    if ended([_worker(material, material / "cache", material / "log.txt")]) != [0]:
        raise RuntimeError((material / "log.txt").read_text())


def _worker(material: Path, out: Path, log: Path, part: int | None = None, num_workers: int = 0, disk: int = 0) -> int:
    """Start a pass in a forked process, on a disk that is full if `disk` bounds the size of a file."""
    options = Options(
        shards=(str(material / "shards"),), teacher=str(material / "teacher.safetensors"), out=out, batch_size=4,
        num_workers=num_workers, device="cpu", array=None if part is None else f"{part}/{max(_PARTS) + 1}",
    )  # fmt: skip
    return start(partial(_pass, options, disk), [], log)


def _pass(options: Options, disk: int) -> None:
    if disk:
        resource.setrlimit(resource.RLIMIT_FSIZE, (disk, disk))
    cache(options, Runtime(0, 1, torch.device("cpu")))


def trial(draws: random.Random, folder: Path, material: Path) -> str | None:
    """Four parts of an array, one of them twice, are killed 20 times, and one of them first finds the disk full."""
    load_teacher(material / "teacher.safetensors").tokenizer([""])  # what loads slowly is loaded before the forks
    out, logs = folder / "out", list[Path]()

    def begin(part: int, disk: int = 0) -> int:
        logs.append(folder / f"{len(logs)}.txt")
        logs[-1].touch()
        # the limit of a full disk would hold for the memory that is shared with loader processes too
        return _worker(material, out, logs[-1], part, 0 if disk else draws.choice([0, 0, 1]), disk)

    full = begin(draws.choice(_PARTS), _DISK)
    pids = [begin(part) for part in _PARTS]
    try:
        expected = {2: "^error: cannot write .+", 0: r"\(10 kept\)"}.get(ended([full])[0])  # 0: others were faster
        if expected is None or not re.search(expected, logs[0].read_text(), re.MULTILINE):
            return f"on the full disk: {last_line(logs[0])}"
        for _ in range(_KILLS):
            time.sleep(draws.uniform(0, _LONGEST))
            slot = draws.randrange(len(pids))
            os.kill(pids[slot], signal.SIGKILL)
            if (code := ended([pids[slot]])[0]) not in (0, -signal.SIGKILL):
                return f"part {_PARTS[slot]} ended with {code}"
            pids[slot] = begin(_PARTS[slot])
            if twice := _made_twice(logs):
                return twice
        codes, pids = ended(pids), []
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        ended(pids)
    if any(codes):
        return f"they ended with {codes}: {[last_line(log) for log in logs]}"
    other = sorted({name for name, _ in _contents(out).items() ^ _contents(material / "cache").items()})
    return f"{other[0]} is not as expected" if other else _made_twice(logs)


def _made_twice(logs: Sequence[Path]) -> str | None:
    made = Counter(name for log in logs for name in _MADE.findall(log.read_text()))
    twice = [name for name, count in made.items() if count > 1]
    return f"made twice: {twice}" if twice else None


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _look_at_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("cache_teacher.fits", lambda *_: False)
    patch.setattr("training.cache.teacher_pass.fits", lambda *_: False)
    patch.setattr("training.cache.teacher_pass.file_claim", lambda path, wait=False: nullcontext(True))


ROWS = [
    Row(
        "kills in a teacher pass",
        "four processes do the parts of an array, a fifth one of these parts again; 20 random kills, each followed by "
        "a new start, and a disk that is full: the cache is that of one undisturbed process, byte by byte, and no "
        "sidecar is made twice",
        trial,
        full=50,
        few=1,
        off="nobody looks at what others claim or have made",
        switch_off=_look_at_nothing,
        num_off=1,
        prepare=_material,
        seconds=300,
    ),
]
