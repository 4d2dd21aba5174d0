"""Tars from untrusted sources: what belongs to a sample, how much of it is read, and which tars are incomplete."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tarfile
from pathlib import Path

import pytest

from eval.base.tar_samples import TarSample, streamed_tar_samples, tar_samples
from longclip_teacher.errors import InputError

CONTENT = {"a/1.jpg": b"picture" * 200, "a/1.syn.JSON": b"{}", "a/2.v2.jpg": b"", "b.txt": b"caption" * 9000}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    path = tmp_path / "whole.tar"
    with tarfile.open(path, "w") as archive:
        for name, content in CONTENT.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


class Dribble:
    """A network stream: `read` gives fewer bytes than requested, and nothing else is possible."""

    def __init__(self, content: bytes, most: int) -> None:
        self._file, self._most = io.BytesIO(content), most

    def read(self, size: int) -> bytes:
        return self._file.read(min(size, self._most))


def streamed(content: bytes, most: int = 10_240) -> list[TarSample]:
    return list(streamed_tar_samples(Dribble(content, most), lambda suffix: 1 << 20))


def test_members_with_a_key_in_common_are_a_sample_and_are_read_where_they_lie(whole: Path) -> None:
    content = whole.read_bytes()
    samples = list(tar_samples(whole, lambda suffix: 1 << 20))
    assert [(key, list(members)) for key, members in samples] == [
        ("a/1", ["jpg", "syn.json"]),
        ("a/2", ["v2.jpg"]),
        ("b", ["txt"]),
    ]
    members = [member for _, found in samples for member in found.values()]
    assert [member.content for member in members] == list(CONTENT.values())
    assert [content[member.offset : member.offset + member.size] for member in members] == list(CONTENT.values())


@pytest.mark.parametrize("most", [1, 511, 10_240])
def test_a_stream_gives_what_the_file_gives_however_it_arrives(whole: Path, most: int) -> None:
    assert streamed(whole.read_bytes(), most) == list(tar_samples(whole, lambda suffix: 1 << 20))


def test_what_is_over_its_bound_is_not_read(whole: Path) -> None:
    bounds = {"jpg": len(CONTENT["a/1.jpg"]) - 1, "syn.json": 2}
    for samples in (
        list(tar_samples(whole, lambda suffix: bounds.get(suffix, -1))),
        list(streamed_tar_samples(Dribble(whole.read_bytes(), 999), lambda suffix: bounds.get(suffix, -1))),
    ):
        contents = [member.content for _, members in samples for member in members.values()]
        assert contents == [None, b"{}", None, None]


def test_a_tar_cut_anywhere_before_its_end_mark_is_not_whole(whole: Path, tmp_path: Path) -> None:
    content = whole.read_bytes()
    ((_, last),) = [item for _, members in tar_samples(whole, lambda _: -1) for item in members.items()][-1:]
    end = -(-(last.offset + last.size) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    path = tmp_path / "cut.tar"
    for length in (*range(0, end + 1, tarfile.BLOCKSIZE), 100, 700, end - 1, end + tarfile.BLOCKSIZE - 1):
        path.write_bytes(content[:length])
        with pytest.raises(
            InputError, match=r"\A[^\n]*cut\.tar is not a complete tar file \([^\n]+\): make or fetch it"
        ):
            list(tar_samples(path, lambda suffix: 1 << 20))
        for most in (333, 10_240):
            with pytest.raises(tarfile.ReadError):
                streamed(content[:length], most)
    path.write_bytes(content[:-1])
    with pytest.raises(InputError, match="its last block is cut short"):
        list(tar_samples(path, lambda _: -1))
    path.write_bytes(content[: end + tarfile.BLOCKSIZE])  # the mark alone, without the padding of the last record
    assert len(list(tar_samples(path, lambda _: -1))) == len(streamed(path.read_bytes())) == 3


def test_a_broken_header_is_no_end(whole: Path, tmp_path: Path) -> None:
    content = bytearray(whole.read_bytes())
    *_, last = (member for _, members in tar_samples(whole, lambda _: -1) for member in members.values())
    content[last.offset - tarfile.BLOCKSIZE : last.offset] = b"\x55" * tarfile.BLOCKSIZE
    path = tmp_path / "broken.tar"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"broken or cut short after 1 samples"):  # the second may lack members
        list(tar_samples(path, lambda _: -1))
    with pytest.raises(tarfile.ReadError, match="after 1 samples"):
        streamed(bytes(content))


def test_links_folders_hidden_and_repeated_files_belong_to_no_sample(tmp_path: Path) -> None:
    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (("d.jpg", tarfile.DIRTYPE), ("l.json", tarfile.SYMTYPE), ("h.txt", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        for name in ("._1.jpg", "no_suffix", "1.jpg"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    assert [(key, list(members)) for key, members in tar_samples(path, lambda _: 9)] == [("1", ["jpg"])]
    with tarfile.open(path, "a") as archive:
        archive.addfile(tarfile.TarInfo("1.JPG"), io.BytesIO())
    with pytest.raises(InputError, match=r"two members of one kind in sample 1, 1\.jpg and 1\.JPG: leave one"):
        list(tar_samples(path, lambda _: 9))
    with pytest.raises(InputError, match=r"gone\.tar is not a complete tar file \(No such file"):
        list(tar_samples(tmp_path / "gone.tar", lambda _: 9))


def tar_of(*names: str) -> bytes:
    """A tar of members without content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    return buffer.getvalue()


