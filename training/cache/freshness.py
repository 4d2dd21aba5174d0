"""Whether a sidecar still describes its shard, whose pictures and captions may have been changed in place since.

A sidecar holds the checksum of each picture and the tokens of each caption. Both are compared where a sample is drawn,
and for a whole shard where scripts/cache_teacher.py decides what to make again.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from eval.base.images import picture_header
from eval.base.sentences import split_sentences
from longclip_teacher.errors import InputError
from longclip_teacher.text import CaptionTokenizer, first_sentence
from training.cache.manifest import CacheSettings, shard_number
from training.cache.sidecar import Sidecar, StoredView
from training.data.caption_sampling import sample_caption
from training.data.decoding import open_picture
from training.data.index import RawSample, ShardIndex
from training.data.randomness import sample_generator
from training.data.samples import BadSample, read_captions

__all__ = ["has_caption", "is_same_picture", "is_stale", "may_be_mirrored", "sample_captions", "stored_sentences"]


_SAMPLED = 1  # random stream beside that of the crops, whose keys are shorter


def sample_captions(raw: RawSample, settings: CacheSettings, shard: str, row: int) -> tuple[list[str], list[str], bool]:
    """Return the long and the short captions of sample `row` of a shard as its sidecar holds them, and whether the
    short ones are made from the long ones. Raise BadSample if there are none.

    If they are, each long caption in order has as many: its first sentence, or `settings.caption_views` sampled
    captions. A sampled caption is a function of the cache's seed, the shard's name, the row and its own number.
    """
    long, short = read_captions(raw)
    options = settings.captions
    if options.short == "first":
        return long, [split_sentences(caption)[0] for caption in long], True
    if options.short == "sampled":
        keys = [(number, view) for number in range(len(long)) for view in range(settings.caption_views)]
        name = settings.seed, shard_number(shard), row
        return (
            long,
            [
                sample_caption(long[number], options, sample_generator(*name, number, view, _SAMPLED))
                for number, view in keys
            ],
            True,
        )
    return long, short or [first_sentence(caption) for caption in long], not short


def stored_sentences(long: Sequence[str], settings: CacheSettings) -> list[list[str]]:
    """Return the sentences of each long caption as a sidecar holds them; nothing if it holds none."""
    return [split_sentences(caption) for caption in long] if settings.sentences else []


def is_same_picture(stored: StoredView, raw: RawSample) -> bool:
    """Return whether a sample's picture is the file from which the stored view was made."""
    return zlib.crc32(raw.image or b"") == stored.picture_crc


def may_be_mirrored(stored: StoredView, raw: RawSample) -> bool:
    """Return whether a view of a cache made by an earlier version may show the picture as it lies in its file, not
    upright. A view whose size is that of the upright picture alone does not."""
    turn, (width, height) = picture_header(raw.image or b"")
    is_swapped = turn >= 5
    return turn != 1 and not (is_swapped and width != height and stored.size == (height, width))


def has_caption(sidecar: Sidecar, row: int, key: str, caption: str, tokenizer: CaptionTokenizer) -> bool:
    """Return whether caption `row` of a sidecar has the tokens of `caption`."""
    _, tokens = sidecar.caption(row, key)
    return np.array_equal(tokenizer([caption])[0, : len(tokens)].numpy(), tokens)


def is_stale(path: Path, index: ShardIndex, shard: int, settings: CacheSettings, *, is_upright: bool) -> bool:
    """Return whether the sidecar `path` of the index's shard number `shard` must be made again. Reads the whole shard.

    is_upright  whether the sidecar was made by a version that turns pictures upright
    """
    first = int(index.shard_sizes[:shard].sum())
    read = partial(sample_captions, settings=settings, shard=index.path(shard).name)
    tokenizer = CaptionTokenizer(settings.context_length)
    try:
        sidecar = Sidecar(path)
        return any(
            _is_changed(sidecar, row, index.read(first + row), settings, read, tokenizer, is_upright)
            for row in range(sidecar.num_samples)
        )
    except InputError:
        return True  # damaged


def _is_changed(
    sidecar: Sidecar,
    row: int,
    raw: RawSample,
    settings: CacheSettings,
    read: Callable[..., tuple[list[str], list[str], bool]],
    tokenizer: CaptionTokenizer,
    is_upright: bool,
) -> bool:
    stored = sidecar.view(row, 0, raw.key)
    try:
        long, short, shorts_follow = read(raw, row=row)
        if not stored.is_valid:
            open_picture(raw.image or b"", fast=True)
            return True  # it can be read now
    except (BadSample, InputError):
        return stored.is_valid
    if not is_same_picture(stored, raw) or (not is_upright and may_be_mirrored(stored, raw)):
        return True
    if (len(long), len(short), shorts_follow) != (len(stored.long), len(stored.short), stored.shorts_follow):
        return True
    sentences = stored_sentences(long, settings)
    if list(map(len, sentences)) != list(map(len, stored.sentences)):
        return True
    rows = np.concatenate([stored.long, stored.short, *stored.sentences]).tolist()
    return not all(
        has_caption(sidecar, place, raw.key, caption, tokenizer)
        for place, caption in zip(rows, [*long, *short, *chain.from_iterable(sentences)], strict=True)
    )
