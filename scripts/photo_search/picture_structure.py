"""Pictures whose structure alone would cost a decoder seconds: found from their markers, before anything is decoded.

A progressive JPEG goes over the whole picture once per scan, and a few bytes make a scan. The readers of JPEG, PNG and
GIF take the parts of a header one at a time in Python, and some keep each of them. Tags of a TIFF, or of EXIF data, may
all point to the same bytes.
"""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Iterator
from typing import Literal, TypeAlias

from photo_search.errors import InputError

__all__ = ["check_structure", "has_hostile_tags"]

Data: TypeAlias = bytes | mmap.mmap

MOST_SCANS = 100
SCANS_OF_LARGEST = (
    10  # encoders write about 10 scans; a picture of the most pixels may have as many, a smaller one more
)
MOST_PARTS = 50_000  # a part costs its reader about 3 microseconds and 100 bytes
MOST_GAP = 1 << 20  # bytes between the segments of a JPEG, which its reader takes one at a time
MOST_COMMENTS = 4 << 20  # bytes before the first frame of a GIF
MOST_SLOW_BYTES = 4 << 20  # of formats that are decoded in Python: plain PPM, run-length coded BMP
_END_OF_SCAN = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # a marker, and neither an escaped byte nor a restart
_SOS, _EOI = 0xDA, 0xD9
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_NO_LENGTH = frozenset(range(0xD0, 0xD9)) | {0x01}
_PARTS_OF_TIFF = (273, 324)  # the tags with the place of each strip or tile
_SIDES_OF_TILE = (322, 323)
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
_PLAIN_PPM = (b"P1", b"P2", b"P3")


def check_structure(name: str, data: Data, most_pixels: int) -> None:
    """Raise InputError, which begins with `name`, for a picture's file that would cost far more than its pixels do.

    most_pixels  the caller's bound on the picture's size. It also bounds the scans: their number times the pixels

    Files of other formats than the above pass.
    """
    head = data[:16]
    if head.startswith(b"\xff\xd8"):
        _check_jpeg(name, data, most_pixels)
    elif head.startswith(b"\x89PNG"):
        _check_parts(name, sum(1 for _ in zip(range(MOST_PARTS + 1), _png_chunks(data), strict=False)))
    elif head.startswith(b"GIF8"):
        _check_gif(name, data)
    elif head.startswith((b"II*\0", b"II+\0", b"MM\0*", b"MM\0+")):
        _check_tiff(name, data, most_pixels)
    elif head.startswith(_PLAIN_PPM) and len(data) > MOST_SLOW_BYTES:
        raise InputError(f"{name}: PPM in plain text of more than {MOST_SLOW_BYTES >> 20} MB")
    elif head.startswith((b"P4", b"P5", b"P6")) and b"#" in (header := data[: MOST_GAP + 1]):
        if len(header) > MOST_GAP and header.find(b"\n", header.index(b"#")) < 0:
            raise InputError(f"{name}: a comment of more than {MOST_GAP >> 20} MB")
    elif head.startswith(b"BM") and data[30:31] in (b"\1", b"\2") and len(data) > MOST_SLOW_BYTES:
        raise InputError(f"{name}: run-length coded BMP of more than {MOST_SLOW_BYTES >> 20} MB")


def _check_parts(name: str, count: int) -> None:
    if count > MOST_PARTS:
        raise InputError(f"{name}: more than {MOST_PARTS} parts in a file")


