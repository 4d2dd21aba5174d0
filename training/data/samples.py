"""One sample from its tar members to pixels and captions, and samples to a batch.

Shapes: B batch, S image size, L tokens of the batch's longest caption, K sub-captions, D width of stored teacher
features.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from eval.base.foreign_text import HALVES, whole_characters
from eval.base.sentences import split_sentences
from longclip_teacher.errors import InputError
from longclip_teacher.text import CaptionTokenizer, first_sentence, trim
from training.data.caption_sampling import padded_in_front, sample_caption, shifts
from training.data.decoding import open_picture, picture_size
from training.data.index import RawSample, Stage
from training.data.randomness import sample_generator
from training.data.store import StoredDraw, TeacherStore, choose_captions, choose_sentences
from training.data.transforms import Augmentation, AugmentConfig, ViewSpec, draw_augmentation, render
from training.settings.captions import NO_SAMPLING, CaptionOptions

__all__ = ["BadSample", "Batch", "Sample", "SampleDecoder", "Tokenization", "collate", "read_captions"]

# separate random streams, so that none of these draws depends on another (store.py has 1, 2, 6 and 7)
_CROP, _SHORT, _LONG, _SHIFT = 0, 3, 4, 5


Caption: TypeAlias = str | np.ndarray
"""Text, or token ids from SOT to EOT."""


class BadSample(Exception):
    """A sample that cannot be used. The message is the cause under which it is counted."""


@dataclass(frozen=True)
class Sample:
    """A decoded sample: one uint8 [3, S, S] tensor per view, its two captions, and stored teacher features if any."""

    key: str
    draw: tuple[int, ...]  # what tells this draw from others, see `SampleDecoder.decode`
    pictures: list[Tensor]  # none in the text stage
    captions: tuple[Caption, Caption] | None  # long and short; None in the image stage
    shifts: tuple[float | None, float | None]  # numbers from 0 to 1 that decide the shifts of both; None: no shift
    teacher: dict[str, np.ndarray] | None  # image, long, short [D] and sub [K, D], as far as the run uses them
    sub_captions: tuple[str, ...] = ()  # sentences of the long caption


@dataclass(frozen=True)
class Batch:
    """The input of a training step. Pictures are not normalised yet; the device does that.

    Tokens stay on the host, where towers measure and sort captions without waiting for the device. Each tower sends the
    tokens that it reads.

    The tower that a stage does not train gets empty tensors: images [B, 3, 0, 0], or tokens [B, 0].
    """

    images: Tensor  # uint8 [B, 3, S, S]
    teacher_images: tuple[Tensor, ...]  # uint8 [B, 3, S, S], each view after the first at its own size
    long_tokens: Tensor  # int64 [B, L]
    short_tokens: Tensor  # int64 [B, L']
    keys: list[str]
    draws: list[tuple[int, ...]]  # (epoch, index) or whatever else keys the random numbers of each sample
    skipped: dict[str, int]  # samples that could not be decoded and were replaced, by cause
    teacher: dict[str, Tensor] | None = (
        None  # stored features by name, as far as the run uses them: [B, D], sub [B, K, D]
    )
    erased: Tensor | None = None  # uint8 [B, 3, S, S]: `images` with rectangles erased, for the trained model alone
    long_shift: Tensor | None = None  # int64 [B]: how far the student's positions of the long captions move
    short_shift: Tensor | None = None
    hidden: Tensor | None = None  # bool [B, P, P]: squares of the pictures that masked_fd hides
    sub_tokens: Tensor | None = None  # int64 [B, K, L'']: single sentences of the long captions

    @property
    def shown(self) -> Tensor:
        """The pictures as the trained model sees them; `images` and `teacher_images` are always complete."""
        return self.images if self.erased is None else self.erased

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """What the trained model reads: pictures, long and short tokens, their shifts, what is hidden, sub-captions."""
        captions = self.long_tokens, self.short_tokens, self.long_shift, self.short_shift
        return self.shown, *captions, self.hidden, self.sub_tokens

    def to(self, device: str | torch.device) -> Batch:
        """Return the same batch with its tensors on `device`, except the tokens."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True), with_tokens=False)

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory, from which a GPU copies while it works (DataLoader calls this)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def rows(self, rows: slice) -> Batch:
        """Return some samples of the batch, without its `skipped` counts."""
        return replace(self._map(lambda tensor: tensor[rows]), keys=self.keys[rows], draws=self.draws[rows], skipped={})

    def _map(self, function: Callable[[Tensor], Tensor], *, with_tokens: bool = True) -> Batch:
        of_tokens = function if with_tokens else lambda tokens: tokens
        return replace(
            self,
            images=function(self.images),
            teacher_images=tuple(function(view) for view in self.teacher_images),
            long_tokens=of_tokens(self.long_tokens),
            short_tokens=of_tokens(self.short_tokens),
            teacher=None if self.teacher is None else {name: function(value) for name, value in self.teacher.items()},
            erased=None if self.erased is None else function(self.erased),
            long_shift=None if self.long_shift is None else function(self.long_shift),
            short_shift=None if self.short_shift is None else function(self.short_shift),
            hidden=None if self.hidden is None else function(self.hidden),
            sub_tokens=None if self.sub_tokens is None else of_tokens(self.sub_tokens),
        )


