"""Store a teacher's features of training shards, so that training runs need not run the teacher again."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from eval.base.arguments import answer_early, read_options
from eval.base.consoles import plain_console
from eval.towers.precision import Precision
from longclip_teacher.activation import Activation
from longclip_teacher.errors import InputError, run_command
from training.settings.augment import AugmentConfig
from training.settings.captions import CaptionOptions


@dataclass
class Options:
    """Store a teacher's features of training shards: image features of crops, text features and tokens of captions.

    python scripts/cache_teacher.py --shards data/train --teacher longclip-b  # one crop per picture

    python scripts/cache_teacher.py --shards 'data/train/*.tar' --teacher longclip-l --views 5 --precision bf16

    torchrun --nproc_per_node 8 scripts/cache_teacher.py ...  # divides the shards, on one or more nodes

    python scripts/cache_teacher.py --out data/train/teacher_cache --verify  # check for damage

    python training/main.py PRESET --teacher.cache data/train/teacher_cache  # train from it

    The command writes one sidecar NAME.safetensors per shard NAME.tar, and its settings to teacher_cache.json. When
    started again, it keeps finished sidecars. A training run must use the same --augment options, and the same
    --captions options if they change what short captions say.
    """

    shards: tuple[str, ...] = ()
    """Local shards, as for --data.shards: folders, or paths with * or {000..123}."""
    teacher: str | None = None
    """Weight file, run folder or hub name (longclip-b, longclip-l)."""
    out: Path | None = None
    """Folder for the sidecars. Default: teacher_cache in the shards' folder."""
    views: int = 1
    """Crops stored per picture. Training uses them in turn, one per epoch, so as many crops as epochs avoid repeats.
    0 stores the centre crop, for training with --augment.centre."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """How crops are drawn, as in the training run."""
    caption_views: int = 1
    """Sampled captions stored per long caption, with --captions.short sampled. Training uses them in turn, one per
    epoch, so as many as epochs avoid repeats."""
    captions: CaptionOptions = field(default_factory=CaptionOptions)
    """What short captions say, as in the training run. Long captions are always stored in full; shifts are not
    stored."""
    seed: int = 0
    """Seed of the crops and of the sampled captions."""
    batch_size: int = 256
    """Pictures per batch. A batch of captions holds as many tokens as this many captions of 64 tokens."""
    num_workers: int = min(8, os.cpu_count() or 1)
    """Worker processes that decode pictures, per process; 0 decodes in the main process."""
    precision: Precision = "fp32"
    """The teacher's arithmetic. Features are stored in float16 in any case."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto uses a GPU if there is one."""
    activation: Activation | None = None
    """The teacher's activation if its file does not specify it: quickgelu for OpenAI's, gelu for most others."""
    fast_decode: bool = True
    """Decode JPEGs with libjpeg-turbo through torchvision, as training does by default, instead of with PIL."""
    verify: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Create nothing. Read the cache in --out, check all checksums and name what is damaged."""

    def check(self) -> None:
        """Raise InputError for invalid options."""
        if min(self.views, self.seed, self.num_workers) < 0 or self.batch_size < 1:
            raise InputError("--views, --seed and --num-workers must be 0 or more, --batch-size 1 or more")
        if self.verify:
            if self.out is None:
                raise InputError("--verify reads the cache in --out: give --out FOLDER")
            return
        if not self.shards or self.teacher is None:
            raise InputError("give --shards PATTERN and --teacher FILE_OR_NAME (or --out FOLDER --verify)")
        if self.views and self.augment.centre:
            raise InputError(f"--views {self.views}: with --augment.centre there is one crop; give --views 0")
        if self.caption_views < 1 or (self.caption_views > 1 and self.captions.short != "sampled"):
            raise InputError(
                f"--caption-views {self.caption_views}: 1 or more, and 1 unless --captions.short sampled is given"
            )


if __name__ == "__main__":
    answer_early(Options)  # --help and refused options end here: the imports below take seconds

import torch
from torch import Tensor

from eval.base.freed_memory import keep_freed_memory
from eval.base.processes import Runtime, agreed, all_results, job_lock, on_main, start
from eval.towers.models import load_model
from longclip_teacher import LongCLIP
from longclip_teacher.ancestry import merged
from longclip_teacher.weights_file import file_sha256
from training.cache.freshness import is_stale
from training.cache.manifest import (
    CACHE_MANIFEST,
    CacheSettings,
    ShardIdentity,
    SidecarRecord,
    changes,
    read_cache,
    read_records,
    refuse_same_names,
    shard_identities,
    sidecar_path,
    teacher_hashes,
    write_cache_manifest,
    write_record,
)
from training.cache.sidecar import Sidecar
from training.cache.writer import SidecarWriter, cache_settings
from training.data.index import ShardIndex, expand_patterns, is_remote

_STDERR = plain_console(stderr=True)
_MAY_DIFFER = ("teacher", "libraries", "ancestry")  # settings in which the sidecars of a cache may differ


@dataclass(frozen=True)
class Work:
    """The work of one process."""

    writer: SidecarWriter
    identities: list[ShardIdentity]
    records: list[SidecarRecord | None]
    """Of the shards that an earlier run finished; None for the others."""


def cache_folder(options: Options) -> Path:
    """Return the folder of the sidecars. Raise InputError for shards that cannot have any."""
    found = expand_patterns(options.shards)
    if is_remote(found[0]):
        raise InputError(f"{found[0]}: sidecars belong to local shards; copy them to a disk first")
    if options.out is not None:
        return options.out
    parents = {Path(shard).parent for shard in found}
    if len(parents) > 1:
        raise InputError(f"the shards are in {len(parents)} folders: give --out for their sidecars")
    return parents.pop() / "teacher_cache"


def prepare(options: Options, folder: Path, device: torch.device) -> Work:
    """Load the index, the teacher and the settings, and find the shards that an earlier run finished."""
    assert options.teacher is not None  # check() ensures it
    index = ShardIndex(expand_patterns(options.shards), show_progress=_STDERR.is_terminal)
    refuse_same_names(index.paths)
    model = load_model(options.teacher, activation=options.activation, device=str(device))
    if not isinstance(model, LongCLIP):
        raise InputError(f"--teacher {options.teacher} is not a Long-CLIP or CLIP of longclip_teacher: give one")
    settings = cache_settings(
        options.teacher,
        model,
        views=options.views,
        augment=options.augment if options.views else AugmentConfig(centre=True),
        seed=options.seed,
        precision=options.precision,
        fast_decode=options.fast_decode,
        captions=options.captions,
        caption_views=options.caption_views,
    )
    if (folder / CACHE_MANIFEST).is_file():
        before = _refuse_other_settings(folder, settings)
        settings = replace(settings, ancestry=merged(before.ancestry, settings.ancestry))
    identities = shard_identities(index)
    records = read_records(folder)
    finished = [_finished(folder, shard, records.get(shard.shard)) for shard in identities]
    return Work(
        SidecarWriter(model, settings, index, folder, options.batch_size, options.num_workers), identities, finished
    )


def _refuse_other_settings(folder: Path, settings: CacheSettings) -> CacheSettings:
    """The settings of the cache in `folder`. Raise InputError if they are others. Only warn about other library
    versions."""
    before, _ = read_cache(folder)
    if before.teacher_sha256 in teacher_hashes(settings.teacher):
        settings = replace(settings, teacher_sha256=before.teacher_sha256)
    for item in fields(CacheSettings):
        old, new = getattr(before, item.name), getattr(settings, item.name)
        if old == new or item.name in _MAY_DIFFER:
            continue
        if isinstance(old, AugmentConfig | CaptionOptions):
            part = next(f.name for f in fields(old) if getattr(old, f.name) != getattr(new, f.name))
            raise _other(folder, f"{item.name}.{part}", getattr(old, part), getattr(new, part))
        raise _other(folder, item.name, old, new)
    if before.libraries != settings.libraries:
        other = [
            f"{name} {version}" for name, version in before.libraries.items() if settings.libraries[name] != version
        ]
        print(f"warning: the sidecars in {folder} were made with {', '.join(other)}", file=sys.stderr)
    return before


def _other(folder: Path, name: str, old: object, new: object) -> InputError:
    return InputError(
        f"{folder} holds a cache with other settings: {name} is {old} there and {new} now; "
        "give another --out, or the same options"
    )


def _finished(folder: Path, identity: ShardIdentity, record: SidecarRecord | None) -> SidecarRecord | None:
    path = sidecar_path(folder, identity.shard)
    if record is None or changes(record, identity) or not path.is_file() or path.stat().st_size != record.num_bytes:
        return None
    return record


@contextmanager
def samples_bar(runtime: Runtime, total: int) -> Iterator[Any]:
    """Yield a function that counts encoded samples and shows them, with the time left, on rank 0's terminal."""
    title = "encoding" if runtime.world_size == 1 else f"encoding, rank 0 of {runtime.world_size}"
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("samples, {task.fields[rate]} per second, elapsed"),
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


