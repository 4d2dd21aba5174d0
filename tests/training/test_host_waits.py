"""A step that does not log reads nothing from the device, so that the host never waits for it.

Run as a program (FOLDER) it trains there, online and from stored features, with one process and with two, and writes
down what each of them reads.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import cache_teacher
from faults.runs import checkout, ended, run_arguments, start_run
from gpu_parts.waits import ScalarReads
from training import main as training_main
from training.record.run_log import RunLog
from training.settings.options import EMBEDDED_DATA, EMBEDDED_TEACHER

LOG_EVERY, STEPS = 2, 4  # of one epoch: the start of another draws a seed
ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.xdist_group("host_waits")  # its runs take a minute: once is enough
SEARCH = os.pathsep.join(str(ROOT / folder) for folder in (".", "scripts", "tests"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the program has written."""
    made = tmp_path_factory.mktemp("reads")
    environment = {**os.environ, "PYTHONPATH": SEARCH, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, str(made)], env=environment, check=True, timeout=600)
    return made


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("teacher", ["online", "stored"])
def test_a_step_that_does_not_log_reads_nothing(teacher: str, ranks: int, folder: Path) -> None:
    for rank in range(ranks):
        reads = json.loads((folder / f"{teacher}{ranks}.{rank}.json").read_text())
        assert len(reads) == STEPS
        for step in range(1, STEPS):  # the first builds what is kept
            logged = step % LOG_EVERY == 0
            assert bool(reads[step]) == logged, f"step {step} of rank {rank}: {reads[step]}"


def main() -> None:
    folder = Path(sys.argv[1])
    checkout(folder)
    shards, teacher, cache = (str(folder / path) for path in (EMBEDDED_DATA / "train", EMBEDDED_TEACHER, "cache"))
    sys.argv[1:] = ["--shards", shards, "--teacher", teacher, "--out", cache, "--device", "cpu", "--num-workers", "0"]
    cache_teacher.main()
    training_main.main = counted(training_main.main)
    for name, options in (("online", []), ("stored", ["--teacher.cache", cache])):
        for ranks in (1, 2):
            os.environ["READS"] = str(folder / f"{name}{ranks}")
            arguments = run_arguments(
                folder / f"run_{name}{ranks}", STEPS, "--loss.share_identical_captions", "True",
                "--loss.pca_scope", "global", "--loss.pca_rank", "3", *options,
            )  # fmt: skip
            for option, value in (("log_every", LOG_EVERY), ("save_every", STEPS), ("global_batch_size", 4)):
                arguments[arguments.index(f"--run.{option}") + 1] = str(value)
            if any(ended(start_run(folder, arguments, ranks))):
                sys.exit(f"the run {name} of {ranks} failed")


def counted(train):
    """Training that writes down the reads before the end of each step since that of the step before, by line: those of
    the report on the step before, of the next batch and of the step."""
    advance = RunLog.advance

    def main() -> None:
        found: list[Counter[str]] = []
        with ScalarReads() as reads:

            def noted(log: RunLog, step: int) -> None:
                found.append(Counter(reads.places))
                reads.places.clear()
                advance(log, step)

            RunLog.advance = noted  # type: ignore[method-assign]
            train()
        Path(f"{os.environ['READS']}.{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))

    return main


if __name__ == "__main__":
    main()
