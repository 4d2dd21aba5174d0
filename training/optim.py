"""AdamW's parameter groups and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from training.config import OptimOptions

__all__ = ["build_optimizer", "learning_rate"]


_FUSED_DEVICES = {"cpu", "cuda"}


def build_optimizer(module: nn.Module, options: OptimOptions, fused: bool = True) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; those of fewer than two dimensions and positional embeddings do not decay.

    `fused` updates each parameter in one pass over memory where the device has a kernel for it; otherwise, and
    elsewhere, one operation runs over all parameters at a time. The weights differ by rounding.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim < 2 or "positional_embedding" in name or "pos_embed" in name else decayed).append(
                parameter
            )
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    fused = fused and {parameter.device.type for parameter in (*decayed, *plain)} <= _FUSED_DEVICES
    return torch.optim.AdamW(
        groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=fused, foreach=not fused
    )


def learning_rate(step: int, total_steps: int, options: OptimOptions) -> float:
    """Learning rate of step `step` (from 0): linear warm-up, then cosine decay to `min_lr_share` of the peak."""
    warmup = min(options.warmup_steps, max(1, total_steps // 10))
    if step < warmup:
        return options.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    floor = options.lr * options.min_lr_share
    return floor + (options.lr - floor) * 0.5 * (1 + math.cos(math.pi * progress))
