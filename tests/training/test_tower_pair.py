"""A run of one tower is evaluated and reported with the student's tower and the teacher's other one."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from eval.base.images import open_image
from eval.base.processes import start
from eval.benchmarks.protocols import load_retrieval_set
from eval.measures.retrieval_set import evaluate_retrieval
from eval.measures.zeroshot import evaluate_zeroshot
from eval.towers.tower_pair import TowerPair
from judged_runs import config_of
from longclip_teacher import LongCLIP, create_teacher, save_teacher
from longclip_teacher.errors import InputError
from mobileclip_student import MobileCLIP, create_student, reparameterize, save_student
from mobileclip_student.model import variant_config
from training.record.evaluate import evaluated_model, validate
from training.record.run_report import judge_run, report_run
from training.settings.options import TeacherOptions
from training.settings.tree import config_to_toml

TEMPLATES = ["a {} board", "a board that is {}"]


@pytest.fixture(scope="module")
def teacher() -> LongCLIP:
    torch.manual_seed(0)
    return create_teacher("tiny").eval()


@pytest.fixture(scope="module")
def student(teacher: LongCLIP) -> MobileCLIP:
    torch.manual_seed(1)
    return create_student(replace(variant_config("tiny"), embed_dim=teacher.embed_dim)).eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write eight pictures of noise with captions (boards), the same in four classes, and the templates."""
    root = tmp_path_factory.mktemp("data")
    for folder in ("boards/image", "boards/caption", *(f"classes/c{i}" for i in range(4))):
        (root / folder).mkdir(parents=True)
    for number in range(8):
        noise = np.random.default_rng(number).integers(0, 256, (6, 5, 3), dtype=np.uint8)
        picture = Image.fromarray(noise).resize((60, 50))
        picture.save(root / f"boards/image/{number}.png")
        picture.save(root / f"classes/c{number % 4}/{number}.png")
        words = ["red", "small", "old", "seven", "green", "late", "tall", "wet"]
        (root / f"boards/caption/{number}.txt").write_text(f"a {words[number]} board " + "goes on " * number)
    (root / "templates.txt").write_text("\n".join(TEMPLATES))
    return root


def features(model: LongCLIP | MobileCLIP, data: Path, tower: str) -> Tensor:
    found = load_retrieval_set("folder", data / "boards")
    with torch.no_grad():
        if tower == "text":
            return normalize(model.encode_text(model.tokenizer(found.captions)), dim=1)
        pictures = torch.stack([model.preprocess(open_image(path)) for path in found.images])
        return normalize(model.encode_image(pictures), dim=1)


@pytest.mark.parametrize("stage", ["image", "text"])
def test_one_tower_is_evaluated_beside_the_teachers_other(
    student: MobileCLIP, teacher: LongCLIP, data: Path, stage: str
) -> None:
    config = config_of(data, stage)
    values = validate(student, config, teacher).figures
    image, text = (student, teacher) if stage == "image" else (teacher, student)
    pair = TowerPair(image, text, teacher.logit_scale)
    found = evaluate_retrieval(pair, load_retrieval_set("folder", data / "boards"))
    assert (values["i2t_r1"], values["t2i_r1"]) == (found["i2t"]["r1"], found["t2i"]["r1"])
    assert values["score"] == (values["i2t_r1"] + values["t2i_r1"]) / 2
    assert values["zeroshot_top1"] == evaluate_zeroshot(pair, data / "classes", None, TEMPLATES)["top1"]
    ours, theirs = (features(model, data, stage).numpy().astype(np.float64) for model in (student, teacher))
    cosines = [float(np.dot(a, b)) for a, b in zip(ours, theirs, strict=True)]
    assert values["agreement"] == pytest.approx(100 * np.mean(cosines), abs=1e-3)
    assert abs(values["agreement"]) < 90


