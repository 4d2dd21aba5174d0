"""One sample from its tar members to pixels and captions, and samples to a batch.

Shapes: B batch, S image size, L tokens of the batch's longest caption.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.images import open_image
from longclip_teacher.errors import InputError
from longclip_teacher.text import CaptionTokenizer, first_sentence, trim
from training.shard_index import RawSample
from training.transforms import AugmentConfig, ViewSpec, centre_crop, draw_augmentation, render, sample_generator

__all__ = ["BadSample", "Batch", "Sample", "SampleDecoder", "collate", "read_captions"]

_CROP, _CAPTION = 0, 1  # separate streams of random numbers, so that the crop does not depend on the captions


class BadSample(Exception):
    """A sample that cannot be used; the message is the cause under which it is counted."""


@dataclass(frozen=True)
class Sample:
    """A decoded sample: one uint8 [S, S, 3] array a view and its two captions."""

    key: str
    pictures: list[np.ndarray]
    caption_long: str
    caption_short: str


@dataclass(frozen=True)
class Batch:
    """What a training step reads. Pictures are not yet normalised: that happens on the device."""

    images: Tensor  # uint8 [B, 3, S, S]
    teacher_images: Tensor | None  # uint8 [B, 3, St, St]; None where one view was asked for
    long_tokens: Tensor  # int64 [B, L]
    short_tokens: Tensor  # int64 [B, L']
    keys: list[str]
    skipped: dict[str, int]  # samples that could not be decoded and were replaced, by cause

    def to(self, device: str | torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        teacher_images = self.teacher_images
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            teacher_images=None if teacher_images is None else teacher_images.to(device, non_blocking=True),
            long_tokens=self.long_tokens.to(device, non_blocking=True),
            short_tokens=self.short_tokens.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class SampleDecoder:
    """Members to pictures and captions; everything random depends on `seed` and the sample's key numbers alone."""

    views: tuple[ViewSpec, ...]
    augment: AugmentConfig | None
    seed: int

    def decode(self, raw: RawSample, *key: int) -> Sample:
        """Decode `raw`; `key` is (epoch, index) or whatever else tells this draw from others. Raises BadSample."""
        long_captions, short_captions = read_captions(raw)
        if raw.image is None:
            raise BadSample("no picture, or one of more than 64 MB")
        try:
            picture = open_image(raw.image)
        except InputError as error:  # "picture: CAUSE (details)"
            raise BadSample(str(error).removeprefix("picture: ").partition(" (")[0]) from None
        if self.augment is None:
            augmentation = centre_crop(picture.size)
        else:
            generator = sample_generator(self.seed, *key, _CROP)
            augmentation = draw_augmentation(picture.size, self.augment, generator)
        caption_long, caption_short = long_captions[0], (short_captions or [""])[0]
        if len(long_captions) > 1 or len(short_captions) > 1:
            draws = sample_generator(self.seed, *key, _CAPTION).random(2)
            caption_long = long_captions[int(draws[0] * len(long_captions))]
            caption_short = short_captions[int(draws[1] * len(short_captions))] if short_captions else ""
        caption_short = caption_short or first_sentence(caption_long)
        return Sample(raw.key, render(picture, augmentation, self.views), caption_long, caption_short)


def read_captions(raw: RawSample) -> tuple[list[str], list[str]]:
    """Long and short captions of a sample; the short list may be empty.

    From the json's `caption_long` and `caption_short` (each a string or a list), or img2dataset's `caption`; else from
    the txt, which is one caption. Raises BadSample.
    """
    long: list[str] = []
    short: list[str] = []
    if raw.json is not None:
        try:
            data = json.loads(raw.json)
        except (ValueError, RecursionError):
            raise BadSample("json is damaged") from None
        if not isinstance(data, dict):
            raise BadSample("json is no object")
        short = _texts(data.get("caption_short"))
        long = _texts(data.get("caption_long")) or _texts(data.get("caption"))
    if not long and raw.txt is not None:
        try:
            long = _texts(raw.txt.decode("utf-8"))
        except UnicodeDecodeError:
            raise BadSample("txt is not UTF-8") from None
    if not long and not short:
        raise BadSample("no caption")
    return long or short, short


def _texts(value: Any) -> list[str]:
    """The captions in a json value that should be a string or a list of them, empty ones left out."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(text, str) for text in values):
        raise BadSample("caption is no text")
    return [text.strip() for text in values if text.strip()]


def collate(
    samples: Sequence[Sample], tokenizer: CaptionTokenizer, context_length: int, skipped: dict[str, int]
) -> Batch:
    """Samples to a batch: pictures stacked, captions tokenised and trimmed to the batch's longest."""
    stacks = [
        torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()  # [B, S, S, 3] -> [B, 3, S, S]
        for pictures in zip(*(sample.pictures for sample in samples), strict=True)
    ]
    return Batch(
        images=stacks[0],
        teacher_images=stacks[1] if len(stacks) > 1 else None,
        long_tokens=trim(tokenizer([sample.caption_long for sample in samples], context_length)).contiguous(),
        short_tokens=trim(tokenizer([sample.caption_short for sample in samples], context_length)).contiguous(),
        keys=[sample.key for sample in samples],
        skipped=skipped,
    )
