"""The quickstart from data to report, with trainings of two steps in this process instead of under torchrun."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import mean, stdev
from types import ModuleType

import pytest
import torch

import cache_teacher
import training.main
from eval.measures.figures import format_figure
from eval.towers.models import load_model
from longclip_teacher.errors import InputError
from longclip_teacher.packages import ONNX, missing_packages
from training.record.run_log import read_metrics

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "quickstart.py"
FIGURES = {
    "i2t_r1", "t2i_r1", "random_i2t_r1", "random_t2i_r1", "zeroshot_top1", "params", "bytes", "image_ms", "text_ms",
}  # fmt: skip
MODELS = ["teacher", "distilled", "undistilled", "cut77", "reparameterized"]
EXPORTED = [] if missing_packages(ONNX) else ["teacher_onnx", "distilled_onnx"]


@pytest.fixture
def quickstart(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Load the script as a module, in its own folder that shares the checkout's data and teacher."""
    for name in ("data", "runs"):
        (tmp_path / name).mkdir()
    (tmp_path / "data" / "digit_scenes").symlink_to(checkout / "data" / "digit_scenes")
    (tmp_path / "runs" / "tiny_teacher").symlink_to(checkout / "runs" / "tiny_teacher")
    monkeypatch.chdir(tmp_path)
    specification = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "quickstart", module)  # tyro looks up the module of the options
    threads = torch.get_num_threads()
    specification.loader.exec_module(module)
    yield module
    torch.set_num_threads(threads)


