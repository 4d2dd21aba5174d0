"""Small hostile tars: bounded memory and time, and one line that says what is wrong."""

from __future__ import annotations

import io
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from eval.base.tar_headers import MAX_EXTENDED_BYTES
from eval.base.tar_samples import TarSample, streamed_tar_samples, tar_samples
from longclip_teacher.errors import InputError

PLAIN = tarfile.TarInfo("1.jpg").tobuf() + bytes(1024)
MOST_MEMORY = 8 << 20


def block(kind: bytes, size: int, content: bytes = b"", name: str = "x") -> bytes:
    """A header of a kind and its content, padded to blocks."""
    header = tarfile.TarInfo(name)
    header.type, header.size = kind, size
    return header.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def pax(records: dict[str, str], kind: bytes = tarfile.XHDTYPE) -> bytes:
    """A pax header."""
    lines = b""
    for key, value in records.items():
        size = len(f" {key}={value}\n")
        digits = next(total for total in range(size, size + 9) if total == size + len(str(total)))
        lines += f"{digits} {key}={value}\n".encode()
    return block(kind, len(lines), lines)


def both(content: bytes, path: Path) -> list[list[TarSample]]:
    """The samples of a tar as a file and as a stream."""
    path.write_bytes(content)
    return [
        list(tar_samples(path, lambda _: 1 << 20)),
        list(streamed_tar_samples(io.BytesIO(content), lambda _: 1 << 20)),
    ]


OUT_OF_BOUNDS = {
    "long name": block(tarfile.GNUTYPE_LONGNAME, MAX_EXTENDED_BYTES + 1, b"n" * (MAX_EXTENDED_BYTES + 1)),
    "long name of terabytes": block(tarfile.GNUTYPE_LONGNAME, 1 << 42),
    "long link of a negative size": block(tarfile.GNUTYPE_LONGLINK, -1),
    "pax of terabytes": block(tarfile.XHDTYPE, 1 << 42),
    "pax": pax({"comment": "c" * MAX_EXTENDED_BYTES}),
    "global pax": pax({"comment": "c" * MAX_EXTENDED_BYTES}, tarfile.XGLTYPE),
    "several": 3 * pax({"comment": "c" * (MAX_EXTENDED_BYTES // 2)}),
    "a thousand": 1000 * pax({"comment": "c"}),
}
SPARSE = {
    "old": block(tarfile.GNUTYPE_SPARSE, 0, name="1.jpg"),
    "0.0": pax({"GNU.sparse.size": str(3 << 30), "GNU.sparse.numblocks": "1"}),
    "0.1": pax({"GNU.sparse.map": "0,1", "GNU.sparse.size": str(3 << 30)}),
    "1.0": pax({"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(3 << 30)}),
}


@pytest.mark.parametrize(
    ("start", "cause"),
    [(start, "more than 64 KiB of names and attributes") for start in OUT_OF_BOUNDS.values()]
    + [(start, "a sparse file: make the tar without --sparse") for start in SPARSE.values()],
    ids=[*OUT_OF_BOUNDS, *SPARSE],
)
def test_headers_out_of_bounds_are_refused_in_little_memory(start: bytes, cause: str, tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(start + PLAIN)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=cause) as caught:
            list(tar_samples(path, lambda _: 1 << 20))
        with pytest.raises(tarfile.ReadError, match=cause):
            list(streamed_tar_samples(io.BytesIO(start + PLAIN), lambda _: 1 << 20))
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)


def test_ordinary_extended_headers_are_read(tmp_path: Path) -> None:
    names = ["a/" * 2000 + f"{number}.jpg" for number in range(50)]
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        members = [pax({"comment": "c"}, tarfile.XGLTYPE) + tarfile.TarInfo(name).tobuf(form) for name in names]
        for samples in both(b"".join(members) + bytes(1024), tmp_path / "0.tar"):
            assert [f"{key}.jpg" for key, _ in samples] == names


def test_global_headers_do_not_pile_up(tmp_path: Path) -> None:
    content = b"".join(
        pax({f"comment{number}": "c" * 60_000}, tarfile.XGLTYPE) + tarfile.TarInfo(f"{number}.jpg").tobuf()
        for number in range(300)
    )
    path = tmp_path / "0.tar"
    path.write_bytes(content + bytes(1024))
    del content
    tracemalloc.start()
    try:
        assert sum(1 for _ in tar_samples(path, lambda _: -1)) == 300
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", [1 << 40, 1 << 62, 1 << 80])
def test_content_that_is_not_there_is_not_waited_for(size: int, tmp_path: Path) -> None:
    content = block(tarfile.REGTYPE, size, name="1.jpg") + bytes(2048)
    with pytest.raises(InputError, match="is not a complete tar file"):
        both(content, tmp_path / "0.tar")
    with pytest.raises((tarfile.TarError, ValueError)):
        list(streamed_tar_samples(io.BytesIO(content), lambda _: 1 << 20))
