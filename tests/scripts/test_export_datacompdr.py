"""A teacher cache exported to DataCompDR's layout gives the same draws."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cache_teacher
import export_datacompdr
from longclip_teacher import create_teacher, save_teacher
from longclip_teacher.errors import InputError
from longclip_teacher.text import CaptionTokenizer
from training.cache.datacompdr import DataCompDRStore, datacompdr_teacher_info
from training.cache.reader import cached_teacher_info, open_cache
from training.data.index import ShardIndex
from training.data.writer import caption_member, write_manifest, write_shard
from training.settings.augment import AugmentConfig

AUGMENT = AugmentConfig(rand_augment_ops=2, flip=0.5)


def picture(number: int, form: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (60, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def members(number: int) -> dict[str, bytes]:
    if number == 4:  # unreadable, both when the cache is made and later
        return {"jpg": b"no picture", "json": caption_member("gone")}
    form = {"png": picture(number, "PNG")} if number == 2 else {"jpg": picture(number)}
    long = [f"Picture {number} is long. It goes on: café {part}." for part in range(1 + number % 3)]
    return {**form, "json": caption_member(long, None if number == 3 else f"picture {number}")}


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of three samples and their cache, in one folder."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "shards").mkdir()
    records = [
        write_shard(folder / f"shards/s-{shard}.tar", [(f"k{n}", members(n)) for n in range(3 * shard, 3 * shard + 3)])
        for shard in range(2)
    ]
    write_manifest(folder / "shards", records, {})
    torch.manual_seed(0)
    save_teacher(create_teacher("tiny"), folder / "teacher.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        arguments = f"--shards {folder}/shards --teacher {folder}/teacher.safetensors --out {folder}/cache --views 3"
        recipe = "--augment.rand-augment-ops 2 --augment.flip 0.5 --num-workers 0 --device cpu"
        patch.setattr("sys.argv", ["cache_teacher.py", *arguments.split(), *recipe.split()])
        cache_teacher.main()
    return folder


def run(cached: Path, out: Path) -> tuple[int, int]:
    return export_datacompdr.export(export_datacompdr.Options((f"{cached}/shards",), cached / "cache", out))


def test_the_export_gives_the_same_draws_as_the_cache(cached: Path, tmp_path: Path) -> None:
    assert run(cached, tmp_path / "dr") == (5, 6)
    source, target = (ShardIndex(sorted(folder.glob("*.tar"))) for folder in (cached / "shards", tmp_path / "dr"))
    cache = open_cache(cached / "cache", source, AUGMENT, None)
    teacher_info = datacompdr_teacher_info(target.names)
    assert teacher_info == cached_teacher_info(cached / "cache")
    store, tokenizer = DataCompDRStore(teacher_info), CaptionTokenizer()
    place = {target.key(number): number for number in range(target.num_samples)}
    augmentations = set()
    for number in (0, 1, 2, 3, 5):
        before, after = source.read(number), target.read(place[source.key(number)])
        assert after.image == before.image
        for epoch in range(6):
            ours, theirs = (s.draw(raw, 1, (epoch, number)) for s, raw in ((store, after), (cache, before)))
            assert ours.augmentation == theirs.augmentation
            augmentations.add(ours.augmentation)
            for caption, tokens in (
                (ours.caption_long, theirs.caption_long),
                (ours.caption_short, theirs.caption_short),
            ):
                ids = tokenizer([caption])[0]
                assert ids[: len(tokens)].tolist() == tokens.tolist()
            for name in ("image", "long", "short"):
                expected = getattr(theirs, name).astype(np.float32)
                assert np.abs(getattr(ours, name) - expected / np.linalg.norm(expected)).max() < 1e-6
    assert len(augmentations) == 15 and {one.flip for one in augmentations} == {False, True}


def test_finished_shards_are_kept_and_changed_ones_written_again(cached: Path, tmp_path: Path) -> None:
    out = tmp_path / "dr"
    run(cached, out)
    first, second = out / "s-0.tar", out / "s-1.tar"
    data, seen = second.read_bytes(), first.stat().st_mtime_ns
    second.unlink()
    assert run(cached, out) == (5, 6)
    assert second.read_bytes() == data and first.stat().st_mtime_ns == seen
    assert len(json.loads((out / "manifest.json").read_text())["shards"]) == 2


def test_shards_that_have_changed_since_and_the_same_folder_are_refused(cached: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is the folder of the shards themselves"):
        run(cached, cached / "shards")
    other = tmp_path / "shards"
    other.mkdir()
    for name, old, new, message in [  # the same number of bytes, so that the cache still fits
        ("captions", b"It goes on", b"It goes up", "the captions of sample k0 changed after the teacher cache"),
        ("picture", b"JFIF", b"JFIX", "the picture of sample k0 changed"),
    ]:
        changed = [(f"k{n}", {kind: data.replace(old, new) for kind, data in members(n).items()}) for n in range(3)]
        write_shard(other / "s-0.tar", changed)
        options = export_datacompdr.Options((f"{other}/s-0.tar",), cached / "cache", tmp_path / name)
        with pytest.raises(InputError, match=message):
            export_datacompdr.export(options)
        assert not (tmp_path / name).exists()
    (other / "s-0.tar").rename(other / "s-9.tar")
    with pytest.raises(InputError, match="have no sidecar"):
        export_datacompdr.export(export_datacompdr.Options((f"{other}",), cached / "cache", tmp_path / "none"))
