"""Remote shards with a manifest: the order of local ones, manifests that do not fit, and shards that cannot be had."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from longclip_teacher.errors import InputError
from remote_folder import FolderServer, served
from shard_files import jpeg, keys_of, loader, sample, write_folder
from training.data.http_answer import Patience
from training.data.index import is_remote
from training.data.shard_records import index_file
from training.data.writer import write_manifest, write_shard
from training.settings.own_data import run_config

PATTERN = "s-{000,010,020,030,040}.tar"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("shards") / "indexed")


@pytest.fixture
def server(shards: Path, tmp_path: Path) -> Iterator[FolderServer]:
    """A server of a copy of the shards, which a test may change."""
    with served(Path(shutil.copytree(shards, tmp_path / "served"))) as found:
        yield found


# --- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_remote_shards_give_the_batches_of_local_ones(
    shards: Path, server: FolderServer, tmp_path: Path, num_workers: int
) -> None:
    local = loader(shards, shuffle_shards=2)
    remote = loader(f"{server.url}/{PATTERN}", shuffle_shards=2, cache_folder=tmp_path / "c", num_workers=num_workers)
    assert remote.is_exact and remote.num_samples == 41 and remote.steps_per_epoch == 5
    for epoch in range(2):
        expected = list(local.batches(epoch))
        for found, batch in zip(remote.batches(epoch), expected, strict=True):
            assert found.keys == batch.keys and found.draws == batch.draws
            assert (found.images == batch.images).all() and (found.long_tokens == batch.long_tokens).all()
        assert keys_of(remote.batches(epoch, step=3)) == keys_of(expected[3:])
    assert {path: count for path, count in server.gets.items() if count > 1} == {}  # whoever wants it


def test_processes_of_a_node_fetch_a_shard_once(shards: Path, server: FolderServer, tmp_path: Path) -> None:
    whole = [batch.keys for batch in loader(shards, shuffle_shards=2).batches(0)]
    options: dict[str, Any] = {"shuffle_shards": 2, "cache_folder": tmp_path / "c", "world_size": 2, "num_workers": 2}
    ranks = [loader(f"{server.url}/{PATTERN}", rank=rank, **options) for rank in range(2)]
    pairs = zip(*(rank.batches(0) for rank in ranks), strict=True)
    assert [first.keys + second.keys for first, second in pairs] == whole
    assert server.gets.pop("/manifest.json") == 2 and set(server.gets.values()) == {1}
    assert sorted(server.gets) == sorted(f"/{path.name}" for path in shards.glob("*.tar*"))  # with their indexes


def test_a_bad_sample_is_replaced_from_its_window_on_every_rank_alike(tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    samples = [sample(i) if i % 4 else (f"bad-{i}", {"jpg": jpeg(1)[:200], "txt": b"x"}) for i in range(48)]
    parts = [(start, samples[start : start + 8]) for start in range(0, 48, 8)]
    write_manifest(folder, [write_shard(folder / f"s-{start:03d}.tar", part) for start, part in parts], {})
    with served(folder) as server:
        url = f"{server.url}/s-{{000,008,016,024,032,040}}.tar"
        options: dict[str, Any] = {"shuffle_shards": 2, "cache_folder": tmp_path / "c", "max_bad_share": 1.0}
        whole = [batch.keys for batch in loader(url, global_batch_size=12, **options).batches(0)]
        ranks = [loader(url, global_batch_size=12, rank=rank, world_size=3, **options) for rank in range(3)]
        batches = zip(*(rank.batches(0) for rank in ranks), strict=True)
        assert [[key for part in parts for key in part.keys] for parts in batches] == whole
    keys = [key for batch in whole for key in batch]
    windows = [{int(key) // 8 for key in keys[start : start + 16]} for start in (0, 16, 32)]
    assert all(len(window) == 2 for window in windows) and len(set.union(*windows)) == 6


# --- manifests --------------------------------------------------------------------------------------------------------


def test_without_a_manifest_shards_are_streamed_and_that_is_said(
    server: FolderServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "served/manifest.json").unlink()
    caplog.set_level("INFO")
    stream = loader(f"{server.url}/{PATTERN}", epoch_samples=16)
    assert not stream.is_exact and len(list(stream.batches(0))) == 2
    (told,) = caplog.messages
    assert told.startswith(f"no manifest beside the shards (cannot read {server.url}/manifest.json: HTTP 404 ")
    assert "streamed, drawn with replacement" in told
    with pytest.raises(InputError, match=r"without a manifest\.json beside them are streamed: upload it, or"):
        loader(f"{server.url}/{PATTERN}")


def _remove_shard(content: dict[str, Any]) -> None:
    del content["shards"][2]


def _remove_hash(content: dict[str, Any]) -> None:
    content["shards"][2]["sha256"] = ""


def _escape(content: dict[str, Any]) -> None:
    content["shards"][2]["sha256"] = "../" * 20 + "etc/passwd"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_remove_shard, r"/manifest\.json does not list s-020\.tar: upload its newest version, or leave it out\Z"),
        (_remove_hash, r"does not give the sha256 and the samples of s-020\.tar: write it again"),
        (_escape, r"does not give the sha256 and the samples of s-020\.tar"),
        (lambda content: content.update(version=9), r"manifest\.json is not a valid shard manifest \(another format"),
    ],
)  # fmt: skip
def test_a_manifest_that_does_not_describe_a_shard_is_named(
    server: FolderServer, tmp_path: Path, change: Callable[[dict[str, Any]], None], expected: str
) -> None:
    path = tmp_path / "served/manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=expected) as caught:
        loader(f"{server.url}/{PATTERN}", cache_folder=tmp_path / "c")
    assert "\n" not in str(caught.value)


def test_two_shards_of_one_name_are_refused_and_logins_are_not_shown(server: FolderServer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the same URL but for login and query"):
        loader([f"{server.url}/s-000.tar", f"{server.url}/s-000.tar?again"], cache_folder=tmp_path / "c")
    found = loader([f"{server.url}/s-000.tar?token=secret"], cache_folder=tmp_path / "c")
    assert list(found.contents) == [f"{server.url}/s-000.tar"]


# --- shards that cannot be had ----------------------------------------------------------------------------------------


def test_a_shard_that_is_gone_or_another_is_named(server: FolderServer, tmp_path: Path) -> None:
    (tmp_path / "served/s-020.tar").unlink()
    gone = loader(f"{server.url}/{PATTERN}", shuffle_shards=5, cache_folder=tmp_path / "c", num_workers=1)
    with pytest.raises(InputError, match=r"\Acannot read \S+/s-020\.tar: HTTP 404 \(Not Found\): check its name\Z"):
        list(gone.batches(0))
    content = (tmp_path / "served/s-030.tar").read_bytes()
    damaged = content[:5000] + b"x" + content[5001:]
    for other, cause in [(damaged, "sha256 "), (content + bytes(512), "it has more than ")]:
        (tmp_path / "served/s-030.tar").write_bytes(other)
        changed = loader(f"{server.url}/s-030.tar", cache_folder=tmp_path / "other")
        with pytest.raises(InputError, match=rf"\A\S+/s-030\.tar is not the file that its manifest .+ \({cause}"):
            list(changed.batches(0))


def test_a_cache_that_cannot_hold_two_windows_is_refused(server: FolderServer, tmp_path: Path) -> None:
    tars = (tmp_path / "served").glob("*.tar")
    sizes = sorted(path.stat().st_size + index_file(path).stat().st_size for path in tars)
    options: dict[str, Any] = {"shuffle_shards": 2, "cache_folder": tmp_path / "c"}
    with pytest.raises(InputError, match=r"\A--data.cache_gb \S+ is too little: two windows of 2 shards .+ GB\Z"):
        loader(f"{server.url}/{PATTERN}", cache_bytes=sum(sizes[1:]) - 1, **options)
    loader(f"{server.url}/{PATTERN}", cache_bytes=sum(sizes[1:]), **options)


def test_remote_shards_are_mixed_four_at_a_time_unless_the_user_says_so() -> None:
    url = ["--data.shards", "s3://bucket/{0..9}.tar", "--teacher.checkpoint", "None"]
    config, notes = run_config(url)
    assert config.data.shuffle_shards == 4 and any("4 at a time" in note for note in notes)
    assert run_config([*url, "--data.shuffle_shards", "64"])[0].data.shuffle_shards == 64
    assert run_config(["--data.shards", "own/*.tar", "--teacher.checkpoint", "None"])[0].data.shuffle_shards == 64
    assert is_remote("gs://bucket/a.tar") and Patience().tries == 8