@dataclass(frozen=True)
class SampleDecoder:
    """Decode members to pictures and captions. All randomness depends only on `seed` and the sample's key numbers.

    With a `store`, crop and captions are those whose teacher features are stored, and `augment` is unused.
    `stored_features` False leaves the features out, for a teacher that runs on the same crops. Only the members that
    `stage` needs are decoded and required; a stage does not change any draw.
    """

    views: tuple[ViewSpec, ...]
    augment: AugmentConfig
    seed: int
    fast_decode: bool = True
    store: TeacherStore | None = None
    stored_features: bool = True
    stage: Stage = "both"
    sub_captions: int = 0
    """K, the sentences of the long caption that are drawn as sub-captions."""
    captions: CaptionOptions = NO_SAMPLING
    """How captions are sampled and shifted. A store's short captions are sampled already, and are read unless they
    learn the feature of the full caption."""

    def decode(self, raw: RawSample, *key: int) -> Sample:
        """Decode `raw`. `key` is (epoch, index) or whatever else distinguishes this draw from others. Raise
        BadSample."""
        draw = self.store.draw(raw, self.seed, key) if self.store is not None else None
        captions: tuple[Caption, Caption] | None = None
        if self.stage != "image":
            if draw is None or self.captions.target == "full":
                captions = self._captions(raw, key)
            else:
                captions = draw.caption_long, draw.caption_short
        pictures = self._pictures(raw, draw, key) if self.stage != "text" else []
        teacher = _features(draw, self.stage) if draw is not None and self.stored_features else None
        sub_captions = self._sub_captions(raw, key) if draw is None or draw.sub is None else draw.sub_captions
        return Sample(raw.key, key, pictures, captions, self._shifts(key), teacher, sub_captions)

    def _pictures(self, raw: RawSample, draw: StoredDraw | None, key: tuple[int, ...]) -> list[Tensor]:
        if raw.image is None:
            raise BadSample("no picture, or one of more than 64 MB")
        try:
            picture = open_picture(raw.image, self.fast_decode)
        except InputError as error:  # "picture: CAUSE (details)"
            raise BadSample(str(error).removeprefix("picture: ").partition(" (")[0]) from None
        size = picture_size(picture)
        if draw is not None and draw.picture_size not in (None, size):
            raise InputError(
                f"sample {raw.key}: the picture has {size} pixels, but had {draw.picture_size} when the teacher "
                "cache was made: make the cache again"
            )
        augmentation = self._augmentation(size, key) if draw is None else draw.augmentation
        try:
            return render(picture, augmentation, self.views)
        except InputError:
            raise BadSample("stored crop outside the picture") from None

    def _captions(self, raw: RawSample, key: tuple[int, ...]) -> tuple[str, str]:
        long, short = read_captions(raw)
        chosen, chosen_short = choose_captions(len(long), len(short), self.seed, key)
        caption = long[chosen]
        given = first_sentence(caption) if chosen_short < 0 else short[chosen_short]
        if self.captions.short == "sampled":
            given = sample_caption(caption, self.captions, sample_generator(self.seed, *key, _SHORT))
        elif self.captions.short == "first":
            given = split_sentences(caption)[0]
        if self._samples_long(key):
            caption = sample_caption(caption, self.captions, sample_generator(self.seed, *key, _LONG))
        return caption, given

    def _sub_captions(self, raw: RawSample, key: tuple[int, ...]) -> tuple[str, ...]:
        if not self.sub_captions:
            return ()
        long, short = read_captions(raw)
        caption = long[choose_captions(len(long), len(short), self.seed, key)[0]]
        sentences = split_sentences(caption)
        return tuple(sentences[i] for i in choose_sentences(len(sentences), self.sub_captions, self.seed, key))

    def _shifts(self, key: tuple[int, ...]) -> tuple[float | None, float | None]:
        if not self.captions.max_shift:
            return None, None
        long, short = sample_generator(self.seed, *key, _SHIFT).random(2).tolist()
        return long if self._samples_long(key) else None, short

    def _samples_long(self, key: tuple[int, ...]) -> bool:
        first = self.captions.long_from_epoch
        return first is not None and key[0] >= first

    def _augmentation(self, size: tuple[int, int], key: tuple[int, ...]) -> Augmentation:
        return draw_augmentation(size, self.augment, sample_generator(self.seed, *key, _CROP))


