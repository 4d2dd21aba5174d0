"""Keep the last two generations of a file, and verify each by its sha256.

torch's reader accepts flipped bytes silently, and a flipped digit in a configuration is another configuration. A file
is therefore hashed when it is written, and again before it is read. sha256.json beside the files holds the known hashes
of each name, and its own. It gets a new hash before the new file gets its name, and the old file keeps a second name. A
crash at any moment therefore leaves a file that can be verified.

Weight files are not in the record: they hold a checksum of their own (longclip_teacher/weights_file.py).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

from longclip_teacher.atomic_files import atomic_file, keep_previous, previous_generation, write_json
from longclip_teacher.errors import InputError, warn_once
from longclip_teacher.weights_file import file_sha256

__all__ = ["verified_file", "verified_text", "write_generation", "write_text_generation"]

logger = logging.getLogger(__name__)
_HASHES = "sha256.json"


def write_generation(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new file, which becomes `path`. The file that was there becomes its `previous_generation`.

    Only for the one process that writes this folder. Raises InputError where it cannot be written.
    """
    with atomic_file(path, sync=True) as temporary:
        try:
            write(temporary)
        except (OSError, RuntimeError) as error:  # torch's writer hides what the disk says
            cause = getattr(error, "strerror", None) or "is the disk full, or the size of files limited?"
            raise InputError(f"cannot write {path} ({cause}): the file before it is as it was") from None
        known = _known(path.parent)
        hashes = {**known, path.name: [*known.get(path.name, [])[-1:], file_sha256(temporary)]}
        write_json(path.parent / _HASHES, {**hashes, _HASHES: _hash_of(hashes)})
        keep_previous(path)


def write_text_generation(path: Path, text: str) -> None:
    """The same for text, written as `write_text` does."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")

    write_generation(path, write)


def verified_file(path: Path) -> Path:
    """Return `path` if its bytes are those that were written. Otherwise warn, and return its previous generation.

    A file whose hash was never recorded is returned as it is. Raises InputError if both generations are damaged.
    """
    hashes = _known(path.parent).get(path.name)
    if not hashes or file_sha256(path) in hashes:
        return path
    previous = previous_generation(path)
    if previous.is_file() and file_sha256(previous) in hashes:
        warn_once(logger, f"{path} is damaged (its sha256 is not the one written): going on from {previous}")
        return previous
    hint = "take another checkpoint with --run.resume FILE, or start anew" if path.suffix == ".pt" else "run it again"
    raise InputError(
        f"{path} is damaged (its sha256 is not the one written), and so is, or missing is, {previous.name}: {hint}"
    )


def verified_text(path: Path) -> str:
    """The text of a `verified_file`. Raises OSError, and UnicodeDecodeError for a file that was never recorded."""
    return verified_file(path).read_text(encoding="utf-8")


def _known(folder: Path) -> dict[str, list[str]]:
    """The recorded hashes by file name; none, after a warning, if the record is not as it was written."""
    path = folder / _HASHES
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        own = found.pop(_HASHES)
        hashes = {str(name): [str(value) for value in values] for name, values in found.items()}
    except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError):
        own, hashes = None, {}
    if own is None or own != _hash_of(hashes):
        warn_once(logger, f"{path} is damaged: the files beside it are read without being verified")
        return {}
    return hashes


def _hash_of(hashes: dict[str, list[str]]) -> str:
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
