"""Going on with a run after something has changed: what is told, what is refused, finished runs and longer ones."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longclip_teacher import create_teacher, save_teacher
from longclip_teacher.errors import InputError
from mobileclip_student import create_student
from mobileclip_student.model import override, variant_config
from training.data.byte_index import scan_tar
from training.data.writer import write_shard
from training.main import main
from training.optim import learning_rate
from training.record.run_log import read_metrics
from training.resume import RunInputs, changes_since, other_processes
from training.settings.options import EMBEDDED_DATA, EMBEDDED_TEACHER, OptimOptions
from training.settings.tree import TrainConfig, config_from_toml, parse_config

MAIN = Path(__file__).resolve().parents[2] / "training" / "main.py"
ARGS = [
    "--data.shards", "own/*.tar", "--teacher.checkpoint", "teacher", "--run.global_batch_size", "36",
    "--run.out_dir", "run", "--run.device", "cpu", "--data.num_workers", "0", "--run.log_every", "1",
]  # fmt: skip
INPUTS = RunInputs(total_steps=4, world_size=1, stream_workers=None, data={}, teachers={})
Train = Callable[..., list[str]]


@pytest.fixture
def train(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Train:
    """Trains in a folder of its own with a copy of shards and teacher; gives what was told about resuming."""
    shutil.copytree(checkout / EMBEDDED_DATA / "train", tmp_path / "own")
    shutil.copytree(checkout / EMBEDDED_TEACHER, tmp_path / "teacher")
    (tmp_path / "sets").symlink_to(checkout / EMBEDDED_DATA)
    monkeypatch.chdir(tmp_path)

    def run(steps: int, *args: str) -> list[str]:
        caplog.clear()
        monkeypatch.setattr(sys, "argv", ["training/main.py", *ARGS, "--run.max_steps", str(steps), *args])
        main()
        return [record.message for record in caplog.records if record.name in ("training.agreement", "training.loop")]

    return run


def steps_done(run: Path = Path("run")) -> int:
    return torch.load(run / "checkpoints" / "last.pt", weights_only=True)["step"]


def test_a_finished_run_says_so_and_remakes_its_report(train: Train) -> None:
    val = ["--data.val", "sets/val_twins"]
    assert train(2, *val) == []
    written = (path for path in sorted(Path("run").rglob("*")) if path.is_file())
    kept = [path for path in written if path != Path("run/sha256.json")]  # which gains the results' hash
    before = [path.read_bytes() for path in kept]
    told = train(2, *val)
    assert told == ["run is finished: all 2 steps are done (a larger --run.max_steps extends it)"]
    told = train(2, "--data.val", "sets/random", "--data.tests", "random=folder:sets/random")
    assert told == [
        "resuming with --data.val sets/random instead of sets/val_twins",
        "resuming with --data.tests random=folder:sets/random instead of (nothing)",
        "run is finished: all 2 steps are done (a larger --run.max_steps extends it)",
    ]
    assert [path.read_bytes() for path in kept] == before
    assert json.loads(Path("run/results.json").read_text())["models"]["student"]["random"]["num_images"] == 40
    report = Path("run/report.html").read_text()
    assert "mean R@1 on sets/val_twins" in report  # the set by which the weights were chosen


def test_a_finished_run_is_extended(train: Train) -> None:
    val = ["--data.val", "sets/val_twins", "--optim.lr", "0.01"]
    train(2, *val)
    schedule = OptimOptions(lr=0.01)
    ended, goes_on, last = (learning_rate(at, total, schedule) for at, total in ((1, 2), (2, 5), (4, 5)))
    (told,) = train(5, *val)
    assert told == (
        "the finished run of 2 steps is extended to 5: the learning rate follows the cosine schedule of 5 steps; it "
        f"was {ended:.3g} at step 2, goes on with {goes_on:.3g} at step 3 and ends with {last:.3g}"
    )
    rows = read_metrics(Path("run"))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["lr"] for row in rows[2:]] == [learning_rate(at, 5, schedule) for at in (2, 3, 4)]
    assert [row["step"] for row in read_metrics(Path("run"), "val")] == [2, 5]  # the old end's is not lost
    assert steps_done() == 5
    assert config_from_toml(Path("run/config.toml")).run.max_steps == 5
    assert train(5, *val)[-1].startswith("run is finished: all 5 steps")
    with pytest.raises(InputError, match=r"of a run of 5 steps, this one has 3: use another --run\.out_dir\Z"):
        train(3, *val)


def test_another_validation_set_chooses_anew(train: Train) -> None:
    train(2, "--data.val", "sets/val_twins")
    told = train(3, "--data.val", "sets/random", "--run.save_every", "7")
    assert told[:2] == [
        "resuming with --run.save_every 7 instead of 100",
        "resuming with --data.val sets/random instead of sets/val_twins",
    ]
    assert told[2].startswith("the finished run of 2 steps is extended to 3")
    assert told[3:] == ["the best weights are chosen anew on this validation set: best.safetensors is overwritten"]
    best = torch.load("run/checkpoints/best.pt", weights_only=True)
    assert best["step"] == 3 and best["best"] == read_metrics(Path("run"), "val")[-1]["score"]


def test_a_validation_set_that_has_changed_in_place_chooses_anew(train: Train) -> None:
    copy = Path("copy")
    shutil.copytree(Path("sets/val_twins"), copy)
    train(2, "--data.val", "copy")
    shutil.copytree(copy, "moved")
    anew = "the best weights are chosen anew on this validation set: best.safetensors is overwritten"
    assert anew not in train(3, "--data.val", "moved")  # the same pictures and captions
    caption = sorted(Path("moved").rglob("*.txt"))[0]
    caption.write_text(f"{caption.read_text()} And a hat.")
    assert anew in train(4, "--data.val", "moved")


def test_changed_shards_are_refused(train: Train) -> None:
    train(2)
    shard = next(Path("own").glob("*.tar"))
    manifest = Path("own/manifest.json")
    content = manifest.read_text()
    told = json.loads(content)
    sha256 = told["shards"][0]["sha256"]
    manifest.write_text(content.replace(sha256, "1" * 64))
    with pytest.raises(InputError, match=rf"{shard} is not what it was .*it has other contents\): put the old data"):
        train(2)
    manifest.unlink()  # the same bytes without their hash
    assert train(2)[-1].startswith("run is finished")
    shutil.copy(shard, "own/z.tar")
    with pytest.raises(InputError, match=r"own/z\.tar is not what it was .*it is new"):
        train(2)
    shard.rename("moved.tar")
    with pytest.raises(InputError, match=rf"{shard} is not what it was .*it is gone"):
        train(2)
    Path("own/z.tar").unlink()
    keys = [bytes(key).decode() for key in scan_tar(Path("moved.tar")).keys[:100]]
    write_shard(shard, [(key, {"txt": b"Words. More words.", "jpg": b"no picture"}) for key in keys])
    with pytest.raises(InputError, match=rf"{shard} is not what it was .*300 samples then, 100 now"):
        train(2)


def test_other_weights_of_the_teacher_are_refused(train: Train) -> None:
    train(2)
    torch.manual_seed(1)
    save_teacher(create_teacher("tiny"), "teacher/best.safetensors")
    with pytest.raises(InputError, match=r"--teacher\.checkpoint holds other weights or features than when"):
        train(2)


def test_one_line_under_two_processes(train: Train) -> None:
    def launch(*args: str, processes: int = 2) -> tuple[int, str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        done = subprocess.run(
            [*command, str(MAIN), *ARGS, *args], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
            text=True, timeout=300,
        )  # fmt: skip
        return done.returncode, done.stderr

    assert launch("--run.max_steps", "2")[0] == 0
    code, told = launch("--run.max_steps", "3", "--data.val", "sets/random")
    assert code == 0, told
    for line in ("resuming with --data.val sets/random instead of None", "the finished run of 2 steps is extended"):
        assert told.count(line) == 1
    assert steps_done() == 3
    code, told = launch("--run.max_steps", "3", "--optim.lr", "0.5", "--data.val", "sets/random")
    assert code != 0
    assert re.findall("^error: .*optim.lr = .*", told, re.MULTILINE) == re.findall("^error: .*", told, re.MULTILINE)
    assert told.count("error: run/checkpoints/last.pt is of a run with optim.lr") == 1
    told = "\n".join(train(4, "--data.val", "sets/random"))  # one process
    assert told.count("resuming with another number of processes (1, it was 2)") == 1
    assert steps_done() == 4


class TestComparison:
    def changes(self, before: TrainConfig, after: TrainConfig, step: int = 2, **inputs: object) -> list[str]:
        now = replace(INPUTS, **inputs)  # type: ignore[arg-type]
        return changes_since(Path("last.pt"), step, before.to_dict(), INPUTS, after, now)

    def test_each_change_of_execution_is_told(self) -> None:
        before = parse_config([])
        after = parse_config(
            ["--run.device", "cpu", "--data.num_workers", "7", "--speed.reference", "True", "--data.zeroshot", "None"]
        )
        assert self.changes(before, after) == [
            "resuming with --run.device cpu instead of auto",
            "resuming with --data.zeroshot None instead of data/digit_scenes/digits/val",
            "resuming with --data.num_workers 7 instead of 1",
            "resuming with --speed.reference True instead of False",
        ]
        assert self.changes(before, replace(before, run=replace(before.run, resume="auto"))) == []

    def test_class_prompts_that_teach_do_not_concern_evaluation(self) -> None:
        before = parse_config(["deit_image"])
        with pytest.raises(InputError, match=r"of a run with data\.zeroshot_templates = .*, this one has openai"):
            self.changes(before, parse_config(["deit_image", "--data.zeroshot_templates", "openai"]))

    def test_an_unfinished_run_keeps_its_length(self) -> None:
        config = parse_config([])
        with pytest.raises(InputError, match=r"of 4 steps, this one has 6: .*, or finish it first: .*can be extended"):
            self.changes(config, config, step=3, total_steps=6)
        assert len(self.changes(config, config, step=4, total_steps=6)) == 1

    def test_epochs_that_come_to_the_same_steps_are_the_same_length(self) -> None:
        before = parse_config(["--run.max_steps", "None", "--run.epochs", "2"])
        assert self.changes(before, parse_config(["--run.max_steps", "4"])) == []

    def test_a_constant_rate_rises_again_from_its_cool_down(self) -> None:
        config = parse_config(
            [
                "--optim.schedule",
                "constant",
                "--optim.lr",
                "1",
                "--optim.cooldown_share",
                "0.5",
                "--optim.warmup_steps",
                "1",
            ]
        )
        (told,) = self.changes(config, config, step=4, total_steps=10)
        assert "constant schedule of 10 steps; it was 0.5 at step 4, goes on with 1 at step 5 and ends with 0.2" in told

    def test_a_second_warm_up_is_told(self) -> None:
        config = parse_config(["--optim.lr", "1", "--optim.warmup_steps", "1000"])
        (told,) = self.changes(config, config, step=4, total_steps=100)
        assert "goes on with 0.5 at step 5, is highest at step 10 (1) and ends with" in told

    def test_workers_of_a_stream_decide_its_order(self) -> None:
        config = parse_config([])
        before, now = (replace(INPUTS, stream_workers=number) for number in (1, 2))
        with pytest.raises(InputError, match="the order of streamed samples depends on it"):
            changes_since(Path("last.pt"), 2, config.to_dict(), before, config, now)

    @pytest.mark.parametrize(
        ("args", "world_sizes", "told"),
        [
            ([], (2, 1), ["BatchNorm normalises each process's share of the batch"]),
            (["--init.freeze_image", "True", "--student.variant", "vit_tiny"], (1, 2), []),
            (["deit_image"], (2, 4), ["drop path is drawn by each process"]),
            (["deit_image", "--run.global_batch_size", "40"], (1, 8),
             ["drop path is drawn by each process", "pictures are mixed within each process's share, which is odd"]),
            (["--loss.pca_scope", "rank"], (1, 2),
             ["BatchNorm normalises each process's share of the batch", "PCA is that of each process's share"]),
        ],
    )  # fmt: skip
    def test_what_depends_on_the_number_of_processes_is_told(
        self, args: list[str], world_sizes: tuple[int, int], told: list[str]
    ) -> None:
        config = parse_config(args)
        student = create_student(override(variant_config(config.student.variant), **config.student.shape))
        before, now = (replace(INPUTS, world_size=number) for number in world_sizes)
        assert other_processes(now, config, now, student) == []
        (line,) = other_processes(before, config, now, student)
        start = f"resuming with another number of processes ({world_sizes[1]}, it was {world_sizes[0]}): "
        result = "the result will differ a little" if told else "the result differs by rounding alone"
        assert line == start + ", ".join(told) + (": " if told else "") + result
        (streamed,) = other_processes(before, config, replace(now, stream_workers=1), student)
        assert "each process draws its own streamed samples: the result" in streamed

    def test_a_checkpoint_of_an_earlier_version_is_read(self) -> None:
        config = parse_config([])
        told = changes_since(Path("last.pt"), 2, config.to_dict(), None, config, INPUTS)
        assert told == ["last.pt does not tell the contents of its data: they are not compared"]
        longer = parse_config(["--run.max_steps", "400"])
        with pytest.raises(InputError, match="of a run of another length"):
            changes_since(Path("last.pt"), 2, config.to_dict(), None, longer, INPUTS)


def test_a_stream_has_no_windows_and_an_index_is_no_stream() -> None:
    """Remote shards are mixed fewer at a time than in earlier versions, and may have got a manifest since."""
    now, stream = parse_config(["--data.shuffle_shards", "4"]), replace(INPUTS, stream_workers=2)
    saved = {**now.to_dict(), "data": {**now.to_dict()["data"], "shuffle_shards": 64}}
    told = changes_since(Path("last.pt"), 4, saved, stream, now, stream)
    assert told == ["resuming with --data.shuffle_shards 4 instead of 64"]
    with pytest.raises(InputError, match=r"data\.shuffle_shards = 64, this one has 4"):
        changes_since(Path("last.pt"), 4, saved, INPUTS, now, INPUTS)
    for before, after, what in [(stream, INPUTS, "streamed, and now they are indexed"), (INPUTS, stream, "indexed")]:
        with pytest.raises(InputError, match=rf"a run whose shards were {what}"):
            changes_since(Path("last.pt"), 4, now.to_dict(), before, now, after)
