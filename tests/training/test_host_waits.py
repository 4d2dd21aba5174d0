"""A step that does not log reads nothing from the device, so that the host never waits for it."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import cache_teacher
from faults.runs import checkout, ended, run_arguments, start_run
from gpu_parts.waits import ScalarReads
from training import main as training_main
from training.record.run_log import RunLog
from training.settings.options import EMBEDDED_DATA, EMBEDDED_TEACHER

LOG_EVERY, STEPS = 2, 4


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a teacher and its stored features."""
    folder = tmp_path_factory.mktemp("material")
    checkout(folder)
    shards, teacher = (str(folder / path) for path in (EMBEDDED_DATA / "train", EMBEDDED_TEACHER))
    command = ["cache_teacher.py", "--shards", shards, "--teacher", teacher, "--out", str(folder / "cache")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [*command, "--device", "cpu", "--num-workers", "0"])
        cache_teacher.main()
    return folder


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("teacher", ["online", "stored"])
def test_a_step_that_does_not_log_reads_nothing(teacher: str, ranks: int, material: Path, tmp_path: Path) -> None:
    """Between two steps lies all that the loop does: the report on the first of them, the next batch, the step. All are
    of one epoch: the start of another draws a seed."""
    arguments = run_arguments(
        tmp_path / "run", STEPS, "--loss.share_identical_captions", "True", "--loss.pca_scope", "global",
        "--loss.pca_rank", "3", *(["--teacher.cache", str(material / "cache")] if teacher == "stored" else []),
    )  # fmt: skip
    for name, value in (("log_every", LOG_EVERY), ("save_every", STEPS), ("global_batch_size", 4)):
        arguments[arguments.index(f"--run.{name}") + 1] = str(value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_main, "main", counted(tmp_path))
        assert ended(start_run(material, arguments, ranks)) == [0] * ranks
    for rank in range(ranks):
        reads = json.loads((tmp_path / f"reads{rank}.json").read_text())
        assert len(reads) == STEPS
        for step in range(1, STEPS):  # the first builds what is kept
            logged = step % LOG_EVERY == 0
            assert bool(reads[step]) == logged, f"step {step} of rank {rank}: {reads[step]}"


def counted(folder: Path) -> Callable[[], None]:
    """Training that writes down the reads before each step's end since that of the step before, by line."""
    train, advance = training_main.main, RunLog.advance

    def main() -> None:
        found: list[Counter[str]] = []
        with ScalarReads() as reads:

            def noted(log: RunLog, step: int) -> None:
                found.append(Counter(reads.places))
                reads.places.clear()
                advance(log, step)

            RunLog.advance = noted  # type: ignore[method-assign]
            train()
        (folder / f"reads{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))

    return main
