"""A file fits in a head, a function on a screen: at most 400 and 60 lines. What may move is imported in one place."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

MOST_FILE_LINES = 400
MOST_FUNCTION_LINES = 60
ROOT = Path(__file__).resolve().parent.parent


def too_long(path: Path, name: str) -> Iterator[str]:
    """The file, if it is too long, and each of its functions that is: from `def` to its last line."""
    text = path.read_text(encoding="utf-8")
    if (num_lines := len(text.splitlines())) > MOST_FILE_LINES:
        yield f"{name}: {num_lines} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if num_lines > MOST_FUNCTION_LINES:
                yield f"{name}:{node.lineno} {node.name}: {num_lines} lines"


def test_files_and_functions_are_short(tracked_files: list[Path]) -> None:
    sources = [path for path in tracked_files if path.suffix == ".py"]
    assert len(sources) > 200
    assert [line for path in sources for line in too_long(ROOT / path, str(path))] == []


def test_one_module_alone_imports_from_inside_open_clip(tracked_files: list[Path]) -> None:
    """Its releases move such names; tests compare with them and may."""
    sources = [path for path in tracked_files if path.suffix == ".py" and path.parts[0] != "tests"]
    from_inside = re.compile(r"^\s*(from open_clip\.|import open_clip\.)", re.MULTILINE)
    found = [str(path) for path in sources if from_inside.search((ROOT / path).read_text(encoding="utf-8"))]
    assert found == ["longclip_teacher/open_clip_parts.py"]


def test_the_measure_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text("def f():\n" + "    pass\n" * 59 + "x = 1\n" * 340)
    assert list(too_long(path, "a.py")) == []
    path.write_text("class A:\n    async def f():\n" + "        pass\n" * 60 + "x = 1\n" * 339)
    assert list(too_long(path, "a.py")) == ["a.py: 401 lines", "a.py:2 f: 61 lines"]


@pytest.mark.xdist_group("house")
def test_groups_of_tests_stay_on_one_worker(request: pytest.FixtureRequest) -> None:
    """pytest-xdist groups by a suffix of the test's id, which not every pytest lets it add."""
    if not request.config.getoption("loadgroup", False):
        pytest.skip("not run by --dist loadgroup")
    assert request.node.nodeid.endswith("@house")
