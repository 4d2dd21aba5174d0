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

from training.distill import Distiller, Features, caption_groups, compute_losses, gather_features
from training.samples import Batch

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
        teacher = _join([distiller.teacher_features(chunk) for chunk in chunks])
        if accumulation == 1:
            seed_everything(*key)
            student, scale = module(batch.images, batch.long_tokens, batch.short_tokens)
        else:
            student, scale = _features_without_graph(distiller, chunks, key)

    losses = _weighted_losses(distiller, student, scale, teacher, batch)
    scaler.scale(losses["loss"]).backward()
    if accumulation > 1:
        _replay(module, chunks, student, scale, autocast, key)
    return {name: value.detach() for name, value in losses.items()}


def _weighted_losses(
    distiller: Distiller, student: Features, scale: Tensor, teacher: Features | None, batch: Batch
) -> dict[str, Tensor]:
    options = distiller.options
    groups = None
    if options.share_identical_captions:
        groups = {"long": caption_groups(batch.long_tokens), "short": caption_groups(batch.short_tokens)}
    widths = distiller.teacher_widths
    return compute_losses(
        gather_features(student, options),
        scale,
        None if teacher is None else gather_features(teacher, options, widths),
        distiller.teacher_scale,
        options,
        groups,
        teacher_widths=widths,
        streaming=distiller.streaming,
    )


@torch.no_grad()
def _features_without_graph(distiller: Distiller, chunks: list[Batch], key: tuple[int, ...]) -> tuple[Features, Tensor]:
    """Features of all chunks as leaves that collect a gradient; buffers (BatchNorm statistics) are left as they
    were."""
    buffers = {name: value.clone() for name, value in distiller.named_buffers()}
    parts = []
    for number, chunk in enumerate(chunks):
        seed_everything(*key, number)
        features, scale = distiller(chunk.images, chunk.long_tokens, chunk.short_tokens)
        parts.append(features)
    for name, value in distiller.named_buffers():
        value.copy_(buffers[name])
    joined = _join(parts)
    assert joined is not None
    leaves = {name: value.detach().requires_grad_() for name, value in joined.tensors().items()}
    return Features.from_tensors(leaves), scale.detach().requires_grad_(distiller.model.logit_scale.requires_grad)


def _replay(
    module: nn.Module, chunks: list[Batch], features: Features, scale: Tensor, autocast: Any, key: tuple[int, ...]
) -> None:
    """Run each chunk with a graph and push the cached feature gradients through it; DDP averages after the last one."""
    grads = {name: value.grad for name, value in features.tensors().items() if value.grad is not None}
    first = 0
    for number, chunk in enumerate(chunks):
        last = number == len(chunks) - 1
        quiet = module.no_sync() if isinstance(module, DistributedDataParallel) and not last else nullcontext()
        with quiet:
            seed_everything(*key, number)
            with autocast:
                again, again_scale = module(chunk.images, chunk.long_tokens, chunk.short_tokens)
            tensors = again.tensors()
            rows = slice(first, first + len(chunk.keys))
            outputs = [tensors[name] for name in grads]
            upstream = [grad[rows] for grad in grads.values()]
            if last and scale.grad is not None:
                outputs.append(again_scale)
                upstream.append(scale.grad)
            torch.autograd.backward(outputs, upstream)
        first += len(chunk.keys)


def _split(batch: Batch, accumulation: int) -> list[Batch]:
    if accumulation == 1:
        return [batch]
    bounds = np.linspace(0, len(batch.keys), accumulation + 1).astype(int)
    return [batch.rows(slice(a, b)) for a, b in pairwise(bounds)]


def _join(parts: list[Any]) -> Features | None:
    if parts[0] is None:
        return None
    tensors = [part.tensors() for part in parts]
    return Features.from_tensors({name: torch.cat([t[name] for t in tensors]) for name in tensors[0]})
