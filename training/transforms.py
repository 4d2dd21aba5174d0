"""From a decoded picture to what each model sees: one crop, rendered at one or two resolutions.

An augmentation is drawn first, as plain data, and applied after. The same data gives the same pixels, so the student
and the teacher see the same crop, and a crop can be stored and replayed. Randomness is keyed by (seed, epoch, sample).

Shapes: S the view's image size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandAugment

from longclip_teacher.errors import InputError

__all__ = [
    "AugmentConfig",
    "Augmentation",
    "ViewSpec",
    "centre_crop",
    "draw_augmentation",
    "render",
    "sample_generator",
]

Interpolation = Literal["bicubic", "bilinear"]
_RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class ViewSpec:
    """What one model wants to see: a square of `image_size` pixels. Its normalisation happens on the device."""

    image_size: int
    interpolation: Interpolation = "bicubic"


@dataclass(frozen=True)
class AugmentConfig:
    """Random crop and, if asked for, RandAugment. There is no flip: long captions say left and right."""

    scale: tuple[float, float] = (0.9, 1.0)
    """Area of the crop over the largest square in the picture. Long captions speak of the whole: keep it high."""
    ratio: tuple[float, float] = (0.95, 1.05)
    """Width over height of the crop, which is then resized to a square."""
    rand_augment_ops: int = 0
    """RandAugment operations a picture (MobileCLIP: 2); 0 is off. They change colours, which captions may name."""
    rand_augment_magnitude: int = 9
    """Strength of RandAugment, 0 to 30."""

    def __post_init__(self) -> None:
        """Raise InputError for ranges that mean nothing."""
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise InputError(f"augment scale {self.scale}: give two numbers, 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise InputError(f"augment ratio {self.ratio}: give two numbers, 0 < low <= high")
        if self.rand_augment_ops < 0 or not 0 <= self.rand_augment_magnitude <= 30:
            raise InputError("augment: rand_augment_ops must be 0 or more, rand_augment_magnitude 0 to 30")


@dataclass(frozen=True)
class Augmentation:
    """One draw, as plain data: enough to render the same pixels again from the same decoded picture."""

    box: tuple[int, int, int, int]  # left, top, right, bottom in pixels of the decoded picture
    rand_augment_ops: int = 0
    rand_augment_magnitude: int = 0
    rand_augment_seed: int = 0


def sample_generator(*key: int) -> np.random.Generator:
    """Random numbers that depend on `key`, for example (seed, epoch, index), and on nothing else."""
    return np.random.default_rng(key)


def draw_augmentation(size: tuple[int, int], config: AugmentConfig, generator: np.random.Generator) -> Augmentation:
    """A random resized crop of a picture of `size` (width, height), and a seed for RandAugment if it is on."""
    width, height = size
    area, log_ratio, x, y = generator.random(4)
    area = config.scale[0] + area * (config.scale[1] - config.scale[0])
    low, high = math.log(config.ratio[0]), math.log(config.ratio[1])
    ratio = math.exp(low + log_ratio * (high - low))
    # of the largest square, not of the whole picture: nothing is squashed that evaluation, which crops a square, is not
    side = min(width, height)
    crop_width = min(width, max(1, round(side * math.sqrt(area * ratio))))
    crop_height = min(height, max(1, round(side * math.sqrt(area / ratio))))
    left, top = int(x * (width - crop_width + 1)), int(y * (height - crop_height + 1))
    box = (left, top, left + crop_width, top + crop_height)
    if not config.rand_augment_ops:
        return Augmentation(box)
    return Augmentation(box, config.rand_augment_ops, config.rand_augment_magnitude, int(generator.integers(2**31)))


def centre_crop(size: tuple[int, int]) -> Augmentation:
    """No randomness: the largest centred square, as in CLIP's preprocessing for evaluation."""
    width, height = size
    side = min(size)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return Augmentation((left, top, left + side, top + side))


def render(picture: Image.Image, augmentation: Augmentation, views: Iterable[ViewSpec]) -> list[np.ndarray]:
    """The augmented picture at each view's resolution: uint8 [S, S, 3] arrays."""
    rendered = []
    for view in views:
        side = (view.image_size, view.image_size)
        pixels = picture.resize(side, _RESAMPLE[view.interpolation], box=augmentation.box)
        rendered.append(np.asarray(_rand_augment(pixels, augmentation)))
    return rendered


def _rand_augment(picture: Image.Image, augmentation: Augmentation) -> Image.Image:
    """The same operations in the same direction at every resolution: torchvision draws them by the seed alone."""
    if not augmentation.rand_augment_ops:
        return picture
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(augmentation.rand_augment_seed)
        return RandAugment(
            augmentation.rand_augment_ops,
            augmentation.rand_augment_magnitude,
            interpolation=InterpolationMode.BILINEAR,
            fill=[128, 128, 128],
        )(picture)
