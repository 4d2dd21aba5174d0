"""Convert shards and their teacher cache into shards in DataCompDR's layout."""

from __future__ import annotations

import dataclasses
import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.progress import track

from eval.base.arguments import answer_early, read_options
from eval.base.consoles import plain_console
from longclip_teacher.errors import InputError, run_command


@dataclass
class Options:
    """Convert shards and the teacher cache beside them (scripts/cache_teacher.py) into DataCompDR's shards.

    python scripts/export_datacompdr.py --shards 'data/train/*.tar' --cache data/teacher --out data/train_dr

    python training/main.py PRESET --data.shards 'data/train_dr/*.tar' --teacher.cache datacompdr

    Each sample becomes KEY.jpg (its original bytes), KEY.txt (its first short caption), KEY.syn.json (its long
    captions), KEY.paug.json (the stored crops and operations) and KEY.npz (image_emb, text_emb). Code that reads
    DataCompDR trains on them unchanged, including ours with --teacher.cache datacompdr. DataCompDR has one ground-truth
    caption, so further short captions are left out. Where the short caption is the first sentence of the drawn long
    caption, the export uses that of the first long caption. When started again, the command keeps finished shards.
    """

    shards: tuple[str, ...]
    """The shards from which the cache was made."""
    cache: Path
    """The cache's folder."""
    out: Path
    """Folder for the new shards, which keep their names, and their manifest.json."""

    def check(self) -> None:
        """Raise InputError for a missing cache, before any shard is read."""
        if not self.cache.is_dir():
            raise InputError(f"--cache {self.cache} is not a folder: name the one that scripts/cache_teacher.py wrote")


if __name__ == "__main__":
    answer_early(Options)  # --help and refused options end here: the imports below take seconds

import numpy as np
import torch

from longclip_teacher.folder_lock import folder_lock
from longclip_teacher.text import CaptionTokenizer, first_sentence
from training.cache.datacompdr import write_datacompdr_sample
from training.cache.manifest import CacheSettings, read_cache, shard_identities, sidecar_path
from training.cache.reader import cached_teacher_info, open_cache
from training.cache.sidecar import Sidecar, StoredView
from training.data.index import RawSample, ShardIndex, expand_patterns, is_remote
from training.data.samples import BadSample, read_captions
from training.data.shard_records import MANIFEST_NAME, kept_record, read_manifest
from training.data.store import TeacherInfo
from training.data.writer import write_manifest, write_shard

_STDERR = plain_console(stderr=True)


@dataclass(frozen=True)
class _Source:
    """One shard, its sidecar, and what all shards share."""

    index: ShardIndex
    samples: range
    sidecar: Sidecar
    teacher_info: TeacherInfo
    tokenizer: CaptionTokenizer

    def __iter__(self) -> Iterator[tuple[str, dict[str, bytes]]]:
        for row, number in enumerate(self.samples):
            raw = self.index.read(number)
            views = [self.sidecar.view(row, view, raw.key) for view in range(self.sidecar.num_views)]
            if views[0].is_valid:  # a sample that was unreadable when the cache was made has nothing to export
                yield raw.key, self._members(raw, views)

    def _members(self, raw: RawSample, views: list[StoredView]) -> dict[str, bytes]:
        if zlib.crc32(raw.image or b"") != views[0].picture_crc:
            raise self._misfit(raw.key, "picture")
        long, short, rows = self._captions(raw, views[0])
        return write_datacompdr_sample(
            raw.image or b"",
            image_features=np.stack([view.image for view in views]),
            text_features=np.stack([self.sidecar.caption(row, raw.key)[0] for row in rows]),
            captions=long,
            ground_truth=short,
            augmentations=[view.augmentation for view in views],
            teacher_info=self.teacher_info,
        )

    def _captions(self, raw: RawSample, stored: StoredView) -> tuple[list[str], str, list[int]]:
        """Return the long captions, the short one, and the sidecar's rows of the short one and then the long ones."""
        try:
            long, shorts = read_captions(raw)
        except BadSample:
            raise self._misfit(raw.key, "captions") from None
        short = first_sentence(long[0]) if stored.shorts_follow else (shorts or long)[0]
        rows = [int(stored.short[0]), *stored.long.tolist()]
        if len(rows) != 1 + len(long):
            raise self._misfit(raw.key, "captions")
        for caption, row in zip([short, *long], rows, strict=True):
            tokens = torch.from_numpy(self.sidecar.caption(row, raw.key)[1].astype(np.int64))
            if not torch.equal(self.tokenizer([caption])[0, : len(tokens)], tokens):
                raise self._misfit(raw.key, "captions")
        return long, short, rows

    def _misfit(self, key: str, what: str) -> InputError:
        return InputError(
            f"{self.sidecar.path}: the {what} of sample {key} changed after the teacher cache was made: "
            "run scripts/cache_teacher.py again"
        )


def export(options: Options) -> tuple[int, int]:
    """Write the new shards. Return how many samples they hold and how many the old ones hold."""
    (settings, _), teacher_info = read_cache(options.cache), cached_teacher_info(options.cache)
    paths = expand_patterns(options.shards)
    if is_remote(paths[0]):
        raise InputError(f"{paths[0]}: a teacher cache belongs to local shards; copy them to a disk first")
    index = ShardIndex(paths, show_progress=_STDERR.is_terminal)
    open_cache(options.cache, index, settings.augment, None)  # refuses a cache of other shards or of sampled captions
    if options.out.resolve() in {Path(name).parent.resolve() for name in index.names}:
        raise InputError(f"--out {options.out} is the folder of the shards themselves: give another folder")
    with folder_lock(options.out):
        return write_missing(options, settings, teacher_info, index), index.num_samples


def write_missing(options: Options, settings: CacheSettings, teacher_info: TeacherInfo, index: ShardIndex) -> int:
    """Write the new shards that are not there yet. Return how many samples the new shards hold."""
    tokenizer = CaptionTokenizer(settings.context_length)
    inputs = {
        Path(name).name: _digest(settings, sidecar_path(options.cache, name), shard.keys_sha256)
        for name, shard in zip(index.names, shard_identities(index), strict=True)
    }
    records = {
        name: record
        for name, known in read_manifest(options.out).items()
        if inputs.get(name) == known.inputs and (record := kept_record(options.out / name, known))
    }
    stops = np.cumsum(index.shard_sizes).tolist()
    shards = list(zip(map(Path, index.names), [0, *stops], stops, strict=False))
    for path, start, stop in track(shards, description="writing shards", console=_STDERR, transient=True):
        if path.name not in records:
            sidecar = Sidecar(sidecar_path(options.cache, path))
            source = _Source(index, range(start, stop), sidecar, teacher_info, tokenizer)
            record = write_shard(options.out / path.name, source)
            records[path.name] = dataclasses.replace(record, inputs=inputs[path.name])
            write_manifest(options.out, list(records.values()), {"teacher_cache": dataclasses.asdict(settings)})
    return sum(record.num_samples for record in records.values())


def _digest(settings: CacheSettings, sidecar: Path, keys: str) -> str:
    status = sidecar.stat()
    return hashlib.sha256(f"{settings!r} {status.st_size} {status.st_mtime_ns} {keys}".encode()).hexdigest()


def main() -> None:
    """Run the command."""
    options = read_options(Options)
    num_written, num_samples = export(options)
    print(f"{num_written} of {num_samples} samples in {options.out} ({MANIFEST_NAME} beside them)")


if __name__ == "__main__":
    run_command(main)
