"""The command for the leakage audit: which pictures and captions of a benchmark are in the training data.

    python eval/leakage.py --train 'shards/*.tar' --protocol urban1k --root data/Urban1k --strict --json leaks.json

leakage_audit.py defines a leak; picture_hashes.py defines when two pictures look the same.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.table import Table

from eval.base.arguments import answer_early, read_options
from longclip_teacher.errors import InputError, run_command


@dataclass
class Options:
    """List the pictures and captions that are both in the training data and in a benchmark.

    python eval/leakage.py --train 'shards/*.tar' --protocol urban1k --root data/Urban1k --strict --json leaks.json
    python eval/leakage.py --train-json share-captioner_coco_lcs_sam_1246k_1107.json --train-images data \
        --protocol coco2017val --root data/coco --hash-cache cache --pairs-image pairs.png
    python eval/leakage.py --train shards --pictures data/imagenet/val
    """

    train: str | None = None
    """Training shards: a folder of .tar files, or a pattern in quotes."""
    train_json: Path | None = None
    """Training data as ShareGPT4V's JSON, instead of shards."""
    train_images: Path | None = None
    """Folder of the pictures that the JSON names. Without it, only names and captions are compared."""
    skip_rows: int | None = None
    """Rows at the start of the JSON that are not training data. Unset: 1000 of ShareGPT4V's own file, whose first 1000
    rows are the sharegpt4v_1k benchmark, and 0 of any other file."""
    protocol: str | None = None
    """Benchmark, as in eval/retrieval.py; `python eval/retrieval.py --protocol list` explains each."""
    root: Path | None = None
    """Folder of the benchmark's files."""
    annotations: Path | None = None
    """The benchmark's annotation file, if it is not in its usual place below --root."""
    pictures: Path | None = None
    """Folder of pictures (with its sub-folders) that is the benchmark, instead of a protocol."""
    strict: bool = False
    """Exit with status 1 if both contain the same file, look or whole caption."""
    min_caption_length: int = 60
    """Equal captions below this number of characters are only a hint: two people may have written them."""
    json: Path | None = None
    """File for the counts and all pairs, as JSON."""
    pairs_image: Path | None = None
    """File for a PNG with the first pairs side by side."""
    hash_cache: Path | None = None
    """Folder that stores the hashes: an interrupted audit resumes, and another benchmark takes minutes."""
    num_workers: int = 0
    """Processes that read and hash; 0 uses the main process."""

    def check(self) -> None:
        """Raise InputError for options that do not fit together."""
        if (self.train is None) == (self.train_json is None):
            raise InputError("pass the training data: either --train 'DIR/*.tar' or --train-json FILE")
        if (self.protocol is None) == (self.pictures is None):
            raise InputError("pass the benchmark: either --protocol NAME --root DIR or --pictures DIR")
        if (self.protocol is None) != (self.root is None):
            raise InputError("--protocol and --root go together: give the benchmark and the folder of its files")
        if self.train_images is not None and self.train_json is None:
            raise InputError("--train-images goes with --train-json: shards contain their pictures")
        if min(self.num_workers, self.skip_rows or 0, self.min_caption_length) < 0:
            raise InputError("--num-workers, --skip-rows and --min-caption-length must be 0 or more")
        for path in (self.json, self.pairs_image):
            if path is not None and path.is_dir():
                raise InputError(f"{path} is a folder: name a file")


if __name__ == "__main__":
    answer_early(Options)  # --help and refused options end here: the imports below take seconds

from PIL import Image

from eval.base.consoles import plain_console
from eval.base.folders import matching_paths, pictures_below
from eval.base.images import open_image
from eval.benchmarks.annotation_files import inside_root
from eval.benchmarks.conversations import conversation_rows, count_conversations, held_out_rows
from eval.benchmarks.protocols import load_retrieval_set
from eval.leaks.audit_parts import FileList, Part, Shard, hash_parts
from eval.leaks.leakage_audit import FILES_PER_PART, LEAKS, SIGNS, Audit, load_benchmark
from eval.pages.pair_sheet import PicturePair, draw_pairs
from eval.towers.features import show_track
from longclip_teacher.atomic_files import atomic_file, write_json

