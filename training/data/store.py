"""What a store of teacher features must offer to training.

A draw is one view of one sample: its crop, its captions and the teacher's features of exactly these. Two sources give
draws: sidecars beside the shards (training/cache/reader.py) and DataCompDR's own shards (training/cache/datacompdr.py).
Shapes: B batch, V stored views, D width of the teacher's features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from longclip_teacher.ancestry import NOT_RECORDED, Ancestry
from training.data.index import RawSample
from training.data.randomness import sample_generator
from training.data.transforms import Augmentation

__all__ = [
    "StoredDraw",
    "TeacherInfo",
    "TeacherStore",
    "choose_captions",
    "choose_sentences",
    "choose_variant",
    "choose_view",
]

# random streams beside those of samples.py; captions are drawn as without a store
_CAPTION, _VIEW, _VARIANT, _SENTENCES = 1, 2, 6, 7


@dataclass(frozen=True)
class TeacherInfo:
    """What the losses need to know about a teacher that is not loaded."""

    widths: tuple[int, ...]
    """Widths of the teachers' features, side by side in one row of `sum(widths)`; each part has unit norm."""
    logit_scale: float | tuple[float, ...] | None
    """Linear logit scale, or one per teacher. None if a store does not record it (then --loss.teacher_scale must)."""
    context_length: int
    """The most tokens that the stored text features have read."""
    ancestry: Ancestry = NOT_RECORDED
    """Where the teacher's weights come from."""

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
    """Width and height of the picture that the crop belongs to, if the store knows them. The loader checks them."""
    sub: np.ndarray | None = None
    """[K, D]: features of the sentences of the long caption that `choose_sentences` draws, if the run reads them."""
    sub_captions: tuple[str, ...] = ()
    """These sentences."""


class TeacherStore(Protocol):
    """A source of stored features. Picklable, because loader workers read through it."""

    teacher_info: TeacherInfo

    def draw(self, raw: RawSample, seed: int, key: tuple[int, ...]) -> StoredDraw:
        """Return the draw of `raw` that (seed, key) decides. `key` begins with the epoch and ends with the sample's
        number.

        Raise BadSample for a sample that has no features, InputError for a damaged store.
        """
        ...


def choose_view(num_views: int, seed: int, key: tuple[int, ...]) -> int:
    """Return the stored view for (epoch, ..., number): all of them in turn over `num_views` epochs, from a random
    start."""
    return _in_turn(num_views, seed, key, _VIEW)


def choose_variant(num_variants: int, seed: int, key: tuple[int, ...]) -> int:
    """Return the stored variant of a caption for (epoch, ..., number), in turn as `choose_view` does."""
    return 0 if num_variants == 1 else _in_turn(num_variants, seed, key, _VARIANT)


def _in_turn(number: int, seed: int, key: tuple[int, ...], stream: int) -> int:
    epoch, *rest = key
    return (int(sample_generator(seed, *rest, stream).integers(number)) + epoch) % number


def choose_captions(num_long: int, num_short: int, seed: int, key: tuple[int, ...]) -> tuple[int, int]:
    """Return the long and the short caption for (epoch, ..., number), of several each; the short one may be none
    (-1)."""
    if num_long <= 1 and num_short <= 1:
        return 0, 0 if num_short else -1
    draws = sample_generator(seed, *key, _CAPTION).random(2)
    return int(draws[0] * num_long), int(draws[1] * num_short) if num_short else -1


def choose_sentences(num_sentences: int, number: int, seed: int, key: tuple[int, ...]) -> list[int]:
    """Return `number` of the sentences of a caption, from 0, in random order: each as often as the others, or once
    more."""
    order = sample_generator(seed, *key, _SENTENCES).permutation(num_sentences).tolist()
    return [order[place % num_sentences] for place in range(number)]
