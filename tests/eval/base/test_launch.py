"""A program that was launched gets the signals of the one that waits for it, and ends first."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from eval.base.launch import run_passing_signals

ROOT = Path(__file__).parents[3]
PROGRAM = """
import pathlib, signal, sys, time
def note(number, _):
    time.sleep(0.2)  # it saves
    pathlib.Path(sys.argv[1], "saved").write_text(str(number))
    sys.exit(7)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, note)
pathlib.Path(sys.argv[1], "ready").touch()
signal.alarm(60)
while True: signal.pause()
"""


def run(tmp_path: Path, number: int | None) -> int:
    def tick() -> None:
        if (tmp_path / "ready").exists() and number is not None and not (tmp_path / "sent").exists():
            (tmp_path / "sent").touch()
            os.kill(os.getpid(), number)

    return run_passing_signals([sys.executable, "-c", PROGRAM, str(tmp_path)], env=dict(os.environ), tick=tick)


@pytest.mark.parametrize(
    ("number", "passed"),
    [(signal.SIGTERM, signal.SIGTERM), (signal.SIGHUP, signal.SIGHUP), (signal.SIGUSR1, signal.SIGTERM)],
)
def test_a_signal_is_passed_on_and_the_end_awaited(number: int, passed: int, tmp_path: Path) -> None:
    handler = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, number)
    assert stopped.value.code == 128 + number
    assert (tmp_path / "saved").read_text() == str(int(passed))
    assert signal.getsignal(number) == handler


def test_ctrl_c_is_raised_after_the_end(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, signal.SIGINT)
    assert (tmp_path / "saved").read_text() == str(int(signal.SIGINT))


def test_a_program_that_ends_by_itself_gives_its_exit_code() -> None:
    assert run_passing_signals([sys.executable, "-c", "raise SystemExit(5)"], env=dict(os.environ)) == 5


def test_ctrl_c_in_the_imports_of_a_command_is_one_line() -> None:
    program = (
        "import dataclasses\nfrom eval.base.arguments import answer_early\n"
        "@dataclasses.dataclass\nclass Options:\n"
        "    'A command.'\n"
        "    def check(self): pass\n"
        "answer_early(Options)\n"
        "raise KeyboardInterrupt  # as in an import\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
