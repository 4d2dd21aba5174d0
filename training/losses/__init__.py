"""Losses as pure functions of gathered features or logits, one family a file.

Features are unit-norm rows [G, D] of the global batch; row i of the images and row i of the texts are a pair. Every
`logit_scale` is linear (the inverse temperature, not its logarithm). All arithmetic is float32 with autocast off,
because at scale 100 a bfloat16 product changes a logit by up to 0.24.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.losses.contrastive import clip_loss, contrastive_targets, similarity_logits
    from training.losses.feature import cos_loss, fd_loss, kl_loss, l1_loss
    from training.losses.logits import Direction, deit_hard_loss, deit_soft_loss, kd_loss, softmax_kl
    from training.losses.relational import afd_loss, crd_loss, gd_loss, icl_loss, vrd_loss, xrd_loss
    from training.losses.streaming import PairedLosses, full_matrix_losses, paired_losses
    from training.losses.tiles import Factors

__all__ = [
    "Direction",
    "Factors",
    "PairedLosses",
    "afd_loss",
    "clip_loss",
    "contrastive_targets",
    "cos_loss",
    "crd_loss",
    "deit_hard_loss",
    "deit_soft_loss",
    "fd_loss",
    "full_matrix_losses",
    "gd_loss",
    "icl_loss",
    "kd_loss",
    "kl_loss",
    "l1_loss",
    "paired_losses",
    "similarity_logits",
    "softmax_kl",
    "vrd_loss",
    "xrd_loss",
]

_MODULE_OF = {
    "Direction": "logits",
    "Factors": "tiles",
    "PairedLosses": "streaming",
    "afd_loss": "relational",
    "clip_loss": "contrastive",
    "contrastive_targets": "contrastive",
    "cos_loss": "feature",
    "crd_loss": "relational",
    "deit_hard_loss": "logits",
    "deit_soft_loss": "logits",
    "fd_loss": "feature",
    "full_matrix_losses": "streaming",
    "gd_loss": "relational",
    "icl_loss": "relational",
    "kd_loss": "logits",
    "kl_loss": "feature",
    "l1_loss": "feature",
    "paired_losses": "streaming",
    "similarity_logits": "contrastive",
    "softmax_kl": "logits",
    "vrd_loss": "relational",
    "xrd_loss": "relational",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that importing this package does not import torch."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
