"""Losses as pure functions of gathered features, one family a file.

Features are unit-norm rows [G, D] of the global batch, row i of images and texts being a pair; every `logit_scale` is
linear (the inverse temperature, not its logarithm). All arithmetic is float32 with autocast off: at scale 100 a
bfloat16 product is off by 0.24 in a logit.
"""

from training.losses.contrastive import clip_loss
from training.losses.feature import fd_loss
from training.losses.relational import crd_loss
from training.losses.streaming import PairedLosses, full_matrix_losses, paired_losses
from training.losses.tiles import Factors

__all__ = ["Factors", "PairedLosses", "clip_loss", "crd_loss", "fd_loss", "full_matrix_losses", "paired_losses"]
