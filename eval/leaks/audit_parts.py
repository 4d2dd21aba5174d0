"""The parts of data that the leakage audit reads, and what it stores of them: hashes of pictures and captions.

A part is a shard, or a list of some thousand pictures and captions. Each part is hashed by one worker process. With a
cache, the hashes of a part are stored in a file named after the part's content, so that a stopped audit can continue
where it was.

Shapes: n samples of a part, p of them with a readable picture, m captions.
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

from eval.base.foreign_text import HALVES, whole_characters
from eval.base.images import IMAGE_SUFFIXES, open_image
from eval.base.plain_files import check_plain
from eval.benchmarks.shard_samples import MAX_MEMBER_BYTES, shard_samples
from eval.leaks.picture_hashes import THUMBNAIL_SIZE, hash_picture
from longclip_teacher.atomic_files import atomic_file
from longclip_teacher.errors import InputError
from longclip_teacher.temporaries import remove_leftovers
from longclip_teacher.text import first_sentence

__all__ = ["FileList", "HashedPart", "Part", "Sample", "Shard", "hash_parts", "join_parts", "normalized"]

CACHE_VERSION = 1  # version of the hashes and of their file; raise it when either changes
CAPTION_KEYS = ("caption", "caption_long", "caption_short", "syn_text")
_DIGEST_BYTES = 16


class Sample(NamedTuple):
    """A picture's file as bytes (None: there is none to compare), its name, and its captions."""

    name: str
    content: bytes | None
    captions: tuple[str, ...]
    problem: str | None = None
    """What could not be read."""


@dataclass(frozen=True)
class Shard:
    """A webdataset tar: pictures, with captions in `.txt` and `.json` members."""

    path: Path

    def title(self, name: str) -> str:
        """Return where the sample of that name is."""
        return f"{self.path}:{name}"

    def fingerprint(self) -> str:
        """Return a hash of all its bytes."""
        digest = hashlib.sha256()
        check_plain(self.path)
        with self.path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    def samples(self) -> Iterator[Sample]:
        """Yield one sample for each picture, and one for captions without a picture. Raise InputError for a broken
        tar."""
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
    """Pictures by path with their captions. A picture without a path has only a name and captions."""

    names: tuple[str, ...]
    paths: tuple[Path | None, ...]
    captions: tuple[tuple[str, ...], ...]

    def title(self, name: str) -> str:
        """Return where the sample of that name is. Names are paths here."""
        return name

    def split(self, size: int) -> list[FileList]:
        """Split the list into parts of `size` files."""
        starts = range(0, len(self.names), size)
        parts = [slice(start, start + size) for start in starts]
        return [FileList(self.names[part], self.paths[part], self.captions[part]) for part in parts]

    def fingerprint(self) -> str:
        """Return a hash of names, captions, and sizes and times of files. Reading the files would take as long as
        hashing them."""
        digest = hashlib.sha256()
        for name, path, captions in zip(self.names, self.paths, self.captions, strict=True):
            status = path.stat() if path is not None and path.is_file() else None
            entry = [name, str(path), status and status.st_size, status and status.st_mtime_ns, captions]
            digest.update(json.dumps(entry).encode())
        return digest.hexdigest()

    def samples(self) -> Iterator[Sample]:
        """Yield one sample for each name, in order."""
        for name, path, captions in zip(self.names, self.paths, self.captions, strict=True):
            if path is None:
                yield Sample(name, None, captions)
                continue
            try:
                check_plain(path)
                if path.stat().st_size > MAX_MEMBER_BYTES:
                    yield Sample(name, None, captions, f"larger than {MAX_MEMBER_BYTES} bytes")
                else:
                    yield Sample(name, path.read_bytes(), captions)
            except InputError:
                yield Sample(name, None, captions, "not a plain file")
            except OSError as error:
                yield Sample(name, None, captions, error.strerror or str(error))


Part = Shard | FileList


@dataclass(frozen=True)
class HashedPart:
    """What is compared of a part."""

    names: np.ndarray
    """[n] text."""
    sha256: UInt8[np.ndarray, "n 32"]
    """Hash of the picture's file; zeros if there is no file."""
    picture_samples: Int[np.ndarray, " p"]
    """The sample of each picture that could be decoded."""
    phashes: UInt8[np.ndarray, "p 32"]
    thumbnails: UInt8[np.ndarray, "p 32 32 3"]
    caption_samples: Int[np.ndarray, " m"]
    """The sample that each caption belongs to."""
    caption_lengths: Int[np.ndarray, " m"]
    """Length of the normalised caption in characters."""
    caption_digests: UInt8[np.ndarray, "m 16"]
    """Hash of the normalised caption."""
    sentence_digests: UInt8[np.ndarray, "m 16"]
    """Hash of its normalised first sentence."""
    problems: np.ndarray
    """[k] text: what could not be read."""


def normalized(caption: str) -> str:
    """Return the caption's words in lower case, one space apart. Punctuation, spaces and case do not count."""
    return " ".join(re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", caption).casefold()))


def hash_parts(
    parts: Iterable[Part], cache: Path | None = None, num_workers: int = 0
) -> Iterator[tuple[Part, HashedPart]]:
    """Yield each part with its hashes, in order. At most two parts per worker are in progress, so memory stays bounded.

    `cache` is the folder for the hashes; `num_workers` 0 hashes in this process. Raise InputError for a broken shard or
    a folder that cannot be written.
    """
    if cache is not None:
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the folder {cache} ({error.strerror})") from None
        remove_leftovers(cache, is_shared=True)
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
        raise InputError("a worker process was killed, most likely for lack of memory: lower --num-workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def join_parts(parts: Sequence[HashedPart]) -> HashedPart:
    """Join the parts into one, in order."""
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
    """Return the distinct captions of a sample's .txt and .json members, and what is wrong with an unreadable one."""
    captions: list[str] = []
    problem = None
    for suffix, content in members.items():
        try:
            if suffix == ".txt":
                captions.append(whole_characters(content.decode("utf-8-sig", HALVES)))
            elif suffix.endswith(".json"):
                captions += _json_captions(json.loads(content))
        except (ValueError, RecursionError):
            problem = f"its {suffix} is not {'UTF-8 text' if suffix == '.txt' else 'valid JSON'}"
    return tuple(dict.fromkeys(captions)), problem


def _json_captions(content: Any) -> list[str]:
    found = [content.get(key) for key in CAPTION_KEYS] if isinstance(content, dict) else []
    texts = [text for value in found for text in (value if isinstance(value, list) else [value])]
    return [whole_characters(text) for text in texts if isinstance(text, str)]


def _save(path: Path, hashed: HashedPart) -> None:
    """Save atomically, so that a killed audit leaves the complete file or none."""
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **{field.name: getattr(hashed, field.name) for field in fields(HashedPart)})


def _load(path: Path) -> HashedPart | None:
    """Return the stored hashes, or None if there are none or they are damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return HashedPart(**{field.name: file[field.name] for field in fields(HashedPart)})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends the workers
