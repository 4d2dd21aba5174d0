"""Processes and workers that hang or die end the run, in one line that names them. As a program: LIMIT FOLDER MODE.

The program has the shape of the training loop: data from a worker, then a step in which the processes meet.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from eval.base.processes import start
from eval.base.workers import share_tensors, worker_options
from longclip_teacher.errors import run_command
from ranks import start_ranks
from training.watchdog import TIMED_OUT, Watchdog

KILLED = -signal.SIGKILL
LIMIT = 8.0  # seconds; a busy machine may well stop for two


class Numbers(Dataset):
    """Endless tensors of 400 kB, more than the smallest /dev/shm of the tests."""

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((100_000,), index)


def main() -> None:
    limit, folder, mode = float(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    with start("cpu") as runtime, Watchdog(runtime, limit, is_compiled=mode == "compiles") as watchdog:
        loader = DataLoader(Numbers(), batch_size=None, collate_fn=share_tensors, **worker_options(1))
        batches = iter(loader)
        for step in itertools.count() if mode == "trains" else range(3):
            watchdog.station("data", step)
            batch = next(batches)
            watchdog.station("step", step)
            assert runtime.highest(int(batch[0])) == step
            (folder / f"rank{runtime.rank}_step{step}").touch()
            time.sleep(0.02)
            if mode == "compiles" and step == 0:
                time.sleep(1.5 * limit)
        watchdog.station("evaluation", 3, waits=not runtime.is_main)
        if mode == "evaluates" and runtime.is_main:
            for _ in range(15):
                time.sleep(0.1 * limit)
                watchdog.progress()
        runtime.barrier()


def children(process: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def ends_after(tmp_path: Path, number: signal.Signals, *, of_worker: bool) -> tuple[list[int], list[str]]:
    """Two processes train until rank 1, or its worker, gets a signal: their exit codes and their lines. No
    process is left."""
    with (tmp_path / "stderr").open("w") as stderr:
        processes = start_ranks([__file__, str(LIMIT), str(tmp_path), "trains"], 2, stderr=stderr)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "rank1_step5").exists():
            assert time.monotonic() < deadline, (tmp_path / "stderr").read_text()
            time.sleep(0.02)
        workers = [pid for process in processes for pid in children(process)]
        victim = workers[-1] if of_worker else processes[1].pid
        os.kill(victim, number)
        codes = [process.wait(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    deadline = time.monotonic() + 10
    while left := [pid for pid in workers if is_running(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.02)
    lines = (tmp_path / "stderr").read_text().splitlines()
    return codes, [line for line in lines if "error: " in line or line.startswith("no progress")]


@pytest.mark.parametrize("of_worker", [False, True])
def test_what_hangs_is_named_and_the_run_ends(of_worker: bool, tmp_path: Path) -> None:
    codes, lines = ends_after(tmp_path, signal.SIGSTOP, of_worker=of_worker)
    assert codes == ([TIMED_OUT, TIMED_OUT] if of_worker else [TIMED_OUT, KILLED])
    how = r"rank 1 stands still (last station: data, " if of_worker else "rank 1 gives no sign of life (last station: "
    assert len(lines) == 2, lines
    assert lines[0].startswith(f"no progress for {LIMIT / 2:g} s: {how}")
    assert lines[1].startswith(f"error: no progress for {LIMIT:g} s: {how}") and "--run.resume auto" in lines[1]
    assert all(("--data.num_workers 0" in line and "--shm-size" in line) == of_worker for line in lines)


@pytest.mark.parametrize("of_worker", [False, True])
def test_what_dies_is_named_and_the_run_ends_at_once(of_worker: bool, tmp_path: Path) -> None:
    codes, lines = ends_after(tmp_path, signal.SIGKILL, of_worker=of_worker)
    assert codes == ([2, 2] if of_worker else [2, KILLED])
    assert lines[-1].startswith("error: rank 1 ended (last station: "), lines
    assert len(lines) == 1 + of_worker
    assert not of_worker or lines[0].startswith("error: a process that loads data "), lines
    assert "Traceback" not in (tmp_path / "stderr").read_text()


@pytest.mark.parametrize(("mode", "world_size"), [("evaluates", 2), ("compiles", 1)])
def test_a_process_that_waits_for_one_that_works_does_not_hang(mode: str, world_size: int, tmp_path: Path) -> None:
    limit = 4.0
    with (tmp_path / "stderr").open("w") as stderr:
        processes = start_ranks([__file__, str(limit), str(tmp_path), mode], world_size, stderr=stderr)
    started = time.monotonic()
    assert [process.wait(timeout=60) for process in processes] == [0] * world_size
    assert time.monotonic() - started > limit
    assert "no progress" not in (tmp_path / "stderr").read_text()


def test_a_small_shared_memory_is_named(tmp_path: Path) -> None:
    private = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=100k tmpfs /dev/shm && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*private, "true"], capture_output=True).returncode:
        pytest.skip("this user may not mount")
    command = [*private, sys.executable, __file__, str(LIMIT), str(tmp_path), "trains"]
    search = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parents[1])])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": search}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the shared memory of this machine") and done.stderr.count("\n") == 1
    assert "--shm-size" in done.stderr and "--data.num_workers 0" in done.stderr


if __name__ == "__main__":
    run_command(main)
