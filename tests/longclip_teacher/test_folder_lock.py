"""One process at a time holds a folder, however the one before ended."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from longclip_teacher import folder_lock as module
from longclip_teacher.atomic_files import write_text
from longclip_teacher.errors import InputError
from longclip_teacher.folder_lock import LOCK_NAME, file_claim, folder_lock, remove_claims

HEAD = """
import os, sys, time
from pathlib import Path
from longclip_teacher.folder_lock import file_claim, folder_lock
folder = Path(sys.argv[1])
"""
HOLD = "with folder_lock(folder):\n    print('held', flush=True)\n    sys.stdin.read()\n"
HOLD_WITH_CHILD = """
with folder_lock(folder):
    if os.fork() == 0:
        print('held', flush=True)
        time.sleep(60)
        os._exit(0)
    sys.stdin.read()
"""
COUNT = """
for _ in range(int(sys.argv[2])):
    with folder_lock(folder, beside=True, wait=True):
        counter = folder / 'counter'
        number = int(counter.read_text())
        time.sleep(0.001)
        counter.write_text(str(number + 1))
"""
Start = Callable[..., subprocess.Popen]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a program in a process of its own, which is killed at the end with all it has forked."""
    processes: list[subprocess.Popen] = []

    def call(program: str, *arguments: object, head: str = HEAD) -> subprocess.Popen:
        command = [sys.executable, "-c", head + program, *map(str, arguments)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, text=True, start_new_session=True, **pipes)  # type: ignore[call-overload]
        processes.append(process)
        return process

    yield call
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that has no locks."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)


