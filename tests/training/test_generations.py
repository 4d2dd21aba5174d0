"""The last two generations of a checkpoint: damage is found, and a crash at any moment leaves one that is verified."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from longclip_teacher.atomic_files import previous_generation
from longclip_teacher.errors import InputError
from training.generations import verified_file, write_generation


def write(path: Path, content: bytes) -> None:
    write_generation(path, lambda temporary: temporary.write_bytes(content) and None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Two generations, of 300 random bytes each."""
    found = tmp_path / "last.pt"
    for seed in (0, 1):
        write(found, random.Random(seed).randbytes(300))
    return found


def test_the_last_two_are_kept(path: Path) -> None:
    assert path.read_bytes() == random.Random(1).randbytes(300)
    assert previous_generation(path).read_bytes() == random.Random(0).randbytes(300)
    write(path, b"third")
    assert previous_generation(path).read_bytes() == random.Random(1).randbytes(300)
    assert sorted(found.name for found in path.parent.iterdir()) == ["last.previous.pt", "last.pt", "sha256.json"]
    assert verified_file(path) == path


@pytest.mark.parametrize("kind", ["flip", "zero", "cut"])
def test_every_damage_is_found(path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    whole = path.read_bytes()
    for position in range(300):
        damaged = {
            "flip": whole[:position] + bytes([whole[position] ^ (1 << position % 8)]) + whole[position + 1 :],
            "zero": whole[:position] + bytes(16) + whole[position + 16 :],
            "cut": whole[:position],
        }[kind]
        path.write_bytes(damaged)
        caplog.clear()
        assert verified_file(path) == previous_generation(path)
        assert f"{path} is damaged" in caplog.text and str(previous_generation(path)) in caplog.text
    path.write_bytes(whole)
    caplog.clear()
    assert verified_file(path) == path and not caplog.text


def test_two_damaged_generations_are_an_error_and_unknown_files_are_taken(path: Path) -> None:
    for found in (path, previous_generation(path)):
        found.write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"last\.pt is damaged") as error:
        verified_file(path)
    assert "\n" not in str(error.value)
    (path.parent / "sha256.json").unlink()  # of a run before there were hashes
    assert verified_file(path) == path


@pytest.mark.parametrize("calls", range(8))
def test_a_crash_at_any_moment_leaves_a_verified_file(path: Path, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies before its n-th rename, link or removal."""
    left = calls

    class Killed(BaseException):
        pass

    def counted(function: object) -> object:
        def call(*args: object, **options: object) -> object:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return function(*args, **options)  # type: ignore[operator]

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", counted(os.replace))
        patch.setattr(os, "link", counted(os.link))
        patch.setattr(Path, "unlink", counted(Path.unlink))
        try:
            write(path, b"third")
            died = False
        except Killed:
            died = True
    content = verified_file(path).read_bytes()
    assert content in (random.Random(1).randbytes(300), b"third")
    assert died or content == b"third"
    write(path, b"fourth")
    assert verified_file(path).read_bytes() == b"fourth"
    assert previous_generation(path).is_file()


def test_without_hard_links_the_file_is_copied(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refused)
    write(path, b"third")
    assert previous_generation(path).read_bytes() == random.Random(1).randbytes(300)
    assert path.read_bytes() == b"third"


def test_a_full_disk_leaves_the_old_file(path: Path) -> None:
    before = path.read_bytes()

    def fill(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=r"cannot write .*last\.pt \(No space left on device"):
        write_generation(path, fill)
    assert path.read_bytes() == before and verified_file(path) == path
    assert not list(path.parent.glob(".*")), "nothing half-written is left"
