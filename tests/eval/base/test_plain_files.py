"""Pipes in the place of pictures and captions end in one line; a reader that opened one would wait for ever."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from eval.base.plain_files import check_plain
from eval.benchmarks.annotation_files import read_text
from eval.benchmarks.checksums import verify_sha256sums
from eval.benchmarks.named_sets import set_digest
from eval.benchmarks.protocols import RetrievalSet
from eval.leaks.audit_parts import FileList, Shard, hash_part
from longclip_teacher.errors import InputError


def test_only_files_and_folders_pass(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    for path in (tmp_path, tmp_path / "file", tmp_path / "link", tmp_path / "missing"):
        check_plain(path)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to_pipe").symlink_to("pipe")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "socket"))
    for path in (tmp_path / "pipe", tmp_path / "to_pipe", tmp_path / "socket", Path("/dev/zero")):
        with pytest.raises(InputError, match=f"{path.name}: not a plain file"):
            check_plain(path)
    server.close()


def pipe(folder: Path, name: str) -> Path:
    """A pipe that nobody writes to."""
    os.mkfifo(folder / name)
    return folder / name


@pytest.mark.parametrize(
    "read",
    [
        read_text,
        lambda path: set_digest(RetrievalSet("x", [path], ["a"], [0], "")),
        lambda path: Shard(path).fingerprint(),
        lambda path: hash_part(Shard(path)),
    ],
)
def test_no_reader_opens_a_pipe(read: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"x\.tar: not a plain file"):
        read(pipe(tmp_path, "x.tar"))


def test_an_audit_names_a_pipe_and_goes_on(tmp_path: Path) -> None:
    part = hash_part(FileList(("a.jpg",), (pipe(tmp_path, "a.jpg"),), (("caption",),)))
    assert part.problems.tolist() == ["a.jpg: not a plain file"] and len(part.caption_lengths) == 1


def test_checksums_of_a_pipe_are_not_waited_for(tmp_path: Path) -> None:
    pipe(tmp_path, "1.jpg")
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  1.jpg\n")
    with pytest.raises(InputError, match="not a plain file"):
        verify_sha256sums(tmp_path)
