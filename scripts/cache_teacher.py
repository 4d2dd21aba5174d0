"""Store a teacher's features of training shards, so that training runs need not run the teacher again."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

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

    python scripts/cache_teacher.py ... --array 3/100  # does one part of 100; for Slurm: --array slurm

    python scripts/cache_teacher.py ... --engine ray  # on this machine, or on the cluster of RAY_ADDRESS

    python scripts/cache_teacher.py --shards data/train --status  # what is done, missing or damaged

    python scripts/cache_teacher.py --out data/train/teacher_cache --verify  # name damaged samples

    python training/main.py PRESET --teacher.cache data/train/teacher_cache  # train from it

    The command writes one sidecar NAME.safetensors per shard NAME.tar, and its settings to teacher_cache.json. When
    started again, it keeps finished sidecars. Any number of processes may fill one folder at the same time: each shard
    is done once, and what a killed process has not finished is done by the others or by the next start. A training run
    must use the same --augment options, and the same --captions options if they change what short captions say.
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
    sentences: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Store single sentences of the long captions too, for --loss.icl_sub and --loss.vrd_sub."""
    captions: CaptionOptions = field(default_factory=CaptionOptions)
    """What short captions say, as in the training run. Long captions are stored in full, and shifts are not stored."""
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
    array: str | None = None
    """I/N does part I, from 0, of the shards dealt into N parts. slurm takes both from the job's array."""
    engine: Literal["ray"] | None = None
    """ray encodes in Ray's actors, one per GPU, or per --num-workers CPUs without GPUs (pip install
    'compact-longclip[ray]')."""
    status: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Create nothing. Count the shards that are done, missing, damaged or changed since, checksums included, and name
    some. Exit code 0 if all are done, 1 otherwise."""
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
        if not self.shards or (self.teacher is None and not self.status):
            raise InputError("give --shards PATTERN and --teacher FILE_OR_NAME (or --out FOLDER --verify)")
        self.part()
        if self.engine == "ray" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError("--engine ray starts its own processes: start the command without torchrun")
        if self.views and self.augment.centre:
            raise InputError(f"--views {self.views}: with --augment.centre there is one crop; give --views 0")
        if self.caption_views < 1 or (self.caption_views > 1 and self.captions.short != "sampled"):
            raise InputError(
                f"--caption-views {self.caption_views}: 1 or more, and 1 unless --captions.short sampled is given"
            )

    def part(self) -> tuple[int, int]:
        """Return I and N of --array, 0 and 1 without one. Raise InputError for anything else."""
        if self.array is None:
            return 0, 1
        if self.array == "slurm":
            number, first, step, count = (
                os.environ.get(f"SLURM_ARRAY_TASK_{name}", "") for name in ("ID", "MIN", "STEP", "COUNT")
            )
            if not (number.isdecimal() and first.isdecimal() and count.isdecimal()):
                raise InputError(
                    "--array slurm: this is no task of a Slurm array; give sbatch --array=0-99, or I/N here"
                )
            part, num_parts = (int(number) - int(first)) // int(step or 1), int(count)
        else:
            texts = self.array.split("/")
            if len(texts) != 2 or not all(text.isascii() and text.isdecimal() for text in texts):
                raise InputError(f"--array {self.array}: give I/N, such as 0/4 to 3/4, or slurm")
            part, num_parts = int(texts[0]), int(texts[1])
        if part >= num_parts:
            raise InputError(
                f"--array {self.array}: part {part} of {num_parts}, but the parts of N are 0 to N - 1"
                + ("; a job of some tasks of an array needs --array I/N" if self.array == "slurm" else "")
            )
        return part, num_parts


if __name__ == "__main__":
    answer_early(Options)  # --help and refused options end here: the imports below take seconds

import torch
from rich.table import Table
from torch import Tensor

from eval.base.freed_memory import keep_freed_memory
from eval.base.processes import Runtime, agreed, all_results, on_main, start
from eval.towers.models import load_model
from longclip_teacher import LongCLIP
from training.cache.manifest import (
    ShardIdentity,
    SidecarRecord,
    read_cache,
    read_record,
    read_records,
    refuse_same_names,
    shard_identities,
    sidecar_path,
)
from training.cache.ray_pass import make_on_ray, refuse_without_ray
from training.cache.status import STATES, damage_of, state_of
from training.cache.teacher_pass import Records, begin_cache, finish_cache, fits, make_sidecars
from training.cache.writer import SidecarWriter, cache_settings
from training.data.index import ShardIndex, expand_patterns, is_remote

_STDERR = plain_console(stderr=True)
_MOST_NAMED = 5  # shards of a state


@dataclass(frozen=True)
class Work:
    """The work of one process."""

    writer: SidecarWriter
    identities: list[ShardIdentity]
    known: Records
    """The records in the cache's manifest."""
    make: Callable[..., Iterator[SidecarRecord]]
    """`make_sidecars`, here or on Ray, of shards and `progress`."""

    def record(self, identity: ShardIdentity) -> SidecarRecord | None:
        """Return the record of a shard, if it has one."""
        return read_record(self.writer.folder, identity.shard) or self.known.get(identity.shard)


