"""Data of a single tower: pictures without captions, captions without pictures, from shards and from loose files."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from eval.benchmarks.conversations import SHAREGPT4V_JSON
from longclip_teacher.errors import InputError
from shard_files import TOKENIZER, keys_of, loader
from training.data.index import RawSample, ShardIndex
from training.data.loader import ShardLoader
from training.data.loose_files import CaptionFiles, PictureFolder
from training.data.samples import read_captions
from training.data.store import StoredDraw, TeacherInfo
from training.data.transforms import Augmentation, ViewSpec
from training.data.writer import caption_member, write_manifest, write_shard


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def caption(number: int) -> str:
    return f"Picture {number} of many. " + "It goes on. " * (number % 4)


def write_shards(folder: Path, samples: Sequence[dict[str, bytes]]) -> Path:
    folder.mkdir()
    numbered = [(f"{number:03d}", members) for number, members in enumerate(samples)]
    write_manifest(
        folder, [write_shard(folder / f"{i}.tar", numbered[i : i + 8]) for i in range(0, len(samples), 8)], {}
    )
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    samples = [{"jpg": jpeg(i), "json": caption_member([caption(i), f"Another {i}."])} for i in range(24)]
    return write_shards(tmp_path_factory.mktemp("data") / "pairs", samples)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "pictures"
    for number in range(26):
        path = root / f"part{number % 3}" / "deep" / f"{number:03d}.JPG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
    return root


# --- shards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 1])
def test_each_stage_sees_its_half_of_the_same_batches(pairs: Path, num_workers: int) -> None:
    views = [ViewSpec(16), ViewSpec(10)]
    both, image, text = (
        list(loader(pairs, stage=stage, views=views, num_workers=num_workers).batches(1))
        for stage in ("both", "image", "text")
    )
    assert len(both) == len(image) == len(text) == 3
    for whole, seen, read in zip(both, image, text, strict=True):
        assert whole.keys == seen.keys == read.keys
        assert torch.equal(seen.images, whole.images) and torch.equal(seen.teacher_images[0], whole.teacher_images[0])
        assert seen.long_tokens.shape == seen.short_tokens.shape == (8, 0) and seen.long_tokens.dtype == torch.int64
        assert torch.equal(read.long_tokens, whole.long_tokens)
        assert torch.equal(read.short_tokens, whole.short_tokens)
        assert read.images.shape == (8, 3, 0, 0) and read.images.dtype == torch.uint8 and read.teacher_images == ()
        for batch in (seen, read):
            part = batch.to("cpu").rows(slice(2, 5))
            assert len(part.keys) == len(part.images) == len(part.long_tokens) == 3


def test_there_are_as_many_views_as_are_asked_for(pairs: Path) -> None:
    sizes = (16, 10, 13, 16)
    batch = next(loader(pairs, views=[ViewSpec(size) for size in sizes]).batches(0))
    for size, view in zip(sizes, (batch.images, *batch.teacher_images), strict=True):
        assert view.shape == (8, 3, size, size)
        assert torch.equal(view, next(loader(pairs, views=[ViewSpec(size)]).batches(0)).images)
    moved = batch.rows(slice(3, 8)).to("cpu")
    assert [view.shape[0] for view in moved.teacher_images] == [5, 5, 5]
    assert torch.equal(moved.teacher_images[1], batch.teacher_images[1][3:])


def test_a_stage_needs_nothing_of_the_other_tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_captions = write_shards(tmp_path / "a", [{"jpg": jpeg(i), "json": b"{"} for i in range(8)])
    no_pictures = write_shards(tmp_path / "b", [{"jpg": b"x" * 999, "txt": caption(i).encode()} for i in range(8)])
    alone = write_shards(tmp_path / "c", [{"txt": caption(i).encode()} for i in range(8)])
    assert next(loader(no_captions, stage="image").batches(0)).skipped == {}
    assert next(loader(alone, stage="text", views=[]).batches(0)).skipped == {}
    sizes = []
    pread = os.pread
    monkeypatch.setattr("os.pread", lambda file, size, offset: sizes.append(size) or pread(file, size, offset))
    assert next(loader(no_pictures, stage="text").batches(0)).skipped == {}
    assert len(sizes) == 8 and max(sizes) < 100  # the pictures of 999 bytes are not read
    for shards, stage in ((no_captions, "both"), (no_pictures, "image"), (no_captions, "text")):
        with pytest.raises(InputError, match="20 samples drawn in a row cannot be used"):
            next(loader(shards, stage=stage).batches(0))


class Store:
    """Features that identify the sample and the part, with crops and captions of their own."""

    teacher_info = TeacherInfo((2,), 10.0, 248)

    def draw(self, raw: RawSample, seed: int, key: tuple[int, ...]) -> StoredDraw:
        assert raw.image is not None and raw.json is not None, "a store may identify a sample by any of its members"
        image, long, short = (np.array([key[-1], part], dtype=np.float32) for part in range(3))
        return StoredDraw(Augmentation((0, 0, 12, 12)), f"Stored {key[-1]}.", "Short.", image, long, short)


def test_stored_features_are_those_of_the_tower(pairs: Path) -> None:
    whole, image, text = (
        next(loader(pairs, stage=stage, open_store=lambda _: Store()).batches(0)) for stage in ("both", "image", "text")
    )
    assert whole.teacher is not None and image.teacher is not None and text.teacher is not None
    assert (set(whole.teacher), set(image.teacher), set(text.teacher)) == (
        {"image", "long", "short"}, {"image"}, {"long", "short"}
    )  # fmt: skip
    for batch in (image, text):
        assert batch.teacher is not None and all(torch.equal(whole.teacher[n], v) for n, v in batch.teacher.items())
    assert torch.equal(whole.images, image.images) and torch.equal(whole.long_tokens, text.long_tokens)


# --- a folder of pictures ---------------------------------------------------------------------------------------------


def test_a_folder_is_searched_through_but_not_left(tmp_path: Path) -> None:
    root, outside = tmp_path / "pictures", tmp_path / "outside"
    for path in ("b.jpg", "a/x.PNG", "a/y.webp", "ä/é.jpeg", "a.jpg/z.tif", ".hidden/h.jpg", "._b.jpg", "notes.txt"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(path.encode())
    outside.mkdir()
    (outside / "secret.jpg").write_bytes(b"secret")
    (root / "inside.jpg").symlink_to(root / "a" / "y.webp")
    (root / "link.jpg").symlink_to(outside / "secret.jpg")
    (root / "broken.jpg").symlink_to(root / "gone.jpg")
    (root / "folder").symlink_to(outside)
    (root / "loop").symlink_to(root)
    os.mkfifo(root / "fifo.jpg")
    (tmp_path / "by_link").symlink_to(root)
    expected = ["a.jpg/z.tif", "a/x.PNG", "a/y.webp", "b.jpg", "inside.jpg", "ä/é.jpeg"]
    for folder in (root, tmp_path / "by_link"):
        found: PictureFolder = pickle.loads(pickle.dumps(PictureFolder(folder)))  # noqa: S301
        assert [found.key(i) for i in range(found.num_samples)] == expected
        contents = [found.read(i).image for i in range(found.num_samples)]
        assert contents == [b"a/y.webp" if name == "inside.jpg" else name.encode() for name in expected]
    assert found.read(2) == RawSample("a/y.webp", b"a/y.webp", None, None)


def test_a_folder_without_pictures_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="no picture in it"):
        PictureFolder(tmp_path)
    with pytest.raises(InputError, match=r"\A--data.images .*gone: no such folder\Z"):
        PictureFolder(tmp_path / "gone")


def test_pictures_come_in_an_exact_order(pictures: Path) -> None:
    def make(**options: Any) -> ShardLoader:
        return loader(stage="image", images=pictures, **options)

    whole = [list(make().batches(epoch)) for epoch in (0, 1)]
    assert make().steps_per_epoch == 3 and make().num_samples == 26 and make().is_exact
    assert keys_of(whole[0]) != keys_of(whole[1]) and len(set(keys_of(whole[0]))) == 24
    ranks = [make(rank=rank, world_size=2, num_workers=rank) for rank in range(2)]
    for epoch in (0, 1):
        for expected, *parts in zip(whole[epoch], *(rank.batches(epoch) for rank in ranks), strict=True):
            assert [key for part in parts for key in part.keys] == expected.keys
            assert torch.equal(torch.cat([part.images for part in parts]), expected.images)
    rest = list(make().batches(1, step=2))
    assert len(rest) == 1 and rest[0].keys == whole[1][2].keys and torch.equal(rest[0].images, whole[1][2].images)


def test_pictures_that_cannot_be_used_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(20):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    (tmp_path / "cut.jpg").write_bytes(jpeg(0)[:200])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "large.jpg").write_bytes(jpeg(0) + bytes(5000))
    (tmp_path / "gone.jpg").write_bytes(jpeg(0))
    monkeypatch.setattr("training.data.loose_files.MAX_IMAGE_BYTES", 4000)
    pictures = loader(stage="image", images=tmp_path)
    (tmp_path / "gone.jpg").unlink()
    batches = list(pictures.batches(0))
    assert all(len(batch.images) == 8 for batch in batches) and len(batches) == 3
    assert not {"cut.jpg", "text.png", "large.jpg", "gone.jpg"} & set(keys_of(batches))
    causes = {"damaged picture": 1, "not a picture": 1, "no picture, or one of more than 64 MB": 2}
    assert set(pictures.skipped) == set(causes) and all(pictures.skipped[name] >= n for name, n in causes.items())
    with pytest.raises(InputError, match=r"cannot be used .* fix the data or raise it"):
        list(loader(stage="image", images=tmp_path, max_bad_share=0.0).batches(0))


# --- caption files ----------------------------------------------------------------------------------------------------


def texts_of(files: CaptionFiles) -> list[str | None]:
    raws = [files.read(i) for i in range(files.num_samples)]
    assert all(raw.image is None and raw.json is None for raw in raws)
    return [None if raw.txt is None else raw.txt.decode() for raw in raws]


@pytest.mark.parametrize("chunk", [1, 3, 7, 1 << 24])
@pytest.mark.parametrize(
    "content",
    [
        "one\ntwo. Goes on.\nthree", "one\n\n\ntwo\n", "\ufeffone\ntwo\n", "one\r\n\r\ntwo\r\n", "\n\none",
        "é ü\n中文\n", "a\rb\nc", "\r\none", "x",
    ],
)  # fmt: skip
def test_a_caption_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, chunk: int) -> None:
    monkeypatch.setattr("training.data.loose_files._CHUNK", chunk)
    (tmp_path / "a.txt").write_text(content, encoding="utf-8", newline="")
    lines = content.removeprefix("\ufeff").split("\n")
    expected = [line.removesuffix("\r") for line in lines if line.removesuffix("\r")]
    assert texts_of(CaptionFiles([str(tmp_path / "a.txt")])) == expected


def sharegpt4v(number: int) -> dict[str, Any]:
    return {"image": "x.jpg", "conversations": [{"value": "Say."}, {"from": "gpt", "value": f"Row {number}.\nMore."}]}


def test_every_layout_gives_its_captions(tmp_path: Path) -> None:
    (tmp_path / "cc.tsv").write_text('a red car\thttp://x/1.jpg\nno url\n\ttwo\nthe "end"\thttp://x\textra\n')
    annotations = [{"image_id": i, "id": i, "caption": f"caption {i}\nof COCO"} for i in range(3)]
    (tmp_path / "coco.json").write_text(json.dumps({"info": {}, "images": [], "annotations": annotations}))
    (tmp_path / SHAREGPT4V_JSON).write_text(
        "\ufeff " + json.dumps([sharegpt4v(i) for i in range(1002)]), encoding="utf-8"
    )
    (tmp_path / "more.txt").write_text("the last")
    files = CaptionFiles([str(tmp_path / "c*.*"), str(tmp_path / SHAREGPT4V_JSON), *[str(tmp_path / "more.txt")] * 2])
    files = pickle.loads(pickle.dumps(files))  # noqa: S301
    table = ["a red car", "no url", "", 'the "end"']
    coco = [f"caption {i} of COCO" for i in range(3)]
    assert texts_of(files) == [*table, *coco, "Row 1000. More.", "Row 1001. More.", "the last"]
    assert [files.read(i).key for i in (0, 3, 4, 9)] == ["cc.tsv:0", "cc.tsv:3", "coco.json:0", "more.txt:0"]
    assert files.shard_sizes.tolist() == [10] == [files.num_samples]


def test_rows_are_read_one_by_one_and_those_without_caption_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    answers: list[Any] = ["one", [{"type": "text", "text": "two"}], None, "half \ud83d"]
    rows = [{"conversations": [*turns, {"role": "Assistant", "content": answer}]} for answer in answers]
    (tmp_path / "own.json").write_text(json.dumps([*rows, 7, {"messages": rows[0]["conversations"]}]))
    annotations = [{"caption": "three"}, {"caption": None}, {"id": 1}, {"caption": "\ude00 four"}]
    (tmp_path / "coco.json").write_text(json.dumps({"annotations": annotations}))
    (tmp_path / "cc.tsv").write_text("url\tTitle\nhttp://x\tfive\nhttp://y\n")
    (tmp_path / "cut.txt").write_bytes("half \ud83d".encode("utf-8", "surrogatepass"))
    with caplog.at_level("INFO"):
        files = CaptionFiles([str(tmp_path / name) for name in ("own.json", "coco.json", "cc.tsv", "cut.txt")])
    captions = [read_captions(files.read(index))[0] for index in range(7)]
    assert captions == [["one"], ["two"], ["half \ufffd"], ["one"], ["three"], ["\ufffd four"], ["five"]]
    assert files.read(7).txt == b"" and read_captions(files.read(8))[0] == ["half \ufffd"]
    told = [message.partition(": ")[2] for message in caplog.messages]
    assert told == [
        "2 of 6 rows have no caption and are left out",
        "2 of 4 rows have no caption and are left out",
        "columns used: Title; ignored: url",
    ]


def test_half_an_emoji_in_a_shards_captions_is_replaced() -> None:
    members = RawSample("0", None, json.dumps({"caption_long": "a \ud83d", "caption_short": ["\ude00"]}).encode(), None)
    assert read_captions(members) == (["a \ufffd"], ["\ufffd"])


def test_lines_become_long_captions_and_their_first_sentences(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(caption(i) for i in range(20)))
    captions = loader(stage="text", captions=[str(tmp_path / "a.txt")], views=[], num_workers=1)
    seen = []
    for batch in captions.batches(0):
        for row, key in enumerate(batch.keys):
            text = caption(int(key.partition(":")[2])).strip()
            assert torch.equal(batch.long_tokens[row], TOKENIZER(text, batch.long_tokens.shape[1])[0])
            short = text.split(". ")[0]
            assert torch.equal(batch.short_tokens[row], TOKENIZER(short, batch.short_tokens.shape[1])[0])
        seen += batch.keys
    assert len(set(seen)) == 16 == len(seen)
    padded = next(loader(stage="text", captions=[str(tmp_path / "a.txt")], trim_captions=False).batches(0))
    assert padded.long_tokens.shape == (8, 248)


def test_lines_that_cannot_be_used_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.data.loose_files.MAX_TEXT_BYTES", 60)
    good = [f"line {i}".encode() for i in range(13)]
    (tmp_path / "a.tsv").write_bytes(b"\n".join([*good, b"\xff\xfe", b"\turl", b"   ", b"x" * 61]))
    captions = loader(stage="text", captions=[str(tmp_path / "*.tsv")], max_bad_share=1.0)
    batches = [batch for epoch in range(4) for batch in captions.batches(epoch)]
    assert all(len(batch.long_tokens) == 8 for batch in batches)
    assert set(captions.skipped) == {"txt is not UTF-8", "no caption"}
    assert {int(key.partition(":")[2]) for key in keys_of(batches)} == set(range(13))


def test_many_lines_cost_a_few_bytes_each(tmp_path: Path) -> None:
    num_lines = 100_000
    path = tmp_path / "many.txt"
    path.write_text("".join(f"a caption of some words, number {i}\n" for i in range(num_lines)))
    files = CaptionFiles([str(path)])
    assert files.num_samples == num_lines
    assert [files.read(i).txt for i in (0, 77_777)] == [
        f"a caption of some words, number {i}".encode() for i in (0, 77_777)
    ]
    assert len(pickle.dumps(files)) < 16 * num_lines + 2000  # offset and size: the text itself stays in the file
    with path.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(InputError, match=r"many\.txt has become shorter"):
        files.read(77_777)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\n\n", "no caption in it"),
        ("a.csv", b"x", r"give COCO captions or ShareGPT4V \(\.json\)"),
        ("a.tsv", b"filepath.jpg\ttitle\n", "the first column holds picture names"),
        ("a.json", b"{", "not valid JSON"),
        ("a.json", b'{"images": []}', "neither COCO captions"),
        ("a.json", b'{"annotations": [{"caption": 7}]}', "neither COCO captions"),
        ("a.json", b'{"annotations": 7}', "neither COCO captions"),
        ("a.json", b'"text"', "neither COCO captions"),
        ("a.json", b"[1]", "no caption in it"),
        ("a.json", b"[%s]" % b", ".join([b"7"] * 1001), "neither COCO captions"),
        ("a.json", b"[%s" % (b"[" * 100_000), "not valid JSON"),
    ],
)
def test_other_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        CaptionFiles([str(tmp_path / name)])
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_options_that_contradict_each_other_are_refused(pairs: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    captions = [str(tmp_path / "a.txt")]
    for options, message in [
        ({"images": pictures}, "belongs to --run.stage image, not both"),
        ({"images": pictures, "stage": "text"}, "belongs to --run.stage image, not text"),
        ({"captions": captions, "stage": "image"}, "belongs to --run.stage text, not image"),
        ({"images": pictures, "stage": "image", "open_store": lambda _: Store()}, "drop --teacher.cache"),
        ({"stage": "image", "views": []}, "no views"),
        ({"captions": captions, "stage": "text"}, "2 samples are fewer than one global batch of 8"),
        ({"captions": ["no-*.txt"], "stage": "text"}, "no file matches 'no-"),
    ]:
        with pytest.raises(InputError, match=message):
            loader(pairs, **options)


def test_an_index_reads_what_its_stage_asks_for(pairs: Path) -> None:
    whole, image, text = (ShardIndex([pairs / "0.tar"], stage=stage).read(3) for stage in ("both", "image", "text"))
    assert image == RawSample(whole.key, whole.image, None, None) and text == RawSample(
        whole.key, None, whole.json, None
    )
