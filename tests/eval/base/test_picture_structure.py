"""Hostile pictures are refused from their markers, before anything is decoded; pictures of every encoder pass."""

from __future__ import annotations

import io
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, JpegImagePlugin

import eval.base.images
from bombs import BOMBS
from eval.base.images import open_image
from eval.base.picture_structure import MOST_SCANS, check_structure, has_hostile_tags
from longclip_teacher.errors import InputError
from training.data import decoding
from training.data.decoding import open_picture

REFUSED = {
    "JPEG, progressive scans": "JPEG of more than",
    "JPEG, scans behind thumbnails": "JPEG of more than",
    "JPEG, sequential scans": "JPEG of more than",
    "JPEG, many segments": "more than 50000 parts",
    "JPEG, many tables": "more than 50000 parts",
    "JPEG, fill bytes": "more than 1 MB between the segments",
    "PNG, many chunks": "more than 50000 parts",
    "PNG, empty data": "more than 50000 parts",
    "GIF, comments": "more than",
    "GIF, extensions": "more than 50000 parts",
    "TIFF, strips": "more than 50000 parts",
    "TIFF, large tile": "tiles of more than",
    "TIFF, tags": "tags of a TIFF that share their bytes",
    "BMP, run lengths": "run-length coded BMP of more than 4 MB",
}


@pytest.mark.parametrize("name", REFUSED)
def test_bombs_are_refused_by_every_way_to_decode(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = BOMBS[name](random.Random(1))
    path = tmp_path / "picture"
    path.write_bytes(data)
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("a decoder saw it"))
    monkeypatch.setattr(decoding, "_decode_jpeg", lambda *_: pytest.fail("decoded"))
    for read, said in (
        (lambda: open_picture(data, True), "picture: "),
        (lambda: open_picture(data, False), "picture: "),
        (lambda: open_image(path), f"{path}: "),
        (lambda: open_image(path, 40_000_000, shrink_to=256), f"{path}: "),
    ):
        with pytest.raises(InputError, match=REFUSED[name]) as caught:
            read()
        assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name in BOMBS if ", large" in name and "tile" not in name])
def test_large_pictures_are_refused_for_their_size(name: str) -> None:
    data = BOMBS[name](random.Random(1))
    for fast in (True, False):
        with pytest.raises(InputError, match="picture: more than 40000000 pixels"):
            open_picture(data, fast)


@pytest.mark.parametrize("options", [
    {"format": "JPEG"}, {"format": "JPEG", "progressive": True}, {"format": "JPEG", "restart_marker_blocks": 1},
    {"format": "JPEG", "progressive": True, "subsampling": 0, "comment": b"\xff\xda" * 200},
    {"format": "PNG"}, {"format": "GIF"}, {"format": "TIFF"}, {"format": "BMP"}, {"format": "PPM"}, {"format": "WEBP"},
])  # fmt: skip
def test_pictures_of_every_encoder_pass(options: dict[str, Any], tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    picture.save(buffer, **options)
    check_structure("picture", buffer.getvalue(), 60 * 80)
    (tmp_path / "p").write_bytes(buffer.getvalue())
    assert open_image(tmp_path / "p").size == (80, 60)


@pytest.mark.parametrize("scans", [MOST_SCANS, MOST_SCANS + 1])
def test_the_bound_on_scans(scans: int) -> None:
    """The number alone for a small picture; with the pixels for a large one."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "JPEG", progressive=True)
    whole = buffer.getvalue()
    last = whole[whole.rindex(b"\xff\xda") : -2]
    there = whole.count(b"\xff\xda")
    data = whole[:-2] + last * (scans - there) + whole[-2:]
    if scans > MOST_SCANS:
        with pytest.raises(InputError, match="JPEG of more than 100 scans for 4096 pixels"):
            check_structure("p", data, 1_000_000)
    else:
        check_structure("p", data, 1_000_000)
    with pytest.raises(InputError, match="JPEG of more than 10 scans"):
        check_structure("p", whole[:-2] + last + whole[-2:], 4096)
    check_structure("p", whole, 4096)


def test_large_jpegs_that_shrink_count_as_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A JPEG is decoded at a fraction of its size if it is to be shrunk; no picture is read beyond the upper bound."""
    pictures = {}
    for kind in ("JPEG", "PNG"):
        buffer = io.BytesIO()
        Image.new("RGB", (800, 600)).save(buffer, kind)
        pictures[kind] = buffer.getvalue()
    assert open_image(pictures["JPEG"], 400 * 300, shrink_to=100).size == (200, 150)
    assert open_image(pictures["JPEG"], 800 * 600, shrink_to=100).size == (800, 600)
    for kind, bound, shrink_to in (("JPEG", 400 * 300, None), ("JPEG", 400 * 300 - 1, 299), ("PNG", 400 * 300, 100)):
        with pytest.raises(InputError, match=f"more than {bound} pixels"):
            open_image(pictures[kind], bound, shrink_to=shrink_to)
    monkeypatch.setattr(eval.base.images, "MAX_IMAGE_PIXELS", 800 * 600 - 1)
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", lambda _: pytest.fail("decoded"))
    with pytest.raises(InputError, match="more than 120000 pixels"):
        open_image(pictures["JPEG"], 400 * 300, shrink_to=100)


def test_tags_that_share_their_bytes_are_hostile() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.Make] = 6, "a camera"
    assert not has_hostile_tags(exif.tobytes().removeprefix(b"Exif\0\0"))
    for header, entry, count in (
        (b"II*\0\x08\0\0\0", "<HHLL", "<H"),
        (b"MM\0+\0\x08\0\0" + bytes(7) + b"\x10", ">HHQQ", ">Q"),
    ):
        size = struct.calcsize(entry)
        end = len(header) + struct.calcsize(count) + 2 * size
        shared, own = (
            [struct.pack(entry, 0x9000 + tag, 7, 100, end + tag * step) for tag in (0, 1)] for step in (0, 100)
        )
        lead = header + struct.pack(count, 2)
        assert has_hostile_tags(lead + b"".join(shared) + bytes(100))
        assert not has_hostile_tags(lead + b"".join(own) + bytes(200))
        assert not has_hostile_tags(lead + b"".join(shared) + bytes(99))  # beyond the end: no reader copies them
