"""Shards in a bucket: moto's server on loopback, behind faults. Left out without s3fs and moto."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from longclip_teacher.errors import InputError
from shard_files import keys_of, loader, write_folder
from training.data.http_answer import Patience
from training.data.remote_files import parsed_remote
from training.data.stream import read_remote_shard

s3fs = pytest.importorskip("s3fs")
moto_server = pytest.importorskip("moto.server")
serving = pytest.importorskip("werkzeug.serving")

URL = "s3://bucket/data/s-{000,010,020,030,040}.tar"


class Faults:
    """moto's server, of which the next answers to GET are cut short or refused."""

    def __init__(self) -> None:
        self.app = moto_server.DomainDispatcherApplication(moto_server.create_backend_app)
        self.next: deque[str] = deque()
        self.num_met = 0

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        is_object = environ["REQUEST_METHOD"] == "GET" and "HTTP_RANGE" in environ
        kind = self.next.popleft() if is_object and self.next else ""
        self.num_met += bool(kind)
        if kind.isdigit():
            start_response(f"{kind} Fault", [("Content-Length", "0")])
            return [b""]
        body = b"".join(self.app(environ, start_response))
        return self._cut(body) if kind == "cut" else [body]

    def _cut(self, body: bytes) -> Iterator[bytes]:
        yield body[: len(body) // 2]
        raise ConnectionResetError


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("shards") / "indexed")


@pytest.fixture
def bucket(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Faults]]:
    """The shards in a bucket: its file system, and its faults."""
    faults = Faults()
    server = serving.make_server("127.0.0.1", 0, faults, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    storage = s3fs.S3FileSystem()
    storage.makedirs("bucket", exist_ok=True)  # moto's buckets outlive their server
    storage.put(str(shards), "bucket/data", recursive=True)
    try:
        yield storage, faults
    finally:
        server.shutdown()
        thread.join()
        s3fs.S3FileSystem.clear_instance_cache()


def test_a_bucket_gives_the_batches_of_the_disk_whatever_fails_on_the_way(
    shards: Path, bucket: tuple[Any, Faults], tmp_path: Path
) -> None:
    _, faults = bucket
    expected = [batch.keys for batch in loader(shards, shuffle_shards=2).batches(0)]
    for kinds in ([], ["503", "cut", "500", "cut", "503", "cut"]):
        faults.next.extend(kinds)
        found = loader(URL, shuffle_shards=2, cache_folder=tmp_path / str(len(kinds)))
        assert found.is_exact and [batch.keys for batch in found.batches(0)] == expected
        assert faults.num_met == len(kinds)
    assert len(list(read_remote_shard("s3://bucket/data/s-000.tar"))) == 10


def test_what_a_bucket_does_not_have_or_has_otherwise_is_named(bucket: tuple[Any, Faults], tmp_path: Path) -> None:
    storage, _ = bucket
    whole = storage.cat("bucket/data/s-020.tar")
    storage.pipe("bucket/data/s-020.tar", whole[:5000] + b"x" + whole[5001:])
    storage.rm("bucket/data/s-030.tar")
    for name, cause in [("s-020", "is not the file that its manifest describes"), ("s-030", "FileNotFoundError")]:
        with pytest.raises(InputError, match=cause) as caught:
            list(loader(f"s3://bucket/data/{name}.tar", cache_folder=tmp_path / "c").batches(0))
        assert f"s3://bucket/data/{name}.tar" in str(caught.value) and "\n" not in str(caught.value)
    storage.rm("bucket/data/manifest.json")
    stream = loader("s3://bucket/data/s-000.tar", epoch_samples=8)
    assert not stream.is_exact and len(keys_of(stream.batches(0))) == 8


def test_a_store_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setattr("training.data.remote_files._OBJECT_TRIES", 1)  # botocore itself takes seconds for each
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(InputError, match=r"\Acannot read s3://bucket/manifest\.json: .+, after 1 tries\Z"):
        parsed_remote("s3://bucket/manifest.json", 100, b"".join, Patience(first_wait=0.01))