@pytest.mark.parametrize("stage", ["image", "text"])
def test_only_the_trained_tower_counts(teacher: LongCLIP, data: Path, stage: str) -> None:
    """A copy of the teacher whose other tower is ruined agrees fully and is as good as the teacher."""
    copy = deepcopy(teacher)
    other = copy.text if stage == "image" else copy.visual
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    values = validate(copy, config_of(data, stage), teacher).figures
    assert values.pop("agreement") == pytest.approx(100, abs=1e-4)
    assert values == validate(teacher, config_of(data, "both")).figures
    wrong_way = validate(copy, config_of(data, "text" if stage == "image" else "image"), teacher).figures
    assert wrong_way["agreement"] < 90


def test_two_towers_are_evaluated_as_before(student: MobileCLIP, teacher: LongCLIP, data: Path) -> None:
    config = config_of(data, "both")
    assert evaluated_model(student, config, teacher) is student
    assert set(validate(student, config).figures) == {"i2t_r1", "t2i_r1", "score", "zeroshot_top1"}


def test_what_cannot_be_evaluated_is_said(teacher: LongCLIP, data: Path) -> None:
    with pytest.raises(InputError, match=r"\A--run.stage image is evaluated with the teacher's other tower[^\n]*\Z"):
        validate(create_student("tiny"), config_of(data, "image"))
    with pytest.raises(InputError, match="96 features and the text tower 128"):
        validate(create_student("tiny"), config_of(data, "image"), teacher)


@pytest.mark.parametrize(("stage", "other"), [("image", "text"), ("text", "image")])
def test_the_report_names_what_was_evaluated(
    student: MobileCLIP,
    teacher: LongCLIP,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stage: str,
    other: str,
) -> None:
    save_student(student, tmp_path / "run/best.safetensors")
    save_teacher(teacher, tmp_path / "teacher.safetensors")
    rows = [{"step": step, "group": "val", "i2t_r1": 10.0 * step} for step in (1, 2)]
    (tmp_path / "run/metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = config_of(data, stage, out_dir=tmp_path / "run")
    config = replace(
        config,
        teacher=TeacherOptions(checkpoint=str(tmp_path / "teacher.safetensors")),
        data=replace(
            config.data, **{"image": {"images": Path("some/place")}, "text": {"captions": ("some/place",)}}[stage]
        ),
    )
    (tmp_path / "run/config.toml").write_text(config_to_toml(config))
    monkeypatch.setenv("COLUMNS", "150")
    with start("cpu") as runtime:
        judged = judge_run(config, runtime, None)
        assert judged is not None
        report_run(config, runtime, judged)
    results = json.loads((tmp_path / "run/results.json").read_text())
    evaluated = f"student's {stage} tower + teacher's {other} tower"
    assert results["judged"] == evaluated and set(results["models"]) == {"student", "teacher"}
    ours, expected = results["models"]["student"], evaluated_model(student, config, teacher)
    assert ours["cost"]["params"] == sum(parameter.numel() for parameter in expected.parameters())
    assert ours["cost"]["bytes"] is None  # the file holds the complete student
    fused = evaluated_model(reparameterize(student), config, teacher)
    fused_params = sum(parameter.numel() for parameter in fused.parameters())
    assert ours["cost_reparameterized"]["params"] == fused_params < ours["cost"]["params"]
    page, printed = (tmp_path / "run/report.html").read_text().replace("&#39;", "'"), capsys.readouterr().out
    for told in (" ".join(printed.split()), page):
        assert "R@1 among boards 8 pictures and 8 captions" in told
        assert "parameters and ms with branches merged" in told and "batch 1, float32" in told
    found = evaluate_retrieval(expected, load_retrieval_set("folder", data / "boards"))
    assert ours["boards"]["i2t"] == found["i2t"] and ours["boards"]["t2i"] == found["t2i"]
    assert evaluated in page and evaluated in printed
    assert f"The {stage} tower of the student tiny was distilled from that of the teacher {tmp_path}" in page
    assert f"on some/place. The figures are those of the {evaluated}, at the best weights" in page
