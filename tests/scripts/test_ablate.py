"""The ablation: grids are read, shares split, runs run or skipped, and incomparable runs refused."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import pytest
from PIL import Image
from scipy.stats import ttest_rel

import ablate
import ablation_runs
import training.main
from ablation_grid import Grid, Job, check_jobs, make_jobs, read_grid
from ablation_runs import comparison_facts, gather, paired_difference
from ablation_table import write_table
from longclip_teacher.atomic_files import write_json, write_text
from longclip_teacher.errors import InputError
from training.settings.losses import FEATURE_LOSSES, PAIR_LOSSES, LossOptions
from training.settings.tree import config_to_toml

GRIDS = Path(__file__).resolve().parents[2] / "scripts" / "grids"
HEAD = """
preset = "digit_scenes"
baseline = "none"
seeds = [0, 1]
values = { cache = "somewhere" }
[overrides]
run = { max_steps = 4, global_batch_size = 36 }
data = { num_workers = 0, val = "None", zeroshot = "None" }
loss = { clip_long = 1.0, clip_short = 0.5, crd_long = 0.0, crd_short = 0.0 }
[[variant]]
name = "none"
group = "control"
"""
ONE_SEED = HEAD.replace("[0, 1]", "[0]")
CRD = """
[[variant]]
name = "crd"
group = "relational"
overrides.loss.crd_long = 4.0
"""
STAGES = """
[[variant]]
name = "first"
overrides.run.max_steps = 3
[[variant]]
name = "second"
after = ["first"]
overrides = ["--run.max_steps", "1", "--student.init", "{run:first}/last.safetensors"]
"""


@pytest.fixture
def grid_of(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Grid]:
    """Read a grid from its text, in a checkout that has the data."""
    monkeypatch.chdir(checkout)

    def read(text: str, *settings: str) -> Grid:
        path = tmp_path / "grid.toml"
        path.write_text(text)
        return read_grid(path, settings)

    return read


def write_run(job: Job, i2t: float, t2i: float, seconds: float = 60.0) -> None:
    """Write the folder that a run leaves, with these figures on both tests, after one stop and resume."""
    steps, batch = job.config.run.max_steps, job.config.run.global_batch_size
    assert steps is not None
    write_text(job.folder / "config.toml", config_to_toml(job.config))
    judged = {"i2t": {"r1": i2t}, "t2i": {"r1": t2i}}
    student = {"twins": judged, "random": {"i2t": {"r1": 90.0}, "t2i": {"r1": 80.0}}, "cost": {"params": 5}}
    write_json(job.folder / "results.json", {"models": {"student": student, "teacher": {"twins": judged}}})
    rows = (
        [(steps - 1, 2.0 * seconds), (steps, seconds)] if steps > 1 else [(1, seconds)]
    )  # the rate doubles at the end
    lines = [
        {"step": step, "group": "train", "samples_seen": step * batch, "samples_per_second": steps * batch / spent}
        for step, spent in rows
    ]
    write_text(job.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def finish(jobs: Sequence[Job], figures: Callable[[Job], tuple[float, float]]) -> None:
    for job in jobs:
        write_run(job, *figures(job))
        assert ablate.is_finished(job)


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
overrides.teacher.checkpoint = "longclip-b"
overrides.speed.compile = true
"""
    )
    settings = ("cache=x y", "optim.lr=0.5", "loss.crd_long=2", "data.tests='a b=folder:c' d=folder:e")
    jobs = {(job.variant.name, job.seed): job for job in make_jobs(grid_of(text, *settings), Path("out"))}
    assert [key for key in jobs if key[1] == 1] == [(name, 1) for name in ("none", "first", "second", "cached")]
    cached = jobs["cached", 1].config
    assert cached.data.shards == ("a/{000..003}.tar", "x y/*.tar")
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
    assert losses["none"].active == {"clip_long", "clip_short"}
    for name in set(PAIR_LOSSES) - {"clip", "affinity"}:  # affinity's gradient is crd's
        assert losses[name].active - losses["none"].active == {f"{name}_long", f"{name}_short"}
    for name in FEATURE_LOSSES:
        assert losses[name].active - losses["none"].active == {f"{name}_image", f"{name}_text"}
    for name in ("masked_fd", "hidden_text"):
        assert losses[name].active - losses["none"].active == {name}

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


