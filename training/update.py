"""The update of a step. It clips the gradient, then moves weights, scales and average. A bad step changes nothing.

A step is bad if its loss or the norm of its gradient is not finite. Both are the same on every process, because
features are gathered before the loss and gradients are averaged before the norm, so every process decides alike. With
fp16 a finite loss with an infinite gradient is no bad step: the scaler lowers its scale and leaves the step out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from eval.base.processes import Runtime
from longclip_teacher.atomic_files import write_json
from longclip_teacher.errors import InputError
from training.checkpointing import TrainState
from training.data.samples import Batch
from training.settings.tree import TrainConfig

__all__ = ["Statistics", "apply_update", "count_bad_step"]


class Statistics:
    """BatchNorm's running statistics as they were before a step; the forward pass moves them."""

    def __init__(self, module: nn.Module) -> None:
        norms = [found for found in module.modules() if isinstance(found, nn.modules.batchnorm._BatchNorm)]
        self._buffers = [buffer for norm in norms for buffer in norm.buffers()]
        self._before: list[Tensor] = []

    def remember(self) -> None:
        """Keep them as they are now."""
        self._before = [buffer.clone() for buffer in self._buffers]

    @torch.no_grad()
    def restore(self) -> None:
        """Put them back as they were when they were last remembered."""
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(before)


def apply_update(state: TrainState, config: TrainConfig, loss: Tensor, statistics: Statistics) -> tuple[Tensor, bool]:
    """Update the weights from their gradients, then clear these. Return the norm before clipping, and whether the step
    was good. A bad step leaves weights, moments, average and BatchNorm statistics as they were."""
    scaler, optimizer = state.scaler, state.optimizer
    scaler.unscale_(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    limit = config.optim.clip_grad_norm
    norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit)
    loss_is_finite, norm_is_finite = torch.stack([loss.detach(), norm]).isfinite().tolist()
    is_good = loss_is_finite and (norm_is_finite or scaler.is_enabled())
    if is_good or scaler.is_enabled():  # the scaler leaves a step out by itself
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if not loss_is_finite or not norm_is_finite:
        if not is_good:
            statistics.restore()
        return norm, is_good
    state.distiller.clamp_scales()
    if state.ema is not None:
        state.ema.update(state.distiller.model, state.step)
    return norm, True


def count_bad_step(
    losses: Mapping[str, Tensor], norm: Tensor, batch: Batch, state: TrainState, config: TrainConfig, runtime: Runtime
) -> None:
    """Count a bad step and write down its samples. Raise InputError after more than optim.max_bad_steps of them."""
    state.bad_steps += 1
    report = config.run.out_dir / f"nonfinite_rank{runtime.rank}.json"
    values = {**{name: str(value.item()) for name, value in losses.items()}, "grad_norm": str(norm.item())}
    write_json(report, {"step": state.step, "losses": values, "keys": list(batch.keys)})
    if state.bad_steps <= config.optim.max_bad_steps:
        return
    wrong = ", ".join(f"{name} {value}" for name, value in values.items() if not math.isfinite(float(value)))
    raise InputError(
        f"step {state.step} is not finite ({wrong}): it has changed nothing, and the last checkpoint is as it was. "
        f"Samples {batch.keys[0]} .. {batch.keys[-1]}, all {len(batch.keys)} in {report}. Lower --optim.lr, use "
        "--run.precision bf16, or leave such steps out with --optim.max_bad_steps N"
    )
