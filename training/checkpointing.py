"""Checkpoints hold the whole state of a run. They are written atomically and read without executing anything.

The position in the data, the learning rate and every random number are functions of the step. The step is therefore
the only state besides tensors, and a run that was killed and resumed equals one that was never killed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longclip_teacher import LongCLIP, save_teacher
from longclip_teacher.ancestry import ancestry_from_json, ancestry_to_json, merged, unrecorded
from longclip_teacher.atomic_files import keep_previous
from longclip_teacher.errors import InputError
from longclip_teacher.weights_file import load_strictly, torch_load
from mobileclip_student import MobileCLIP, save_student
from training.distill import Distiller
from training.ema import ModelEma
from training.generations import verified_file, write_generation
from training.optim import load_moments
from training.resume import RunInputs, changes_since, other_processes
from training.settings.tree import TrainConfig

__all__ = ["TrainState", "find_checkpoint", "load_checkpoint", "restore", "save_checkpoint", "save_weights"]


@dataclass
class TrainState:
    """The state of a run, as a checkpoint holds it."""

    distiller: Distiller
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    inputs: RunInputs
    """Length of the run and contents of its data and teachers. A resumed run compares its own with them."""
    ema: ModelEma[MobileCLIP | LongCLIP] | None = None
    """Average of the trained model's weights, None if the run keeps no average."""
    step: int = 0
    """Steps done."""
    best: float | None = None
    """Best value of the validation measure so far, None before the first evaluation."""
    bad_steps: int = 0
    """Steps so far whose loss or gradient was not finite; they changed nothing."""
    evaluated_step: int | None = None
    """Step of the last evaluation. A run that was stopped in its final evaluation is not finished."""

    @property
    def evaluated_model(self) -> MobileCLIP | LongCLIP:
        """The model that is evaluated and saved as the run's result: the average if there is one."""
        return self.distiller.model if self.ema is None else self.ema.model


def save_checkpoint(path: Path, state: TrainState, config: TrainConfig) -> None:
    """Write the complete state. A crash leaves the old file or the new one, never half of one."""
    content = {
        "distiller": state.distiller.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "ema": None if state.ema is None else state.ema.model.state_dict(),
        "step": state.step,
        "best": state.best,
        "bad_steps": state.bad_steps,
        "evaluated_step": state.evaluated_step,
        "config": config.to_dict(),
        "inputs": state.inputs.to_dict(),
        "ancestry": ancestry_to_json(state.distiller.model.ancestry),
    }
    _refuse_nonfinite(path, content)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            torch.save(content, file)

    write_generation(path, write)


def _refuse_nonfinite(path: Path, content: Mapping[str, Any]) -> None:
    """Raise InputError if a weight, a moment or a statistic is not finite. The file at `path` then stays as it is."""
    tensors = {
        f"{part}.{name}": value for part in ("distiller", "ema") for name, value in (content[part] or {}).items()
    }
    for number, moments in content["optimizer"]["state"].items():
        tensors |= {f"optimizer.{number}.{name}": value for name, value in moments.items()}
    floating = {
        name: value for name, value in tensors.items() if isinstance(value, Tensor) and value.is_floating_point()
    }
    if wrong := [name for name, value in floating.items() if not value.isfinite().all()]:
        raise InputError(
            f"{len(wrong)} tensors are not finite at step {content['step']} ({wrong[0]}): {path} is left as it was; "
            "lower --optim.lr"
        )


def load_checkpoint(path: Path, state: TrainState, config: TrainConfig) -> list[str]:
    """Restore `state` from `path`. Returns a line for each change since then that does not affect the result.

    `state.inputs` must be those of the resumed run. With another validation set the best weights are chosen anew.
    Raises InputError if the file is damaged, or if settings, data or teachers differ in a way that affects the result.
    """
    content = torch_load(verified_file(path))
    parts = {"distiller", "optimizer", "scaler", "ema", "step", "best", "config"}
    if not isinstance(content, dict) or not parts <= content.keys():
        raise InputError(f"{path} is not a training checkpoint (weights alone are given as --student.init)")
    saved, inputs = content["config"], content.get("inputs")
    before = None if inputs is None else RunInputs.from_dict(inputs)
    notes = changes_since(path, content["step"], saved, before, config, state.inputs)
    if before is not None:
        notes += other_processes(before, config, state.inputs, state.distiller)
    notes += restore(content, path, state, config)
    return notes


def restore(content: Mapping[str, Any], path: Path, state: TrainState, config: TrainConfig) -> list[str]:
    """Restore `state` from the content of the checkpoint `path`, which has been compared with this run. Returns a line
    if the best weights are chosen anew."""
    load_strictly(state.distiller, content["distiller"], path)
    begun_from = content.get("ancestry")
    ancestry = unrecorded("a checkpoint without a record") if begun_from is None else ancestry_from_json(begun_from)
    state.distiller.model.ancestry = merged(state.distiller.model.ancestry, ancestry)
    state.distiller.clamp_scales(torch.tensor(True))  # older checkpoints may hold larger ones
    load_moments(state.optimizer, content["optimizer"], path)
    state.scaler.load_state_dict(content["scaler"])
    if state.ema is not None:
        load_strictly(state.ema.model, content["ema"], path)
        state.ema.model.ancestry = state.distiller.model.ancestry
    state.step, state.best = content["step"], content["best"]
    state.bad_steps = content.get("bad_steps", 0)  # older checkpoints have none
    state.evaluated_step = content.get("evaluated_step", state.step)
    if state.best is not None and _has_other_validation(content, state, config):
        state.best = None
        if state.step < state.inputs.total_steps:
            return ["the best weights are chosen anew on this validation set: best.safetensors is overwritten"]
    return []


def _has_other_validation(content: Mapping[str, Any], state: TrainState, config: TrainConfig) -> bool:
    """Whether the set on which the best weights of this checkpoint were chosen is not that of this run."""
    before = (content.get("inputs") or {}).get("validation")
    if before and state.inputs.validation:  # older checkpoints do not tell its contents
        return before != state.inputs.validation
    saved, now = content["config"]["data"], config.to_dict()["data"]
    return any(saved.get(name) != now[name] for name in ("val", "val_protocol"))


def find_checkpoint(config: TrainConfig) -> Path | None:
    """The checkpoint that `run.resume` selects, None to start a new run. Raises InputError if it does not exist."""
    last = config.run.out_dir / "checkpoints" / "last.pt"
    if config.run.resume == "auto":
        return last if last.exists() else None
    if config.run.resume == "never":
        if last.exists() or (config.run.out_dir / "results.json").exists():
            raise InputError(
                f"{config.run.out_dir} holds a run: give --run.resume auto to go on, or another --run.out_dir"
            )
        return None
    path = Path(config.run.resume)
    if not path.is_file():
        raise InputError(f"no checkpoint at {path} (--run.resume takes never, auto or a file)")
    return path


def save_weights(path: Path, model: MobileCLIP | LongCLIP) -> None:
    """Write the model alone as safetensors with its configuration inside, for evaluation and use. The file that was
    there is kept as its previous generation."""
    keep_previous(path)
    if isinstance(model, MobileCLIP):
        save_student(model, path)
    else:
        save_teacher(model, path)
