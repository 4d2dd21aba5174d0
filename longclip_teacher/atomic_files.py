"""Files written atomically: readers see the old file or the whole new one, also where the writer is killed."""

from __future__ import annotations

import json
import math
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from longclip_teacher.errors import DISK_ERRORS, InputError
from longclip_teacher.folder_lock import check_folder
from longclip_teacher.temporaries import own_folder

__all__ = [
    "atomic_file",
    "atomic_folder",
    "json_text",
    "keep_previous",
    "previous_generation",
    "without_nan",
    "write_json",
    "write_text",
    "written_into",
]

Made = TypeVar("Made")


@contextmanager
def atomic_file(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """An empty file to write into, which takes the name `path` when the block ends; after an error it is removed.

    It has `path`'s name, in a folder of its own beside `path`: of several writers the last one wins. `path`'s folder is
    made if need be. The permissions are those of any new file (the umask's), also if the block puts another file in its
    place, as safetensors does. With `sync` the contents are on the disk before the name is, so that not even a power
    cut leaves the name without them.

    Raises InputError if the folder cannot be written, if the disk is full, or if this process holds the folder and it
    was deleted since. Other errors of the block pass.
    """

    def make(new: Path) -> int:
        new.touch(exist_ok=False)
        return stat.S_IMODE(new.stat().st_mode)

    with _temporary(path, make) as (temporary, mode):
        yield temporary
        if stat.S_IMODE(temporary.stat().st_mode) != mode:
            temporary.chmod(mode)
        if sync:
            with temporary.open("r+b") as file:
                os.fsync(file.fileno())


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the name `path` when the block ends; after an error it is removed.

    There must be nothing at `path` by then, or an empty folder. Raises InputError as `atomic_file`.
    """
    with _temporary(path, Path.mkdir) as (temporary, _):
        yield temporary


@contextmanager
def _temporary(path: Path, make: Callable[[Path], Made]) -> Iterator[tuple[Path, Made]]:
    """What will be `path`, and what `make` returns of it. Its own folder is locked while the writer lives, and holds
    whatever a library writes beside it."""
    check_folder(path)
    try:
        folder, descriptor = own_folder(path)
    except (OSError, ValueError) as error:
        raise _cannot_write(path, error) from None
    temporary = folder / path.name
    try:
        with written_into(path, folder):
            yield temporary, make(temporary)
            check_folder(path)
            os.replace(temporary, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


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


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 and make the folder if need be. Raises InputError if the place cannot be written.

    What UTF-8 cannot hold, as in file names of other encodings, becomes an escape (\\udce9), which JSON reads back.
    """
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, content: dict[str, Any] | list[Any]) -> None:
    """Write `content` as indented JSON, NaN and infinities as null. Raises InputError as `write_text`."""
    write_text(path, json_text(content))


def json_text(content: dict[str, Any] | list[Any]) -> str:
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
