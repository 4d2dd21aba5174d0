"""Store a teacher's features of training shards, so that no training run has to run the teacher again."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from eval.base.memory import keep_freed_memory
from eval.base.processes import Runtime, all_results, start
from eval.towers.features import Precision
from eval.towers.models import load_model
from longclip_teacher import LongCLIP
from longclip_teacher.config import Activation
from longclip_teacher.errors import InputError, run_command
from training.cache.manifest import (
    CACHE_MANIFEST,
    CacheSettings,
    ShardFacts,
    SidecarRecord,
    changes,
    read_cache,
    read_records,
    refuse_same_names,
    shard_facts,
    sidecar_path,
    write_cache_manifest,
)
from training.cache.sidecar import Sidecar
from training.cache.writer import SidecarWriter, cache_settings
from training.data.index import ShardIndex, expand_patterns, is_remote
from training.data.transforms import AugmentConfig
from training.data.writer import file_sha256

_STDERR = Console(stderr=True)
_MAY_DIFFER = ("teacher", "libraries")  # settings in which a cache's sidecars need not agree


@dataclass
class Options:
    """Store a teacher's features of training shards: image features of crops, features and tokens of captions.

    python scripts/cache_teacher.py --shards data/train --teacher longclip-b  # one crop a picture

    python scripts/cache_teacher.py --shards 'data/train/*.tar' --teacher longclip-l --views 5 --precision bf16

    torchrun --nproc_per_node 8 scripts/cache_teacher.py ...  # the shards shared out, on one or many nodes

    python scripts/cache_teacher.py --out data/train/teacher_cache --verify  # look for damage

    python training/main.py PRESET --teacher.cache data/train/teacher_cache  # train from it

    For each shard NAME.tar one sidecar NAME.safetensors is written, and teacher_cache.json says how. Started again, the
    command keeps the sidecars that are finished. A training run must use the same --augment options.
    """

    shards: tuple[str, ...] = ()
    """Shards, as for --data.shards: folders, paths with * or {000..123}. Local ones."""
    teacher: str | None = None
    """Weight file, run folder or hub name (longclip-b, longclip-l)."""
    out: Path | None = None
    """Folder of the sidecars; without it teacher_cache in the shards' folder."""
    views: int = 1
    """Crops stored of each picture; training sees them in turn, one an epoch: as many as it has epochs repeat
    none. 0: the centre crop, for training with --augment.centre."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """How the crops are drawn, as in the training run."""
    seed: int = 0
    """Seed of the crops."""
    batch_size: int = 256
    """Pictures encoded at a time; captions in batches of as many tokens as so many captions of 64."""
    num_workers: int = min(8, os.cpu_count() or 1)
    """Processes that decode pictures, for each process; 0 decodes in the main process."""
    precision: Precision = "fp32"
    """The arithmetic of the teacher; the features are stored in float16 in any case."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU if there is one."""
    activation: Activation | None = None
    """The teacher's activation where its file does not tell it: quickgelu for OpenAI's, gelu for most others."""
    fast_decode: bool = True
    """Decode JPEGs with libjpeg-turbo through torchvision, as training does by default; otherwise with PIL."""
    verify: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Make nothing; read the cache in --out, compare all checksums and name what is damaged."""

    def check(self) -> None:
        """InputError for options that mean nothing."""
        if min(self.views, self.seed, self.num_workers) < 0 or self.batch_size < 1:
            raise InputError("--views, --seed and --num-workers must be 0 or more, --batch-size 1 or more")
        if self.verify:
            if self.out is None:
                raise InputError("--verify reads the cache that --out names: give --out FOLDER")
            return
        if not self.shards or self.teacher is None:
            raise InputError("give --shards PATTERN and --teacher FILE_OR_NAME (or --out FOLDER --verify)")
        if self.views and self.augment.centre:
            raise InputError(f"--views {self.views}: there is one centre crop; give --views 0, or no --augment.centre")


@dataclass(frozen=True)
class Work:
    """What one process has to do."""

    writer: SidecarWriter
    facts: list[ShardFacts]
    is_done: list[bool]


def prepare(options: Options, device: torch.device) -> Work:
    """The index, the teacher, the settings, and which shards an earlier run has finished."""
    assert options.teacher is not None  # check() comes first
    found = expand_patterns(options.shards)
    if is_remote(found[0]):
        raise InputError(f"{found[0]}: sidecars belong to local shards; copy them to a disk first")
    index = ShardIndex(found, show_progress=_STDERR.is_terminal)
    folder = _folder(options, index.paths)
    refuse_same_names(index.paths)
    model = load_model(options.teacher, activation=options.activation, device=str(device))
    if not isinstance(model, LongCLIP):
        raise InputError(f"--teacher {options.teacher} is no Long-CLIP or CLIP of ours: give one")
    settings = cache_settings(
        options.teacher,
        model,
        views=options.views,
        augment=options.augment if options.views else AugmentConfig(centre=True),
        seed=options.seed,
        precision=options.precision,
        fast_decode=options.fast_decode,
    )
    if (folder / CACHE_MANIFEST).is_file():
        _refuse_other_settings(folder, settings)
    facts = shard_facts(index)
    records = read_records(folder)
    is_done = [_is_finished(folder, shard, records.get(shard.shard)) for shard in facts]
    return Work(SidecarWriter(model, settings, index, folder, options.batch_size, options.num_workers), facts, is_done)


def _folder(options: Options, paths: Sequence[Path]) -> Path:
    if options.out is not None:
        return options.out
    parents = {path.parent for path in paths}
    if len(parents) > 1:
        raise InputError(f"the shards lie in {len(parents)} folders: say with --out where their sidecars belong")
    return parents.pop() / "teacher_cache"


def _refuse_other_settings(folder: Path, settings: CacheSettings) -> None:
    """Raise InputError where the cache in `folder` was made otherwise; other library versions cost a warning."""
    before, _ = read_cache(folder)
    for item in fields(CacheSettings):
        old, new = getattr(before, item.name), getattr(settings, item.name)
        if old == new or item.name in _MAY_DIFFER:
            continue
        if isinstance(old, AugmentConfig):
            part = next(f.name for f in fields(AugmentConfig) if getattr(old, f.name) != getattr(new, f.name))
            raise _other(folder, f"augment.{part}", getattr(old, part), getattr(new, part))
        raise _other(folder, item.name, old, new)
    if before.libraries != settings.libraries:
        other = [
            f"{name} {version}" for name, version in before.libraries.items() if settings.libraries[name] != version
        ]
        print(f"warning: the sidecars in {folder} were made with {', '.join(other)}", file=sys.stderr)


def _other(folder: Path, name: str, old: object, new: object) -> InputError:
    return InputError(
        f"{folder} holds a cache made otherwise: {name} is {old} there and {new} now; "
        "give another --out, or the same options"
    )


def _is_finished(folder: Path, facts: ShardFacts, record: SidecarRecord | None) -> bool:
    path = sidecar_path(folder, facts.shard)
    return (
        record is not None and not changes(record, facts) and path.is_file() and path.stat().st_size == record.num_bytes
    )


@contextmanager
def samples_bar(runtime: Runtime, total: int) -> Iterator[Any]:
    """A function that is told of encoded samples, and shows them on rank 0's terminal with the time that is left."""
    title = "encoding" if runtime.world_size == 1 else f"encoding, rank 0 of {runtime.world_size}"
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("samples, {task.fields[rate]} a second, elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    is_shown = runtime.is_main and _STDERR.is_terminal
    with Progress(*columns, console=_STDERR, transient=True, disable=not is_shown, speed_estimate_period=300) as bar:
        task, begin, seen = bar.add_task(title, total=total, rate="-"), time.monotonic(), 0

        def advance(num_samples: int) -> None:
            nonlocal seen
            seen += num_samples
            bar.update(task, advance=num_samples, rate=f"{seen / max(time.monotonic() - begin, 1e-9):.0f}")

        yield advance


def make(work: Work, is_done: Sequence[bool], runtime: Runtime) -> dict[str, Tensor]:
    """This process's share of the shards that are left; returns its counts."""
    left = [(place, facts) for place, facts in enumerate(work.facts) if not is_done[place]]
    mine = left[runtime.rank :: runtime.world_size]
    counts = torch.zeros(2, dtype=torch.int64)  # samples, shards
    with samples_bar(runtime, sum(facts.num_samples for _, facts in mine)) as advance:
        for number, record in enumerate(work.writer.write(mine, advance), start=1):
            counts += torch.tensor([record.num_samples, 1])
            if not _STDERR.is_terminal:
                where = f"rank {runtime.rank}: " if runtime.world_size > 1 else ""
                print(f"{where}{number} of {len(mine)}: {sidecar_path(Path(), record.shard)}", file=sys.stderr)
    return {"counts": counts}


def cache(options: Options, runtime: Runtime) -> None:
    """Make what is missing, on all processes, and say what the cache now holds."""
    prepared: list[Work] = []

    def mask() -> dict[str, Tensor]:
        prepared.append(prepare(options, runtime.device))
        work = prepared[0]
        if runtime.is_main:
            write_cache_manifest(work.writer.folder, work.writer.settings)
        return {"is_done": torch.tensor(work.is_done)}

    # rank 0's view decides for all: a process that starts late finds more shards done, and would deal others out
    is_done = all_results(mask)[0]["is_done"].tolist()
    work, begin = prepared[0], time.monotonic()
    counts = torch.stack([part["counts"] for part in all_results(lambda: make(work, is_done, runtime))]).sum(dim=0)
    seconds = time.monotonic() - begin
    if not runtime.is_main:
        return
    folder = work.writer.folder
    records = write_cache_manifest(folder, work.writer.settings)
    own = [records[facts.shard] for facts in work.facts]
    num_samples, num_shards = counts.tolist()
    num_unreadable = sum(record.num_unreadable for record in own)
    print(
        f"{folder}: {sum(record.num_samples for record in own)} samples in {len(own)} sidecars "
        f"({len(own) - num_shards} kept), {sum(record.num_distinct_captions for record in own)} distinct of "
        f"{sum(record.num_captions for record in own)} captions, {sum(record.num_bytes for record in own)} bytes, "
        f"{num_samples / max(seconds, 1e-9):.1f} samples/s"
        + (f"; {num_unreadable} samples cannot be read, which training counts and replaces" if num_unreadable else "")
    )


def verify(folder: Path, runtime: Runtime) -> None:
    """Compare every sidecar with its record and its own checksums. Raises InputError if one is damaged or gone."""
    read_cache(folder)  # raises where there is none
    records = read_records(folder)
    shards = list(records)

    def compare() -> dict[str, Tensor]:
        problems = 0
        for shard in shards[runtime.rank :: runtime.world_size]:
            damage = _damage(sidecar_path(folder, shard), records[shard].sha256)
            for line in damage:
                print(line)
            problems += bool(damage)
        return {"problems": torch.tensor(problems)}

    num_damaged = sum(int(part["problems"]) for part in all_results(compare))
    if num_damaged and runtime.is_main:
        raise InputError(
            f"{num_damaged} of {len(shards)} sidecars are damaged: delete them and run again; others are kept"
        )
    if runtime.is_main:
        print(f"{folder}: {len(shards)} sidecars are whole")


def _damage(path: Path, sha256: str) -> list[str]:
    """One line for each damaged sample of a sidecar, or for the file."""
    try:
        sidecar = Sidecar(path)
        if file_sha256(path) == sha256:
            return []
    except InputError as error:
        return [str(error)]
    return [f"{path} is damaged: {what}" for what in sidecar.damage()] or [f"{path} is damaged outside its samples"]


def main() -> None:
    """Parse the command line; make a cache, or verify one."""
    options = tyro.cli(Options)
    options.check()
    keep_freed_memory()
    with start(options.device) as runtime:
        if options.verify:
            assert options.out is not None
            verify(options.out, runtime)
        else:
            cache(options, runtime)


if __name__ == "__main__":
    run_command(main)
