"""ImageNet and the test sets made for its classifiers: class folders in class order, and numbers of pictures.

Class numbers are a set's own, 0 to C - 1 in the order of ImageNet's 1000 class numbers. ImageNet-A and -R have 200 of
these classes and are scored among those 200 alone. The lists of synsets and of the 200 classes come from timm, the
class names from open_clip.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from open_clip import IMAGENET_CLASSNAMES
from timm.data import ImageNetInfo

__all__ = ["IMAGENET_SETS", "ImageNetSet", "imagenet_synsets"]


@dataclass(frozen=True)
class ImageNetSet:
    """A test set in ImageNet's classes."""

    title: str
    num_images: int
    indices_file: str | None = None
    """timm's list of the set's ImageNet classes; None: all 1000."""
    numbered: bool = False
    """Whether its folders are named by class number (0, 1, ... 999) instead of by synset (n01440764, ...)."""

    def imagenet_numbers(self) -> list[int]:
        """Return the ImageNet class number of each of its classes."""
        return list(range(len(imagenet_synsets()))) if self.indices_file is None else _indices(self.indices_file)

    def folders(self) -> list[str]:
        """Return the folder of each class."""
        synsets = imagenet_synsets()
        return [str(number) if self.numbered else synsets[number] for number in self.imagenet_numbers()]

    def classnames(self) -> list[str]:
        """Return the name of each class."""
        return [IMAGENET_CLASSNAMES[number] for number in self.imagenet_numbers()]


IMAGENET_SETS = {
    "imagenet": ImageNetSet("ImageNet's validation set", 50_000),  # Russakovsky et al. 2015
    "imagenet_v2": ImageNetSet("ImageNet-V2", 10_000, numbered=True),  # Recht et al. 2019, each of its three versions
    "imagenet_a": ImageNetSet("ImageNet-A", 7_500, "imagenet_a_indices.txt"),  # Hendrycks et al. 2021
    "imagenet_r": ImageNetSet("ImageNet-R", 30_000, "imagenet_r_indices.txt"),  # Hendrycks et al. 2021
    "imagenet_sketch": ImageNetSet("ImageNet-Sketch", 50_889),  # Wang et al. 2019
}


@cache
def imagenet_synsets() -> list[str]:
    """Return the folder names of ImageNet's classes by class number: n01440764 (tench) is class 0."""
    return ImageNetInfo().label_names()


@cache
def _indices(name: str) -> list[int]:
    text = (files("timm.data") / "_info" / name).read_text(encoding="ascii")
    return [int(line) for line in text.split()]
