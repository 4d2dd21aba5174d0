"""Temporary folders of writers: each locked while its writer lives, so that those of dead ones are known."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["own_folder", "release_lock", "remove_leftovers", "share_lock", "try_lock"]

_NUM_BYTES = 8
_RANDOM = "[0-9a-f]" * 2 * _NUM_BYTES  # the part of a name that differs
_HELD_ELSEWHERE = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK, errno.EBADF)


def own_folder(path: Path) -> tuple[Path, int]:
    """A new folder beside `path` for what will be `path`, and the descriptor that keeps it locked."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = path.with_name(f".{path.name}.{secrets.token_hex(_NUM_BYTES)}.part")
        folder.mkdir()
        with suppress(FileNotFoundError):
            descriptor = os.open(folder, os.O_RDONLY)
            if try_lock(descriptor) is not False and folder.exists():
                return folder, descriptor
            os.close(descriptor)
        # a process that removes leftovers was faster than the lock


def remove_leftovers(folder: Path, names: str = "*", *, is_shared: bool = False) -> None:
    """Remove what killed writers left of the files and folders in `folder` whose names match the glob pattern `names`.

    What a living writer has is locked, and stays. A file system without locks cannot tell: there the process must be
    the one writer of these files, as one that holds the folder is; nothing is removed if others share it.
    """
    for leftover in folder.glob(f".{names}.{_RANDOM}.part"):
        if leftover.is_symlink() or not leftover.is_dir():
            continue
        with suppress(OSError):
            descriptor = os.open(leftover, os.O_RDONLY)
            try:
                is_left = try_lock(descriptor)
                if is_left or (is_left is None and not is_shared):
                    shutil.rmtree(leftover, ignore_errors=True)
            finally:
                os.close(descriptor)


def try_lock(descriptor: int) -> bool | None:
    """Take the operating system's lock of an open file, which ends when the file is closed.

    Returns False if another process has it, and None if the file system has no such locks.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD_ELSEWHERE:
            return False
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def share_lock(descriptor: int) -> None:
    """Take a lock that other processes may share, and that keeps `try_lock` from getting one; nothing on a file system
    without locks."""
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def release_lock(descriptor: int) -> None:
    """Give a lock back at once. Closing the file alone leaves it to the processes forked meanwhile."""
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
