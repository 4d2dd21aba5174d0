"""Mixup, CutMix and random erasing of a batch: the mixtures, the rectangles, and the teacher's view of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from training.data.mixing import Mask, mix
from training.data.samples import Batch
from training.settings.options import MixOptions


def batch_of(images: Tensor, *teacher_images: Tensor) -> Batch:
    count = len(images)
    return Batch(
        images=images,
        teacher_images=teacher_images,
        long_tokens=torch.zeros(count, 0, dtype=torch.long),
        short_tokens=torch.zeros(count, 0, dtype=torch.long),
        keys=[str(i) for i in range(count)],
        draws=[(2, i) for i in range(count)],
        skipped={"broken": 1},
    )


def pure_colours(height: int, width: int) -> Tensor:
    """Return a red, a green and a blue picture: a mixture's channels show what it takes from each."""
    return (255 * torch.eye(3, dtype=torch.uint8))[:, :, None, None].repeat(1, 1, height, width)


def noise_pictures(count: int, size: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def test_off_leaves_the_batch_alone() -> None:
    batch = batch_of(noise_pictures(2))
    assert mix(batch, MixOptions(), seed=0, step=0) is batch


EVERYTHING = [MixOptions(erase=1), MixOptions(mixup=1), MixOptions(cutmix=1), MixOptions(0.4, 0.3, 0.9)]


@pytest.mark.parametrize("options", EVERYTHING)
def test_the_key_alone_decides(options: MixOptions) -> None:
    pictures = noise_pictures(6)
    before = pictures.clone()
    first = mix(batch_of(pictures), options, seed=3, step=5)
    torch.rand(7)  # the global generator is not read
    again = mix(batch_of(pictures), options, seed=3, step=5)
    assert torch.equal(pictures, before) and not torch.equal(first.shown, before)
    assert torch.equal(first.shown, again.shown)
    for key in ((6, 3), (5, 4)):
        assert not torch.equal(mix(batch_of(pictures), options, step=key[0], seed=key[1]).shown, first.shown), key
    assert first.shown.dtype == torch.uint8 and first.shown.shape == pictures.shape
    assert (first.keys, first.skipped) == (["0", "1", "2", "3", "4", "5"], {"broken": 1})


@pytest.mark.parametrize("options", EVERYTHING)
def test_the_shares_of_several_processes_are_the_batch_of_one(options: MixOptions) -> None:
    """Which picture is where in the batch does not matter to what is drawn for it."""
    whole = batch_of(noise_pictures(12), noise_pictures(12, 8))
    mask = Mask(0.5, 10)
    alone = mix(whole, options, seed=3, step=5, mask=mask)
    assert alone.hidden is not None and alone.hidden.shape == (12, 4, 4)
    for world_size in (2, 3, 6):
        size = 12 // world_size
        shares = [
            mix(whole.rows(slice(first, first + size)), options, seed=3, step=5, mask=mask)
            for first in range(0, 12, size)
        ]
        assert torch.equal(torch.cat([share.shown for share in shares]), alone.shown)
        assert torch.equal(torch.cat([share.hidden for share in shares if share.hidden is not None]), alone.hidden)
        for view, parts in zip(
            alone.teacher_images, zip(*(s.teacher_images for s in shares), strict=True), strict=True
        ):
            assert torch.equal(torch.cat(parts), view)


def test_rectangles_and_masks_belong_to_the_draw() -> None:
    pictures = noise_pictures(1).repeat(4, 1, 1, 1)
    batch = replace(batch_of(pictures), draws=[(0, 7), (0, 8), (1, 7), (0, 7)])
    found = mix(batch, MixOptions(erase=1), seed=0, step=0, mask=Mask(0.5, 10))
    assert found.hidden is not None
    for drawn in (found.shown, found.hidden):
        assert torch.equal(drawn[0], drawn[3])
        assert not any(torch.equal(drawn[0], drawn[other]) for other in (1, 2))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_each_picture_is_mixed_with_its_neighbour(count: int) -> None:
    pictures = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 20, 20) * 50
    for step in range(20):
        mixed = mix(batch_of(pictures), MixOptions(cutmix=1), seed=0, step=step).images
        for place, partner in enumerate({1: [0], 2: [1, 0], 5: [1, 0, 3, 2, 0]}[count]):
            assert set(mixed[place].unique().tolist()) <= {50 * place, 50 * partner}
            assert partner == place or step or len(mixed[place].unique()) == 2


def test_mixup_is_one_rounded_convex_mixture_at_every_resolution() -> None:
    shares = []
    for step in range(300):
        batch = mix(batch_of(pure_colours(4, 6), pure_colours(8, 8)), MixOptions(mixup=0.4), seed=0, step=step)
        views = [view.double().numpy() for view in (batch.images, *batch.teacher_images)]
        assert all((view == view[:, :, :1, :1]).all() for view in views), "pictures of one colour stay so"
        weights = views[0][:, :, 0, 0]
        np.testing.assert_array_equal(views[1][:, :, 0, 0], weights)
        np.testing.assert_allclose(weights.sum(axis=1), 255, atol=0.01)  # truncated instead of rounded, they sum to 254
        assert len({weights[i, i] for i in range(3)}) == 1, "one share for the batch"
        shares.append(weights[0, 0] / 255)
    # Beta(a, a) has mean 1/2 and variance 1 / (4 (2 a + 1)) = 0.139;
    assert np.mean(shares) == pytest.approx(0.5, abs=4 * np.sqrt(0.139 / len(shares)))
    assert np.var(shares) == pytest.approx(0.139, abs=0.025)


