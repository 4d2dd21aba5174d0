"""From a decoded picture to what each model sees: one crop, rendered at one or two resolutions.

An augmentation is drawn first, as plain data, and applied after: crop, resize, flip, RandAugment, in this order, which
is DataCompDR's (MobileCLIP, section 3.2). The same data gives the same pixels, so the student and the teacher see the
same picture, and an augmentation can be stored and replayed. Randomness is keyed by (seed, epoch, sample).

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
from training.data.pictures import Interpolation, Picture, pixels_of_pil, resized_crops

__all__ = [
    "RAND_AUGMENT_OPS",
    "AugmentConfig",
    "Augmentation",
    "ViewSpec",
    "centre_crop",
    "draw_augmentation",
    "rand_augment_magnitude",
    "render",
    "sample_generator",
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

_MAGNITUDE_BINS = 31
_STRONGEST = {"ShearX": 0.3, "ShearY": 0.3, "Rotate": 30.0} | dict.fromkeys(
    ("Brightness", "Color", "Contrast", "Sharpness"), 0.9
)  # at the last bin, and either sign
_MAX_MAGNITUDE = 1e4  # of stored operations: far above what is ever drawn
_ENHANCE = {
    "Brightness": pil_ops.adjust_brightness,
    "Color": pil_ops.adjust_saturation,
    "Contrast": pil_ops.adjust_contrast,
}


@dataclass(frozen=True)
class ViewSpec:
    """What one model wants to see: a square of `image_size` pixels. Its normalisation happens on the device."""

    image_size: int
    interpolation: Interpolation = "bicubic"


@dataclass(frozen=True)
class AugmentConfig:
    """Random crop and, if asked for, flip and RandAugment."""

    scale: tuple[float, float] = (0.9, 1.0)
    """Area of the crop over the largest square in the picture. Long captions speak of the whole: keep it high."""
    ratio: tuple[float, float] = (0.95, 1.05)
    """Width over height of the crop, which is then resized to a square."""
    rand_augment_ops: int = 0
    """RandAugment operations a picture (MobileCLIP: 2); 0 is off. They change colours, which captions may name."""
    rand_augment_magnitude: int = 9
    """Strength of RandAugment, 0 to 30."""
    flip: float = 0.0
    """Probability that a picture is mirrored. Long captions say left and right: keep it at 0."""
    centre: bool = False
    """No randomness: the largest centred square, whatever scale and ratio say."""

    def __post_init__(self) -> None:
        """Raise InputError for ranges that mean nothing."""
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise InputError(f"augment scale {self.scale}: give two numbers, 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise InputError(f"augment ratio {self.ratio}: give two numbers, 0 < low <= high")
        if self.rand_augment_ops < 0 or not 0 <= self.rand_augment_magnitude < _MAGNITUDE_BINS:
            raise InputError("augment: rand_augment_ops must be 0 or more, rand_augment_magnitude 0 to 30")
        if not 0 <= self.flip <= 1:
            raise InputError(f"augment flip {self.flip}: a probability, 0 to 1")
        if self.centre and (self.flip or self.rand_augment_ops):
            raise InputError("augment centre is no randomness: set flip and rand_augment_ops to 0 with it")


@dataclass(frozen=True)
class Augmentation:
    """One draw, as plain data: enough to render the same pixels again from the same decoded picture."""

    box: tuple[int, int, int, int]
    """Left, top, right, bottom of the crop in pixels of the decoded picture."""
    ops: tuple[tuple[str, float], ...] = ()
    """RandAugment operations, first to last: name of RAND_AUGMENT_OPS and signed magnitude in torchvision's unit, which
    for TranslateX and TranslateY is pixels of a view of `ops_size`, cut to whole ones."""
    ops_size: int = 224
    """The image size for which `ops` were drawn (DataCompDR: 224)."""
    flip: bool = False
    """Mirrored left to right, before `ops`."""

    def __post_init__(self) -> None:
        """Raise InputError for operations that cannot be applied."""
        if self.ops_size < 1:
            raise InputError(f"augmentation: ops_size {self.ops_size} is no image size")
        for name, magnitude in self.ops:
            if name not in RAND_AUGMENT_OPS:
                raise InputError(f"augmentation: {name!r} is no RandAugment operation")
            low, high = (1, 8) if name == "Posterize" else (-_MAX_MAGNITUDE, _MAX_MAGNITUDE)
            if not low <= magnitude <= high:  # refuses nan too
                raise InputError(f"augmentation: {name} cannot have the magnitude {magnitude}")


def sample_generator(*key: int) -> np.random.Generator:
    """Random numbers that depend on `key`, for example (seed, epoch, index), and on nothing else."""
    return np.random.default_rng(key)


def draw_augmentation(size: tuple[int, int], config: AugmentConfig, generator: np.random.Generator) -> Augmentation:
    """A random resized crop of a picture of `size` (width, height), and flip and RandAugment where they are on.

    The crop is drawn first: it is the same whatever else is on.
    """
    if config.centre:
        return centre_crop(size)
    box = _draw_box(size, config, generator)
    flip = bool(config.flip) and bool(generator.random() < config.flip)
    drawn = [_draw_op(config.rand_augment_magnitude, generator) for _ in range(config.rand_augment_ops)]
    return Augmentation(box, tuple(drawn), flip=flip)


def centre_crop(size: tuple[int, int]) -> Augmentation:
    """No randomness: the largest centred square, as in CLIP's preprocessing for evaluation."""
    width, height = size
    side = min(size)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return Augmentation((left, top, left + side, top + side))


