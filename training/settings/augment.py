"""How training pictures are cropped and changed: the section [augment], which a teacher cache records too."""

from __future__ import annotations

from dataclasses import dataclass

from longclip_teacher.errors import InputError

__all__ = ["MAGNITUDE_BINS", "AugmentConfig"]

MAGNITUDE_BINS = 31
"""Strengths of RandAugment, from 0; torchvision's default."""


@dataclass(frozen=True)
class AugmentConfig:
    """Random crop and, optionally, flip and RandAugment."""

    scale: tuple[float, float] = (0.9, 1.0)
    """Area of the crop relative to the largest square in the picture. Keep it high: long captions describe all of
    it."""
    ratio: tuple[float, float] = (0.95, 1.05)
    """Aspect ratio (width over height) of the crop, which is then resized to a square."""
    rand_augment_ops: int = 0
    """RandAugment operations per picture (MobileCLIP: 2); 0 is off. They change colours, which captions may name."""
    rand_augment_magnitude: int = 9
    """Strength of RandAugment, 0 to 30."""
    flip: float = 0.0
    """Probability of mirroring a picture. Keep it at 0: long captions mention left and right."""
    centre: bool = False
    """Take the largest centred square without randomness, whatever scale and ratio say."""

    def __post_init__(self) -> None:
        """Raise InputError for invalid ranges."""
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise InputError(f"augment scale {self.scale}: give two numbers, 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise InputError(f"augment ratio {self.ratio}: give two numbers, 0 < low <= high")
        if self.rand_augment_ops < 0 or not 0 <= self.rand_augment_magnitude < MAGNITUDE_BINS:
            raise InputError("augment: rand_augment_ops must be 0 or more, rand_augment_magnitude 0 to 30")
        if not 0 <= self.flip <= 1:
            raise InputError(f"augment flip {self.flip}: give a probability, 0 to 1")
        if self.centre and (self.flip or self.rand_augment_ops):
            raise InputError("augment centre excludes randomness: set flip and rand_augment_ops to 0")
