"""Pack pictures and captions into indexed webdataset shards for training."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Annotated

import tyro
from rich.progress import track

from caption_sources import LeftOut, Pair, Row, Split, read_coco, read_folder, read_sharegpt4v, read_table
from eval.base.arguments import answer_early, read_options
from longclip_teacher.errors import InputError, run_command
from pair_selection import causes, check_missing, select


@dataclass(kw_only=True)
class Output:
    """Options of every importer."""

    out: Path
    """Folder for the shards and their manifest.json. When started again, the command keeps finished shards."""
    name: str = "train"
    """Prefix of the shards' file names."""
    include: tuple[str, ...] = ()
    """Glob patterns for the picture's path as the source writes it; at least one must match (* matches / too)."""
    exclude: tuple[str, ...] = ()
    """Glob patterns for the picture's path; none may match."""
    limit: int | None = None
    """Take only the first pictures that the patterns select, this many."""
    val_share: float = 0.0
    """Share of the pictures, chosen by a hash of their path, that goes to OUT/val instead.
    It is written as image/N.jpg and caption/N.txt, which evaluation and --data.val read."""
    resize: int | None = None
    """Shrink pictures to this shorter side in pixels, as JPEG of quality 95.
    Smaller pictures keep their bytes, and without this option all do."""
    shard_size: int = 5000
    """Pictures per shard."""
    workers: int = os.cpu_count() or 1
    """Worker processes. The shards do not depend on their number."""
    max_missing_share: float = 0.02
    """Share of rows whose picture or caption may be missing or unreadable. They are counted by cause, and
    OUT/missing.txt lists them."""

    def check(self) -> None:
        """Raise InputError for invalid numbers."""
        if not 0 <= self.val_share < 1 or not 0 <= self.max_missing_share <= 1:
            raise InputError("--val-share and --max-missing-share are shares between 0 and 1")
        if min(self.shard_size, self.workers, self.limit or 1, self.resize or 1) < 1:
            raise InputError("--shard-size, --workers, --limit and --resize must be 1 or more")
        if not self.name or "." in self.name or "/" in self.name:
            raise InputError(f"--name {self.name!r}: give a plain name without dots or slashes")


@dataclass(kw_only=True)
class ShareGPT4V(Output):
    """ShareGPT4V's JSON, or any of conversations, and its folder of pictures. The first answer is the caption.

    An answer is from gpt or assistant. Its first sentence becomes the short caption.
    """

    json: Path
    """share-captioner_coco_lcs_sam_1246k_1107.json, or any JSON array of such rows (image, conversations)."""
    images: Path
    """Folder to which the rows' paths are relative."""
    split: Split = "auto"
    """Rows: test is 0 to 999, Long-CLIP's retrieval test; train is the rest. auto is train for ShareGPT4V's own file,
    known by its name or its million rows, and all for any other."""

    def rows(self) -> Iterator[Row]:
        """Yield the rows of the split."""
        return read_sharegpt4v(self.json, self.images, self.split)


@dataclass(kw_only=True)
class Coco(Output):
    """A COCO captions JSON. A picture keeps all of its captions; training draws one of them each time."""

    json: Path
    """annotations/captions_train2017.json or similar."""
    images: Path
    """Folder with the pictures, for example train2017."""

    def rows(self) -> Iterator[Row]:
        """Yield the captioned pictures."""
        return read_coco(self.json, self.images)


@dataclass(kw_only=True)
class Folder(Output):
    """Pictures with a .txt of the same name beside each, subfolders included, or image/N.jpg with caption/N.txt."""

    images: Path
    """The folder."""

    def rows(self) -> Iterator[Row]:
        """Yield the folder's pairs by path."""
        return read_folder(self.images)


@dataclass(kw_only=True)
class Tsv(Output):
    """A tab-separated table without quoting. Its header names the columns (filepath, caption, caption_short, ...).

    Without a header they are picture path, long caption and optional short caption.
    """

    file: Path
    """The table, UTF-8."""
    images: Path | None = None
    """Folder to which the paths are relative. Default: the table's own."""

    def rows(self) -> Iterator[Row]:
        """Yield the table's rows."""
        return read_table(self.file, self.images or self.file.parent, "\t")


@dataclass(kw_only=True)
class Csv(Tsv):
    """A comma-separated table. Its header names the columns, as for tsv."""

    def rows(self) -> Iterator[Row]:
        """Yield the table's rows."""
        return read_table(self.file, self.images or self.file.parent, ",")


