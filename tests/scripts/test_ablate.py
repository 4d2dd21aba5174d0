"""The ablation: grids are read, shares split, runs run or skipped, and incomparable runs refused."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import pytest
from PIL import Image

import ablate
import training.main
from ablation_files import CRD, HEAD, ONE_SEED, STAGES, write_run
from ablation_grid import Grid, check_jobs, make_jobs, read_grid
from longclip_teacher.atomic_files import write_text
from longclip_teacher.errors import InputError
from training.losses.table import LOSSES
from training.settings.losses import LossOptions

GRIDS = Path(__file__).resolve().parents[2] / "scripts" / "grids"


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["ablate.py", *arguments])
    ablate.main()


# --- end to end ---


def test_the_smoke_grid_from_runs_to_table(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(checkout)
    launched: list[list[str]] = []

    def run_here(command: list[str], log_file: Path, tick: Callable[[], None]) -> int:
        launched.append(command)
        tick()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", command[1:])
            training.main.main()
        return 0

    monkeypatch.setattr(ablate, "launch", run_here)
    smoke, out = str(GRIDS / "digits_smoke.toml"), tmp_path / "smoke"
    arguments = (smoke, "--out", str(out), "--set", "run.max_steps=2")
    call(monkeypatch, *arguments, "--dry-run")
    assert capsys.readouterr().out.count("training/main.py digit_scenes") == 2
    assert not out.exists() and not launched

    call(monkeypatch, *arguments)
    found = json.loads((out / "results.json").read_text())["variants"]
    assert set(found) == {"none", "crd"}
    for name, variant in found.items():
        run = json.loads((out / name / "seed_0" / "results.json").read_text())["models"]["student"]
        ways = [run["twins"][way]["r1"] for way in ("i2t", "t2i")]
        assert [variant["mean"][f"twins_{way}_r1"] for way in ("i2t", "t2i")] == ways
        assert variant["mean"]["score"] == pytest.approx(mean(ways))
        assert variant["facts"]["run.max_steps"] == 2
        assert variant["facts"]["data.shards"].startswith("300 samples in ")
        assert variant["mean"]["minutes"] > 0
    assert found["crd"]["settings"] == "loss.crd_long 4.0, loss.crd_short 1.0"
    gain = found["crd"]["mean"]["score"] - found["none"]["mean"]["score"]
    assert found["crd"]["difference"]["score"] == {"value": pytest.approx(gain), "interval": None}
    assert (out / "commands.txt").read_text().splitlines() == [" ".join(command) for command in launched]
    assert (out / "table.md").read_text() in capsys.readouterr().out
    assert Image.open(out / "table.png").size[0] > 800

    call(monkeypatch, *arguments)
    assert len(launched) == 2  # both were already finished
    call(monkeypatch, smoke, "--out", str(out), "--report")  # a report takes the runs as they are
    with pytest.raises(InputError, match=r"none/seed_0 is a finished run with optim.lr = 0.004, but 0.5 in the grid"):
        call(monkeypatch, *arguments, "optim.lr=0.5")


def test_a_failed_run_is_recorded_and_the_rest_go_on(
    grid_of: Callable[..., Grid], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, broken = tmp_path / "out", True
    jobs = {job.folder: job for job in make_jobs(grid_of(ONE_SEED + STAGES + CRD), out)}

    def launch(command: list[str], log_file: Path, tick: Callable[[], None]) -> int:
        folder = log_file.parent
        if broken and folder.parent.name == "first":
            log_file.write_text("".join(f"line {i}\n" for i in range(40)) + "error: no such teacher\nafterwards\n")
            return 2
        if broken and folder.parent.name == "crd":
            return 0  # but leaves nothing
        write_run(jobs[folder], 10.0, 20.0)
        return 0

    monkeypatch.setattr(ablate, "launch", launch)
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, str(tmp_path / "grid.toml"), "--out", str(out))
    assert stop.value.code == 1
    failure = json.loads((out / "first/seed_0/failed.json").read_text())
    assert failure["problem"] == "exit code 2"
    assert failure["log"][-3:] == ["line 39", "error: no such teacher", "afterwards"] and len(failure["log"]) == 15
    assert "training/main.py" in failure["command"]
    assert "first/seed_0 is not finished" in json.loads((out / "second/seed_0/failed.json").read_text())["problem"]
    assert "without results.json" in json.loads((out / "crd/seed_0/failed.json").read_text())["problem"]
    told = capsys.readouterr()
    assert "first seed 0 failed: exit code 2 (error: no such teacher)" in told.err
    assert "| none |" in told.out and "second (0 of 1), crd (0 of 1)" in told.out

    broken = False
    call(monkeypatch, str(tmp_path / "grid.toml"), "--out", str(out))
    assert not list(out.rglob("failed.json"))
    assert "| second |" in (out / "table.md").read_text()


def test_runs_train_side_by_side_after_their_stages(
    grid_of: Callable[..., Grid], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    jobs = {job.folder: job for job in make_jobs(grid_of(ONE_SEED + STAGES + CRD), out)}
    both, order = threading.Barrier(2), list[str]()

    def launch(command: list[str], log_file: Path, tick: Callable[[], None]) -> int:
        folder = log_file.parent
        name = folder.parent.name
        if name in ("none", "first"):  # the first two wait for each other, so they must run at once
            both.wait(timeout=30)
        order.append(name)
        tick()
        write_run(jobs[folder], 10.0, 20.0)
        return 0

    monkeypatch.setattr(ablate, "launch", launch)
    call(monkeypatch, str(tmp_path / "grid.toml"), "--out", str(out), "--at-once", "2")
    assert sorted(order) == ["crd", "first", "none", "second"] and order.index("second") > order.index("first")
    assert "| second |" in (out / "table.md").read_text()
    with pytest.raises(InputError, match="--at-once 0: give 1 or more"):
        call(monkeypatch, str(tmp_path / "grid.toml"), "--at-once", "0")


def test_a_launched_command_adds_to_its_log_while_the_clock_ticks(tmp_path: Path) -> None:
    ticks: list[int] = []
    program = "import os, sys, time; print('threads', os.environ['OMP_NUM_THREADS']); time.sleep(1.3); sys.exit('bad')"
    log = tmp_path / "log.txt"
    log.write_text("before\n")
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    assert ablate.launch([sys.executable, "-c", program], log, lambda: ticks.append(1)) == 1
    assert log.read_text() in (f"before\nthreads {threads}\nbad\n", f"before\nbad\nthreads {threads}\n")
    assert ticks


def test_ctrl_c_ends_the_training_too(tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    program = "import time, pathlib; time.sleep(3); pathlib.Path('late').touch()"
    with pytest.raises(KeyboardInterrupt):
        ablate.launch(["env", "-C", str(tmp_path), sys.executable, "-c", program], tmp_path / "log", interrupt)
    assert not (tmp_path / "late").exists()


# --- the grid ---


def test_overrides_settings_and_placeholders(grid_of: Callable[..., Grid]) -> None:
    text = (
        HEAD
        + STAGES
        + """
