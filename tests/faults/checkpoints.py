"""Checkpoints and weights that are damaged, and that are not; and saves that are killed."""

from __future__ import annotations

import logging
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from damages import damage_trial, make_run
from faults.trials import Row
from longclip_teacher.atomic_files import keep_previous
from longclip_teacher.weights_file import read_weights, run_weights, torch_load, write_weights
from training import generations
from training.checkpointing import TrainState, save_checkpoint
from training.generations import verified_file
from training.resume import RunInputs
from training.settings.tree import parse_config

__all__ = ["ROWS"]

METADATA = {"format": "ours", "kind": "student", "config": "{}", "a": "1", "z": "2"}
CONFIG = parse_config([])


class _Small(nn.Module):
    """In the place of the trained model: some tensors, all of one value."""

    def __init__(self, value: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((40, 30), float(value)))
        self.register_buffer("running_mean", torch.full((30,), float(value)))
        self.model = nn.Identity()
        self.model.ancestry = ()


def save(folder: Path, value: int) -> None:
    """Save a generation as the loop does: the weights, then the checkpoint, all of one value."""
    model = _Small(value)
    keep_previous(folder / "last.safetensors")
    write_weights(folder / "last.safetensors", model.state_dict(), METADATA)
    optimizer = torch.optim.AdamW(model.parameters())
    state = TrainState(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), RunInputs(9, 1, None, {}, {}))  # type: ignore[arg-type]
    save_checkpoint(folder / "last.pt", replace(state, step=value), CONFIG)


def checkpoint_value(folder: Path) -> int:
    """The value of the checkpoint that a run would resume from. Raises InputError if there is none."""
    content: Any = torch_load(verified_file(folder / "last.pt"))
    return _value({**content["distiller"], "step": torch.tensor(content["step"])})


def weights_value(folder: Path) -> int:
    """The value of the weights that a command would read. Raises InputError if there are none."""
    found = read_weights(run_weights(folder))
    if not METADATA.items() <= found.metadata.items():
        raise AssertionError(f"other metadata: {found.metadata}")
    return _value(found.tensors)


def _value(tensors: dict[str, Tensor]) -> int:
    values = torch.cat([tensor.flatten().double() for tensor in tensors.values()]).unique()
    if len(values) != 1:
        raise AssertionError(f"values of several generations: {values[:5].tolist()}")
    return int(values)


# --- damaged and clean ------------------------------------------------------------------------------------------------


def _run_folder(material: Path) -> None:
    make_run(material)


def damaged_trial(draws: random.Random, folder: Path, material: Path) -> str | None:
    shutil.copytree(material, folder, dirs_exist_ok=True)
    return damage_trial(folder, draws.randrange(1 << 32))


def clean_trial(draws: random.Random, folder: Path, material: Path) -> str | None:
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    value = draws.randrange(1000)
    for _ in range(draws.randint(1, 3)):
        value += 1
        save(folder, value)
    found = checkpoint_value(folder), weights_value(folder)
    if said:
        return f"a false alarm: {said[0]}"
    return None if found == (value, value) else f"read {found} instead of {value}"


def _believe_every_file(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("training.generations._known", lambda folder: {})
    patch.setattr("longclip_teacher.weights_file._CHECKSUM", ())


def _hash_in_any_order(patch: pytest.MonkeyPatch) -> None:
    """As it was: the hash of safetensors depended on the order of the metadata, which its writer draws."""
    patch.setattr("longclip_teacher.weights_file._sort_metadata", lambda path: None)
    patch.setattr("longclip_teacher.weights_file.sorted", lambda items: list(items), raising=False)


# --- killed -----------------------------------------------------------------------------------------------------------


class _Save(NamedTuple):
    """How long a save is: in lines of Python, in operations on files, in seconds."""

    lines: int
    operations: int
    seconds: float


_OPERATIONS = ("open", "os.rename", "os.remove", "os.link", "os.mkdir", "os.truncate", "os.chmod", "shutil.copyfile")


@contextmanager
def _counted_lines(at: Callable[[int], None]) -> Iterator[None]:
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        if event == "line":
            count += 1
            at(count)
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)


def _count_operations(at: Callable[[int], None]) -> None:
    """Call `at` before each operation on files of this process, from now on."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in _OPERATIONS:
            count += 1
            at(count)

    sys.addaudithook(hook)


def _measured_save(material: Path) -> None:
    """Write down how long the second save of a folder is."""
    folder = material / "measured"
    folder.mkdir()
    save(folder, 1)
    lines: list[int] = [0]
    with _counted_lines(lines.append):
        save(folder, 2)
    operations: list[int] = [0]
    _count_operations(operations.append)
    save(folder, 3)
    count = operations[-1]
    start = time.monotonic()
    save(folder, 4)
    (material / "save").write_text(f"{lines[-1]} {count} {time.monotonic() - start}")


def killed_save_trial(draws: random.Random, folder: Path, material: Path) -> str | None:
    lines, operations, seconds = (material / "save").read_text().split()
    length = _Save(int(lines), int(operations), float(seconds))
    saved = draws.randint(1, 3)
    for value in range(1, saved + 1):
        save(folder, value)
    how = draws.choice(["line", "operation", "moment"])
    last, delay = draws.randint(1, length.lines), draws.uniform(0, 1.2 * length.seconds)
    last = draws.randint(1, length.operations) if how == "operation" else last

    pid = os.fork()
    if pid == 0:
        _save_until(how, last, folder, saved + 1)
    if how == "moment":
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)

    names = {"checkpoint": checkpoint_value, "weights": weights_value}
    for name, read in names.items():
        if (value := read(folder)) not in (saved, saved + 1):
            return f"killed in save {saved + 1} at {how} {last}: {name} of save {value}"
    save(folder, saved + 2)
    found = {name: read(folder) for name, read in names.items()}
    return None if set(found.values()) == {saved + 2} else f"after the next save: {found}"


def _save_until(how: str, last: int, folder: Path, value: int) -> None:
    """Save, and die at the given line or operation on files."""

    def die(count: int) -> None:
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        if how == "operation":
            _count_operations(die)
        if how == "line":
            with _counted_lines(die):
                save(folder, value)
        else:
            save(folder, value)
    finally:
        os._exit(0)


def _write_in_place(patch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def in_place(path: Path, *, sync: bool = False) -> Iterator[Path]:
        path.touch()
        yield path

    patch.setattr("longclip_teacher.weights_file.atomic_file", in_place)
    patch.setattr(generations, "atomic_file", in_place)


ROWS = [
    Row(
        "kills in a save",
        "a save of weights and checkpoint is killed at a random line, operation on files or moment; both can be read, "
        "are of this save or of the one before, and the next save goes well",
        killed_save_trial,
        full=1000,
        few=20,
        off="files are written in place",
        switch_off=_write_in_place,
        num_off=40,
        prepare=_measured_save,
        per_process=25,
    ),
    Row(
        "damaged checkpoints",
        "a flipped bit, zeros or a cut in a checkpoint, in weights, settings or results of a run: named in one line, "
        "and the file before is read",
        damaged_trial,
        full=1000,
        few=40,
        off="no hash is compared",
        switch_off=_believe_every_file,
        prepare=_run_folder,
        per_process=25,
    ),
    Row(
        "clean checkpoints",
        "one to three saves of random weights are read back without a warning",
        clean_trial,
        full=1000,
        few=40,
        off="hashes depend on the order of the metadata",
        switch_off=_hash_in_any_order,
        per_process=25,
    ),
]