@dataclass(kw_only=True)
class Index:
    """Write the manifest and the indexes of existing shards, such as img2dataset's. Training starts faster with
    them."""

    shards: tuple[str, ...]
    """Folders or patterns of .tar files."""
    workers: int = os.cpu_count() or 1
    """Processes."""

    def check(self) -> None:
        """Raise InputError for invalid numbers."""
        if self.workers < 1:
            raise InputError(f"--workers {self.workers}: give 1 or more")


Command = (
    Annotated[ShareGPT4V, tyro.conf.subcommand("sharegpt4v")]
    | Annotated[Coco, tyro.conf.subcommand("coco")]
    | Annotated[Folder, tyro.conf.subcommand("folder")]
    | Annotated[Tsv, tyro.conf.subcommand("tsv")]
    | Annotated[Csv, tyro.conf.subcommand("csv")]
    | Annotated[Index, tyro.conf.subcommand("index")]
)


if __name__ == "__main__":
    answer_early(Command, __doc__)  # --help and refused options end here: the imports below take seconds

from eval.base.consoles import plain_console
from eval.base.workers import START_METHOD
from longclip_teacher.atomic_files import atomic_folder, write_text
from longclip_teacher.folder_lock import folder_lock
from packed_pictures import left_out, picture_bytes
from training.data.index import expand_patterns
from training.data.shard_records import ShardRecord, index_file, kept_record, read_manifest
from training.data.writer import caption_member, index_shard, write_manifest, write_shard

_STDERR = plain_console(stderr=True)


@dataclass(frozen=True)
class ShardJob:
    """One shard to make: a fixed run of the source's pictures."""

    path: Path
    pairs: list[Pair]
    resize: int | None
    inputs: str  # hash of everything that decides the shard's bytes


def fingerprint(pairs: Sequence[Pair], resize: int | None) -> str:
    """Hash everything that could change the shard: captions, order, a picture's path, size or time, `resize`."""
    digest = hashlib.sha256(f"2 {resize}".encode())  # 2: broken pictures are left out
    for pair in pairs:
        status = pair.path.stat()
        identity = [pair.key, pair.name, status.st_size, status.st_mtime_ns, pair.caption_long, pair.caption_short]
        digest.update(json.dumps(identity).encode())
    return digest.hexdigest()


def make_shard(job: ShardJob) -> tuple[ShardRecord | None, list[LeftOut]]:
    """Write one shard and its record, in case the run is interrupted. Also return the pictures that cannot be used; if
    none can, there is no shard."""
    missing: list[LeftOut] = []

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for pair in job.pairs:
            try:
                suffix, data = picture_bytes(pair.path, job.resize)
            except InputError as error:
                missing.append(left_out(pair.name, pair.path, error))
                continue
            yield pair.key, {suffix: data, "json": caption_member(pair.caption_long, pair.caption_short)}

    usable = samples()
    first = next(usable, None)
    if first is None:
        for earlier in (job.path, index_file(job.path)):
            earlier.unlink(missing_ok=True)
        return None, missing
    record = write_shard(job.path, chain([first], usable))
    # a shard that lacks a picture is written again next time, when the picture may be readable
    if not missing:
        record = replace(record, inputs=job.inputs)
        write_text(record_path(job.path), json.dumps(record.to_json()))
    return record, missing


def record_path(shard: Path) -> Path:
    """Return where a finished shard's record waits for the manifest."""
    return shard.with_suffix(".record.json")


def finished(args: Output, jobs: Sequence[ShardJob]) -> dict[Path, ShardRecord]:
    """Return the records of an earlier run's shards that are complete and would be made identically."""
    known = read_manifest(args.out)
    for job in jobs:
        try:
            known[job.path.name] = ShardRecord.from_json(json.loads(record_path(job.path).read_bytes()))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not reached, or interrupted while it was written
    done: dict[Path, ShardRecord] = {}
    for job in jobs:
        found = known.get(job.path.name)
        if found and found.inputs == job.inputs and (record := kept_record(job.path, found)):
            done[job.path] = record
    return done


def progress(items: Iterable, title: str, total: int | None = None) -> Iterable:
    """Wrap `items` in a progress bar on stderr, if that is a terminal."""
    return track(items, title, total, console=_STDERR, transient=True, disable=not _STDERR.is_terminal)


