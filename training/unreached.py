"""Parameters that no loss reaches.

Under DDP such a parameter ends the run after its first step, and on one process it only decays. A tower without a loss
is refused by training/settings/checks.py. This module handles what depends on the model.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from longclip_teacher.errors import InputError
from longclip_teacher.trace import Trace
from mobileclip_student import MobileCLIP
from mobileclip_student.vit_trace import trace_vit
from training.distill import Distiller, tower_of
from training.layer_losses import LayerMatch, traced_tensors
from training.settings.checks import NOTHING_LEARNS
from training.settings.needs import Tower

__all__ = ["check_heads", "check_learns", "freeze_unreached"]

logger = logging.getLogger(__name__)
_HEADS = {"image": "class token", "distilled_image": "distillation token"}
_LOSSES = {"image": "--loss.clip_long 1", "distilled_image": "--loss.fd_image 1"}


def check_learns(distiller: Distiller) -> None:
    """Raise InputError if nothing trains: the towers are frozen, and a map that a loss could learn is not needed."""
    if not any(parameter.requires_grad for parameter in distiller.parameters()):
        raise InputError(NOTHING_LEARNS)


def check_heads(distiller: Distiller) -> None:
    """Raise InputError if a student has a distillation token and the losses read only one of its two heads."""
    model, read = distiller.model, distiller.needs.features
    has_token = isinstance(model, MobileCLIP) and bool(model.config.image.distillation_token)
    is_trained = any(parameter.requires_grad for parameter in tower_of(model, "image").parameters())
    if not (has_token and is_trained) or "masked_image" in read:  # masked pictures are read through both heads
        return
    missing = [head for head in _HEADS if head not in read]
    if len(missing) == 1:
        head = missing[0]
        instead = "" if distiller.needs.stage == "image" else f", or a loss that reads it, such as {_LOSSES[head]}"
        raise InputError(
            f"no loss reaches the head of the student's {_HEADS[head]} "
            f"(only {', '.join(term.name for term in distiller.needs.terms)}): set --student.distillation_token False "
            f"for a student without distillation token{instead}"
        )


def freeze_unreached(distiller: Distiller, layers: dict[Tower, LayerMatch], *, embedding_positions: bool) -> None:
    """Freeze the part of a tower that layer losses cannot reach, if it has no other loss: the layers above the match.

    One forward and backward pass of a small batch tells which parameters these are.
    """
    for tower, match in layers.items():
        model = distiller.model
        trained = {n: p for n, p in tower_of(model, tower).named_parameters() if p.requires_grad}
        if distiller.needs.reads_features_of(tower) or not trained or not isinstance(model, MobileCLIP):
            continue
        was_training = model.training
        with torch.enable_grad():
            read = traced_tensors(match, _small_trace(model.eval(), tower), embedding_positions=embedding_positions)
            total = torch.stack([tensor.double().square().sum() for tensor in read]).sum()
            gradients = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
        model.train(was_training)
        unreached = [name for name, found in zip(trained, gradients, strict=True) if found is None]
        for name in unreached:
            trained[name].requires_grad_(False)
        if unreached:
            logger.info(
                "the layer losses do not reach %d of %d tensors of the %s tower (%s ...): they stay as they start",
                len(unreached), len(trained), tower, unreached[0],
            )  # fmt: skip


def _small_trace(model: MobileCLIP, tower: Tower) -> Trace:
    device = model.logit_scale.device
    if tower == "text":
        end = model.config.text.vocab_size - 1  # a caption ends at its highest id
        tokens = torch.tensor([[1, 2, 3, end], [1, 2, end, 0]], device=device)
        return model.text_encoder.traced(tokens)[1][0]
    size = model.image_size
    pictures: Tensor = torch.zeros(2, 3, size, size, device=device, dtype=model.logit_scale.dtype)
    return trace_vit(model.image_encoder.trunk, pictures, model.encode_image_heads)[1]
