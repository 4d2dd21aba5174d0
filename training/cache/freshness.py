"""Whether a sidecar still describes its shard, whose pictures and captions may have been changed in place since.

A sidecar holds the checksum of each picture and the tokens of each caption. Both are compared where a sample is drawn,
and for a whole shard where scripts/cache_teacher.py decides what to make again.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np

from eval.base.images import picture_header
from longclip_teacher.errors import InputError
from longclip_teacher.text import CaptionTokenizer, first_sentence
from training.cache.sidecar import Sidecar, StoredView
from training.data.decoding import open_picture
from training.data.index import RawSample, ShardIndex
from training.data.samples import BadSample, read_captions

__all__ = ["has_caption", "is_same_picture", "is_stale", "may_be_mirrored", "sample_captions"]


def sample_captions(raw: RawSample) -> tuple[list[str], list[str], bool]:
    """Return the long and the short captions of a sample as a sidecar holds them, and whether the short ones are the
    first sentences of the long ones. Raise BadSample if there are none."""
    long, short = read_captions(raw)
    return long, short or [first_sentence(caption) for caption in long], not short


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


def is_stale(path: Path, index: ShardIndex, shard: int, context_length: int, *, is_upright: bool) -> bool:
    """Return whether the sidecar `path` of the index's shard number `shard` must be made again. Reads the whole shard.

    is_upright  whether the sidecar was made by a version that turns pictures upright
    """
    tokenizer, first = CaptionTokenizer(context_length), int(index.shard_sizes[:shard].sum())
    try:
        sidecar = Sidecar(path)
        return any(
            _is_changed(sidecar, row, index.read(first + row), tokenizer, is_upright)
            for row in range(sidecar.num_samples)
        )
    except InputError:
        return True  # damaged


def _is_changed(sidecar: Sidecar, row: int, raw: RawSample, tokenizer: CaptionTokenizer, is_upright: bool) -> bool:
    stored = sidecar.view(row, 0, raw.key)
    try:
        long, short, shorts_follow = sample_captions(raw)
        if not stored.is_valid:
            open_picture(raw.image or b"", fast=True)
            return True  # it can be read now
    except (BadSample, InputError):
        return stored.is_valid
    if not is_same_picture(stored, raw) or (not is_upright and may_be_mirrored(stored, raw)):
        return True
    if (len(long), len(short), shorts_follow) != (len(stored.long), len(stored.short), stored.shorts_follow):
        return True
    rows = [*stored.long.tolist(), *stored.short.tolist()]
    return not all(
        has_caption(sidecar, place, raw.key, caption, tokenizer)
        for place, caption in zip(rows, [*long, *short], strict=True)
    )
