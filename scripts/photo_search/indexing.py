"""Bring an index up to date with its folder: only what is new or changed is read, batch by batch.

While one batch is encoded, the next one is read and decoded in threads. A batch is one transaction.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from photo_search.errors import InputError, shown
from photo_search.folders import find_pictures
from photo_search.images import check_readable
from photo_search.index import Index, Picture, Source, Stamp
from photo_search.model import BATCH, Model, file_sha256, num_cores

__all__ = ["Update", "update"]

Progress = Callable[[int, int], None]
"""Told the number of files that were read, and of all that must be."""


@dataclass
class Update:
    """What was done, in numbers of files."""

    pictures: int = 0
    """In the index now, with a feature."""
    embedded: int = 0
    known: int = 0
    """New names of contents that had a feature: renamed, moved or copied files."""
    unchanged: int = 0
    removed: int = 0
    problems: dict[str, str] = field(default_factory=dict)
    """Why pictures could not be read, by name."""
    passed_over: list[str] = field(default_factory=list)
    """Links that lead out of the folder, or to a folder that is read already."""


@dataclass(frozen=True)
class _Read:
    picture: Picture | None
    """None if there was no reading its bytes, which is tried again the next time."""
    pixels: np.ndarray | None = None
    problem: str | None = None


def update(index: Index, folder: Path, model: Model, progress: Progress) -> Update:
    """Make `index` that of the pictures below `folder`. Raises InputError for a folder without pictures, and for an
    index of other pictures, before anything is changed."""
    found = find_pictures(folder)
    names = sorted(found.files + found.missing)
    if not names:
        raise InputError(f"no pictures below {folder}")
    stamps = {name: stamp for name in names if (stamp := _stamp(folder / name))}
    _check_same_folder(index, folder, stamps)
    source = index.source
    known = index.stamps() if source and source.fingerprint == model.fingerprint else {}
    changed = [name for name in names if name not in known or known[name] != stamps.get(name)]
    done = Update(unchanged=len(names) - len(changed), passed_over=found.passed_over)
    if changed:
        model.check_files()
    index.set_source(Source(folder, model.path, model.fingerprint))
    later = _add_changed(index, folder, model, changed, done, progress)
    gone = known.keys() - set(names)
    index.remove([*gone, *later])
    done.removed, done.problems = len(gone), {**index.problems(), **later}
    done.pictures = len(names) - len(done.problems)
    return done


def _add_changed(
    index: Index, folder: Path, model: Model, changed: Sequence[str], done: Update, progress: Progress
) -> dict[str, str]:
    """Read and encode files; count in `done`. Return those that must be tried again, with the reasons."""
    contents, later, num_read = index.contents(), dict[str, str](), 0
    for names, batch in _read_batches(folder, model, changed, contents):
        new = {one.picture.sha256: one.pixels for one in batch if one.picture and one.pixels is not None}
        new = {sha256: pixels for sha256, pixels in new.items() if sha256 not in contents}
        vectors = dict(zip(new, model.encode_images(list(new.values())), strict=True)) if new else {}
        index.add([one.picture for one in batch if one.picture], vectors)
        contents |= vectors.keys()
        later |= {name: one.problem for name, one in zip(names, batch, strict=True) if one.problem}
        done.embedded += len(vectors)
        done.known += sum(one.picture is not None and one.picture.problem is None for one in batch) - len(vectors)
        num_read += len(batch)
        progress(num_read, len(changed))
    return later


def _read_batches(
    folder: Path, model: Model, names: Sequence[str], contents: set[bytes]
) -> Iterator[tuple[Sequence[str], list[_Read]]]:
    """Batches in order, one ahead of the caller."""
    ahead: deque[tuple[Sequence[str], list[Future[_Read]]]] = deque()
    pool = ThreadPoolExecutor(num_cores())
    try:
        for start in range(0, len(names), BATCH):
            batch = names[start : start + BATCH]
            ahead.append((batch, [pool.submit(_read, folder, name, model, contents) for name in batch]))
            if len(ahead) > 1:
                ready, reads = ahead.popleft()
                yield ready, [read.result() for read in reads]
        for ready, reads in ahead:
            yield ready, [read.result() for read in reads]
    finally:
        pool.shutdown(cancel_futures=True)


def _read(folder: Path, name: str, model: Model, contents: set[bytes]) -> _Read:
    path = folder / name
    try:
        check_readable(path)
        if not path.is_file():
            raise InputError("not a file")
        stamp, sha256 = _stamp(path), file_sha256(path)
        if stamp is None:
            raise InputError("it went while it was read")
        pixels, problem = None, None
        if sha256 not in contents:
            pixels, problem = _decode(path, model)
        if _stamp(path) != stamp:
            raise InputError("it changed while it was read")
        return _Read(Picture(name, stamp, sha256, problem), pixels)
    except InputError as error:
        return _Read(None, problem=str(error).removeprefix(f"{path}: "))
    except OSError as error:
        return _Read(None, problem=error.strerror or str(error))


def _decode(path: Path, model: Model) -> tuple[np.ndarray | None, str | None]:
    """The pixels of a picture, or why there are none."""
    try:
        return model.pixels(path), None
    except InputError as error:
        return None, shown(str(error).removeprefix(f"{path}: "))


def _check_same_folder(index: Index, folder: Path, stamps: dict[str, Stamp]) -> None:
    """Refuse an index of another folder, unless that folder was moved here."""
    source = index.source
    if source is None or source.folder == folder:
        return
    known = index.stamps()
    if source.folder.exists() or not any(known.get(name) == stamp for name, stamp in stamps.items()):
        raise InputError(
            f"{index.path} is the index of {source.folder}: choose another place for that of {folder} (--index; for "
            "embed --out)"
        )


def _stamp(path: Path) -> Stamp | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return Stamp(found.st_size, found.st_mtime_ns)
