"""Evaluation while training is shared among the processes, and its figures are those of one.

Run as a program (OUT DATA, under torchrun's environment variables) it is one of these processes.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import training.record.evaluate as evaluation
from eval.base.processes import Runtime, start
from eval.towers.features import Encoding
from eval.towers.models import load_model
from judged_runs import config_of
from longclip_teacher import LongCLIP, create_teacher
from longclip_teacher.errors import run_command
from mobileclip_student import MobileCLIP, create_student
from mobileclip_student.model import variant_config
from ranks import ends_of_ranks, run_ranks
from training.ema import ModelEma
from training.record.evaluate import evaluate_tests, validate
from training.record.run_log import read_metrics
from training.settings.tree import TrainConfig

ROOT = Path(__file__).parents[2]
NUM_PICTURES = 10
BATCH_SIZES = (4, 64)  # three batches of unequal sizes, or one, for up to three processes


def write_data(root: Path) -> None:
    """Write pictures of noise with two captions of several lengths each, and the same in three classes."""
    for folder in ("boards/image", "boards/caption", *(f"classes/c{i}" for i in range(3))):
        (root / folder).mkdir(parents=True)
    words = ["red", "small", "old", "seven", "green", "late", "tall", "wet", "two", "flat"]
    for number in range(NUM_PICTURES):
        noise = np.random.default_rng(number).integers(0, 256, (6, 5, 3), dtype=np.uint8)
        picture = Image.fromarray(noise).resize((60, 50))
        picture.save(root / f"boards/image/{number}.png")
        picture.save(root / f"classes/c{number % 3}/{number}.png")
        caption = f"a {words[number]} board " + "goes on " * number
        (root / f"boards/caption/{number}.txt").write_text(caption)
    (root / "shards").mkdir()
    with tarfile.open(root / "shards/0.tar", "w") as shard:
        for number in range(NUM_PICTURES):
            label = root / "label"
            label.write_text(str(number % 3))
            shard.add(root / f"boards/image/{number}.png", f"{number}.png")
            shard.add(label, f"{number}.cls")
    (root / "names.txt").write_text("red\nold\nsmall")
    (root / "templates.txt").write_text("a {} board\na board that is {}\nthe {}")


def student_in_training(runtime: Runtime) -> MobileCLIP:
    """A student as it is between two steps: BatchNorm's statistics are those of this process."""
    torch.manual_seed(1)
    student = create_student(replace(variant_config("tiny"), embed_dim=128)).train()
    torch.manual_seed(runtime.rank)
    for module in student.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()
    return student


def judged(model: nn.Module, config: TrainConfig, teacher: LongCLIP | None = None) -> dict[str, float]:
    """The figures, and numbers that tell any two sets of features apart. Training must not notice the evaluation."""
    state, is_training = torch.random.get_rng_state(), model.training
    figures, encoded = validate(model, config, teacher)
    assert torch.equal(torch.random.get_rng_state(), state) and model.training == is_training
    if encoded is None:
        return figures
    parts = {"images": encoded.image_features, "captions": encoded.text_features}
    weights = torch.arange(1.0, 129.0, dtype=torch.float64)
    return figures | {name: (part.double() @ weights[: part.shape[1]]).norm().item() for name, part in parts.items()}


def all_cases(runtime: Runtime, data: Path) -> dict[str, Any]:
    """What each kind of evaluation gives in this process."""
    found: dict[str, Any] = {}
    plain = config_of(data)
    torch.manual_seed(0)
    teacher, other = create_teacher("tiny").eval(), create_student("tiny")
    for size in BATCH_SIZES:
        with pytest.MonkeyPatch.context() as patched:
            encoding = Encoding(size, num_workers=0, shared=True)
            patched.setattr(evaluation, "_encoding", lambda config, encoding=encoding: encoding)
            found[f"student {size}"] = judged(student_in_training(runtime), plain)
            found[f"tests {size}"] = evaluate_tests(other, plain)
    found["bf16"] = judged(student_in_training(runtime), config_of(data, precision="bf16"))
    found["average"] = judged(ModelEma(student_in_training(runtime), 0.9).model, plain)
    for stage in ("image", "text"):
        found[stage] = judged(student_in_training(runtime), config_of(data, stage=stage), teacher)
    found["teacher"] = judged(teacher.train(), plain)
    streamed = replace(plain.data, val=None, zeroshot=data / "shards", zeroshot_classnames=data / "names.txt")
    found["stream"] = judged(student_in_training(runtime), replace(plain, data=streamed))
    nothing = replace(plain, data=replace(plain.data, val=None, zeroshot=None))
    found["nothing"] = judged(student_in_training(runtime), nothing)
    return found


