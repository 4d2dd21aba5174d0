"""A few trials of every row: nothing fails, and something does as soon as the defence is switched off.

The rows run in a program of their own, because the process of the tests has threads and must not be forked.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from faults.rows import ROWS
from faults.soak import Result, read_results, table_of, write_table
from longclip_teacher.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
SEARCH = os.pathsep.join(str(ROOT / folder) for folder in (".", "scripts", "tests"))
pytestmark = pytest.mark.xdist_group("faults")


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """The results of the rows whose tests are to run."""
    path = tmp_path_factory.mktemp("faults") / "results.jsonl"
    calls = [item.callspec for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    rows = [call.params["row"] for call in calls if "row" in call.params]
    done = subprocess.run(
        [sys.executable, "-m", "faults.soak", "--few", "--results", str(path), *rows],
        env={**os.environ, "PYTHONPATH": SEARCH, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode in (0, 2) and "Traceback" not in done.stderr, done.stderr
    return {result.row: result for result in read_results(path)}


@pytest.mark.parametrize("row", [row.name for row in ROWS])
def test_nothing_fails_and_something_does_without_the_defence(row: str, results: dict[str, Result]) -> None:
    result = results[row]
    assert result.failures == 0, result.examples
    assert result.failures_off > 0


def a_result(row: str, trials: int, failures: int = 0) -> Result:
    return Result(row, 0, trials, failures, 10, 4, 12.3, "0123456789", [], [])


def test_the_table_says_what_was_not_run_and_what_was_run_in_part(tmp_path: Path) -> None:
    first, second, third = ROWS[:3]
    results = [a_result(first.name, first.full, 9), a_result(first.name, first.full), a_result(second.name, 7, 1)]
    lines = table_of(results).splitlines()[2:]
    assert len(lines) == len(ROWS)
    assert f"| {first.full:,} | 0 | {first.off}: 4 of 10 fail | seed 0, 12 s, 01234567 |" in lines[0]
    assert f"| 7 of {second.full:,} | 1 |" in lines[1]
    assert f"| {third.name} |" in lines[2] and f"| 0 of {third.full:,} | not run |" in lines[2]
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table of faults: make soak -->\na stale table\n<!-- end of the table -->\nafter\n")
    write_table(page, results)
    write_table(page, results)
    assert page.read_text().startswith("before\n<!--") and page.read_text().endswith("-->\nafter\n")
    assert "a stale table" not in page.read_text() and page.read_text().count(first.what) == 1
    write_table(page, [a_result(third.name, 5)])
    assert table_of([*results, a_result(third.name, 5)]) in page.read_text(), "rows that were run elsewhere stay"
    page.write_text("a page without marks")
    with pytest.raises(InputError, match="has no lines <!-- table"):
        write_table(page, results)


def test_a_trial_that_dies_or_hangs_has_failed_and_the_others_go_on(tmp_path: Path) -> None:
    program = """
import os, pytest, random, time
from pathlib import Path
from faults.trials import Row, outcomes, prepared
def trial(draws, folder, material):
    number = len(list(material.iterdir()))
    (material / str(number)).touch()
    if number == 1:
        os._exit(3)
    if number == 2:
        time.sleep(60)
    if number == 3:
        raise ValueError("odd")
row = Row("a", "b", trial, 9, 1, "off", lambda patch: None, seconds=1, per_process=4)
material = Path({folder!r}) / "material"
prepared(row, material)
print(list(outcomes(row, 6, 0, material)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program.replace("{folder!r}", repr(str(tmp_path)))],
        env={**os.environ, "PYTHONPATH": SEARCH}, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    outcomes = ast.literal_eval(done.stdout)
    assert outcomes[0] is None and outcomes[1].startswith("it died")
    assert outcomes[2:] == ["no end within 1 s", "ValueError: odd (<string>:13)", None, None]
