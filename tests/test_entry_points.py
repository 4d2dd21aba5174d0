"""The commands as users type them, and bad input: one clear line, exit code 2, nothing lost."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from longclip_teacher.errors import run_command
from training.main import main
from training.record.run_log import read_metrics

ROOT = Path(__file__).resolve().parent.parent
OTHER_LOSSES = ("clip_long", "clip_short", "crd_long", "crd_short")
SHORT = [
    "--run.max_steps", "2", "--run.global_batch_size", "36", "--data.num_workers", "0", "--data.val", "None",
    "--data.zeroshot", "None", "--data.tests",
]  # fmt: skip


def command(*args: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def test_torchrun_trains_evaluates_and_reports(checkout: Path, tmp_path: Path) -> None:
    done = command(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4", str(ROOT / "training/main.py"),
        "--run.max_steps", "3", "--run.global_batch_size", "64", "--run.log_every", "1", "--run.out_dir", str(tmp_path
        / "run"), cwd=checkout,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results["models"]) == {"student", "teacher"}
    for model in results["models"].values():
        assert model["twins"]["num_images"] == 40
        assert 0 <= model["twins"]["i2t"]["r1"] <= 100
        assert model["zeroshot"]["num_classes"] == 10
    assert "twins" in done.stdout
    report = (tmp_path / "run" / "report.html").read_text()
    assert "data:image" in report or "<svg" in report
    for name in (
        "config.toml",
        "environment.json",
        "metrics.jsonl",
        "best.safetensors",
        "last.safetensors",
        "checkpoints/last.pt",
    ):
        assert (tmp_path / "run" / name).stat().st_size > 0, name
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4  # 3 steps and a validation


@pytest.mark.parametrize(
    "args",
    [
        ["--run.precision", "bf16", "--loss.fd_image", "1", "--loss.fd_text", "1"],
        ["--run.precision", "fp16", "--run.accumulation", "2"],
        ["--loss.pca_scope", "off", "--loss.share_identical_captions", "True", "--optim.clip_grad_norm", "None"],
        ["--loss.fd_image", "1", *(word for name in OTHER_LOSSES for word in (f"--loss.{name}", "0"))],
        ["--student.context_length", "77", "--student.pad_mask", "False"],
    ],
    ids=lambda args: " ".join(args[:4]),
)
def test_every_kind_of_setting_takes_a_step(
    args: list[str], checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkout)
    options = [*SHORT, "--run.out_dir", str(tmp_path / "run"), "--run.log_every", "1", *args]
    monkeypatch.setattr(sys, "argv", ["training/main.py", *options])
    main()
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2]
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)
    for row in rows:
        assert row["loss"] > 0
        # fp16 begins with a gradient scale that overflows: such a step is skipped and the scale halved
        assert row["grad_norm"] > 0 or state["scaler"]["scale"] < 2**16
    assert all(value.isfinite().all() for value in state["distiller"].values())


@pytest.mark.parametrize(
    "script",
    [
        "training/main.py",
        *(f"eval/{name}.py" for name in ("retrieval", "zeroshot_imagenet", "probes", "long_captions", "agreement")),
        *(f"eval/{name}.py" for name in ("cost", "leakage", "compare")),
        "scripts/quickstart.py",
        "scripts/ablate.py",
        "scripts/bench.py",
        "scripts/gpu_check.py",
        "scripts/cache_teacher.py",
        "scripts/export_datacompdr.py",
        "scripts/plan_run.py",
    ],
)
def test_help_teaches(script: str, tmp_path: Path) -> None:
    done = command(str(ROOT / script), "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 100  # the lines depend on the versions of Python and tyro
    assert "usage" in done.stdout.lower()


def refused(args: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The one line that `training/main.py ARGS` ends in."""
    monkeypatch.setattr(sys, "argv", ["training/main.py", *args])
    with pytest.raises(SystemExit) as stop:
        run_command(main)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def add(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    shard.addfile(member, io.BytesIO(content))


def write_bad_shard(path: Path, picture: bytes) -> None:
    with tarfile.open(path, "w") as shard:
        for i in range(200):
            add(shard, f"{i:04d}.jpg", picture)
            add(shard, f"{i:04d}.txt", b"A picture. It cannot be read.")


def test_bad_input_ends_in_one_line(
    checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkout)
    (tmp_path / "empty.tar").write_bytes(b"")
    write_bad_shard(tmp_path / "truncated.tar", b"\xff\xd8\xff\xe0" + bytes(100))
    write_bad_shard(tmp_path / "text.tar", b"this is no picture")
    (tmp_path / "code.pt").write_bytes(pickle.dumps(os.getcwd))
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pt")
    (tmp_path / "short.safetensors").write_bytes((checkout / "runs/tiny_teacher/best.safetensors").read_bytes()[:9000])
    (tmp_path / "bad.toml").write_text("[loss]\nclip_lang = 1\n")
    teacher = ["--teacher.checkpoint", "runs/tiny_teacher"]  # named: other data are not given to it by default
    cases = [
        ([*teacher, "--data.shards", "nowhere/*.tar"], "nowhere"),
        ([*teacher, "--data.shards", str(tmp_path / "empty.tar")], "empty.tar"),
        ([*teacher, "--data.shards", str(tmp_path / "truncated.tar")], "fix the data"),
        ([*teacher, "--data.shards", str(tmp_path / "text.tar")], "not a picture"),
        ([*teacher, "--data.shards", "pipe:cat x.tar"], "pipe:"),
        (["--teacher.checkpoint", str(tmp_path / "missing.pt")], "missing.pt"),
        (["--teacher.checkpoint", str(tmp_path / "code.pt")], "code.pt"),
        (["--teacher.checkpoint", str(tmp_path / "other.pt")], "other.pt"),
        (["--teacher.checkpoint", str(tmp_path / "short.safetensors")], "short.safetensors"),
        (["--student.variant", "s9"], "s9"),
        (["--student.init", str(tmp_path / "missing.pt")], "missing.pt"),
        ([str(tmp_path / "bad.toml")], "did you mean loss.clip_long"),
        (["--run.global_batch_size", "32"], "PCA of rank 32 does nothing on 32 samples"),
        (["--run.global_batch_size", "301"], "301"),
        (["--run.device", "cuda:9"], "cuda:9"),
        (["--data.tests", "twins"], "NAME=PROTOCOL:FOLDER"),
        (["--data.val", "nowhere"], "nowhere"),
        (["--data.shards", "own/*.tar"], "give --teacher.checkpoint (longclip-b"),
    ]
    for number, (args, words) in enumerate(cases):
        out_dir = tmp_path / f"run{number}"
        preset = [args.pop(0)] if args[0].endswith(".toml") else []
        line = refused([*preset, *SHORT, "--run.out_dir", str(out_dir), *args], capsys, monkeypatch)
        assert words in line, line
        assert not (out_dir / "checkpoints").exists()


def test_a_loss_that_is_not_finite_names_the_batch_and_keeps_the_checkpoint(
    checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkout)
    args = [*SHORT, "--run.max_steps", "6", "--run.save_every", "1", "--run.out_dir", str(tmp_path / "run")]
    line = refused([*args, "--optim.lr", "1e30", "--optim.clip_grad_norm", "None"], capsys, monkeypatch)
    assert "is not finite (" in line and "loss nan" in line and "the last checkpoint is as it was" in line
    report = json.loads((tmp_path / "run" / "nonfinite_rank0.json").read_text())
    assert len(report["keys"]) == 36
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)["step"] == report["step"]