def refusals(content: bytes, path: Path) -> tuple[str, str]:
    """What is said of a tar as a file, in one line that begins with its path, and as a stream."""
    path.write_bytes(content)
    with pytest.raises(InputError) as of_file:
        list(tar_samples(path, lambda _: 9))
    with pytest.raises((tarfile.TarError, ValueError)) as of_stream:
        streamed(content)
    message = str(of_file.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message.removeprefix(str(path)), str(of_stream.value)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (gzip.compress(tar_of("1.jpg")), "compressed (gzip): decompress it with gunzip"),
        (bz2.compress(tar_of("1.jpg")), "compressed (bzip2): decompress it with bunzip2"),
        (lzma.compress(tar_of("1.jpg")), "compressed (xz): decompress it with unxz"),
        (b"\x28\xb5\x2f\xfd" + bytes(99), "compressed (zstd): decompress it with unzstd"),
        (b"PK\x03\x04" + bytes(99), "a zip archive: unpack it and make a tar of its files"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer: fetch the file itself"),
        (b"<!DOCTYPE html><html>404</html>", "a web page: fetch the file itself"),
    ],
    ids=["gzip", "bzip2", "xz", "zstd", "zip", "lfs", "html"],  # the bytes hold the time of day
)
def test_what_is_served_in_place_of_a_tar_is_named(content: bytes, cause: str, tmp_path: Path) -> None:
    of_file, of_stream = refusals(content, tmp_path / "0.tar")
    assert of_file.startswith(f" is {cause}") and of_stream.startswith(f"it is {cause}")


@pytest.mark.parametrize("names", [("1.jpg", "1.jpg"), ("1.JPG", "1.jpg"), ("1.jpeg", "1.jpg"), ("1.tif", "1.TIFF")])
def test_two_members_of_one_kind_are_named(names: tuple[str, str], tmp_path: Path) -> None:
    for message in refusals(tar_of("0.jpg", "0.txt", names[0], "1.txt", names[1]), tmp_path / "0.tar"):
        assert message.endswith(
            f"two members of one kind in sample 1, {names[0]} and {names[1]}: leave one of them out"
        )


def test_long_and_odd_names_stay_in_one_short_line(tmp_path: Path) -> None:
    for name in ("n" * 9999, "a\nb\x1b[31m"):
        for message in refusals(tar_of(f"{name}.jpg", f"{name}.JPG"), tmp_path / "0.tar"):
            assert len(message) < 500 and message.isprintable()


def test_names_with_dots_are_named(tmp_path: Path) -> None:
    for message in refusals(tar_of("x.jpg", "a/IMG.1.jpg", "a/IMG.1.txt", "a/IMG.2.jpg"), tmp_path / "0.tar"):
        assert "first dot, so a/IMG.1.jpg and a/IMG.2.jpg are one sample, a/IMG: rename them" in message
    for message in refusals(tar_of("IMG.1.jpg", "IMG.1.txt"), tmp_path / "0.tar"):
        assert "first dot, so IMG.1.jpg is no picture of its own: rename it" in message
    path = tmp_path / "parts.tar"
    path.write_bytes(tar_of("1.jpg", "1.seg.png", "1.depth.png", "2.url.txt", "2.syn.json"))
    assert [key for key, _ in tar_samples(path, lambda _: 9)] == ["1", "2"]


@pytest.mark.parametrize("most", [1, 511, 10_240])
def test_joined_tars_are_read_as_one(whole: Path, tmp_path: Path, most: int) -> None:
    first = whole.read_bytes()
    path = tmp_path / "joined.tar"
    path.write_bytes(first + bytes(512 * 200) + tar_of("z.jpg") + tar_of() + tar_of("z2.jpg"))
    samples = list(tar_samples(path, lambda _: 1 << 20))
    assert samples[:3] == list(tar_samples(whole, lambda _: 1 << 20))
    assert [key for key, _ in samples[3:]] == ["z", "z2"]
    assert streamed(path.read_bytes(), most) == samples
    for junk in (b"junk" * 200, tar_of("z.jpg")[:512]):
        assert all(
            "after 2 samples" in text or "end of data" in text or "after 3" in text
            for text in refusals(first + junk, path)
        )


def test_only_plain_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    for path in (tmp_path / "pipe.tar", Path("/dev/null")):
        with pytest.raises(InputError, match=f"{path.name}: not a plain file"):
            list(tar_samples(path, lambda _: 9))
