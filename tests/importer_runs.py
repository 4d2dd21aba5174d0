"""Runs of make_shards.py in the test's own process, pictures to import, and what became of them."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from training.data.index import ShardIndex

SCRIPTS = Path(__file__).parents[1] / "scripts"
Run = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command in this process and return its exit code."""

    def call(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["make_shards.py", *map(str, arguments)])
        monkeypatch.syspath_prepend(SCRIPTS)
        try:
            runpy.run_path(str(SCRIPTS / "make_shards.py"), run_name="__main__")
        except SystemExit as exit_:
            return int(exit_.code or 0)
        return 0

    return call


def write_pictures(folder: Path, names: list[str], size: tuple[int, int] = (30, 20)) -> None:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (number * 20 % 256, 100, 50)).save(path)


def contents(out: Path) -> dict[str, dict[str, object]]:
    """Return the captions by key, through the reader that training uses."""
    index = ShardIndex(sorted(out.glob("*.tar")))
    return {index.key(i): json.loads(index.read(i).json or b"") for i in range(index.num_samples)}


def sharegpt4v(root: Path, out: Path) -> list[object]:
    return ["sharegpt4v", "--json", root / "rows.json", "--images", root, "--out", out, "--workers", 1]
