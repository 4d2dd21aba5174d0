"""The contrastive loss of CLIP (Radford et al. 2021). G global batch, D embedding width."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from training.losses.precision import widened

__all__ = ["clip_loss", "contrastive_targets", "similarity_logits"]


def similarity_logits(
    image_features: Float[Tensor, "G D"], text_features: Float[Tensor, "G D"], logit_scale: Tensor | float
) -> Float[Tensor, "G G"]:
    """`logit_scale * image_features @ text_features.T` in float32 (float64 for float64 input), also under autocast."""
    with torch.autocast(image_features.device.type, enabled=False):
        return logit_scale * (widened(image_features) @ widened(text_features, image_features).T)


def contrastive_targets(
    logits: Float[Tensor, "G G"], caption_groups: Int[Tensor, " G"] | None = None
) -> Int[Tensor, " G"] | Float[Tensor, "G G"]:
    """Targets for the rows, and for the columns, of `logits`: the number of the pair, or with `caption_groups` a
    symmetric matrix of probabilities in which rows of the same group share the target."""
    if caption_groups is None:
        return torch.arange(logits.shape[0], device=logits.device)
    same = (caption_groups[:, None] == caption_groups[None, :]).to(logits.dtype)
    return same / same.sum(dim=1, keepdim=True)


def clip_loss(
    image_features: Float[Tensor, "G D"],
    text_features: Float[Tensor, "G D"],
    logit_scale: Tensor | float,
    *,
    label_smoothing: float = 0.0,
    caption_groups: Int[Tensor, " G"] | None = None,
) -> Float[Tensor, ""]:
    """Mean of the image-to-text and the text-to-image cross-entropy over the global batch (ITC).

    Rows of `image_features` need not be unit-norm (those after PCA, for the short captions, are not). With
    `caption_groups`, rows of the same group have the same caption and share the target equally instead of being each
    other's negatives.
    """
    logits_per_image = similarity_logits(image_features, text_features, logit_scale)  # [G, G]
    target = contrastive_targets(logits_per_image, caption_groups)
    per_image = cross_entropy(logits_per_image, target, label_smoothing=label_smoothing)
    per_text = cross_entropy(logits_per_image.T, target, label_smoothing=label_smoothing)
    return (per_image + per_text) / 2
