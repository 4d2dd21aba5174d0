"""The fast form of a picture against PIL: the same files, and the same pixels within the stated tolerance."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

import eval.base.images
from benches.data import photograph
from eval.base.images import open_image
from longclip_teacher.errors import InputError
from training.data import decoding
from training.data.decoding import normalized, open_picture, picture_size, pixels_of_pil, resized_crops
from training.data.randomness import sample_generator
from training.data.transforms import ViewSpec, draw_augmentation, render
from training.settings.augment import AugmentConfig

JPEGS: dict[str, dict[str, Any]] = {
    "q75": {"quality": 75, "subsampling": 2},
    "q95": {"quality": 95, "subsampling": 2},
    "q95_422": {"quality": 95, "subsampling": 1},
    "q75_444": {"quality": 75, "subsampling": 0},
    "progressive": {"quality": 90, "progressive": True},
    "restarts": {"quality": 90, "restart_marker_blocks": 3},
    "rgb": {"quality": 90, "keep_rgb": True},
    "exif_damaged": {"quality": 90, "exif": b"Exif\0\0II*\0\xff\xff\xff\xff"},
}


def encoded(picture: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def levels(data: bytes, fast: bool) -> torch.Tensor:
    """Return decoded pixels [3, H, W], signed."""
    picture = open_picture(data, fast)
    return (pixels_of_pil(picture) if isinstance(picture, Image.Image) else picture).int()


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS.keys())
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpegs_decode_to_the_same_pixels(options: dict[str, Any], mode: str) -> None:
    if mode == "L" and "keep_rgb" in options:
        options = {"quality": 90}
    for size in ((250, 187), (33, 64), (1, 1)):
        data = encoded(photograph(3, size).convert(mode), **options)
        assert decoding._jpeg_pixels(data) is not None  # not left to PIL
        assert picture_size(open_picture(data, True)) == picture_size(open_picture(data, False)) == size
        assert torch.equal(levels(data, True), levels(data, False))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_both_forms_are_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = photograph(3, (250, 187))
    data = encoded(stored, quality=90, exif=exif.tobytes())
    as_stored = pixels_of_pil(open_image(encoded(stored, quality=90)))
    turned = {
        1: as_stored, 2: as_stored.flip(2), 3: as_stored.flip(1, 2), 4: as_stored.flip(1),
        5: as_stored.mT, 6: as_stored.mT.flip(2), 7: as_stored.mT.flip(1, 2), 8: as_stored.mT.flip(1),
    }  # fmt: skip
    assert decoding._jpeg_pixels(data) is not None  # not left to PIL
    assert torch.equal(levels(data, True), levels(data, False))
    assert torch.equal(levels(data, True), turned[orientation].int())
    views: list[Any] = [(64, "bilinear")]
    fast, slow = (resized_crops(open_picture(data, form), (3, 5, 180, 170), views)[0] for form in (True, False))
    assert isinstance(fast, torch.Tensor) and isinstance(slow, Image.Image)
    assert (fast.int() - pixels_of_pil(slow)).abs().max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("fast", [True, False])
def test_training_has_a_bound_of_its_own(fast: bool, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("RGB", (10, 10)), kind)
    monkeypatch.setattr(decoding, "MAX_TRAINING_PIXELS", 100)
    assert picture_size(open_picture(data, fast)) == (10, 10)
    monkeypatch.setattr(decoding, "MAX_TRAINING_PIXELS", 99)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded"))
    monkeypatch.setattr(decoding, "_decode_jpeg", lambda *_: pytest.fail("decoded"))
    with pytest.raises(InputError, match="more than 99 pixels"):
        open_picture(data, fast)


@pytest.mark.parametrize(("interpolation", "most"), [("bilinear", 1), ("bicubic", 2)])
@pytest.mark.parametrize("options", [JPEGS["q75"], JPEGS["q95"], JPEGS["q75_444"]], ids=["q75", "q95", "q75_444"])
def test_crops_resize_to_the_same_pixels(options: dict[str, Any], interpolation: Any, most: int) -> None:
    generator = np.random.default_rng(0)
    largest, total, count = 0, 0, 0
    for index in range(12):
        size = (500, 375) if index % 2 else (187, 250)
        data = encoded(photograph(index, size).convert("L" if index % 4 == 3 else "RGB"), **options)
        width, height = (int(generator.integers(20, side)) for side in size)
        left, top = (int(generator.integers(0, side - part)) for side, part in zip(size, (width, height), strict=True))
        views = [(256, interpolation), (224, interpolation), (32, interpolation)]
        box = (left, top, left + width, top + height)
        for fast, slow in zip(
            *(resized_crops(open_picture(data, form), box, views) for form in (True, False)), strict=True
        ):
            assert isinstance(fast, torch.Tensor) and isinstance(slow, Image.Image)
            difference = (fast.int() - pixels_of_pil(slow)).abs()
            largest, total, count = max(largest, int(difference.max())), total + int(difference.sum()), count + 1
            assert difference.float().mean() < 0.02
    assert 0 < largest <= most  # 0 would mean that one form was compared with itself


def test_the_passes_of_bicubic_run_across_then_down_in_both_forms() -> None:
    stripes = np.zeros((269, 106, 3), dtype=np.uint8)  # overshoot at the edges is clipped after the first pass
    y, x = np.mgrid[:269, :106]
    stripes[(x + y) % 13 < 6] = 255
    picture = Image.fromarray(stripes)
    fast, slow = (
        resized_crops(form, (0, 0, 106, 269), [(256, "bicubic")])[0] for form in (pixels_of_pil(picture), picture)
    )
    down_first = picture.resize((106, 256), Image.Resampling.BICUBIC).resize((256, 256), Image.Resampling.BICUBIC)
    assert isinstance(fast, torch.Tensor) and isinstance(slow, Image.Image)
    assert (fast.int() - pixels_of_pil(slow)).abs().max() <= 2
    assert (fast.int() - pixels_of_pil(down_first)).abs().max() > 5


@pytest.mark.parametrize("fast", [True, False])
def test_no_pixel_outside_the_crop_is_read(fast: bool) -> None:
    picture = photograph(4, (100, 80))
    framed = Image.new("RGB", (140, 120), "white")
    framed.paste(picture, (20, 20))
    forms = [pixels_of_pil(image) if fast else image for image in (picture, framed)]
    views: list[Any] = [(256, "bicubic"), (30, "bilinear")]
    for plain, cut in zip(
        resized_crops(forms[0], (0, 0, 100, 80), views), resized_crops(forms[1], (20, 20, 120, 100), views), strict=True
    ):
        assert np.array_equal(np.asarray(plain), np.asarray(cut))


@pytest.mark.parametrize("fast", [True, False])
def test_a_crop_of_the_views_size_is_not_changed(fast: bool) -> None:
    picture = photograph(5, (90, 70))
    form = pixels_of_pil(picture) if fast else picture
    found = np.asarray(resized_crops(form, (10, 3, 74, 67), [(64, "bicubic")])[0])
    assert np.array_equal(found.transpose(1, 2, 0) if fast else found, np.asarray(picture.crop((10, 3, 74, 67))))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("box", [(0, 0, 41, 30), (-1, 0, 5, 5), (5, 5, 5, 9), (0, 9, 5, 3), (0, 0, 40, 31)])
def test_crops_of_another_picture_are_refused(fast: bool, box: tuple[int, int, int, int]) -> None:
    picture = open_picture(encoded(Image.new("RGB", (40, 30))), fast)
    with pytest.raises(InputError, match=r"does not lie inside a picture of 40 x 30"):
        resized_crops(picture, box, [(8, "bicubic")])


def test_rand_augment_keeps_the_forms_together() -> None:
    config = AugmentConfig(scale=(0.5, 1.0), rand_augment_ops=2, flip=0.5)
    differences = []
    for index in range(40):
        data = encoded(photograph(index % 5, (250, 187)), quality=90)
        augmentation = draw_augmentation((250, 187), config, sample_generator(index))
        fast, slow = (render(open_picture(data, form), augmentation, [ViewSpec(128)])[0] for form in (True, False))
        differences.append((fast.float() - slow.float()).abs().mean().item())
    assert 0 < max(differences) < 1 and np.median(differences) < 0.02


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_other_formats_are_pils(kind: str) -> None:
    data = encoded(photograph(6, (40, 30)), kind)
    assert torch.equal(levels(data, True), levels(data, False))
    assert torch.equal(
        levels(encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 0)), "PNG"), True), torch.full((3, 2, 2), 255)
    )


@pytest.mark.parametrize("available", [True, False])
def test_what_torchvision_cannot_do_is_pils(available: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cmyk, plain = (encoded(photograph(7, (40, 30)).convert(mode)) for mode in ("CMYK", "RGB"))
    if not available:
        monkeypatch.setattr(decoding, "_decode_jpeg", None)
    assert decoding._jpeg_pixels(cmyk) is None and (decoding._jpeg_pixels(plain) is not None) == available
    for data in (cmyk, plain):
        assert torch.equal(levels(data, True), levels(data, False))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 1}])
def test_truncated_and_altered_files_are_refused_alike(options: dict[str, Any]) -> None:
    def outcome(data: bytes, fast: bool) -> str | torch.Tensor:
        try:
            return levels(data, fast)
        except InputError as error:
            assert "\n" not in str(error)
            return str(error)

    data = encoded(photograph(8, (40, 30)), **options)
    generator = np.random.default_rng(0)
    damaged = [data[:length] for length in range(0, len(data), 7)] + [data[:-1], data[:-2]]
    for _ in range(150):
        altered = bytearray(data)
        altered[int(generator.integers(2, len(data)))] = int(generator.integers(256))
        damaged.append(bytes(altered))
    refused = 0
    for content in damaged:
        fast, slow = outcome(content, True), outcome(content, False)
        if isinstance(slow, str):
            refused += 1
            assert fast == slow
        else:
            assert isinstance(fast, torch.Tensor) and torch.equal(fast, slow)
    assert refused > len(data) // 7 - 5
    assert "truncated" in str(outcome(data[:-30], True))


def test_oversized_and_foreign_files_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    for data in (b"plain text", b"\xff\xd8", encoded(Image.new("RGB", (4, 4)), "EPS")):
        with pytest.raises(InputError, match="not a picture"):
            open_picture(data, True)
    monkeypatch.setattr(eval.base.images, "MAX_IMAGE_PIXELS", 99)
    monkeypatch.setattr(decoding, "_decode_jpeg", lambda *_: pytest.fail("decoded"))
    with pytest.raises(InputError, match="more than 99 pixels"):
        open_picture(encoded(Image.new("RGB", (10, 10))), True)


def test_the_slow_form_is_open_images() -> None:
    data = encoded(photograph(9, (30, 20)))
    picture = open_picture(data, False)
    assert isinstance(picture, Image.Image) and picture.tobytes() == open_image(data).tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalised_is_the_formula(dtype: torch.dtype) -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    mean, std = torch.tensor([0.0, 0.48, 0.4], dtype=dtype), torch.tensor([1.0, 0.27, 0.26], dtype=dtype)
    expected = (pixels.to(dtype) / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    for shape in ((3,), (3, 1, 1)):
        found = normalized(pixels, mean.view(shape), std.view(shape))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-14)
    floats = pixels.to(dtype)
    normalized(floats, mean, std)
    assert torch.equal(floats, pixels.to(dtype))  # not in place
