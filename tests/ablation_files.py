"""Grids of an ablation as text, and the folders that their runs leave."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import ablate
from ablation_grid import Job
from longclip_teacher.atomic_files import write_json, write_text
from training.settings.tree import config_to_toml

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


def write_run(job: Job, i2t: float, t2i: float, seconds: float = 60.0) -> None:
    """Write the folder that a run leaves, with these figures on both tests, after one stop and resume."""
    steps, batch = job.config.run.max_steps, job.config.run.global_batch_size
    assert steps is not None
    write_text(job.folder / "config.toml", config_to_toml(job.config))
    evaluated = {"i2t": {"r1": i2t}, "t2i": {"r1": t2i}}
    student = {"twins": evaluated, "random": {"i2t": {"r1": 90.0}, "t2i": {"r1": 80.0}}, "cost": {"params": 5}}
    write_json(job.folder / "results.json", {"models": {"student": student, "teacher": {"twins": evaluated}}})
    rows = (
        [(steps - 1, 2.0 * seconds), (steps, seconds)] if steps > 1 else [(1, seconds)]
    )  # the rate doubles at the end
    lines = [
        {"step": step, "group": "train", "samples_seen": step * batch, "samples_per_second": steps * batch / spent}
        for step, spent in rows
    ]
    write_text(job.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def finish(jobs: Sequence[Job], figures: Callable[[Job], tuple[float, float]]) -> None:
    """Write the runs of `jobs`, each with its figures: R@1 of picture to text and of text to picture."""
    for job in jobs:
        write_run(job, *figures(job))
        assert ablate.is_finished(job)
