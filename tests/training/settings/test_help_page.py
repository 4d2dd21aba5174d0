"""training/main.py --help: what a user needs fits two screens; a section tells its options with the preset's values."""

from __future__ import annotations

import dataclasses
import re

import pytest

from longclip_teacher.errors import InputError
from training.settings.help_page import WIDTH
from training.settings.tree import PRESETS, TrainConfig, parse_config

NAMES = sorted(path.stem for path in PRESETS.glob("*.toml"))


def page(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parse_config(args)
    assert not stop.value.code
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


@pytest.mark.parametrize("preset", NAMES)
def test_the_overview_fits_two_screens(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = page(capsys, preset, "--help").splitlines()
    assert len(lines) <= 90
    assert max(map(len, lines)) <= WIDTH


def test_the_overview_tells_how_to_start_and_what_to_set(capsys: pytest.CaptureFixture[str]) -> None:
    shown = page(capsys, "--help")
    assert shown == page(capsys, "-h")
    assert "python training/main.py [PRESET]" in shown
    assert "torchrun --nproc_per_node=4 training/main.py" in shown
    assert "--help SECTION" in shown and "--help all" in shown
    rows = {line.split()[0] for line in shown.splitlines() if line.startswith("  ") and not line.startswith("   ")}
    assert set(NAMES) <= rows
    assert {field.name for field in dataclasses.fields(TrainConfig)} <= rows
    assert {
        *("--data.shards", "--data.val", "--teacher.checkpoint", "--teacher.cache", "--student.variant"),
        *("--student.init", "--loss.NAME", "--optim.lr", "--run.out_dir", "--run.max_steps", "--run.epochs"),
        *("--run.global_batch_size", "--run.device", "--run.precision", "--run.resume"),
    } <= rows


@pytest.mark.parametrize("preset", NAMES)
def test_a_preset_begins_with_one_line_that_says_what_it_is(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    first = (PRESETS / f"{preset}.toml").read_text().splitlines()[0].removeprefix("# ")
    assert re.fullmatch(r"[A-Z].*\.", first)
    assert first in page(capsys, "--help"), "too long for one line of the overview"


def test_a_section_shows_every_option_with_the_values_of_the_preset(capsys: pytest.CaptureFixture[str]) -> None:
    shown = page(capsys, "tiny_teacher", "--help", "loss")
    for field in dataclasses.fields(TrainConfig().loss):
        assert f"--loss.{field.name} " in shown
    assert "--loss.clip_short FLOAT [0.5]" in shown
    assert "--loss.pca_scope global|rank|off [global]" in shown
    assert "--loss.clip_short FLOAT [1.0]" in page(capsys, "longclip_finetune", "--help", "loss")
    assert "--run.max_steps INT|None [None]" in page(capsys, "distill_s0", "--help", "run")
    assert "--run." not in shown.replace("--run.stage", "")


def test_everything_is_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    shown = page(capsys, "--help", "all")
    known = [f"--{section}.{name} " for section, fields in TrainConfig().to_dict().items() for name in fields]
    assert all(option in shown for option in known)
    texts = re.findall(r"^(--\S+) .*\n((?:    .*\n)*)", shown, flags=re.MULTILINE)
    assert len(texts) == len(known)
    assert all(text.strip() for _, text in texts), "every option has a text"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("los", "there is no such section; did you mean loss?"),
        ("lr", "there is no such section; did you mean optim?"),
        ("xyz", "there is no such section: choose one of run, data,"),
    ],
)
def test_an_unknown_section_is_one_line(section: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        parse_config(["--help", section])
    assert "\n" not in str(caught.value)


def test_one_process_of_torchrun_prints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert page(capsys, "--help") == ""
