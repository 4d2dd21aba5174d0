"""Tar headers from untrusted sources: names and attributes of bounded size, no sparse files, joined tars."""

from __future__ import annotations

import tarfile
from typing import Any, NoReturn

__all__ = ["MAX_EXTENDED_BYTES", "BoundedTar"]

MAX_EXTENDED_BYTES = 64 << 10
"""Bytes of pax and GNU long-name data before one member. tarfile holds all of it in memory."""
_MAX_EXTENDED_HEADERS = 16  # before one member; tarfile reads each by a call within the last
_EXTENDED = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
_ZEROS = bytes(tarfile.BLOCKSIZE)


class _Header(tarfile.TarInfo):
    """A header within bounds. tarfile documents `_proc_member` as the place to change how headers are read."""

    @classmethod
    def fromtarfile(cls, tar: Any) -> Any:
        """Read the next header. Skip an end mark that another tar follows."""
        block = tar.fileobj.read(tarfile.BLOCKSIZE)
        if block == _ZEROS and not tar.extended_sizes:
            while block == _ZEROS:
                block = tar.fileobj.read(tarfile.BLOCKSIZE)
            if not block.strip(b"\0"):
                tar.has_end_mark = True
                raise tarfile.EOFHeaderError("end of file header")  # type: ignore[attr-defined]
        header = cls.frombuf(block, tar.encoding, tar.errors)
        header.offset = tar.fileobj.tell() - tarfile.BLOCKSIZE
        return header._proc_member(tar)

    def _proc_member(self, tar: Any) -> Any:
        if self.type in _EXTENDED:
            tar.extended_sizes = [*tar.extended_sizes, self.size]
            too_many = len(tar.extended_sizes) > _MAX_EXTENDED_HEADERS
            if self.size < 0 or sum(tar.extended_sizes) > MAX_EXTENDED_BYTES or too_many:
                raise tarfile.ReadError(f"more than {MAX_EXTENDED_BYTES >> 10} KiB of names and attributes of a member")
        else:
            tar.extended_sizes = []
        return super()._proc_member(tar)  # type: ignore[misc]

    def _refuse_sparse(self, *_: Any) -> NoReturn:
        raise tarfile.ReadError("a sparse file: make the tar without --sparse")

    # GNU's four ways to write sparse files, whose maps of holes have no bound
    _proc_sparse = _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_sparse


class BoundedTar(tarfile.TarFile):
    """A tar opened for reading whose headers take bounded memory. Raise tarfile.ReadError for headers out of bounds."""

    tarinfo = _Header
    has_end_mark = False
    """Whether all members were read, up to an end mark and the end of the file."""
    extended_sizes: list[int] = []  # noqa: RUF012 -- replaced, never changed
    """Sizes of the extended headers read since the last member."""