def find_stale(work: Work, is_done: Sequence[bool], runtime: Runtime) -> dict[str, Tensor]:
    """Return a mask of this process's share of the finished shards that were changed since.

    Those whose file has another time are read; whose contents are the same get the new time into their record.
    """
    mask = torch.zeros(len(is_done), dtype=torch.bool)
    folder, settings = work.writer.folder, work.writer.settings
    for place in range(runtime.rank, len(is_done), runtime.world_size):
        record = work.records[place]
        if not is_done[place] or not record or record.shard_changed_ns == work.identities[place].shard_changed_ns:
            continue
        path, is_upright = sidecar_path(folder, record.shard), record.shard_changed_ns != 0
        mask[place] = is_stale(path, work.writer.index, place, settings, is_upright=is_upright)
        if mask[place]:
            print(f"{record.shard} was changed since {path.name} was made: made again", file=sys.stderr)
        else:
            write_record(folder, replace(record, shard_changed_ns=work.identities[place].shard_changed_ns))
    return {"stale": mask}


def make(work: Work, is_done: Sequence[bool], runtime: Runtime) -> dict[str, Tensor]:
    """Cache this process's share of the remaining shards and return its counts."""
    left = [(place, identity) for place, identity in enumerate(work.identities) if not is_done[place]]
    mine = left[runtime.rank :: runtime.world_size]
    counts = torch.zeros(2, dtype=torch.int64)  # samples, shards
    with samples_bar(runtime, sum(identity.num_samples for _, identity in mine)) as advance:
        for number, record in enumerate(work.writer.write(mine, advance), start=1):
            counts += torch.tensor([record.num_samples, 1])
            if not _STDERR.is_terminal:
                where = f"rank {runtime.rank}: " if runtime.world_size > 1 else ""
                print(f"{where}{number} of {len(mine)}: {sidecar_path(Path(), record.shard)}", file=sys.stderr)
    return {"counts": counts}


