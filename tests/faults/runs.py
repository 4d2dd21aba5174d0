"""Training runs that are killed and resumed, in one process and in two."""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

# what training imports below its options, so that forked processes find it imported
from eval.base.workers import STOP_SIGNALS
from faults.trials import Row
from longclip_teacher import create_teacher, save_teacher
from training import main as training_main
from training.data.digit_scenes import write_digit_scenes
from training.record.run_log import read_metrics
from training.settings.options import EMBEDDED_DATA, EMBEDDED_TEACHER

__all__ = [
    "ROWS",
    "checkout",
    "checkpoint_content",
    "difference",
    "ended",
    "free_port",
    "run_arguments",
    "start_ranks",
    "start_run",
]

STEPS = 4
_RANKS = (1, 2)
_UNFINISHED = os.WEXITED | os.WNOWAIT | os.WNOHANG


def checkout(material: Path) -> None:
    """A few digit scenes and a teacher of random weights, where the default preset looks for them."""
    write_digit_scenes(material / EMBEDDED_DATA, num_train=33, num_val=4, num_test=4, num_val_twins=2)
    torch.manual_seed(0)
    save_teacher(create_teacher("tiny"), material / EMBEDDED_TEACHER / "best.safetensors")


def run_arguments(out_dir: Path, steps: int = STEPS, *more: str) -> list[str]:
    """A run of a few steps, which saves after each."""
    return [
        "--run.out_dir", str(out_dir), "--run.max_steps", str(steps), "--run.global_batch_size", "8",
        "--run.save_every", "1", "--run.log_every", "1", "--run.resume", "auto", "--run.device", "cpu",
        "--data.val", "None", "--data.zeroshot", "None", "--data.tests", "--data.num_workers", "0",
        "--loss.pca_scope", "off", "--loss.fd_image", "0.5", "--optim.ema", "0.9", "--mix.erase", "0.5", *more,
    ]  # fmt: skip


def start_run(material: Path, arguments: list[str], ranks: int = 1) -> list[int]:
    """Start training in forked processes; the processes by rank."""

    def train() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background programs ignore it
        os.chdir(material)
        sys.argv = ["training/main.py", *arguments]
        training_main.run_command(training_main.main)

    return start_ranks(train, ranks)