[[variant]]
name = "cached"
preset = "small_student"
overrides.data = { shards = ["a/{000..003}.tar", "{cache}/*.tar"], zeroshot_templates = "a {}." }
overrides.teacher.checkpoint = "teachers/seed_{seed}"
overrides.speed.compile = true
"""
    )
    settings = ("cache=x y", "optim.lr=0.5", "loss.crd_long=2", "data.tests='a b=folder:c' d=folder:e")
    jobs = {(job.variant.name, job.seed): job for job in make_jobs(grid_of(text, *settings), Path("out"))}
    assert [key for key in jobs if key[1] == 1] == [(name, 1) for name in ("none", "first", "second", "cached")]
    cached = jobs["cached", 1].config
    assert cached.data.shards == ("a/{000..003}.tar", "x y/*.tar")
    assert [jobs["cached", seed].config.teacher.checkpoint for seed in (0, 1)] == ["teachers/seed_0", "teachers/seed_1"]
    assert (cached.data.zeroshot_templates, cached.speed.compile, cached.student.variant) == ("a {}.", True, "small")
    assert (cached.optim.lr, cached.loss.crd_long, cached.run.max_steps) == (0.5, 2.0, 4)  # --set wins over the grid
    assert cached.data.tests == ("a b=folder:c", "d=folder:e")
    assert (cached.run.seed, cached.run.out_dir) == (1, Path("out/cached/seed_1"))
    second = jobs["second", 1]
    assert second.config.student.init == "out/first/seed_1/last.safetensors"
    assert second.config.run.max_steps == 1  # a variant's own override wins over all
    assert second.stages == (Path("out/first/seed_1"),)
    assert second.command(1)[1].endswith("training/main.py")
    assert second.command(3)[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3"]


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        (HEAD + CRD.replace("crd_long", "crd_lang"), [], r"variant crd: .*did you mean loss.crd_long"),
        (HEAD + CRD.replace("4.0", "-1.0"), [], "variant crd: .*must not be negative"),
        (HEAD + CRD + "overrides.run.global_batch_size = 30", [], "variant crd: PCA of rank 32"),
        (HEAD + CRD + "overrides.data.tests = []", [], "variant crd has no test"),
        (HEAD + CRD + "colour = 3", [], "crd: unknown key colour"),
        (HEAD + CRD + 'differs = ["loss.crd_long"]', [], "crd: differs may name data.shards"),
        (HEAD + CRD + 'after = ["nothing"]', [], "crd comes after nothing"),
        (HEAD + STAGES.replace('"first"\n', '"first"\nafter = ["second"]\n'), [], "first after second after first"),
        (HEAD + STAGES.replace('after = ["first"]', ""), [], "name first in its `after`"),
        (HEAD + CRD + 'overrides.student.init = "{cash}"', [], "{cash} has no value"),
        (HEAD + CRD.replace("crd", "none", 1), [], "two variants are called none"),
        (HEAD + CRD.replace('"crd"', '"a/b"'), [], "it names a folder"),
        (HEAD + "overrides.loss = 3", [], "overrides.loss is a section"),
        (HEAD + 'overrides = ["3"]', [], "overrides begin with --section.field"),
        (HEAD.replace("[0, 1]", "[0, 0]"), [], "give different whole numbers"),
        (HEAD.replace('baseline = "none"', 'baseline = "nine"'), [], "the baseline nine is not a variant"),
        (HEAD.replace('baseline = "none"\n', ""), [], "there is no baseline"),
        ("variant = 3", [], "there is no preset"),
        ("[", [], "is not TOML"),
        (HEAD, ["cash=3"], "--set cash: neither"),
        (HEAD, ["optim.lr"], "--set optim.lr: write"),
        (HEAD, ["data.tests='a"], "No closing quotation"),
        (HEAD, ["optim.lt=3"], "there is no optim.lt"),
    ],
)
def test_a_bad_grid_is_refused_in_one_line(
    grid_of: Callable[..., Grid], text: str, settings: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        check_jobs(make_jobs(grid_of(text, *settings), Path("out")), 1)
    assert "\n" not in str(error.value)


def losses_of(grid: Grid, name: str) -> LossOptions:
    """Parse a variant's loss overrides without the cost of parsing a complete configuration."""
    given = {key[5:]: words[0] for key, words in grid.variants[name].overrides.items() if key.startswith("loss.")}
    return LossOptions(**{field: type(getattr(LossOptions(), field))(value) for field, value in given.items()})


