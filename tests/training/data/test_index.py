"""Indices of shards: what is scanned, kept and read where, broken tars, patterns, further members of a sample."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
from pathlib import Path

import pytest

from longclip_teacher.errors import InputError
from longclip_teacher.weights_file import file_sha256
from shard_files import NUM_SAMPLES, jpeg, keys_of, loader, sample, write_folder, write_old_manifest
from training.data.byte_index import ByteIndex, scan_tar
from training.data.index import RawSample, ShardIndex, expand_patterns
from training.data.writer import write_manifest, write_shard


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("shards") / "indexed")


# --- the index --------------------------------------------------------------------------------------------------------


def test_writing_is_deterministic_and_the_manifest_is_true(shards: Path, tmp_path: Path) -> None:
    again = write_folder(tmp_path / "again")
    assert sorted(path.name for path in shards.iterdir()) == sorted(path.name for path in again.iterdir())
    assert all(path.read_bytes() == (again / path.name).read_bytes() for path in shards.iterdir())
    manifest = json.loads((shards / "manifest.json").read_text())
    assert manifest["num_samples"] == NUM_SAMPLES == sum(entry["num_samples"] for entry in manifest["shards"])
    for entry in manifest["shards"]:
        tar, file = shards / entry["name"], shards / f"{entry['name']}.index"
        assert entry["sha256"] == file_sha256(tar) and entry["bytes"] == tar.stat().st_size
        assert entry["index_sha256"] == file_sha256(file) and entry["index_bytes"] == file.stat().st_size
        index = ByteIndex.from_bytes(file.read_bytes())
        assert index.layout(entry["bytes"]) == entry["layout"] and len(index) == entry["num_samples"]
        with tarfile.open(tar) as archive:
            for row, (offset, size) in enumerate(index.spans["image"]):
                assert tar.read_bytes()[offset : offset + size] == archive.extractfile(f"{index.key(row)}.jpg").read()


def test_a_tar_without_manifest_is_scanned_once_and_read_the_same(shards: Path, tmp_path: Path) -> None:
    for tar in shards.glob("*.tar"):
        shutil.copy(tar, tmp_path)
    (tmp_path / "s-000.parquet").write_bytes(b"img2dataset's table")
    (tmp_path / "s-000_stats.json").write_text("{}")
    assert keys_of(loader(tmp_path).batches(0)) == keys_of(loader(shards).batches(0))
    cache = tmp_path / "s-000.tar.index"
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
    spans = scan_tar(shards / "s-000.tar").spans
    if cut == "a header":
        offset, size = spans["json"][4]
        header = int(-(-(offset + size) // 512) * 512)
        data[header : header + 512] = b"\x55" * 512
    else:
        last = int(-(-spans["json"][-1].sum() // 512) * 512)
        data = data[: last if isinstance(cut, str) else int(len(data) * cut)]
    path = tmp_path / "broken.tar"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"broken\.tar .*(not a complete tar|cut short)") as caught:
        loader(path)
    assert "\n" not in str(caught.value)
    # with a manifest, the changed size is enough to find it
    if len(data) != (shards / "s-000.tar").stat().st_size:
        shutil.copy(shards / "manifest.json", tmp_path)
        path.rename(tmp_path / "s-000.tar")
        with pytest.raises(InputError, match=r"s-000\.tar has \d+ bytes, but its manifest says"):
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
    manifest = write_old_manifest(write_folder(tmp_path / "x", [0]))
    for span in ([-1, 5], [0, 10**9], [2**62, 2**62], [2**70, 1]):
        manifest["shards"][0]["index"]["image"] = [span]
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
    with pytest.raises(InputError, match=r"only local paths, https://, s3:// and gs://|no shard matches"):
        expand_patterns(url)


# --- further members of a sample --------------------------------------------------------------------------------------


def reinforced(number: int) -> tuple[str, dict[str, bytes]]:
    key, members = sample(number)
    extra = {"url.txt": b"https://x", "syn.json": b"{}", "paug.json": b"[]", "npz": b"n" * number, "pth.gz": b"p"}
    return key, {**members, **extra}


def test_further_members_are_read_where_a_shard_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [write_shard(tmp_path / "a.tar", [sample(0), sample(1)])]
    records += [write_shard(tmp_path / "b.tar", [reinforced(2), sample(3), reinforced(4)])]
    assert "syn.json" not in scan_tar(tmp_path / "a.tar").spans
    assert scan_tar(tmp_path / "b.tar").spans["npz"][1].tolist() == [0, 0]
    expected = [{}, {}, {"syn.json": b"{}", "paug.json": b"[]", "npz": b"nn", "pth.gz": b"p"}, {}]

    def check() -> None:
        index = pickle.loads(pickle.dumps(ShardIndex([tmp_path / "a.tar", tmp_path / "b.tar"])))  # noqa: S301
        assert [index.read(number).extra for number in range(4)] == expected
        assert index.read(4).extra["npz"] == b"nnnn" and index.read(4).txt is None  # the url.txt is not a caption
        monkeypatch.setattr("training.data.index.MAX_EXTRA_BYTES", 3)
        assert set(index.read(4).extra) == {"syn.json", "paug.json", "pth.gz"}
        monkeypatch.undo()

    written = [path.read_bytes() for path in sorted(tmp_path.glob("*.index"))]
    check()  # from a scan, then from the scan's index
    check()
    for path, content in zip(sorted(tmp_path.glob("*.index")), written, strict=True):
        path.write_bytes(content)
    write_manifest(tmp_path, records, {})
    check()
    write_old_manifest(tmp_path)
    check()


def test_an_index_from_before_further_members_still_reads(tmp_path: Path) -> None:
    write_manifest(tmp_path, [write_shard(tmp_path / "a.tar", [reinforced(1)])], {})
    manifest = write_old_manifest(tmp_path)
    for name in ("syn.json", "paug.json", "npz", "pth.gz"):
        del manifest["shards"][0]["index"][name]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert ShardIndex([tmp_path / "a.tar"]).read(0) == RawSample("0001", jpeg(1), sample(1)[1]["json"], None)


def test_a_further_member_outside_its_shard_is_refused(tmp_path: Path) -> None:
    write_manifest(tmp_path, [write_shard(tmp_path / "a.tar", [reinforced(1)])], {})
    manifest = write_old_manifest(tmp_path)
    manifest["shards"][0]["index"]["npz"] = [[2**62, 2**62]]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="not a valid shard manifest"):
        ShardIndex([tmp_path / "a.tar"])


def test_a_sample_is_located_by_shard_and_row(shards: Path) -> None:
    index = ShardIndex(expand_patterns(str(shards / "s-*.tar")))
    assert [index.locate(number) for number in (0, 9, 10, 40)] == [(0, 0), (0, 9), (1, 0), (4, 0)]
    for number in (-1, 41):
        with pytest.raises(IndexError):
            index.locate(number)
