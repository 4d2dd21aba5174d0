from __future__ import annotations

import io
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import eval.base.images
from eval.base.images import TURNS, is_picture, open_image
from longclip_teacher.errors import InputError

INVERSE = {**TURNS, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_transparent_pixels_become_white() -> None:
    content = encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 0)), "PNG")
    assert open_image(content).getpixel((0, 0)) == (255, 255, 255)


def grey(content: bytes) -> list[int]:
    """The grey levels of a picture's first row."""
    pixels = np.asarray(open_image(content))
    assert (pixels == pixels[..., :1]).all()
    return pixels[0, :, 0].tolist()


def tiff(values: np.ndarray, photometric: int = 1, sample_format: int = 1) -> bytes:
    """An uncompressed grey TIFF of one row, in the byte order of `values`."""
    order, mark = ("<", b"II*\0") if values.dtype.byteorder in "=<|" else (">", b"MM\0*")
    short = 1 if order == "<" else 1 << 16  # a short value lies at the left of its four bytes
    tags = [
        (256, 4, values.size), (257, 4, 1), (258, 3, 8 * values.itemsize * short), (259, 3, short),
        (262, 3, photometric * short), (273, 4, 8 + 2 + 10 * 12 + 4), (277, 3, short), (278, 4, 1),
        (279, 4, values.nbytes), (339, 3, sample_format * short),
    ]  # fmt: skip
    entries = b"".join(struct.pack(f"{order}HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return mark + struct.pack(f"{order}IH", 8, len(tags)) + entries + bytes(4) + values.tobytes()


SIXTEEN = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)


@pytest.mark.parametrize(
    "content",
    [
        encoded(Image.fromarray(SIXTEEN), "PNG"),
        encoded(Image.fromarray(SIXTEEN), "TIFF"),
        b"P5 4 1 65535\n" + SIXTEEN.astype(">u2").tobytes(),
        tiff(SIXTEEN),
        tiff(SIXTEEN.astype(">u2")),
        tiff(65535 - SIXTEEN, photometric=0),
        tiff(SIXTEEN.astype("<i4"), sample_format=2),
        tiff(SIXTEEN.astype(">i4"), sample_format=2),
        tiff(SIXTEEN.astype("<u4")),
        tiff(SIXTEEN.astype("<f4") / 65535, sample_format=3),
        tiff(SIXTEEN.astype(">f4") / 65535, sample_format=3),
        tiff(SIXTEEN.astype("<f4") / 257, sample_format=3),
        tiff(SIXTEEN.astype("<f4"), sample_format=3),
        tiff(SIXTEEN.astype("<f4") * 100 - 7000, sample_format=3),
        tiff(SIXTEEN.astype("<i4") * 100 - 7000, sample_format=2),
        tiff(SIXTEEN.astype("<u4") * 65537),
    ],
)
def test_grey_of_more_than_eight_bits_keeps_its_brightness(content: bytes) -> None:
    assert grey(content) == [0, 1, 128, 255]


def test_dark_pictures_of_sixteen_bits_stay_dark_and_small_integers_are_levels() -> None:
    dark = np.array([[0, 100, 257, 514]], dtype=np.uint16)
    assert grey(encoded(Image.fromarray(dark), "PNG")) == [0, 0, 1, 2]
    assert grey(b"P5 4 1 65535\n" + dark.astype(">u2").tobytes()) == [0, 0, 1, 2]
    assert grey(b"P5 2 1 1023\n" + np.array([0, 1023], dtype=">u2").tobytes()) == [0, 255]
    assert grey(tiff(np.array([[0, 100, 255]], dtype="<i4"), sample_format=2)) == [0, 100, 255]
    assert grey(tiff(np.full((1, 2), -3, dtype="<i4"), sample_format=2)) == [0, 0]


def test_sixteen_bits_per_colour_and_transparent_grey() -> None:
    colours = np.array([[[65535, 128 * 257, 0]]], dtype=">u2")
    assert open_image(b"P6 1 1 65535\n" + colours.tobytes()).getpixel((0, 0)) == (255, 128, 0)
    content = encoded(Image.fromarray(SIXTEEN), "PNG", transparency=257)
    assert grey(content) == [0, 255, 128, 255]


def test_values_that_are_no_numbers_are_refused() -> None:
    for value in (np.nan, np.inf):
        with pytest.raises(InputError, match=r"damaged picture \(values that are not finite\)"):
            open_image(tiff(np.array([[0, value]], dtype="<f4"), sample_format=3))


def marked(size: tuple[int, int]) -> Image.Image:
    """White above, and a red left half below."""
    pixels = np.full((size[1], size[0], 3), 255, dtype=np.uint8)
    pixels[size[1] // 2 :, : size[0] // 2] = (255, 0, 0)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(orientation: int, kind: str) -> None:
    upright = marked((64, 32))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright if orientation == 1 else upright.transpose(INVERSE[orientation])
    found = open_image(encoded(stored, kind, exif=exif.tobytes()))
    assert found.size == upright.size
    assert np.abs(np.asarray(found).astype(int) - np.asarray(upright)).mean() < 5


def test_damaged_exif_data_lose_no_picture() -> None:
    for exif in (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03"):
        assert open_image(encoded(marked((8, 8)), "JPEG", exif=exif)).size == (8, 8)
    exif = Image.Exif()
    exif[0x0112] = 77
    assert open_image(encoded(marked((8, 16)), "JPEG", exif=exif.tobytes())).size == (8, 16)


def test_only_plain_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path / "pipe.jpg", Path("/dev/null")):
        with pytest.raises(InputError, match=f"{path.name}: not a plain file"):
            open_image(path)
    (tmp_path / "empty.png").touch()
    with pytest.raises(InputError, match=r"empty\.png: empty file"):
        open_image(tmp_path / "empty.png")


def test_palette_grey_and_cmyk_are_rgb() -> None:
    for mode, kind in (("P", "PNG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("1", "PNG")):
        assert open_image(encoded(Image.new(mode, (3, 2)), kind)).mode == "RGB"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated_pictures_are_one_line_errors(kind: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(noise), kind)
    for length in (0, 10, 40, len(content) // 2):
        path = tmp_path / f"{length}.{kind.lower()}"
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=path.name) as caught:
            open_image(path)
        assert "\n" not in str(caught.value)


def test_what_is_no_picture_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no picture at .*absent\.png"):
        open_image(tmp_path / "absent.png")
    with pytest.raises(InputError, match="not a picture"):
        open_image(b"plain text")
    with pytest.raises(InputError, match="Is a directory"):
        open_image(tmp_path)


def test_formats_that_run_programs_are_refused() -> None:
    with pytest.raises(InputError, match="not a picture"):
        open_image(encoded(Image.new("RGB", (4, 4)), "EPS"))  # Pillow would call Ghostscript


def test_oversized_pictures_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eval.base.images, "MAX_IMAGE_PIXELS", 99)
    with pytest.raises(InputError, match="more than 99 pixels"):
        open_image(encoded(Image.new("RGB", (10, 10)), "PNG"))


def test_hidden_files_are_no_pictures() -> None:
    assert is_picture(Path("a/1.JPG")) and not is_picture(Path("a/._1.jpg")) and not is_picture(Path("a/1.txt"))
