"""Losses as pure functions of gathered features or logits, one family a file.

Features are unit-norm rows [G, D] of the global batch, row i of images and texts being a pair; every `logit_scale` is
linear (the inverse temperature, not its logarithm). All arithmetic is float32 with autocast off: at scale 100 a
bfloat16 product is off by 0.24 in a logit.
"""

from training.losses.contrastive import clip_loss, contrastive_targets, similarity_logits
from training.losses.feature import cos_loss, fd_loss, kl_loss, l1_loss
from training.losses.logits import Direction, deit_hard_loss, deit_soft_loss, kd_loss, softmax_kl
from training.losses.relational import afd_loss, affinity_loss, crd_loss, gd_loss, icl_loss, vrd_loss, xrd_loss
from training.losses.streaming import PairedLosses, full_matrix_losses, paired_losses
from training.losses.tiles import Factors

__all__ = [
    "Direction",
    "Factors",
    "PairedLosses",
    "afd_loss",
    "affinity_loss",
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
