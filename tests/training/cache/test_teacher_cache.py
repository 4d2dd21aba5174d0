"""A cache returns the teacher's features for exactly the crops and captions of its draws, and refuses misfits."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from cache_teacher import Options, cache
from eval.base.processes import Runtime
from longclip_teacher import create_teacher, load_teacher, save_teacher
from longclip_teacher.errors import InputError
from longclip_teacher.text import CaptionTokenizer
from training.cache.manifest import CACHE_MANIFEST, read_cache
from training.cache.reader import TeacherCacheStore, cached_teacher_info, open_cache
from training.data.decoding import normalized, open_picture
from training.data.index import ShardIndex
from training.data.samples import BadSample
from training.data.store import choose_captions, choose_view
from training.data.transforms import ViewSpec, render
from training.data.writer import caption_member, write_manifest, write_shard
from training.settings.augment import AugmentConfig

AUGMENT = AugmentConfig(scale=(0.5, 1.0), rand_augment_ops=2, flip=0.5)
VIEWS, SEED, BAD = 3, 7, 4
LONG = [[f"Board {i}. It is wide; façade &amp; {'more ' * (i % 6)}", f"A second text of {i}. End."] for i in range(14)]


def jpeg(number: int, size: tuple[int, int] = (40, 30)) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (size[1] // 5, size[0] // 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def member(number: int) -> bytes:
    if number % 3 == 0:
        return caption_member(LONG[number])  # shorts are first sentences
    return caption_member(LONG[number][0], ["the same short text", f"short {number % 4}"][: number % 3])


def write_shards(folder: Path, numbers: range = range(14)) -> Path:
    folder.mkdir(parents=True)
    records = []
    for start in range(0, len(numbers), 7):
        samples = [
            (f"{i:03d}", {"jpg": jpeg(i) if i != BAD else b"no picture", "json": member(i)})
            for i in numbers[start : start + 7]
        ]
        records.append(write_shard(folder / f"s-{start // 7}.tar", samples))
    write_manifest(folder, records, {})
    return folder


def make(shards: Path, teacher: Path, out: Path, **options: Any) -> Path:
    settings: dict[str, Any] = {"views": VIEWS, "augment": AUGMENT, "seed": SEED, "batch_size": 8, "num_workers": 0}
    wanted = Options(shards=(str(shards),), teacher=str(teacher), out=out, device="cpu", **{**settings, **options})
    wanted.check()
    cache(wanted, Runtime(0, 1, torch.device("cpu")))
    return out


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_teacher(create_teacher("tiny"), path)
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, shards: Path, teacher: Path) -> Path:
    return make(shards, teacher, tmp_path_factory.mktemp("cache"))


@pytest.fixture
def copied(tmp_path: Path, made: Path) -> Path:
    """A copy of the cache that a test may damage."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in made.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def opened(shards: Path, folder: Path, teacher: Path | None = None, **options: Any) -> TeacherCacheStore:
    index = ShardIndex(sorted(shards.glob("*.tar")))
    settings = {"augment": AUGMENT, **options}
    return open_cache(folder, index, teacher_checkpoint=None if teacher is None else str(teacher), **settings)


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and make it the only source about the shards."""
    path = folder / CACHE_MANIFEST
    content = json.loads(path.read_text())
    del content["sha256"]
    change(content)
    path.write_text(json.dumps(content))


# --- the same features ------------------------------------------------------------------------------------------------


def test_features_are_the_teachers_of_the_crops_and_captions_handed_out(
    shards: Path, made: Path, teacher: Path
) -> None:
    store, model = opened(shards, made, teacher), load_teacher(teacher)
    index, spec = store.index, ViewSpec(model.image_size, model.preprocess_cfg.interpolation)
    mean, std = torch.tensor(model.preprocess_cfg.mean), torch.tensor(model.preprocess_cfg.std)
    crops = set()
    for epoch in range(VIEWS):
        for number in set(range(14)) - {BAD}:
            raw = index.read(number)
            draw = store.draw(raw, 0, (epoch, number))
            crops.add((number, draw.augmentation))
            assert draw.picture_size == (40, 30) and len(draw.augmentation.ops) == 2
            pixels = render(open_picture(raw.image, True), draw.augmentation, [spec])[0][None]
            wanted = model.encode_image(normalized(pixels, mean, std), normalize=True)[0].numpy()
            assert np.abs(wanted - draw.image).max() < 1e-3 and draw.image.dtype == np.float16
            assert abs(np.linalg.norm(draw.image.astype(np.float32)) - 1) < 1e-3
            long, short = caption_texts(number, epoch)
            for text, tokens, features in (
                (long, draw.caption_long, draw.long),
                (short, draw.caption_short, draw.short),
            ):
                ids = CaptionTokenizer(model.context_length)([text])
                assert tokens.tolist() == ids[0, : len(tokens)].tolist() and ids[0, len(tokens) :].sum() == 0
                assert np.abs(model.encode_text(ids, normalize=True)[0].numpy() - features).max() < 1e-3
    assert len(crops) == 13 * VIEWS  # every view of every picture differs, and each epoch sees another
    assert cached_teacher_info(made) == store.teacher_info
    assert store.teacher_info.logit_scale == pytest.approx(float(model.linear_logit_scale))
    assert (store.teacher_info.embed_dim, store.teacher_info.context_length) == (model.embed_dim, 248)


def caption_texts(number: int, epoch: int) -> tuple[str, str]:
    """Return what training draws without a cache."""
    data = json.loads(member(number))
    long = data["caption_long"] if isinstance(data["caption_long"], list) else [data["caption_long"]]
    long = [text.strip() for text in long]
    short = data.get("caption_short", [])
    chosen, chosen_short = choose_captions(len(long), len(short), 0, (epoch, number))
    return long[chosen], long[chosen].split(". ")[0] if chosen_short < 0 else short[chosen_short]


def test_views_come_in_turn_and_equal_captions_are_stored_once(shards: Path, made: Path) -> None:
    store = opened(shards, made)
    arrays = load_file(made / "s-0.safetensors")
    for epoch in range(4):
        draw = store.draw(store.index.read(2), 3, (epoch, 2))
        assert np.array_equal(draw.image, arrays["image_features"][2, choose_view(VIEWS, 3, (epoch, 2))])
    _, records = read_cache(made)
    texts = [text for i in range(7) if i != BAD for text in caption_set(i)]
    assert records["s-0.tar"].num_captions == len(texts)
    assert records["s-0.tar"].num_distinct_captions == len(set(texts)) == len(arrays["caption_features"]) < len(texts)


def caption_set(number: int) -> list[str]:
    data = json.loads(member(number))
    long = data["caption_long"] if isinstance(data["caption_long"], list) else [data["caption_long"]]
    long = [text.strip() for text in long]
    return long + (data.get("caption_short") or [text.split(". ")[0] for text in long])


def test_centre_view(shards: Path, teacher: Path, tmp_path: Path) -> None:
    folder = make(shards, teacher, tmp_path / "c", views=0)
    store = opened(shards, folder, augment=AugmentConfig(centre=True, scale=(0.5, 0.7)))
    draws = [store.draw(store.index.read(1), 0, (epoch, 1)) for epoch in range(2)]
    assert draws[0].augmentation.box == (5, 0, 35, 30) and np.array_equal(draws[0].image, draws[1].image)
    with pytest.raises(InputError, match=r"augment\.centre is True there and False here"):
        opened(shards, folder)


def test_a_crop_depends_on_the_shard_and_not_on_the_list(
    shards: Path, teacher: Path, made: Path, tmp_path: Path
) -> None:
    alone = make(shards / "s-1.tar", teacher, tmp_path / "alone")
    assert (alone / "s-1.safetensors").read_bytes() == (made / "s-1.safetensors").read_bytes()
    boxes = [load_file(made / f"s-{i}.safetensors")["boxes"] for i in (0, 1)]
    assert not np.array_equal(boxes[0][0], boxes[1][0])
    index = ShardIndex([shards / "s-1.tar"])
    store = open_cache(made, index, AUGMENT, None)
    assert store.draw(index.read(0), 0, (0, 0)).picture_size == (40, 30)


def test_an_unreadable_sample_is_counted_and_replaced_in_training(shards: Path, made: Path) -> None:
    _, records = read_cache(made)
    assert [record.num_unreadable for record in records.values()] == [1, 0]
    store = opened(shards, made)
    with pytest.raises(BadSample, match="no stored features"):
        store.draw(store.index.read(BAD), 0, (0, BAD))


def test_the_store_travels_to_workers_and_holds_few_files(
    shards: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.cache.reader._MAX_OPEN_SIDECARS", 1)
    store = opened(shards, made)
    before = store.draw(store.index.read(9), 0, (0, 9))
    store.draw(store.index.read(0), 0, (0, 0))
    assert list(store._sidecars) == [0]
    copy = pickle.loads(pickle.dumps(store))  # noqa: S301 -- our own object
    assert not copy._sidecars
    after = copy.draw(copy.index.read(9), 0, (0, 9))
    assert after.augmentation == before.augmentation and np.array_equal(after.image, before.image)


# --- refusals ---------------------------------------------------------------------------------------------------------


def refused(shards: Path, folder: Path, match: str, teacher: Path | None = None, **options: Any) -> None:
    with pytest.raises(InputError, match=match) as caught:
        opened(shards, folder, teacher, **options)
    assert "\n" not in str(caught.value)


def test_another_teacher_is_refused(shards: Path, made: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    save_teacher(create_teacher("tiny"), tmp_path / "other.safetensors")
    refused(
        shards,
        made,
        "teacher sha256 is [0-9a-f]{64} there and [0-9a-f]{64} here .*other",
        tmp_path / "other.safetensors",
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": (0.4, 1.0)}, r"augment\.scale is \(0\.5, 1\.0\) there and \(0\.4, 1\.0\) here"),
        ({"ratio": (1.0, 1.0)}, r"augment\.ratio is \(0\.95, 1\.05\) there"),
        ({"rand_augment_ops": 1}, r"augment\.rand_augment_ops is 2 there and 1 here"),
        ({"rand_augment_magnitude": 3}, r"augment\.rand_augment_magnitude is 9 there and 3 here"),
        ({"flip": 0.0}, r"augment\.flip is 0\.5 there and 0\.0 here"),
        ({"centre": True, "flip": 0.0, "rand_augment_ops": 0}, r"augment\.centre is False there and True here"),
    ],
)
def test_another_recipe_is_refused(shards: Path, made: Path, change: dict[str, Any], message: str) -> None:
    refused(shards, made, message, augment=replace(AUGMENT, **change))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("shard_bytes", 5, r"s-1\.tar: shard bytes is 5 there and \d+ here"),
        ("shard_sha256", "ab", r"s-1\.tar: shard sha256 is ab there and [0-9a-f]{64} here"),
        ("num_samples", 9, r"s-1\.tar: num samples is 9 there and 7 here"),
        ("num_bytes", 3, r"s-1\.safetensors is damaged \(\d+ bytes instead of 3\)"),
        ("shard", "s-9.tar", r"1 of 2 shards have no sidecar, the first s-1\.tar: run scripts/cache_teacher"),
    ],
)  # fmt: skip
def test_other_shards_are_refused(shards: Path, copied: Path, name: str, value: Any, message: str) -> None:
    (copied / "s-1.teacher.json").unlink()
    edit(copied, lambda content: content["shards"][1].update({name: value}))
    refused(shards, copied, message)


def test_a_shard_of_the_same_sha256_is_known_without_its_index(
    shards: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShardIndex, "_index", lambda *_: pytest.fail("an index is read at the start"))
    opened(shards, made)


def test_a_tokenizer_a_version_and_a_damaged_manifest_are_refused(shards: Path, copied: Path) -> None:
    whole = (copied / CACHE_MANIFEST).read_text()
    changes: dict[str, Callable[[dict[str, Any]], Any]] = {
        "tokenizer is ab there and [0-9a-f]{64} here": lambda content: content["settings"].update(tokenizer="ab"),
        "format version 2, but this code reads 1": lambda content: content.update(version=2),
        r"not a valid teacher cache \(KeyError\('flip'\)\)": lambda content: content["settings"]["augment"].pop("flip"),
        "not a valid teacher cache": lambda content: content.update(shards=[1]),
    }
    for message, change in changes.items():
        edit(copied, change)
        refused(shards, copied, message)
        (copied / CACHE_MANIFEST).write_text(whole)
    (copied / CACHE_MANIFEST).write_text(whole[:50])
    refused(shards, copied, "not a valid teacher cache")
    (copied / CACHE_MANIFEST).unlink()
    refused(shards, copied, "no teacher cache in .*make one with scripts/cache_teacher.py")


def test_every_changed_character_of_a_manifest_is_found(copied: Path) -> None:
    path = copied / CACHE_MANIFEST
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])  # 0 and 1, a and b, ...
        with pytest.raises(InputError, match=r"\A[^\n]*teacher_cache\.json is not a valid teacher cache \([^\n]*\Z"):
            read_cache(copied)
    path.write_text(whole.decode().replace(f'"seed": {SEED},', f'"seed": {SEED + 1},'))
    with pytest.raises(InputError, match="damaged: its contents are not those that its sha256 names"):
        read_cache(copied)


def test_a_missing_sidecar_is_named_and_a_record_beside_one_is_enough(shards: Path, copied: Path) -> None:
    edit(copied, lambda content: content["shards"].pop(0))  # as after a kill before the end
    opened(shards, copied)
    (copied / "s-0.safetensors").unlink()
    refused(shards, copied, r"1 of 2 shards have no sidecar, the first s-0\.tar")


def test_shards_without_a_manifest_are_told_by_size_and_keys(
    shards: Path, teacher: Path, made: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in shards.glob("*.tar"):
        (bare / path.name).write_bytes(path.read_bytes())
    opened(bare, made)
    content = bytearray((bare / "s-0.tar").read_bytes())
    (bare / "s-0.tar").write_bytes(content.replace(b"002.", b"902."))
    (bare / "s-0.tar.index").unlink()
    fixed = bytearray((bare / "s-0.tar").read_bytes())
    for start in range(0, len(fixed), 512):  # the checksums of the changed headers
        if fixed[start : start + 4] == b"902.":
            fixed[start + 148 : start + 156] = b"        "
            fixed[start + 148 : start + 156] = b"%06o\0 " % sum(fixed[start : start + 512])
    (bare / "s-0.tar").write_bytes(fixed)
    refused(bare, made, r"s-0\.tar: keys sha256 is")


@pytest.mark.parametrize("size", [(60, 30), (40, 30)])
def test_another_picture_under_the_same_key_is_refused(shards: Path, made: Path, size: tuple[int, int]) -> None:
    store = opened(shards, made)
    raw = replace(store.index.read(1), image=jpeg(99, size))
    with pytest.raises(
        InputError, match=r"s-0\.tar: the picture of 001 is not the one that the teacher cache was made"
    ):
        store.draw(raw, 0, (0, 1))


def test_damage_is_named_where_it_is_read(shards: Path, copied: Path) -> None:
    arrays = load_file(copied / "s-0.safetensors")
    arrays["image_features"][2] = 0
    save_file(arrays, copied / "s-0.safetensors", {"format": "compact-longclip sidecar, version 1"})
    store = opened(shards, copied)
    store.draw(store.index.read(1), 0, (0, 1))
    with pytest.raises(InputError, match=r"s-0\.safetensors is damaged \(sample 002, view"):
        store.draw(store.index.read(2), 0, (0, 2))


def test_a_sidecar_of_another_width_is_refused(shards: Path, copied: Path) -> None:
    edit(copied, lambda content: content["settings"].update(embed_dim=7))
    store = opened(shards, copied)
    with pytest.raises(
        InputError, match=r"holds samples, views, width \(7, 3, \d+\), but its manifest says \(7, 3, 7\)"
    ):
        store.draw(store.index.read(2), 0, (0, 2))


def test_other_libraries_or_another_decoder_cost_one_line(
    shards: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened(shards, copied)
    assert capsys.readouterr().err == ""
    edit(copied, lambda content: content["settings"]["libraries"].update(pillow="1.0"))
    opened(shards, copied, fast_decode=False)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "decoder fast (here pil), pillow 1.0 (here " in error


def test_two_shards_of_one_name_are_refused(shards: Path, made: Path, tmp_path: Path) -> None:
    (tmp_path / "s-0.tar").write_bytes((shards / "s-0.tar").read_bytes())
    index = ShardIndex([shards / "s-0.tar", tmp_path / "s-0.tar"])
    with pytest.raises(InputError, match="would share one sidecar"):
        open_cache(made, index, AUGMENT, None)
