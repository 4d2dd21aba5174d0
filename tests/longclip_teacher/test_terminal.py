"""Output on terminals that know only ASCII, and names that are no text."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLAIN = {"PYTHONIOENCODING": "ascii", "LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run Python on the checkout."""
    merged = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, *arguments], env=merged, capture_output=True, timeout=120, check=False)


PROGRAM = """
import sys
from rich.table import Table
from eval.base.consoles import plain_console
from longclip_teacher.errors import InputError, run_command

def main():
    print("\\u2192 2 \\u00b1 1 \\u00b7 \\u4e2d \\U0001f600 caf\\u00e9 \\udcff")
    table = Table(title="\\u4e2d \\u2192")
    table.add_column("\\u00b1")
    plain_console().print(table)
    plain_console(stderr=True).print("ETA \\u2013")
    raise InputError("no folder \\udce9t\\u00e9")

run_command(main)
"""


@pytest.mark.parametrize(
    "environment", [PLAIN, {**PLAIN, "PYTHONIOENCODING": ""}, {**PLAIN, "PYTHONIOENCODING": "ascii:strict"}]
)
def test_ascii_terminals_get_ascii(environment: dict[str, str]) -> None:
    done = run(["-c", PROGRAM], **environment)
    assert done.returncode == 2, done.stderr
    assert done.stdout.startswith(b"-> 2 +- 1 . \\u4e2d \\U0001f600 caf\\xe9 \\udcff\n")
    assert done.stderr == b"ETA -\nerror: no folder \\udce9t\\xe9\n"
    assert (done.stdout + done.stderr).isascii()


def test_other_terminals_get_what_was_written() -> None:
    done = run(["-c", PROGRAM], PYTHONIOENCODING="utf-8")
    assert done.stdout.decode().startswith("→ 2 ± 1 · 中 😀 café \\udcff\n") and "ETA –" in done.stderr.decode()


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["eval/retrieval.py", "--protocol", "list"], 0),
        (["eval/retrieval.py", "--root", "\u4e2d/\u00e9", "--checkpoint", "x"], 2),
        (["eval/compare.py", "--help"], 0),
        (["scripts/plan_run.py", "--help"], 0),
        (["scripts/make_shards.py", "folder", "--images", "\u4e2d", "--out", "x"], 2),
        (["training/main.py", "--help"], 0),
    ],
)
def test_commands_end_well_on_ascii_terminals(command: list[str], code: int) -> None:
    done = run([str(ROOT / command[0]), *command[1:]], **PLAIN)
    assert done.returncode == code, done.stderr
    assert (done.stdout + done.stderr).isascii() and b"Traceback" not in done.stderr
