"""Shards: exact order for any number of processes and workers, captions, bad samples, broken tars, streams."""

from __future__ import annotations

import functools
import http.server
import io
import json
import pickle
import shutil
import tarfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from longclip_teacher.errors import InputError
from longclip_teacher.text import CaptionTokenizer, caption_lengths
from training.data.index import RawSample, ShardIndex, Stage, expand_patterns, scan_tar
from training.data.loader import Batch, LoaderSettings, ShardLoader, build_loader, epoch_order
from training.data.samples import BadSample, SampleDecoder, read_captions
from training.data.stream import read_remote_shard
from training.data.transforms import ViewSpec
from training.data.writer import caption_member, file_sha256, index_shard, write_manifest, write_shard
from training.settings.augment import AugmentConfig

TOKENIZER = CaptionTokenizer()
NUM_SAMPLES = 41


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def sample(number: int) -> tuple[str, dict[str, bytes]]:
    caption = f"Picture {number}. " + "It goes on. " * (number % 5)
    return f"{number:04d}", {"jpg": jpeg(number), "json": caption_member(caption.strip())}


def write_folder(folder: Path, numbers: Sequence[int] = range(NUM_SAMPLES), shard_size: int = 10) -> Path:
    folder.mkdir()
    records = [
        write_shard(folder / f"s-{start:03d}.tar", [sample(i) for i in numbers[start : start + shard_size]])
        for start in range(0, len(numbers), shard_size)
    ]
    write_manifest(folder, records, {})
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("shards") / "indexed")


def loader(shards: Any, **options: Any) -> ShardLoader:
    settings: dict[str, Any] = {
        "views": [ViewSpec(16)], "augment": AugmentConfig(), "tokenizer": TOKENIZER, "context_length": 248,
        "global_batch_size": 8,
    }  # fmt: skip
    return build_loader(LoaderSettings(shards, **{**settings, **options}))


