"""Crops as plain data: keyed, in bounds, equal at every resolution, replayable."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from longclip_teacher.errors import InputError
from training.transforms import (
    Augmentation,
    AugmentConfig,
    ViewSpec,
    centre_crop,
    draw_augmentation,
    render,
    sample_generator,
)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def gradient(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, (x + y) / 2], axis=2).astype(np.uint8))


def test_random_numbers_depend_on_the_key_alone() -> None:
    first = sample_generator(0, 3, 17).random(4)
    sample_generator(0, 3, 18).random(100)
    assert (sample_generator(0, 3, 17).random(4) == first).all()
    assert all((sample_generator(*key).random(4) != first).all() for key in [(1, 3, 17), (0, 4, 17), (0, 3, 18)])


@pytest.mark.parametrize("size", [(48, 48), (640, 427), (300, 900), (1, 1), (2, 500)])
def test_crops_stay_inside_and_keep_their_share_of_the_largest_square(size: tuple[int, int]) -> None:
    config = AugmentConfig(scale=(0.5, 1.0), ratio=(0.8, 1.25))
    for index in range(200):
        left, top, right, bottom = draw_augmentation(size, config, sample_generator(index)).box
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
        if min(size) > 40:
            area, ratio = (right - left) * (bottom - top), (right - left) / (bottom - top)
            assert 0.45 < area / min(size) ** 2 <= 1.02 and 0.75 < ratio < 1.33


def test_crops_reach_every_border() -> None:
    boxes = [draw_augmentation((100, 50), AugmentConfig(), sample_generator(i)).box for i in range(300)]
    assert min(box[0] for box in boxes) == 0 and max(box[2] for box in boxes) == 100
    assert min(box[1] for box in boxes) == 0 and max(box[3] for box in boxes) == 50


def test_both_views_show_the_same_crop() -> None:
    picture = gradient(300, 200)
    augmentation = draw_augmentation(picture.size, AugmentConfig(scale=(0.3, 0.5)), sample_generator(1))
    small, large = render(picture, augmentation, [ViewSpec(32), ViewSpec(64, "bilinear")])
    assert small.shape == (32, 32, 3) and large.shape == (64, 64, 3) and small.dtype == np.uint8
    halved = large.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
    assert np.abs(halved - small).max() < 2.5


def test_rendering_equals_crop_then_resize() -> None:
    picture = gradient(90, 60)
    augmentation = draw_augmentation(picture.size, AugmentConfig(scale=(0.4, 0.9)), sample_generator(2))
    expected = picture.crop(augmentation.box).resize((40, 40), Image.Resampling.BICUBIC)
    assert np.abs(render(picture, augmentation, [ViewSpec(40)])[0].astype(int) - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize("size", [(48, 48), (96, 64), (50, 75)])
def test_centre_crop_is_the_evaluation_preprocessing(size: tuple[int, int]) -> None:
    picture = gradient(*size)
    cfg = PreprocessCfg(size=32, mean=(0, 0, 0), std=(1, 1, 1), interpolation="bicubic")
    expected = image_transform_v2(cfg, is_train=False)(picture).permute(1, 2, 0).numpy() * 255
    assert (
        np.abs(render(picture, centre_crop(size), [ViewSpec(32)])[0] - expected).max() <= 4
    )  # it crops after resizing


@pytest.mark.parametrize("num_ops", [0, 2])
def test_an_augmentation_stored_as_json_replays_the_same_pixels(num_ops: int) -> None:
    picture = noise(80, 70)
    config = AugmentConfig(rand_augment_ops=num_ops)
    augmentation = draw_augmentation(picture.size, config, sample_generator(5))
    stored = json.loads(json.dumps(dataclasses.asdict(augmentation)))
    replayed = Augmentation(**{**stored, "box": tuple(stored["box"])})
    views = [ViewSpec(32), ViewSpec(48)]
    for first, second in zip(render(picture, augmentation, views), render(picture, replayed, views), strict=True):
        assert (first == second).all()


def test_rand_augment_changes_pixels_the_same_way_in_both_views() -> None:
    picture = gradient(96, 96)
    changed = 0
    for index in range(12):
        augmentation = draw_augmentation(picture.size, AugmentConfig(rand_augment_ops=2), sample_generator(index))
        plain = dataclasses.replace(augmentation, rand_augment_ops=0)
        small, large = render(picture, augmentation, [ViewSpec(48), ViewSpec(96)])
        changed += bool((small != render(picture, plain, [ViewSpec(48)])[0]).any())
        halved = large.reshape(48, 2, 48, 2, 3).mean(axis=(1, 3))
        assert np.median(np.abs(halved - small)) < 6
    assert changed >= 8


def test_nothing_is_mirrored() -> None:
    picture = gradient(64, 64)
    for index in range(50):
        pixels = render(
            picture, draw_augmentation(picture.size, AugmentConfig(), sample_generator(index)), [ViewSpec(32)]
        )
        assert pixels[0][:, -1, 0].mean() > pixels[0][:, 0, 0].mean() + 150


def test_ranges_without_meaning_are_errors() -> None:
    for wrong in [{"scale": (0.0, 1.0)}, {"scale": (0.9, 0.5)}, {"ratio": (0.0, 1.0)}, {"rand_augment_magnitude": 31}]:
        with pytest.raises(InputError):
            AugmentConfig(**wrong)
