"""Changes to the pictures of a batch: mixup, CutMix, random erasing and masks, in uint8, on the batch's device.

What is drawn for one picture is keyed by (seed, epoch, sample), and what is drawn once for the batch by (seed, step).
Neither depends on the number of processes.

Shapes: B batch, H, W a view's height and width, P squares along a side. Boxes are top, left, bottom, right as shares of
the sides, so that one box is the same part of a picture at every resolution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from longclip_teacher.transfer import sent
from training.data.randomness import sample_generator
from training.data.samples import Batch
from training.settings.options import MixOptions

__all__ = ["Mask", "mix"]

# separate these random numbers from others with the same key, and from one another
_MIX, _ERASE, _HIDE = 0x6D6978, 0x6D6979, 0x6D697A
_ERASED_AREA = (0.02, 0.33)  # Zhong et al. 2020, section 4.1, here and below
_ERASED_LOG_ASPECT = (math.log(0.3), -math.log(0.3))


@dataclass(frozen=True)
class Mask:
    """How much of a picture masked_fd hides."""

    ratio: float
    """Share of the squares."""
    patch: int
    """Side of a square in pixels."""


def mix(batch: Batch, options: MixOptions, *, seed: int, step: int, mask: Mask | None = None) -> Batch:
    """Return `batch` with its pictures mixed, erased and masked. It depends on nothing but the arguments.

    Mixup, CutMix: each picture gets one partner, its neighbour in the batch; the share and the box are drawn once for
    the batches of all processes. Student and teachers see the same mixture, each at its resolution, so the teacher must
    be run on it. Captions stay as they are: they say nothing about a mixture.

    Erasing: with probability `erase` a rectangle of a picture is replaced with noise, uniform in each pixel and
    channel. The result is `erased`, which the student sees; `images` stay complete for the teachers that read them.

    Masks: `hidden` tells which squares of the student's view masked_fd hides.
    """
    if options.mixup > 0 or options.cutmix > 0:
        batch = _mixed(batch, options, sample_generator(seed, step, _MIX))
    if options.erase > 0:
        batch = replace(batch, erased=_erased(batch, options.erase, seed, step))
    return batch if mask is None else replace(batch, hidden=_hidden(batch, mask, seed))


def _mixed(batch: Batch, options: MixOptions, generator: np.random.Generator) -> Batch:
    """Apply mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019) to all views, at even odds if both are on."""
    cuts = options.cutmix > 0 and (options.mixup == 0 or generator.random() < 0.5)
    alpha = options.cutmix if cuts else options.mixup
    share = float(generator.beta(alpha, alpha))  # the picture's own share of a mixture
    half_side, centre = np.sqrt(1 - share) / 2, generator.random(2)
    box = np.concatenate([centre - half_side, centre + half_side]).clip(0, 1)
    partners = _neighbours(len(batch.images))

    def mixed(images: UInt8[Tensor, "B 3 H W"]) -> UInt8[Tensor, "B 3 H W"]:
        others = images[sent(partners, images.device)]
        if cuts:
            return torch.where(_inside(box[None], images), others, images)
        return torch.lerp(others.float(), images.float(), share).round().to(torch.uint8)

    return replace(
        batch, images=mixed(batch.images), teacher_images=tuple(mixed(images) for images in batch.teacher_images)
    )


def _neighbours(count: int) -> Int64[Tensor, " B"]:
    """Return a partner for each place: 0 and 1, 2 and 3, and so on; the last of an odd number takes the first.

    The order of a batch is random, so neighbours are random pairs. A share of even size holds the same pairs in the
    batch of one process.
    """
    partners = torch.arange(count) ^ 1
    return partners.where(partners < count, 0)


def _erased(batch: Batch, probability: float, seed: int, step: int) -> UInt8[Tensor, "B 3 H W"]:
    """Apply random erasing (Zhong et al. 2020). The rectangles are windows on one field of noise per step."""
    images = batch.images
    drawn = np.stack([sample_generator(seed, *draw, _ERASE).random(5) for draw in batch.draws])
    low, high = _ERASED_AREA
    area = low + drawn[:, 1] * (high - low)
    low, high = _ERASED_LOG_ASPECT
    aspect = np.exp(low + drawn[:, 2] * (high - low))
    sides = np.sqrt(np.stack([area * aspect, area / aspect], axis=1)).clip(max=1)  # B 2: height, width
    corner = drawn[:, 3:] * (1 - sides)
    is_erased = drawn[:, :1] < probability
    boxes = np.concatenate([corner, corner + sides * is_erased], axis=1)
    field = sample_generator(seed, step, _ERASE).integers(0, 256, images.shape[1:], dtype=np.uint8)
    return torch.where(_inside(boxes, images), sent(torch.from_numpy(field), images.device), images)


def _hidden(batch: Batch, mask: Mask, seed: int) -> Bool[Tensor, "B P P"]:
    """Choose a share `mask.ratio` of the squares of each picture."""
    side = math.ceil(batch.images.shape[-1] / mask.patch)
    orders = [sample_generator(seed, *draw, _HIDE).permutation(side**2) for draw in batch.draws]
    hidden = torch.from_numpy(np.stack(orders)) < round(mask.ratio * side**2)
    return sent(hidden.view(-1, side, side), batch.images.device)


def _inside(boxes: np.ndarray, images: UInt8[Tensor, "B 3 H W"]) -> Bool[Tensor, "N 1 H W"]:
    """Return which pixels lie in `boxes` [N, 4], with edges rounded to full pixels."""
    height, width = images.shape[-2:]
    edges = sent(torch.from_numpy(np.rint(boxes * [height, width, height, width]).astype(np.int64)), images.device)
    top, left, bottom, right = edges[:, :, None].unbind(1)  # N 1 each
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    in_rows = (rows >= top) & (rows < bottom)  # N H
    in_columns = (columns >= left) & (columns < right)  # N W
    return (in_rows[:, :, None] & in_columns[:, None, :]).unsqueeze(1)
