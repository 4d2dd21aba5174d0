"""Keep the last two generations of a file, and verify each by its sha256.

torch's reader accepts flipped bytes silently. A checkpoint is therefore hashed when it is written, and again before it
is read. sha256.json beside the files holds the known hashes of each name. It gets a new hash before the new file gets
its name, and the old file keeps a second name. A crash at any moment therefore leaves a file that can be verified.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from glob import escape
from pathlib import Path

from longclip_teacher.atomic_files import atomic_file, remove_leftovers, write_json
from longclip_teacher.errors import InputError
from longclip_teacher.weights_file import file_sha256

__all__ = ["previous_generation", "verified_file", "write_generation"]

logger = logging.getLogger(__name__)
_HASHES = "sha256.json"


def write_generation(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new file, which becomes `path`. The file that was there becomes its `previous_generation`.

    Only for the one process that writes this folder. Raises InputError where it cannot be written.
    """
    remove_leftovers(path.parent, escape(path.name))
    previous = previous_generation(path)
    with atomic_file(path, sync=True) as temporary:
        try:
            write(temporary)
        except (OSError, RuntimeError) as error:  # torch's writer hides what the disk says
            cause = getattr(error, "strerror", None) or "is the disk full, or the size of files limited?"
            raise InputError(f"cannot write {path} ({cause}): the file before it is as it was") from None
        known = _known(path.parent)
        hashes = [*known.get(path.name, [])[-1:], file_sha256(temporary)]
        write_json(path.parent / _HASHES, {**known, path.name: hashes})
        if path.exists():
            with atomic_file(previous) as second:
                second.unlink()
                _link(path, second)


def verified_file(path: Path) -> Path:
    """Return `path` if its bytes are those that were written. Otherwise warn, and return its previous generation.

    A file whose hash was never recorded is returned as it is. Raises InputError if both generations are damaged.
    """
    hashes = _known(path.parent).get(path.name)
    if not hashes or file_sha256(path) in hashes:
        return path
    previous = previous_generation(path)
    if previous.is_file() and file_sha256(previous) in hashes:
        logger.warning("%s is damaged (its sha256 is not the one written): going on from %s", path, previous)
        return previous
    raise InputError(
        f"{path} is damaged (its sha256 is not the one written), and so is, or missing is, {previous.name}: "
        "take another checkpoint of this run with --run.resume FILE, or start anew"
    )


def previous_generation(path: Path) -> Path:
    """The name of the file before `path`."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def _known(folder: Path) -> dict[str, list[str]]:
    """The recorded hashes by file name; none if the record cannot be read."""
    try:
        found = json.loads((folder / _HASHES).read_text(encoding="utf-8"))
        return {str(name): [str(value) for value in values] for name, values in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _link(source: Path, target: Path) -> None:
    """A second name for the same file, or a copy on file systems that have no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
