"""Every command answers --help and a refused option before it imports what it works with."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benches.start_up import ANSWERS, COMMANDS

ROOT = Path(__file__).resolve().parent.parent
SLOW = {
    *("torch", "torchvision", "timm", "open_clip", "sklearn", "matplotlib", "scipy", "fsspec", "datasets"),
    *("webdataset", "safetensors", "huggingface_hub", "tensorboard", "transformers", "jaxtyping", "ftfy", "sacrebleu"),
}


def imported(done: subprocess.CompletedProcess[str]) -> set[str]:
    """Top-level packages that a python run with -X importtime imported."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        cwd=ROOT, env={**os.environ, "COLUMNS": "100"}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_all_commands_are_found() -> None:
    assert {"training/main.py", "eval/compare.py", "eval/retrieval.py", "scripts/bench.py"} <= set(COMMANDS)
    assert len(COMMANDS) >= 17


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS.keys())
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_answers_before_its_slow_imports(command: str, answer: str) -> None:
    done = run(command, answer)
    told = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    if answer == "--help":
        assert done.returncode == 0 and len(done.stdout.splitlines()) > 10 and not told
    else:
        assert done.returncode == 2 and not done.stdout
        assert len(told) == 1 and told[0].startswith("error: ")
    assert "tyro" in imported(done)
    assert not imported(done) & SLOW


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("eval/cost.py", ["--repeat", "3"], "Unrecognized options: --repeat, 3; did you mean --repeats?"),
        ("eval/retrieval.py", ["--batch-size", "x"], "error: --batch-size takes INT, got 'x'"),
        ("eval/cost.py", ["--precision", "fp8"], "'fp8' for argument '--precision'"),
        ("eval/cost.py", ["--checkpoint", "x", "--threads", "0"], "--threads 0: 1 or more"),
        ("eval/compare.py", ["x", "--num-workers", "-1", "--protocols", "a=folder:b"], "--num-workers -1"),
        ("eval/retrieval.py", ["--checkpoint", "x"], "pass --root DIR"),
        ("eval/agreement.py", ["--root", "x"], "pass --teacher PATH"),
        ("eval/probes.py", ["--train", "x"], "pass --test DIR"),
        ("eval/leakage.py", ["--train", "x"], "pass the benchmark"),
        ("scripts/make_shards.py", ["coc"], "Available subcommands: sharegpt4v, coco"),
        ("scripts/make_digit_scenes.py", ["--seed", "-1"], "--seed must be 0 or more"),
        ("scripts/ablate.py", [], "Missing from scripts/ablate.py: PATH TOML file of the grid"),
        ("scripts/quickstart.py", ["--seeds", "1", "1"], "give different whole numbers"),
        ("scripts/cache_teacher.py", ["--views", "-1"], "--views, --seed and --num-workers must be 0 or more"),
        ("scripts/bench.py", ["recal"], "no bench 'recal'"),
    ],
)
def test_a_refused_value_is_one_line_without_slow_imports(command: str, arguments: list[str], message: str) -> None:
    done = run(command, *arguments)
    told = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2 and len(told) == 1, told
    assert message in told[0]
    assert not imported(done) & SLOW


def test_the_other_processes_of_torchrun_leave_the_error_to_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        done = run("eval/retrieval.py", "--no-such-option")
        told = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
        assert done.returncode == 2 and len(told) == lines


@pytest.mark.parametrize("name", ["longclip_teacher", "mobileclip_student", "training.losses"])
def test_a_package_imports_its_parts_when_they_are_used(name: str) -> None:
    assert not imported(run("-c", f"import {name}")) & SLOW
    package = importlib.import_module(name)
    for public in package.__all__:
        importlib.import_module(f"{name}.{package._MODULE_OF[public]}")  # also after the module itself was imported
        assert getattr(package, public) is getattr(sys.modules[f"{name}.{package._MODULE_OF[public]}"], public)
    assert set(package.__all__) == set(package._MODULE_OF)
    with pytest.raises(AttributeError, match="no_such_name"):
        package.no_such_name  # noqa: B018
