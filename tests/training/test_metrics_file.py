"""metrics.jsonl: strict JSON in every line, and read back whatever a line holds."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from eval.base.processes import start
from training.record.curves import training_curves
from training.record.run_log import RunLog, _forget_after, read_metrics
from training.settings.tree import parse_config

LINES = [
    '{"step": 1, "group": "train", "loss": 1.5, "grad_norm": null}',
    '{"step": 1, "group": "val", "i2t_r1": 3.0}',
    '{"step": 2, "group": "train", "loss": NaN}',  # older runs
    "[1, 2]", "null", "3", '"text"', "", "{}", '{"step": null, "group": "train"}', '{"step": 3, "group": ["train"]}',
    '{"group": "train", "loss": 1}', '{"step": 3, "group": "train", "loss": "low"}', "[" * 100_000,
    '{"step": 4, "group": "train", "loss": 0.5}',
    '{"step": 5, "group": "train", "lo',
]  # fmt: skip


def write(folder: Path) -> Path:
    """A file of these lines that ends in half of a character."""
    path = folder / "metrics.jsonl"
    path.write_bytes("\n".join(LINES).encode() + "é".encode()[:1])
    return path


def test_every_file_is_read(tmp_path: Path) -> None:
    write(tmp_path)
    first, second, last = read_metrics(tmp_path)
    assert (first["step"], first["loss"], last) == (1, 1.5, {"step": 4, "loss": 0.5})
    assert math.isnan(first["grad_norm"]) and math.isnan(second["loss"])
    assert read_metrics(tmp_path, "val") == [{"step": 1, "i2t_r1": 3.0}]
    assert read_metrics(tmp_path / "none") == []
    assert [chart.title for chart in training_curves({"a": tmp_path}, {"a": 0})] == ["Loss"]


def test_a_resumed_run_keeps_the_lines_before_its_step(tmp_path: Path) -> None:
    path = write(tmp_path)
    _forget_after(path, 2, is_validated_again=False)
    assert path.read_text().splitlines() == LINES[:3]


def test_values_that_are_not_finite_are_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config(["--run.out_dir", str(tmp_path), "--run.device", "cpu"])
    with start("cpu") as runtime:
        log = RunLog(config, runtime, step=0, total_steps=2)
        log.scalars(1, {"loss": float("nan"), "samples_per_second": float("inf"), "lr": 0.1})
        log.scalars(1, {"i2t_r1": float("-inf")}, "val")
        log.close()
    rows = [
        json.loads(line, parse_constant=lambda name: pytest.fail(name))
        for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert rows == [
        {"step": 1, "group": "train", "loss": None, "samples_per_second": None, "lr": 0.1},
        {"step": 1, "group": "val", "i2t_r1": None},
    ]
