"""Stored teacher features that are damaged, and that are not."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from functools import cache as remembered
from pathlib import Path

import numpy as np
import pytest
import torch

from cache_teacher import Options, cache
from damages import damaged
from eval.base.processes import Runtime
from faults.trials import Row
from longclip_teacher import create_teacher, load_teacher, save_teacher
from longclip_teacher.errors import InputError
from longclip_teacher.weights_file import file_sha256
from shard_files import write_folder
from training.cache.reader import open_cache
from training.cache.sidecar import CaptionRows, SampleEntry, Sidecar, write_sidecar
from training.data.index import ShardIndex
from training.data.randomness import sample_generator
from training.data.transforms import draw_augmentation
from training.settings.augment import AugmentConfig

__all__ = ["ROWS", "small_cache"]

AUGMENT = AugmentConfig(scale=(0.5, 1.0), rand_augment_ops=2, flip=0.5)
VIEWS, SAMPLES = 2, 12


def small_cache(material: Path) -> None:
    """Two shards, a teacher, and its features of two views of each picture."""
    write_folder(material / "shards", range(SAMPLES), 6)
    torch.manual_seed(0)
    save_teacher(create_teacher("tiny"), material / "teacher.safetensors")
    options = Options(
        shards=(str(material / "shards"),), teacher=str(material / "teacher.safetensors"), out=material / "cache",
        views=VIEWS, augment=AUGMENT, batch_size=8, num_workers=0, device="cpu",
    )  # fmt: skip
    cache(options, Runtime(0, 1, torch.device("cpu")))


def _drawn(folder: Path, material: Path, teacher: Path | None = None) -> str:
    """All that training reads of a cache, as text. Raises InputError for damage."""
    index = ShardIndex(sorted((material / "shards").glob("*.tar")))
    store = open_cache(folder, index, AUGMENT, None if teacher is None else str(teacher))
    with np.printoptions(threshold=10**9):
        draws = [store.draw(index.read(row), 0, (epoch, row)) for row in range(SAMPLES) for epoch in range(VIEWS)]
        return repr((store.teacher_info, draws))


@remembered
def _whole(material: Path) -> str:
    return _drawn(material / "cache", material)


def damaged_trial(draws: random.Random, folder: Path, material: Path) -> str | None:
    shutil.copytree(material / "cache", folder, dirs_exist_ok=True)
    paths = sorted(folder.iterdir())
    sidecars = [path for path in paths if path.suffix == ".safetensors"]
    path = draws.choice(sidecars if draws.random() < 0.8 else paths)
    path.write_bytes(damaged(path.read_bytes(), draws.randrange(1 << 32))[1])
    try:
        found = _drawn(folder, material)
    except InputError as error:
        return "an error of several lines" if "\n" in str(error) else None
    return None if found == _whole(material) else f"{path.name}: the damage was not found"


def clean_trial(draws: random.Random, folder: Path, material: Path) -> str | None:
    """A sidecar of random contents is read back; in some trials a cache is opened with a copy of its teacher."""
    _read_back(draws, folder / "s.safetensors")
    if draws.random() < 0.1:
        save_teacher(load_teacher(material / "teacher.safetensors"), folder / "copy.safetensors")
        _drawn(material / "cache", material, folder / "copy.safetensors")
    return None


def _read_back(draws: random.Random, path: Path) -> None:
    """Write a sidecar and read it. Raises InputError for a false alarm, AssertionError for other contents."""
    generator = np.random.default_rng(draws.randrange(1 << 32))
    num_samples, num_views, num_captions, width = (draws.randint(1, most) for most in (12, 4, 20, 64))
    config = AugmentConfig(scale=(0.4, 1.0), rand_augment_ops=draws.randint(0, 2), flip=0.5)
    entries = list(_entries(draws, num_samples, num_views, num_captions, config))
    images = generator.normal(size=(num_samples, num_views, width)).astype(np.float16)
    tokens = [generator.integers(0, 49408, draws.randint(0, 30), np.uint16) for _ in range(num_captions)]
    captions = CaptionRows(generator.normal(size=(num_captions, width)).astype(np.float16), tokens)
    write_sidecar(path, entries, config.rand_augment_ops, images, captions)

    sidecar = Sidecar(path)
    assert not list(sidecar.damage()), "a false alarm"
    for row, entry in enumerate(entries):
        for view in range(num_views):
            stored = sidecar.view(row, view, entry.key)
            assert stored.is_valid == bool(entry.augmentations)
            assert np.array_equal(stored.image, images[row, view])
            assert (stored.long.tolist(), stored.short.tolist()) == (entry.long, entry.short)
            if stored.is_valid:
                assert stored.augmentation == entry.augmentations[view]
    for row in range(num_captions):
        features, ids = sidecar.caption(row, "any")
        assert np.array_equal(features, captions.features[row]) and np.array_equal(ids, tokens[row])


def _entries(
    draws: random.Random, num_samples: int, num_views: int, num_captions: int, config: AugmentConfig
) -> Iterator[SampleEntry]:
    for row in range(num_samples):
        key = draws.choice(["{}", "a/b/{}", "Élan {}", "名{}"]).format(row)
        if draws.random() < 0.1:
            yield SampleEntry(key)
            continue
        size = draws.randint(10, 4000), draws.randint(10, 4000)
        seeds = [draws.randrange(1 << 32) for _ in range(num_views)]
        augmentations = [draw_augmentation(size, config, sample_generator(seed)) for seed in seeds]
        long, short = ([draws.randrange(num_captions) for _ in range(draws.randint(0, 3))] for _ in range(2))
        yield SampleEntry(key, size, draws.randrange(1 << 32), augmentations, long, short, draws.random() < 0.5)


def _believe_stored_checksums(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("training.cache.sidecar._view_crc", lambda arrays, row, view: int(arrays["view_crcs"][row, view]))
    patch.setattr("training.cache.sidecar._caption_crc", lambda arrays, row: int(arrays["caption_crcs"][row]))


def _salted_checksums(patch: pytest.MonkeyPatch) -> None:
    """A checksum that is another each time, as that of a file whose writer draws an order."""
    patch.setattr("training.cache.sidecar._caption_crc", lambda arrays, row: random.getrandbits(32))
    patch.setattr("training.cache.reader.teacher_hashes", lambda path: (file_sha256(Path(path)),) * 2)


ROWS = [
    Row(
        "damaged caches",
        "a flipped bit, zeros or a cut in a file of a teacher cache: found, or without effect on any feature, crop or "
        "caption",
        damaged_trial,
        full=1000,
        few=30,
        off="no checksum is compared",
        switch_off=_believe_stored_checksums,
        num_off=30,
        prepare=small_cache,
        per_process=25,
    ),
    Row(
        "clean caches",
        "sidecars of random contents are read back, and a cache accepts a copy of its teacher",
        clean_trial,
        full=1000,
        few=30,
        off="checksums differ from one time to the next",
        switch_off=_salted_checksums,
        prepare=small_cache,
        per_process=25,
    ),
]
