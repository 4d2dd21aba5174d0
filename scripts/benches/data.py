"""data: JPEG bytes to an augmented batch on one core, against PIL and torchvision's v1 transforms on the same crops.

Both sides decode, crop, resize to 256 and, if asked, run the same two RandAugment operations. The baseline then makes a
normalised float batch in the loader. Ours makes a uint8 batch, which the model's device normalises; the rows
"normalised" include that step, on the same core.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as v1
from torchvision.transforms.autoaugment import _apply_op as v1_rand_augment_op

from benches.measure import BenchOptions, Row, in_own_process, medians, peak_memory_gb
from eval.base.freed_memory import keep_freed_memory
from training.data.decoding import normalized, open_picture, picture_size
from training.data.randomness import sample_generator
from training.data.transforms import Augmentation, ViewSpec, draw_augmentation, render
from training.settings.augment import AugmentConfig

__all__ = ["bench_data", "photograph"]

DATA_BATCH = 64
DATA_PICTURE = (500, 375)  # pixels
DATA_VIEW = ViewSpec(256)
_MEAN, _STD = torch.tensor([0.4815, 0.4578, 0.4082]), torch.tensor([0.2686, 0.2613, 0.2758])
_CASES = tuple((ops, normalise) for ops in (0, 2) for normalise in (False, True))


def bench_data(options: BenchOptions) -> Iterator[Row]:
    """Measure without and with RandAugment, with our batch as bytes and as normalised floats."""
    for num_ops, normalise in _CASES:
        yield in_own_process(data_case, num_ops, normalise, options.rounds)


def data_case(num_ops: int, normalise: bool, rounds: int) -> Row:
    """Measure one case. The difference is in levels of 0 to 255, over the pixels of the batch."""
    torch.set_num_threads(1)  # as in a loader's worker
    keep_freed_memory()  # as training does; a setting of the process, so both sides have it
    config = AugmentConfig(rand_augment_ops=num_ops)
    files = [jpeg_file(index) for index in range(DATA_BATCH)]
    draws = [draw(index, DATA_PICTURE, config) for index in range(DATA_BATCH)]

    def ours() -> Tensor:
        batch = our_batch(files, config)
        return normalized(batch, _MEAN, _STD) if normalise else batch

    def baseline() -> Tensor:
        return baseline_batch(files, draws)

    found, expected = ours().float(), baseline() * (255 * _STD.view(3, 1, 1)) + 255 * _MEAN.view(3, 1, 1)
    if normalise:
        found = found * (255 * _STD.view(3, 1, 1)) + 255 * _MEAN.view(3, 1, 1)
    difference = (found - expected).abs().max().item()
    seconds, baseline_seconds = medians([ours, baseline], rounds)
    name = "crop + RandAugment" if num_ops else "crop"
    return Row(
        case=f"{name}, batch {DATA_BATCH}, {'normalised' if normalise else 'uint8'}",
        unit="images/s",
        ours=DATA_BATCH / seconds,
        baseline=DATA_BATCH / baseline_seconds,
        ratio=baseline_seconds / seconds,
        max_abs_diff=round(difference, 3),
        peak_gb=peak_memory_gb(),
    )


def draw(index: int, size: tuple[int, int], config: AugmentConfig) -> Augmentation:
    """Return the augmentation of one picture of the batch."""
    return draw_augmentation(size, config, sample_generator(0, index))


def our_batch(files: list[bytes], config: AugmentConfig) -> Tensor:
    """Do the work of one of our loader's workers, drawing the augmentations included: uint8 [B, 3, S, S]."""
    rendered = []
    for index, file in enumerate(files):
        picture = open_picture(file, fast=True)
        rendered += render(picture, draw(index, picture_size(picture), config), [DATA_VIEW])
    return torch.stack(rendered)


def baseline_batch(files: list[bytes], draws: list[Augmentation]) -> Tensor:
    """Do the same in PIL and torchvision v1: RandomResizedCrop, RandAugment, ToTensor and Normalize after drawing."""
    side = DATA_VIEW.image_size
    mean, std = _MEAN.tolist(), _STD.tolist()
    tensors = []
    for file, augmentation in zip(files, draws, strict=True):
        picture = Image.open(io.BytesIO(file)).convert("RGB")
        left, top, right, bottom = augmentation.box
        picture = v1.resized_crop(
            picture, top, left, bottom - top, right - left, [side, side], InterpolationMode.BICUBIC
        )
        for name, magnitude in augmentation.ops:
            if name.startswith("Translate"):  # drawn for another size
                magnitude = round(int(magnitude) * side / augmentation.ops_size)
            picture = v1_rand_augment_op(picture, name, magnitude, InterpolationMode.NEAREST, None)
        tensors.append(v1.normalize(v1.to_tensor(picture), mean, std))
    return torch.stack(tensors)


def jpeg_file(seed: int) -> bytes:
    """Make one JPEG of the batch, about 50 KB."""
    buffer = io.BytesIO()
    photograph(seed, DATA_PICTURE).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def photograph(seed: int, size: tuple[int, int]) -> Image.Image:
    """Make a picture with roughly a photograph's spectrum: noise that falls with frequency, and shapes with edges."""
    generator = np.random.default_rng(seed)
    width, height = size
    pixels = np.full((height, width, 3), 128.0)
    for cell, amplitude in ((128, 64), (32, 32), (8, 20), (3, 14), (1, 11)):
        grid = generator.integers(0, 256, (height // cell + 2, width // cell + 2, 3), dtype=np.uint8)
        noise = Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC)
        pixels += (np.asarray(noise) - 128.0) * (amplitude / 128)
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for _ in range(12):
        x, y, radius = (int(value) for value in generator.integers((0, 0, 8), (width, height, 60)))
        colour = tuple(int(value) for value in generator.integers(0, 256, 3))
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return picture
