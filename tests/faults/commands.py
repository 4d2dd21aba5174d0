"""Two of the same command at once: builders of data, writers of a cache, training runs, quickstarts."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from PIL import Image

import cache_teacher
import make_digit_scenes
import make_shards
import quickstart
from at_once import start
from faults.at_once import lock_nothing
from faults.runs import checkout, checkpoint_content, difference, ended, run_arguments
from faults.trials import Row, last_line
from training import main as training_main
from training.record.run_log import read_metrics
from training.settings.options import EMBEDDED_DATA, EMBEDDED_TEACHER

__all__ = ["ROWS"]

_SCENES = {"num_train": 30, "num_val": 4, "num_test": 4, "num_val_twins": 2}
_IN_USE = r"^error: .+ is in use by process \d+ on .+"
_LONGEST = 60.0  # seconds until the second quickstart must have ended


def command(kind: str, material: Path, out: Path) -> tuple[Callable[[], object], list[str]]:
    """A command of this kind that writes into `out`: its function and its command line."""
    if kind == "builders":
        options = ["--images", f"{material}/pictures", "--shard-size", "5", "--val-share", "0.2", "--workers", "1"]
        return make_shards.main, ["make_shards.py", "folder", *options, "--out", str(out)]
    if kind == "scenes":
        sizes = [word for name, size in _SCENES.items() for word in (f"--{name.replace('_', '-')}", str(size))]
        return make_digit_scenes.main, ["make_digit_scenes.py", "--out", str(out), *sizes]
    if kind == "caches":
        options = ["--shards", f"{material}/{EMBEDDED_DATA}/train", "--teacher", f"{material}/{EMBEDDED_TEACHER}"]
        return cache_teacher.main, [
            "cache_teacher.py", *options, "--device", "cpu", "--num-workers", "0", "--out", str(out)
        ]  # fmt: skip
    if kind == "runs":
        return partial(_in_folder, material, training_main.main), ["training/main.py", *run_arguments(out)]
    options = ["--data", f"{material}/{EMBEDDED_DATA}", "--teacher", f"{out}/teacher", "--out", str(out / "quickstart")]
    return quickstart.main, ["quickstart.py", *options, "--steps", "1", "--teacher-steps", "1", "--processes", "1"]


KINDS = ("builders", "scenes", "caches", "runs", "quickstarts")


def _in_folder(folder: Path, main: Callable[[], object]) -> object:
    os.chdir(folder)
    return main()


def material_of_commands(material: Path) -> None:
    """What the commands read, and what each writes if it is alone."""
    checkout(material)
    for number in range(30):
        path = material / "pictures" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (6, 4), (number, 0, 99)).save(path)
        path.with_suffix(".txt").write_text(f"Row {number}. It is long.")
    for kind in KINDS[:-1]:
        pid = start(*command(kind, material, material / kind), material / f"{kind}.txt")
        if ended([pid]) != [0]:
            raise RuntimeError(f"{kind}: {(material / f'{kind}.txt').read_text()[-500:]}")


def trial(draws: random.Random, folder: Path, material: Path) -> str | None:
    """Two of one kind start with a delay of up to 0.2 s. One of them may be killed, and then a third follows, which may
    find the work done."""
    kind, out, logs = draws.choice(KINDS), folder / "out", [folder / f"{number}.txt" for number in range(3)]
    main, line = command(kind, material, out)
    pids = [start(main, line, logs[0])]
    time.sleep(draws.uniform(0, 0.2))
    pids.append(start(main, line, logs[1]))
    if kind == "quickstarts":
        return _one_is_refused(pids, logs)
    killed = draws.choice([None, 0, 1])
    if killed is not None:
        time.sleep(draws.uniform(0, 0.5))
        os.kill(pids[killed], signal.SIGKILL)
    status = ended(pids)
    for number, code in enumerate(status):
        if code not in (0, 2) and not (number == killed and code == -signal.SIGKILL):
            return f"{kind}: the command number {number} ended with {code}: {last_line(logs[number])}"
        if code == 2 and not re.search(_IN_USE, logs[number].read_text(), re.MULTILINE):
            return f"{kind}: {last_line(logs[number])}"
    if killed is not None:  # its lock may be left, and must hold nobody up
        (third,) = ended([start(main, line, logs[2])])
        refused = 0 in status and third == 2 and not re.search(_IN_USE, logs[2].read_text(), re.MULTILINE)
        if third != 0 and not refused:
            return f"{kind}: after a kill: {last_line(logs[2])}"
    if kind == "runs":
        return _other_run(out, material / kind)
    written, expected = _contents(out), _contents(material / kind)
    if written == expected:
        return None
    differs = sorted(set(written.items()) ^ set(expected.items()))[0][0]
    return f"{kind}: {differs} differs, {'nobody' if killed is None else f'number {killed}'} was killed with {status}"


def _one_is_refused(pids: Sequence[int], logs: Sequence[Path]) -> str | None:
    """One of two quickstarts ends at once, in one line; the other goes on until it is told to end."""
    last = time.monotonic() + _LONGEST
    ends: dict[int, int] = {}
    while not ends and time.monotonic() < last:
        ends = {number: os.waitstatus_to_exitcode(code) for number in (0, 1)
                for pid, code in [os.waitpid(pids[number], os.WNOHANG)] if pid}  # fmt: skip
        time.sleep(0.01)
    for number in {0, 1} - ends.keys():
        os.kill(pids[number], signal.SIGTERM)
        ends[number] = ended([pids[number]])[0]
    refused = [number for number, code in ends.items() if code == 2]
    if len(refused) != 1 or not re.search(_IN_USE, logs[refused[0]].read_text(), re.MULTILINE):
        return f"quickstarts: they ended with {ends}: {[last_line(log) for log in logs[:2]]}"
    other = ends[1 - refused[0]]
    return None if other in (128 + signal.SIGTERM, -signal.SIGTERM) else f"quickstarts: the first ended with {other}"


def _other_run(ours: Path, other: Path) -> str | None:
    if wrong := difference(checkpoint_content(ours), checkpoint_content(other)):
        return f"runs: {wrong} differs"
    losses = [[(row["step"], row["loss"]) for row in read_metrics(run)] for run in (ours, other)]
    return None if losses[0] == losses[1] else "runs: other losses"


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


ROWS = [
    Row(
        "commands at once",
        "two builders of shards or of digit scenes, writers of a cache, training runs or quickstarts start into one "
        "folder, and one of them may be killed: each ends well or in one line, and what is written is what one writes",
        trial,
        full=200,
        few=2,
        off="every process gets the lock",
        switch_off=lock_nothing,
        num_off=5,
        prepare=material_of_commands,
        seconds=300,
    ),
]
