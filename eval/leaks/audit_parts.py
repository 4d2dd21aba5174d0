"""What the leakage audit reads, a part at a time, and what it keeps of it: hashes of pictures and of captions.

A part is a shard, or a list of some thousand pictures and captions. Parts are hashed in worker processes, each by one
of them; with a cache, what was hashed of a part is kept in a file named by the part's content, so that an audit that
was stopped goes on where it was.

Shapes: n samples of a part, p of them with a picture that can be read, m captions.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import re
import signal
import unicodedata
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from eval.base.images import IMAGE_SUFFIXES, open_image
from eval.benchmarks.shard_samples import MAX_MEMBER_BYTES, shard_samples
from eval.leaks.picture_hashes import THUMBNAIL_SIZE, hash_picture
from longclip_teacher.atomic_files import atomic_file
from longclip_teacher.errors import InputError
from longclip_teacher.text import first_sentence

__all__ = ["FileList", "HashedPart", "Part", "Sample", "Shard", "hash_parts", "join_parts", "normalized"]

CACHE_VERSION = 1  # of the hashes and of their file: raised when either changes
CAPTION_KEYS = ("caption", "caption_long", "caption_short", "syn_text")
_DIGEST_BYTES = 16


class Sample(NamedTuple):
    """A picture's file as bytes (None: there is none to compare), its name, and its captions."""

    name: str
    content: bytes | None
    captions: tuple[str, ...]
    problem: str | None = None
    """What of it could not be read."""


@dataclass(frozen=True)
class Shard:
    """A webdataset tar: pictures, with captions in `.txt` and `.json` members."""

    path: Path

    def title(self, name: str) -> str:
        """Where the sample of that name is."""
        return f"{self.path}:{name}"

    def fingerprint(self) -> str:
        """Of all its bytes."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    def samples(self) -> Iterator[Sample]:
        """One for each picture, and one for captions without a picture. InputError for a broken tar."""
        for key, members in shard_samples(self.path, _is_read):
            captions, problem = _member_captions(members)
            pictures = {suffix: content for suffix, content in members.items() if suffix in IMAGE_SUFFIXES}
            if not pictures:
                yield Sample(key, None, captions, problem)
            for suffix, content in pictures.items():
                too_large = None if content else f"empty, or larger than {MAX_MEMBER_BYTES} bytes"
                yield Sample(key + suffix, content or None, captions, too_large or problem)


@dataclass(frozen=True)
class FileList:
    """Pictures by path with their captions; a picture without a path has a name and captions only."""

    names: tuple[str, ...]
    paths: tuple[Path | None, ...]
    captions: tuple[tuple[str, ...], ...]

    def title(self, name: str) -> str:
        """Where the sample of that name is: names are paths here."""
        return name

    def split(self, size: int) -> list[FileList]:
        """The list in parts of `size` files."""
        starts = range(0, len(self.names), size)
        parts = [slice(start, start + size) for start in starts]
        return [FileList(self.names[part], self.paths[part], self.captions[part]) for part in parts]

    def fingerprint(self) -> str:
        """Of names, captions, and the files' sizes and times: reading the files would take as long as hashing them."""
        digest = hashlib.sha256()
        for name, path, captions in zip(self.names, self.paths, self.captions, strict=True):
            status = path.stat() if path is not None and path.is_file() else None
            facts = [name, str(path), status and status.st_size, status and status.st_mtime_ns, captions]
            digest.update(json.dumps(facts).encode())
        return digest.hexdigest()

    def samples(self) -> Iterator[Sample]:
        """One for each name, in order."""
        for name, path, captions in zip(self.names, self.paths, self.captions, strict=True):
            if path is None:
                yield Sample(name, None, captions)
                continue
            try:
                if path.stat().st_size > MAX_MEMBER_BYTES:
                    yield Sample(name, None, captions, f"larger than {MAX_MEMBER_BYTES} bytes")
                else:
                    yield Sample(name, path.read_bytes(), captions)
            except OSError as error:
                yield Sample(name, None, captions, error.strerror or str(error))


Part = Shard | FileList


@dataclass(frozen=True)
class HashedPart:
    """What is compared of a part."""

    names: np.ndarray
    """[n] text."""
    sha256: UInt8[np.ndarray, "n 32"]
    """Of the picture's file; zeros where there is no file."""
    picture_samples: Int[np.ndarray, " p"]
    """The sample that each of the pictures belongs to: those that could be decoded."""
    phashes: UInt8[np.ndarray, "p 32"]
    thumbnails: UInt8[np.ndarray, "p 32 32 3"]
    caption_samples: Int[np.ndarray, " m"]
    """The sample that each caption belongs to."""
    caption_lengths: Int[np.ndarray, " m"]
    """Characters of the normalised caption."""
    caption_digests: UInt8[np.ndarray, "m 16"]
    """Of the normalised caption."""
    sentence_digests: UInt8[np.ndarray, "m 16"]
    """Of its normalised first sentence."""
    problems: np.ndarray
    """[k] text: what could not be read."""


