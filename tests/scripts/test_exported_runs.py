"""What scripts/export.py measures of a run stays in its folder and is shown in its report until the weights change."""

from __future__ import annotations

import io
import json
import shutil
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eval.base.processes import start
from eval.towers.models import load_model
from fitted_students import CONTEXT, fitted_student, write_pairs
from longclip_teacher import create_teacher, save_teacher
from longclip_teacher.folder_lock import folder_lock
from longclip_teacher.packages import ONNX, missing_packages
from mobileclip_student import create_student, save_student
from training.generations import verified_text
from training.record.exported import read_exported
from training.record.run_report import judge_run, report_run, write_run_page
from training.settings.options import DataOptions, RunOptions, TeacherOptions
from training.settings.tree import TrainConfig, config_to_toml

if missing_packages((*ONNX, "tokenizers")):
    pytest.skip("the extra export is not installed", allow_module_level=True)

import export
from exporting.measured import record_with_run, teacher_beside
from exporting.sources import load_source


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run that was judged and exported, and what the export printed."""
    place = tmp_path_factory.mktemp("exported")
    out = place / "run"
    save_student(fitted_student(write_pairs(place / "pairs")), out / "best.safetensors")
    shape = create_teacher("tiny", CONTEXT).config
    small = replace(shape, image=replace(shape.image, layers=1), text=replace(shape.text, layers=1))
    save_teacher(create_teacher(small), place / "teacher.safetensors")
    config = TrainConfig(
        run=RunOptions(out_dir=out, device="cpu"),
        data=DataOptions(val=None, zeroshot=None, tests=("pairs=folder:pairs",), num_workers=0),
        teacher=TeacherOptions(checkpoint="teacher.safetensors"),
    )
    (out / "config.toml").write_text(config_to_toml(config))
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.chdir(place)
        with start("cpu") as runtime:
            judged = judge_run(config, runtime, None)
            assert judged is not None
            report_run(config, runtime, judged)
        assert "onnx" not in (out / "report.html").read_text()
        patch.setattr(sys, "argv", ["export.py", str(out), "--out", str(place / "model")])
        export.main()
    return out, printed.getvalue()


@pytest.fixture
def exported(run: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that run; its data are found from the current folder."""
    monkeypatch.chdir(run[0].parent)
    shutil.copytree(run[0], tmp_path / "run")
    return tmp_path / "run"


def test_the_report_of_a_run_shows_its_exported_files_and_its_teacher(run: tuple[Path, str], exported: Path) -> None:
    rows = [[cell for cell in line.strip().split("  ") if cell] for line in run[1].splitlines()]
    assert [len(row) for row in rows if row and row[0].startswith("(the teacher's")] == [3, 3]  # name, bytes, ms
    page = (exported / "report.html").read_text()
    record = json.loads(verified_text(exported / "exported.json"))
    judged = json.loads((exported / "results.json").read_text())["models"]["student"]
    assert set(record["models"]) == {"student_onnx", "teacher_onnx"}
    found = record["models"]["student_onnx"]
    assert found["pairs"] == judged["pairs"] and found["pairs"]["i2t"]["r1"] == 100
    assert found["cost"]["text_ms"] > 0 and record["models"]["teacher_onnx"]["cost"]["image_ms"] > 0
    assert "student_onnx" in page and "teacher_onnx" in page and "in ONNX Runtime, both files together" in page


def test_a_later_report_shows_them_as_long_as_the_weights_are_the_same(exported: Path) -> None:
    model = load_model(exported)
    assert {"student_onnx", "teacher_onnx"} < set(write_run_page(exported, model).models)
    torch.manual_seed(1)
    save_student(create_student("tiny", CONTEXT), exported / "best.safetensors")
    assert set(write_run_page(exported, model).models) == {"student", "teacher"}
    assert "onnx" not in (exported / "report.html").read_text()


def test_a_damaged_record_is_named_and_left_out(exported: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = exported / "exported.json"
    whole = path.read_text()
    assert read_exported(exported).models
    for content in (whole.replace('"image_ms": ', '"image_ms": 1'), "{", whole[:-9]):
        path.write_text(content)
        caplog.clear()
        assert not read_exported(exported).models
        assert f"{path} is damaged" in caplog.text
    (exported / "sha256.json").unlink()  # nor is the record anything that can be shown without its hash
    for content in ("[]", '{"weights_sha256": 1}', "\0"):
        path.write_text(content)
        assert not read_exported(exported).models


def test_a_run_that_is_in_use_or_moved_is_said_in_a_line(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, told = load_source(str(exported)), []
    record = replace(read_exported(exported), conditions=["another"])
    with folder_lock(exported):
        record_with_run(model, record, told.append)
    assert "another" not in (exported / "exported.json").read_text()
    assert told.pop().startswith(f"the report of the run does not show the exported files: {exported} is in use by")
    monkeypatch.chdir(exported)  # where neither the tests nor the teacher lie
    record_with_run(model, record, told.append)
    assert "the report of the run does not show the exported files" in told.pop()
    assert teacher_beside(model, told.append) is None and "which is not here" in told.pop()
