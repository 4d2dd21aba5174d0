"""Shards: exact order for any number of processes and workers, captions, bad samples, streams."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from longclip_teacher.errors import InputError
from longclip_teacher.text import caption_lengths
from remote_folder import served
from shard_files import TOKENIZER, jpeg, keys_of, loader, sample, write_folder
from training.data.download import MissingFile
from training.data.index import RawSample, ShardIndex, Stage
from training.data.samples import BadSample, SampleDecoder, read_captions
from training.data.stream import ShardStream, read_remote_shard
from training.data.transforms import ViewSpec
from training.data.writer import write_manifest, write_shard
from training.settings.augment import AugmentConfig


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("shards") / "indexed")


# --- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 2), (2, 0), (4, 0)])
def test_ranks_and_workers_give_the_same_global_batches(shards: Path, world_size: int, num_workers: int) -> None:
    views = [ViewSpec(16), ViewSpec(12)]
    whole = loader(shards, views=views)
    parts = [
        loader(shards, views=views, rank=rank, world_size=world_size, num_workers=num_workers)
        for rank in range(world_size)
    ]
    assert {part.steps_per_epoch for part in parts} == {whole.steps_per_epoch} == {5}
    for epoch in (0, 1):  # the workers live on in the second epoch
        for expected, *ranks in zip(whole.batches(epoch), *(part.batches(epoch) for part in parts), strict=True):
            assert [key for batch in ranks for key in batch.keys] == expected.keys
            assert torch.equal(torch.cat([batch.images for batch in ranks]), expected.images)
            assert torch.equal(torch.cat([batch.teacher_images[0] for batch in ranks]), expected.teacher_images[0])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_in_the_middle_goes_on_exactly(shards: Path, num_workers: int) -> None:
    whole = list(loader(shards).batches(3))
    rest = list(loader(shards, num_workers=num_workers).batches(3, step=2))
    assert len(rest) == 3
    for expected, batch in zip(whole[2:], rest, strict=True):
        assert batch.keys == expected.keys and torch.equal(batch.images, expected.images)
        assert torch.equal(batch.long_tokens, expected.long_tokens)


def test_workers_left_in_the_middle_of_an_epoch_start_the_next_one_right(shards: Path) -> None:
    restless = loader(shards, num_workers=1)
    next(restless.batches(0))
    assert keys_of(restless.batches(1)) == keys_of(loader(shards).batches(1))


def test_an_epoch_leaves_out_only_the_remainder(shards: Path) -> None:
    keys = keys_of(loader(shards).batches(0))
    assert len(keys) == len(set(keys)) == 40
    assert loader(shards, epoch_samples=20).steps_per_epoch == 2


def test_batches_hold_what_the_shards_say(shards: Path) -> None:
    batch = next(loader(shards, augment=AugmentConfig(centre=True), views=[ViewSpec(20)]).batches(0))
    assert batch.images.dtype == torch.uint8 and batch.images.shape == (8, 3, 20, 20) and batch.teacher_images == ()
    for row, key in enumerate(batch.keys):
        with Image.open(io.BytesIO(jpeg(int(key)))) as picture:
            expected = np.asarray(picture.crop((2, 0, 22, 20)))  # the centre square of 24 x 20
        assert (batch.images[row].permute(1, 2, 0).numpy() == expected).all()
        caption = f"Picture {int(key)}. " + "It goes on. " * (int(key) % 5)
        length = batch.long_tokens.shape[1]
        assert torch.equal(batch.long_tokens[row], TOKENIZER(caption, length)[0])
        assert torch.equal(
            batch.short_tokens[row], TOKENIZER(caption.strip().split(". ")[0], batch.short_tokens.shape[1])[0]
        )
    assert batch.long_tokens.shape[1] == caption_lengths(batch.long_tokens).max()
    moved = batch.to("cpu")
    assert torch.equal(moved.images, batch.images) and moved.keys == batch.keys


# --- captions ---------------------------------------------------------------------------------------------------------


def raw(json_data: Any = None, txt: str | None = None) -> RawSample:
    member = None if json_data is None else json.dumps(json_data).encode()
    return RawSample("k", jpeg(0), member, None if txt is None else txt.encode())


@pytest.mark.parametrize(
    ("members", "long", "short"),
    [
        (raw({"caption_long": "A b. C.", "caption_short": "S"}), ["A b. C."], ["S"]),
        (raw({"caption_long": ["one", " two "], "caption_short": ["s", ""]}), ["one", "two"], ["s"]),
        (raw(None, "From a text.\n"), ["From a text."], []),
        (raw({"key": "000", "url": "u", "caption": "From img2dataset", "status": "ok"}, "x"), ["From img2dataset"], []),
        (raw({"key": "000", "caption": None}, "From the txt"), ["From the txt"], []),
        (raw({"caption_short": "Only short"}), ["Only short"], ["Only short"]),
    ],
)  # fmt: skip
def test_captions_are_found_where_each_layout_has_them(members: RawSample, long: list[str], short: list[str]) -> None:
    assert read_captions(members) == (long, short)


@pytest.mark.parametrize(
    ("members", "cause"),
    [
        (raw({"caption_long": ""}), "no caption"),
        (raw(None, None), "no caption"),
        (raw({"caption_long": 7}), "caption is not text"),
        (raw([1, 2]), "json is not an object"),
        (RawSample("k", b"", b"{", None), "json is damaged"),
        (RawSample("k", b"", b"[" * 100_000, None), "json is damaged"),
        (RawSample("k", b"", None, b"\xff\xfe"), "txt is not UTF-8"),
    ],
)
def test_captions_that_cannot_be_used_have_a_cause(members: RawSample, cause: str) -> None:
    with pytest.raises(BadSample, match=f"^{cause}$"):
        read_captions(members)


def test_one_caption_of_a_list_is_drawn_by_seed_epoch_and_index() -> None:
    members = raw({"caption_long": ["one", "two", "three"], "caption_short": ["s1", "s2"]})
    decoder = SampleDecoder((ViewSpec(8),), AugmentConfig(centre=True), seed=0)
    drawn = [decoder.decode(members, epoch, 5) for epoch in range(60)]
    long, short = zip(*(sample.captions for sample in drawn if sample.captions), strict=True)
    assert len(drawn) == len(long) and set(long) == {"one", "two", "three"} and set(short) == {"s1", "s2"}
    assert decoder.decode(members, 7, 5).captions == drawn[7].captions


# --- bad samples ------------------------------------------------------------------------------------------------------


def write_bad(folder: Path) -> Path:
    folder.mkdir()
    samples = [sample(i) for i in range(36)] + [
        ("bad-jpeg", {"jpg": jpeg(1)[:200], "txt": b"cut"}),
        ("bad-text", {"jpg": b"this is no picture", "txt": b"text"}),
        ("bad-none", {"jpg": jpeg(2)}),
        ("bad-alone", {"txt": b"a caption alone"}),
    ]
    write_manifest(folder, [write_shard(folder / "a.tar", samples)], {})
    return folder


def test_bad_samples_are_replaced_counted_and_never_shorten_a_batch(tmp_path: Path) -> None:
    folder = write_bad(tmp_path / "bad")
    one = loader(folder)
    batches = list(one.batches(0))
    assert all(len(batch.keys) == len(batch.images) == 8 for batch in batches) and len(batches) == 5
    assert not any(key.startswith("bad") for batch in batches for key in batch.keys)
    causes = {"damaged picture", "not a picture", "no caption", "no picture, or one of more than 64 MB"}
    assert set(one.skipped) == causes and sum(one.skipped.values()) >= 4
    ranks = [loader(folder, rank=rank, world_size=2) for rank in range(2)]
    pairs = zip(*(rank.batches(0) for rank in ranks), strict=True)
    assert [first.keys + second.keys for first, second in pairs] == [batch.keys for batch in batches]


def test_past_the_bad_share_the_run_stops_and_says_why(tmp_path: Path) -> None:
    folder = write_bad(tmp_path / "bad")
    with pytest.raises(InputError, match=r"(?s)cannot be used .*\d+ x .*max_bad_share allows \(0\)"):
        list(loader(folder, max_bad_share=0.0).batches(0))
    strict = loader(folder, max_bad_share=0.01, num_workers=1)
    with pytest.raises(InputError, match="cannot be used"):
        for epoch in range(20):
            list(strict.batches(epoch))


def test_shards_without_one_usable_sample_stop_at_once(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [(f"{i}", {"jpg": b"x", "txt": b"y"}) for i in range(8)])
    with pytest.raises(InputError, match=r"\A20 samples drawn in a row [^\n]*20 x not a picture[^\n]*\Z"):
        next(loader(tmp_path, num_workers=1).batches(0))


def test_members_that_could_carry_code_are_never_read(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    evil = pickle.dumps(Bomb())
    members = dict.fromkeys(["pyd", "pkl", "pickle", "pth", "npy", "cbor"], evil)
    write_shard(tmp_path / "a.tar", [(f"{i}", {**members, "jpg": jpeg(i), "txt": b"fine"}) for i in range(8)])
    index = ShardIndex([tmp_path / "a.tar"])
    assert index.read(3) == RawSample("3", jpeg(3), None, b"fine")
    assert len(next(loader(tmp_path).batches(0)).keys) == 8
    assert not (tmp_path / "exploded").exists()


def test_an_oversized_member_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.data.index.MAX_TEXT_BYTES", 100)
    write_shard(tmp_path / "a.tar", [("k", {"jpg": jpeg(0), "txt": b"x" * 101})])
    assert ShardIndex([tmp_path / "a.tar"]).read(0) == RawSample("k", jpeg(0), None, None)


def test_numbers_that_cannot_be_are_errors(shards: Path) -> None:
    for options in [
        {"global_batch_size": 64}, {"global_batch_size": 9, "world_size": 2}, {"views": []}, {"max_bad_share": 2.0},
        {"epoch_samples": 1000}, {"seed": -1},
    ]:  # fmt: skip
        with pytest.raises(InputError):
            loader(shards, **options)


# --- remote streams ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the shards and a broken one, without their manifest."""
    folder = tmp_path_factory.mktemp("served") / "shards"
    shutil.copytree(shards, folder, ignore=shutil.ignore_patterns("manifest.json"))
    (folder / "broken.tar").write_bytes((shards / "s-000.tar").read_bytes()[:9000])
    with served(folder) as found:
        yield found.url


