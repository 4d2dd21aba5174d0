"""From a decoded picture to what each model sees: one crop, rendered at one or more resolutions.

An augmentation is drawn first, as plain data, and applied later: crop, resize, flip, RandAugment, in DataCompDR's order
(MobileCLIP, section 3.2). The same data gives the same pixels, so the student and the teacher see the same picture, and
an augmentation can be stored and replayed. Randomness is keyed by (seed, epoch, sample).

Shapes: S the view's image size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as pil_ops

from longclip_teacher.errors import InputError
from training.data.decoding import Interpolation, Picture, pixels_of_pil, resized_crops
from training.settings.augment import MAGNITUDE_BINS, AugmentConfig

__all__ = [
    "RAND_AUGMENT_OPS",
    "Augmentation",
    "ViewSpec",
    "centre_crop",
    "draw_augmentation",
    "rand_augment_magnitude",
    "render",
]

RAND_AUGMENT_OPS: tuple[str, ...] = (
    "Identity",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",
    "Solarize",
    "AutoContrast",
    "Equalize",
)
"""torchvision's RandAugment operations in its order; DataCompDR stores an operation as its index here."""

_STRONGEST = {"ShearX": 0.3, "ShearY": 0.3, "Rotate": 30.0} | dict.fromkeys(
    ("Brightness", "Color", "Contrast", "Sharpness"), 0.9
)  # at the last bin, and either sign
_MAX_MAGNITUDE = 1e4  # bounds stored operations, far above any drawn value
_ENHANCE = {
    "Brightness": pil_ops.adjust_brightness,
    "Color": pil_ops.adjust_saturation,
    "Contrast": pil_ops.adjust_contrast,
}


@dataclass(frozen=True)
class ViewSpec:
    """The view that one model reads: a square of `image_size` pixels. The device normalises it."""

    image_size: int
    interpolation: Interpolation = "bicubic"


@dataclass(frozen=True)
class Augmentation:
    """One draw as plain data, which is enough to render the same pixels again from the same decoded picture."""

    box: tuple[int, int, int, int]
    """Left, top, right, bottom of the crop in pixels of the decoded picture."""
    ops: tuple[tuple[str, float], ...] = ()
    """RandAugment operations in order: a name of RAND_AUGMENT_OPS and a signed magnitude in torchvision's unit. For
    TranslateX and TranslateY that unit is a pixel of a view of `ops_size`, and the magnitude is truncated."""
    ops_size: int = 224
    """The image size for which `ops` were drawn (DataCompDR: 224)."""
    flip: bool = False
    """Mirrored left to right, before `ops`."""

    def __post_init__(self) -> None:
        """Raise InputError for operations that cannot be applied."""
        if self.ops_size < 1:
            raise InputError(f"augmentation: ops_size {self.ops_size} is not an image size")
        for name, magnitude in self.ops:
            if name not in RAND_AUGMENT_OPS:
                raise InputError(f"augmentation: {name!r} is not a RandAugment operation")
            low, high = (1, 8) if name == "Posterize" else (-_MAX_MAGNITUDE, _MAX_MAGNITUDE)
            if not low <= magnitude <= high:  # refuses nan too
                raise InputError(f"augmentation: {name} cannot have the magnitude {magnitude}")


def draw_augmentation(size: tuple[int, int], config: AugmentConfig, generator: np.random.Generator) -> Augmentation:
    """Draw a random resized crop of a picture of `size` (width, height), and flip and RandAugment if they are on.

    The crop is drawn first, so that it does not depend on the other options.
    """
    if config.centre:
        return centre_crop(size)
    box = _draw_box(size, config, generator)
    flip = bool(config.flip) and bool(generator.random() < config.flip)
    drawn = [_draw_op(config.rand_augment_magnitude, generator) for _ in range(config.rand_augment_ops)]
    return Augmentation(box, tuple(drawn), flip=flip)


def centre_crop(size: tuple[int, int]) -> Augmentation:
    """Return the largest centred square, without randomness, as in CLIP's preprocessing for evaluation."""
    width, height = size
    side = min(size)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return Augmentation((left, top, left + side, top + side))


@functools.cache
def rand_augment_magnitude(name: str, magnitude_bin: int, image_size: int = Augmentation.ops_size) -> float:
    """Return an operation's unsigned magnitude at one of the 31 bins, as in torchvision's RandAugment at
    `image_size`."""
    if name == "Posterize":
        return 8.0 - round(magnitude_bin * 4 / (MAGNITUDE_BINS - 1))  # number of bits that are kept
    if name == "Solarize":
        bins = torch.linspace(255.0, 0.0, MAGNITUDE_BINS)
    elif name in ("TranslateX", "TranslateY"):
        bins = torch.linspace(0.0, 150.0 / 331.0 * image_size, MAGNITUDE_BINS)
    else:
        bins = torch.linspace(0.0, _STRONGEST.get(name, 0.0), MAGNITUDE_BINS)
    return float(bins[magnitude_bin])


