"""One process at a time writes a folder, or one file of a folder that several processes fill together.

A lock file names the one that does: host, process and start of the process. The lock is flock's. The operating system
releases it when its holder ends, however that happens, so the file of a killed process holds nobody up. On a file
system without flock the lock file of a folder is itself the lock; one left by a dead process of this host is
recognised.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from glob import escape
from pathlib import Path

from longclip_teacher.errors import InputError
from longclip_teacher.temporaries import remove_leftovers, try_lock

__all__ = ["LOCK_NAME", "check_folder", "file_claim", "folder_lock", "remove_claims"]

LOCK_NAME = ".compact-longclip.lock"
_POLL = 0.5  # seconds between two tries of a process that waits
_QUIET = 2.0  # seconds that a process waits before it says so, because small files are written in less
_MAX_GLANCES = 20  # at a lock file whose holder has not written its name yet, within _POLL seconds
_MOST_TRIES = 100  # while other processes remove the lock file that was just opened
_MAX_BYTES = 4096  # of a lock file that is read


@dataclass(frozen=True)
class _Holder:
    """A process as its lock file names it."""

    host: str
    space: str
    """The space of process numbers, which differs between containers of one host; "" if unknown."""
    pid: int
    start: str
    """When the process started, as the kernel counts it: two processes of one number differ in it; "" if unknown."""
    started: str
    """The same as local time."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, started {self.started}"

    @property
    def is_here(self) -> bool:
        """Whether its number can be looked up by this process."""
        myself = _myself()
        return (self.host, self.space) == (myself.host, myself.space)

    @property
    def is_dead(self) -> bool:
        """Whether it has certainly ended. A process of another host or container never counts as ended."""
        if not self.is_here or os.name == "nt":
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False  # it is another user's
        return _start(self.pid) != self.start


@dataclass(frozen=True)
class _Held:
    """A folder that this process holds, or whose holder has forked this process."""

    folder: Path
    path: Path
    """The lock file."""
    file: os.stat_result
    """That file: another one may come to have its name."""
    pid: int

    @property
    def is_in_place(self) -> bool:
        return _is_at(self.path, self.file)


_held: list[_Held] = []
_descriptors: set[int] = set()  # the open lock files of this process


@contextmanager
def folder_lock(folder: Path, *, beside: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold `folder` for this process alone while the block runs. The folder is made if need be.

    With `beside` the lock file lies beside the folder, which is not made: for a folder that is renamed into place, or
    whose own lock a child process takes. With `wait` a held lock is waited for, and stderr says so once.

    Raises InputError if another process holds the folder, or if it cannot be made or written. Processes forked by this
    one do not hold the lock. What killed writers left in the folder and in the folders directly in it is removed.
    """
    place = folder.absolute()
    path = _beside(place) if beside else place / LOCK_NAME
    made = [parent for parent in path.parents if not _is_there(parent)]
    is_told, glances = False, 0
    while (descriptor := _take(path, folder)) is None:
        holder = _read_holder(path)
        if holder is None and glances < _MAX_GLANCES:  # it writes its name just after it has taken the lock
            glances += 1
            time.sleep(_POLL / _MAX_GLANCES)
            continue
        message = f"{folder} is in use by {holder or 'another process'}"
        if holder is None or not holder.is_here:
            message += f" (if that no longer runs, delete {path})"
        if not wait:
            raise InputError(f"{message}: wait for it to end, or choose another folder")
        if not is_told:
            print(f"waiting: {message}", file=sys.stderr, flush=True)
            is_told = True
        time.sleep(_POLL)
    with _holding(_Held(place, path, os.fstat(descriptor), os.getpid()), descriptor, made):
        if beside:
            remove_leftovers(place.parent, escape(place.name))
        else:
            for part in (place, *place.glob("*/")):
                remove_leftovers(part)
        yield


@contextmanager
def file_claim(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Yield whether this process alone may write the file `path` while the block runs; False if another process may.

    With `wait` the other one's end is waited for, so True is yielded, and stderr says so once. The folder is made if
    need be, and what killed writers of this file left is removed. On a file system without flock nobody would know that
    the process of another host has died, so every process gets True there: the file must be written atomically, with
    the same contents by all.

    Raises InputError if the folder cannot be made or written. Processes forked by this one do not hold the claim.
    """
    place = path.absolute()
    lock = _beside(place)
    made = [parent for parent in lock.parents if not _is_there(parent)]
    is_told, asked = False, time.monotonic()
    while (descriptor := _take(lock, path.parent, is_shared=True)) is None:
        if not wait:
            yield False
            return
        if not is_told and time.monotonic() - asked > _QUIET and (holder := _read_holder(lock)):
            print(f"waiting: {path} is being written by {holder}", file=sys.stderr, flush=True)
            is_told = True
        time.sleep(_POLL)
    with _holding(_Held(place.parent, lock, os.fstat(descriptor), os.getpid()), descriptor, made):
        remove_leftovers(place.parent, escape(place.name), is_shared=try_lock(descriptor) is None)
        yield True


def remove_claims(folder: Path) -> None:
    """Remove what killed processes left in a folder that several processes fill: files, and claims of files."""
    remove_leftovers(folder, is_shared=True)
    for lock in folder.glob(f".*{LOCK_NAME}"):
        with file_claim(lock.with_name(lock.name.removeprefix(".").removesuffix(LOCK_NAME))):
            pass


@contextmanager
def _holding(held: _Held, descriptor: int, made: Sequence[Path]) -> Iterator[None]:
    _held.append(held)
    _descriptors.add(descriptor)
    try:
        yield
    finally:
        if held.pid == os.getpid():
            _held.remove(held)
            _release(held, descriptor, made)


def _beside(place: Path) -> Path:
    return place.with_name(f".{place.name}{LOCK_NAME}")


def check_folder(path: Path) -> None:
    """Raise InputError if `path` lies in a folder that this process holds and that was deleted or replaced since."""
    place = path.absolute()
    for held in _held:
        if held.folder in place.parents and not held.is_in_place:
            raise InputError(
                f"{held.folder} was deleted or replaced while it was being written: nothing more is written into it"
            )


def _take(path: Path, folder: Path, *, is_shared: bool = False) -> int | None:
    """The open lock file, now this process's; None if another process holds it.

    On a file system without flock, the file is the lock; if it `is_shared`, it is none, and every process gets it.
    """
    try:
        for _ in range(_MOST_TRIES):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                descriptor, is_new = _open(path)
            except FileNotFoundError:  # its holder has just removed it, or its folder
                continue
            locked, is_mine = None, False
            try:
                locked = try_lock(descriptor)
                if locked is False or not (locked or is_new or is_shared or _set_aside(path)):
                    return None
                if (locked or is_new or is_shared) and _is_at(path, os.fstat(descriptor)):
                    _write_name(descriptor, path)
                    is_mine = True
                    return descriptor
            finally:
                if not is_mine:
                    os.close(descriptor)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    except (OSError, ValueError) as error:
        cause = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write into {folder} ({cause}): choose a folder that can be written") from None


def _open(path: Path) -> tuple[int, bool]:
    """The lock file, and whether it is new."""
    flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0)
    try:
        return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666), True
    except FileExistsError:
        return os.open(path, flags), False


