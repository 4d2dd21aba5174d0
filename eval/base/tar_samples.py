"""Samples of webdataset tars from untrusted sources: plain files only, read within bounds, never extracted.

A sample is a run of neighbouring members whose paths agree up to the first dot of the file name: `KEY.jpg`, `KEY.json`.
Tars joined end to end are read as one.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from webdataset.tariterators import base_plus_ext

from eval.base.images import IMAGE_SUFFIXES
from eval.base.plain_files import check_plain
from eval.base.tar_headers import BoundedTar
from longclip_teacher.errors import InputError

__all__ = ["TarMember", "TarSample", "streamed_tar_samples", "tar_samples"]

_SAME_KIND = {"jpeg": "jpg", "tif": "tiff"}
# The first bytes of what is served or copied in place of a tar
_FOREIGN = {
    b"\x1f\x8b": "compressed (gzip): decompress it with gunzip",
    b"\xfd7zXZ\0": "compressed (xz): decompress it with unxz",
    b"\x28\xb5\x2f\xfd": "compressed (zstd): decompress it with unzstd",
    b"BZh": "compressed (bzip2): decompress it with bunzip2",
    b"\x04\x22\x4d\x18": "compressed (lz4): decompress it with unlz4",
    b"PK\x03\x04": "a zip archive: unpack it and make a tar of its files",
    b"version https://git-lfs": "a Git LFS pointer: fetch the file itself with git lfs pull",
    b"<": "a web page: fetch the file itself",
}
_MAX_EMPTY_READS = 100
_MAX_MEMBERS = 1000  # of one sample
_MAX_NAME_CHARACTERS = 1 << 20  # of all members of one sample
_MAX_BYTES_WITHOUT_SAMPLE = 4 << 30  # of a stream, which need not end
_MOST_SHOWN = 100  # characters of a member's name in a message
_HEAD_BYTES = max(map(len, _FOREIGN))


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

    Raise InputError naming a tar that is missing, foreign, compressed, broken, cut short or no plain file, and one
    whose names make no samples.
    """
    check_plain(path)
    head = b""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
            file.seek(0)
            with BoundedTar.open(fileobj=file, mode="r:") as tar:
                yield from _samples(tar, most_bytes)
            if file.seek(0, os.SEEK_END) % tarfile.BLOCKSIZE:
                raise tarfile.ReadError("its last block is cut short")
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (tarfile.TarError, ValueError, OverflowError, OSError) as error:
        if foreign := _foreign(head):
            raise InputError(f"{path} is {foreign}") from None
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error.args[0])
        raise InputError(f"{path} is not a complete tar file ({reason}): make or fetch it again") from None


def streamed_tar_samples(file: Any, most_bytes: Callable[[str], int]) -> Iterator[TarSample]:
    """Yield the samples of a tar from a network in one pass. `file` needs only `read`; `most_bytes` is as above.

    Raise tarfile.TarError or ValueError for what `tar_samples` refuses, and whatever `file` raises.
    """
    stream = _Stream(file)
    try:
        with BoundedTar.open(fileobj=stream, mode="r|") as tar:  # type: ignore[call-overload]  # only its `read` is used
            for sample in _samples(tar, most_bytes):
                yield sample
                stream.num_bytes = 0
    except tarfile.TarError:
        if foreign := _foreign(stream.head):
            raise InputError(f"it is {foreign}") from None
        raise


def _foreign(head: bytes) -> str | None:
    return next((name for magic, name in _FOREIGN.items() if head.startswith(magic)), None)


def _samples(tar: BoundedTar, most_bytes: Callable[[str], int]) -> Iterator[TarSample]:
    number, plain, dotted = 0, False, ""
    for number, (key, members) in enumerate(_grouped(tar, most_bytes), start=1):  # noqa: B007 -- used below
        plain = plain or any(_is_picture_suffix(suffix) for suffix in members)
        dotted = dotted or next((f"{key}.{suffix}" for suffix in members if _is_dotted_picture(suffix)), "")
        yield key, members
    if not tar.has_end_mark:  # tarfile takes a broken or missing header for the end
        raise tarfile.ReadError(f"broken or cut short after {number} samples")
    if dotted and not plain:
        raise InputError(
            f"names are split at their first dot, so {_shown(dotted)} is no picture of its own: "
            "rename it without other dots"
        )


