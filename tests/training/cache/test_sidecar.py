"""The sidecar's format: contents survive, little is added, and each damaged byte is found and named."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from longclip_teacher.errors import InputError
from training.cache.sidecar import CaptionRows, SampleEntry, Sidecar, write_sidecar
from training.data.randomness import sample_generator
from training.data.transforms import Augmentation, draw_augmentation
from training.settings.augment import AugmentConfig

WIDTH, VIEWS, OPS, SAMPLES = 32, 3, 2, 40
CONFIG = AugmentConfig(scale=(0.4, 1.0), rand_augment_ops=OPS, flip=0.5)


def unit(*shape: int) -> np.ndarray:
    features = np.random.default_rng(len(shape)).normal(size=shape)
    return (features / np.linalg.norm(features, axis=-1, keepdims=True)).astype(np.float16)


def entry(row: int) -> SampleEntry:
    if row == 5:
        return SampleEntry(f"key{row}")
    augmentations = [draw_augmentation((60, 50), CONFIG, sample_generator(row, view)) for view in range(VIEWS)]
    short = [SAMPLES + row % 3] if row % 2 else [row]
    return SampleEntry(f"key{row}", (60, 50), 1000 + row, augmentations, [row, row - row % 4], short, row % 2 == 0)


METADATA = {"format": "compact-longclip sidecar, version 1"}
ENTRIES = [entry(row) for row in range(SAMPLES)]
IMAGES, CAPTIONS = unit(SAMPLES, VIEWS, WIDTH), unit(SAMPLES + 3, WIDTH)
TOKENS = [np.array([49406, *range(row % 9), 49407], np.uint16) for row in range(SAMPLES + 3)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "s-000.safetensors"
    write_sidecar(path, ENTRIES, OPS, IMAGES, CaptionRows(CAPTIONS, TOKENS))
    return path


def read_all(sidecar: Sidecar) -> None:
    for row, written in enumerate(ENTRIES):
        for view in range(VIEWS):
            stored = sidecar.view(row, view, written.key)
            for caption in (*stored.long, *stored.short):
                sidecar.caption(int(caption), written.key)


def test_what_goes_in_comes_out(path: Path) -> None:
    sidecar = Sidecar(path)
    assert (sidecar.num_samples, sidecar.num_views, sidecar.embed_dim) == (SAMPLES, VIEWS, WIDTH)
    kinds = set()
    for row, written in enumerate(ENTRIES):
        for view in range(VIEWS):
            stored = sidecar.view(row, view, written.key)
            assert stored.is_valid == (row != 5)
            if row == 5:
                continue
            assert stored.augmentation == written.augmentations[view]  # magnitudes to the last bit
            kinds |= {name for name, _ in stored.augmentation.ops}
            assert (stored.size, stored.picture_crc) == (written.size, written.picture_crc)
            assert np.array_equal(stored.image, IMAGES[row, view])
            assert (stored.long.tolist(), stored.short.tolist()) == (written.long, written.short)
            assert stored.shorts_follow == written.shorts_follow
    assert len(kinds) == 14
    for row in range(SAMPLES + 3):
        features, tokens = sidecar.caption(row, "key")
        assert np.array_equal(features, CAPTIONS[row]) and np.array_equal(tokens, TOKENS[row])
        assert features.dtype == np.float16 and tokens.dtype == np.uint16
    assert not list(sidecar.damage())


def test_no_operations_no_captions_and_one_sample(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_sidecar(path, [SampleEntry("only")], 0, unit(1, 1, 8), CaptionRows(np.zeros((0, 8), np.float16), []))
    assert not Sidecar(path).view(0, 0, "only").is_valid
    with pytest.raises(InputError, match="caption 0"):
        Sidecar(path).caption(0, "only")


def test_the_file_is_little_more_than_its_arrays_and_the_same_every_time(tmp_path: Path) -> None:
    entries = [entry(row % 5) for row in range(400)]
    images, captions = unit(400, VIEWS, 64), unit(50, 64)
    for name in ("b", "c", "d", "e", "f", "a"):
        path = tmp_path / name / "s.safetensors"
        path.parent.mkdir()
        write_sidecar(path, entries, OPS, images, CaptionRows(captions, TOKENS[:1] * 50))
    num_bytes = sum(array.nbytes for array in load_file(path).values())
    assert num_bytes > images.nbytes + captions.nbytes
    assert path.stat().st_size <= 1.05 * num_bytes
    # everything but the features: parameters of the crops, keys, checksums; token ids of the captions
    assert num_bytes - images.nbytes - captions.nbytes <= 400 * (VIEWS * 32 + 60) + 50 * 24
    assert len({file.read_bytes() for file in tmp_path.glob("*/s.safetensors")}) == 1
    assert [file.name for file in path.parent.iterdir()] == ["s.safetensors"]


def test_it_is_mapped_not_read_and_each_process_maps_its_own(path: Path) -> None:
    sidecar = Sidecar(path)
    image = sidecar.view(3, 1, "key3").image
    assert not image.flags.owndata
    assert path.name in Path("/proc/self/maps").read_text()
    del sidecar
    assert np.array_equal(image, IMAGES[3, 1])  # the map lives as long as anything read from it
    with pytest.raises(TypeError):
        pickle.dumps(safe_open(path, framework="pt"))  # so TeacherCacheStore opens again in each process


# every array, at its first, middle and last byte; checksums too
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", [
    "image_features", "boxes", "flips", "op_ids", "op_magnitudes", "sizes", "picture_crcs", "valid", "keys",
    "long_rows", "long_offsets", "short_rows", "short_offsets", "shorts_follow", "caption_features", "tokens",
    "token_offsets", "view_crcs", "caption_crcs",
])  # fmt: skip
def test_a_flipped_byte_is_found_and_named(path: Path, name: str, place: float) -> None:
    header = int.from_bytes(path.read_bytes()[:8], "little")
    arrays = load_file(path)
    content = bytearray(path.read_bytes())
    start = _start(path, name)
    content[8 + header + start + round(place * (arrays[name].nbytes - 1))] ^= 0x10
    path.write_bytes(content)
    sidecar = Sidecar(path)
    assert all(str(what).startswith("sample ") for what in sidecar.damage()) and list(sidecar.damage())
    with pytest.raises(InputError, match=r"s-000\.safetensors is damaged \(sample .*key"):
        read_all(sidecar)


def _start(path: Path, name: str) -> int:
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size])[name]["data_offsets"][0]


def test_damage_of_one_view_leaves_the_others_readable(path: Path) -> None:
    arrays = load_file(path)
    arrays["image_features"][7, 1, 3] += np.float16(0.25)
    save_file(arrays, path, METADATA)
    sidecar = Sidecar(path)
    assert list(sidecar.damage()) == ["sample key7, view 1"]
    sidecar.view(7, 0, "key7")
    with pytest.raises(InputError, match="sample key7, view 1"):
        sidecar.view(7, 1, "key7")


def test_a_caption_is_named_by_a_sample_that_has_it(path: Path) -> None:
    arrays = load_file(path)
    arrays["caption_features"][SAMPLES + 1] = 0
    save_file(arrays, path, METADATA)
    assert list(Sidecar(path).damage()) == [f"sample key1, caption {SAMPLES + 1}"]


def test_files_of_other_layouts_are_refused(path: Path) -> None:
    whole, arrays = path.read_bytes(), load_file(path)
    cases = {
        "HeaderTooSmall|header|Header": lambda: path.write_bytes(b"\0" * 4),
        "damaged": lambda: path.write_bytes(whole[:-10]),
        "is not a sidecar": lambda: save_file(arrays, path, {}),
        "version 2, but this code reads 1": lambda: save_file(arrays, path, {"format": METADATA["format"][:-1] + "2"}),
        "boxes has shape": lambda: save_file({**arrays, "boxes": arrays["boxes"][:-1]}, path, METADATA),
        "flips is int8": lambda: save_file({**arrays, "flips": arrays["flips"].view(np.int8)}, path, METADATA),
        "tokens": lambda: save_file({k: v for k, v in arrays.items() if k != "tokens"}, path, METADATA),
    }  # fmt: skip
    for message, write in cases.items():
        write()
        with pytest.raises(InputError, match=message) as caught:
            Sidecar(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    path.unlink()
    with pytest.raises(InputError, match="no sidecar at"):
        Sidecar(path)


def test_another_key_is_refused(path: Path) -> None:
    with pytest.raises(InputError, match="holds sample key2, but the shard has key3"):
        Sidecar(path).view(2, 0, "key3")


def test_a_place_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    path.mkdir()
    with pytest.raises(InputError, match="cannot write"):
        write_sidecar(path, ENTRIES, OPS, IMAGES, CaptionRows(CAPTIONS, TOKENS))
    assert [file.name for file in tmp_path.iterdir()] == ["s.safetensors"]
    odd = [SampleEntry("k", (9, 9), 0, [Augmentation((0, 0, 9, 9), ops_size=100)])]
    with pytest.raises(ValueError, match="100 pixels"):
        write_sidecar(tmp_path / "t.safetensors", odd, 0, unit(1, 1, 8), CaptionRows(CAPTIONS, TOKENS))
