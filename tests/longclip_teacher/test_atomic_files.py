"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from longclip_teacher.atomic_files import (
    atomic_file,
    atomic_folder,
    write_json,
    write_text,
    written_into,
)
from longclip_teacher.errors import InputError
from longclip_teacher.temporaries import remove_leftovers


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    write_text(path, "old é")
    with atomic_file(path) as temporary:
        assert temporary.name == path.name and temporary.parent.parent == path.parent
        temporary.write_text("ne")
        assert path.read_text(encoding="utf-8") == "old é"
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(error), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_do_not_share_a_file_and_the_last_wins(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with atomic_file(path) as first:
        first.write_text("first")
        with atomic_file(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"


@pytest.mark.skipif(os.name == "nt", reason="no umask")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_permissions_are_those_of_any_new_file(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_text(tmp_path / "a.txt", "a")
        with atomic_file(tmp_path / "a.safetensors") as temporary:
            save_file({"a": torch.zeros(2)}, temporary)
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == mode
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == mode


def test_contents_are_on_the_disk_before_the_name_where_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: calls.append("fsync") or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("replace") or replace(*paths))
    with atomic_file(tmp_path / "a", sync=True) as temporary:
        temporary.write_text("a")
    assert calls == ["fsync", "replace"]
    write_text(tmp_path / "b", "b")
    assert calls == ["fsync", "replace", "replace"]


KILLED = """
import os, sys
from pathlib import Path
from longclip_teacher.atomic_files import atomic_file, atomic_folder
folder = Path(sys.argv[1])
with atomic_file(folder / "a.tar"), atomic_file(folder / "b.tar"), atomic_folder(folder / "val") as new:
    (new / "1.jpg").touch()
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_leftovers_of_dead_writers_alone_are_removed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    own = [tmp_path / ".a.tar.notes.part", tmp_path / ".a.tar.0123456789abcdef.part"]
    own[0].mkdir()
    own[1].touch()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == "writing\n"
        remove_leftovers(tmp_path)
        assert len(list(tmp_path.glob(".*.part"))) == 5, "their writer lives"
        writer.kill()
    remove_leftovers(tmp_path, "a.tar")
    assert sorted(path.name.split(".")[1] for path in tmp_path.iterdir()) == ["a", "a", "b", "val"]
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(own)


def test_without_locks_leftovers_are_removed_by_the_one_writer_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longclip_teacher.temporaries.try_lock", lambda descriptor: None)
    (tmp_path / ".a.0123456789abcdef.part").mkdir()
    remove_leftovers(tmp_path, is_shared=True)
    assert len(list(tmp_path.iterdir())) == 1
    remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_new_file_that_is_taken_for_a_leftover_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process removes leftovers between the making of the file and its lock."""
    made: list[Path] = []

    def opened(path: str | Path, *options: int, **more: int) -> int:
        is_leftover = isinstance(path, Path) and path.suffix == ".part"
        made.extend([path] if is_leftover else [])
        if is_leftover and len(made) == 1:
            path.rmdir()
        descriptor = real(path, *options, **more)
        if is_leftover and len(made) == 2:
            path.rmdir()
        return descriptor

    real = os.open
    monkeypatch.setattr(os, "open", opened)
    write_text(tmp_path / "a", "a")
    assert len(set(made)) == 3 and (tmp_path / "a").read_text() == "a"


def test_a_folder_appears_once_it_is_filled(tmp_path: Path) -> None:
    path = tmp_path / "new" / "val"
    with atomic_folder(path) as temporary:
        (temporary / "1.jpg").touch()
        assert not path.exists()
    assert [found.name for found in path.iterdir()] == ["1.jpg"]
    with pytest.raises(InputError, match=rf"\Acannot write {path} \(Directory not empty\)\Z"), atomic_folder(path):
        pass
    with pytest.raises(KeyError), atomic_folder(tmp_path / "other") as temporary:
        (temporary / "1.jpg").touch()
        raise KeyError
    assert [found.name for found in tmp_path.iterdir()] == ["new"]
    assert [found.name for found in path.parent.iterdir()] == ["val"]


LIMITED = """
import resource, sys
from pathlib import Path
from longclip_teacher.atomic_files import atomic_file
from longclip_teacher.errors import run_command
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
def main():
    with atomic_file(Path(sys.argv[1])) as temporary:
        temporary.write_bytes(bytes(2000))
run_command(main)
"""


def test_a_limit_of_file_sizes_is_one_line_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    done = subprocess.run([sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, f"error: cannot write {path} (File too large)\n")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_errors_of_the_disk_are_one_line_and_others_pass(tmp_path: Path) -> None:
    path = tmp_path / "a"

    def fail(number: int, *named: object) -> None:
        raise OSError(number, os.strerror(number), *named)

    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        with pytest.raises(InputError, match=rf"\Acannot write {path} \({os.strerror(number)}\)\Z"), atomic_file(path):
            fail(number)
    with pytest.raises(InputError, match=rf"\Acannot write {path} \(Permission denied\)\Z"), written_into(path):
        fail(errno.EACCES, str(path / "b"))
    with pytest.raises(PermissionError), atomic_file(path):
        fail(errno.EACCES, str(tmp_path / "picture that is read"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("full", [("stdout",), ("stdout", "stderr")])
@pytest.mark.parametrize("size", [10, 100_000])
def test_output_to_a_full_disk_is_one_line(full: tuple[str, ...], size: int) -> None:
    program = "from longclip_teacher.errors import run_command\nrun_command(lambda: print('a' * SIZE))"
    command = [sys.executable, "-c", program.replace("SIZE", str(size))]
    with Path("/dev/full").open("w") as disk:
        pipes = {"stderr": subprocess.PIPE, **dict.fromkeys(full, disk)}
        environment = {**os.environ, "PYTHONUNBUFFERED": ""}  # a short output is then written at the end
        done = subprocess.run(command, text=True, env=environment, **pipes)  # type: ignore[call-overload]
    assert done.returncode == 2
    assert done.stderr in (None, "error: cannot write the output (No space left on device)\n")


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "a.txt", tmp_path / "folder"):
        with pytest.raises(InputError, match=rf"\Acannot write {path} \([^\n]+\)\Z"):
            write_json(path, {"a": 1})
    assert list((tmp_path / "folder").iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_json_is_strict(tmp_path: Path) -> None:
    content = {"a": float("nan"), "b": [1.5, float("inf"), (-float("inf"), True, None, "NaN")], "c": {"d": 2}}
    write_json(tmp_path / "x.json", content)
    found = json.loads((tmp_path / "x.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert found == {"a": None, "b": [1.5, None, [None, True, None, "NaN"]], "c": {"d": 2}}
