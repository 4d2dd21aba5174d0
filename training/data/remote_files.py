"""Whole remote files: small ones in memory, large ones on a disk, where size and sha256 must be those of a manifest.

http and https go through download.py, s3 and gs through fsspec. The storages of fsspec make failed requests again
themselves; what still fails goes on here at the byte where it stopped. The sha256 decides in any case.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec.core

from longclip_teacher.errors import InputError
from training.data.download import ChangedFile, Download, MissingFile, TriesExhausted
from training.data.http_answer import Patience, shown_url

__all__ = ["OBJECT_STORES", "RemoteFile", "fetch", "file_name", "open_object", "parsed_remote", "plain_url"]

OBJECT_STORES = ("s3:", "gs:")
_PIECE_BYTES = 8 << 20  # read at a time; one request each to an object store
_READINGS = 2  # of a file that is not the manifest's: a proxy may have answered from its own memory
_OBJECT_TRIES = 3  # without a byte between them, beside those of the storage itself
Parsed = TypeVar("Parsed")
_EXTRAS = {"s3:": "s3", "gs:": "gs"}


@dataclass(frozen=True)
class RemoteFile:
    """A file at a URL, and what its manifest says of it."""

    url: str
    num_bytes: int
    sha256: str

    def __str__(self) -> str:
        return shown_url(self.url)


def plain_url(url: str) -> str:
    """Return a URL without user, password, query and fragment: what distinguishes files, and may be recorded."""
    return url if url.startswith(OBJECT_STORES) else re.sub("//[^/]*@", "//", re.split("[?#]", url, maxsplit=1)[0])


def file_name(url: str) -> str:
    """Return the last part of a URL's path."""
    return plain_url(url).rpartition("/")[2]


def parsed_remote(
    url: str, most_bytes: int, parse: Callable[[Iterator[bytes]], Parsed], patience: Patience | None = None
) -> Parsed:
    """Return what `parse` makes of the pieces of a JSON file, which is read once more if that raises InputError.

    Raise InputError in one line naming the file; MissingFile if there is no such file.
    """
    try:
        return _parsed(url, most_bytes, parse, patience)
    except (MissingFile, TriesExhausted):
        raise
    except InputError:  # nothing says how the file should be: it may have been damaged on the way
        return _parsed(url, most_bytes, parse, patience)


def _parsed(url: str, most_bytes: int, parse: Callable[[Iterator[bytes]], Parsed], patience: Patience | None) -> Parsed:
    def bounded(pieces: Iterator[bytes]) -> Iterator[bytes]:
        num_bytes = 0
        for piece in pieces:
            num_bytes += len(piece)
            if num_bytes > most_bytes:
                raise InputError(f"{shown_url(url)} has more than {most_bytes:,} bytes: it cannot be what it is named")
            yield piece

    with closing(_pieces(url, patience, ending=b"}")) as pieces:
        return parse(bounded(pieces))


def fetch(file: RemoteFile, path: Path, patience: Patience | None = None) -> None:
    """Write a remote file over the beginning of the existing file `path`.

    Raise InputError in one line naming it if it cannot be had, or if it is not the one that its manifest describes;
    OSError if `path` cannot be written.
    """
    difference = ""
    for _ in range(_READINGS):
        try:
            difference = _difference(file, path, patience)
        except ChangedFile as error:
            difference = str(error)
        if not difference:
            return
    raise InputError(f"{file} is not the file that its manifest describes ({difference}): upload it or both again")


def _difference(file: RemoteFile, path: Path, patience: Patience | None) -> str:
    """Write a remote file. Return how it differs from its manifest's description, "" if it does not."""
    digest, num_bytes = hashlib.sha256(), 0
    with path.open("r+b") as target, closing(_pieces(file.url, patience, file.num_bytes)) as pieces:
        for piece in pieces:
            num_bytes += len(piece)
            if num_bytes > file.num_bytes:
                return f"it has more than {file.num_bytes} bytes"
            digest.update(piece)
            target.write(piece)
    if num_bytes < file.num_bytes:
        return f"{num_bytes} bytes instead of {file.num_bytes}"
    return "" if digest.hexdigest() == file.sha256 else f"sha256 {digest.hexdigest()} instead of {file.sha256}"


def _pieces(
    url: str, patience: Patience | None, num_bytes: int | None = None, ending: bytes = b""
) -> Generator[bytes, None, None]:
    """Yield a file from front to back. Raise InputError naming it, of the kind that tells why it failed."""
    try:
        if url.startswith(OBJECT_STORES):
            yield from _object_pieces(url, patience or Patience())
            return
        with closing(Download(url, ending, patience, num_bytes)) as download:
            while piece := download.read(_PIECE_BYTES):
                yield piece
    except InputError as error:
        raise type(error)(f"cannot read {shown_url(url)}: {error}") from None


def _object_pieces(url: str, patience: Patience) -> Generator[bytes, None, None]:
    position, failures = 0, 0
    while True:
        try:
            with open_object(url, patience) as file:
                file.seek(position)
                while piece := file.read(_PIECE_BYTES):
                    position, failures = position + len(piece), 0
                    yield piece
            return
        except (FileNotFoundError, PermissionError) as error:
            raise MissingFile(_first_line(error)) from None
        except ImportError:
            extra = _EXTRAS[url[:3]]
            raise InputError(f"{url[:3]}// needs the extra {extra}: pip install '.[{extra}]'") from None
        except Exception as error:  # each storage has errors of its own
            failures += 1
            if failures >= _OBJECT_TRIES:
                raise TriesExhausted(f"{_first_line(error)}, after {failures} tries") from None
            time.sleep(min(patience.longest_wait, patience.first_wait * 2**failures))


def open_object(url: str, patience: Patience) -> Any:
    """Open a file of an object store for reading from front to back."""
    options = {}
    if url.startswith("s3:"):
        options["config_kwargs"] = {"connect_timeout": patience.connect, "read_timeout": patience.read}
    storage, path = fsspec.core.url_to_fs(url, **options)
    return storage.open(path, "rb", block_size=_PIECE_BYTES, cache_type="readahead")


def _first_line(error: Exception) -> str:
    return next(iter(f"{type(error).__name__}: {error}".splitlines()))
