"""A killed and resumed run equals an uninterrupted one, bit by bit; checkpoints that do not fit are refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from longclip_teacher.errors import InputError
from training.checkpointing import TrainState, find_checkpoint, load_checkpoint
from training.record.run_log import read_metrics
from training.resume import RunInputs, changes_since
from training.settings.tree import REMOVED, parse_config

MAIN = Path(__file__).resolve().parents[2] / "training" / "main.py"
STEPS = 9  # 7 per epoch, so the resumed part crosses an epoch boundary
ARGS = [
    "--run.max_steps", str(STEPS), "--run.global_batch_size", "40", "--run.save_every", "2", "--run.log_every", "1",
    "--run.resume", "auto", "--data.val", "None", "--data.zeroshot", "None", "--data.tests", "--data.num_workers", "1",
    "--captions.short", "sampled", "--captions.long_from_epoch", "1", "--captions.max_shift", "20",
    "--loss.fd_image", "0.5", "--loss.fd_text", "0.5", "--mix.erase", "0.5",
    "--optim.ema", "0.9", "--optim.layer_decay", "0.8", "--optim.image_lr_share", "0.5", "--optim.schedule", "constant",
]  # fmt: skip


def launch(checkout: Path, out_dir: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(MAIN), *ARGS, "--run.out_dir", str(out_dir)], cwd=checkout, env=environment
    )


@pytest.fixture(scope="module")
def whole(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("whole") / "run"
    assert launch(checkout, out_dir).wait(timeout=180) == 0
    return out_dir


def test_killed_and_resumed_equals_never_killed(checkout: Path, whole: Path, tmp_path: Path) -> None:
    out_dir = tmp_path / "run"
    process = launch(checkout, out_dir)
    last = out_dir / "checkpoints" / "last.pt"
    deadline = time.monotonic() + 120
    while not last.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run must not have ended by itself"
    assert torch.load(last, weights_only=True)["step"] < STEPS
    assert launch(checkout, out_dir).wait(timeout=180) == 0

    ours, reference = (torch.load(run / "checkpoints" / "last.pt", weights_only=True) for run in (out_dir, whole))
    assert ours["step"] == reference["step"] == STEPS
    for part in ("distiller", "ema"):
        assert ours[part].keys() == reference[part].keys()
        for name, value in reference[part].items():
            assert torch.equal(ours[part][name], value), (part, name)
    for number, moments in reference["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(ours["optimizer"]["state"][number][name], value), (number, name)
    losses = [[(row["step"], row["loss"]) for row in read_metrics(run)] for run in (out_dir, whole)]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == list(range(1, STEPS + 1))


def test_the_weights_of_a_run_are_the_average(whole: Path) -> None:
    checkpoint = torch.load(whole / "checkpoints" / "last.pt", weights_only=True)
    weights, average = load_file(whole / "last.safetensors"), checkpoint["ema"]
    assert weights.keys() == average.keys()
    assert all(torch.equal(weights[name], value) for name, value in average.items())
    for name, value in average.items():  # the last weights differ; counters are not averaged
        assert torch.equal(checkpoint["distiller"][f"model.{name}"], value) != value.is_floating_point(), name


def test_a_folder_that_holds_a_run_is_refused_unless_resumed(whole: Path) -> None:
    with pytest.raises(InputError, match=r"holds a run: give --run\.resume auto"):
        find_checkpoint(parse_config(["--run.out_dir", str(whole), "--run.resume", "never"]))
    with pytest.raises(InputError, match=r"no checkpoint at nothing\.pt"):
        find_checkpoint(parse_config(["--run.resume", "nothing.pt"]))


def test_checkpoints_of_other_settings_or_damaged_ones_are_refused(whole: Path, tmp_path: Path) -> None:
    last = whole / "checkpoints" / "last.pt"
    inputs = RunInputs.from_dict(torch.load(last, weights_only=True)["inputs"])
    state = TrainState(None, None, None, inputs)  # type: ignore[arg-type]  # refused before it is touched
    config = parse_config(ARGS)
    for section, name, before, value in (
        ("run", "seed", "0", 1),
        ("data", "captions", r"\[\]", ("a.txt",)),
        ("mix", "erase", "0.5", 0.25),
        ("init", "freeze_text", "False", True),
        ("optim", "ema", "0.9", None),
        ("optim", "lr", "0.004", 0.001),
        ("optim", "weight_decay", r"0\.\d+", 0.3),
        ("optim", "betas", r"\[0\.9, 0\.98\]", (0.9, 0.9)),
    ):
        other = replace(config, **{section: replace(getattr(config, section), **{name: value})})
        with pytest.raises(
            InputError, match=rf"of a run with {section}\.{name} = {before}, this one has .*: use another"
        ):
            load_checkpoint(last, state, other)
    truncated = tmp_path / "last.pt"
    truncated.write_bytes(last.read_bytes()[:5000])
    with pytest.raises(InputError, match="not a whole torch weight file"):
        load_checkpoint(truncated, state, config)
    torch.save({"weights": torch.zeros(2)}, truncated)
    with pytest.raises(InputError, match="is not a training checkpoint"):
        load_checkpoint(truncated, state, config)


def test_a_checkpoint_from_before_an_option_was_removed_is_still_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config(ARGS)
    saved = config.to_dict()
    saved["speed"] = {"trim": False}  # as runs had it before --speed.reference
    saved["loss"]["gone"] = 0.0
    monkeypatch.setitem(REMOVED, "loss.gone", (0.0, "use --loss.vrd_long"))
    inputs = RunInputs(total_steps=9, world_size=1, stream_workers=None, data={}, teachers={})
    assert changes_since(Path("last.pt"), 5, saved, inputs, config, inputs) == []
    saved["loss"]["gone"] = 1.0
    with pytest.raises(InputError, match=r"last\.pt: --loss\.gone is gone: use --loss\.vrd_long"):
        changes_since(Path("last.pt"), 5, saved, inputs, config, inputs)
