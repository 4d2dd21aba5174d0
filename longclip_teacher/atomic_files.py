"""Files written atomically: readers see the old file or the whole new one, also where the writer is killed."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from longclip_teacher.errors import DISK_ERRORS, InputError
from longclip_teacher.folder_lock import check_folder, try_lock

__all__ = [
    "atomic_file",
    "atomic_folder",
    "json_text",
    "keep_previous",
    "previous_generation",
    "remove_leftovers",
    "without_nan",
    "write_json",
    "write_text",
    "written_into",
]

_NUM_BYTES = 8
_RANDOM = "[0-9a-f]" * 2 * _NUM_BYTES  # the part of a temporary name that differs


@contextmanager
def atomic_file(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """An empty file to write into, which takes the name `path` when the block ends; after an error it is removed.

    It lies in `path`'s folder, which is made if need be, under a name of its own: of several writers the last one
    wins. Its permissions are those of any new file (the umask's). With `sync` the contents are on the disk before the
    name is, so that not even a power cut leaves the name without them.

    Raises InputError if the folder cannot be written, if the disk is full, or if this process holds the folder and it
    was deleted since. Other errors of the block pass.
    """
    with _temporary(path, lambda new: os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)) as temporary:
        yield temporary
        if sync:
            with temporary.open("r+b") as file:
                os.fsync(file.fileno())


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the name `path` when the block ends; after an error it is removed.

    There must be nothing at `path` by then, or an empty folder. Raises InputError as `atomic_file`.
    """

    def make(new: Path) -> int:
        new.mkdir()
        return os.open(new, os.O_RDONLY)

    with _temporary(path, make) as temporary:
        yield temporary


@contextmanager
def _temporary(path: Path, make: Callable[[Path], int]) -> Iterator[Path]:
    """A new file or folder, which `make` opens, beside `path`. It is locked while its writer lives."""
    check_folder(path)
    temporary, descriptor = _made(path, make)
    try:
        with written_into(path, temporary):
            yield temporary
            check_folder(path)
            os.replace(temporary, path)
    finally:
        _remove(temporary)
        os.close(descriptor)


def _made(path: Path, make: Callable[[Path], int]) -> tuple[Path, int]:
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(_NUM_BYTES)}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = make(temporary)
        except (OSError, ValueError) as error:
            raise _cannot_write(path, error) from None
        if try_lock(descriptor) is not False and os.fstat(descriptor).st_nlink:
            return temporary, descriptor
        os.close(descriptor)  # `remove_leftovers` of another process took it before it was locked


@contextmanager
def written_into(path: Path, *places: Path) -> Iterator[None]:
    """Turn what the operating system says against writing `path` into an InputError, while the block runs.

    That is a disk that is full, limited or read-only, and each error that names `path`, one of `places`, or a file
    below them. Other errors pass, since the block may read files as well.
    """
    try:
        yield
    except OSError as error:
        named = Path(os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes)) else None
        own = named is not None and any(place in (named, *named.parents) for place in (path, *places))
        if own or error.errno in DISK_ERRORS:
            raise _cannot_write(path, error) from None
        raise


def previous_generation(path: Path) -> Path:
    """The name of the file that was there before `path`."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def keep_previous(path: Path) -> None:
    """Give the file at `path`, if there is one, its second name, `previous_generation`: it is about to be replaced."""
    if not path.is_file():
        return
    with atomic_file(previous_generation(path)) as second:
        second.unlink()
        try:
            os.link(path, second)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, second)


def remove_leftovers(folder: Path, names: str = "*", *, is_shared: bool = False) -> None:
    """Remove what killed writers left of the files and folders in `folder` whose names match the glob pattern `names`.

    What a living writer has is locked, and stays. A file system without locks cannot tell: there the process must be
    the one writer of these files, as one that holds the folder is; nothing is removed if others share it.
    """
    for leftover in folder.glob(f".{names}.{_RANDOM}.part"):
        with suppress(OSError):
            descriptor = os.open(leftover, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0))
            try:
                is_left = try_lock(descriptor)
                if is_left or (is_left is None and not is_shared):
                    _remove(leftover)
            finally:
                os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove a file or a folder, as far as the disk lets us."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 and make the folder if need be. Raises InputError if the place cannot be written.

    What UTF-8 cannot hold, as in file names of other encodings, becomes an escape (\\udce9), which JSON reads back.
    """
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as indented JSON, NaN and infinities as null. Raises InputError as `write_text`."""
    write_text(path, json_text(content))


def json_text(content: dict[str, Any]) -> str:
    """Return `content` as indented JSON, NaN and infinities as null."""
    return json.dumps(without_nan(content), indent=2, allow_nan=False) + "\n"


def without_nan(content: Any) -> Any:
    """The same values for JSON, which knows no NaN and no infinity: they become None."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: without_nan(value) for key, value in content.items()}
    return [without_nan(value) for value in content] if isinstance(content, (list, tuple)) else content


def _cannot_write(path: Path, error: OSError | ValueError) -> InputError:
    return InputError(f"cannot write {path} ({getattr(error, 'strerror', None) or error})")
