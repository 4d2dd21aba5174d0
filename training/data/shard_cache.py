"""Remote files on a disk of this node while training reads them, bounded in bytes and shared by its processes.

A file lies under its sha256, so what changes on the server never mixes with what was there before. It is written beside
its place, compared with its manifest, and renamed; the part that a killed process leaves is removed. Of several
processes that want a file one fetches it. A thread in each process fetches the files that will be wanted next.

To make room, the files that were read least recently go first. Those that a process reads now or soon are marked by a
shared lock on `SHA256.use`, and go only if it could not go on otherwise. Nothing else in the folder is touched.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from longclip_teacher.atomic_files import atomic_file, written_into
from longclip_teacher.errors import InputError
from longclip_teacher.temporaries import release_lock, remove_leftovers, share_lock, try_lock
from training.data.http_answer import Patience
from training.data.remote_files import RemoteFile, fetch

__all__ = ["ShardCache"]

_SHARD, _MARK, _CLAIM = ".shard", ".use", ".get"
_NAME = re.compile(rf"([0-9a-f]{{64}})({re.escape(_SHARD)}|{re.escape(_MARK)})")
_LOCK = ".compact-longclip.room"
_ARRIVING = re.compile(rf"\.([0-9a-f]{{64}}){re.escape(_SHARD)}\.[0-9a-f]{{16}}\.part")
_POLL, _PREFETCH_POLL = 0.05, 0.5  # seconds
# seconds without a byte, longer than any fetch waits: on a file system without locks nothing else tells of a dead one
_ABANDONED = 900.0


class _Kept(NamedTuple):
    """A complete file of the cache; they sort by the time of the last read."""

    read_ns: int
    num_bytes: int
    sha256: str


class ShardCache:
    """A folder of at most `most_bytes`, of which `opened` gives any remote file. Picklable and safe in several
    processes and threads."""

    def __init__(self, folder: Path, most_bytes: int, patience: Patience | None = None) -> None:
        """Nothing is made or fetched yet."""
        self.folder, self.most_bytes, self._patience = folder.absolute(), most_bytes, patience
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._marks: dict[str, int] = {}
        self._expected: tuple[RemoteFile, ...] = ()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "most_bytes": self.most_bytes, "_patience": self._patience}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    @contextmanager
    def opened(self, file: RemoteFile) -> Iterator[int]:
        """Yield a descriptor of the file, which is fetched if it is not there.

        Raise InputError in one line if it cannot be had or stored.
        """
        while True:
            path = self.path(file)
            try:
                descriptor = os.open(path, os.O_RDONLY)
                break
            except FileNotFoundError:
                continue  # another process has made room just now
            except OSError as error:
                raise InputError(f"cannot read {path} ({error.strerror}): delete it") from None
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def read(self, file: RemoteFile, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` of the file. Raise InputError as `opened`, and if it is too short."""
        with self.opened(file) as descriptor:
            data = os.pread(descriptor, size, offset)
        if len(data) != size:
            raise InputError(f"{file} is shorter than its index says: upload its manifest again")
        return data

    def path(self, file: RemoteFile) -> Path:
        """Return where the file lies, once it is complete. Another process may remove it at any time."""
        self._get(file, lambda: True, urgent=True)
        path = self._path(file)
        with suppress(OSError):  # it may be another user's
            os.utime(path)
        return path

    def _path(self, file: RemoteFile | _Kept) -> Path:
        return self.folder / f"{file.sha256}{_SHARD}"

    def expect(self, now: Sequence[RemoteFile], then: Sequence[RemoteFile]) -> None:
        """Say which files this process reads now, and which after them: a thread fetches them, and they stay."""
        if self._pid != os.getpid():
            self._reset()  # in a forked process
        self._mark({file.sha256 for file in (*now, *then)})
        with self._changed:
            self._expected = (*_rotated(now, self._pid), *_rotated(then, self._pid))
            self._changed.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._fetch_expected, daemon=True, name="shard cache")
            self._thread.start()

    def _fetch_expected(self) -> None:
        done: tuple[RemoteFile, ...] | None = None
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._expected is not done)  # noqa: B023 -- called here
                done = wanted = self._expected
            for file in wanted:
                with suppress(InputError, OSError):  # it is tried again, and told, if it is read
                    self._get(file, lambda: self._expected is wanted, urgent=False)  # noqa: B023 -- called here

    def _get(self, file: RemoteFile, is_wanted: Callable[[], bool], *, urgent: bool) -> None:
        """Fetch a file unless it is there. It may still be missing afterwards if it `is_wanted` no more."""
        path = self._path(file)
        while not _is_whole(path, file) and is_wanted():
            with self._claim(file) as is_mine:
                is_done = is_mine and (_is_whole(path, file) or self._download(path, file, urgent=urgent))
            if not is_done:
                # without the claim, for who needs the file at once may take room that this may not
                time.sleep(_POLL if urgent else _PREFETCH_POLL)

    def _download(self, path: Path, file: RemoteFile, *, urgent: bool) -> bool:
        """Fetch a file if there is room. The empty file of its size lets others see what is taken."""
        with ExitStack() as held:
            with self._alone():
                if not self._make_room(file, urgent=urgent):
                    return False
                temporary = held.enter_context(atomic_file(path, sync=True))
                _allocate(temporary, file.num_bytes)
            fetch(file, temporary, self._patience)
        return True

    def _make_room(self, file: RemoteFile, *, urgent: bool) -> bool:
        """Remove files until a new one fits. Return False if it may fit later: others are arriving, or what would have
        to go is marked and this is not `urgent`."""

        def fits() -> bool:
            has_room = shutil.disk_usage(self.folder).free >= file.num_bytes
            return has_room and total + file.num_bytes <= self.most_bytes

        total, kept = self._survey()
        arriving = total - sum(one.num_bytes for one in kept)
        marked = [one for one in kept if self._is_marked(one.sha256)]
        going = [one for one in kept if one not in marked] + (marked if urgent else [])
        while not fits() and going:
            one = going.pop(0)
            total -= one.num_bytes
            self._path(one).unlink(missing_ok=True)
        if fits() or arriving or not urgent:
            return fits()
        free = shutil.disk_usage(self.folder).free
        raise InputError(
            f"no room for {file} ({file.num_bytes} bytes): the disk of {self.folder} has {free} bytes left, and the "
            f"cache may hold {self.most_bytes}: free some, or choose another --data.cache_dir"
        )

    def _survey(self) -> tuple[int, list[_Kept]]:
        """Return the bytes of all files, complete or arriving, and the complete ones, the least recently read first.

        What is arriving is listed first: a file that arrives meanwhile is then found under its name.
        """
        remove_leftovers(self.folder, f"*{_SHARD}", is_shared=True)
        arriving = [(found[1], _bytes_in(path)) for path in self.folder.iterdir() if (found := _arrives(path))]
        kept, marks = list[_Kept](), set[str]()
        for entry in list(os.scandir(self.folder)):
            found = _NAME.fullmatch(entry.name)
            if found and found[2] == _MARK:
                marks.add(found[1])
            elif found:
                with suppress(FileNotFoundError):  # somebody has deleted it
                    status = entry.stat(follow_symlinks=False)
                    kept.append(_Kept(status.st_mtime_ns, status.st_size, found[1]))
        for sha256 in marks - {one.sha256 for one in kept}:
            if not self._is_marked(sha256):
                (self.folder / f"{sha256}{_MARK}").unlink(missing_ok=True)
        complete = {(one.sha256, one.num_bytes) for one in kept}
        arriving = [one for one in arriving if one not in complete]
        return sum(size for _, size in arriving) + sum(one.num_bytes for one in kept), sorted(kept)

    @contextmanager
    def _claim(self, file: RemoteFile) -> Iterator[bool]:
        """Yield whether this thread alone may fetch a file. Without locks all may: the file is written atomically."""
        path = self.folder / f"{file.sha256}{_CLAIM}"
        with written_into(path, self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            claim = path.open("ab")
        with claim:
            if try_lock(claim.fileno()) is False:
                yield False
                return
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)
                release_lock(claim.fileno())

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let one process or thread at a time count and make room."""
        path = self.folder / _LOCK
        with written_into(path):
            file = path.open("ab")
        with file:
            while try_lock(file.fileno()) is False:
                time.sleep(_POLL / 10)
            try:
                yield
            finally:
                release_lock(file.fileno())

    def _mark(self, wanted: set[str]) -> None:
        """Mark these files, by their sha256, and no others, as read by this process."""
        for sha256 in self._marks.keys() - wanted:
            release_lock(self._marks[sha256])
            os.close(self._marks.pop(sha256))
        for sha256 in wanted - self._marks.keys():
            path = self.folder / f"{sha256}{_MARK}"
            with written_into(path, self.folder):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._marks[sha256] = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
                share_lock(self._marks[sha256])

    def _is_marked(self, sha256: str) -> bool:
        try:
            descriptor = os.open(self.folder / f"{sha256}{_MARK}", os.O_RDWR)
        except OSError:
            return False
        try:
            return try_lock(descriptor) is False
        finally:
            os.close(descriptor)


def _is_whole(path: Path, file: RemoteFile) -> bool:
    try:
        return path.stat().st_size == file.num_bytes
    except OSError:
        return False


def _rotated(files: Sequence[RemoteFile], number: int) -> tuple[RemoteFile, ...]:
    """Return the files from another one on, so that the processes of a node begin with different ones."""
    start = number % max(1, len(files))
    return (*files[start:], *files[:start])


def _arrives(path: Path) -> re.Match[str] | None:
    return _ARRIVING.fullmatch(path.name)


def _bytes_in(folder: Path) -> int:
    """Return the size of a file that is being fetched, 0 if it has arrived. What was abandoned is removed."""
    try:
        inside = [path.stat() for path in folder.iterdir()]
    except OSError:
        return 0
    if inside and time.time() - max(status.st_mtime for status in inside) > _ABANDONED:
        shutil.rmtree(folder, ignore_errors=True)
        return 0
    return sum(status.st_size for status in inside)


def _allocate(path: Path, num_bytes: int) -> None:
    """Give an empty file its size, and the blocks of the disk if the file system can."""
    with path.open("r+b") as file:
        with suppress(AttributeError):  # not on every system
            try:
                os.posix_fallocate(file.fileno(), 0, num_bytes)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
        file.truncate(num_bytes)