# --- the table ---


def test_paired_differences_are_students_interval() -> None:
    ours, base = {0: 41.0, 1: 52.5, 2: 47.0, 5: 99.0}, {2: 40.0, 1: 50.0, 0: 39.5, 7: 1.0}
    found = paired_difference(ours, base)
    interval = ttest_rel([41.0, 52.5, 47.0], [39.5, 50.0, 40.0]).confidence_interval(0.95)
    assert found.num_seeds == 3
    assert found.value == pytest.approx((1.5 + 2.5 + 7.0) / 3)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert paired_difference({0: 2.0}, {0: 1.0, 1: 5.0}) == ablation_runs.Difference(1.0, None, None, 1)


def test_rows_pair_seeds_and_count_stages(grid_of: Callable[..., Grid], tmp_path: Path) -> None:
    grid = grid_of(HEAD + STAGES + CRD)
    jobs = make_jobs(grid, tmp_path)
    scores = {"none": 30.0, "first": 99.0, "second": 40.0, "crd": 50.0}
    finish(
        [job for job in jobs if (job.variant.name, job.seed) != ("second", 1)],
        lambda job: (scores[job.variant.name] + 4 * job.seed * (job.variant.name == "crd"), 10 + job.seed),
    )
    rows = gather(grid, jobs)
    assert [row.variant.name for row in rows] == ["crd", "second", "none"]  # the best first; a stage has no row
    by_name = {row.variant.name: row for row in rows}
    # 3 steps, two of them at 120 s a run and one at 60 s, then one step at 60 s a run
    assert by_name["second"].runs[0].minutes == pytest.approx((120 * 2 / 3 + 60 / 3 + 60) / 60)
    assert by_name["second"].runs[0].facts["run.max_steps"] == 4  # three of the stage and one
    assert by_name["second"].settings.startswith("run.max_steps 1, student.init ")
    assert by_name["crd"].settings == "loss.crd_long 4.0"
    difference = by_name["crd"].differences["score"]
    assert difference.value == pytest.approx(11.0) and difference.num_seeds == 2
    # the two differences are 10 and 12: their mean is 11, its half width 12.706 sd / sqrt 2 with sd = sqrt 2
    assert (difference.low, difference.high) == pytest.approx((11 - 12.706, 11 + 12.706), abs=1e-3)
    assert by_name["none"].differences == {}

    markdown = write_table(tmp_path, grid, rows)
    line = next(line for line in markdown.splitlines() if line.startswith("| crd "))
    assert line.startswith(
        "| crd | relational | 2 | 31.2 ± 1.8 | +11.0 [-1.7, +23.7] | 52.0 ± 2.8 | 10.5 ± 0.7 | 90.0 ± 0.0"
    )
    assert "second (1 of 2)" in markdown
    table = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [row["variant"] for row in table] == ["crd", "second", "none"]
    assert float(table[0]["score_difference"]) == pytest.approx(11.0)
    assert float(table[0]["twins_i2t_r1_sd"]) == pytest.approx(8**0.5)
    assert table[2]["score_difference"] == ""
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["variants"]["crd"]["seeds"]["1"]["twins_i2t_r1"] == 54.0


def test_minutes_are_those_of_the_log(grid_of: Callable[..., Grid], tmp_path: Path) -> None:
    grid = grid_of(ONE_SEED)
    jobs = make_jobs(grid, tmp_path)
    for job in jobs:
        write_run(job, 1.0, 2.0, seconds=120.0)  # 3 of 4 steps at a rate of 240 s a run, one at 120 s
        ablate.is_finished(job)
    assert gather(grid, jobs)[0].runs[0].minutes == pytest.approx((240 * 3 / 4 + 120 / 4) / 60)


def test_without_retrieval_tests_the_score_is_zero_shot(grid_of: Callable[..., Grid], tmp_path: Path) -> None:
    grid = grid_of(ONE_SEED, "data.tests=", "data.zeroshot=data/digit_scenes/digits/val")
    (job,) = make_jobs(grid, tmp_path)
    write_run(job, 1.0, 2.0)
    write_json(job.folder / "results.json", {"models": {"student": {"zeroshot": {"top1": 12.5}}}})
    assert ablate.is_finished(job)
    rows = gather(grid, [job])
    assert rows[0].runs[0].figures == {"score": 12.5, "zeroshot_top1": 12.5}
    assert "| none | control | 1 | 12.5 | – | 12.5 | " in write_table(tmp_path, grid, rows)


