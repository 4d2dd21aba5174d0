"""Training steps with a value that is not finite."""

from __future__ import annotations

import random
from functools import cache as remembered
from pathlib import Path

import pytest
import torch

from bad_steps import Fault, Run, changed, gradient, loss, picture, teacher_row
from eval.base.processes import Runtime, start
from faults.runs import ended, start_ranks
from faults.trials import Row
from longclip_teacher.errors import InputError
from training.settings.tree import parse_config
from training.update import BadSteps

__all__ = ["ROWS", "small_run"]


@remembered
def small_run() -> Run:
    """A run of this process, which its trials go on with: a bad step must leave it as it was."""
    run = Run(Runtime(0, 1, torch.device("cpu")))
    assert run.step()[2]
    return run


def drawn_fault(run: Run, draws: random.Random) -> tuple[str, Fault]:
    """A fault in the loss, a gradient, a row of the teacher's features or a picture, and its name."""
    value = draws.choice([float("nan"), float("inf"), float("-inf")])
    row = draws.randrange(len(run.batch.keys))
    parameter = draws.choice(sorted(_reached(run)))
    return draws.choice(
        [
            (f"loss {value}", loss(value)),
            (f"gradient {value} of {parameter}", gradient(value, parameter, draws.randrange(1000))),
            (f"teacher's row {row} {value}", teacher_row(value, row)),
            (f"picture {row} {value}", picture(value, row)),
        ]
    )


@remembered
def _reached(run: Run) -> frozenset[str]:
    """The parameters that a step moves; a gradient of another one never comes."""
    before = run.contents()
    run.step()
    moved = {name.removeprefix("model model.") for name in changed(before, run.contents())}
    return frozenset(name for name, _ in run.distiller.model.named_parameters() if name in moved)


def _wrong(run: Run, folder: Path, name: str, fault: Fault | None) -> str | None:
    """Take a bad step, then a good one."""
    before = run.contents()
    losses, norm, is_good = run.step(fault)
    if found := changed(before, run.contents()):
        return f"{name}: {len(found)} tensors changed ({found[0]})"
    if is_good:
        return f"{name}: not noticed"
    config = parse_config(["--run.out_dir", str(folder)])
    taken = BadSteps(run.state, config, run.runtime)
    taken.add(losses, norm, is_good, run.batch)
    try:
        taken.count()
        return f"{name}: the run goes on"
    except InputError as error:
        if f"Samples {run.batch.keys[0]} .. {run.batch.keys[-1]}" not in str(error) or "\n" in str(error):
            return f"{name}: the samples are not named: {error}"
    return None if run.step()[2] else f"{name}: the next step is bad too"


def trial(draws: random.Random, folder: Path, material: Path) -> str | None:
    if draws.random() < 0.1:
        return _trial_of_two(draws, folder)
    run = small_run()
    return _wrong(run, folder, *drawn_fault(run, draws))


def _trial_of_two(draws: random.Random, folder: Path) -> str | None:
    """One of two processes, drawn, has the fault; both must act alike."""
    faulty, state = draws.randrange(2), draws.getstate()

    def rank() -> None:
        with start("cpu") as runtime:
            run = Run(runtime)
            run.step()
            draws.setstate(state)
            name, fault = drawn_fault(run, draws)
            wrong = _wrong(run, folder, f"{name} on rank {faulty} of 2", fault if runtime.rank == faulty else None)
            (folder / f"rank{runtime.rank}").write_text(wrong or "")

    if any(status := ended(start_ranks(rank, 2))):
        return f"two processes ended with {status}"
    return next((wrong for rank in range(2) if (wrong := (folder / f"rank{rank}").read_text())), None)


def _everything_is_finite(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("torch.Tensor.isfinite", lambda tensor: torch.ones_like(tensor, dtype=torch.bool))


ROWS = [
    Row(
        "not finite",
        "NaN or an infinity in the loss, a gradient, a row of the teacher's features or a picture in the middle of the "
        "forward pass, on one process or one of two: weights, moments, average and BatchNorm stay as they were, and "
        "the run stops and names the samples",
        trial,
        full=300,
        few=6,
        off="no value is looked at",
        switch_off=_everything_is_finite,
        num_off=6,
        per_process=10,
        seconds=300,
    ),
]
