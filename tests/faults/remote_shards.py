"""Two processes train from remote shards through one cache, while the server has faults and one of them is killed."""

from __future__ import annotations

import os
import random
import re
import signal
import time
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from at_once import start
from faults.runs import ended
from faults.trials import Row, last_line
from faulty_server import HASTY, Fault, FaultyServer, passing_fault
from training.data import remote_files
from training.data.epoch_order import EpochOrder
from training.data.index import ShardIndex
from training.data.remote_index import RemoteShardIndex, remote_shards
from training.data.shard_cache import ShardCache
from training.data.writer import write_manifest, write_shard

__all__ = ["ROWS"]

_WINDOW, _BATCH = 2, 3


def _serve(server: FaultyServer) -> None:
    server.serve_forever(poll_interval=0.01)


def _read(url: str, num_shards: int, rank: int, out: Path, cache: ShardCache) -> None:
    """Read every other batch of two epochs, and note each sample, from where the notes end."""
    urls = [f"{url}/s-{number}.tar" for number in range(num_shards)]
    index = RemoteShardIndex(remote_shards(urls, HASTY), cache, _WINDOW)
    index.check_room()
    done = len(out.read_text().splitlines()) if out.is_file() else 0
    with out.open("a") as notes:
        for epoch in (0, 1):
            order = EpochOrder(index.shard_sizes, 0, epoch, _WINDOW)
            for place in _places(index.num_samples, rank):
                if done:
                    done -= 1
                    continue
                window = order.window_at(place)
                index.expect(order.shards_of(window), order.shards_of(window + 1))
                number = int(order.samples(place, place + 1)[0])
                raw = index.read(number)
                notes.write(f"{_note(raw.key, raw.image)}\n")
                notes.flush()


def _places(num_samples: int, rank: int) -> list[int]:
    return [place for place in range(num_samples) if place // _BATCH % 2 == rank]


def _note(key: str, image: bytes | None) -> str:
    return f"{key} {zlib.crc32(image or b'')}"


def _expected(folder: Path, rank: int) -> list[str]:
    index = ShardIndex(sorted(folder.glob("*.tar")))
    orders = [EpochOrder(index.shard_sizes, 0, epoch, _WINDOW).samples(0, index.num_samples) for epoch in (0, 1)]
    numbers = [int(order[place]) for order in orders for place in _places(index.num_samples, rank)]
    return [_note(raw.key, raw.image) for raw in map(index.read, numbers)]


def trial(draws: random.Random, folder: Path, material: Path) -> str | None:
    """The server has one to eight faults, or one that lasts. One process may be killed and started again."""
    shards, cache_folder = folder / "shards", folder / "cache"
    shards.mkdir()
    numbers, records = iter(range(10_000)), []
    for number in range(draws.randint(2, 7)):
        samples = [
            (f"{next(numbers):04d}", {"jpg": draws.randbytes(draws.randrange(1, 9000)), "txt": b"x"})
            for _ in range(draws.randint(1, 6))
        ]
        records.append(write_shard(shards / f"s-{number}.tar", samples))
    write_manifest(shards, records, {})
    content = {f"/{path.name}": path.read_bytes() for path in shards.iterdir()}
    largest = sorted((record.num_bytes + record.index_bytes for record in records), reverse=True)
    cache = ShardCache(cache_folder, sum(largest[: 2 * _WINDOW]), HASTY)
    lost, cause = "", draws.choice([None, None, None, "gone", "changed"])
    if cause is not None:
        whole = content.pop(lost := f"/s-{draws.randrange(len(records))}.tar")
        content |= {lost: draws.randbytes(len(whole))} if cause == "changed" else {}
    found = [_fault(draws, content) for _ in range(draws.randint(1, 8))]
    if draws.random() < 0.6:
        other = Fault(body=draws.randbytes(len(draws.choice(list(content.values())))))
        found.insert(draws.randrange(len(found) + 1), other)
    server = FaultyServer(content, *found, ranges=draws.random() < 0.7)
    logs, outs = [folder / f"{number}.log" for number in range(4)], [folder / f"{rank}.txt" for rank in (0, 1)]
    read = [partial(_read, server.url, len(records), rank, outs[rank], cache) for rank in (0, 1)]
    serving = start(partial(_serve, server), [], logs[3])
    server.socket.close()
    pids = [start(read[rank], [], logs[rank]) for rank in (0, 1)]
    try:
        if draws.random() < 0.5:
            time.sleep(draws.uniform(0, 0.5))
            os.kill(pids[0], signal.SIGKILL)
            ended(pids[:1])
            pids[0] = start(read[0], [], logs[2])
        codes = _watch(pids, cache)
    finally:
        os.kill(serving, signal.SIGKILL)
        ended([serving])
    if isinstance(codes, str):
        return codes
    said = [last_line(log) for log in (logs[2] if logs[2].exists() else logs[0], logs[1])]
    told = f"{cause} {lost}: {codes} {said} {[(fault.status, fault.cut_at, fault.then) for fault in found]}"
    line = {"gone": rf"cannot read \S+{lost}: HTTP 404", "changed": rf"\S+{lost} is not the file that its manifest"}
    named = [cause is not None and code == 2 and re.match(f"error: {line[cause]}", last) is not None
             for code, last in zip(codes, said, strict=True)]  # fmt: skip
    # a process that needs no sample of the lost shard goes on to its end
    wrong = [
        rank for rank in (0, 1) if not named[rank] and (codes[rank] or _lines(outs[rank]) != _expected(shards, rank))
    ]
    return f"processes {wrong}: {told}" if wrong or (cause and not any(named)) else None


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def _fault(draws: random.Random, content: Mapping[str, bytes]) -> Fault:
    fault = passing_fault(draws, len(draws.choice(list(content.values()))))
    return _fault(draws, content) if fault.status == 302 else fault  # the server has each file at one address


def _watch(pids: list[int], cache: ShardCache) -> list[int] | str:
    """Wait for two processes. Return how they ended, or that the cache held too much meanwhile."""
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        if cache.folder.is_dir():
            with cache._alone():
                if (held := cache._survey()[0]) > cache.most_bytes:
                    return f"{held} bytes in a cache of {cache.most_bytes}"
        for pid in pids:
            if pid not in codes and (done := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(done[1])
        time.sleep(0.02)
    return [codes[pid] for pid in pids]


def _believe(patch: pytest.MonkeyPatch) -> None:
    compared = remote_files._difference

    def believed(*given: Any) -> str:
        difference = compared(*given)
        return "" if difference.startswith("sha256") else difference

    patch.setattr("training.data.remote_files._difference", believed)


ROWS = [
    Row(
        "remote shards",
        "two processes of a node read two epochs of remote shards through a cache of two windows; the server has one "
        "to eight random faults, or lacks a shard or has another; one process may be killed and started again: every "
        "sample comes once, in the exact order and whole, the cache never holds more than it may, or the shard and the "
        "cause are named in one line",
        trial,
        full=200,
        few=3,
        off="a file is believed if its size is right",
        switch_off=_believe,
        num_off=6,
    ),
]
