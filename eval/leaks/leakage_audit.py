"""What training data and a benchmark share: the signs of a leak, and the audit that collects them.

There are six signs. The first three are leaks, the others hints to look at:

- sha256: the same file, byte for byte;
- look: the same picture in another file, recompressed or resized (picture_hashes.py says how, and what it misses);
- caption: the same complete caption, apart from case, spaces and punctuation;
- short_caption: the same, but so short that two people may have written it ("a man riding a wave");
- first_sentence: captions that start with the same sentence, as template captions do;
- name: the same file name without its folder and suffix. Shards number their files, and so do benchmarks: equal numbers
mean little, but equal names of one pool (COCO's 000000391895) mean a lot, and only a reader can tell.

Shapes: n samples, m captions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from eval.leaks.audit_parts import FileList, HashedPart, Part, hash_parts, join_parts
from eval.leaks.picture_hashes import MAX_DISTANCE, MAX_TILE_DIFFERENCE, MIN_CORRELATION, find_look_alikes, has_detail
from eval.towers.features import show_track

__all__ = [
    "FILES_PER_PART",
    "LEAKS",
    "SIGNS",
    "Audit",
    "Benchmark",
    "Match",
    "Sign",
    "load_benchmark",
]

Sign = Literal["sha256", "look", "caption", "short_caption", "first_sentence", "name"]
SIGNS: dict[Sign, str] = {
    "sha256": "same file",
    "look": "same look",
    "caption": "same caption",
    "short_caption": "same short caption",
    "first_sentence": "same first sentence",
    "name": "same file name",
}
LEAKS: tuple[Sign, ...] = ("sha256", "look", "caption")
FILES_PER_PART = 1000
_MAX_LISTED = 1000  # unreadable pictures named in the JSON


class Look(NamedTuple):
    """How similar two pictures look; see picture_hashes.py."""

    distance: int
    """Bits, of 256, in which the perceptual hashes differ."""
    correlation: float
    """Correlation of the thumbnails."""
    difference: float
    """Difference of the thumbnails in their worst tile, in grey levels."""


class Match(NamedTuple):
    """A training sample and a benchmark picture that share a sign."""

    train: str
    benchmark: str
    part: Part
    sample: int
    """The sample's place in the part."""
    other: int
    """The picture's place in the benchmark."""
    look: Look | None = None
    caption: str | None = None
    """What the captions share, as the benchmark writes it."""

    def as_json(self) -> dict[str, Any]:
        """Return the pair's names and figures."""
        look = self.look._asdict() if self.look is not None else {}
        caption = {"caption": self.caption} if self.caption is not None else {}
        return {"train": self.train, "benchmark": self.benchmark, **look, **caption}


@dataclass(frozen=True)
class Benchmark:
    """The pictures and captions that must not be in the training data, hashed."""

    name: str
    files: FileList
    hashed: HashedPart
    captions: list[str]
    """[m], as in `hashed`."""


