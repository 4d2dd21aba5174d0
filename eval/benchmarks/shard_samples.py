"""Samples of a webdataset shard: members in a row of one tar that share a key, streamed and never extracted."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path, PurePosixPath

from longclip_teacher.errors import InputError

__all__ = ["MAX_MEMBER_BYTES", "shard_samples"]

MAX_MEMBER_BYTES = 1 << 26  # 64 MB


def shard_samples(shard: Path, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, {suffix: bytes}) of each sample, with the members whose suffix (".jpg", ".syn.json") is wanted.

    The key is the members' path up to the first dot of the file name, as in webdataset; suffixes are in lower case. A
    member above `MAX_MEMBER_BYTES` arrives as b"". Raises InputError for a file that is no whole tar.
    """
    try:
        _require_end(shard)
        with tarfile.open(shard, "r|") as archive:
            members = (member for member in archive if member.isfile())
            for key, group in groupby(members, key=lambda member: _split(member.name)[0]):
                content: dict[str, bytes] = {}
                for member in group:
                    suffix = _split(member.name)[1]
                    if is_wanted(suffix):
                        stream = archive.extractfile(member)
                        fits = stream is not None and member.size <= MAX_MEMBER_BYTES
                        content[suffix] = stream.read() if stream is not None and fits else b""
                yield key, content
    except (tarfile.TarError, OSError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(f"{shard} is not a whole tar file ({reason}): fetch it again") from None


def _require_end(shard: Path) -> None:
    """tarfile takes a file cut between two members, or within a header, for a whole one; a whole one ends in zeros."""
    with shard.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - tarfile.BLOCKSIZE))
        if size == 0 or size % tarfile.BLOCKSIZE or any(file.read()):
            raise tarfile.ReadError("its end is missing")


def _split(name: str) -> tuple[str, str]:
    path = PurePosixPath(name)
    stem, dot, suffix = path.name.partition(".")
    return str(path.with_name(stem)) if stem else name, (dot + suffix).lower()