def normalized(caption: str) -> str:
    """The caption's words in small letters, a space apart: spelling of marks, spaces and case does not count."""
    return " ".join(re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", caption).casefold()))


def hash_parts(
    parts: Iterable[Part], cache: Path | None = None, num_workers: int = 0
) -> Iterator[tuple[Part, HashedPart]]:
    """Each part with its hashes, in order; at most two parts a worker are under way, so memory stays bounded.

    `cache` is the folder where the hashes are kept; `num_workers` 0 hashes in this process. Raises InputError for a
    broken shard or a folder that cannot be written.
    """
    if cache is not None:
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the folder {cache} ({error.strerror})") from None
    if num_workers == 0:
        for part in parts:
            yield part, _hash_or_load(part, cache)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of torch's threads
    pool = ProcessPoolExecutor(num_workers, context, _ignore_interrupt)
    pending: deque[tuple[Part, Future[HashedPart]]] = deque()
    try:
        for part in parts:
            pending.append((part, pool.submit(_hash_or_load, part, cache)))
            if len(pending) >= 2 * num_workers:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    except BrokenProcessPool:
        raise InputError(
            "a worker process was ended from outside, mostly for lack of memory: lower --num-workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def join_parts(parts: Sequence[HashedPart]) -> HashedPart:
    """The parts as one, in order."""
    starts = np.cumsum([0, *(len(part.names) for part in parts)])[:-1]
    joined = {}
    for field in fields(HashedPart):
        arrays = [getattr(part, field.name) for part in parts]
        if field.name in ("picture_samples", "caption_samples"):
            arrays = [rows + start for rows, start in zip(arrays, starts, strict=True)]
        joined[field.name] = np.concatenate(arrays)
    return HashedPart(**joined)


def _hash_or_load(part: Part, cache: Path | None) -> HashedPart:
    if cache is None:
        return hash_part(part)
    path = cache / f"v{CACHE_VERSION}-{_fingerprint(part)}.npz"
    hashed = _load(path)
    if hashed is None:
        hashed = hash_part(part)
        _save(path, hashed)
    return hashed


def hash_part(part: Part) -> HashedPart:
    """Read and hash a part's samples. A picture that cannot be decoded is named; its bytes and captions still count."""
    names, sha256, problems = [], [], []
    pictures: list[tuple[int, np.ndarray, np.ndarray]] = []
    captions: list[tuple[int, int, bytes, bytes]] = []
    for row, sample in enumerate(part.samples()):
        names.append(sample.name)
        sha256.append(hashlib.sha256(sample.content).digest() if sample.content is not None else bytes(32))
        problem = sample.problem
        if sample.content is not None:
            try:
                pictures.append((row, *hash_picture(open_image(sample.content))))
            except InputError as error:
                problem = str(error).removeprefix("picture: ")
        if problem:
            problems.append(f"{sample.name}: {problem}")
        for caption in sample.captions:
            words = normalized(caption)
            captions.append((row, len(words), _digest(words), _digest(normalized(first_sentence(caption)))))
    size = THUMBNAIL_SIZE
    return HashedPart(
        names=np.array(names, dtype=str),
        sha256=_bytes_array(sha256, 32),
        picture_samples=np.array([row for row, _, _ in pictures], dtype=np.int64),
        phashes=np.array([phash for _, phash, _ in pictures], dtype=np.uint8).reshape(-1, 32),
        thumbnails=np.array([thumbnail for _, _, thumbnail in pictures], dtype=np.uint8).reshape(-1, size, size, 3),
        caption_samples=np.array([row for row, _, _, _ in captions], dtype=np.int64),
        caption_lengths=np.array([length for _, length, _, _ in captions], dtype=np.int64),
        caption_digests=_bytes_array([digest for _, _, digest, _ in captions], _DIGEST_BYTES),
        sentence_digests=_bytes_array([digest for _, _, _, digest in captions], _DIGEST_BYTES),
        problems=np.array(problems, dtype=str),
    )


def _fingerprint(part: Part) -> str:
    try:
        return part.fingerprint()
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read ({error.strerror})") from None


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=_DIGEST_BYTES).digest()


def _bytes_array(rows: list[bytes], width: int) -> UInt8[np.ndarray, "N W"]:
    return np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(-1, width)


def _is_read(suffix: str) -> bool:
    return suffix in IMAGE_SUFFIXES or suffix in (".txt", ".json", ".syn.json")


def _member_captions(members: dict[str, bytes]) -> tuple[tuple[str, ...], str | None]:
    """The captions of a sample's .txt and .json members, each once, and what is wrong with one that cannot be read."""
    captions: list[str] = []
    problem = None
    for suffix, content in members.items():
        try:
            if suffix == ".txt":
                captions.append(content.decode("utf-8-sig"))
            elif suffix.endswith(".json"):
                captions += _json_captions(json.loads(content))
        except (ValueError, RecursionError):
            problem = f"its {suffix} is not {'UTF-8 text' if suffix == '.txt' else 'valid JSON'}"
    return tuple(dict.fromkeys(captions)), problem


def _json_captions(content: Any) -> list[str]:
    found = [content.get(key) for key in CAPTION_KEYS] if isinstance(content, dict) else []
    texts = [text for value in found for text in (value if isinstance(value, list) else [value])]
    return [text for text in texts if isinstance(text, str)]


def _save(path: Path, hashed: HashedPart) -> None:
    """Atomically: a killed audit leaves the whole file or none."""
    with atomic_file(path) as temporary:
        try:
            with temporary.open("wb") as file:
                np.savez(file, **{field.name: getattr(hashed, field.name) for field in fields(HashedPart)})
        except OSError as error:
            raise InputError(f"cannot write {path} ({error.strerror})") from None


def _load(path: Path) -> HashedPart | None:
    """What was kept, or None if there is nothing or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return HashedPart(**{field.name: file[field.name] for field in fields(HashedPart)})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends the workers