def _grouped(tar: BoundedTar, most_bytes: Callable[[str], int]) -> Iterator[TarSample]:
    """Yield runs of members with one key. Raise InputError for two members of one kind, and where dots in the names
    make one sample of many."""
    key, members, names = "", dict[str, TarMember](), dict[str, str]()
    for name, found, member in _members(tar, most_bytes):
        if found != key and members:
            _check_dots(key, members)
            yield key, members
            members, names = {}, {}
        key, suffix = found, base_plus_ext(name)[1].lower()
        kind = _SAME_KIND.get(suffix, suffix)
        if kind in names:
            raise InputError(
                f"two members of one kind in sample {_shown(key)}, {_shown(names[kind])} and {_shown(name)}: "
                "leave one of them out"
            )
        members[suffix], names[kind] = member, name
        if len(names) > _MAX_MEMBERS or sum(map(len, names.values())) > _MAX_NAME_CHARACTERS:
            raise tarfile.ReadError(f"more than {_MAX_MEMBERS} members or 1 MiB of names in sample {_shown(key)}")
    if members and tar.has_end_mark:  # the sample before a cut may lack members
        _check_dots(key, members)
        yield key, members


def _check_dots(key: str, members: dict[str, TarMember]) -> None:
    dotted = [suffix for suffix in members if _is_dotted_picture(suffix)]
    if len(dotted) > 1 and not any(_is_picture_suffix(suffix) for suffix in members):
        raise InputError(
            f"names are split at their first dot, so {_shown(f'{key}.{dotted[0]}')} and "
            f"{_shown(f'{key}.{dotted[1]}')} are one sample, {_shown(key)}: rename them without other dots"
        )


def _is_picture_suffix(suffix: str) -> bool:
    return f".{suffix}" in IMAGE_SUFFIXES


def _is_dotted_picture(suffix: str) -> bool:
    return "." in suffix and _is_picture_suffix(suffix.rpartition(".")[2])


def _members(tar: BoundedTar, most_bytes: Callable[[str], int]) -> Iterator[tuple[str, str, TarMember]]:
    """Yield the name, the key and the place of each member that belongs to a sample. Links, folders, devices and hidden
    files (macOS leaves `._1.jpg`) belong to none."""
    for member in tar:
        tar.members = []  # type: ignore[attr-defined]  # a stream of millions must not be remembered
        tar.pax_headers = {}  # nor what a hostile one adds to the headers of all members
        key, suffix = base_plus_ext(member.name)
        if not member.isreg() or suffix is None or member.name.rpartition("/")[2].startswith("."):
            continue
        if member.size < 0:
            raise tarfile.ReadError(f"member {_shown(member.name)} has a negative size")
        file = tar.extractfile(member) if member.size <= most_bytes(suffix.lower()) else None
        yield member.name, key, TarMember(member.offset_data, member.size, None if file is None else file.read())


def _shown(name: str) -> str:
    """Return a member's name for a message of one line."""
    short = name if len(name) <= _MOST_SHOWN else f"...{name[-_MOST_SHOWN:]}"
    return "".join(character if character.isprintable() else "?" for character in short)


class _Stream:
    """A stream of which only `read` is used. It remembers its first bytes, and does not let tarfile skip for hours the
    content that a false header promises."""

    def __init__(self, file: Any) -> None:
        self._file, self.head, self._num_empty = file, b"", 0
        self.num_bytes = 0
        """Bytes read since the last sample."""

    def read(self, size: int) -> bytes:
        data: bytes = self._file.read(size)
        self._num_empty += not data
        if self._num_empty > _MAX_EMPTY_READS:
            raise tarfile.ReadError("unexpected end of data")
        self.num_bytes += len(data)
        if self.num_bytes > _MAX_BYTES_WITHOUT_SAMPLE:
            raise tarfile.ReadError(f"no sample in {_MAX_BYTES_WITHOUT_SAMPLE >> 20} MiB")
        if len(self.head) < _HEAD_BYTES:
            self.head += data[: _HEAD_BYTES - len(self.head)]
        return data