@dataclass(frozen=True)
class Place:
    """Which shards are read, and where their sidecars lie."""

    all_shards: list[str]
    shards: list[str]
    """Those of this part of the array."""
    folder: Path


def find_place(options: Options) -> Place:
    """Find the shards and the folder of the sidecars. Raise InputError for shards that cannot have any."""
    found = expand_patterns(options.shards)
    if is_remote(found[0]):
        raise InputError(f"{found[0]}: sidecars belong to local shards; copy them to a disk first")
    part, num_parts = options.part()
    if part >= len(found):
        raise InputError(f"--array {options.array}: there are only {len(found)} shards: use no more parts")
    parents = {Path(shard).parent for shard in found}
    if options.out is None and len(parents) > 1:
        raise InputError(f"the shards are in {len(parents)} folders: give --out for their sidecars")
    refuse_same_names([Path(shard) for shard in found])
    folder, shards = options.out or parents.pop() / "teacher_cache", found[part::num_parts]
    if options.engine == "ray":  # whose processes may be in other folders
        folder, shards = folder.absolute(), [str(Path(shard).absolute()) for shard in shards]
    return Place(found, shards, folder)


def read_index(place: Place) -> ShardIndex:
    """Return where the samples lie."""
    return ShardIndex(place.shards, show_progress=_STDERR.is_terminal)


def prepare(options: Options, place: Place, device: torch.device) -> Work:
    """Load the index, the teacher and the settings, and begin the cache."""
    assert options.teacher is not None  # check() ensures it
    if options.engine == "ray":
        refuse_without_ray()
    index = read_index(place)
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
        sentences=options.sentences,
    )
    settings, known = begin_cache(place.folder, settings)
    writer = SidecarWriter(model, settings, index, place.folder, options.batch_size, options.num_workers)
    make = partial(make_sidecars, writer, known=known)
    if options.engine == "ray":
        named = Path(options.teacher)
        teacher = str(named.absolute()) if named.exists() else options.teacher
        loaded = {"teacher": teacher, "activation": options.activation, "device": options.device}
        make = partial(make_on_ray, writer, known=known, **loaded)
    return Work(writer, shard_identities(index), known, make)


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


def make(work: Work, is_done: Sequence[bool], runtime: Runtime) -> dict[str, Tensor]:
    """Cache this process's share of the remaining shards and return its counts."""
    left = [(place, identity) for place, identity in enumerate(work.identities) if not is_done[place]]
    mine = left[runtime.rank :: runtime.world_size]
    counts = torch.zeros(2, dtype=torch.int64)  # samples, shards
    with samples_bar(runtime, sum(identity.num_samples for _, identity in mine)) as advance:
        for number, record in enumerate(work.make(mine, progress=advance), start=1):
            counts += torch.tensor([record.num_samples, 1])
            if not _STDERR.is_terminal:
                where = f"rank {runtime.rank}: " if runtime.world_size > 1 else ""
                print(f"{where}{number} of {len(mine)}: {sidecar_path(Path(), record.shard)}", file=sys.stderr)
    return {"counts": counts}


