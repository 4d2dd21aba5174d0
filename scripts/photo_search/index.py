"""The index of a folder of photos: one SQLite file, so that a killed writer loses its last transaction and no more.

A feature belongs to the contents of a file, by their sha256, so renamed files keep it and copies share it.

Shapes: N pictures, D features.
"""

from __future__ import annotations

import os
import sqlite3
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from photo_search.errors import InputError

__all__ = ["Features", "Index", "Picture", "Source", "Stamp", "open_index", "written_index"]

_FILE, _LOCK = "index.sqlite", "lock.sqlite"
_PROGRAM, _VERSION = 0x50485331, 1  # SQLite's application_id and user_version
_TABLES = f"""
CREATE TABLE source (folder BLOB NOT NULL, model BLOB NOT NULL, fingerprint TEXT NOT NULL);
CREATE TABLE features (id INTEGER PRIMARY KEY, sha256 BLOB NOT NULL UNIQUE, vector BLOB NOT NULL,
    crc32 INTEGER NOT NULL);
CREATE TABLE pictures (name BLOB PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
    feature INTEGER REFERENCES features, problem TEXT) WITHOUT ROWID;
PRAGMA application_id = {_PROGRAM};
PRAGMA user_version = {_VERSION}
"""


class Stamp(NamedTuple):
    """What tells that a file is unchanged without reading it."""

    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Picture:
    """A file that was read: its feature, or why it has none."""

    name: str
    """Relative to the folder."""
    stamp: Stamp
    sha256: bytes
    problem: str | None = None


@dataclass(frozen=True)
class Features:
    """All that a search reads."""

    names: list[str]
    """Relative to the folder, sorted."""
    vectors: np.ndarray  # float32 [N, D]


@dataclass(frozen=True)
class Source:
    """What an index was made of."""

    folder: Path
    model: Path
    fingerprint: str