@dataclass
class Audit:
    """Compare training data, one part at a time, with a benchmark.

    Leaks are listed with all their pairs. For hints, each training sample has only its first pair, because the first
    sentence of a template would pair everything.
    """

    benchmark: Benchmark
    min_caption_length: int
    """Characters, of letters and single spaces, from which equal captions are a leak and not a coincidence."""
    num_samples: int = 0
    num_pictures: int = 0
    num_plain: int = 0
    num_captions: int = 0
    num_problems: int = 0
    problems: list[str] = field(default_factory=list)
    matches: dict[Sign, list[Match]] = field(default_factory=lambda: {sign: [] for sign in SIGNS})

    def __post_init__(self) -> None:
        hashed = self.benchmark.hashed
        self._names = _places(_stem(name) for name in hashed.names)
        self._sha256 = _places(digest.tobytes() for digest in hashed.sha256)
        self._sha256.pop(bytes(32), None)
        self._captions = _places(digest.tobytes() for digest in hashed.caption_digests)
        self._sentences = _places(digest.tobytes() for digest in hashed.sentence_digests)
        self.num_problems, self.problems = len(hashed.problems), hashed.problems[:_MAX_LISTED].tolist()

    def compare(self, part: Part, hashed: HashedPart) -> None:
        """Add what the part shares with the benchmark."""
        self.num_samples += len(hashed.names)
        self.num_pictures += len(hashed.phashes)
        self.num_plain += int((~has_detail(hashed.thumbnails)).sum())
        self.num_captions += len(hashed.caption_digests)
        self.num_problems += len(hashed.problems)
        room = max(0, _MAX_LISTED - len(self.problems))
        self.problems += [part.title(problem) for problem in hashed.problems[:room].tolist()]
        same_files = {
            (row, other) for row, digest in enumerate(hashed.sha256) for other in self._sha256.get(digest.tobytes(), [])
        }
        for row, other in sorted(same_files):
            self.matches["sha256"].append(self._match(part, hashed, row, other))
        self._compare_looks(part, hashed, same_files)
        self._compare_captions(part, hashed)
        for row, name in enumerate(hashed.names):
            for other in self._names.get(_stem(name), [])[:1]:
                self.matches["name"].append(self._match(part, hashed, row, other))

    def _compare_looks(self, part: Part, hashed: HashedPart, same_files: set[tuple[int, int]]) -> None:
        others = self.benchmark.hashed
        found = find_look_alikes(hashed.phashes, hashed.thumbnails, others.phashes, others.thumbnails)
        for row, other, *figures in zip(*(array.tolist() for array in found), strict=True):
            pair = int(hashed.picture_samples[row]), int(others.picture_samples[other])
            if pair not in same_files:
                match = self._match(part, hashed, *pair)
                self.matches["look"].append(match._replace(look=Look(*figures)))

    def _compare_captions(self, part: Part, hashed: HashedPart) -> None:
        others, seen = self.benchmark.hashed, set[tuple[Sign, int, int]]()
        for index, row in enumerate(hashed.caption_samples.tolist()):
            length = int(hashed.caption_lengths[index])
            if length == 0:
                continue  # a caption without words says nothing
            sign: Sign = "caption" if length >= self.min_caption_length else "short_caption"
            places = self._captions.get(hashed.caption_digests[index].tobytes(), [])
            if not places:
                sign, places = "first_sentence", self._sentences.get(hashed.sentence_digests[index].tobytes(), [])
            for place in places if sign in LEAKS else places[:1]:
                other = int(others.caption_samples[place])
                if (sign, row, other) not in seen:
                    seen.add((sign, row, other))
                    match = self._match(part, hashed, row, other)
                    self.matches[sign].append(match._replace(caption=self.benchmark.captions[place]))

    def _match(self, part: Part, hashed: HashedPart, row: int, other: int) -> Match:
        return Match(part.title(str(hashed.names[row])), str(self.benchmark.hashed.names[other]), part, row, other)

    @property
    def has_leak(self) -> bool:
        """Whether a file, a look or a complete caption is in both."""
        return any(self.matches[sign] for sign in LEAKS)

    def figures(self) -> dict[str, Any]:
        """Return counts and all pairs, as in the JSON."""
        hashed = self.benchmark.hashed
        return {
            "benchmark": self.benchmark.name,
            "num_benchmark_samples": len(hashed.names),
            "num_benchmark_pictures": len(hashed.phashes),
            "num_benchmark_plain": int((~has_detail(hashed.thumbnails)).sum()),
            "num_benchmark_captions": len(hashed.caption_digests),
            "num_train_samples": self.num_samples,
            "num_train_pictures": self.num_pictures,
            "num_train_plain": self.num_plain,
            "num_train_captions": self.num_captions,
            "num_unreadable": self.num_problems,
            "unreadable": self.problems,
            "max_distance": MAX_DISTANCE,
            "min_correlation": MIN_CORRELATION,
            "max_tile_difference": MAX_TILE_DIFFERENCE,
            "min_caption_length": self.min_caption_length,
            "has_leak": self.has_leak,
            "signs": {
                sign: {
                    "is_leak": sign in LEAKS,
                    "num_pairs": len(matches),
                    "num_train": len({match.train for match in matches}),
                    "num_benchmark": len({match.other for match in matches}),
                    "pairs": [match.as_json() for match in matches],
                }
                for sign, matches in self.matches.items()
            },
        }


def load_benchmark(name: str, files: FileList, cache: Path | None = None, num_workers: int = 0) -> Benchmark:
    """Hash a benchmark's files; see `hash_parts` for the cache and the workers."""
    parts = files.split(FILES_PER_PART)
    hashed = [result for _, result in show_track(hash_parts(parts, cache, num_workers), "benchmark", len(parts))]
    return Benchmark(name, files, join_parts(hashed), [text for texts in files.captions for text in texts])


def _places(keys: Iterable[Any]) -> dict[Any, list[int]]:
    places = defaultdict(list)
    for place, key in enumerate(keys):
        places[key].append(place)
    return dict(places)


def _stem(name: str) -> str:
    return PurePosixPath(str(name)).stem.casefold()