def cache(options: Options, runtime: Runtime) -> None:
    """Create what is missing, on all processes, and report what the cache now holds of these shards."""
    place = agreed(lambda: find_place(options))
    work = agreed(lambda: prepare(options, place, runtime.device))

    def look() -> dict[str, Tensor]:
        found = [(identity, work.record(identity)) for identity in work.identities]
        return {"is_done": torch.tensor([
            fits(place.folder, identity, record) and record is not None
            and record.shard_changed_ns == identity.shard_changed_ns
            for identity, record in found
        ])}  # fmt: skip

    # rank 0's view decides for all: a process that starts late finds more shards done and would deal out others
    is_done = on_main(look)["is_done"].tolist()
    started = time.monotonic()
    counts = torch.stack([part["counts"] for part in all_results(lambda: make(work, is_done, runtime))]).sum(dim=0)
    if runtime.is_main:
        finish_cache(place.folder, [Path(shard).name for shard in place.all_shards])
        report(work, counts, time.monotonic() - started)


def report(work: Work, counts: Tensor, seconds: float) -> None:
    """Print what the cache holds of this part's shards, and how fast it was made."""
    own = [record for record in map(work.record, work.identities) if record is not None]
    folder, (num_samples, num_shards) = work.writer.folder, counts.tolist()
    if len(own) < len(work.identities):
        raise InputError(f"{folder}: sidecars were deleted while the pass ran: run it again")
    num_unreadable = sum(record.num_unreadable for record in own)
    print(
        f"{folder}: {sum(record.num_samples for record in own)} samples in {len(own)} sidecars "
        f"({len(own) - num_shards} kept), {sum(record.num_distinct_captions for record in own)} distinct of "
        f"{sum(record.num_captions for record in own)} captions, {sum(record.num_bytes for record in own)} bytes, "
        f"{num_samples / max(seconds, 1e-9):.1f} samples/s"
        + (f"; {num_unreadable} unreadable samples, which training counts and replaces" if num_unreadable else "")
    )


def show_status(options: Options, runtime: Runtime) -> bool:
    """Print how many of the shards are done, and which are not. Return whether all are. Create nothing."""
    place = agreed(lambda: find_place(options))
    settings, known = read_cache(place.folder)
    index = read_index(place)
    work, states = shard_identities(index), torch.zeros(len(index.names), dtype=torch.int64)

    def look() -> dict[str, Tensor]:
        for number in range(runtime.rank, len(work), runtime.world_size):
            record = read_record(place.folder, work[number].shard) or known.get(work[number].shard)
            states[number] = STATES.index(state_of(place.folder, settings, index, number, work[number], record))
        return {"states": states}

    found = torch.stack([part["states"] for part in all_results(look)]).sum(dim=0).tolist()
    if runtime.is_main:
        table = Table(title=str(place.folder), title_justify="left")
        for heading in ("", "shards", "samples", ""):
            table.add_column(heading, justify="right" if heading else "left")
        for code, state in enumerate(STATES):
            those = [identity for identity, other in zip(work, found, strict=True) if other == code]
            named = [] if state == STATES[0] else [identity.shard for identity in those]
            names = ", ".join(named[:_MOST_NAMED]) + (", ..." if len(named) > _MOST_NAMED else "")
            table.add_row(state, f"{len(those):,}", f"{sum(one.num_samples for one in those):,}", names)
        plain_console().print(table)
        if STATES.index("damaged") in found:
            print("delete the sidecars of damaged shards and run the command again; --verify names the samples")
    return not any(found)


def verify(folder: Path, runtime: Runtime) -> None:
    """Compare every sidecar with its record and its own checksums. Raise InputError if one is damaged or missing."""
    read_cache(folder)  # raises if there is no cache
    records = read_records(folder)
    shards = list(records)

    def compare() -> dict[str, Tensor]:
        problems = 0
        for shard in shards[runtime.rank :: runtime.world_size]:
            damage = damage_of(sidecar_path(folder, shard), records[shard].sha256)
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


def main() -> None:
    """Parse the command line; make a cache, or look at one."""
    options = read_options(Options)
    keep_freed_memory()
    with start("cpu" if options.engine == "ray" else options.device) as runtime:
        if options.verify:
            assert options.out is not None
            verify(options.out, runtime)
        elif options.status:
            if not show_status(options, runtime):
                raise SystemExit(1)
        else:
            cache(options, runtime)


if __name__ == "__main__":
    run_command(main)