class Index:
    """The open file of an index. Every method is one transaction, and raises InputError for a damaged file."""

    def __init__(self, path: Path, database: sqlite3.Connection) -> None:
        self.path, self._database = path, database
        with self._transaction():
            tables = database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            found = [database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
        self.is_new = not tables
        """Whether there are no tables yet."""
        if tables and found != [_PROGRAM, _VERSION]:
            raise InputError(f"{path} is not an index of this version: delete it and index the folder again")

    def make_tables(self) -> None:
        """Make the tables of a new index."""
        with self._transaction() as database:
            for statement in _TABLES.split(";\n"):
                database.execute(statement)

    @property
    def source(self) -> Source | None:
        """None if nothing was indexed yet."""
        with self._transaction() as database:
            row = database.execute("SELECT folder, model, fingerprint FROM source").fetchone()
            return row and Source(_path(row[0]), _path(row[1]), row[2])

    def set_source(self, source: Source) -> None:
        """Record what the index is made of. Features of another model go."""
        with self._transaction() as database:
            same = "SELECT count(*) FROM source WHERE fingerprint = ?"
            if not database.execute(same, [source.fingerprint]).fetchone()[0]:
                database.execute("DELETE FROM pictures")
                database.execute("DELETE FROM features")
            database.execute("DELETE FROM source")
            values = [os.fsencode(source.folder), os.fsencode(source.model), source.fingerprint]
            database.execute("INSERT INTO source VALUES (?, ?, ?)", values)

    def stamps(self) -> dict[str, Stamp]:
        """The files that were read, by name."""
        with self._transaction() as database:
            rows = database.execute("SELECT name, size, mtime_ns FROM pictures")
            return {os.fsdecode(name): Stamp(size, mtime) for name, size, mtime in rows}

    def problems(self) -> dict[str, str]:
        """Why pictures could not be read, by name."""
        with self._transaction() as database:
            rows = database.execute("SELECT name, problem FROM pictures WHERE problem IS NOT NULL ORDER BY name")
            return {os.fsdecode(name): problem for name, problem in rows}

    def contents(self) -> set[bytes]:
        """The sha256 of all contents that have features."""
        with self._transaction() as database:
            return {row[0] for row in database.execute("SELECT sha256 FROM features")}

    def add(self, pictures: Iterable[Picture], vectors: dict[bytes, np.ndarray]) -> None:
        """Take in files that were read, and the features of contents that are new, by sha256."""
        with self._transaction() as database:
            for sha256, vector in vectors.items():
                stored = vector.astype("<f4").tobytes()
                values = [sha256, stored, zlib.crc32(stored)]
                database.execute("INSERT INTO features (sha256, vector, crc32) VALUES (?, ?, ?)", values)
            for one in pictures:
                values = [os.fsencode(one.name), *one.stamp, one.sha256, one.problem]
                database.execute(
                    "INSERT OR REPLACE INTO pictures VALUES (?, ?, ?, (SELECT id FROM features WHERE sha256 = ?), ?)",
                    values,
                )

    def remove(self, names: Iterable[str]) -> None:
        """Forget files, and all features that no file has any more."""
        with self._transaction() as database:
            database.executemany("DELETE FROM pictures WHERE name = ?", [[os.fsencode(name)] for name in names])
            used = "SELECT feature FROM pictures WHERE feature IS NOT NULL"
            database.execute(f"DELETE FROM features WHERE id NOT IN ({used})")

    def features(self) -> Features:
        """Names and vectors of all pictures that could be read, sorted by name."""
        with self._transaction() as database:
            stored = database.execute(
                "SELECT name, vector, crc32 FROM pictures LEFT JOIN features ON features.id = feature "
                "WHERE feature IS NOT NULL ORDER BY name"
            ).fetchall()
        try:
            if any(zlib.crc32(vector) != crc for _, vector, crc in stored):
                raise ValueError("a feature is not as it was written")
            vectors = np.frombuffer(b"".join(vector for _, vector, _ in stored), "<f4").reshape(len(stored) or 1, -1)
            return Features([os.fsdecode(name) for name, _, _ in stored], vectors[: len(stored)])
        except (TypeError, ValueError) as error:
            raise self._damaged(error) from None

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            self._database.execute("BEGIN")  # also for reading: a writer may commit between two queries
            yield self._database
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            raise self._told(error) from None
        finally:
            if self._database.in_transaction:
                self._database.rollback()

    def _told(self, error: sqlite3.Error) -> InputError:
        return InputError(f"cannot use {self.path} ({error})") if _is_outside(error) else self._damaged(error)

    def _damaged(self, reason: object) -> InputError:
        return InputError(f"{self.path} is damaged ({reason}): delete it and index the folder again")


@contextmanager
def open_index(folder: Path) -> Iterator[Index]:
    """The index in `folder`, to search. Raises InputError if there is none."""
    path = folder / _FILE
    none = InputError(f"no index at {folder}: make one with `index PHOTOS --model MODEL --index {folder}`")
    if not path.is_file():
        raise none
    with _opened(path) as index:
        if index.is_new:
            raise none
        yield index


@contextmanager
def written_index(folder: Path) -> Iterator[Index]:
    """The index in `folder`, made if need be, for this process alone to write. Others may search it meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = sqlite3.connect(folder / _LOCK, timeout=0, isolation_level=None)
        lock.execute("BEGIN EXCLUSIVE")  # the system ends it with the process, however that ends
    except sqlite3.Error as error:
        if "locked" in str(error):
            raise InputError(f"{folder} is being written by another process: wait for it to end") from None
        raise InputError(f"cannot write into {folder} ({error})") from None
    with closing(lock), _opened(folder / _FILE) as index:
        if index.is_new:
            index.make_tables()
        yield index


@contextmanager
def _opened(path: Path) -> Iterator[Index]:
    try:
        database = sqlite3.connect(path, timeout=10, isolation_level=None)
    except sqlite3.Error as error:
        raise InputError(f"cannot use {path} ({error})") from None
    with closing(database):
        yield Index(path, database)


def _is_outside(error: sqlite3.Error) -> bool:
    """Whether the cause is not what the file holds, but the disk, permissions or another process."""
    return isinstance(error, sqlite3.OperationalError) and "no such" not in str(error)


def _path(name: bytes) -> Path:
    return Path(os.fsdecode(name))
