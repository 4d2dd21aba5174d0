"""Small training steps with a value that is not finite: the loss, a gradient, a teacher's feature or a picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from eval.base.processes import Runtime
from loss_mixes import Case, batch_of, options_of, student_of, teacher_of
from training.checkpointing import TrainState
from training.data.samples import Batch
from training.distillation import Distillation, assemble
from training.ema import ModelEma
from training.objective import Objective
from training.optim import build_optimizer
from training.resume import RunInputs
from training.settings.tree import parse_config
from training.step import backward_step
from training.teachers import Teachers
from training.update import Statistics, apply_update

__all__ = ["CONFIG", "FAULTS", "Fault", "Run", "changed", "gradient", "loss", "picture", "teacher_row"]

CASE = Case({"clip_long": 1.0, "clip_short": 0.5, "vrd_long": 1.0, "fd_image": 1.0}, same_width=False)
CONFIG = parse_config(["--optim.ema", "0.9", "--run.out_dir", "never_written"])
Fault = Callable[[Distillation, Batch], Batch]


def gradient(value: float, parameter: str = "text_encoder.token_embedding.weight", row: int = 3) -> Fault:
    """One row of one parameter's gradient becomes `value`; the loss stays as it is."""

    def inject(found: Distillation, batch: Batch) -> Batch:
        tensor = found.distiller.model.get_parameter(parameter)
        place = torch.tensor([row % len(tensor)] if tensor.ndim else [])
        handle = tensor.register_hook(
            lambda grad: (
                handle.remove(),
                grad.index_fill(0, place, value) if grad.ndim else torch.full_like(grad, value),
            )[1]
        )
        return batch

    return inject


def teacher_row(value: float, row: int = 0, name: str = "image") -> Fault:
    def inject(found: Distillation, batch: Batch) -> Batch:
        assert batch.teacher is not None
        features = batch.teacher[name].clone()
        features[row, 0] = value
        return replace(batch, teacher={**batch.teacher, name: features})

    return inject


def picture(value: float, row: int = 1) -> Fault:
    """One picture's features are not finite in the middle of the forward pass, so BatchNorm's statistics are not."""

    def inject(found: Distillation, batch: Batch) -> Batch:
        stem = found.distiller.model.image_encoder.trunk.stem[0]
        handle = stem.register_forward_pre_hook(
            lambda _, args: (handle.remove(), args[0].index_fill(0, torch.tensor([row]), value))[1:]
        )
        return batch

    return inject


def loss(value: float) -> Fault:
    """The loss itself becomes `value`, after a forward pass in which all was finite."""

    @dataclass(frozen=True)
    class Broken(Objective):
        def __call__(self, *values: Any) -> dict[str, Tensor]:
            losses = super().__call__(*values)
            return {**losses, "loss": losses["loss"] * value}

    def inject(found: Distillation, batch: Batch) -> Batch:
        found.objective = Broken(**vars(found.objective))
        return batch

    return inject


FAULTS = {
    f"{kind.__name__} {value}": kind(value)
    for kind in (gradient, teacher_row, picture, loss)
    for value in (float("nan"), float("inf"))
}


class Run:
    """A small training run with stored teacher features, in training mode."""

    def __init__(self, runtime: Runtime, *, fused: bool = True, precision: str = "fp32") -> None:
        self.runtime, self.precision = runtime, precision
        teachers = Teachers([teacher_of(0, 24)])
        torch.manual_seed(2)
        student = student_of(CASE).float()
        self.batch = batch_of(runtime)
        online = assemble(student, teachers, options_of(CASE))
        rows = teachers.outputs(self.batch, online.objective.needs).features.tensors()
        self.batch = replace(self.batch, teacher={name: value.float() for name, value in rows.items()})
        stored = Teachers(stored=teachers.info["long"])
        self.found = assemble(student, stored, options_of(CASE))
        self.distiller = self.found.distiller.train()
        self.module = DistributedDataParallel(self.distiller) if runtime.world_size > 1 else self.distiller
        self.state = TrainState(
            self.distiller,
            build_optimizer(self.distiller, CONFIG.optim, fused=fused),
            torch.amp.GradScaler("cpu", enabled=precision == "fp16", init_scale=2.0**10),
            RunInputs(10, runtime.world_size, None, {}, {}),
            ModelEma(student, 0.9),
        )
        self.statistics = Statistics(self.distiller)

    def step(self, fault: Fault | None = None) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        self.statistics.remember()
        whole = self.found.objective
        batch = self.batch if fault is None else fault(self.found, self.batch)
        losses = backward_step(
            self.module, batch, self.found.objective, self.found.teachers,
            precision=self.precision, accumulation=1, scaler=self.state.scaler, key=(0, self.state.step),
        )  # fmt: skip
        self.found.objective = whole
        norm, is_good = apply_update(self.state, CONFIG, losses["loss"], self.statistics)
        self.state.step += 1
        return losses, norm, is_good

    def contents(self) -> dict[str, Tensor]:
        """Everything that a step may change."""
        assert self.state.ema is not None
        found = {f"model {name}": value for name, value in self.distiller.state_dict().items()}
        found |= {f"ema {name}": value for name, value in self.state.ema.model.state_dict().items()}
        for number, moments in self.state.optimizer.state_dict()["state"].items():
            found |= {f"moment {number} {name}": value for name, value in moments.items()}
        return {name: value.clone() for name, value in found.items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    return [name for name, value in before.items() if not torch.equal(value, after[name])]
