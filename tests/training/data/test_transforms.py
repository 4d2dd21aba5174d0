"""Augmentations as plain data: keyed, in bounds, equal at every resolution, replayable, with torchvision's
operations."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandAugment
from torchvision.transforms import functional as v1

from benches.data import photograph
from longclip_teacher.errors import InputError
from training.data.decoding import Picture, pixels_of_pil
from training.data.randomness import sample_generator
from training.data.transforms import (
    RAND_AUGMENT_OPS,
    Augmentation,
    AugmentConfig,
    ViewSpec,
    centre_crop,
    draw_augmentation,
    rand_augment_magnitude,
    render,
)

SIGNED = RAND_AUGMENT_OPS[1:10]


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def gradient(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, (x + y) / 2], axis=2).astype(np.uint8))


def halved(pixels: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(pixels.float(), 2)


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


def test_the_crop_of_a_key_is_fixed_and_the_same_with_flip_and_rand_augment() -> None:
    for index, box in enumerate([(2, 0, 99, 99), (36, 0, 133, 98), (44, 1, 142, 100)]):
        for config in (AugmentConfig(), AugmentConfig(flip=0.5, rand_augment_ops=2)):
            assert draw_augmentation((160, 100), config, sample_generator(0, 0, index)).box == box


def test_both_views_show_the_same_crop() -> None:
    picture = gradient(300, 200)
    augmentation = draw_augmentation(picture.size, AugmentConfig(scale=(0.3, 0.5)), sample_generator(1))
    small, large = render(picture, augmentation, [ViewSpec(32), ViewSpec(64, "bilinear")])
    assert small.shape == (3, 32, 32) and large.shape == (3, 64, 64)
    assert all(view.dtype == torch.uint8 and view.is_contiguous() for view in (small, large))
    assert (halved(large) - small).abs().max() < 2.5


def test_centre_is_the_evaluation_preprocessing() -> None:
    for size in [(48, 48), (96, 64), (50, 75)]:
        cfg = PreprocessCfg(size=32, mean=(0, 0, 0), std=(1, 1, 1), interpolation="bicubic")
        expected = image_transform_v2(cfg, is_train=False)(gradient(*size)) * 255
        found = render(gradient(*size), centre_crop(size), [ViewSpec(32)])[0]
        assert (found - expected).abs().max() <= 4  # it crops after resizing, unlike us
        assert draw_augmentation(size, AugmentConfig(centre=True), sample_generator(0)) == centre_crop(size)


@pytest.mark.parametrize("form", [lambda picture: picture, pixels_of_pil], ids=["pil", "tensor"])
def test_an_augmentation_stored_as_json_replays_the_same_pixels(form: object) -> None:
    assert callable(form)
    picture: Picture = form(noise(80, 70))
    config = AugmentConfig(rand_augment_ops=2, flip=0.5)
    for index in range(8):
        augmentation = draw_augmentation((80, 70), config, sample_generator(index))
        stored = json.loads(json.dumps(dataclasses.asdict(augmentation)))
        ops = tuple((name, magnitude) for name, magnitude in stored["ops"])
        replayed = Augmentation(**{**stored, "box": tuple(stored["box"]), "ops": ops})
        views = [ViewSpec(32), ViewSpec(48)]
        for first, second in zip(render(picture, augmentation, views), render(picture, replayed, views), strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize("size", [224, 256, 32])
def test_magnitudes_are_torchvisions(size: int) -> None:
    space = RandAugment()._augmentation_space(31, (size, size))
    assert tuple(space) == RAND_AUGMENT_OPS
    for name, (magnitudes, _) in space.items():
        for index in range(31):
            expected = float(magnitudes[index]) if magnitudes.ndim else 0.0
            assert rand_augment_magnitude(name, index, size) == expected, (name, index)
    assert tuple(name for name, (_, signed) in space.items() if signed) == SIGNED


def test_operations_and_signs_are_drawn_evenly() -> None:
    config = AugmentConfig(rand_augment_ops=2, rand_augment_magnitude=20)
    draws = [draw_augmentation((50, 50), config, sample_generator(index)).ops for index in range(1400)]
    for position in (0, 1):
        names = [ops[position][0] for ops in draws]
        assert all(60 < names.count(name) < 145 for name in RAND_AUGMENT_OPS)
    for name in RAND_AUGMENT_OPS:
        magnitudes = [magnitude for ops in draws for other, magnitude in ops if other == name]
        assert {abs(magnitude) for magnitude in magnitudes} == {rand_augment_magnitude(name, 20)}
        share = sum(magnitude < 0 for magnitude in magnitudes) / len(magnitudes)
        assert 0.35 < share < 0.65 if name in SIGNED else share == 0


def torchvision_draw(seed: int, size: int, num_ops: int, magnitude: int) -> tuple[tuple[str, float], ...]:
    """Return what RandAugment's forward draws after torch.manual_seed(seed)."""
    torch.manual_seed(seed)
    ops = []
    for _ in range(num_ops):
        name = RAND_AUGMENT_OPS[int(torch.randint(14, (1,)))]
        sign = -1.0 if name in SIGNED and torch.randint(2, (1,)) else 1.0
        ops.append((name, sign * rand_augment_magnitude(name, magnitude, size)))
    return tuple(ops)