def in_parallel(function: Callable, items: Sequence, workers: int, title: str) -> Iterator:
    """Yield results of `function` over `items` as they come, with a progress bar. Drop the rest on an error."""
    if workers == 1 or len(items) == 1:
        yield from map(function, progress(items, title))
        return
    context = multiprocessing.get_context(START_METHOD)
    with ProcessPoolExecutor(max(1, min(workers, len(items))), context) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            for future in progress(as_completed(futures), title, len(futures)):
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def write_val(args: Output, pairs: Sequence[Pair]) -> list[LeftOut]:
    """Replace OUT/val by image/N.suffix and caption/N.txt of these pairs. Return what cannot be used."""
    missing: list[LeftOut] = []
    val = args.out / "val"
    with atomic_folder(val) as temporary:
        (temporary / "image").mkdir()
        (temporary / "caption").mkdir()
        for number, pair in enumerate(pairs, start=1):
            try:
                suffix, data = picture_bytes(pair.path, args.resize)
            except InputError as error:
                missing.append(left_out(pair.name, pair.path, error))
                continue
            caption = pair.caption_long if isinstance(pair.caption_long, str) else pair.caption_long[0]
            (temporary / "image" / f"{number}.{suffix}").write_bytes(data)
            (temporary / "caption" / f"{number}.txt").write_text(caption + "\n", encoding="utf-8")
        if val.exists():
            shutil.rmtree(val)
    return missing


def make_shards(args: Output, rows: Iterator[Row]) -> None:
    """Select, check, write the missing shards, then write the manifest. The process must hold the folder."""
    present, missing = select(progress(rows, "reading captions"), args.include, args.exclude, args.limit)
    num_rows, listing = len(present) + len(missing), args.out / "missing.txt"
    check_missing(listing, num_rows, missing, args.max_missing_share)
    is_val = [zlib.crc32(pair.name.encode("utf-8", "surrogatepass")) / 2**32 < args.val_share for pair in present]
    train = [pair for pair, val in zip(present, is_val, strict=True) if not val]
    val = [pair for pair, val in zip(present, is_val, strict=True) if val]
    if not train:
        raise InputError("no pictures are left for training: lower --val-share")
    jobs: list[ShardJob] = []
    for start in range(0, len(train), args.shard_size):
        run = train[start : start + args.shard_size]
        path = args.out / f"{args.name}-{len(jobs):06d}.tar"
        jobs.append(ShardJob(path, run, args.resize, fingerprint(run, args.resize)))
    if strangers := sorted({path.name for path in args.out.glob("*.tar")} - {job.path.name for job in jobs}):
        raise InputError(
            f"{args.out} holds shards of another run ({strangers[0]}): delete them or choose another --out"
        )
    records = finished(args, jobs)
    num_kept = len(records)
    todo = [job for job in jobs if job.path not in records]
    for record, refused in in_parallel(make_shard, todo, args.workers, "writing shards"):
        missing += refused
        if record is not None:
            records[args.out / record.name] = record
    if val:
        missing += write_val(args, val)
    ordered = [records[job.path] for job in jobs if job.path in records]
    if not ordered:
        check_missing(listing, num_rows, missing, max_share=0)
    settings = {"resize": args.resize, "shard_size": args.shard_size, "num_val": len(val), "num_missing": len(missing)}
    write_manifest(args.out, ordered, settings)
    for job in jobs:
        record_path(job.path).unlink(missing_ok=True)
    check_missing(listing, num_rows, missing, args.max_missing_share)
    print(
        f"{args.out}: {sum(one.num_samples for one in ordered)} samples in {len(ordered)} shards ({num_kept} kept)"
        + (f", {len(val)} validation pairs in {args.out / 'val'}" if val else "")
        + (f", {len(missing)} pictures left out ({causes(missing)}; {listing})" if missing else "")
    )


def write_index(args: Index) -> None:
    """Scan and hash the shards, and write a manifest into each of their folders."""
    paths = [Path(shard) for shard in expand_patterns(args.shards)]
    records = dict(in_parallel(_indexed, paths, args.workers, "indexing shards"))
    for folder in dict.fromkeys(path.parent for path in paths):
        own = [records[path] for path in paths if path.parent == folder]
        write_manifest(folder, own, {})
        print(f"{folder}: {sum(record.num_samples for record in own)} samples in {len(own)} shards")


def _indexed(path: Path) -> tuple[Path, ShardRecord]:
    return path, index_shard(path)


def main() -> None:
    """Parse the command line and run the importer."""
    args = read_options(Command, __doc__)
    if isinstance(args, Index):
        write_index(args)
    else:
        with folder_lock(args.out):
            make_shards(args, args.rows())


if __name__ == "__main__":
    run_command(main)
