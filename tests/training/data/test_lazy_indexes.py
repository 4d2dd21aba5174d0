"""Indexes are read when their shards' turn comes: the order of all samples at once, memory, damage on the way."""

from __future__ import annotations

import hashlib
import pickle
import random
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benches.scale import simulate
from longclip_teacher.errors import InputError
from remote_folder import served
from shard_files import keys_of, loader, write_old_manifest
from training.data.byte_index import ByteIndex
from training.data.epoch_order import EpochOrder
from training.data.index import ShardIndex
from training.data.loader import ShardLoader
from training.data.shard_records import index_file
from training.data.writer import write_manifest, write_shard


def write_layout(folder: Path, sizes: list[int]) -> list[str]:
    """Write shards of captions with these numbers of samples, and a manifest. Return all keys in order."""
    folder.mkdir()
    keys = [[f"{shard:02d}-{row:03d}" for row in range(size)] for shard, size in enumerate(sizes)]
    records = [
        write_shard(folder / f"s-{shard:02d}.tar", [(key, {"txt": b"A caption."}) for key in part])
        for shard, part in enumerate(keys)
    ]
    write_manifest(folder, records, {})
    return [key for part in keys for key in part]


def plain_order(sizes: list[int], seed: int, epoch: int, shuffle_shards: int) -> np.ndarray:
    """The order of all samples at once, as in the first version."""
    generator = np.random.default_rng((seed, epoch))
    starts = np.cumsum([0, *sizes])
    shards = generator.permutation(len(sizes))
    windows = [shards[i : i + shuffle_shards] for i in range(0, len(shards), shuffle_shards)]
    numbers = [np.concatenate([np.arange(starts[s], starts[s + 1]) for s in window]) for window in windows]
    return np.concatenate([generator.permutation(part) for part in numbers])


def batches_of(one: ShardLoader, num_workers: int, epoch: int, start: int) -> list[list[str]]:
    """The keys of one rank's batches from step `start` on, read by copies of its source in turn, as workers do."""
    copies = [pickle.loads(pickle.dumps(one._source)) for _ in range(max(1, num_workers))]  # noqa: S301 -- our own
    return [copies[step % len(copies)][epoch, step].keys for step in range(start, one.steps_per_epoch)]


# --- order ------------------------------------------------------------------------------------------------------------


