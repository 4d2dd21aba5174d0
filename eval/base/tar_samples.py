"""Samples of webdataset tars from untrusted sources: plain files only, read within bounds, never extracted.

A sample is a run of neighbouring members whose paths agree up to the first dot of the file name: `KEY.jpg`, `KEY.json`.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

from webdataset.tariterators import base_plus_ext, group_by_keys

from longclip_teacher.errors import InputError

__all__ = ["TarMember", "TarSample", "streamed_tar_samples", "tar_samples"]

_END_MARK = bytes(tarfile.BLOCKSIZE)


class TarMember(NamedTuple):
    """A member of a sample: the place of its content in the tar, and the content if it was asked for."""

    offset: int
    size: int
    content: bytes | None
    """None for a member larger than its bound."""


TarSample: TypeAlias = tuple[str, dict[str, TarMember]]
"""The key, and the members by suffix: lower case, without the first dot, such as `jpg` and `syn.json`."""


def tar_samples(path: Path, most_bytes: Callable[[str], int]) -> Iterator[TarSample]:
    """Yield the samples of a local tar. `most_bytes` of a suffix is the size up to which such members are read, -1 for
    none.

    Raise InputError naming a tar that is missing, foreign, broken or cut short.
    """
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            yield from _samples(tar, most_bytes, lambda offset: _block(file, offset))
            if file.seek(0, os.SEEK_END) % tarfile.BLOCKSIZE:
                raise tarfile.ReadError("its last block is cut short")
    except (tarfile.TarError, ValueError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error.args[0])
        raise InputError(f"{path} is not a complete tar file ({reason}): make or fetch it again") from None


def streamed_tar_samples(file: Any, most_bytes: Callable[[str], int]) -> Iterator[TarSample]:
    """Yield the samples of a tar from a network in one pass. `file` needs only `read`; `most_bytes` is as above.

    Raise tarfile.TarError or ValueError for a tar that is broken or cut short, and whatever `file` raises.
    """
    stream = _Tail(file)
    with tarfile.open(fileobj=stream, mode="r|") as tar:  # type: ignore[call-overload]  # only its `read` is used
        yield from _samples(tar, most_bytes, stream.block)


def _samples(
    tar: tarfile.TarFile, most_bytes: Callable[[str], int], block: Callable[[int], bytes]
) -> Iterator[TarSample]:
    number = 0
    for number, group in enumerate(group_by_keys(_members(tar, most_bytes), suffixes=None), start=1):  # noqa: B007
        yield group["__key__"], {suffix: member for suffix, member in group.items() if isinstance(member, TarMember)}
    if block(tar.offset) != _END_MARK:  # tarfile takes a broken or missing header for the end
        raise tarfile.ReadError(f"broken or cut short after {number} samples")


def _members(tar: tarfile.TarFile, most_bytes: Callable[[str], int]) -> Iterator[dict[str, Any]]:
    for member in tar:
        tar.members = []  # type: ignore[attr-defined]  # a stream of millions must not be remembered
        suffix = _suffix(member)
        if suffix is None:
            continue
        if member.size < 0:
            raise tarfile.ReadError(f"member {member.name} has a negative size")
        file = tar.extractfile(member) if member.size <= most_bytes(suffix) else None
        found = TarMember(member.offset_data, member.size, None if file is None else file.read())
        yield {"fname": member.name, "data": found, "__url__": ""}


def _suffix(member: tarfile.TarInfo) -> str | None:
    """Return None for what cannot belong to a sample: links, folders, devices, hidden files (macOS leaves
    `._1.jpg`)."""
    hidden = member.name.rpartition("/")[2].startswith(".")
    if not member.isreg() or member.issparse() or hidden:
        return None
    suffix = base_plus_ext(member.name)[1]
    return None if suffix is None else suffix.lower()


def _block(file: BinaryIO, offset: int) -> bytes:
    file.seek(offset)
    return file.read(tarfile.BLOCKSIZE)


class _Tail:
    """A stream that remembers its last bytes, because tarfile reads one record ahead of the header it looks at."""

    def __init__(self, file: Any) -> None:
        self._file, self._position, self._tail = file, 0, b""

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._position += len(data)
        self._tail = (self._tail + data)[-2 * tarfile.RECORDSIZE :]
        return data

    def block(self, offset: int) -> bytes:
        """Return the block at an offset among the last two records."""
        start = offset - (self._position - len(self._tail))
        return self._tail[max(start, 0) : start + tarfile.BLOCKSIZE] if start >= 0 else b""
