"""A signal ends a run after its step, on all processes alike; what then goes on equals a run that was never stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import training.main
from ranks import start_ranks, wait_until
from training.record.evaluate import validate
from training.record.run_log import read_metrics
from training.stopping import StopSignals

MAIN = str(Path(__file__).resolve().parents[2] / "training" / "main.py")
STEPS = 21  # three epochs
ARGS = [
    "--run.max_steps", str(STEPS), "--run.global_batch_size", "40", "--run.log_every", "1", "--run.resume", "auto",
    "--data.zeroshot", "None", "--data.tests", "--data.num_workers", "1", "--optim.ema", "0.9",
]  # fmt: skip
NO_VALIDATION = ["--data.val", "None"]


@pytest.fixture(autouse=True)
def _no_signal_is_ignored() -> Iterator[None]:
    """Tests that nohup or a shell's background runs inherit ignored signals, which a run then ignores too, as it
    should."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    ignored = {number: handler for number, handler in usual.items() if signal.getsignal(number) == signal.SIG_IGN}
    for number, handler in ignored.items():
        signal.signal(number, handler)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def running(
    checkout: Path, out_dir: Path, world_size: int, *args: str
) -> Iterator[tuple[list[subprocess.Popen[str]], Path]]:
    """The processes of a run, and the file of what they print."""
    stderr = out_dir.with_suffix(".err")
    with stderr.open("w") as file:
        command = [MAIN, *ARGS, *args, "--run.out_dir", str(out_dir)]
        processes = start_ranks(command, world_size, cwd=checkout, stderr=file)
    try:
        yield processes, stderr
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def ends(processes: list[subprocess.Popen[str]]) -> list[int]:
    return [process.wait(timeout=100) for process in processes]


def test_a_wait_for_data_that_do_not_come_ends() -> None:
    with StopSignals() as stop:
        assert stop.wait_for(lambda: "batch") == "batch"
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGHUP)).start()
        started = time.monotonic()
        assert stop.wait_for(lambda: time.sleep(60)) is None
        assert time.monotonic() - started < 30
        assert stop.received == signal.SIGHUP
        assert stop.wait_for(lambda: "batch") is None, "a signal has come: no data are asked for"
    with StopSignals() as stop:
        assert stop.wait_for(lambda: os.kill(os.getpid(), signal.SIGTERM) or "batch") == "batch", (
            "data on their way come"
        )
        assert stop.received == signal.SIGTERM


IN_PYTHON = "until = time.monotonic() + 4\nwhile time.monotonic() < until: time.sleep(0.1)\n"
IN_C = (  # as in a collective, which Python's handlers do not interrupt: a mutex that is locked twice
    "lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)\nlock(mutex)\nlock(mutex)\n"
)


@pytest.mark.parametrize(
    ("waits", "apart", "end"),
    [(IN_PYTHON, 0.0, (0, "")), (IN_C, 1.5, (130, "second signal (SIGINT): ended at once\n"))],
)
def test_a_second_signal_ends_the_process_at_once(waits: str, apart: float, end: tuple[int, str]) -> None:
    """Two that come together are one request, of which a launcher has passed on a copy."""
    program = "import ctypes, time\nfrom training.stopping import StopSignals\nStopSignals().__enter__()\n"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{program}print('ready', flush=True)\n{waits}"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(MAIN).parents[1])},
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(apart)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == end


def test_a_signal_in_the_last_evaluation_is_no_end_of_the_run(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The resumed run evaluates."""
    monkeypatch.chdir(checkout)
    short = ["--run.max_steps", "2", "--data.num_workers", "0", "--run.out_dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", [MAIN, *ARGS, *short])

    def interrupted(*args: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return validate(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stopped:
        patched.setattr("training.loop.validate", interrupted)
        training.main.main()
    assert stopped.value.code == 143
    assert torch.load(tmp_path / "run/checkpoints/last.pt", weights_only=True)["step"] == 2
    assert not (tmp_path / "run/best.safetensors").exists() and not read_metrics(tmp_path / "run", "val")
    training.main.main()
    assert [row["step"] for row in read_metrics(tmp_path / "run", "val")] == [2]
    assert (tmp_path / "run/best.safetensors").exists()


def same_states(ours: Path, reference: Path) -> bool:
    """Whether two runs have come to the same weights, averages, moments and losses."""
    first, second = (torch.load(run / "checkpoints" / "last.pt", weights_only=True) for run in (ours, reference))
    assert first["step"] == second["step"] == STEPS
    for part in ("distiller", "ema"):
        if not all(torch.equal(first[part][name], value) for name, value in second[part].items()):
            return False
    for number, moments in second["optimizer"]["state"].items():
        if not all(torch.equal(first["optimizer"]["state"][number][name], value) for name, value in moments.items()):
            return False
    losses = [[(row["step"], row["loss"]) for row in read_metrics(run)] for run in (ours, reference)]
    return losses[0] == losses[1]


@pytest.mark.parametrize(
    ("world_size", "signals"),
    [(1, [signal.SIGTERM, signal.SIGINT]), (2, [signal.SIGUSR1, signal.SIGHUP])],
)
def test_stopped_runs_equal_one_that_was_never_stopped(
    checkout: Path, tmp_path: Path, world_size: int, signals: list[signal.Signals]
) -> None:
    """Only the last process gets the signal, and with it its worker, as from torchrun, which signals a whole group."""
    with running(checkout, tmp_path / "whole", world_size, *NO_VALIDATION) as (processes, _):
        assert ends(processes) == [0] * world_size
    stopped, done = tmp_path / "stopped", 0
    for number in signals:
        with running(checkout, stopped, world_size, *NO_VALIDATION) as (processes, stderr):
            wait_until(lambda known=done: len(read_metrics(stopped)) > known + 1, "no steps")
            os.killpg(processes[-1].pid, number)
            assert ends(processes) == [128 + number] * world_size, stderr.read_text()
        done = torch.load(stopped / "checkpoints" / "last.pt", weights_only=True)["step"]
        assert 0 < done < STEPS and done == len(read_metrics(stopped))
        lines = stderr.read_text().splitlines()
        assert lines[-1] == (
            f"{number.name}: stopped after step {done} of {STEPS}, which is saved; "
            "the same command with --run.resume auto goes on"
        )
        assert "Traceback" not in stderr.read_text()
    with running(checkout, stopped, world_size, *NO_VALIDATION) as (processes, _):
        assert ends(processes) == [0] * world_size
    assert same_states(stopped, tmp_path / "whole")
