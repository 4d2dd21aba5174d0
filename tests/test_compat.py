"""`make compat`: floors that no environment has are found, failed tests run again, and a column keeps its place."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import compat

PROJECT = """
requires = ["setuptools>=77.0.1"]
requires-python = ">=3.10"
classifiers = ["Programming Language :: Python :: 3.9", "Programming Language :: Python :: 3.10"]
dependencies = ["torch>=2.6", "open_clip_torch>=3.2", "fsspec[http]>=2024.6", "tomli>=2.0; python_version < '3.11'"]
ray = ["ray>=2.60"]
openvino = ["openvino>=2025.0"]
export = ["torch>=2.7"]
"""


def test_floors_and_parts_are_read() -> None:
    assert compat.floors(PROJECT, "dev,s3") == {
        "setuptools": "77.0.1", "torch": "2.6", "open-clip-torch": "3.2", "fsspec": "2024.6", "tomli": "2.0"
    }  # fmt: skip
    assert compat.floors(PROJECT, "dev,export")["torch"] == "2.7"
    found = {name: (part.python, part.resolution) for name, part in compat.parts(PROJECT).items()}
    assert found == {
        "lowest": ("3.9", "lowest-direct"), "lowest-export": ("3.9", "lowest-direct"),
        "newest": ("3.10", "highest"), "oldest-python": ("3.9", "highest"), "open-clip-main": ("3.10", "highest"),
    }  # fmt: skip


def test_a_part_that_needs_a_checkout_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPEN_CLIP", raising=False)
    with pytest.raises(compat.Unavailable, match="OPEN_CLIP=DIR"):
        compat.made(compat.parts(PROJECT)["open-clip-main"], tmp_path, PROJECT)


def test_pyproject_promises_the_python_that_is_tested() -> None:
    text = (compat.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'requires-python = ">={compat.parts(text)["lowest"].python}"' in text


def test_a_floor_that_was_not_installed_is_named() -> None:
    installed = {"torch": "2.6.0+cpu", "fsspec": "2024.6.1", "open-clip-torch": "3.2.0"}
    assert compat.above_the_floor(compat.floors(PROJECT, "dev"), installed) == ["fsspec 2024.6.1 instead of 2024.6"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a part in a project with one test that passes, one that is skipped and one that needs a file."""
    (tmp_path / "test_a.py").write_text(
        "import pathlib, pytest\n\ndef test_good(): pass\n\ndef test_skipped(): pytest.skip()\n\n"
        f"def test_file():\n    seen = pathlib.Path({str(tmp_path / 'seen')!r})\n    assert seen.exists()\n"
    )
    folder = tmp_path / ".compat" / "lowest"
    (folder / "env" / "bin").mkdir(parents=True)
    python = folder / "env" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    monkeypatch.setattr(compat, "ROOT", tmp_path)
    monkeypatch.setattr(compat, "HOME", tmp_path / ".compat")
    return folder


def test_what_failed_runs_again_and_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    run_tests = compat.run_tests
    monkeypatch.setattr(compat, "run_tests", lambda *options: runs.append(options[1:]) or run_tests(*options))
    first = compat.tested(folder)
    assert (first.passed, first.skipped, first.failed) == (1, 1, 1)
    (compat.ROOT / "seen").touch()
    second = compat.tested(folder)
    assert (second.passed, second.skipped, second.failed) == (2, 1, 0)
    assert runs == [("-n", "2", "--dist", "loadgroup"), ("--last-failed",), ("--last-failed",)]


def test_a_column_keeps_its_place_and_the_others_stay(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# A page\n\n{compat._START}\n{compat._STOP}\n\nafter\n")
    order = ["lowest", "newest"]
    compat.enter(page, "newest", {"tests": "2 passed", "torch": "2.14"}, order)
    compat.enter(page, "lowest", {"tests": "1 passed", "torch": "2.6", "tomli": "2.0"}, order)
    compat.enter(page, "newest", {"tests": "3 passed", "torch": "2.15"}, order)
    assert page.read_text() == (
        f"# A page\n\n{compat._START}\n\n|  | lowest | newest |\n| --- | --- | --- |\n| tests | 1 passed | 3 passed |\n"
        f"| torch | 2.6 | 2.15 |\n| tomli | 2.0 |  |\n\n{compat._STOP}\n\nafter\n"
    )


def test_a_python_that_is_not_to_be_had_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (compat.ROOT / "pyproject.toml").write_text(PROJECT)
    failed = subprocess.CompletedProcess(["uv"], 2, "", "error: Request failed\n  cause: Name or service not known\n")
    monkeypatch.setattr(compat, "uv", lambda *arguments: failed)
    monkeypatch.setattr(sys, "argv", ["compat.py", "newest"])
    compat.main()
    told = capsys.readouterr().out.splitlines()
    assert told[1:] == ["newest: skipped, uv makes no environment of Python 3.10: Name or service not known"]