def keys_of(batches: Iterator[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


# --- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle_shards", [1, 2, 3, 64])
def test_an_epoch_is_a_permutation_keyed_by_seed_and_epoch(shuffle_shards: int) -> None:
    sizes = [5, 1, 8, 3]
    order = epoch_order(sizes, 0, 0, shuffle_shards)
    assert sorted(order) == list(range(17))
    assert (order == epoch_order(sizes, 0, 0, shuffle_shards)).all()
    for other in [(1, 0), (0, 1)]:
        assert (order != epoch_order(sizes, *other, shuffle_shards)).any()


def test_samples_are_mixed_within_a_window_of_shards_only() -> None:
    order = epoch_order([10] * 6, 0, 0, shuffle_shards=2)
    windows = [set(order[start : start + 20] // 10) for start in range(0, 60, 20)]
    assert [len(window) for window in windows] == [2, 2, 2]
    assert len(set(np.abs(np.diff(order[:20])))) > 3  # mixed, not in sequence


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


# --- the index --------------------------------------------------------------------------------------------------------


def test_writing_is_deterministic_and_the_manifest_is_true(shards: Path, tmp_path: Path) -> None:
    again = write_folder(tmp_path / "again")
    manifest = json.loads((shards / "manifest.json").read_text())
    assert manifest["num_samples"] == NUM_SAMPLES == sum(entry["num_samples"] for entry in manifest["shards"])
    for entry in manifest["shards"]:
        tar = shards / entry["name"]
        assert tar.read_bytes() == (again / entry["name"]).read_bytes()
        assert entry["sha256"] == file_sha256(tar) and entry["bytes"] == tar.stat().st_size
        with tarfile.open(tar) as archive:
            for row, key in enumerate(entry["index"]["key"]):
                offset, size = entry["index"]["image"][row]
                assert tar.read_bytes()[offset : offset + size] == archive.extractfile(f"{key}.jpg").read()


def test_a_tar_without_manifest_is_scanned_once_and_read_the_same(shards: Path, tmp_path: Path) -> None:
    for tar in shards.glob("*.tar"):
        shutil.copy(tar, tmp_path)
    (tmp_path / "s-000.parquet").write_bytes(b"img2dataset's table")
    (tmp_path / "s-000_stats.json").write_text("{}")
    assert keys_of(loader(tmp_path).batches(0)) == keys_of(loader(shards).batches(0))
    cache = tmp_path / "s-000.tar.index.json"
    stamp = cache.stat().st_mtime_ns
    assert keys_of(loader(tmp_path / "*.tar").batches(1)) == keys_of(loader(shards).batches(1))
    assert cache.stat().st_mtime_ns == stamp
    write_shard(tmp_path / "s-000.tar", [sample(99)])  # the tar changes, so its cached index is stale
    assert ShardIndex([tmp_path / "s-000.tar"]).key(0) == "0099"


def test_img2dataset_tars_with_folders_and_directories_are_read(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        folder = tarfile.TarInfo("part")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("part/0000.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for name, data in [("part/0000.JPG", jpeg(0)), ("part/0000.txt", b"a cat"), ("part/._0001.jpg", b"macOS")]:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    index = ShardIndex([tmp_path / "00000.tar"])
    assert index.num_samples == 1 and index.read(0) == RawSample("part/0000", jpeg(0), None, b"a cat")


@pytest.mark.parametrize("cut", [0.3, 0.7, "before the end mark", "a header"])
def test_a_broken_tar_is_named(shards: Path, tmp_path: Path, cut: float | str) -> None:
    data = bytearray((shards / "s-000.tar").read_bytes())
    record = scan_tar(shards / "s-000.tar")
    if cut == "a header":
        offset, size = record.spans[4, 1]
        header = int(-(-(offset + size) // 512) * 512)
        data[header : header + 512] = b"\x55" * 512
    else:
        last = int(-(-record.spans[-1].sum(axis=1).max() // 512) * 512)
        data = data[: last if isinstance(cut, str) else int(len(data) * cut)]
    path = tmp_path / "broken.tar"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"broken\.tar .*(not a complete tar|cut short)") as caught:
        loader(path)
    assert "\n" not in str(caught.value)
    # with a manifest, the changed size is enough to find it
    if len(data) != record.num_bytes:
        shutil.copy(shards / "manifest.json", tmp_path)
        path.rename(tmp_path / "s-000.tar")
        with pytest.raises(InputError, match=r"s-000\.tar has \d+ bytes, its manifest says"):
            loader(tmp_path)


def test_empty_shards_missing_shards_and_foreign_manifests_are_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(InputError, match=r"empty\.tar is an empty shard"):
        loader(tmp_path / "empty.tar")
    with pytest.raises(InputError, match="no shard matches"):
        loader(str(tmp_path / "no-{000..003}.tar"))
    (tmp_path / "zero.tar").write_bytes(b"")
    with pytest.raises(InputError, match=r"zero\.tar"):
        loader(tmp_path / "zero.tar")
    write_shard(tmp_path / "a.tar", [sample(0)])
    for content in ["{", "[]", '{"format": "other", "version": 1}', "[" * 100_000]:
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(InputError, match=r"manifest\.json is not a valid shard manifest"):
            loader(tmp_path / "a.tar")


def test_a_manifest_that_points_outside_its_shard_is_refused(tmp_path: Path) -> None:
    record = index_shard(write_folder(tmp_path / "x", [0]) / "s-000.tar").to_json()
    for span in ([-1, 5], [0, 10**9], [2**62, 2**62], [2**70, 1]):
        record["index"]["image"] = [span]
        manifest = {"format": "compact-longclip shards", "version": 1, "num_samples": 1, "shards": [record]}
        (tmp_path / "x" / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(InputError, match="not a valid shard manifest"):
            ShardIndex([tmp_path / "x" / "s-000.tar"])


# --- patterns ---------------------------------------------------------------------------------------------------------


def test_patterns_expand_braces_globs_lists_and_folders(shards: Path) -> None:
    names = [str(shards / f"s-{start:03d}.tar") for start in (0, 10, 20, 30, 40)]
    assert expand_patterns(str(shards / "s-{000,010}.tar")) == names[:2]
    assert expand_patterns(shards) == expand_patterns(str(shards / "*.tar")) == names
    assert expand_patterns([names[1], str(shards / "s-00*.tar"), names[1]]) == [names[1], names[0]]
    assert expand_patterns("https://host/{0..2}.tar") == [f"https://host/{i}.tar" for i in range(3)]
    assert expand_patterns("s3://bucket/a.tar") == ["s3://bucket/a.tar"]


@pytest.mark.parametrize(
    "url",
    [
        "pipe:cat /etc/passwd", "memory://x.tar", "file:///etc/x.tar", "http://example.org/a.tar", "ftp://host/a.tar",
        "http://localhost.example.org/a.tar", "simplecache::https://host/a.tar", "https://host/a.tar::memory://b",
        "zip://a::https://host/b", "ssh://host/a.tar", "http://127.0.0.1@example.org/a.tar", "PIPE:ls",
        "{pipe:cat x,https://host/a.tar}",
    ],
)  # fmt: skip
def test_every_other_scheme_is_refused(url: str) -> None:
    with pytest.raises(InputError, match=r"only local paths, https:// and s3://|no shard matches"):
        expand_patterns(url)


def test_numbers_that_cannot_be_are_errors(shards: Path) -> None:
    for options in [
        {"global_batch_size": 64}, {"global_batch_size": 9, "world_size": 2}, {"views": []}, {"max_bad_share": 2.0},
        {"epoch_samples": 1000}, {"seed": -1},
    ]:  # fmt: skip
        with pytest.raises(InputError):
            loader(shards, **options)


# --- remote streams ---------------------------------------------------------------------------------------------------


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server(shards: Path) -> Iterator[str]:
    (shards / "broken.tar").write_bytes((shards / "s-000.tar").read_bytes()[:9000])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(shards))) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()
    (shards / "broken.tar").unlink()


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


def test_a_shard_that_fails_on_the_way_is_counted_and_left(server: str) -> None:
    urls = [f"{server}/broken.tar", f"{server}/gone.tar", f"{server}/s-010.tar"]
    stream = loader(urls, epoch_samples=80, max_bad_share=1.0)
    batches = list(stream.batches(0))
    assert all(len(batch.keys) == 8 for batch in batches) and stream.skipped["shard that failed"] > 0


def test_a_stream_without_epoch_size_or_without_any_shard_is_an_error(server: str) -> None:
    with pytest.raises(InputError, match="epoch_samples"):
        loader(f"{server}/s-000.tar")
    with pytest.raises(InputError, match=r"\A10 remote shards in a row failed, the last was [^\n]*gone\.tar[^\n]*\Z"):
        list(loader(f"{server}/gone.tar", epoch_samples=8, num_workers=1).batches(0))
    with pytest.raises(InputError, match="partly local, partly remote"):
        loader([f"{server}/s-000.tar", __file__], epoch_samples=8)


# --- further members of a sample --------------------------------------------------------------------------------------


def reinforced(number: int) -> tuple[str, dict[str, bytes]]:
    key, members = sample(number)
    extra = {"url.txt": b"https://x", "syn.json": b"{}", "paug.json": b"[]", "npz": b"n" * number, "pth.gz": b"p"}
    return key, {**members, **extra}


def test_further_members_are_read_where_a_shard_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [write_shard(tmp_path / "a.tar", [sample(0), sample(1)])]
    records += [write_shard(tmp_path / "b.tar", [reinforced(2), sample(3), reinforced(4)])]
    assert "syn.json" not in records[0].to_json()["index"] and records[1].to_json()["index"]["npz"][1] == [0, 0]
    expected = [{}, {}, {"syn.json": b"{}", "paug.json": b"[]", "npz": b"nn", "pth.gz": b"p"}, {}]

    def check() -> None:
        index = pickle.loads(pickle.dumps(ShardIndex([tmp_path / "a.tar", tmp_path / "b.tar"])))  # noqa: S301
        assert [index.read(number).extra for number in range(4)] == expected
        assert index.read(4).extra["npz"] == b"nnnn" and index.read(4).txt is None  # the url.txt is not a caption
        monkeypatch.setattr("training.data.index.MAX_EXTRA_BYTES", 3)
        assert set(index.read(4).extra) == {"syn.json", "paug.json", "pth.gz"}
        monkeypatch.undo()

    check()  # from a scan, then from the scan's cache, then from the manifest
    check()
    write_manifest(tmp_path, records, {})
    check()


def test_an_index_from_before_further_members_still_reads(tmp_path: Path) -> None:
    record = write_shard(tmp_path / "a.tar", [reinforced(1)]).to_json()
    for name in ("syn.json", "paug.json", "npz", "pth.gz"):
        del record["index"][name]
    manifest = {"format": "compact-longclip shards", "version": 1, "num_samples": 1, "shards": [record]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert ShardIndex([tmp_path / "a.tar"]).read(0) == RawSample("0001", jpeg(1), sample(1)[1]["json"], None)


def test_a_further_member_outside_its_shard_is_refused(tmp_path: Path) -> None:
    record = write_shard(tmp_path / "a.tar", [reinforced(1)]).to_json()
    record["index"]["npz"] = [[2**62, 2**62]]
    manifest = {"format": "compact-longclip shards", "version": 1, "num_samples": 1, "shards": [record]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="not a valid shard manifest"):
        ShardIndex([tmp_path / "a.tar"])


def test_a_sample_is_located_by_shard_and_row(shards: Path) -> None:
    index = ShardIndex(expand_patterns(str(shards / "s-*.tar")))
    assert [index.locate(number) for number in (0, 9, 10, 40)] == [(0, 0), (0, 9), (1, 0), (4, 0)]
    for number in (-1, 41):
        with pytest.raises(IndexError):
            index.locate(number)