def test_without_the_baseline_there_are_no_differences(grid_of: Callable[..., Grid], tmp_path: Path) -> None:
    grid = grid_of(HEAD + CRD)
    jobs = make_jobs(grid, tmp_path)
    assert gather(grid, jobs) == []
    finish([job for job in jobs if job.variant.name == "crd"], lambda job: (1.0, 2.0))
    rows = gather(grid, jobs)
    assert [row.differences for row in rows] == [{}]
    assert "none (0 of 2)" in write_table(tmp_path, grid, rows)


@pytest.mark.parametrize(
    ("override", "field", "told"),
    [
        ("data.shards = 'data/digit_scenes/train/*0.tar'", "data.shards", "samples in 1 shards"),
        ("data.tests = ['twins=folder:data/digit_scenes/random']", "data.tests", "twins"),
        ("data.val = 'data/digit_scenes/twins'", "data.val", "folder"),
        ("run.max_steps = 5", "run.max_steps", "is 5 in the first, 4 in the second"),
        ("run.global_batch_size = 40", "run.global_batch_size", "is 40 in the first, 36 in the second"),
        ("run.stage = 'text'", "run.stage", "is text in the first, both in the second"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused_unless_it_is_declared(
    grid_of: Callable[..., Grid], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, field: str, told: str
) -> None:
    text = f"{ONE_SEED}{CRD}overrides.{override}\n"
    grid = grid_of(text)
    jobs = make_jobs(grid, tmp_path)
    if field == "data.shards":  # the checkout has one shard: name it as another
        monkeypatch.setattr(ablation_runs, "_shards", lambda patterns: f"samples in 1 shards of {patterns}")
    finish(jobs, lambda job: (1.0, 2.0))
    with pytest.raises(InputError) as error:
        gather(grid, jobs)
    message = str(error.value)
    assert f"{tmp_path}/crd/seed_0 and {tmp_path}/none/seed_0 cannot be compared: {field} is" in message
    assert told in message and "\n" not in message

    grid = grid_of(text + f'differs = ["{field}"]\n')
    rows = gather(grid, make_jobs(grid, tmp_path))
    assert f"**not the same: {field} " in write_table(tmp_path, grid, rows)


def test_seeds_of_a_variant_that_differs_must_agree_with_each_other(
    grid_of: Callable[..., Grid], tmp_path: Path
) -> None:
    grid = grid_of(HEAD + CRD + 'differs = ["run.max_steps"]')
    jobs = make_jobs(grid, tmp_path)
    finish(jobs, lambda job: (1.0, 2.0))
    log = tmp_path / "crd" / "seed_1" / "metrics.jsonl"
    log.write_text(log.read_text().replace('"step": 4', '"step": 3'))
    with pytest.raises(InputError, match=r"crd/seed_1 and .*crd/seed_0 cannot be compared: run.max_steps is 3"):
        gather(grid, jobs)


def test_facts_follow_the_content_of_tests_and_shards(
    grid_of: Callable[..., Grid], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_jobs(grid_of(HEAD), tmp_path)[0]
    before = comparison_facts(job.config)
    folder = tmp_path / "copy"
    shutil.copytree("data/digit_scenes", folder / "data" / "digit_scenes")
    monkeypatch.chdir(folder)
    for kept in (ablation_runs._shards, ablation_runs._test_digests):
        kept.cache_clear()
    assert comparison_facts(job.config) == before  # wherever it lies
    caption = next(Path("data/digit_scenes/twins").rglob("*.txt"))
    caption.write_text(caption.read_text().replace("a", "e", 1))
    manifest = Path("data/digit_scenes/train/manifest.json")
    content = json.loads(manifest.read_text())
    content["shards"][0]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(content))
    for kept in (ablation_runs._shards, ablation_runs._test_digests):
        kept.cache_clear()
    after = comparison_facts(job.config)
    assert {key for key in after if after[key] != before[key]} == {"data.shards", "data.tests"}
    assert after["data.tests"]["random"] == before["data.tests"]["random"]
