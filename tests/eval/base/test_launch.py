"""A program that was launched gets the signals of the one that waits for it, and ends first."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from eval.base.launch import passing_signals, run_passing_signals

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


def test_programs_of_several_threads_save_before_the_block_ends(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()

    def tick() -> None:
        if all((folder / "ready").exists() for folder in folders) and not (tmp_path / "sent").exists():
            (tmp_path / "sent").touch()
            os.kill(os.getpid(), signal.SIGTERM)

    def start(folder: Path) -> int:
        return run_passing_signals([sys.executable, "-c", PROGRAM, str(folder)], env=dict(os.environ), tick=tick)

    with pytest.raises(SystemExit) as stopped, ThreadPoolExecutor(2) as pool, passing_signals():
        futures = [pool.submit(start, folder) for folder in folders]
        futures[0].result()
    assert stopped.value.code == 128 + signal.SIGTERM
    assert [(folder / "saved").read_text() for folder in folders] == [str(int(signal.SIGTERM))] * 2
    assert all(isinstance(future.exception(), SystemExit) for future in futures)


def test_an_error_ends_the_programs_of_other_threads(tmp_path: Path) -> None:
    def start() -> int:
        return run_passing_signals([sys.executable, "-c", PROGRAM, str(tmp_path)], env=dict(os.environ))

    with pytest.raises(ZeroDivisionError), ThreadPoolExecutor(1) as pool, passing_signals():
        future = pool.submit(start)
        while not (tmp_path / "ready").exists():
            time.sleep(0.05)
        raise ZeroDivisionError
    assert future.result() == 7 and (tmp_path / "saved").exists()
