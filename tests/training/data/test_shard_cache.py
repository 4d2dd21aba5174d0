"""The cache of remote files: its bound, what goes first, what killed processes leave, and disks that are full."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from at_once import start
from faults.runs import ended
from faulty_server import HURRIED, Fault, FaultyServer, serving
from longclip_teacher.errors import InputError
from longclip_teacher.temporaries import try_lock
from ranks import wait_until
from training.data.remote_files import RemoteFile
from training.data.shard_cache import ShardCache

SIZE = 50_000
CONTENT = {f"/{number}": random.Random(number).randbytes(SIZE) for number in range(6)}


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with serving(CONTENT) as found:
        yield found


def remote(server: FaultyServer, number: int) -> RemoteFile:
    content = CONTENT[f"/{number}"]
    return RemoteFile(f"{server.url}/{number}", SIZE, hashlib.sha256(content).hexdigest())


def cached(cache: ShardCache, server: FaultyServer) -> set[int]:
    """The numbers of the files in the cache."""
    names = {remote(server, number).sha256: number for number in range(len(CONTENT))}
    return {names[path.stem] for path in cache.folder.glob("*.shard") if path.stem in names}


def read(cache: ShardCache, file: RemoteFile) -> bytes:
    return cache.read(file, 0, SIZE)


def paths(server: FaultyServer) -> list[str]:
    return [path for path, _ in server.requests]


def test_the_least_recently_read_goes_first_and_nothing_else_in_the_folder(
    server: FaultyServer, tmp_path: Path
) -> None:
    for name in ("photo.jpg", "0" * 63 + ".shard", "notes.part", ".hidden"):
        (tmp_path / name).write_bytes(bytes(SIZE))
    foreign = sorted(tmp_path.iterdir())
    cache = pickle.loads(pickle.dumps(ShardCache(tmp_path, 3 * SIZE, HURRIED)))  # noqa: S301
    for number in (0, 1, 2, 0, 3):
        assert read(cache, remote(server, number)) == CONTENT[f"/{number}"]
    assert cached(cache, server) == {0, 2, 3} and paths(server) == ["/0", "/1", "/2", "/3"]
    assert read(cache, remote(server, 1))[:9] == CONTENT["/1"][:9] and cached(cache, server) == {0, 1, 3}
    assert [path for path in foreign if not path.exists()] == []


def test_what_is_expected_is_fetched_ahead_and_stays(server: FaultyServer, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 4 * SIZE, HURRIED)
    files = [remote(server, number) for number in range(6)]
    cache.expect(files[:2], files[2:4])
    wait_until(lambda: cached(cache, server) == {0, 1, 2, 3}, "nothing is fetched ahead")
    other = ShardCache(tmp_path, 4 * SIZE, HURRIED)  # of another process that is ahead
    other.expect(files[4:5], [])
    time.sleep(0.3)
    assert cached(cache, server) == {0, 1, 2, 3}  # it waits
    assert read(other, files[4]) == CONTENT["/4"]  # but what it needs it gets, in place of one of them
    assert len(cached(cache, server) & {0, 1, 2, 3}) == 3
    cache.expect(files[2:4], files[5:])
    wait_until(lambda: cached(cache, server) >= {2, 3, 4, 5}, "what is expected no more does not go")
    assert len(cached(cache, server)) == 4


def test_a_file_that_was_cut_short_is_fetched_again(server: FaultyServer, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 2 * SIZE, HURRIED)
    read(cache, remote(server, 0))
    os.truncate(cache.path(remote(server, 0)), SIZE // 2)
    assert read(cache, remote(server, 0)) == CONTENT["/0"] and paths(server) == ["/0", "/0"]


def test_bytes_that_are_not_the_manifests_are_asked_for_once_more(tmp_path: Path) -> None:
    other = Fault(body=bytes(SIZE))
    with serving(CONTENT, other) as server:
        assert read(ShardCache(tmp_path, SIZE, HURRIED), remote(server, 0)) == CONTENT["/0"]
        server.faults.extend([other, other])
        with pytest.raises(InputError, match=r"\A\S+/1 is not the file that its manifest describes \(sha256 "):
            read(ShardCache(tmp_path, SIZE, HURRIED), remote(server, 1))
        assert cached(ShardCache(tmp_path, SIZE), server) == set()


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path: Path) -> None:
    changed = replace(Fault(body=bytes(SIZE)), headers={"ETag": '"two"'})
    with (
        serving(CONTENT, Fault(cut_at=SIZE // 2), *[changed] * 9, ranges=False) as server,
        pytest.raises(InputError, match=r"\A\S+/0 is not the file that its manifest describes"),
    ):
        read(ShardCache(tmp_path, SIZE, HURRIED), remote(server, 0))


def test_a_killed_download_leaves_nothing_that_counts(tmp_path: Path) -> None:
    with serving(CONTENT, Fault(cut_at=SIZE // 2, then="stall")) as server:
        cache = ShardCache(tmp_path / "c", SIZE, HURRIED)
        pid = start(partial(read, cache, remote(server, 0)), [], tmp_path / "log")
        wait_until(lambda: any((tmp_path / "c").glob(".*.part/*.shard")), "no download")
        os.kill(pid, 9)
        ended([pid])
        assert read(cache, remote(server, 1)) == CONTENT["/1"]
        assert not list((tmp_path / "c").glob(".*.part")) and cached(cache, server) == {1}


def test_without_locks_what_nobody_has_written_for_long_goes(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    file = remote(server, 0)
    left = tmp_path / f".{file.sha256}.shard.{'0' * 16}.part" / f"{file.sha256}.shard"
    left.parent.mkdir()
    left.write_bytes(bytes(SIZE))
    os.utime(left, (time.time() - 1000,) * 2)
    cache = ShardCache(tmp_path, SIZE, HURRIED)
    cache.expect([file], [])
    # without locks the thread would fetch the file beside a read, and might end after it has made room for another
    wait_until(lambda: cached(cache, server) == {0} and not list(tmp_path.glob(".*.part")), "not fetched ahead")
    assert read(cache, file) == CONTENT["/0"] and not left.exists()
    assert read(cache, remote(server, 1)) == CONTENT["/1"] and cached(cache, server) == {1}


def test_a_process_forked_meanwhile_does_not_keep_the_lock(server: FaultyServer, tmp_path: Path) -> None:
    """A run that evaluates forks workers while its thread fetches."""
    cache = ShardCache(tmp_path / "c", SIZE, HURRIED)
    cache.expect([remote(server, 0)], [])
    with cache._alone():
        pid = start(partial(time.sleep, 60), [], tmp_path / "log")
    try:
        cache.expect([], [])
        for name in (".compact-longclip.room", f"{remote(server, 0).sha256}.use"):
            with (tmp_path / "c" / name).open("ab") as file:
                assert try_lock(file.fileno())
    finally:
        os.kill(pid, 9)
        ended([pid])


def test_a_full_disk_is_one_line_and_what_can_go_goes_before(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ShardCache(tmp_path, 10 * SIZE, HURRIED)
    read(cache, remote(server, 0))
    usage = shutil.disk_usage(tmp_path)

    def free(_: Path) -> object:
        return usage._replace(free=SIZE - SIZE * len(cached(cache, server)))

    monkeypatch.setattr("training.data.shard_cache.shutil.disk_usage", free)
    assert read(cache, remote(server, 1)) == CONTENT["/1"] and cached(cache, server) == {1}
    monkeypatch.setattr("training.data.shard_cache.shutil.disk_usage", lambda _: usage._replace(free=9))
    with pytest.raises(
        InputError, match=r"\Ano room for \S+/2 \(50000 bytes\): the disk of \S+ has 9 bytes left, .+\Z"
    ):
        read(cache, remote(server, 2))
    monkeypatch.undo()

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(InputError, match=r"\Acannot write \S+\.shard \(No space left on device\)"):
        read(cache, remote(server, 3))
    assert not list(tmp_path.glob(".*.part"))


def test_a_folder_that_cannot_be_written_is_named(server: FaultyServer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"\Acannot \S+ .*file.* (directory|exists)"):
        read(ShardCache(tmp_path / "file", SIZE, HURRIED), remote(server, 0))
    cache = ShardCache(tmp_path / "file" / "below", SIZE, HURRIED)
    with pytest.raises(InputError, match=r"\Acannot "):
        cache.expect([remote(server, 0)], [])
