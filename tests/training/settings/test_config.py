"""Presets, overrides and the one-line errors of the configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from longclip_teacher.errors import InputError
from training.settings.checks import check_config
from training.settings.tree import PRESETS, REMOVED, TrainConfig, config_from_toml, config_to_toml, parse_config


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.toml")))
def test_every_preset_parses_checks_and_survives_its_own_toml(preset: str, tmp_path: Path) -> None:
    config = parse_config([preset])
    check_config(config, world_size=1)
    path = tmp_path / "config.toml"
    path.write_text(config_to_toml(config))
    assert config_from_toml(path) == config
    header = (PRESETS / f"{preset}.toml").read_text().split("[run]")[0]
    assert "Command:" in header
    assert "Cost:" in header


def test_the_command_line_wins_over_the_preset(tmp_path: Path) -> None:
    preset = tmp_path / "mine.toml"
    preset.write_text(
        '[run]\nmax_steps = 7\nseed = 3\n[data]\nshards = ["a.tar", "b.tar"]\nval = "None"\n[optim]\nbetas = [0.8, '
        "0.9]\n"
    )
    config = parse_config(
        [str(preset), "--run.max_steps", "9", "--loss.clip-long=0.25", "--teacher.checkpoint", "None"]
    )
    assert (config.run.max_steps, config.run.seed) == (9, 3)
    assert config.data.shards == ("a.tar", "b.tar")
    assert config.data.val is None
    assert config.optim.betas == (0.8, 0.9)
    assert config.loss.clip_long == 0.25
    assert not config.distils


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["tiny_techer"], "did you mean tiny_teacher"),
        (["--run.max_step", "3"], "there is no run.max_step; did you mean run.max_steps"),
        (["--lr", "3"], "there is no lr; did you mean optim.lr"),
        (["--run.max_steps", "three"], r"^--run\.max_steps takes None\|INT, got 'three'$"),
        (["--run.seed", "x"], r"^--run\.seed takes INT, got 'x'$"),
        (["--run.max_steps", "0"], "max_steps must be at least 1"),
        (["--run.train", "both"], "invalid choice 'both'"),
        (["--optim.lr", "-1"], "lr must be positive"),
        (["--loss.pca_rank", "0"], "pca_rank must be at least 1"),
        (["--augment.scale", "0.9", "1.5"], "augment scale"),
        (["digit_scenes", "stray"], "stray"),
    ],
)
def test_bad_arguments_are_one_line(args: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_config(args)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[run]\nmax_step = 3\n", "there is no run.max_step; did you mean run.max_steps"),
        ("[runn]\nmax_steps = 3\n", "did you mean run.max_steps"),
        ("[run\n", "is not TOML"),
        ("run = 3\n", "there is no run"),
    ],
)
def test_bad_preset_files_are_one_line(text: str, message: str, tmp_path: Path) -> None:
    preset = tmp_path / "mine.toml"
    preset.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        parse_config([str(preset)])
    assert str(preset) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("args", "world_size", "message"),
    [
        (["--run.global_batch_size", "30"], 4, "does not divide by 4 processes"),
        (["--run.global_batch_size", "32"], 1, "PCA of rank 32 does nothing on 32 samples"),
        (["--run.global_batch_size", "64", "--loss.pca_scope", "rank"], 2, "PCA of rank 32 does nothing on 32 samples"),
        (["--run.accumulation", "64"], 4, "more than the 32 samples per process"),
        (
            ["--teacher.checkpoint", "None", "--loss.clip_long", "0", "--loss.clip_short", "0"],
            1,
            "nothing is left to learn from",
        ),
        (["--teacher.init", "x.safetensors"], 1, "belongs to --run.train teacher"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_before_any_work(
    args: list[str], world_size: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        check_config(parse_config(args), world_size)


def test_a_batch_just_above_the_rank_is_allowed() -> None:
    check_config(parse_config(["--run.global_batch_size", "33"]), 1)
    check_config(parse_config(["--run.global_batch_size", "32", "--loss.pca_scope", "off"]), 1)


def removed_fields() -> list[str]:
    known = {f"{section}.{name}" for section, fields in TrainConfig().to_dict().items() for name in fields}
    return sorted(set(REMOVED) - known)


@pytest.mark.parametrize("field", removed_fields())
def test_a_removed_field_says_what_replaced_it(field: str, tmp_path: Path) -> None:
    neutral, instead = REMOVED[field]
    with pytest.raises(InputError) as caught:
        parse_config([f"--{field}", str(neutral)])
    assert str(caught.value) == f"the command line: --{field} is gone: {instead}"
    section, name = field.split(".")
    old = tmp_path / "config.toml"
    old.write_text(f"[{section}]\n{name} = {'false' if neutral is True else neutral + 1}\n")
    for read in (config_from_toml, lambda path: parse_config([str(path)])):
        with pytest.raises(InputError) as caught:
            read(old)
        assert str(caught.value) == f"{old}: --{field} is gone: {instead}"


def test_the_configuration_of_an_old_run_is_read_without_what_is_gone(tmp_path: Path) -> None:
    old = tmp_path / "config.toml"
    config = parse_config(["tiny_teacher"])
    sections = config.to_dict()
    assert "speed.trim" in removed_fields()
    text = config_to_toml(config)
    for field in removed_fields():
        section, name = field.split(".")
        assert name not in sections[section]
        text = text.replace(f"[{section}]\n", f"[{section}]\n{name} = {str(REMOVED[field][0]).lower()}\n")
    old.write_text(text)
    assert text.count("trim = true") == 1
    assert config_from_toml(old) == config
    assert parse_config([str(old)]) == config


@pytest.mark.parametrize("option", [["--data.shards", "a.tar", "caf\udce9/b.tar"], ["--run.out_dir", "caf\udce9"]])
def test_a_name_that_config_toml_cannot_hold_is_refused(option: list[str]) -> None:
    with pytest.raises(
        InputError, match=rf"\A{option[0]} caf\udce9.*: config\.toml cannot hold a name that is not UTF-8"
    ):
        check_config(parse_config(option), world_size=1)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--captions.short", "sampled", "--loss.clip_short", "0", "--loss.vrd_short", "0"], "no loss reads"),
        (["--captions.max_shift", "9", "--loss.clip_short", "0", "--loss.vrd_short", "0"], "no loss reads"),
        (["--captions.short", "sampled", "--teacher.cache", "datacompdr"], "set --captions.short given"),
        (["--captions.long_from_epoch", "2", "--teacher.cache", "runs/cache"], "leave --teacher.cache out"),
        (["--captions.target", "full"], "set --captions.short sampled"),
        (["--captions.short", "sampled", "--captions.target", "full", "--run.train", "teacher"], "needs a teacher"),
        (
            ["--captions.short", "sampled", "--captions.target", "full", "--captions.long_from_epoch", "1"],
            "long_from_e",
        ),
        (["--captions.keep", "0.5", "0.2"], "0 <= low <= high <= 1"),
        (["--captions.drop_first", "1.5"], "a probability"),
        (["--captions.max_shift", "-1"], "must not be negative"),
        (["--captions.long_from_epoch", "-1"], "counts from 0"),
        (["--captions.sub_captions", "0"], "must be at least 1"),
        (["--captions.sub_captions", "2"], "read by no loss"),
        (["--loss.clip_sub", "1", "--teacher.cache", "datacompdr"], "captions of their own"),
        (["--loss.clip_sub", "1", "--run.stage", "text"], "set --loss.clip_long 0"),
    ],
)
def test_captions_that_cannot_be_sampled_so_are_refused(args: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_config(parse_config(["digit_scenes", "--teacher.cache", "None", *args]), world_size=1)
