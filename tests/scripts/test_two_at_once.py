"""Two builders, two writers of a cache, two ablations at once: the second waits or ends in one line, all is whole."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image

import ablate
import cache_teacher
import eval.compare
import export_datacompdr
import make_digit_scenes
import make_shards
import quickstart
from ablation_files import HEAD, write_run
from ablation_grid import Job
from at_once import at_once
from longclip_teacher import create_teacher, save_teacher
from longclip_teacher.errors import InputError
from longclip_teacher.folder_lock import folder_lock
from training.data.digit_scenes import write_digit_scenes
from training.data.index import ShardIndex


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with captions, their shards, a teacher and its cache."""
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    save_teacher(create_teacher("tiny"), folder / "teacher.safetensors")
    for number in range(40):
        picture = folder / "pictures" / f"{number}.png"
        picture.parent.mkdir(exist_ok=True)
        Image.new("RGB", (6, 4), (number, 0, 99)).save(picture)
        picture.with_suffix(".txt").write_text(f"Row {number}. It is long.")
    for main, command in ((make_shards.main, shards_command(folder)), (cache_teacher.main, cache_command(folder))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", command)
            main()
    return folder


def shards_command(folder: Path, out: Path | None = None) -> list[str]:
    options = ["--images", f"{folder}/pictures", "--shard-size", "5", "--val-share", "0.2", "--workers", "2"]
    return ["make_shards.py", "folder", *options, "--out", str(out or folder / "shards")]


def cache_command(folder: Path, out: Path | None = None) -> list[str]:
    options = ["--shards", f"{folder}/shards", "--teacher", f"{folder}/teacher.safetensors"]
    options += ["--device", "cpu", "--num-workers", "0"]
    return ["cache_teacher.py", *options, "--out", str(out or folder / "cache")]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_ends(ends: Sequence[tuple[int, str]], out: Path) -> None:
    """One at least did the work, and the other ended well after it, or in one line."""
    assert 0 in dict(ends), ends
    for code, printed in ends:
        assert code in (0, 2) and "Traceback" not in printed, ends
        if code:
            assert re.search(rf"^error: {out} is in use by process \d+ on .+", printed, re.MULTILINE), ends


@pytest.mark.parametrize("kind", ["shards", "cache"])
def test_two_at_once_write_what_one_writes(inputs: Path, tmp_path: Path, kind: str) -> None:
    main, command = {
        "shards": (make_shards.main, shards_command(inputs, tmp_path / "out")),
        "cache": (cache_teacher.main, cache_command(inputs, tmp_path / "out")),
    }[kind]
    ends = at_once(main, command, command)
    if kind == "cache":  # its writers share the work
        assert [code for code, _ in ends] == [0, 0], ends
        lines = [line for _, printed in ends for line in printed.splitlines() if line.endswith(".safetensors")]
        assert len({line.split()[-1] for line in lines}) == len(lines) == len(list((tmp_path / "out").glob("*.safe*")))
    else:
        check_ends(ends, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(inputs / kind)
    assert ShardIndex(sorted((inputs / "shards").glob("*.tar"))).num_samples


def test_writers_of_other_settings_do_not_mix_their_sidecars(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ends = at_once(cache_teacher.main, *([*cache_command(inputs, out), "--seed", str(seed)] for seed in (0, 1)))
    assert sorted(code for code, _ in ends) == [0, 2], ends
    assert f"error: {out} holds a cache with other settings: seed is" in "".join(printed for _, printed in ends)
    if ends[0][0] == 0:
        assert contents(out) == contents(inputs / "cache")


@pytest.mark.parametrize("name", ["make_shards", "export_datacompdr", "compare", "quickstart"])
def test_a_folder_in_use_is_refused_in_one_line_and_left_as_it_is(
    inputs: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, teacher = tmp_path / "out", f"{inputs}/teacher.safetensors"
    main, command = {
        "make_shards": (make_shards.main, shards_command(inputs, out)),
        "export_datacompdr": (
            export_datacompdr.main,
            ["", "--shards", f"{inputs}/shards", "--cache", f"{inputs}/cache", "--out", str(out)],
        ),
        "compare": (
            eval.compare.main,
            ["", f"a={teacher}", "--protocols", f"v=folder:{inputs}/shards/val", "--out", str(out)],
        ),
        "quickstart": (quickstart.main, ["", "--out", str(out)]),
    }[name]
    monkeypatch.setattr(sys, "argv", command)
    with folder_lock(out):
        before = contents(out)
        with pytest.raises(InputError, match=rf"\A{out} is in use by process {os.getpid()} on "):
            main()
        assert contents(out) == before


def test_a_builder_of_digit_scenes_waits_for_the_other(tmp_path: Path) -> None:
    out = tmp_path / "scenes"
    sizes = {"num_train": 30, "num_val": 5, "num_test": 5, "num_val_twins": 5}
    options = [word for name, size in sizes.items() for word in (f"--{name.replace('_', '-')}", str(size))]
    command = ["make_digit_scenes.py", "--out", str(out), *options]
    ends = at_once(make_digit_scenes.main, command, command)
    assert [code for code, _ in ends] == [0, 0], ends
    assert sum("already there, left unchanged" in printed for _, printed in ends) == 1, ends
    write_digit_scenes(tmp_path / "alone", **sizes)
    assert contents(out) == contents(tmp_path / "alone")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "scenes"]


def test_two_ablations_at_once_train_each_run_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkout: Path
) -> None:
    """The training is left out: it appends a line to a log and writes its results."""
    monkeypatch.chdir(checkout)
    (tmp_path / "grid.toml").write_text(HEAD)

    def run(job: Job, *_: object) -> None:
        with (tmp_path / "trained.txt").open("a") as file:
            file.write(f"{job.folder.name}\n")
        write_run(job, 50.0, 40.0)
        assert ablate.is_finished(job)

    monkeypatch.setattr(ablate, "_run_job", run)
    command = ["ablate.py", str(tmp_path / "grid.toml"), "--out", str(tmp_path / "out")]
    ends = at_once(ablate.main, command, command)
    assert [code for code, _ in ends] == [0, 0], ends
    assert sorted((tmp_path / "trained.txt").read_text().split()) == ["seed_0", "seed_1"]
    assert (tmp_path / "out" / "table.md").exists()


def test_a_second_quickstart_waits_for_the_first_ones_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = quickstart.Options(teacher=tmp_path / "teacher")

    @contextmanager
    def waited(folder: Path, *, wait: bool) -> Iterator[None]:
        assert folder == options.teacher and wait
        (tmp_path / "teacher").mkdir()
        (tmp_path / "teacher" / quickstart.WEIGHTS).touch()  # the first one ends
        yield

    monkeypatch.setattr(quickstart, "folder_lock", waited)
    monkeypatch.setattr(quickstart, "run_training", lambda *_: pytest.fail("the teacher is trained again"))
    quickstart.make_teacher(options)
