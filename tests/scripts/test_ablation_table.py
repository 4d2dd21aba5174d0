"""The ablation's table: seeds are paired, stages counted, and runs that cannot be compared refused."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from scipy.stats import ttest_rel

import ablate
import ablation_runs
from ablation_files import CRD, HEAD, ONE_SEED, STAGES, finish, write_run
from ablation_grid import Grid, make_jobs
from ablation_runs import comparison_conditions, gather, paired_difference
from ablation_table import write_table
from longclip_teacher.atomic_files import write_json
from longclip_teacher.errors import InputError


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
    # 3 steps, two of them at 120 s per run and one at 60 s, then one step at 60 s per run
    assert by_name["second"].runs[0].minutes == pytest.approx((120 * 2 / 3 + 60 / 3 + 60) / 60)
    assert by_name["second"].runs[0].conditions["run.max_steps"] == 4  # three of the stage and one
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
        write_run(job, 1.0, 2.0, seconds=120.0)  # 3 of 4 steps at a rate of 240 s per run, one at 120 s
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


def test_conditions_follow_the_content_of_tests_and_shards(
    grid_of: Callable[..., Grid], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_jobs(grid_of(HEAD), tmp_path)[0]
    before = comparison_conditions(job.config)
    folder = tmp_path / "copy"
    shutil.copytree("data/digit_scenes", folder / "data" / "digit_scenes")
    monkeypatch.chdir(folder)
    for kept in (ablation_runs._shards, ablation_runs._test_digests):
        kept.cache_clear()
    assert comparison_conditions(job.config) == before  # wherever it lies
    caption = next(Path("data/digit_scenes/twins").rglob("*.txt"))
    caption.write_text(caption.read_text().replace("a", "e", 1))
    manifest = Path("data/digit_scenes/train/manifest.json")
    content = json.loads(manifest.read_text())
    content["shards"][0]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(content))
    for kept in (ablation_runs._shards, ablation_runs._test_digests):
        kept.cache_clear()
    after = comparison_conditions(job.config)
    assert {key for key in after if after[key] != before[key]} == {"data.shards", "data.tests"}
    assert after["data.tests"]["random"] == before["data.tests"]["random"]