def test_the_stamp_grid_is_valid_and_covers_every_loss(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    grid = read_grid(GRIDS / "stamps.toml", ["data.shards=a/*.tar"])
    losses = {name: losses_of(grid, name) for name in grid.variants}
    active = {name: {term.name for term in found.terms(with_teacher=True)} for name, found in losses.items()}
    assert active["none"] == {"clip_long", "clip_short"}
    for loss in LOSSES:
        if loss.name != "clip" and loss.family != "layer":
            # sub-captions are more data, not another loss: the grid compares losses on the same captions
            parts = set(loss.parts) - {"sub"}
            assert active[loss.name] - active["none"] == {loss.option(part) for part in parts}
    assert active["hidden_text"] - active["none"] == {"hidden_text"}

    # two variants stand for all that change only the losses
    kinds = ("", "stages", "cache", "reading", "width")
    others = {name for name, variant in grid.variants.items() if variant.group in kinds}
    jobs = {job.variant.name: job for job in make_jobs(grid, Path("out")) if job.seed == 0}
    check_jobs([jobs[name] for name in (*others, "none", "fd", "hidden_text")], 2)
    stages = [jobs[name].config.run.max_steps or 0 for name in ("image_stage", "text_stage", "two_stage")]
    assert sum(stages) == jobs["fd"].config.run.max_steps
    assert jobs["two_stage"].config.init.image == "out/image_stage/seed_0"
    assert jobs["two_stage"].config.data.shards == jobs["image_stage"].config.data.shards == ("a/*.tar",)


# --- shares ---


@pytest.mark.parametrize("num_shares", [1, 2, 3, 7, 40])
def test_shares_are_disjoint_whole_and_keep_stages_together(grid_of: Callable[..., Grid], num_shares: int) -> None:
    grid = grid_of(HEAD.replace("[0, 1]", "[0, 1, 2]") + STAGES + CRD)
    jobs = make_jobs(grid, Path("out"))
    shares = [ablate.share_jobs(grid, jobs, k, num_shares) for k in range(1, num_shares + 1)]
    assert sorted(str(job.folder) for share in shares for job in share) == sorted(str(job.folder) for job in jobs)
    sizes = [len(share) for share in shares]
    assert max(sizes) <= -(-9 // num_shares) * 2
    for share in shares:
        folders = [job.folder for job in share]
        for place, job in enumerate(share):
            assert set(job.stages) <= set(folders[:place])


def test_parts_and_only_run_their_share_and_report_gathers_all(
    grid_of: Callable[..., Grid], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, out = str(tmp_path / "grid.toml"), tmp_path / "out"
    jobs = {job.folder: job for job in make_jobs(grid_of(ONE_SEED + STAGES + CRD), out)}
    launched: list[str] = []

    def launch(command: list[str], log_file: Path, tick: Callable[[], None]) -> int:
        launched.append(log_file.parent.parent.name)
        write_run(jobs[log_file.parent], 10.0, 20.0)
        return 0

    monkeypatch.setattr(ablate, "launch", launch)
    call(monkeypatch, grid, "--out", str(out), "--part", "2/3")
    assert launched == ["first", "second"]
    assert not (out / "table.md").exists()
    call(monkeypatch, grid, "--out", str(out), "--only", "crd")
    assert launched == ["first", "second", "crd"]
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "3")
    call(monkeypatch, grid, "--out", str(out))
    assert launched == ["first", "second", "crd", "none"]
    call(monkeypatch, grid, "--out", str(out), "--report")
    assert set(json.loads((out / "results.json").read_text())["variants"]) == {"none", "second", "crd"}
    assert len(launched) == 4
    with pytest.raises(InputError, match="--only cdr: the grid has none, first, second, crd"):
        call(monkeypatch, grid, "--out", str(out), "--only", "cdr")


@pytest.mark.parametrize(
    ("part", "environment", "expected"),
    [
        (None, {}, (1, 1)),
        ("2/8", {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "6"}, (2, 8)),
        (None, {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "4"}, (1, 4)),
        (None, {"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "1"}, (4, 4)),
        (None, {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "3"}, None),
        ("0/4", {}, None),
        ("5/4", {}, None),
        ("half", {}, None),
    ],
)
def test_the_share_of_a_task(part: str | None, environment: dict[str, str], expected: tuple[int, int] | None) -> None:
    if expected is None:
        with pytest.raises(InputError, match="K/N"):
            ablate.share_of(part, environment)
    else:
        assert ablate.share_of(part, environment) == expected


def test_the_clock_counts_what_is_left_of_this_call(
    grid_of: Callable[..., Grid], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablate, "time", SimpleNamespace(monotonic=lambda: 130.0))
    first, second, third, fourth = make_jobs(grid_of(HEAD + CRD), tmp_path)
    write_text(second.folder / "metrics.jsonl", json.dumps({"step": 2, "group": "train"}) + "\n")  # half done
    clock = ablate.Clock([first, second, third, fourth], started=100.0)
    assert clock.total == 4 + 2 + 4 + 4 and clock.eta() == "–"
    clock.finish(first)
    clock.finish(second)
    assert clock.eta() == "40 s"  # after 6 of 14 steps in 30 seconds
    write_text(third.folder / "metrics.jsonl", json.dumps({"step": 1, "group": "train"}) + "\n")
    assert clock.eta(third) == "30 s"
