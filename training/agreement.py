"""Before their first step the processes of a run agree on what they do. Rank 0 decides what is resumed.

Nodes need not share the disk of the run's folder: rank 0 alone reads and writes it, and sends the others what it has
read. Whatever differs between the processes ends the run in one line, which would otherwise wait for itself.
"""

from __future__ import annotations

import hashlib
import json
import logging
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from eval.base.processes import Runtime, all_results, bytes_of_main, on_main
from longclip_teacher.errors import InputError
from training.checkpointing import TrainState, find_checkpoint, load_checkpoint, restore
from training.generations import verified_file
from training.resume import RunInputs
from training.settings.tree import TrainConfig

__all__ = ["check_agreement", "resume"]

logger = logging.getLogger(__name__)
# what may differ between nodes
_OF_A_NODE = {("run", "out_dir"), ("run", "resume"), ("run", "device"), ("data", "cache_dir"), ("data", "cache_gb")}


def check_agreement(config: TrainConfig, inputs: RunInputs, steps_per_epoch: int) -> None:
    """Compare options, data, teachers and validation sets of all processes. All must call this.

    Raise InputError, which names the rank and what it has, if one differs from rank 0.
    """
    options = {
        f"--{section}.{name}": value
        for section, fields in config.to_dict().items()
        for name, value in fields.items()
        if (section, name) not in _OF_A_NODE
    }
    found = inputs.to_dict()
    samples = sum(contents[0] for contents in found["data"].values())
    lengths = {"steps per epoch": steps_per_epoch, "training samples": samples}
    hashes = {f"hash of the {name}": _hash(found[name]) for name in ("data", "teachers", "validation")}
    _compare({**options, **lengths, **hashes}, "start all nodes with the same command, data and teachers")


def resume(config: TrainConfig, state: TrainState, runtime: Runtime) -> bool:
    """Restore the state of the run that goes on, as rank 0 finds it, on all processes, and tell what has changed since.
    All must call this. Return whether there is such a run.

    Raise InputError if the checkpoint cannot be resumed, or if another process has a later one.
    """
    found: list[Path] = []

    def read() -> dict[str, torch.Tensor]:
        if (path := find_checkpoint(config)) is None:
            return {}
        for note in load_checkpoint(path, state, config):
            logger.info(note)
        if runtime.world_size > 1:
            found.append(verified_file(path))
        return {"found": torch.ones(1)}

    is_found = bool(on_main(read))
    if runtime.world_size > 1:
        if is_found:
            path = found[0] if found else config.run.out_dir
            content = bytes_of_main(path)
            if not runtime.is_main:
                restore(torch.load(content, map_location="cpu", weights_only=True), path, state, config)
        _check_no_later(config, state)
        _compare({"step": state.step}, "delete the checkpoints that are not wanted")
    return is_found


def _check_no_later(config: TrainConfig, state: TrainState) -> None:
    """Raise InputError if a process has a later checkpoint of this folder than rank 0: a node may have been given
    another number, and its disk may be the one that the run was on."""
    last = config.run.out_dir / "checkpoints" / "last.pt"
    mine = _step_of(last) if config.run.resume == "auto" else -1
    if mine > state.step:  # or it is a file that rank 0 sees too, and has found damaged
        mine = _step_of(last, is_verified=True)
    steps = [int(part["step"]) for part in all_results(lambda: {"step": torch.tensor(mine)})]
    latest = max(range(len(steps)), key=lambda rank: steps[rank])
    if steps[latest] > state.step:
        raise InputError(
            f"rank {latest} has a checkpoint of step {steps[latest]} in its --run.out_dir, rank 0 goes on from step "
            f"{state.step}: copy it to rank 0's node, or delete it"
        )


def _step_of(path: Path, *, is_verified: bool = False) -> int:
    """The step of a checkpoint, -1 if there is none that can be read. Its tensors stay on the disk, unless it is
    verified: if it is damaged, the one before it counts."""
    try:
        path = verified_file(path) if is_verified else path
        return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"])
    except Exception:  # whatever is wrong with it, rank 0 does not ask for it
        return -1


def _compare(mine: Mapping[str, Any], advice: str) -> None:
    """Raise InputError if the values of a process are not those of rank 0."""
    host = socket.gethostname()
    content = json.dumps([host, mine], default=str).encode()
    told = all_results(lambda: {"told": torch.frombuffer(bytearray(content), dtype=torch.uint8)})
    (first, expected), *others = (json.loads(part["told"].numpy().tobytes()) for part in told)
    for rank, (theirs, values) in enumerate(others, 1):
        for name in expected:
            if values[name] != expected[name]:
                raise InputError(
                    f"the processes differ in {name}: rank {rank} on {theirs} has {values[name]}, rank 0 on {first} "
                    f"has {expected[name]}: {advice}"
                )


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]