def _write_name(descriptor: int, path: Path) -> None:
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(asdict(_myself())).encode())
    except OSError:
        path.unlink()  # a lock without a name would tell nobody whom to wait for
        raise


def _set_aside(path: Path) -> bool:
    """Without flock: remove the lock file if its process is dead. False if it may live."""
    holder = _read_holder(path)
    if holder is None or not holder.is_dead:
        return not path.exists()
    aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    with suppress(FileNotFoundError):
        path.rename(aside)  # of several processes that do this, one gets the dead process's file
        if _read_holder(aside) != holder:  # it is a faster process's new one: give it back
            os.link(aside, path)
        aside.unlink()
    return True


def _release(held: _Held, descriptor: int, made: Sequence[Path]) -> None:
    """Give the lock back. Of the folders that were `made` for it, the innermost first, those without a file go too."""
    with suppress(OSError):
        if held.is_in_place:
            held.path.unlink()
    _descriptors.discard(descriptor)
    os.close(descriptor)
    with suppress(OSError):
        for folder in made:
            folder.rmdir()


def _close_inherited() -> None:
    """In a forked child: close the parent's lock files, so that the locks end with the parent."""
    while _descriptors:
        os.close(_descriptors.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is no name: `_take` says so
        return False


def _is_at(path: Path, file: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.lstat(path), file)
    except OSError:
        return False


def _read_holder(path: Path) -> _Holder | None:
    """Whom a lock file names; None if it is gone, or not yet written."""
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(_MAX_BYTES))
        text = {field.name: _plain(content[field.name]) for field in fields(_Holder) if field.name != "pid"}
        return _Holder(**text, pid=int(content["pid"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _plain(text: str) -> str:
    return "".join(character for character in str(text) if character.isprintable())


def _myself() -> _Holder:
    pid = os.getpid()
    try:
        space = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        space = ""
    return _Holder(socket.gethostname(), space, pid, _start(pid), _started(pid))


def _start(pid: int) -> str:
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {_ticks(pid)}"
    except (OSError, ValueError, IndexError):
        return ""


def _started(pid: int) -> str:
    try:
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        seconds = time.time() - uptime + _ticks(pid) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        seconds = time.time()  # nearly: a lock is taken soon after the start
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _ticks(pid: int) -> int:
    """Clock ticks from the machine's start to the process's."""
    fields_after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields_after_name[19])