def test_any_layout_is_read_in_the_order_of_all_samples_at_once(tmp_path: Path) -> None:
    draws = random.Random(0)
    with served(tmp_path) as server:
        for number in range(100):
            sizes = [draws.randint(1, 12) for _ in range(draws.randint(1, 7))]
            keys = write_layout(folder := tmp_path / str(number), sizes)
            kind, is_remote = draws.choice(["new", "new", "old", "none"]), number % 3 == 0
            if kind == "old":
                write_old_manifest(folder)
            elif kind == "none" and not is_remote:
                (folder / "manifest.json").unlink()
            names = [f"s-{shard:02d}.tar" for shard in range(len(sizes))]
            shards = [f"{server.url}/{number}/{name}" if is_remote else str(folder / name) for name in names]
            world_size, num_workers, epoch = draws.randint(1, 3), draws.randint(0, 2), draws.randrange(3)
            size = world_size * draws.randint(1, max(1, len(keys) // 6 // world_size))
            if size > len(keys):
                continue
            options: dict[str, Any] = {
                "stage": "text", "global_batch_size": size, "seed": number, "shuffle_shards": draws.randint(1, 4),
                "world_size": world_size, "cache_folder": tmp_path / "cache" / str(number),
            }  # fmt: skip
            expected = [keys[i] for i in plain_order(sizes, number, epoch, options["shuffle_shards"])]
            start = draws.randrange(len(keys) // size)
            ranks = [loader(shards, rank=rank, **options) for rank in range(world_size)]
            read = [batches_of(rank, num_workers, epoch, start) for rank in ranks]
            found = [key for parts in zip(*read, strict=True) for part in parts for key in part]
            assert found == expected[start * size : len(keys) // size * size], (number, kind, is_remote, options)


@pytest.mark.parametrize("is_old", [False, True])
def test_processes_of_a_loader_read_the_same(tmp_path: Path, is_old: bool) -> None:
    sizes = [5, 1, 9, 4, 2, 7]
    keys = write_layout(tmp_path / "shards", sizes)
    if is_old:
        write_old_manifest(tmp_path / "shards")
    found = loader(tmp_path / "shards", stage="text", global_batch_size=3, shuffle_shards=2, num_workers=2)
    for epoch in (0, 1):
        expected = [keys[i] for i in plain_order(sizes, 0, epoch, 2)]
        assert keys_of(found.batches(epoch)) == expected[:27]
    assert keys_of(found.batches(1, step=4)) == expected[12:27]


def test_the_layout_in_checkpoints_is_that_of_the_first_version(tmp_path: Path) -> None:
    members = [("a", {"jpg": b"x" * 700, "txt": b"A"}), ("b/ü", {"npz": b"z", "png": b"y"}), ("c", {"txt": b"C"})]
    record = write_shard(tmp_path / "a.tar", members)
    index = ByteIndex.from_bytes(index_file(tmp_path / "a.tar").read_bytes())
    absent = np.zeros((3, 2), np.int64)
    spans = np.stack([index.spans["image"], absent, index.spans["txt"]], axis=1)
    content = index.keys.tobytes() + spans.tobytes() + index.spans["npz"].tobytes()
    assert record.layout == hashlib.sha256(str(record.num_bytes).encode() + content).hexdigest()
    write_manifest(tmp_path, [record], {})
    described = ShardIndex([tmp_path / "a.tar"]).contents
    write_old_manifest(tmp_path)
    assert ShardIndex([tmp_path / "a.tar"]).contents == described
    (tmp_path / "manifest.json").unlink()
    assert [one.layout for one in ShardIndex([tmp_path / "a.tar"]).contents.values()] == [record.layout]


# --- memory -----------------------------------------------------------------------------------------------------------


def test_a_process_holds_the_indexes_of_one_window(tmp_path: Path) -> None:
    simulate(tmp_path, 60, is_old=False)  # 600,000 samples, 25 MB of indexes
    tracemalloc.start()
    try:
        index = ShardIndex(sorted(tmp_path.glob("*.tar")))
        order = EpochOrder(index.shard_sizes, 0, 0, 4)
        for window in range(order.num_windows):
            index.hold(order.shards_of(window))
            index.read(int(order.samples(window * 40_000, window * 40_000 + 1)[0]))
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 4_000_000 and peak < 6_000_000


def test_whoever_reads_at_random_holds_a_few_indexes(tmp_path: Path) -> None:
    simulate(tmp_path, 60, is_old=False)
    tracemalloc.start()
    try:
        index = ShardIndex(sorted(tmp_path.glob("*.tar")))
        assert all(index.key(shard * 10_000 + 7) == "000000007" for shard in range(60))
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert held < 10_000_000


# --- damage -----------------------------------------------------------------------------------------------------------


def _damage(folder: Path, shard: int) -> None:
    file = index_file(folder / f"s-{shard:02d}.tar")
    content = bytearray(file.read_bytes())
    content[random.Random(0).randrange(len(content))] ^= 1
    file.write_bytes(content)


def _remove(folder: Path, shard: int) -> None:
    index_file(folder / f"s-{shard:02d}.tar").unlink()


def _replace(folder: Path, shard: int) -> None:
    other = index_file(folder / f"s-{(shard + 1) % 6:02d}.tar")
    index_file(folder / f"s-{shard:02d}.tar").write_bytes(other.read_bytes())


def _rewrite(folder: Path, shard: int) -> None:
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace(f'"{shard:02d}-00', f'"{shard:02d}-10'))


CASES = [
    ("new", False, _damage, r"{shards}/s-{shard}\.tar: its index in s-{shard}\.tar\.index cannot be read \(.+\): run"),
    ("new", False, _remove, r"{shards}/s-{shard}\.tar: its index in s-{shard}\.tar\.index cannot be read \(No such"),
    (
        "new",
        False,
        _replace,
        r"{shards}/s-{shard}\.tar: its index in s-{shard}\.tar\.index cannot be read \(it is not ",
    ),
    ("old", False, _rewrite, r"{shards}/s-{shard}\.tar: its index in manifest\.json cannot be read \(it is not the"),
    ("new", True, _damage, r"{shards}/s-{shard}\.tar\.index is not the file that its manifest describes \(sha256"),
    ("new", True, _remove, r"cannot read {shards}/s-{shard}\.tar\.index: HTTP 404 \(Not Found\)"),
]


@pytest.mark.parametrize(("kind", "is_remote", "spoil", "message"), CASES)
def test_an_index_that_is_spoilt_meanwhile_is_named_by_all_ranks_at_one_step(
    tmp_path: Path, kind: str, is_remote: bool, spoil: Callable[[Path, int], None], message: str
) -> None:
    sizes, batch_size, window = [8] * 6, 6, 2
    write_layout(folder := tmp_path / "shards", sizes)
    if kind == "old":
        write_old_manifest(folder)
    order = EpochOrder(sizes, 0, 0, window)
    shard = order.shards_of(1)[1]
    first = sum(sizes[number] for number in order.shards_of(0)) // batch_size  # step whose batch reaches window 1
    with served(folder) as server:
        place = server.url if is_remote else str(folder)
        options: dict[str, Any] = {"stage": "text", "global_batch_size": batch_size, "shuffle_shards": window}
        options |= {"cache_folder": tmp_path / "cache", "world_size": 3}
        paths = [f"{place}/s-{number:02d}.tar" for number in range(len(sizes))]
        ranks = [loader(paths, rank=rank, **options) for rank in range(3)]
        spoil(folder, shard)
        for rank in ranks:
            batches = rank.batches(0)
            assert len([next(batches) for _ in range(first)]) == first
            with pytest.raises(InputError) as caught:
                next(batches)
            pattern = message.replace("{shards}", re.escape(place)).replace("{shard}", f"{shard:02d}")
            assert re.match(pattern, str(caught.value)) and "\n" not in str(caught.value)


def test_an_index_that_is_missing_or_cut_short_is_told_at_the_start(tmp_path: Path) -> None:
    write_layout(folder := tmp_path / "shards", [3, 4])
    file = index_file(folder / "s-01.tar")
    content = file.read_bytes()
    for spoil in (file.unlink, lambda: file.write_bytes(content[:-1])):
        spoil()
        with pytest.raises(
            InputError, match=r"\A\S+/s-01\.tar: its index s-01\.tar\.index is missing or of another size"
        ):
            loader(folder, stage="text", global_batch_size=2)
    file.write_bytes(content)
    assert loader(folder, stage="text", global_batch_size=2).num_samples == 7


def test_shards_in_a_folder_that_cannot_be_written_are_read_without_stored_indexes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = write_layout(folder := tmp_path / "shards", [3, 4])
    for path in [*folder.glob("*.index"), folder / "manifest.json"]:
        path.unlink()

    def refuse(*_: Any) -> None:
        raise InputError("cannot write")

    monkeypatch.setattr("training.data.shard_records.atomic_file", refuse)
    found = loader(folder, stage="text", global_batch_size=7)
    assert keys_of(found.batches(0)) == [keys[i] for i in plain_order([3, 4], 0, 0, 64)]
    assert sorted(path.name for path in folder.iterdir()) == ["s-00.tar", "s-01.tar"]
