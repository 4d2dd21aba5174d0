from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import eval.base.images
from eval.base.images import is_picture, open_image
from longclip_teacher.errors import InputError


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def test_transparent_pixels_become_white() -> None:
    content = encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 0)), "PNG")
    assert open_image(content).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_grey_keeps_its_brightness() -> None:
    content = encoded(Image.fromarray(np.full((4, 4), 128 * 256, dtype=np.uint16)), "PNG")
    assert open_image(content).getpixel((0, 0)) == (128, 128, 128)


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
