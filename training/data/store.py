"""What stored teacher features are to training: the draw of one sample, and where it comes from.

Two sources keep this promise: sidecars beside the shards (teacher_cache.py) and DataCompDR's own shards
(datacompdr.py). Shapes: B batch, V stored views, D width of the teacher's features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from training.data.index import RawSample
from training.data.transforms import Augmentation, sample_generator

__all__ = ["StoredDraw", "TeacherFacts", "TeacherStore", "choose_captions", "choose_view"]

_VIEW, _CAPTION = 2, 1  # streams of random numbers beside the crop's (0); captions are drawn as without a store


@dataclass(frozen=True)
class TeacherFacts:
    """What the losses must know of a teacher that is not there."""

    widths: tuple[int, ...]
    """Widths of the teachers' features, side by side in one row of `sum(widths)`; each part has unit norm."""
    logit_scale: float | tuple[float, ...] | None
    """Linear logit scale, or one for each; None where a store does not say (--loss.teacher_scale must)."""
    context_length: int
    """Tokens that the stored text features have read at most."""

    @property
    def embed_dim(self) -> int:
        """Width D of a row."""
        return sum(self.widths)


@dataclass(frozen=True)
class StoredDraw:
    """One draw of one sample: the crop to replay, the captions, and the teacher's features of exactly these."""

    augmentation: Augmentation
    caption_long: str | np.ndarray
    """Text, or token ids from SOT to EOT (uint16)."""
    caption_short: str | np.ndarray
    image: np.ndarray  # [D] float16 or float32
    long: np.ndarray  # [D]
    short: np.ndarray  # [D]
    picture_size: tuple[int, int] | None = None
    """Width and height of the picture that the crop belongs to, where the store knows them; the loader checks."""


class TeacherStore(Protocol):
    """A source of stored features. Picklable: loader workers read through it."""

    facts: TeacherFacts

    def draw(self, raw: RawSample, seed: int, key: tuple[int, ...]) -> StoredDraw:
        """The draw of `raw` that (seed, key) decides; `key` ends in the sample's number and begins with the epoch.

        Raises BadSample for a sample that has no features, InputError for a damaged store.
        """
        ...


def choose_view(num_views: int, seed: int, key: tuple[int, ...]) -> int:
    """Which stored view (epoch, ..., number) sees: all of them in turn over `num_views` epochs, from a random start."""
    epoch, *rest = key
    return (int(sample_generator(seed, *rest, _VIEW).integers(num_views)) + epoch) % num_views


def choose_captions(num_long: int, num_short: int, seed: int, key: tuple[int, ...]) -> tuple[int, int]:
    """Which of several long and of several short captions (epoch, ..., number) sees; the short one may be none (-1)."""
    if num_long <= 1 and num_short <= 1:
        return 0, 0 if num_short else -1
    draws = sample_generator(seed, *key, _CAPTION).random(2)
    return int(draws[0] * num_long), int(draws[1] * num_short) if num_short else -1