def _check_jpeg(name: str, data: Data, most_pixels: int) -> None:
    """Go through the segments. The data of a scan are searched for its end only if there can be a further one."""
    place, parts, gap, scans, pixels, components = 2, 0, 0, 0, 0, 0
    is_progressive = False
    while True:
        start = data.find(b"\xff", place)
        if start < 0:
            return
        after = start + 1
        while data[after : after + 1] == b"\xff" and after - place <= MOST_GAP:
            after += 1
        gap += after - 1 - place
        parts += 1
        _check_parts(name, parts)
        if gap > MOST_GAP:
            raise InputError(f"{name}: more than {MOST_GAP >> 20} MB between the segments of a JPEG")
        if after >= len(data) or (marker := data[after]) == _EOI:
            return
        place = after + 1
        if marker in _NO_LENGTH or marker == 0:
            continue
        segment = data[place + 2 : place + 12]
        if len(segment) < 6:
            return
        place += int.from_bytes(data[place : place + 2], "big")
        if marker in _FRAMES:
            is_progressive = marker not in (0xC0, 0xC1)
            pixels = int.from_bytes(segment[1:3], "big") * int.from_bytes(segment[3:5], "big")
            components = segment[5]
            if pixels > most_pixels:
                return  # the caller refuses it for its size
        elif marker == _SOS:
            scans += 1
            if scans > MOST_SCANS or scans * pixels > SCANS_OF_LARGEST * most_pixels:
                raise InputError(f"{name}: JPEG of more than {scans - 1} scans for {pixels} pixels")
            if not is_progressive and segment[0] == components:
                return  # all of the picture is in this scan
            end = _END_OF_SCAN.search(data, place)
            if end is None:
                return
            place = end.start()


def _png_chunks(data: Data) -> Iterator[int]:
    """Yield the place of each chunk."""
    place = 8
    while place + 8 <= len(data):
        yield place
        place += 12 + int.from_bytes(data[place : place + 4], "big")


def _check_gif(name: str, data: Data) -> None:
    """Go through the extensions before the first frame, block by block."""
    place = 13 + (3 << (data[10] & 7) + 1 if len(data) > 10 and data[10] & 128 else 0)
    first, parts = place, 0
    while place < len(data) and data[place] == 0x21:
        place += 2
        while place < len(data):
            size = data[place]
            place += 1 + size
            parts += 1
            _check_parts(name, parts)
            if place - first > MOST_COMMENTS:
                raise InputError(f"{name}: more than {MOST_COMMENTS >> 20} MB before the first frame of a GIF")
            if size == 0:
                break


def _check_tiff(name: str, data: Data, most_pixels: int) -> None:
    """Look at what the first directory gives: number of strips or tiles, size of a tile, bytes of the tags."""
    sides = {}
    for parts, (tag, _, count, value) in enumerate(_tags(data)):
        _check_parts(name, parts)
        if tag in _PARTS_OF_TIFF:
            _check_parts(name, count)
        if tag in _SIDES_OF_TILE:
            sides[tag] = value
    if len(sides) == 2 and math.prod(sides.values()) > most_pixels:  # a tile may be larger than its picture
        raise InputError(f"{name}: tiles of more than {most_pixels} pixels")
    if has_hostile_tags(data):
        raise InputError(f"{name}: tags of a TIFF that share their bytes")


def has_hostile_tags(data: Data) -> bool:
    """Whether a reader of the first directory would copy more bytes than there are, or very many tags.

    Tags that share their bytes are the cause. data: a TIFF, or EXIF data, which have its form.
    """
    held = 0
    for parts, (_, kind, count, place) in enumerate(_tags(data)):
        size = count * _TYPE_BYTES.get(kind, 0)
        held += size if place + size <= len(data) else 0  # a reader leaves out what is beyond the end
        if held > len(data) or parts > MOST_PARTS:
            return True
    return False


def _tags(data: Data) -> Iterator[tuple[int, int, int, int]]:
    """Yield tag, type, number of values and their place, or one short value, of a TIFF's first directory."""
    order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"

    def number(start: int, size: int) -> int:
        return int.from_bytes(data[start : start + size], order)

    is_big = number(2, 2) == 43
    width, entry, at = (8, 20, number(8, 8)) if is_big else (4, 12, number(4, 4))
    first = at + (8 if is_big else 2)
    for place in range(first, first + entry * number(at, first - at), entry):
        if place + entry > len(data):
            return
        kind, count = number(place + 2, 2), number(place + 4, width)
        yield number(place, 2), kind, count, number(place + 4 + width, 2 if (kind, count) == (3, 1) else width)