@pytest.fixture
def launched(quickstart: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Record the commands that would be launched, and run them here, trainings on batches of 36."""
    commands: list[list[str]] = []

    def run(command: list[str]) -> int:
        commands.append(command)
        if str(quickstart.CACHE_SCRIPT) in command:
            arguments = command[command.index(str(quickstart.CACHE_SCRIPT)) :]
            monkeypatch.setattr(sys, "argv", arguments)
            cache_teacher.main()
            return 0
        arguments = command[command.index(str(quickstart.TRAINING_SCRIPT)) + 1 :]
        small = ["--run.global_batch_size", "36", "--data.num_workers", "0"]
        monkeypatch.setattr(sys, "argv", ["training/main.py", *arguments, *small])
        training.main.main()
        return 0

    monkeypatch.setattr(quickstart, "launch", run)
    monkeypatch.setattr("training.record.run_report.judge_run", lambda *_: None)  # each run's report has another test
    return commands


def call(quickstart: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *arguments])
    quickstart.main()


def test_two_seeds_from_data_to_report_without_the_extra(
    quickstart: ModuleType,
    launched: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(quickstart, "ONNX", ("torch", "no_such_package"))
    call(quickstart, monkeypatch, "--steps", "2", "--seeds", "0", "3", "--processes", "2")
    out = tmp_path / "runs" / "quickstart"
    results = json.loads((out / "results.json").read_text())

    assert set(results) == {"seconds", "models", "standard_deviations", "seeds"}
    assert list(results["models"]) == MODELS
    for name, figures in results["models"].items():
        assert set(figures) == FIGURES, name
    for name in MODELS[1:]:
        values = [results["seeds"][seed][name]["t2i_r1"] for seed in ("0", "3")]
        assert results["models"][name]["t2i_r1"] == pytest.approx(mean(values))
        assert results["standard_deviations"][name]["t2i_r1"] == pytest.approx(stdev(values))
        assert results["models"][name]["bytes"] == (out / name / "best.safetensors").stat().st_size
    assert results["models"]["reparameterized"]["params"] < results["models"]["distilled"]["params"]

    assert load_model(out / "cut77").context_length == 77
    assert load_model(out / "distilled_seed3").context_length == 248
    fused, plain = load_model(out / "reparameterized"), load_model(out / "distilled")
    picture = torch.rand(2, 3, 48, 48)
    torch.testing.assert_close(fused.encode_image(picture), plain.encode_image(picture), atol=1e-5, rtol=0)

    assert len(launched) == 7  # the teacher's pass, and three students of each seed
    check_stored_features(out, quickstart.STUDENTS)
    assert all(
        command[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] for command in launched
    )
    printed, told = capsys.readouterr()
    assert "left out of the table: it needs no_such_package: pip install 'compact-longclip[export]'" in told
    assert "onnx" not in printed.lower() and all(name in printed for name in MODELS)
    words = " ".join(printed.split())
    assert "cannot pass 25%" in words
    # 96 x 49,408 of the teacher's weights are its vocabulary, 64 x 49,408 of the student's
    assert "the merged student has 0.30 M parameters: 44% of the teacher's 0.67 M" in words
    lines = [line for line in printed.splitlines() if " M " in line]  # of the table
    rows = {line.split()[0]: line for line in lines if line.split()[0] in MODELS}
    assert list(rows) == MODELS[:4]  # the students as they are used: reparameterized
    params = {name: format_figure(results["models"][name]["params"], "count") for name in MODELS}
    assert params["reparameterized"] != params["distilled"]
    assert params["reparameterized"] in rows["distilled"] and params["distilled"] not in rows["distilled"]
    conditions = (
        "%: R@1 among twins 40 pictures and 40 captions, random 40 pictures and 40 captions; zero-shot top-1 of",
        "ms: batch 1, float32, cpu, 1 thread, median of 30 calls; students with branches merged (reparameterized)",
    )
    assert all(condition in words for condition in conditions)
    page = (out / "report.html").read_text()
    assert all(condition in page for condition in conditions)
    # captions cut; validation after each of the two steps, both ways; one logged step makes no curve
    assert page.count("<svg") == 3 and "twins, caption → picture: captions cut" in page
    assert page.count("data:image") > 10
    assert "http://" not in page.replace("http://www.w3.org/", "")  # SVG's namespaces name no place to load from


def check_stored_features(out: Path, students: Iterable[str]) -> None:
    """The students learn from the cache, but for the one without a teacher."""
    for name in students:
        is_distilled = name != "undistilled"
        assert ("vrd_long" in read_metrics(out / name)[0]) == is_distilled
        assert ("teacher_cache" in (out / name / "config.toml").read_text()) == is_distilled


def test_a_second_call_trains_nothing_again_and_compares_the_exported_models_too(
    quickstart: ModuleType,
    launched: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    call(quickstart, monkeypatch, "--steps", "1", "--out", "first")
    weights = {name: Path("first", name, "best.safetensors").read_bytes() for name in quickstart.STUDENTS}
    first = json.loads(Path("first/results.json").read_text())
    assert set(first) == {"seconds", "models"}
    call(quickstart, monkeypatch, "--steps", "1", "--out", "first")
    second = json.loads(Path("first/results.json").read_text())
    for name in MODELS + EXPORTED:
        for figure in FIGURES - {"image_ms", "text_ms"}:
            assert second["models"][name][figure] == first["models"][name][figure]
    for name, content in weights.items():
        assert Path("first", name, "best.safetensors").read_bytes() == content
    for name in quickstart.STUDENTS:
        steps = [json.loads(line) for line in Path("first", name, "metrics.jsonl").read_text().splitlines()]
        assert sum(row["group"] == "train" for row in steps) == 1
    if EXPORTED:
        check_exported_rows(first["models"], capsys.readouterr().out, Path("first/report.html").read_text())


def check_exported_rows(models: dict[str, dict[str, float]], printed: str, page: str) -> None:
    for exported, source in (("teacher_onnx", "teacher"), ("distilled_onnx", "reparameterized")):
        assert set(models[exported]) == FIGURES and models[exported]["params"] == models[source]["params"]
        assert 0.5 < models[exported]["bytes"] / models[source]["bytes"] < 1.1
        assert sum(line.split()[:1] == [exported] for line in printed.splitlines()) == 2  # of two calls
        assert f"{exported}</th>" in page
    words = " ".join(printed.split())
    assert "_onnx: exported, in ONNX Runtime, both files together; the others in PyTorch" in words
    ratio = f"{models['teacher_onnx']['image_ms'] / models['distilled_onnx']['image_ms']:.1f}"
    assert f"it encodes a picture {ratio} times as fast" in words


def test_a_missing_teacher_is_trained_first(
    quickstart: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str]) -> int:
        commands.append(command)
        return 0

    monkeypatch.setattr(quickstart, "launch", run)
    quickstart.make_teacher(quickstart.Options(teacher=Path("runs/other_teacher"), teacher_steps=7))
    command = commands[0]
    assert "tiny_teacher" in command
    assert command[command.index("--run.out_dir") + 1] == "runs/other_teacher"
    assert command[command.index("--run.max_steps") + 1] == "7"
    quickstart.make_teacher(quickstart.Options())  # this one is there
    assert len(commands) == 1


def test_a_failed_command_ends_in_one_line_with_its_exit_code(
    quickstart: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quickstart, "launch", lambda command: 3)
    with pytest.raises(
        InputError, match=r"cache_teacher\.py failed with exit code 3 in runs/quickstart/teacher_cache"
    ) as error:
        call(quickstart, monkeypatch)
    assert "\n" not in str(error.value)


def test_a_launched_command_has_one_thread_and_prints_to_stderr(
    quickstart: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    program = "import os, sys; print('threads', os.environ['OMP_NUM_THREADS']); sys.exit(3)"
    assert quickstart.launch([sys.executable, "-c", program]) == 3
    assert capfd.readouterr() == ("", "threads 1\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "1", "1"], "--seeds 1 1"),
        (["--seed", "-1"], "--seeds -1"),
        (["--processes", "3"], "divides the batch of 128"),
        (["--processes", "0"], "--processes 0"),
        (["--steps", "0"], "--steps 0"),
        (["--teacher-steps", "-2"], "--teacher-steps -2"),
    ],
)
def test_bad_options_are_refused_before_any_work(
    quickstart: ModuleType, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(quickstart, "make_data", lambda data: pytest.fail("work was begun"))
    with pytest.raises(InputError, match=message):
        call(quickstart, monkeypatch, *arguments)