def main() -> None:
    with start("cpu") as runtime:
        found = all_cases(runtime, Path(sys.argv[2]))
    Path(f"{sys.argv[1]}.{runtime.rank}").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_data(root)
    return root


def test_the_figures_of_several_processes_are_those_of_one(data: Path, tmp_path: Path) -> None:
    run_ranks([__file__, str(tmp_path / "1"), str(data)], 1)
    alone = json.loads((tmp_path / "1.0").read_text())
    assert set(alone["image"]) == {"i2t_r1", "t2i_r1", "score", "agreement", "zeroshot_top1", "images", "captions"}
    assert alone["nothing"] == {} and set(alone["stream"]) == {"zeroshot_top1"}
    assert alone["student 4"]["images"] != alone["bf16"]["images"]
    for world_size in (2, 3):
        run_ranks([__file__, str(tmp_path / str(world_size)), str(data)], world_size)
        for rank in range(world_size):
            assert json.loads((tmp_path / f"{world_size}.{rank}").read_text()) == alone, (world_size, rank)


def trained(checkout: Path, data: Path, out_dir: Path, *args: str) -> list[subprocess.CompletedProcess[str]]:
    """Train for two steps on two processes."""
    command = [
        "training/main.py", "--run.max_steps", "2", "--run.global_batch_size", "40", "--run.device", "cpu",
        "--run.out_dir", str(out_dir), "--run.log_every", "1", "--optim.ema", "0.5", "--optim.lr", "0.01",
        "--data.val", str(data / "boards"), "--data.num_workers", "0", "--data.tests",
        "--data.zeroshot", str(data / "classes"), "--data.zeroshot_classnames", "None",
        "--data.zeroshot_templates", str(data / "templates.txt"), *args,
    ]  # fmt: skip
    return ends_of_ranks([str(ROOT / command[0]), *command[1:]], 2, cwd=checkout)


def test_evaluation_leaves_training_alone_and_the_best_is_decided_once(
    checkout: Path, data: Path, tmp_path: Path
) -> None:
    often, once = tmp_path / "often", tmp_path / "once"
    for out_dir, args in ((often, ["--run.eval_every", "1", "--run.save_every", "1"]), (once, [])):
        ends = trained(checkout, data, out_dir, *args)
        assert [end.returncode for end in ends] == [0, 0], ends
        assert not ends[1].stdout and not ends[1].stderr, "rank 0 alone tells"
    ours, reference = (torch.load(run / "checkpoints/last.pt", weights_only=True) for run in (often, once))
    for part in ("distiller", "ema"):
        assert all(torch.equal(ours[part][name], value) for name, value in reference[part].items()), part
    rows = read_metrics(often, "val")
    assert [row["step"] for row in rows] == [1, 2] and rows[1] == read_metrics(once, "val")[0]
    best = max(rows, key=lambda row: (row["score"], -row["step"]))
    assert torch.load(often / "checkpoints/best.pt", weights_only=True)["step"] == best["step"]
    alone = validate(load_model(often), config_of(data)).figures
    assert alone == {name: best[name] for name in alone}
    results = json.loads((often / "results.json").read_text())["models"]["student"]
    assert results["zeroshot"]["top1"] == best["zeroshot_top1"]


def test_a_picture_that_one_process_cannot_read_ends_all(checkout: Path, data: Path, tmp_path: Path) -> None:
    broken = tmp_path / "data"
    shutil.copytree(data, broken)
    (broken / "boards/image/3.png").write_text("no picture")
    ends = trained(checkout, broken, tmp_path / "run")
    assert [end.returncode for end in ends] == [2, 2], ends
    (line,) = [line for end in ends for line in end.stderr.splitlines() if "error" in line]
    assert line.startswith("error: unreadable pictures: 1 by now of 10") and not ends[1].stderr


def test_an_error_of_one_process_is_one_of_all(tmp_path: Path) -> None:
    script = tmp_path / "fail.py"
    script.write_text(
        "import sys\n"
        "from eval.base.processes import agreed, on_main, start\n"
        "from longclip_teacher.errors import InputError, reported_once, run_command\n"
        "def fail(): raise InputError('no')\n"
        "def main():\n"
        "    with start('cpu') as runtime, reported_once():\n"
        "        assert agreed(lambda: runtime.rank) == runtime.rank\n"
        "        assert on_main(lambda: print(runtime.rank)) == {}\n"
        "        agreed(fail if runtime.rank else dict) if sys.argv[1] == 'other' else on_main(fail)\n"
        "run_command(main)\n"
    )
    for where, line in (("other", "error: rank 1: no\n"), ("main", "error: no\n")):
        ends = ends_of_ranks([str(script), where], 2)
        assert [(end.returncode, end.stdout, end.stderr) for end in ends] == [(2, "0\n", line), (2, "", "")]


if __name__ == "__main__":
    run_command(main)