def render(picture: Picture, augmentation: Augmentation, views: Sequence[ViewSpec]) -> list[Tensor]:
    """Render the augmented picture at each view's resolution: uint8 [3, S, S], contiguous.

    Without RandAugment, pixels rendered from the two forms of Picture (training.data.decoding) differ by at most 2
    levels. The operations of RandAugment are PIL's in both forms. With them the mean difference stays below 1 level
    (Contrast rounds the mean to one), but a pixel at a threshold of Solarize, Posterize or Equalize may fall on its
    other side.

    Raise InputError for a crop that does not lie inside the picture.
    """
    resized = resized_crops(picture, augmentation.box, [(view.image_size, view.interpolation) for view in views])
    rendered = []
    for pixels in resized:
        if augmentation.ops or isinstance(pixels, Image.Image):
            pixels = pixels_of_pil(_augmented(_as_pil(pixels), augmentation))
        elif augmentation.flip:
            pixels = pixels.flip(-1)
        rendered.append(pixels.contiguous())
    return rendered


def _draw_box(
    size: tuple[int, int], config: AugmentConfig, generator: np.random.Generator
) -> tuple[int, int, int, int]:
    width, height = size
    area, log_ratio, x, y = generator.random(4)
    area = config.scale[0] + area * (config.scale[1] - config.scale[0])
    low, high = math.log(config.ratio[0]), math.log(config.ratio[1])
    ratio = math.exp(low + log_ratio * (high - low))
    # relative to the largest square, not to the full picture: nothing is squashed that evaluation would not squash
    side = min(width, height)
    crop_width = min(width, max(1, round(side * math.sqrt(area * ratio))))
    crop_height = min(height, max(1, round(side * math.sqrt(area / ratio))))
    left, top = int(x * (width - crop_width + 1)), int(y * (height - crop_height + 1))
    return left, top, left + crop_width, top + crop_height


def _draw_op(magnitude_bin: int, generator: np.random.Generator) -> tuple[str, float]:
    name = RAND_AUGMENT_OPS[int(generator.integers(len(RAND_AUGMENT_OPS)))]
    negative = bool(generator.integers(2))
    magnitude = rand_augment_magnitude(name, magnitude_bin)
    signed = name in _STRONGEST or name in ("TranslateX", "TranslateY")
    return name, -magnitude if signed and negative else magnitude


def _as_pil(pixels: Picture) -> Image.Image:
    return pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _augmented(picture: Image.Image, augmentation: Augmentation) -> Image.Image:
    """Flip, then apply the operations, at the size of `picture`."""
    if augmentation.flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for name, magnitude in augmentation.ops:
        picture = _apply_op(picture, name, magnitude, picture.width / augmentation.ops_size)
    return picture


def _apply_op(picture: Image.Image, name: str, magnitude: float, zoom: float) -> Image.Image:
    """Apply one operation as torchvision's RandAugment does by default: nearest neighbour, black outside the picture.

    `zoom` is the picture's size over the size for which the magnitude was drawn. A translation is truncated to full
    pixels first, as in the teacher's view, and then scaled, so that every view shows the same part.
    """
    if name in ("TranslateX", "TranslateY"):
        shift = round(int(magnitude) * zoom)
        translate = [shift, 0] if name == "TranslateX" else [0, shift]
        return pil_ops.affine(picture, angle=0.0, translate=translate, scale=1.0, shear=[0.0, 0.0])
    if name in ("ShearX", "ShearY"):
        degrees = math.degrees(math.atan(magnitude))
        shear = [degrees, 0.0] if name == "ShearX" else [0.0, degrees]
        return pil_ops.affine(picture, angle=0.0, translate=[0, 0], scale=1.0, shear=shear, center=[0, 0])
    if name == "Rotate":
        return pil_ops.rotate(picture, magnitude)
    if name in _ENHANCE:
        return _ENHANCE[name](picture, 1.0 + magnitude)
    if name == "Sharpness":
        return _sharpened(picture, 1.0 + magnitude)
    if name == "Posterize":
        return pil_ops.posterize(picture, int(magnitude))
    if name == "Solarize":
        return pil_ops.solarize(picture, magnitude)
    if name == "AutoContrast":
        return pil_ops.autocontrast(picture)
    if name == "Equalize":
        return pil_ops.equalize(picture)
    return picture  # Identity


def _sharpened(picture: Image.Image, factor: float) -> Image.Image:
    """Return what torchvision's adjust_sharpness gives, to the bit, in a fifth of the time, because PIL's blur is slow.

    The blur is the mean of a pixel, counted 5 times, and its neighbours. The border stays as it is.
    """
    blurred = np.array(picture)
    wide = blurred.astype(np.uint16)  # [S, S, 3]
    rows = wide[:-2] + wide[1:-1] + wide[2:]
    total = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * wide[1:-1, 1:-1]
    blurred[1:-1, 1:-1] = (total + 6) // 13  # rounded; 13 is odd, so there are no halves
    return Image.blend(Image.fromarray(blurred), picture, factor)
