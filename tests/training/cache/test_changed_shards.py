"""Pictures and captions changed in place under a teacher cache: named in training, made again by cache_teacher.py."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import training.cache.freshness
import training.cache.reader
from cache_teacher import Options, cache
from eval.base.processes import Runtime
from longclip_teacher import create_teacher, save_teacher
from longclip_teacher.errors import InputError
from training.cache.manifest import read_records
from training.cache.reader import TeacherCacheStore, open_cache
from training.data.index import ShardIndex
from training.data.writer import caption_member, write_manifest, write_shard
from training.settings.augment import AugmentConfig

TURNED = 2  # row of the picture that lies mirrored in its file


def picture(number: int, orientation: int = 1) -> bytes:
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((40, 30)).save(buffer, "JPEG", quality=90, exif=exif)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of four samples with their cache, and the teacher."""
    root = tmp_path_factory.mktemp("made")
    records = []
    for shard in range(3):
        numbers = range(4 * shard, 4 * shard + 4)
        pictures = {i: picture(i, 2 if i == TURNED else 1) for i in numbers}
        samples = [
            (f"{i:02d}", {"jpg": data, "json": caption_member(f"Board {i:02d} is wide.", [])})
            for i, data in pictures.items()
        ]
        (root / "shards").mkdir(exist_ok=True)
        records.append(write_shard(root / "shards" / f"s-{shard}.tar", samples))
    write_manifest(root / "shards", records, {})
    torch.manual_seed(0)
    save_teacher(create_teacher("tiny"), root / "teacher.safetensors")
    make(root)
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy of it whose times are those in its records."""
    for path in made.rglob("*"):
        if path.is_file():
            copy = tmp_path / path.relative_to(made)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(path.read_bytes())
    make(tmp_path)
    return tmp_path


def make(root: Path) -> None:
    shards, teacher, out = (str(root / name) for name in ("shards", "teacher.safetensors", "cache"))
    options = Options(shards=(shards,), teacher=teacher, out=Path(out), device="cpu", num_workers=0, batch_size=8)
    cache(options, Runtime(0, 1, torch.device("cpu")))


def opened(root: Path) -> TeacherCacheStore:
    index = ShardIndex(sorted((root / "shards").glob("*.tar")))
    return open_cache(root / "cache", index, AugmentConfig(), None)


def draw_all(store: TeacherCacheStore) -> None:
    for number in range(store.index.num_samples):
        store.draw(store.index.read(number), 0, (0, number))


def change(path: Path, old: bytes, new: bytes) -> None:
    """Change bytes in place; size and offsets stay, and so does the manifest beside the shards."""
    content = path.read_bytes()
    assert content.count(old) == 1 and len(old) == len(new)
    with path.open("r+b") as file:
        file.seek(content.index(old))
        file.write(new)


def states(root: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_ino, path.read_bytes()) for path in (root / "cache").glob("*.safetensors")}


@pytest.mark.parametrize("what", ["picture", "caption", "word"])
def test_a_change_is_named_and_its_sidecar_alone_made_again(
    root: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = root / "shards" / "s-1.tar"
    if what == "picture":
        whole, other = picture(6), picture(96)
        content = shard.read_bytes()
        start = content.index(whole)
        change(shard, content[start : start + len(whole)], other[: len(whole)].ljust(len(whole), b"\0"))
    else:
        new = b"Board 96 is wide." if what == "word" else b"Trees, many trees"
        change(shard, b"Board 06 is wide.", new)
    said = "captions of 06 are not those" if what != "picture" else "picture of 06 is not the one"
    with pytest.raises(
        InputError, match=rf"s-1\.tar: the {said} that the teacher cache was made from: run scripts/cac"
    ):
        draw_all(opened(root))
    before = states(root)
    capsys.readouterr()
    make(root)
    printed = capsys.readouterr()
    assert "s-1.tar was changed since s-1.safetensors was made: made again" in printed.err
    assert "(2 kept)" in printed.out
    after = states(root)
    assert {name for name in after if after[name] != before[name]} == {"s-1.safetensors"}
    draw_all(opened(root))
    make(root)
    assert "(3 kept)" in capsys.readouterr().out and states(root) == after


def test_captions_that_are_gone_or_come_are_named(root: Path) -> None:
    store = opened(root)
    raw = store.index.read(5)
    for member in (
        None,
        b"{}",
        b"{",
        caption_member(["Board 05 is wide.", "Another."], []),
        caption_member("Board 05 is wide.", ["Board 05 is wide."]),
    ):
        with pytest.raises(InputError, match="the captions of 05 are not those"):
            store.draw(replace(raw, json=member), 0, (0, 5))
    store.draw(raw, 0, (0, 5))


def test_the_checks_are_what_finds_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(root / "shards" / "s-1.tar", b"Board 06 is wide.", b"Board 96 is wide.")
    monkeypatch.setattr(training.cache.reader, "has_caption", lambda *_: True)
    monkeypatch.setattr(training.cache.freshness, "has_caption", lambda *_: True)
    before = states(root)
    draw_all(opened(root))
    make(root)
    assert states(root) == before


def test_a_shard_that_was_only_touched_is_read_once_and_kept(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    os.utime(root / "shards" / "s-2.tar")
    before = states(root)
    capsys.readouterr()
    make(root)
    assert "(3 kept)" in capsys.readouterr().out and states(root) == before
    monkeypatch.setattr("cache_teacher.is_stale", lambda *_, **__: pytest.fail("read again"), raising=False)
    monkeypatch.setattr(training.cache.freshness, "_is_changed", lambda *_: pytest.fail("read again"))
    make(root)


def test_a_damaged_sidecar_of_a_touched_shard_is_made_again(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = states(root)
    path = root / "cache" / "s-2.safetensors"
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    os.utime(root / "shards" / "s-2.tar")
    make(root)
    assert "(2 kept)" in capsys.readouterr().out
    assert {name: content for name, (_, content) in states(root).items()} == {n: c for n, (_, c) in whole.items()}


def as_made_before(root: Path) -> None:
    """Take the times out of the records, and the manifest's hash: caches of earlier versions have none."""
    for path in (root / "cache").glob("*.json"):
        content = json.loads(path.read_text())
        content.pop("sha256", None)
        for record in content.get("shards", [content]):
            del record["shard_changed_ns"]
        path.write_text(json.dumps(content))


def test_a_cache_of_before_stays_valid_but_for_mirrored_pictures(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Earlier versions stored pictures as they lie in their files; nothing else tells whether they were turned."""
    as_made_before(root)
    store = opened(root)
    for number in set(range(12)) - {TURNED}:
        store.draw(store.index.read(number), 0, (0, number))
    with pytest.raises(InputError, match=r"s-0\.tar: the teacher cache may hold the picture of 02 before it is turned"):
        store.draw(store.index.read(TURNED), 0, (0, TURNED))
    capsys.readouterr()
    make(root)
    assert "(2 kept)" in capsys.readouterr().out
    assert all(record.shard_changed_ns for record in read_records(root / "cache").values())
    draw_all(opened(root))


def test_a_sample_that_can_be_read_now_is_stored(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard, whole = root / "shards" / "s-0.tar", picture(1)
    change(shard, whole, bytes(len(whole)))
    make(root)
    assert "1 unreadable samples" in capsys.readouterr().out
    content = shard.read_bytes()
    start = content.index(b"\0" * len(whole), content.index(b"01.jpg") + 512)
    with shard.open("r+b") as file:
        file.seek(start)
        file.write(whole)
    make(root)
    printed = capsys.readouterr().out
    assert "(2 kept)" in printed and "unreadable" not in printed
    draw_all(opened(root))
