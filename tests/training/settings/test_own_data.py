"""Runs on other data than the embedded ones: what falls away, what stays because it was named, what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from longclip_teacher.errors import InputError
from training.main import main
from training.settings.options import EMBEDDED_CACHE, EMBEDDED_DATA, DataOptions
from training.settings.own_data import run_config
from training.settings.tree import PRESETS, config_from_toml, config_to_toml, parse_config

OWN = ["--data.shards", "own/*.tar"]
TEACHER = ["--teacher.checkpoint", "longclip-b"]


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.toml")))
def test_presets_on_the_embedded_data_stay_as_they_are(preset: str) -> None:
    assert run_config([preset]) == (parse_config([preset]), [])


@pytest.mark.parametrize(
    "args",
    [
        ["--data.shards", f"{EMBEDDED_DATA}/train/0000*.tar"],
        ["--data.shards", f"./{EMBEDDED_DATA}/train"],
        ["two_stage_image", "--data.images", f"{EMBEDDED_DATA}/digits/val"],
    ],
)
def test_a_part_of_the_embedded_data_is_evaluated_as_all_of_it(args: list[str]) -> None:
    assert run_config(args) == (parse_config(args), [])


def test_other_shards_leave_the_digits_out() -> None:
    config, notes = run_config([*OWN, *TEACHER])
    assert (config.data.val, config.data.tests, config.data.zeroshot) == (None, (), None)
    assert notes == [
        "the default validation, tests and zero-shot set are made of digit scenes: left out, since --data.shards names "
        "other data; give --data.val, --data.tests and --data.zeroshot to evaluate the run"
    ]


@pytest.mark.parametrize(
    ("args", "source"),
    [
        (["two_stage_image", "--data.images", "pictures"], "--data.images"),
        (["two_stage_text", "--data.captions", "a.txt"], "--data.captions"),
    ],
)
def test_loose_files_leave_the_digits_out(args: list[str], source: str) -> None:
    config, (note,) = run_config([*args, *TEACHER])
    assert (config.data.val, config.data.tests, config.data.zeroshot) == (None, (), None)
    assert f"since {source} names other data" in note


def test_what_is_named_stays_and_the_rest_falls_away() -> None:
    config, (note,) = run_config([*OWN, *TEACHER, f"--data.val={DataOptions().val}", "--data.tests"])
    assert (config.data.val, config.data.tests, config.data.zeroshot) == (DataOptions().val, (), None)
    assert note.startswith("the default zero-shot set is made of digit scenes")
    config, notes = run_config(
        [*OWN, *TEACHER, "--data.val", "v", "--data.tests", "a=folder:t", "--data.zeroshot", "z"]
    )
    assert (config.data.val, config.data.tests) == (Path("v"), ("a=folder:t",))
    assert (config.data.zeroshot, config.data.zeroshot_classnames) == (Path("z"), None)
    assert config.data.zeroshot_templates == "openai"
    assert len(notes) == 1 and "classes are named by its folders and prompts are openai's" in notes[0]
    names = ["--data.zeroshot", "z", "--data.zeroshot_classnames", "n.txt", "--data.zeroshot-templates", "simple"]
    config, notes = run_config(names)
    assert (config.data.zeroshot_classnames, config.data.zeroshot_templates) == (Path("n.txt"), "simple")
    assert notes == []


def test_a_preset_of_the_users_own_names_its_fields(tmp_path: Path) -> None:
    preset = tmp_path / "mine.toml"
    preset.write_text('[data]\nshards = ["own/*.tar"]\n[teacher]\ncheckpoint = "longclip-b"\n')
    config, notes = run_config([str(preset)])
    assert config.data.val is None and len(notes) == 1
    preset.write_text(preset.read_text().replace("[teacher]", f'val = "{DataOptions().val}"\n[teacher]'))
    config, notes = run_config([str(preset)])
    assert config.data.val == DataOptions().val and "zero-shot" in notes[0]
    saved = tmp_path / "config.toml"
    saved.write_text(config_to_toml(config))
    assert run_config([str(saved)]) == (config_from_toml(saved), []) == (config, [])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (OWN, r"--teacher\.checkpoint is runs/tiny_teacher by default, .* give --teacher\.checkpoint \(longclip-b"),
        (["dual_teacher", *OWN, *TEACHER], r"give --teacher\.short \(another teacher"),
        (["longclip_text_tower", *OWN, *TEACHER], r"give --init\.text \("),
        (["dr_offline", *OWN, *TEACHER], r"give --teacher\.cache \(a folder that scripts/cache_teacher\.py wrote"),
        (["dr_offline", *OWN], r"give --teacher\.checkpoint"),
        (["two_stage_text", "--data.captions", "a.txt"], r"but --data\.captions names other data"),
    ],
)
def test_the_teacher_of_digits_is_no_default_for_other_data(args: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        run_config(args)
    assert "\n" not in str(caught.value)


def test_a_named_teacher_a_cache_or_none_is_accepted() -> None:
    for args in (
        ["--teacher.checkpoint", "runs/tiny_teacher"],
        ["--teacher.checkpoint", "None"],
        ["tiny_teacher"],  # trains one
        ["dr_offline", *TEACHER, f"--teacher.cache={EMBEDDED_CACHE}"],
    ):
        preset = [args[0]] if not args[0].startswith("-") else []
        config, notes = run_config([*preset, *OWN, *args[len(preset) :]])
        assert config.teacher == parse_config(args).teacher and len(notes) == 1
    config, (_, note) = run_config([*OWN, "--teacher.cache", "own/cache"])
    assert config.teacher.checkpoint is None and config.distils
    assert "the one whose features --teacher.cache own/cache holds" in note


def test_a_run_on_other_shards_knows_no_digits(
    checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").symlink_to(checkout / EMBEDDED_DATA / "train")
    monkeypatch.chdir(tmp_path)
    args = [*OWN, "--teacher.checkpoint", "None", "--run.max_steps", "1", "--run.global_batch_size", "36"]
    monkeypatch.setattr(sys, "argv", ["training/main.py", *args, "--data.num_workers", "0", "--run.out_dir", "run"])
    main()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own", "run"]
    config = config_from_toml(tmp_path / "run" / "config.toml")
    assert (config.data.val, config.data.tests, config.data.zeroshot) == (None, (), None)
    assert not (tmp_path / "run" / "results.json").exists()


def test_a_missing_first_stage_is_not_trained_on_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    args = ["two_stage", *OWN, *TEACHER, "--run.device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["training/main.py", *args])
    with pytest.raises(InputError, match=r"no finished run there; train it on your data first with preset two_stage_"):
        main()
    assert list(tmp_path.iterdir()) == []
