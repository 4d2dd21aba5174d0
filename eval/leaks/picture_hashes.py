"""Pictures that look the same: a perceptual hash finds candidates, and small thumbnails confirm them.

The hash is imagehash's `phash` at 16 x 16: the signs, around their median, of the 256 lowest frequencies of the
brightness. It survives recompression and resizing, but pictures that share background and layout have similar hashes
too. So a candidate counts only if its 32 x 32 colour thumbnail correlates as well and differs nowhere: in each of the 8
x 8 tiles the mean difference stays small. One different object fails its tile, however large the rest.

How the thresholds were chosen. Different pictures: 1,000 collages of emoji-like stamps (256 px) against each other and
against 5,000 others (128 px), and 2,000 drawings of three shapes in a fixed frame against each other. Copies: 250 of
each of the three kinds, saved as JPEG of quality 60 or WebP of quality 50, doubled by smooth filters, halved by nearest
neighbour, and halved and saved at quality 60.

                        different pictures               copies          threshold
    hash distance       at least 42 (drawings: 18)       at most 36      40 of 256 bits
    correlation         at most 0.89 (drawings: 0.97)    at least 0.93   0.9
    worst tile          at least 42 where the hash is    at most 28      30 grey levels
                        within 48 bits

Not found: crops, and mirrored, rotated or recoloured copies.

A picture of nearly one colour has no look to compare: its hash is rounding noise. `has_detail` finds such pictures.

Shapes: N and M pictures, P matches.
"""

from __future__ import annotations

from typing import NamedTuple

import imagehash
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image

__all__ = [
    "MAX_DISTANCE",
    "MAX_TILE_DIFFERENCE",
    "MIN_CORRELATION",
    "LookAlikes",
    "PictureHash",
    "find_look_alikes",
    "has_detail",
    "hash_picture",
]

HASH_SIZE = 16
HASH_BITS = HASH_SIZE**2
THUMBNAIL_SIZE = 32
MAX_DISTANCE = 40
"""Bits, of 256, by which the hashes of two pictures that look the same may differ."""
MIN_CORRELATION = 0.9
"""Correlation of their thumbnails, each channel minus its mean."""
MAX_TILE_DIFFERENCE = 30.0
"""Mean absolute difference of the thumbnails, each channel minus its mean, in the worst tile: grey levels 0..255."""
MIN_DETAIL = 3.0
"""Standard deviation of a thumbnail around its mean colour, in grey levels 0..255, below which a picture is plain."""
_TILE = 4  # pixels of the thumbnail on a side
_BLOCK = 1024  # rows of the table of distances held at a time: 20 MB for 5,000 columns


class PictureHash(NamedTuple):
    """What is stored of a picture: its packed hash (256 bits) and its thumbnail."""

    phash: UInt8[np.ndarray, " 32"]
    thumbnail: UInt8[np.ndarray, "32 32 3"]


class LookAlikes(NamedTuple):
    """Pairs that look the same: rows of the first and of the second set, hash distance in bits, correlation of the
    thumbnails, their difference in the worst tile in grey levels."""

    rows: Int[np.ndarray, " P"]
    others: Int[np.ndarray, " P"]
    distances: Int[np.ndarray, " P"]
    correlations: Float[np.ndarray, " P"]
    differences: Float[np.ndarray, " P"]


def hash_picture(image: Image.Image) -> PictureHash:
    """Hash an RGB picture of any size and shape. Both parts see it squeezed into a square."""
    bits = imagehash.phash(image, hash_size=HASH_SIZE).hash
    thumbnail = image.resize((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.LANCZOS)
    return PictureHash(np.packbits(bits), np.asarray(thumbnail))


def has_detail(thumbnails: UInt8[np.ndarray, "N 32 32 3"]) -> Bool[np.ndarray, " N"]:
    """Return False for pictures too plain to be compared by look."""
    return _centred(thumbnails).std(axis=1) >= MIN_DETAIL


def find_look_alikes(
    phashes: UInt8[np.ndarray, "N 32"],
    thumbnails: UInt8[np.ndarray, "N 32 32 3"],
    other_phashes: UInt8[np.ndarray, "M 32"],
    other_thumbnails: UInt8[np.ndarray, "M 32 32 3"],
) -> LookAlikes:
    """Return every pair of pictures of two sets that look the same. Plain pictures are in no pair.

    All N x M distances are computed, one block of rows at a time. Bits as -1 and 1 make the Hamming distance a matrix
    product, which is exact in float32.
    """
    others = _signs(other_phashes)
    found = []
    for start in range(0, len(phashes), _BLOCK):
        products = _signs(phashes[start : start + _BLOCK]) @ others.T  # = bits equal - bits unequal
        rows, columns = np.nonzero(products >= HASH_BITS - 2 * MAX_DISTANCE)
        distances = (HASH_BITS - products[rows, columns]) / 2
        found.append((rows + start, columns, distances.astype(np.int64)))
    rows, columns, distances = (np.concatenate(parts) for parts in zip(*found, strict=True)) if found else _NOTHING
    correlations, differences = np.empty((2, len(rows)), dtype=np.float32)
    for start in range(0, len(rows), _BLOCK):
        pairs = slice(start, start + _BLOCK)
        first, second = thumbnails[rows[pairs]], other_thumbnails[columns[pairs]]
        correlations[pairs], differences[pairs] = _correlations(first, second), _tile_differences(first, second)
    same = (correlations >= MIN_CORRELATION) & (differences <= MAX_TILE_DIFFERENCE)
    return LookAlikes(rows[same], columns[same], distances[same], correlations[same], differences[same])


_NOTHING = (np.empty(0, dtype=np.int64),) * 3


def _signs(phashes: UInt8[np.ndarray, "N 32"]) -> Float[np.ndarray, "N 256"]:
    return np.unpackbits(phashes, axis=1).astype(np.float32) * 2 - 1


def _centred(thumbnails: UInt8[np.ndarray, "N 32 32 3"]) -> Float[np.ndarray, "N 3072"]:
    colours = thumbnails.astype(np.float32)
    return (colours - colours.mean(axis=(1, 2), keepdims=True)).reshape(len(colours), 3 * THUMBNAIL_SIZE**2)


def _correlations(
    thumbnails: UInt8[np.ndarray, "P 32 32 3"], others: UInt8[np.ndarray, "P 32 32 3"]
) -> Float[np.ndarray, " P"]:
    """Return the correlation of each pair; 0 if a picture is plain."""
    first, second = _centred(thumbnails), _centred(others)
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    detailed = has_detail(thumbnails) & has_detail(others)
    return np.where(detailed, (first * second).sum(axis=1) / np.maximum(lengths, 1e-9), 0)


def _tile_differences(
    thumbnails: UInt8[np.ndarray, "P 32 32 3"], others: UInt8[np.ndarray, "P 32 32 3"]
) -> Float[np.ndarray, " P"]:
    """Return the difference of each pair in its worst tile."""
    tiles = THUMBNAIL_SIZE // _TILE
    differences = np.abs(_centred(thumbnails) - _centred(others)).reshape(-1, tiles, _TILE, tiles, _TILE, 3)
    return differences.mean(axis=(2, 4, 5)).reshape(-1, tiles * tiles).max(axis=1)
