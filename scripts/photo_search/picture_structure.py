"""Pictures whose structure alone would cost a decoder seconds: found from their markers, before anything is decoded.

A progressive JPEG goes over the whole picture once per scan, and a few bytes make a scan. The readers of JPEG, PNG and
GIF take the parts of a header one at a time in Python, and some keep each of them.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from typing import Literal, TypeAlias

from photo_search.errors import InputError

__all__ = ["check_structure"]

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
        _check_tiff(name, data)
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


def _check_tiff(name: str, data: Data) -> None:
    """Look at the number of strips or tiles, which the first directory gives."""
    order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"

    def number(start: int, size: int) -> int:
        return int.from_bytes(data[start : start + size], order)

    is_big = number(2, 2) == 43
    width, entry, at = (8, 20, number(8, 8)) if is_big else (4, 12, number(4, 4))
    first = at + (8 if is_big else 2)
    for place in range(first, first + entry * number(at, first - at), entry):
        if place + entry > len(data):
            return
        if number(place, 2) in _PARTS_OF_TIFF:
            _check_parts(name, number(place + 4, width))