def test_a_second_process_is_told_who_holds_the_folder(start: Start, tmp_path: Path) -> None:
    holder = start(HOLD, tmp_path)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    who = rf"process {holder.pid} on {socket.gethostname()}, started \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
    with pytest.raises(InputError) as error, folder_lock(tmp_path):
        pass
    message = rf"{tmp_path} is in use by {who}: wait for it to end, or choose another folder"
    assert re.fullmatch(message, str(error.value))
    holder.communicate("")  # it ends
    with folder_lock(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_killed_holder_holds_nobody_up_though_its_children_live(start: Start, tmp_path: Path) -> None:
    holder = start(HOLD_WITH_CHILD, tmp_path)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    holder.kill()
    holder.wait()
    assert (tmp_path / LOCK_NAME).exists()
    with folder_lock(tmp_path):
        pass


def test_a_lock_file_that_its_holder_removes_at_that_moment_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real, calls = tmp_path / LOCK_NAME, os.open, 0

    def opened(*arguments: object) -> int:
        nonlocal calls
        descriptor = real(*arguments)  # type: ignore[arg-type]
        calls += 1
        if calls == 1:
            path.unlink()
        return descriptor

    monkeypatch.setattr(os, "open", opened)
    with folder_lock(tmp_path):
        assert path.exists() and calls == 2


def test_a_holder_that_has_not_written_its_name_yet_is_named(tmp_path: Path) -> None:
    path = tmp_path / LOCK_NAME
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        named = threading.Timer(0.1, lambda: stale(path, pid=os.getpid()))
        named.start()
        with pytest.raises(InputError, match=f"in use by process {os.getpid()} on"), folder_lock(tmp_path):
            pass
        named.join()


def test_a_process_that_waits_says_so_and_comes_next(start: Start, tmp_path: Path) -> None:
    holder = start(HOLD, tmp_path)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    second = start(HOLD.replace("(folder)", "(folder, wait=True)"), tmp_path)
    assert second.stderr is not None and second.stdout is not None
    assert second.stderr.readline().startswith(f"waiting: {tmp_path} is in use by process {holder.pid} on ")
    holder.communicate("")
    assert second.stdout.readline() == "held\n"
    assert second.communicate("") == ("", "")


def test_a_claimed_file_is_left_to_its_writer_until_that_one_ends(start: Start, tmp_path: Path) -> None:
    claim = HOLD.replace("folder_lock(folder)", "file_claim(folder / 'a')")
    holder = start(claim, tmp_path)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with file_claim(tmp_path / "a") as is_mine, file_claim(tmp_path / "b") as is_other_mine:
        assert (is_mine, is_other_mine) == (False, True)
    waiting = start(claim.replace("'a'", "'a', wait=True"), tmp_path)
    assert waiting.stderr is not None and waiting.stdout is not None
    assert waiting.stderr.readline().startswith(f"waiting: {tmp_path}/a is being written by process {holder.pid} on ")
    holder.kill()
    assert waiting.stdout.readline() == "held\n"
    (tmp_path / ".a.0123456789abcdef.part").mkdir()
    remove_claims(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f".a{LOCK_NAME}"], "that of the living process stays"
    waiting.kill()
    waiting.wait()
    remove_claims(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_in_a_folder_that_was_deleted_is_not_written(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    with file_claim(folder / "a"):
        write_text(folder / "a", "a")
        shutil.rmtree(folder)
        with pytest.raises(InputError, match=f"{folder} was deleted or replaced"):
            write_text(folder / "a", "a")
    assert not folder.exists()


def test_many_processes_take_turns(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "counter").write_text("0")
    program = "import longclip_teacher.folder_lock as module\nmodule._POLL = 0.001\n" + COUNT
    for process in [start(program, tmp_path, 25) for _ in range(4)]:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert (tmp_path / "counter").read_text() == "100"
    assert [path.name for path in tmp_path.parent.glob(f".{tmp_path.name}*")] == []


def test_nothing_is_left_of_a_folder_in_which_nothing_was_written(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with folder_lock(folder):
        assert [path.name for path in folder.iterdir()] == [LOCK_NAME]
    assert list(tmp_path.iterdir()) == [], "the folders above it go too"
    with folder_lock(folder):
        write_text(folder / "a", "a")
    assert [path.name for path in folder.iterdir()] == ["a"]
    with folder_lock(tmp_path / "beside", beside=True):
        assert not (tmp_path / "beside").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_leftovers_of_dead_writers_are_removed(tmp_path: Path) -> None:
    names = [
        ".a.pt.0123456789abcdef.part",
        "checkpoints/.b.pt.0123456789abcdef.part",
        "x/y/.c.pt.0123456789abcdef.part",
    ]
    for name in names:
        (tmp_path / name).mkdir(parents=True)
    with folder_lock(tmp_path):
        assert [(tmp_path / name).exists() for name in names] == [False, False, True]
    with folder_lock(tmp_path / "x" / "y" / "c.pt", beside=True):
        assert not (tmp_path / names[2]).exists()


def test_nothing_is_written_into_a_folder_that_was_deleted_or_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    message = rf"\A{folder} was deleted or replaced while it was being written"
    with folder_lock(folder):
        write_text(folder / "part" / "a", "a")
        folder.rename(tmp_path / "moved")
        with pytest.raises(InputError, match=message):
            write_text(folder / "part" / "a", "b")
        assert not folder.exists()
        with folder_lock(folder):  # as if another process had begun the run anew
            with pytest.raises(InputError, match=message):
                write_text(folder / "a", "c")
            write_text(tmp_path / "elsewhere", "d")
    assert (tmp_path / "moved" / "part" / "a").read_text() == "a"


@pytest.mark.parametrize("case", ["a file", "below a file", "too long", "no name", "a link", "a folder"])
def test_an_impossible_folder_is_one_line(tmp_path: Path, case: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / LOCK_NAME).symlink_to(tmp_path / "file")
    (tmp_path / "taken" / LOCK_NAME).mkdir(parents=True)
    with pytest.raises(ValueError) as of_python:  # the words depend on its version
        Path("a\0b").mkdir()
    folder, cause = {
        "a file": (tmp_path / "file", "File exists"),
        "below a file": (tmp_path / "file" / "run", "Not a directory"),
        "too long": (tmp_path / ("a" * 300), "File name too long"),
        "no name": (tmp_path / "a\0b", str(of_python.value)),
        "a link": (tmp_path / "linked", "Too many levels of symbolic links"),
        "a folder": (tmp_path / "taken", "Is a directory"),
    }[case]
    with pytest.raises(InputError) as error, folder_lock(folder):
        pass
    assert str(error.value) == f"cannot write into {folder} ({cause}): choose a folder that can be written"
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_is_one_line(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open" if number != errno.ENOSPC else "write", refuse)
    with (
        pytest.raises(InputError, match=rf"\Acannot write into {tmp_path} \({os.strerror(number)}\): "),
        folder_lock(tmp_path),
    ):
        pass
    assert not list(tmp_path.iterdir())


def stale(path: Path, **changes: object) -> None:
    """Write a lock file as a killed process of this host leaves it."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    content = {**vars(module._myself()), "pid": ended.pid, **changes}
    path.write_text(json.dumps(content))


def test_without_flock_the_file_is_the_lock(no_flock: None, tmp_path: Path) -> None:
    lock = folder_lock(tmp_path)
    with folder_lock(tmp_path), pytest.raises(InputError, match=rf"in use by process {os.getpid()} on"), lock:
        pass
    assert not list(tmp_path.iterdir())


def test_without_flock_everybody_gets_the_claim_of_a_file(no_flock: None, tmp_path: Path) -> None:
    stale(tmp_path / f".a{LOCK_NAME}", host="another")
    with file_claim(tmp_path / "a") as is_mine, file_claim(tmp_path / "a") as is_its_too:
        assert is_mine and is_its_too
    assert not list(tmp_path.iterdir())


def test_without_flock_the_lock_of_a_dead_process_of_this_host_is_taken(no_flock: None, tmp_path: Path) -> None:
    stale(tmp_path / LOCK_NAME)
    with folder_lock(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
    stale(tmp_path / LOCK_NAME, pid=os.getpid(), start="another process of this number")
    with folder_lock(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("changes", [{"host": "gpu\x1b[2J7"}, {"space": "pid:[1]"}, None])
def test_without_flock_a_lock_of_elsewhere_is_named_with_what_to_do(
    no_flock: None, tmp_path: Path, changes: dict[str, object] | None
) -> None:
    path = tmp_path / LOCK_NAME
    if changes is None:
        path.touch()  # its process was killed before it wrote its name, or is about to write it
    else:
        stale(path, **changes)
    with pytest.raises(InputError) as error, folder_lock(tmp_path):
        pass
    assert f"(if that no longer runs, delete {path})" in str(error.value)
    assert str(error.value).isprintable()
    path.unlink()
    with folder_lock(tmp_path):
        pass


def test_without_flock_one_of_several_takes_a_dead_process_lock(start: Start, tmp_path: Path) -> None:
    (tmp_path / "counter").write_text("0")
    stale(tmp_path.with_name(f".{tmp_path.name}{LOCK_NAME}"))
    program = "import longclip_teacher.folder_lock as module\nmodule._POLL = 0.001\n"
    program += "module.try_lock = lambda descriptor: None\n" + COUNT
    for process in [start(program, tmp_path, 10) for _ in range(4)]:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert (tmp_path / "counter").read_text() == "40"
    assert [path.name for path in tmp_path.parent.glob(f".{tmp_path.name}*")] == []