def start_ranks(function: Callable[[], None], ranks: int) -> list[int]:
    """Call `function` in forked processes that know of each other as under torchrun; the processes by rank."""
    port, pids = free_port(), []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                if ranks > 1:
                    os.environ |= {
                        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                    }  # fmt: skip
                function()
                status = 0
            except SystemExit as error:
                status = int(error.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        pids.append(pid)
    return pids


def free_port() -> int:
    """A port of this machine that nobody uses."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def processor_time(pid: int) -> float:
    """The seconds of processor time that a child has used. Unlike the clock's, they say how far it is on a busy
    machine."""
    return time.clock_gettime(~pid << 3 | 2)  # Linux's clock of another process


def ended(pids: list[int]) -> list[int]:
    """Wait for processes, and return their exit statuses."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def checkpoint_content(out_dir: Path) -> dict[str, Any]:
    """The last checkpoint of a run."""
    content: dict[str, Any] = torch.load(out_dir / "checkpoints" / "last.pt", weights_only=True)
    return content


def _uninterrupted(material: Path) -> None:
    """Uninterrupted runs of one process and of two, and the processor time of the first."""
    checkout(material)
    for ranks in _RANKS:
        out_dir = material / f"whole{ranks}"
        pids = start_run(material, run_arguments(out_dir), ranks)
        os.waitid(os.P_PID, pids[0], os.WEXITED | os.WNOWAIT)
        (material / f"seconds{ranks}").write_text(str(processor_time(pids[0])))
        if (status := ended(pids)) != [0] * ranks:
            raise RuntimeError(f"the uninterrupted run of {ranks} ended with {status}")


def killed_trial(draws: random.Random, folder: Path, material: Path) -> str | None:
    ranks = draws.choice([1, 1, 2])
    out_dir, whole = folder / "run", material / f"whole{ranks}"
    most = float((material / f"seconds{ranks}").read_text())
    # the start takes half of so short a run: it gets a third of the kills
    moments = [draws.uniform(draws.choice([0.1, 0.7, 0.7]), 1) * most for _ in range(draws.choice([1, 1, 2]))]
    for moment in moments:
        _killed(start_run(material, run_arguments(out_dir), ranks), moment, draws)
    if (status := ended(start_run(material, run_arguments(out_dir), ranks))) != [0] * ranks:
        return f"{ranks} ranks killed after {moments}: the resumed run ended with {status}"
    if wrong := difference(checkpoint_content(out_dir), checkpoint_content(whole)):
        return f"{ranks} ranks killed after {moments}: {wrong} differs"
    losses = [[(row["step"], row["loss"]) for row in read_metrics(run)] for run in (out_dir, whole)]
    return None if losses[0] == losses[1] else f"{ranks} ranks killed after {moments}: other losses"


def _killed(pids: list[int], moment: float, draws: random.Random) -> None:
    """Kill all processes once the first has used `moment` seconds of processor time, in any order."""
    while (
        processor_time(pids[0]) < moment and os.waitid(os.P_PID, pids[0], os.WEXITED | os.WNOWAIT | os.WNOHANG) is None
    ):
        time.sleep(0.002)
    for pid in draws.sample(pids, len(pids)):
        os.kill(pid, signal.SIGKILL)
    ended(pids)


def difference(ours: Any, other: Any, name: str = "") -> str | None:
    """The name of the first value in two checkpoints that differs, but for the folder of the run."""
    if isinstance(other, dict):
        if ours.keys() != other.keys():
            return f"{name} keys"
        found = (difference(ours[key], other[key], f"{name}.{key}") for key in other if key != "out_dir")
        return next((wrong for wrong in found if wrong), None)
    same = torch.equal(ours, other) if isinstance(other, torch.Tensor) else ours == other
    return None if same else name


def stopped_trial(draws: random.Random, folder: Path, material: Path) -> str | None:
    ranks, number = draws.choice([1, 1, 2]), draws.choice(STOP_SIGNALS)
    out_dir, whole = folder / "run", material / f"whole{ranks}"
    done = draws.randrange(STEPS - 1)  # steps before the signal
    pids = start_run(material, run_arguments(out_dir), ranks)
    while len(read_metrics(out_dir)) <= done and os.waitid(os.P_PID, pids[0], _UNFINISHED) is None:
        time.sleep(0.01)
    for pid in draws.choice([pids, [draws.choice(pids)]]):
        os.kill(pid, number)
    said = f"{number.name} to a run of {ranks} after step {done + 1}"
    if (status := ended(pids)) not in ([128 + number] * ranks, [0] * ranks):  # 0: it was at its last step
        return f"{said}: it ended with {status}"
    step, logged = checkpoint_content(out_dir)["step"], len(read_metrics(out_dir))
    if step != logged or (any(status) and step == STEPS):
        return f"{said}: step {step} is saved, {logged} are logged, it ended with {status}"
    if (status := ended(start_run(material, run_arguments(out_dir), ranks))) != [0] * ranks:
        return f"{said}: the resumed run ended with {status}"
    wrong = difference(checkpoint_content(out_dir), checkpoint_content(whole))
    return wrong and f"{said}: {wrong} differs"


def _forget_moments(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("torch.optim.AdamW.load_state_dict", lambda self, state: None)


def _notice_no_signal(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("training.stopping.STOP_SIGNALS", ())


ROWS = [
    Row(
        "kills",
        "runs of one process and of two are killed once or twice at a random moment and resumed: weights, moments, "
        "average and losses are those of an uninterrupted run, bit by bit",
        killed_trial,
        full=100,
        few=1,
        off="a resumed run forgets the optimiser's moments",
        switch_off=_forget_moments,
        num_off=3,
        prepare=_uninterrupted,
        seconds=300,
    ),
    Row(
        "signals",
        "TERM, INT, HUP or USR1 to one or all processes of a run of one or two: its step is finished and saved, all "
        "end with 128 + the signal, and the resumed run comes to the weights of one that was never stopped",
        stopped_trial,
        full=50,
        few=1,
        off="signals have their usual effect",
        switch_off=_notice_no_signal,
        num_off=1,
        prepare=_uninterrupted,
        seconds=300,
    ),
]
