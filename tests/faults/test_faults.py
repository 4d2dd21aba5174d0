"""A few trials of every row: nothing fails, and something does as soon as the defence is switched off.

The rows run in a program of their own, because the process of the tests has threads and must not be forked.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from faults.rows import ROWS
from faults.soak import Result, read_results

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.xdist_group("faults")


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """The results of the rows whose tests are to run."""
    path = tmp_path_factory.mktemp("faults") / "results.jsonl"
    calls = [item.callspec for item in request.session.items if hasattr(item, "callspec")]
    rows = [call.params["row"] for call in calls if "row" in call.params]
    search = os.pathsep.join(str(ROOT / folder) for folder in (".", "scripts", "tests"))
    done = subprocess.run(
        [sys.executable, "-m", "faults.soak", "--few", "--results", str(path), *rows],
        env={**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"},
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