def _features(draw: StoredDraw, stage: Stage) -> dict[str, np.ndarray]:
    image, texts = {"image": draw.image}, {"long": draw.long, "short": draw.short}
    if draw.sub is not None:
        texts["sub"] = draw.sub
    return image if stage == "image" else texts if stage == "text" else image | texts


def read_captions(raw: RawSample) -> tuple[list[str], list[str]]:
    """Return the long and short captions of a sample. The short list may be empty.

    They come from the json's `caption_long` and `caption_short` (each a string or a list), or img2dataset's `caption`,
    or else from the txt, which is one caption. Raise BadSample if there are none to use.
    """
    long: list[str] = []
    short: list[str] = []
    if raw.json is not None:
        try:
            data = json.loads(raw.json)
        except (ValueError, RecursionError):
            raise BadSample("json is damaged") from None
        if not isinstance(data, dict):
            raise BadSample("json is not an object")
        short = _texts(data.get("caption_short"))
        long = _texts(data.get("caption_long")) or _texts(data.get("caption"))
    if not long and raw.txt is not None:
        try:
            long = _texts(raw.txt.decode("utf-8", HALVES))
        except UnicodeDecodeError:
            raise BadSample("txt is not UTF-8") from None
    if not long and not short:
        raise BadSample("no caption")
    return long or short, short


def _texts(value: Any) -> list[str]:
    """Return the non-empty captions in a json value that should be a string or a list of strings.

    Half an emoji becomes U+FFFD.
    """
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(text, str) for text in values):
        raise BadSample("caption is not text")
    return [whole_characters(text).strip() for text in values if text.strip()]


@dataclass(frozen=True)
class Tokenization:
    """How the captions of a batch become token ids, and how far they are shifted."""

    tokenizer: CaptionTokenizer
    context_length: int
    """Positions of the longest tower that reads the captions."""
    trim_captions: bool = True
    """Drop the columns that are padding in every caption."""
    max_shift: int = 0
    """Largest shift, in tokens."""
    shifted_length: int = 0
    """Positions of the trained model, which a shifted caption must not leave."""
    pads_in_front: bool = False
    """Shift by padding tokens in front of the text, for a Long-CLIP. Otherwise the batch says how far the model is to
    shift the positions of each caption."""

    def __call__(self, captions: Sequence[Caption], draws: Sequence[float | None]) -> tuple[Tensor, Tensor | None]:
        """Return token ids [B, L] and shifts [B], if the model itself is to shift. `draws` decide the shifts."""
        tokens = self._padded(captions)
        shift = None
        decisive = [draw for draw in draws if draw is not None]
        if decisive:
            shift = shifts(tokens, decisive, self.max_shift, self.shifted_length)
            if self.pads_in_front:
                tokens, shift = padded_in_front(tokens, shift), None
        return trim(tokens).contiguous() if self.trim_captions else tokens, shift

    def _padded(self, captions: Sequence[Caption]) -> Tensor:
        """Return token ids [B, context_length] from texts or stored ids."""
        texts = [caption for caption in captions if isinstance(caption, str)]
        if len(texts) == len(captions):
            return self.tokenizer(texts, self.context_length)
        rows = torch.zeros(len(captions), self.context_length, dtype=torch.int64)
        for row, caption in zip(rows, captions, strict=True):
            row[: len(caption)] = torch.from_numpy(np.asarray(caption, dtype=np.int64))
        return rows


def collate(samples: Sequence[Sample], tokenization: Tokenization, skipped: dict[str, int]) -> Batch:
    """Combine samples of one stage into a batch: stack pictures and tokenise captions."""
    stacks = [torch.stack(pictures) for pictures in zip(*(sample.pictures for sample in samples), strict=True)]
    images, *teacher_images = stacks or [torch.empty(len(samples), 3, 0, 0, dtype=torch.uint8)]
    captions = [sample.captions for sample in samples if sample.captions is not None]
    draws = zip(*(sample.shifts for sample in samples), strict=True)
    long: tuple[Tensor, Tensor | None] = (torch.empty(len(samples), 0, dtype=torch.int64), None)
    short = long
    if captions:
        long, short = (tokenization(*both) for both in zip(zip(*captions, strict=True), draws, strict=True))
    sentences = [sentence for sample in samples for sentence in sample.sub_captions]
    sub = tokenization(sentences, ())[0].unflatten(0, (len(samples), -1)) if sentences else None
    stored = [sample.teacher for sample in samples if sample.teacher is not None]
    teacher = (
        {name: torch.from_numpy(np.stack([row[name] for row in stored])) for name in stored[0]} if stored else None
    )
    return Batch(
        images=images,
        teacher_images=tuple(teacher_images),
        long_tokens=long[0],
        short_tokens=short[0],
        keys=[sample.key for sample in samples],
        draws=[sample.draw for sample in samples],
        skipped=skipped,
        teacher=teacher,
        long_shift=long[1],
        short_shift=short[1],
        sub_tokens=sub,
    )