__all__ = ["Options", "pair_sheet", "picture_files", "protocol_files", "run_audit", "shard_parts", "sharegpt4v_parts"]

_EXAMPLES_PRINTED = 3  # examples printed for each sign of a leak
_PAIRS_SHOWN = 16  # pairs drawn for each sign of a leak


def run_audit(options: Options) -> Audit:
    """Hash the benchmark, then the training data, and compare part by part."""
    parts: Iterable[Part]
    if options.train is not None:
        parts = shard_parts(options.train)
        total = len(parts)
    else:
        assert options.train_json is not None  # check() comes first
        if not options.train_json.is_file():
            raise InputError(f"no annotation file at {options.train_json}")
        skip_rows = held_out_rows(options.train_json) if options.skip_rows is None else options.skip_rows
        parts = sharegpt4v_parts(options.train_json, options.train_images, skip_rows)
        total = -(-max(0, count_conversations(options.train_json) - skip_rows) // FILES_PER_PART)
    if options.pictures is not None:
        name, files = str(options.pictures), picture_files(options.pictures)
    else:
        assert options.protocol is not None and options.root is not None
        name, files = options.protocol, protocol_files(options.protocol, options.root, options.annotations)
    benchmark = load_benchmark(name, files, options.hash_cache, options.num_workers)
    audit = Audit(benchmark, options.min_caption_length)
    for part, hashed in show_track(hash_parts(parts, options.hash_cache, options.num_workers), "training data", total):
        audit.compare(part, hashed)
    if audit.num_samples == 0:
        raise InputError(f"there are no samples in {options.train or options.train_json}: nothing was compared")
    return audit


def protocol_files(protocol: str, root: Path, annotations: Path | None = None) -> FileList:
    """The pictures and captions of a retrieval protocol."""
    retrieval_set = load_retrieval_set(protocol, root, annotations=annotations)
    if retrieval_set.count_mismatch:
        print(f"warning: {retrieval_set.count_mismatch}", file=sys.stderr)
    captions: list[list[str]] = [[] for _ in retrieval_set.images]
    for caption, image in zip(retrieval_set.captions, retrieval_set.caption_image, strict=True):
        captions[image].append(caption)
    names = tuple(str(path) for path in retrieval_set.images)
    return FileList(names, tuple(retrieval_set.images), tuple(tuple(own) for own in captions))


def picture_files(folder: Path) -> FileList:
    """The pictures below a folder without captions, such as ImageNet's validation set."""
    paths = tuple(pictures_below(folder)) if folder.is_dir() else ()
    if not paths:
        raise InputError(f"no pictures below {folder}")
    return FileList(tuple(map(str, paths)), paths, ((),) * len(paths))


def shard_parts(source: str) -> list[Shard]:
    """The shards in a folder or matching a pattern such as 'DIR/*.tar'."""
    path = Path(source)
    found = matching_paths(path / "*.tar" if path.is_dir() else path)
    if not found:
        raise InputError(f"no shards at {source}: name a folder of .tar files or a pattern in quotes, 'DIR/*.tar'")
    return [Shard(shard) for shard in found]


def sharegpt4v_parts(path: Path, images: Path | None, skip_rows: int) -> Iterator[FileList]:
    """Rows of a ShareGPT4V JSON from number `skip_rows` on, a thousand per part; `images` is the pictures' folder.

    A row without a picture is called by its number, and one without a caption has none to compare.
    """
    if images is not None and not images.is_dir():
        raise InputError(f"no folder of training pictures at {images}")
    rows = conversation_rows(path, skip_rows)
    while block := list(islice(rows, FILES_PER_PART)):
        paths = [None if not row.image or images is None else inside_root(images, row.image, path) for row in block]
        yield FileList(
            names=tuple(f"row {row.number}" if not row.image else str(row.image) for row in block),
            paths=tuple(paths),
            captions=tuple((row.caption,) if row.caption else () for row in block),
        )


def pair_sheet(audit: Audit) -> Image.Image:
    """The first pairs of each sign: training picture on the left, benchmark picture on the right."""
    shown = [(sign, match) for sign in LEAKS for match in audit.matches[sign][:_PAIRS_SHOWN]]
    wanted: dict[Part, set[int]] = defaultdict(set)
    for _, match in shown:
        wanted[match.part].add(match.sample)
    contents = dict(content for part, rows in wanted.items() for content in _contents(part, rows))
    pairs = []
    for sign, match in shown:
        look = match.look
        figures = f", {look.distance} bits, correlation {look.correlation:.3f}" if look is not None else ""
        lines = (SIGNS[sign] + figures, match.train, match.benchmark)
        path = audit.benchmark.files.paths[match.other]
        pairs.append(PicturePair(_shown(contents[match.part, match.sample]), _shown(path), lines))
    return draw_pairs(pairs)


def _contents(part: Part, rows: set[int]) -> Iterator[tuple[tuple[Part, int], bytes | None]]:
    """The pictures of some samples of a part, read again up to the last of them."""
    for row, sample in islice(enumerate(part.samples()), max(rows) + 1):
        if row in rows:
            yield (part, row), sample.content


def _shown(source: Path | bytes | None) -> Image.Image | None:
    try:
        return None if source is None else open_image(source)
    except InputError:
        return None


def main() -> None:
    """Run the command."""
    options = read_options(Options)
    audit = run_audit(options)
    figures = audit.figures()
    if options.json is not None:
        write_json(options.json, figures)
    if options.pairs_image is not None and audit.has_leak:
        _write_png(options.pairs_image, pair_sheet(audit))
    print_table(figures)
    if options.strict and audit.has_leak:
        raise SystemExit(1)


def print_table(figures: dict[str, Any]) -> None:
    """Print the counts of each sign as a table, the first examples, and the verdict on stdout."""
    table = Table(
        title=f"{figures['benchmark']} ({figures['num_benchmark_pictures']} pictures, "
        f"{figures['num_benchmark_captions']} captions) in {figures['num_train_samples']} training samples"
    )
    for column in ("", "", "training samples", "benchmark pictures"):
        table.add_column(column, justify="right" if column else "left")
    for sign, title in SIGNS.items():
        row = figures["signs"][sign]
        table.add_row("leak" if row["is_leak"] else "hint", title, str(row["num_train"]), str(row["num_benchmark"]))
    console = plain_console()
    console.print(table)
    for note in _notes(figures):
        console.print(note, soft_wrap=True)


def _notes(figures: dict[str, Any]) -> list[str]:
    notes = [
        f"{title}: {pair['train']} = {pair['benchmark']}"
        for sign, title in SIGNS.items()
        for pair in figures["signs"][sign]["pairs"][:_EXAMPLES_PRINTED]
    ]
    if figures["num_train_pictures"] == 0:
        notes.append("Only names and captions were compared, no pictures (--train-images DIR gives their folder).")
    if figures["num_unreadable"]:
        notes.append(
            f"{figures['num_unreadable']} samples could not be read in full; the first: {figures['unreadable'][0]}"
        )
    if plain := figures["num_train_plain"] + figures["num_benchmark_plain"]:
        notes.append(f"{plain} pictures of nearly one colour were compared only by their bytes: they have no look.")
    leaks = {sign: figures["signs"][sign]["num_train"] for sign in LEAKS}
    found = ", ".join(f"{count} with the {SIGNS[sign]}" for sign, count in leaks.items() if count)
    notes.append(f"LEAK: training samples {found}." if found else "No leak: no file, look or whole caption is shared.")
    return notes


def _write_png(path: Path, image: Image.Image) -> None:
    with atomic_file(path) as temporary:
        image.save(temporary, "PNG")


if __name__ == "__main__":
    run_command(main)