@pytest.mark.parametrize("magnitude", [9, 30])
def test_operations_give_the_pixels_of_torchvisions_rand_augment(magnitude: int) -> None:
    picture = photograph(1, (120, 100))
    box, seen = (7, 3, 107, 95), set()
    for seed in range(60):
        ops = torchvision_draw(seed, 64, 2, magnitude)
        seen |= {name for name, _ in ops}
        plain = v1.to_pil_image(render(picture, Augmentation(box), [ViewSpec(64)])[0])
        torch.manual_seed(seed)
        expected = pixels_of_pil(RandAugment(2, magnitude)(plain))
        assert torch.equal(render(picture, Augmentation(box, ops, ops_size=64), [ViewSpec(64)])[0], expected), ops
    assert seen == set(RAND_AUGMENT_OPS)


def test_the_order_is_crop_resize_flip_operations() -> None:
    picture, box = photograph(2, (90, 70)), (5, 4, 80, 66)
    resized = v1.resized_crop(picture, 4, 5, 62, 75, [48, 48], InterpolationMode.BICUBIC)
    moved = v1.affine(v1.hflip(resized), 0.0, [10, 0], 1.0, [0.0, 0.0])  # to the right: black at the left border
    augmentation = Augmentation(box, (("TranslateX", 10.9),), ops_size=48, flip=True)
    for form in (picture, pixels_of_pil(picture)):
        found = render(form, augmentation, [ViewSpec(48)])[0].int()
        assert found[:, :, :10].max() == 0 and (found - pixels_of_pil(moved)).abs().max() <= 2


@pytest.mark.parametrize(("size", "tolerance"), [(448, 3.0), (256, 6.0)])
@pytest.mark.parametrize("name", SIGNED[:5])
def test_operations_move_the_content_by_the_same_share_at_every_size(name: str, size: int, tolerance: float) -> None:
    picture = gradient(500, 500)
    for sign in (1, -1):
        op = (name, sign * rand_augment_magnitude(name, 20))
        small, large = render(picture, Augmentation((0, 0, 500, 500), (op,)), [ViewSpec(224), ViewSpec(size)])
        unmoved = render(picture, Augmentation((0, 0, 500, 500)), [ViewSpec(224)])[0]
        shrunk = torch.nn.functional.interpolate(large[None].float(), 224, mode="bilinear", antialias=True)[0]
        inside = (small > 0).all(dim=0) & (shrunk > 8).all(dim=0)  # off the edge to black, which may fall beside
        assert inside.float().mean() > 0.5 and ((small > 0).all(dim=0) != inside).float().mean() < 0.06
        difference = (shrunk - small)[:, inside].abs()
        assert difference.mean() < tolerance / 3 and difference.quantile(0.99) < tolerance
        assert (unmoved.float() - small)[:, inside].abs().mean() > 5 * difference.mean()


def test_translations_are_cut_to_whole_pixels_where_they_were_drawn_and_then_scaled() -> None:
    picture = Image.new("RGB", (300, 300), "white")
    shifted = Augmentation((0, 0, 300, 300), (("TranslateY", 30.9),), ops_size=100)
    for side, black_rows in ((100, 30), (200, 60), (50, 15)):
        assert int((render(picture, shifted, [ViewSpec(side)])[0][0, :, 0] == 0).sum()) == black_rows


def test_pictures_are_mirrored_only_if_asked() -> None:
    picture = gradient(64, 64)
    for flip, low, high in ((0.0, 0, 0), (0.3, 30, 95), (1.0, 200, 200)):
        config, mirrored = AugmentConfig(flip=flip), 0
        for index in range(200):
            augmentation = draw_augmentation(picture.size, config, sample_generator(index))
            pixels = render(pixels_of_pil(picture), augmentation, [ViewSpec(32)])[0][0].float()
            assert augmentation.flip == (pixels[:, -1].mean() < pixels[:, 0].mean() - 150)
            mirrored += augmentation.flip
        assert low <= mirrored <= high


def test_ranges_without_meaning_are_errors() -> None:
    for wrong in [
        {"scale": (0.0, 1.0)}, {"scale": (0.9, 0.5)}, {"ratio": (0.0, 1.0)}, {"rand_augment_magnitude": 31},
        {"rand_augment_ops": -1}, {"flip": 1.5}, {"centre": True, "flip": 0.5},
        {"centre": True, "rand_augment_ops": 2},
    ]:  # fmt: skip
        with pytest.raises(InputError):
            AugmentConfig(**wrong)


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (("Explode", 1.0), "'Explode' is not a RandAugment operation"),
        (("Rotate", math.nan), "Rotate cannot have the magnitude nan"),
        (("TranslateX", math.inf), "TranslateX cannot have the magnitude inf"),
        (("Posterize", 9.0), "Posterize cannot have the magnitude 9.0"),
        (("Posterize", 0.5), "Posterize cannot have the magnitude 0.5"),
    ],
)
def test_stored_operations_that_cannot_be_applied_are_errors(op: tuple[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Augmentation((0, 0, 1, 1), (op,))


@pytest.mark.parametrize("name", RAND_AUGMENT_OPS)
def test_every_magnitude_that_is_accepted_can_be_applied(name: str) -> None:
    picture = noise(9, 9)
    for magnitude in (1.0, 8.0) if name == "Posterize" else (1e4, -1e4, 0.0):
        assert render(picture, Augmentation((0, 0, 9, 9), ((name, magnitude),), 1), [ViewSpec(2)])[0].shape == (3, 2, 2)


def test_an_image_size_of_nothing_is_an_error() -> None:
    with pytest.raises(InputError, match="ops_size 0"):
        Augmentation((0, 0, 1, 1), ops_size=0)
