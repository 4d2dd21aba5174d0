"""Changes to the pictures of a batch: mixup, CutMix and random erasing, in uint8, on the batch's device.

Shapes: B batch, H W sides of the pictures in pixels. A box is (top, left, bottom, right) as shares of the sides, so it
is the same part of a picture at every resolution.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

from training.data.randomness import sample_generator
from training.data.samples import Batch
from training.settings.options import MixOptions

__all__ = ["mix"]

_STREAM = 0x6D6978  # separates these random numbers from others with the same key
_ERASED_AREA = (0.02, 0.33)  # Zhong et al. 2020, section 4.1, here and below
_ERASED_LOG_ASPECT = (math.log(0.3), -math.log(0.3))


def mix(batch: Batch, options: MixOptions, key: tuple[int, ...]) -> Batch:
    """Return `batch` with its pictures mixed and erased as `options` say. It depends only on the batch and on `key`.

    Mixup, CutMix: each picture gets one partner; the share and the box are drawn once per batch. Student and teachers
    see the same mixture, each at its resolution, so the teacher must be run on it. Captions stay as they are: they say
    nothing about a mixture.

    Erasing: with probability `erase` a rectangle of a picture is replaced with noise, uniform in each pixel and
    channel. The result is `erased`, which the student sees; `images` stay complete for the teachers that read them.
    """
    generator = sample_generator(*key, _STREAM)
    if options.mixup > 0 or options.cutmix > 0:
        batch = _mixed(batch, options, generator)
    if options.erase > 0:
        batch = replace(batch, erased=_erased(batch.images, options.erase, generator))
    return batch


def _mixed(batch: Batch, options: MixOptions, generator: np.random.Generator) -> Batch:
    """Apply mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019) to all views, at even odds if both are on."""
    cuts = options.cutmix > 0 and (options.mixup == 0 or generator.random() < 0.5)
    alpha = options.cutmix if cuts else options.mixup
    share = float(generator.beta(alpha, alpha))  # the picture's own share of a mixture
    half_side, centre = np.sqrt(1 - share) / 2, generator.random(2)
    box = np.concatenate([centre - half_side, centre + half_side]).clip(0, 1)
    partners = torch.from_numpy(generator.permutation(len(batch.images)))

    def mixed(images: UInt8[Tensor, "B 3 H W"]) -> UInt8[Tensor, "B 3 H W"]:
        others = images[partners.to(images.device)]
        if cuts:
            return torch.where(_inside(box[None], images), others, images)
        return torch.lerp(others.float(), images.float(), share).round().to(torch.uint8)

    return replace(
        batch, images=mixed(batch.images), teacher_images=tuple(mixed(images) for images in batch.teacher_images)
    )


def _erased(
    images: UInt8[Tensor, "B 3 H W"], probability: float, generator: np.random.Generator
) -> UInt8[Tensor, "B 3 H W"]:
    """Apply random erasing (Zhong et al. 2020). The rectangles are windows on one field of noise per batch."""
    count = len(images)
    is_erased = generator.random(count) < probability
    area = generator.uniform(*_ERASED_AREA, count)
    aspect = np.exp(generator.uniform(*_ERASED_LOG_ASPECT, count))
    sides = np.sqrt(np.stack([area * aspect, area / aspect], axis=1)).clip(max=1)  # B 2: height, width
    corner = generator.random((count, 2)) * (1 - sides)
    boxes = np.concatenate([corner, corner + sides * is_erased[:, None]], axis=1)
    noise = torch.from_numpy(generator.integers(0, 256, images.shape[1:], dtype=np.uint8)).to(images.device)
    return torch.where(_inside(boxes, images), noise, images)


def _inside(boxes: np.ndarray, images: UInt8[Tensor, "B 3 H W"]) -> Bool[Tensor, "N 1 H W"]:
    """Return which pixels lie in `boxes` [N, 4], with edges rounded to full pixels."""
    height, width = images.shape[-2:]
    edges = torch.from_numpy(np.rint(boxes * [height, width, height, width]).astype(np.int64)).to(images.device)
    top, left, bottom, right = edges[:, :, None].unbind(1)  # N 1 each
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    in_rows = (rows >= top) & (rows < bottom)  # N H
    in_columns = (columns >= left) & (columns < right)  # N W
    return (in_rows[:, :, None] & in_columns[:, None, :]).unsqueeze(1)
