"""One training step: features, losses, gradient.

With accumulation the batch is run in chunks without changing the contrastive gradient (GradCache, Gao et al. 2021):
features of all chunks are computed without a graph, the loss is taken once over all of them, and each chunk is run
again with d loss / d feature as its upstream gradient. BatchNorm statistics are those of the chunk and move once.
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training.data.samples import Batch
from training.distill import Distiller, Outputs
from training.objective import Features, caption_groups, compute_losses, gather_features

__all__ = ["backward_step", "seed_everything"]

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def seed_everything(*key: int) -> None:
    """Seed torch's generators from a tuple of non-negative integers, so that randomness is a function of the step."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


def backward_step(
    module: nn.Module,
    batch: Batch,
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
    distiller: Distiller = module.module if isinstance(module, DistributedDataParallel) else module  # type: ignore[assignment]
    dtype = _AUTOCAST.get(precision)
    autocast: Any = nullcontext() if dtype is None else torch.autocast(batch.images.device.type, dtype)
    chunks = _split(batch, accumulation)

    with autocast:
        taught = [distiller.teacher_outputs(chunk) for chunk in chunks]
        if accumulation == 1:
            seed_everything(*key)
            outputs = module(batch.images, batch.long_tokens, batch.short_tokens, taught[0][1])
        else:
            outputs = _outputs_without_graph(distiller, chunks, key)

    losses = _weighted_losses(distiller, outputs, _join([features for features, _ in taught]), batch)
    scaler.scale(losses["loss"]).backward()
    if accumulation > 1:
        _replay(module, chunks, outputs, autocast, key)
    return {name: value.detach() for name, value in losses.items()}


def _weighted_losses(
    distiller: Distiller, outputs: Outputs, teacher: Features | None, batch: Batch
) -> dict[str, Tensor]:
    options, teachers = distiller.options, distiller.teachers
    groups = None
    if options.share_identical_captions:
        groups = {"long": caption_groups(batch.long_tokens), "short": caption_groups(batch.short_tokens)}
    facts = {} if teachers is None else teachers.facts
    widths = facts["long"].widths if facts else None
    losses = compute_losses(
        gather_features(outputs.features, options),
        outputs.parameters,
        None if teacher is None else gather_features(teacher, options, widths),
        facts,
        options,
        groups,
        prompts=None if teachers is None else teachers.prompts,
        streaming=distiller.streaming,
    )
    for name, value in outputs.layers.items():
        losses[name] = value
        losses["loss"] = losses["loss"] + getattr(options, name) * value
    return losses


@torch.no_grad()
def _outputs_without_graph(distiller: Distiller, chunks: list[Batch], key: tuple[int, ...]) -> Outputs:
    """Features of all chunks and the losses' parameters as leaves that collect a gradient; buffers (BatchNorm
    statistics) are left as they were."""
    buffers = {name: value.clone() for name, value in distiller.named_buffers()}
    parts = []
    for number, chunk in enumerate(chunks):
        seed_everything(*key, number)
        parts.append(distiller(chunk.images, chunk.long_tokens, chunk.short_tokens))
    for name, value in distiller.named_buffers():
        value.copy_(buffers[name])
    joined = _join([part.features for part in parts])
    assert joined is not None
    return Outputs(_leaves(joined), _leaves(parts[-1].parameters), {})


def _leaves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().requires_grad_() for name, value in tensors.items()}


def _replay(module: nn.Module, chunks: list[Batch], first: Outputs, autocast: Any, key: tuple[int, ...]) -> None:
    """Run each chunk with a graph and push the cached gradients through it; DDP averages after the last one."""
    start = 0
    for number, chunk in enumerate(chunks):
        last = number == len(chunks) - 1
        quiet = module.no_sync() if isinstance(module, DistributedDataParallel) and not last else nullcontext()
        with quiet:
            seed_everything(*key, number)
            with autocast:
                again = module(chunk.images, chunk.long_tokens, chunk.short_tokens)
            rows = slice(start, start + len(chunk.keys))
            grads = {name: leaf.grad[rows] for name, leaf in first.features.items() if leaf.grad is not None}
            pairs = [(again.features[name], grad) for name, grad in grads.items()]
            if last:
                leaves = first.parameters.items()
                pairs += [(again.parameters[name], leaf.grad) for name, leaf in leaves if leaf.grad is not None]
            live = [(value, grad) for value, grad in pairs if value.requires_grad]  # a frozen tower's do not
            torch.autograd.backward([value for value, _ in live], [grad for _, grad in live])
        start += len(chunk.keys)


def _split(batch: Batch, accumulation: int) -> list[Batch]:
    if accumulation == 1:
        return [batch]
    bounds = np.linspace(0, len(batch.keys), accumulation + 1).astype(int)
    return [batch.rows(slice(a, b)) for a, b in pairwise(bounds)]


def _join(parts: list[Any]) -> Features | None:
    if parts[0] is None:
        return None
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