def cache(options: Options, runtime: Runtime) -> None:
    """Hold the cache's folder, create what is missing on all processes, and report what the cache now holds."""
    folder = agreed(lambda: cache_folder(options))
    with job_lock(folder):
        fill(options, folder, runtime)


def fill(options: Options, folder: Path, runtime: Runtime) -> None:
    """Create what is missing in `folder`, on all processes, and report what it now holds."""
    work = agreed(lambda: prepare(options, folder, runtime.device))

    def begin() -> dict[str, Tensor]:
        write_cache_manifest(folder, work.writer.settings)
        return {"is_done": torch.tensor([record is not None for record in work.records])}

    # rank 0's view decides for all: a process that starts late finds more shards done and would deal out others
    is_done = on_main(begin)["is_done"].tolist()
    started = time.monotonic()
    stale = torch.stack([part["stale"] for part in all_results(lambda: find_stale(work, is_done, runtime))]).any(dim=0)
    is_done = [done and not was_changed for done, was_changed in zip(is_done, stale.tolist(), strict=True)]
    counts = torch.stack([part["counts"] for part in all_results(lambda: make(work, is_done, runtime))]).sum(dim=0)
    seconds = time.monotonic() - started
    if not runtime.is_main:
        return
    records = write_cache_manifest(folder, work.writer.settings)
    own = [records[identity.shard] for identity in work.identities]
    num_samples, num_shards = counts.tolist()
    num_unreadable = sum(record.num_unreadable for record in own)
    print(
        f"{folder}: {sum(record.num_samples for record in own)} samples in {len(own)} sidecars "
        f"({len(own) - num_shards} kept), {sum(record.num_distinct_captions for record in own)} distinct of "
        f"{sum(record.num_captions for record in own)} captions, {sum(record.num_bytes for record in own)} bytes, "
        f"{num_samples / max(seconds, 1e-9):.1f} samples/s"
        + (f"; {num_unreadable} unreadable samples, which training counts and replaces" if num_unreadable else "")
    )


def verify(folder: Path, runtime: Runtime) -> None:
    """Compare every sidecar with its record and its own checksums. Raise InputError if one is damaged or missing."""
    read_cache(folder)  # raises if there is no cache
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
            f"{num_damaged} of {len(shards)} sidecars are damaged: delete them and run again; the others are kept"
        )
    if runtime.is_main:
        print(f"{folder}: {len(shards)} sidecars are intact")


def _damage(path: Path, sha256: str) -> list[str]:
    """Return one line for each damaged sample of a sidecar, or one for the file."""
    try:
        sidecar = Sidecar(path)
        if file_sha256(path) == sha256:
            return []
    except InputError as error:
        return [str(error)]
    return [f"{path} is damaged: {what}" for what in sidecar.damage()] or [f"{path} is damaged outside its samples"]


def main() -> None:
    """Parse the command line; make a cache, or verify one."""
    options = read_options(Options)
    keep_freed_memory()
    with start(options.device) as runtime:
        if options.verify:
            assert options.out is not None
            verify(options.out, runtime)
        else:
            cache(options, runtime)


if __name__ == "__main__":
    run_command(main)
