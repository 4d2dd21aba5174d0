"""Stored teacher features at a URL: those of the cache on a disk, beside remote shards or elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cache_teacher import Options, cache
from eval.base.processes import Runtime
from longclip_teacher import create_teacher, save_teacher
from longclip_teacher.errors import InputError
from remote_folder import FolderServer, served
from shard_files import loader, write_folder
from training.cache.manifest import cache_place, cache_sha256
from training.cache.reader import cached_teacher_info, open_cache
from training.data.index import ShardIndex
from training.settings.augment import AugmentConfig

AUGMENT = AugmentConfig(centre=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with their cache in a folder below."""
    folder = tmp_path_factory.mktemp("remote")
    write_folder(folder / "shards", range(24), 6)
    save_teacher(create_teacher("tiny"), folder / "teacher.safetensors")
    options = Options(
        shards=(str(folder / "shards"),), teacher=str(folder / "teacher.safetensors"), views=0, device="cpu",
        num_workers=0,
    )  # fmt: skip
    cache(options, Runtime(0, 1, torch.device("cpu")))
    return folder


@pytest.fixture
def server(made: Path, tmp_path: Path) -> Iterator[FolderServer]:
    """A server of a copy, which a test may change."""
    with served(Path(shutil.copytree(made, tmp_path / "served"))) as found:
        yield found


def with_features(shards: str, where: str, **options: Any) -> Any:
    def open_store(index: ShardIndex | None) -> Any:
        assert index is not None
        return open_cache(cache_place(where), index, AUGMENT, None)

    return loader(shards, open_store=open_store, augment=AUGMENT, shuffle_shards=1, **options)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_features_at_a_url_are_those_of_the_disk(
    made: Path, server: FolderServer, tmp_path: Path, num_workers: int
) -> None:
    place = f"{server.url}/shards/teacher_cache/"
    local = with_features(str(made / "shards"), str(made / "shards/teacher_cache"))
    largest = sorted(path.stat().st_size for path in (made / "shards").rglob("s-*") if path.suffix != ".json")
    options: dict[str, Any] = {"cache_folder": tmp_path / "c", "num_workers": num_workers}
    urls = f"{server.url}/shards/s-{{000,006,012,018}}.tar"
    for where in (place, str(made / "shards/teacher_cache")):  # or remote shards with a cache on a disk
        remote = with_features(urls, where, cache_bytes=sum(largest), **options)
        for found, expected in zip(remote.batches(0), local.batches(0), strict=True):
            assert found.keys == expected.keys and found.teacher.keys() == expected.teacher.keys()
            assert all((found.teacher[name] == value).all() for name, value in expected.teacher.items())
    assert {path: count for path, count in server.gets.items() if count > 1 and path.endswith(("tar", "tensors"))} == {}
    assert cached_teacher_info(cache_place(place)) == cached_teacher_info(made / "shards/teacher_cache")
    names = [Path(name).name for name in remote.contents]
    assert cache_sha256(cache_place(place), names) == cache_sha256(made / "shards/teacher_cache", names)
    with pytest.raises(InputError, match="two windows of 1 shards"):  # sidecars count too
        with_features(urls, place, cache_bytes=2 * max(path.stat().st_size for path in made.rglob("*.tar")), **options)


def test_a_cache_at_a_url_that_is_not_there_or_damaged_is_named(
    made: Path, server: FolderServer, tmp_path: Path
) -> None:
    urls, options = f"{server.url}/shards/s-000.tar", {"cache_folder": tmp_path / "c", "global_batch_size": 2}
    for where, cause in [
        (f"{server.url}/none", r"cannot read \S+/none/teacher_cache\.json: HTTP 404"),
        ("ftp://host/cache", r"--teacher.cache 'ftp://host/cache': only local paths"),
    ]:
        with pytest.raises(InputError, match=cause):
            with_features(urls, where, **options)
    where = f"{server.url}/shards/teacher_cache"
    with pytest.raises(InputError, match="belongs to remote shards: copy it to the disk of these"):
        with_features(str(made / "shards"), where, global_batch_size=2)
    sidecar = tmp_path / "served/shards/teacher_cache/s-000.safetensors"
    sidecar.write_bytes(sidecar.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match=r"\A\S+/s-000\.safetensors is not the file that its manifest describes"):
        list(with_features(urls, where, **options).batches(0))
    manifest = tmp_path / "served/shards/teacher_cache/teacher_cache.json"
    manifest.write_text("[]")
    with pytest.raises(InputError, match=r"teacher_cache\.json is not a valid teacher cache"):
        with_features(urls, where, **options)
