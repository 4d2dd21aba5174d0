"""Several nodes without a common disk: they agree before the first step, and one that is lost comes back.

Run as a program (FOLDER, under torchrun's environment variables) it is one of two processes that agree or do not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import training.main
from bad_steps import Run
from eval.base.processes import start
from faults.runs import free_port
from longclip_teacher.errors import InputError
from ranks import run_ranks, start_ranks, wait_until
from training.agreement import check_agreement, resume
from training.checkpointing import save_checkpoint
from training.data.shard_records import Contents
from training.record.run_log import read_metrics
from training.settings.tree import TrainConfig, parse_config

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20
ARGS = [
    str(ROOT / "training" / "main.py"), "--run.max_steps", str(STEPS), "--run.global_batch_size", "40",
    "--run.log_every", "1", "--run.save_every", "1000", "--run.resume", "auto", "--data.num_workers", "0",
    "--data.val", "None", "--data.zeroshot", "None", "--data.tests",
]  # fmt: skip


@contextlib.contextmanager
def agent(number: int, port: int, checkout: Path, out_dir: Path) -> Iterator[subprocess.Popen[bytes]]:
    """torchrun as on node `number` of two."""
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--max-restarts=3",
        "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", f"--rdzv_conf=is_host={int(number == 0)}",
        "--local_addr=127.0.0.1",
    ]  # fmt: skip
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with out_dir.with_suffix(".txt").open("a") as file:
        process = subprocess.Popen(
            [*torchrun, *ARGS, "--run.out_dir", str(out_dir)],
            cwd=checkout, env={**os.environ, **environment}, stdout=file, stderr=file,
        )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()  # its processes end with it
        process.wait()


def losses(out_dir: Path) -> dict[int, float]:
    return {int(row["step"]): row["loss"] for row in read_metrics(out_dir)}


def test_a_node_that_is_lost_comes_back(checkout: Path, tmp_path: Path) -> None:
    """It has nothing on its disk, and the losses are those of one node that was never disturbed."""
    for process in (one_node := start_ranks([*ARGS, "--run.out_dir", str(tmp_path / "one")], 2, cwd=checkout)):
        process.wait(timeout=300)
    assert [process.returncode for process in one_node] == [0, 0]
    first, second = tmp_path / "first", tmp_path / "second"
    port = free_port()
    with agent(0, port, checkout, first) as survivor:
        with agent(1, port, checkout, second) as lost:
            wait_until(lambda: len(read_metrics(first)) > 2, "no steps")
            lost.kill()
            lost.wait()
        with agent(1, port, checkout, second) as back:
            assert [survivor.wait(timeout=300), back.wait(timeout=300)] == [0, 0], first.with_suffix(".txt").read_text()
    told = first.with_suffix(".txt").read_text()
    done = int(told.partition("SIGTERM: stopped after step ")[2].partition(" ")[0])
    assert 2 < done < STEPS and f"resuming at step {done} of {STEPS}" in told
    assert losses(first) == pytest.approx(losses(tmp_path / "one"), rel=1e-6) and len(losses(first)) == STEPS
    assert not second.exists()


@pytest.mark.parametrize(("minutes", "saved"), [("0.00001", [1, 2, 3]), ("60", [3]), ("0", [3])])
def test_the_last_checkpoint_is_saved_by_the_clock_too(
    minutes: str, saved: list[int], checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkout)
    options = ["--run.max_steps", "3", "--run.save_minutes", minutes, "--run.out_dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", [*ARGS, *options])
    steps: list[int] = []

    def noted(path: Path, state: object, _config: object) -> None:
        if path.name == "last.pt":
            steps.append(state.step)  # type: ignore[attr-defined]

    monkeypatch.setattr("training.loop.save_checkpoint", noted)
    training.main.main()
    assert steps == saved


def digest(run: Run) -> str:
    """A hash of weights, moments, average and statistics."""
    content = run.contents()
    return hashlib.sha256(b"".join(content[name].numpy().tobytes() for name in sorted(content))).hexdigest()


def refusal(check: Callable[[], object]) -> str:
    try:
        check()
    except InputError as error:
        return str(error)
    return ""


def main() -> None:
    folder = Path(sys.argv[1])
    with start("cpu") as runtime:
        rank = runtime.rank

        def config_of(*options: str, shared: str = "") -> TrainConfig:
            out_dir = folder / (shared or f"node{rank}")
            return parse_config(["--optim.ema", "0.9", "--run.resume", "auto", "--run.out_dir", str(out_dir), *options])

        run = Run(runtime)
        other = replace(run.state.inputs, data={"a.tar": Contents(5, "x")} if rank else {})
        found = {
            "nothing": refusal(lambda: check_agreement(config_of(), run.state.inputs, 4)),
            "rates": refusal(lambda: check_agreement(config_of("--optim.lr", f"{rank + 1}"), run.state.inputs, 4)),
            "data": refusal(lambda: check_agreement(config_of(), other, 4)),
            "fresh": str(resume(config_of(), run.state, runtime)),
        }
        run.step()
        if rank == 0:
            found["state"] = digest(run)
            save_checkpoint(folder / "node0" / "checkpoints" / "last.pt", run.state, config_of())
        run.step()
        found["resumed"] = str(resume(config_of(), run.state, runtime))
        found["step"] = str(run.state.step)
        assert rank or found["state"] == digest(run)
        found["state"] = digest(run)
        if rank == 1:
            run.state.step = 9
            save_checkpoint(folder / "node1" / "checkpoints" / "last.pt", run.state, config_of())
        found["later"] = refusal(lambda: resume(config_of(), run.state, runtime))
        if rank == 1:  # a later one that is damaged is none
            path = folder / "node1" / "checkpoints" / "last.pt"
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        found["damaged"] = refusal(lambda: resume(config_of(), run.state, runtime))
        (folder / f"{rank}.json").write_text(json.dumps(found))


def test_processes_agree_or_say_in_one_line_what_differs(tmp_path: Path) -> None:
    run_ranks([__file__, str(tmp_path)], 2)
    ours, theirs = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert ours == theirs, "all say the same"
    assert not any("\n" in value for value in ours.values())
    assert ours["nothing"] == "" and "the processes differ in --optim.lr: rank 1 on " in ours["rates"]
    assert " has 2.0, rank 0 on " in ours["rates"] and " has 1.0: start all nodes" in ours["rates"]
    assert "the processes differ in training samples: rank 1 on " in ours["data"]
    assert (ours["fresh"], ours["resumed"], ours["step"]) == ("False", "True", "1")
    assert ours["damaged"] == ""
    assert ours["later"].startswith(
        "rank 1 has a checkpoint of step 9 in its --run.out_dir, rank 0 goes on from step 1"
    )


if __name__ == "__main__":
    main()
