"""The update of a step. It clips the gradient, then moves weights, scales and average. A bad step changes nothing.

A step is bad if its loss or the norm of its gradient is not finite. Both are the same on every process, because
features are gathered before the loss and gradients are averaged before the norm, so every process decides alike. With
fp16 a finite loss with an infinite gradient is no bad step: the scaler lowers its scale and leaves the step out.

The device decides by itself, so that the host need not wait for it. The host looks when it logs or saves (`BadSteps`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eval.base.processes import Runtime
from longclip_teacher.atomic_files import write_json
from longclip_teacher.errors import InputError
from training.checkpointing import TrainState
from training.data.samples import Batch
from training.settings.tree import TrainConfig

__all__ = ["BadSteps", "Statistics", "apply_update", "read_values"]


class Statistics:
    """The buffers of a module, such as BatchNorm's running statistics, as they were before a step; the forward pass
    moves them."""

    def __init__(self, module: nn.Module) -> None:
        buffers = list(module.buffers())
        types = dict.fromkeys(buffer.dtype for buffer in buffers)
        self._groups = [[buffer for buffer in buffers if buffer.dtype == dtype] for dtype in types]
        self._before: list[Tensor] = []

    @torch.no_grad()
    def remember(self) -> None:
        """Keep them as they are now."""
        self._before = [_flat(group) for group in self._groups]

    @torch.no_grad()
    def restore_unless(self, is_good: Tensor) -> None:
        """Put them back as they were when they were last remembered, unless `is_good`."""
        for group, before in zip(self._groups, self._before, strict=True):
            parts = torch.where(is_good, _flat(group), before).split([buffer.numel() for buffer in group])
            torch._foreach_copy_(group, [part.view_as(buffer) for part, buffer in zip(parts, group, strict=True)])


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def apply_update(state: TrainState, config: TrainConfig, loss: Tensor, statistics: Statistics) -> tuple[Tensor, Tensor]:
    """Update the weights from their gradients, then clear these. Return the norm before clipping, and whether the step
    was good, both on the device. A bad step leaves weights, moments, average and buffers as they were."""
    scaler, optimizer = state.scaler, state.optimizer
    scaler.unscale_(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    limit = config.optim.clip_grad_norm
    norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit)
    loss_is_finite, norm_is_finite = torch.stack([loss.detach(), norm]).isfinite().unbind()
    moves = loss_is_finite & norm_is_finite
    is_good = loss_is_finite if scaler.is_enabled() else moves
    _step(optimizer, scaler, moves)
    optimizer.zero_grad(set_to_none=True)
    statistics.restore_unless(is_good)
    state.distiller.clamp_scales(moves)
    if state.ema is not None:
        state.ema.update(state.distiller.model, state.step, moves)
    return norm, is_good


def _step(optimizer: torch.optim.AdamW, scaler: torch.amp.GradScaler, moves: Tensor) -> None:
    """Move the weights and the moments if `moves`."""
    if scaler.is_enabled():  # it leaves a step out by itself
        scaler.step(optimizer)
        scaler.update()
    elif optimizer.defaults["fused"]:  # its kernel looks at `found_inf`, as GradScaler uses it
        optimizer.found_inf = (~moves).float()  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
    elif moves:  # other kernels need the host's decision
        optimizer.step()


@dataclass(frozen=True)
class _Taken:
    """A step, and what the device knows of it."""

    number: int
    losses: Mapping[str, Tensor]
    norm: Tensor
    is_good: Tensor
    keys: list[str]


class BadSteps:
    """The steps of a run since the host last looked at them. It counts the bad ones in the run's state, and writes down
    their samples."""

    def __init__(self, state: TrainState, config: TrainConfig, runtime: Runtime) -> None:
        self._state, self._config = state, config
        self._report = config.run.out_dir / f"nonfinite_rank{runtime.rank}.json"
        self._taken: list[_Taken] = []

    def add(self, losses: Mapping[str, Tensor], norm: Tensor, is_good: Tensor, batch: Batch) -> None:
        """Remember the step that has just been taken."""
        self._taken.append(_Taken(self._state.step, losses, norm, is_good, batch.keys))

    def count(self) -> None:
        """Wait for the steps that have been taken, and count the bad ones. Raise InputError once there are more than
        optim.max_bad_steps."""
        taken, self._taken = self._taken, []
        for step, is_good in zip(taken, _values([step.is_good for step in taken]), strict=True):
            if not is_good:
                self._count(step)

    def _count(self, step: _Taken) -> None:
        self._state.bad_steps += 1
        found = read_values({**step.losses, "grad_norm": step.norm})
        values = {name: str(value) for name, value in found.items()}
        write_json(self._report, {"step": step.number, "losses": values, "keys": step.keys})
        if self._state.bad_steps <= self._config.optim.max_bad_steps:
            return
        wrong = ", ".join(f"{name} {value}" for name, value in values.items() if not math.isfinite(found[name]))
        raise InputError(
            f"step {step.number} is not finite ({wrong}): it has changed nothing, and the last checkpoint is as it "
            f"was. Samples {step.keys[0]} .. {step.keys[-1]}, all {len(step.keys)} in {self._report}. Lower "
            "--optim.lr, use --run.precision bf16, or leave such steps out with --optim.max_bad_steps N"
        )


def read_values(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the values of tensors of one element by name. The host waits for the device once."""
    return dict(zip(tensors, _values([tensor.detach() for tensor in tensors.values()]), strict=True))


def _values(tensors: Sequence[Tensor]) -> list[Any]:
    return torch.stack(list(tensors)).tolist() if tensors else []
