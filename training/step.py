"""One training step: features, losses, gradient.

The gradient is computed in two parts: from the losses to the features, then through the towers. Losses need full
float32 in both directions, towers do not.

With accumulation the batch is run in chunks without changing the contrastive gradient (GradCache, Gao et al. 2021):
features of all chunks are computed without a graph, the loss is taken once over all of them, and each chunk is run
again with d loss / d feature as its upstream gradient. BatchNorm uses the statistics of the chunk and moves once.
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from eval.base.tf32 import full_float32
from training.data.samples import Batch
from training.features import Features, Outputs, TeacherOutputs
from training.objective import Objective
from training.teachers import Teachers

__all__ = ["backward_step", "losses_with_gradient", "seed_everything"]

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def seed_everything(*key: int) -> None:
    """Seed torch's generators from a tuple of non-negative integers, so that randomness is a function of the step."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


def backward_step(
    module: nn.Module,
    batch: Batch,
    objective: Objective,
    teachers: Teachers | None,
    *,
    precision: str,
    accumulation: int,
    scaler: torch.amp.GradScaler,
    key: tuple[int, ...],
) -> dict[str, Tensor]:
    """Add the gradient of the weighted losses of `batch` to the parameters.

    `module` is the Distiller or DDP around it; `key` seeds drop path and dropout. Returns the unweighted losses by
    name and their weighted sum as `loss`, detached, on the device.
    """
    dtype = _AUTOCAST.get(precision)
    autocast: Any = nullcontext() if dtype is None else torch.autocast(batch.images.device.type, dtype)
    chunks = _split(batch, accumulation)

    with autocast:
        taught = None if teachers is None else _joined([teachers.outputs(chunk, objective.needs) for chunk in chunks])
        if accumulation == 1:
            seed_everything(*key)
            outputs = module(*batch.inputs)
            leaves = outputs.map(_leaf)
        else:
            leaves = _outputs_without_graph(module, chunks, key)

    tokens = (batch.long_tokens, batch.short_tokens, batch.sub_tokens)
    losses = losses_with_gradient(objective, leaves, taught, tokens, scaler)
    if accumulation == 1:
        _push(outputs, leaves, slice(None))
    else:
        _replay(module, chunks, leaves, autocast, key)
    return {name: value.detach() for name, value in losses.items()}


def losses_with_gradient(
    objective: Objective,
    leaves: Outputs,
    taught: TeacherOutputs | None,
    tokens: tuple[Tensor, Tensor, Tensor | None],
    scaler: torch.amp.GradScaler,
) -> dict[str, Tensor]:
    """The losses of `leaves`, which collect the (scaled) gradient of their weighted sum, computed in full float32.
    `tokens` are what the objective reads of the captions.

    The towers may round their products to TF32. The gradient stops at the leaves so that it is pushed through the
    towers under their setting, and through the losses under this one.
    """
    with full_float32():
        losses = objective(leaves, taught, *tokens)
        scaler.scale(losses["loss"]).backward()
    return losses


@torch.no_grad()
def _outputs_without_graph(module: nn.Module, chunks: list[Batch], key: tuple[int, ...]) -> Outputs:
    """Compute the features of all chunks and the losses' parameters as leaves that collect a gradient. Buffers, such as
    BatchNorm statistics, stay as they were."""
    distiller = module.module if isinstance(module, DistributedDataParallel) else module
    buffers = {name: value.clone() for name, value in distiller.named_buffers()}
    parts: list[Outputs] = []
    for number, chunk in enumerate(chunks):
        seed_everything(*key, number)
        parts.append(distiller(*chunk.inputs))
    for name, value in distiller.named_buffers():
        value.copy_(buffers[name])
    joined = Outputs(
        Features.joined([part.features for part in parts]),
        Features.joined([part.mapped for part in parts]),
        parts[-1].parameters,
    )
    return joined.map(_leaf)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _replay(module: nn.Module, chunks: list[Batch], leaves: Outputs, autocast: Any, key: tuple[int, ...]) -> None:
    """Run each chunk with a graph and push the cached gradients through it; DDP averages after the last one."""
    start = 0
    for number, chunk in enumerate(chunks):
        last = number == len(chunks) - 1
        quiet = module.no_sync() if isinstance(module, DistributedDataParallel) and not last else nullcontext()
        with quiet:
            seed_everything(*key, number)
            with autocast:
                again = module(*chunk.inputs)
            _push(again, leaves, slice(start, start + len(chunk.keys)), with_parameters=last)
        start += len(chunk.keys)


def _push(outputs: Outputs, leaves: Outputs, rows: slice, *, with_parameters: bool = True) -> None:
    """Push the gradients that `rows` of the leaves have collected through the graph of `outputs`."""
    pairs = [
        (value, leaf.grad[rows])
        for value, leaf in zip(outputs.rows(), leaves.rows(), strict=True)
        if leaf.grad is not None
    ]
    if with_parameters:
        learned = zip(outputs.parameters.tensors(), leaves.parameters.tensors(), strict=True)
        pairs += [(value, leaf.grad) for value, leaf in learned if leaf.grad is not None]
    live = [(value, grad) for value, grad in pairs if value.requires_grad]  # a frozen tower's do not
    torch.autograd.backward([value for value, _ in live], [grad for _, grad in live])


def _split(batch: Batch, accumulation: int) -> list[Batch]:
    if accumulation == 1:
        return [batch]
    bounds = np.linspace(0, len(batch.keys), accumulation + 1).astype(int)
    return [batch.rows(slice(a, b)) for a, b in pairwise(bounds)]


def _joined(parts: list[TeacherOutputs]) -> TeacherOutputs:
    if len(parts) == 1:
        return parts[0]
    return TeacherOutputs(Features.joined([part.features for part in parts]))  # layer losses refuse chunks
