"""The commands as typed. Each starts its own Python, so only a few do; the other tests call main()."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import eval.retrieval
import eval.zeroshot_imagenet
from longclip_teacher import LongCLIP, create_teacher, export_official, load_teacher, save_teacher
from longclip_teacher.config import ImageTowerConfig, TeacherConfig, TextTowerConfig
from longclip_teacher.errors import run_command
from mobileclip_student import create_student, save_student

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def student_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "student.safetensors"
    save_student(create_student("tiny", context_length=32), path)
    return path


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "teacher.safetensors"
    save_teacher(create_teacher("tiny", context_length=32), path)
    return path


def typed(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    command = [sys.executable, f"eval/{script}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def called(command: object, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of a command's main() with these arguments."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    try:
        run_command(command.main)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_retrieval_as_typed(student_file: Path, colour_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out.json"
    arguments = ("--checkpoint", student_file, "--root", colour_folder, "--json", out, "--num-workers", 1)
    ended = typed("retrieval.py", "--protocol", "urban1k", *arguments)
    assert ended.returncode == 0, ended.stderr
    assert "image to text" in ended.stdout and "0 captions cut at 32 tokens" in ended.stdout
    assert "MobileCLIP student tiny, 32 tokens, pads masked, fp32" in ended.stdout
    assert "a right answer among the first k of all 8 captions or 8 pictures" in ended.stdout
    assert ended.stderr.startswith("warning: urban1k has 1000 pictures and 1000 captions, but 8 and 8 were found")
    result = json.loads(out.read_text())
    assert result["protocol"] == "urban1k" and result["num_images"] == result["num_texts"] == 8
    assert result["checkpoint"] == str(student_file) and result["num_truncated"] == 0
    for way in ("i2t", "t2i"):
        assert {"r1", "r5", "r10", "mean_rank", "median_rank"} <= set(result[way])
        assert 0 <= result[way]["r1"] <= result[way]["r5"] <= result[way]["r10"] <= 100
        assert 1 <= result[way]["mean_rank"] <= 8
    assert list(out.parent.iterdir()) == [out]


def test_zeroshot_as_typed(teacher_file: Path, colour_classes: Path, tmp_path: Path) -> None:
    arguments = ("--checkpoint", teacher_file, "--templates", "a photo of a {}.", "--json", tmp_path / "out.json")
    ended = typed("zeroshot_imagenet.py", "--imagenet-val", colour_classes, *arguments)
    assert ended.returncode == 0, ended.stderr
    assert "top-1 %" in ended.stdout
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["num_images"], result["num_classes"], result["num_templates"]) == (24, 8, 1)
    assert 0 <= result["top1"] <= result["top5"] <= 100 and result["dataset"] == str(colour_classes)


def test_without_imagenet_one_line_says_what_to_pass() -> None:
    ended = typed("zeroshot_imagenet.py")
    assert ended.returncode == 2 and ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert "--imagenet-val" in line and "n01440764" in line and "torchvision.datasets.ImageNet" in line


@pytest.mark.parametrize("command", [eval.retrieval, eval.zeroshot_imagenet])
def test_help_teaches(command: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(command, monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    assert "python eval/" in shown and "--checkpoint" in shown
    for option in ("variant", "context-length", "pad-mask", "device", "precision", "batch-size", "num-workers"):
        assert f"--{option}" in shown


def test_the_list_of_protocols(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(eval.retrieval, monkeypatch, "--protocol", "list") == 0
    shown = capsys.readouterr().out
    for name in ("sharegpt4v_1k (1000 pictures, 1000 captions)", "urban1k", "coco2017val", "folder (any number)"):
        assert name in shown


def test_commands_say_what_they_recognised_in_a_published_file(
    student_file: Path, colour_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    image = ImageTowerConfig(size=32, patch=8, width=64, layers=1, heads=1)
    config = TeacherConfig(64, image, TextTowerConfig(width=64, heads=1, layers=1), num_frozen_positions=20)
    published = tmp_path / "longclip-tiny.pt"
    torch.save(export_official(LongCLIP(config)), published)
    arguments = ("--root", colour_folder, "--num-workers", 0, "--device", "cpu", "--checkpoint")
    told = f"command: {published}: CLIP teacher with ViT 64 wide and patch 8, 248 tokens, quickgelu"
    for _ in range(2):  # the second run says it once too
        assert called(eval.retrieval, monkeypatch, *arguments, published) == 0
        assert [line for line in capsys.readouterr().err.splitlines() if "quickgelu" in line] == [told]
    assert called(eval.retrieval, monkeypatch, *arguments, student_file) == 0
    assert "command: " not in capsys.readouterr().err
    load_teacher(published)
    assert capsys.readouterr().err == ""


def test_a_fused_student_gives_the_same_figures(
    student_file: Path, colour_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--checkpoint", student_file, "--root", colour_folder, "--num-workers", 0, "--device", "cpu")
    assert called(eval.retrieval, monkeypatch, *arguments, "--json", tmp_path / "a.json") == 0
    assert called(eval.retrieval, monkeypatch, *arguments, "--json", tmp_path / "b.json", "--reparameterize") == 0
    plain, fused = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert fused.pop("model") == f"{plain.pop('model')}, branches fused" and fused == plain


def test_imagenet_shards_with_seven_templates(
    student_file: Path, colour_classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for number, picture in enumerate(sorted(colour_classes.glob("*/0.png"))):
            for suffix, content in (("png", picture.read_bytes()), ("cls", str(number).encode())):
                info = tarfile.TarInfo(f"{number}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    names = tmp_path / "names.txt"
    names.write_text("\n".join(path.name for path in sorted(colour_classes.iterdir())) + "\n")
    arguments = ("--checkpoint", student_file, "--imagenet-val", tmp_path / "*.tar", "--templates", "simple")
    output = ("--classnames", names, "--json", tmp_path / "out.json", "--num-workers", 0)
    assert called(eval.zeroshot_imagenet, monkeypatch, *arguments, *output) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["num_images"], result["num_classes"], result["num_templates"]) == (8, 8, 7)


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("retrieval", [], "pass --root DIR"),
        ("retrieval", ["--root", "ROOT"], "pass --checkpoint PATH"),
        ("retrieval", ["--root", "ROOT", "--checkpoint", "absent.pt"], "no checkpoint at absent.pt"),
        ("retrieval", ["--root", "absent", "--checkpoint", "STUDENT"], "no folder at absent"),
        ("retrieval", ["--root", "ROOT", "--checkpoint", "STUDENT", "--protocol", "urban"], "did you mean urban1k?"),
        ("retrieval", ["--root", "ROOT", "--checkpoint", "STUDENT", "--protocol", "coco2017val"], "val2017"),
        ("retrieval", ["--root", "ROOT", "--checkpoint", "STUDENT", "--device", "tpu7"], "--device tpu7"),
        ("retrieval", ["--root", "ROOT", "--checkpoint", "STUDENT", "--batch-size", "0"], "--batch-size 0"),
        ("retrieval", ["--root", "ROOT", "--checkpoint", "STUDENT", "--json", "ROOT"], "is a folder"),
        ("retrieval", ["--root", "ROOT", "--checkpoint", "ROOT"], "folder without best.safetensors"),
        ("zeroshot_imagenet", ["--imagenet-val", "ROOT"], "pass --checkpoint PATH"),
        ("zeroshot_imagenet", ["--imagenet-val", "ROOT", "--checkpoint", "STUDENT", "--templates", "x"], "x"),
        ("zeroshot_imagenet", ["--imagenet-val", "absent", "--checkpoint", "STUDENT"], "no class folders"),
        ("zeroshot_imagenet", ["--imagenet-val", "CLASSES", "--checkpoint", "STUDENT", "--classnames", "no"], "no"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(
    command: str,
    arguments: list[str],
    message: str,
    student_file: Path,
    colour_folder: Path,
    colour_classes: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"ROOT": colour_folder, "CLASSES": colour_classes, "STUDENT": student_file}
    module = {"retrieval": eval.retrieval, "zeroshot_imagenet": eval.zeroshot_imagenet}[command]
    assert called(module, monkeypatch, *(places.get(argument, argument) for argument in arguments)) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ") and message in line and captured.out == ""


def test_a_teacher_has_nothing_to_fuse(
    teacher_file: Path, colour_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--checkpoint", teacher_file, "--root", colour_folder, "--reparameterize")
    assert called(eval.retrieval, monkeypatch, *arguments) == 2
    assert "leave --reparameterize out" in capsys.readouterr().err