@pytest.mark.parametrize("stage", ["both", "image", "text"])
def test_a_remote_shard_gives_what_the_local_one_holds(shards: Path, server: str, stage: Stage) -> None:
    index = ShardIndex([shards / "s-000.tar"], stage=stage)
    samples = list(read_remote_shard(f"{server}/s-000.tar", stage))
    assert samples == [index.read(i) for i in range(10)]
    assert {(sample.image is None, sample.json is None) for sample in samples} == {(stage == "text", stage == "image")}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_gives_full_batches_the_same_number_on_every_rank(server: str, num_workers: int) -> None:
    url = server + "/s-{000,010,020,030}.tar"
    seen = []
    for rank in range(2):
        stream = loader(url, rank=rank, world_size=2, epoch_samples=40, num_workers=num_workers)
        assert stream.num_samples is None and not stream.is_exact and stream.steps_per_epoch == 5
        batches = list(stream.batches(0))
        assert [len(batch.keys) for batch in batches] == [4] * 5
        assert [batch.keys for batch in stream.batches(0)] == [batch.keys for batch in batches]
        assert len(list(stream.batches(0, step=3))) == 2
        assert keys_of(stream.batches(1)) != keys_of(iter(batches))
        seen.append(keys_of(iter(batches)))
    assert seen[0] != seen[1] and len(set(seen[0])) > 8