def box_of(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Return top, left, bottom, right, as shares of the sides, of the part where `mask` is True, a rectangle."""
    rows, columns = np.where(mask.any(axis=1))[0], np.where(mask.any(axis=0))[0]
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    assert mask[top:bottom, left:right].all()
    return top / mask.shape[0], left / mask.shape[1], bottom / mask.shape[0], right / mask.shape[1]


def test_cutmix_pastes_one_box_at_every_resolution() -> None:
    shares = []
    for step in range(300):
        batch = mix(batch_of(pure_colours(60, 60), pure_colours(40, 90)), MixOptions(cutmix=1.0), seed=0, step=step)
        views = [view.numpy() for view in (batch.images, *batch.teacher_images)]
        assert all((np.sort(view, axis=1) == [[[[0]], [[0]], [[255]]]]).all() for view in views), "no blending"
        pasted = [[view[i, i] == 0 for i in range(3)] for view in views]  # pixels that are not the picture's own
        moved = [i for i in range(3) if pasted[0][i].any() and pasted[1][i].any()]
        if not moved:
            continue
        boxes = [[box_of(masks[i]) for i in moved] for masks in pasted]
        assert all(len(set(found)) == 1 for found in boxes), "one box for the batch"
        np.testing.assert_allclose(boxes[0][0], boxes[1][0], atol=0.5 / 40 + 0.5 / 60)
        partners = [
            [view[i].argmax(axis=0)[masks[i]][0] for i in moved] for view, masks in zip(views, pasted, strict=True)
        ]
        assert partners[0] == partners[1]
        top, left, bottom, right = boxes[0][0]
        if min(top, left) > 0 and max(bottom, right) < 1:
            assert bottom - top == pytest.approx(right - left, abs=1.01 / 60)  # as wide as high, in shares of the side
        shares.append((bottom - top) * (right - left))
    # a side s around a uniform centre keeps s - s^2 / 4 of itself within the picture, and s^2 = 1 - share is uniform
    assert np.mean(shares) == pytest.approx(1 / 2 - 1 / 5 + 1 / 48, abs=0.04)


def test_with_both_on_each_batch_takes_one() -> None:
    blended = 0
    for step in range(400):
        images = mix(batch_of(pure_colours(8, 8)), MixOptions(mixup=1.0, cutmix=1.0), seed=1, step=step).images
        blended += int(((images > 0) & (images < 255)).any())
    assert 160 < blended < 240  # half are mixups: 200 expected, deviation 10


def test_erasing_replaces_rectangles_with_noise_and_only_for_the_student() -> None:
    count, size = 600, 40
    pictures, second = torch.full((count, 3, size, size), 77, dtype=torch.uint8), noise_pictures(count, 8)
    batch = mix(batch_of(pictures, second), MixOptions(erase=0.3), seed=0, step=0)
    assert batch.images is pictures and batch.teacher_images[0] is second and batch.shown is batch.erased
    assert (pictures == 77).all()
    assert batch.erased is not None
    changed = (batch.erased != pictures).any(dim=1).numpy()  # B H W; noise that hits 77 three times: 1 in 17 million
    erased = [mask for mask in changed if mask.any()]
    assert len(erased) / count == pytest.approx(0.3, abs=4 * np.sqrt(0.3 * 0.7 / count))
    boxes = np.array([box_of(mask) for mask in erased])
    heights, widths = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    areas = heights * widths
    assert areas.min() > 0.01 and areas.max() < 0.36  # 2% to 33%, the edges rounded to whole pixels
    assert areas.mean() == pytest.approx(0.175, abs=0.03)
    big = areas > 0.1
    aspects = np.log(heights[big] / widths[big])
    assert np.abs(aspects).max() < np.log(1 / 0.3) + 0.15
    assert aspects.mean() == pytest.approx(0, abs=0.25) and aspects.std() == pytest.approx(1.2 / 3**0.5, abs=0.12)
    assert boxes[:, 0].std() > 0.1 and boxes[:, 1].std() > 0.1, "rectangles are everywhere"
    noise = batch.erased.permute(0, 2, 3, 1)[torch.from_numpy(changed)].double()  # pixels, 3
    assert (noise.min(), noise.max()) == (0, 255)
    assert noise.mean() == pytest.approx(127.5, abs=4) and noise.std() == pytest.approx(256 / 12**0.5, abs=3)
    assert torch.corrcoef(noise.T).fill_diagonal_(0).abs().max() < 0.1, "each channel has its own"


def test_the_teacher_sees_the_complete_mixture() -> None:
    pictures = noise_pictures(4)
    mixed = mix(batch_of(pictures), MixOptions(mixup=1.0), seed=0, step=1)
    both = mix(batch_of(pictures), MixOptions(mixup=1.0, erase=1.0), seed=0, step=1)
    assert mixed.erased is None and mixed.shown is mixed.images
    assert torch.equal(both.images, mixed.images)
    assert both.erased is not None and not torch.equal(both.erased, mixed.images)


def test_batches_without_pictures_pass() -> None:
    empty = torch.empty(3, 3, 0, 0, dtype=torch.uint8)
    assert mix(batch_of(empty), MixOptions(erase=1.0, cutmix=1.0), seed=0, step=0).shown.shape == empty.shape
