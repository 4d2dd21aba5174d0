"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from longclip_teacher.atomic_files import atomic_file, remove_leftovers, write_json, write_text
from longclip_teacher.errors import InputError


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    write_text(path, "old é")
    with atomic_file(path) as temporary:
        assert temporary.parent == path.parent
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
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == mode


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


def test_leftovers_of_the_same_file_alone_are_removed(tmp_path: Path) -> None:
    leftovers = []
    for name in ("a.tar", "b.tar", "a.tar.json"):
        with atomic_file(tmp_path / name) as temporary:
            leftovers.append(temporary)
        leftovers[-1].touch()  # as if its writer had been killed
    remove_leftovers(tmp_path, "a.tar")
    assert [path.exists() for path in leftovers] == [False, True, True]
    remove_leftovers(tmp_path, "*")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "a.tar.json", "b.tar"]


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