@pytest.mark.parametrize("stage", ["image", "text"])
def test_a_stream_keeps_what_its_stage_asks_for(server: str, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = []
    monkeypatch.setattr(
        "training.data.stream.read_remote_shard",
        lambda url, stage: stages.append(stage) or read_remote_shard(url, stage),
    )
    batch = next(loader(f"{server}/s-010.tar", stage=stage, epoch_samples=8).batches(0))
    assert set(stages) == {stage} and batch.skipped == {} and len(batch.keys) == 8
    assert (batch.images.numel() > 0, batch.long_tokens.numel() > 0) == (stage == "image", stage == "text")


def test_a_shard_that_fails_on_the_way_is_counted_left_and_named_once(
    server: str, caplog: pytest.LogCaptureFixture
) -> None:
    urls = [f"{server}/broken.tar", f"{server}/gone.tar", f"{server}/s-010.tar"]
    stream = loader(urls, epoch_samples=80, max_bad_share=1.0)
    batches = list(stream.batches(0))
    assert all(len(batch.keys) == 8 for batch in batches) and stream.skipped["shard that failed"] > 2
    assert sorted(record.getMessage() for record in caplog.records if record.levelname == "WARNING") == [
        f"cannot read {server}/broken.tar: no complete tar file (unexpected end of data); left after 2 samples",
        f"cannot read {server}/gone.tar: HTTP 404 (Not Found): check its name; left after 0 samples",
    ]


def test_a_server_that_is_down_ends_the_run_after_two_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("training.data.download.time.sleep", waited.append)
    with pytest.raises(InputError, match=r"\Acannot read http://127.0.0.1:9/manifest.json: [^\n]*after 8 tries\Z"):
        loader("http://127.0.0.1:9/{0..9}.tar", epoch_samples=8)
    waited.clear()
    monkeypatch.setattr("training.data.loader.remote_shards", raise_missing)  # it was up a moment ago
    with pytest.raises(InputError, match=r"\A2 remote shards in a row failed, at last: [^\n]*after 8 tries\Z"):
        list(loader("http://127.0.0.1:9/{0..9}.tar", epoch_samples=8).batches(0))
    assert len(waited) == 14


def raise_missing(_: object) -> None:
    raise MissingFile("none")


def test_the_buffer_of_a_stream_is_bounded_in_bytes(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    monkeypatch.setattr("training.data.stream._SHUFFLE_BYTES", 5000)
    shuffled = ShardStream._shuffled

    def watched(self: ShardStream, *args: Any) -> Iterator[RawSample]:
        samples = shuffled(self, *args)
        for raw in samples:
            held.append(sum(len(one.image or b"") for one in samples.gi_frame.f_locals["buffer"]))
            yield raw

    monkeypatch.setattr(ShardStream, "_shuffled", watched)
    batches = list(loader(f"{server}/s-000.tar", epoch_samples=400).batches(0))
    assert len(keys_of(batches)) == 400 and 2500 < max(held) <= 5000


def test_a_stream_without_epoch_size_or_without_any_shard_is_an_error(server: str) -> None:
    with pytest.raises(InputError, match="epoch_samples"):
        loader(f"{server}/s-000.tar")
    with pytest.raises(
        InputError, match=r"\A10 remote shards in a row failed, at last: [^\n]*gone\.tar: HTTP 404[^\n]*\Z"
    ):
        list(loader(f"{server}/gone.tar", epoch_samples=8, num_workers=1).batches(0))
    with pytest.raises(InputError, match="partly local, partly remote"):
        loader([f"{server}/s-000.tar", __file__], epoch_samples=8)
