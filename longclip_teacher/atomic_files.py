"""Files written atomically: readers see the old file or the whole new one, also where the writer is killed."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longclip_teacher.errors import InputError

__all__ = ["atomic_file", "remove_leftovers", "without_nan", "write_json", "write_text"]

_NUM_BYTES = 8
_RANDOM = "[0-9a-f]" * 2 * _NUM_BYTES  # the part of a temporary name that differs


@contextmanager
def atomic_file(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """An empty file to write into, which takes the name `path` when the block ends; after an error it is removed.

    It lies in `path`'s folder, which is made if need be, under a name of its own: of several writers the last one
    wins. Its permissions are those of any new file (the umask's). With `sync` the contents are on the disk before the
    name is, so that not even a power cut leaves the name without them.

    Raises InputError where the folder cannot be written. Errors of the block pass.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(_NUM_BYTES)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
    except OSError as error:
        raise _cannot_write(path, error) from None
    try:
        yield temporary
        if sync:
            with temporary.open("r+b") as file:
                os.fsync(file.fileno())
        try:
            os.replace(temporary, path)
        except OSError as error:
            raise _cannot_write(path, error) from None
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, names: str) -> None:
    """Remove what killed writers left of the files in `folder` whose names match the glob pattern `names`.

    Only for a process that knows itself to be the one writer of these files.
    """
    for leftover in folder.glob(f".{names}.{_RANDOM}.part"):
        leftover.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 and make the folder if need be. Raises InputError if the place cannot be written.

    What UTF-8 cannot hold, as in file names of other encodings, becomes an escape (\\udce9), which JSON reads back.
    """
    with atomic_file(path) as temporary:
        try:
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise _cannot_write(path, error) from None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as indented JSON, NaN and infinities as null. Raises InputError as `write_text`."""
    write_text(path, json.dumps(without_nan(content), indent=2, allow_nan=False) + "\n")


def without_nan(content: Any) -> Any:
    """The same values for JSON, which knows no NaN and no infinity: they become None."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: without_nan(value) for key, value in content.items()}
    return [without_nan(value) for value in content] if isinstance(content, (list, tuple)) else content


def _cannot_write(path: Path, error: OSError) -> InputError:
    return InputError(f"cannot write {path} ({error.strerror})")