@functools.cache
def rand_augment_magnitude(name: str, magnitude_bin: int, image_size: int = Augmentation.ops_size) -> float:
    """Unsigned magnitude of an operation at one of the 31 bins, as torchvision's RandAugment has it at `image_size`."""
    if name == "Posterize":
        return 8.0 - round(magnitude_bin * 4 / (_MAGNITUDE_BINS - 1))  # bits that are kept
    if name == "Solarize":
        bins = torch.linspace(255.0, 0.0, _MAGNITUDE_BINS)
    elif name in ("TranslateX", "TranslateY"):
        bins = torch.linspace(0.0, 150.0 / 331.0 * image_size, _MAGNITUDE_BINS)
    else:
        bins = torch.linspace(0.0, _STRONGEST.get(name, 0.0), _MAGNITUDE_BINS)
    return float(bins[magnitude_bin])


def render(picture: Picture, augmentation: Augmentation, views: Sequence[ViewSpec]) -> list[Tensor]:
    """The augmented picture at each view's resolution: uint8 [3, S, S], contiguous.

    Rendered from the two forms of Picture (training.data.pictures), pixels differ by 2 levels at most without
    RandAugment. Its operations are PIL's in both; with them the mean difference stays below 1 level (Contrast rounds
    the mean to one), while a pixel at a threshold of Solarize, Posterize or Equalize may land on its other side.

    Raises InputError for a crop that does not lie inside the picture.
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
    # of the largest square, not of the whole picture: nothing is squashed that evaluation, which crops a square, is not
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
    """Flip, then the operations, at the size of `picture`."""
    if augmentation.flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for name, magnitude in augmentation.ops:
        picture = _apply_op(picture, name, magnitude, picture.width / augmentation.ops_size)
    return picture


def _apply_op(picture: Image.Image, name: str, magnitude: float, zoom: float) -> Image.Image:
    """One operation as torchvision's RandAugment applies it by default: nearest neighbour, black where nothing is.

    `zoom` is the picture's size over that for which the magnitude was drawn. The pixels of a translation are cut to
    whole ones first, as the teacher's view had them, and then scaled, so that every view shows the same part.
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
    """What torchvision's adjust_sharpness gives, to the bit, in a fifth of the time: PIL's own blur is slow.

    The blur is the mean of a pixel and its neighbours, the pixel counted 5 times; the border stays as it is.
    """
    blurred = np.array(picture)
    wide = blurred.astype(np.uint16)  # [S, S, 3]
    rows = wide[:-2] + wide[1:-1] + wide[2:]
    total = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * wide[1:-1, 1:-1]
    blurred[1:-1, 1:-1] = (total + 6) // 13  # rounded; 13 is odd, so there are no halves
    return Image.blend(Image.fromarray(blurred), picture, factor)
