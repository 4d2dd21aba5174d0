"""One run per folder, and a disk that takes no more: each is one line, and what was there before stays."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from at_once import at_once
from eval.base.processes import Runtime
from longclip_teacher.errors import InputError
from longclip_teacher.folder_lock import folder_lock
from longclip_teacher.weights_file import read_weights
from training.generations import verified_file
from training.main import main
from training.record.event_file import EventFile
from training.record.run_log import RunLog, read_metrics
from training.settings.tree import parse_config

ROOT = Path(__file__).resolve().parents[2]
ARGS = [
    "--run.max_steps", "2", "--run.log_every", "1", "--run.save_every", "1", "--run.global_batch_size", "36",
    "--run.resume", "auto", "--run.device", "cpu", "--data.num_workers", "1", "--data.val", "None",
    "--data.tests", "--data.zeroshot", "None", "--teacher.checkpoint", "None",
]  # fmt: skip


@pytest.fixture
def run(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run the command in this process."""

    def call(out_dir: Path, *more: str) -> None:
        monkeypatch.setattr(sys, "argv", ["main.py", *ARGS, "--run.out_dir", str(out_dir), *more])
        main()

    monkeypatch.chdir(checkout)
    return call


@pytest.fixture
def limit() -> Iterator[Callable[[int], None]]:
    """Limit the size of files that this process writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def finished(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs are begun at once in one folder. Return the folder: the run that goes on must be whole."""
    out_dir = tmp_path_factory.mktemp("two") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(checkout)
        ends = at_once(main, *[["main.py", *ARGS, "--run.out_dir", str(out_dir)]] * 2)
    assert sorted(code for code, _ in ends) == [0, 2], ends
    (refused,) = [printed for code, printed in ends if code]
    assert re.fullmatch(rf"error: {out_dir} is in use by process \d+ on .+, started .+\n", refused)
    return out_dir


def test_of_two_runs_at_once_one_is_refused_in_one_line(finished: Path) -> None:
    assert [row["step"] for row in read_metrics(finished)] == [1, 2]
    assert torch.load(verified_file(finished / "checkpoints" / "last.pt"), weights_only=True)["step"] == 2
    assert len(list((finished / "tensorboard").iterdir())) == 1
    assert not [path for path in finished.rglob(".*") if path.is_file()]


def test_every_rank_of_a_second_run_ends(checkout: Path, tmp_path: Path) -> None:
    with folder_lock(tmp_path / "run"):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command += [str(ROOT / "training" / "main.py"), *ARGS, "--run.out_dir", str(tmp_path / "run")]
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=300)
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode and len(told) == 1 and f"in use by process {os.getpid()} on" in told[0], done.stderr
    assert "exitcode  : 2" in done.stderr


@pytest.mark.parametrize(("size", "name"), [(1_000_000, "last.safetensors"), (20_000_000, "checkpoints/last.pt")])
def test_a_limit_of_file_sizes_ends_the_run_in_one_line_and_keeps_the_checkpoint(
    finished: Path,
    tmp_path: Path,
    run: Callable[..., None],
    limit: Callable[[int], None],
    size: int,
    name: str,
) -> None:
    out_dir = tmp_path / "run"
    shutil.copytree(finished, out_dir)
    limit(size)
    with pytest.raises(
        InputError, match=rf"\Acannot write {out_dir / name} \([^\n]+: the file before it is as it was\Z"
    ):
        run(out_dir, "--run.max_steps", "4")
    assert torch.load(verified_file(out_dir / "checkpoints" / "last.pt"), weights_only=True)["step"] == 2
    for weights in ("last", "best"):
        assert read_weights(out_dir / f"{weights}.safetensors").tensors
    assert not [path for path in out_dir.rglob(".*") if path.is_dir()]


def test_a_run_whose_folder_is_deleted_ends_in_one_line(
    tmp_path: Path, run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    out_dir = tmp_path / "run"

    def scalars(*arguments: object, **options: object) -> None:
        shutil.rmtree(out_dir)
        real(*arguments, **options)  # type: ignore[arg-type]

    real = RunLog.scalars
    monkeypatch.setattr(RunLog, "scalars", scalars)
    with pytest.raises(InputError, match=rf"\A{out_dir} was deleted or replaced while it was being written"):
        run(out_dir)
    assert not out_dir.exists()


@pytest.mark.parametrize("case", ["a file", "below a file", "too long"])
def test_an_impossible_folder_ends_the_run_in_one_line(tmp_path: Path, run: Callable[..., None], case: str) -> None:
    (tmp_path / "file").touch()
    out_dir = {"a file": tmp_path / "file", "below a file": tmp_path / "file/x", "too long": tmp_path / ("a" * 300)}[
        case
    ]
    with pytest.raises(InputError, match=rf"\Acannot write into {out_dir} \([^)]+\): choose a folder"):
        run(out_dir)


def test_records_on_a_full_disk_are_one_line(tmp_path: Path) -> None:
    """metrics.jsonl, then TensorBoard's file; both are written at once, so the run hears of it."""
    config, runtime = parse_config(["--run.out_dir", str(tmp_path)]), Runtime(0, 1, torch.device("cpu"))
    values = {"loss": 1.0, "samples_per_second": 2.0}
    for name in ("_metrics", "_board"):
        log = RunLog(config, runtime, step=0, total_steps=2)
        log.scalars(1, values)
        full = Path("/dev/full").open("w" if name == "_metrics" else "wb")  # noqa: SIM115  # the log closes it
        if name == "_metrics":
            log._metrics = full  # type: ignore[assignment]
        else:
            log._board._records._writer = log._board._file = full  # type: ignore[assignment]
        with pytest.raises(InputError, match=rf"\Acannot write {tmp_path} \(No space left on device\)\Z"):
            log.scalars(2, values)
        with pytest.raises(InputError, match="No space left on device"):
            log.close()


def test_tensorboard_shows_the_later_of_two_records_of_a_step(tmp_path: Path) -> None:
    for value, first in ((1.0, 1), (2.0, 2)):
        file = EventFile(tmp_path, first_step=first)
        for step in range(first, 4):
            file.scalars(step, {"train/loss": value})
        file.close()
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 2.0)]
