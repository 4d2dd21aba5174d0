from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eval import agreement as module
from eval.agreement import agreement, linear_cka, neighbour_overlap
from eval.measures.retrieval_set import EncodedSet
from longclip_teacher import create_teacher, save_teacher
from longclip_teacher.errors import InputError, run_command
from mobileclip_student import create_student, save_student


def random(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def encoded(images: Tensor, texts: Tensor, captions: list[str] | None = None) -> EncodedSet:
    names = [Path(f"{row}.png") for row in range(len(images))]
    captions = captions or [f"caption {row}" for row in range(len(texts))]
    return EncodedSet(names, captions, images, texts, torch.arange(len(texts)) % len(images), 0, [])


def rotation(width: int) -> Tensor:
    return torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(9)))[0]


def test_a_model_agrees_with_itself() -> None:
    images = random(200, 16, seed=0)
    one = encoded(images, F.normalize(images.repeat(2, 1) + random(400, 16, seed=1), dim=-1))
    result = agreement(one, one)
    for side in ("image", "text"):
        assert result[side]["cosine"] == pytest.approx(1)
        assert result[side]["linear_cka"] == pytest.approx(1)
        assert result[side]["mapped_cosine"]["mean"] == pytest.approx(1, abs=1e-6)
    assert result["neighbour_overlap"] == {"image_image": 100, "text_text": 100, "image_text": 100}
    for way in ("i2t", "t2i"):
        assert result["retention"]["overall"][way]["retention"] == 100
    fitted = [result[side]["mapped_cosine"] for side in ("image", "text")]
    assert [(side["num_fitted"], side["num_measured"]) for side in fitted] == [(100, 100), (200, 200)]


def test_a_rotation_is_seen_through() -> None:
    images, texts = random(200, 16, seed=0), random(200, 16, seed=1)
    turn = rotation(16)
    result = agreement(encoded(images, texts), encoded(images @ turn, texts @ turn))
    for side in ("image", "text"):
        assert abs(result[side]["cosine"]) < 0.3
        assert result[side]["linear_cka"] == pytest.approx(1)
        assert result[side]["mapped_cosine"]["mean"] == pytest.approx(1, abs=1e-6)
    assert min(result["neighbour_overlap"].values()) > 99.9


def test_independent_features_agree_only_by_chance() -> None:
    teacher = encoded(random(600, 12, seed=0), random(600, 12, seed=1))
    student = encoded(random(600, 8, seed=2), random(600, 8, seed=3))
    result = agreement(teacher, student)
    for side in ("image", "text"):
        assert result[side]["cosine"] is None
        assert result[side]["linear_cka"] < 0.05
        assert abs(result[side]["mapped_cosine"]["mean"]) < 0.1
    for value in result["neighbour_overlap"].values():
        assert value == pytest.approx(100 * 10 / 600, abs=0.7)  # 6000 draws: sd 0.17


def test_cone_features_show_in_the_constant() -> None:
    centre = torch.ones(16)
    teacher = F.normalize(random(300, 16, seed=0) + centre, dim=-1)
    student = F.normalize(random(300, 8, seed=1) + torch.ones(8), dim=-1)
    mapped = agreement(encoded(teacher, teacher), encoded(student, student))["image"]["mapped_cosine"]
    assert mapped["mean"] > 0.9  # though the two know nothing of each other ...
    assert abs(mapped["mean"] - mapped["of_constant"]) < 0.02  # ... and this shows it


def test_cka_is_the_formula() -> None:
    """Kornblith et al. 2019, equation 3: HSIC of centred Gram matrices, written with the S x S matrices."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 7)) + 3
    y = x @ rng.normal(size=(7, 5)) + 2 * rng.normal(size=(50, 5))
    centring = np.eye(50) - 1 / 50

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.trace(a @ a.T @ centring @ b @ b.T @ centring))

    expected = hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))
    assert 0.1 < expected < 0.95
    assert linear_cka(torch.tensor(x), torch.tensor(y)) == pytest.approx(expected)
    assert linear_cka(torch.tensor(x), 5 * torch.tensor(x) @ rotation(7).double() - 1) == pytest.approx(1)
    assert linear_cka(torch.tensor(x), torch.ones(50, 3)) == 0


@pytest.mark.parametrize("block_elements", [1, 1 << 24])
def test_overlap_is_the_definition(block_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", block_elements)
    first = random(30, 6, seed=0)
    second = F.normalize(first + 0.5 * random(30, 6, seed=1), dim=-1)

    def nearest(features: Tensor, row: int) -> set[int]:
        order = np.argsort(-(features @ features[row]).numpy())
        return set([other for other in order.tolist() if other != row][:5])

    shared = [len(nearest(first, row) & nearest(second, row)) for row in range(30)]
    value = neighbour_overlap(first, first, second, second, exclude_self=True, k=5)
    assert value == pytest.approx(100 * sum(shared) / 150) and 30 < value < 99
    monkeypatch.setattr(module, "MAX_NEIGHBOUR_QUERIES", 10)
    value = neighbour_overlap(first, first, second, second, exclude_self=True, k=5)
    assert value == pytest.approx(100 * sum(shared[::3]) / 50)
    assert neighbour_overlap(first, first, second, second, exclude_self=True, k=29) is None


def test_retention_by_length() -> None:
    """Long captions are lost by the student, short ones kept: each bin counts its own queries."""
    captions = ["red " * 10 + str(row) for row in range(6)] + ["red " * 100 + str(row) for row in range(4)]
    teacher = encoded(torch.eye(10), torch.eye(10), captions)
    student = encoded(torch.eye(10), torch.eye(10)[[0, 1, 2, 3, 4, 5, 7, 6, 9, 8]], captions)
    retention = agreement(teacher, student)["retention"]
    assert set(retention["by_num_tokens"]) == {"<=77", "78-128"}
    for way in ("i2t", "t2i"):
        short, long = (retention["by_num_tokens"][name][way] for name in ("<=77", "78-128"))
        assert short == {"num_queries": 6, "teacher_r1": 100, "student_r1": 100, "retention": 100}
        assert long == {"num_queries": 4, "teacher_r1": 100, "student_r1": 0, "retention": 0}
        assert retention["overall"][way]["retention"] == pytest.approx(60)
    reverse = agreement(student, teacher)["retention"]["by_num_tokens"]["78-128"]["i2t"]
    assert reverse["teacher_r1"] == 0 and reverse["retention"] is None


def test_other_pictures_or_captions_are_refused() -> None:
    one = encoded(torch.eye(4), torch.eye(4))
    for other in (replace(one, captions=["x"] * 4), replace(one, images=one.images[::-1])):
        with pytest.raises(InputError, match="different pictures or captions"):
            agreement(one, other)
    with pytest.raises(InputError, match="one half"):
        agreement(encoded(torch.eye(1), torch.eye(1)), encoded(torch.eye(1), torch.eye(1)))


def test_the_command(
    colour_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    save_teacher(create_teacher("tiny", context_length=32), tmp_path / "teacher.safetensors")
    save_student(create_student("tiny", context_length=32), tmp_path / "student.safetensors")
    arguments = ["--checkpoint", tmp_path / "student.safetensors", "--root", colour_folder, "--num-workers", 0]
    # --pad-mask is the student's: a teacher would refuse it
    teacher = ["--teacher", tmp_path / "teacher.safetensors", "--pad-mask", True, "--json", tmp_path / "out.json"]
    monkeypatch.setattr(sys, "argv", ["agreement.py", *map(str, [*arguments, *teacher])])
    run_command(module.main)
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["num_images"] == 8 and result["protocol"] == "folder"
    assert result["neighbour_overlap"]["image_image"] is None  # 10 of 7
    shown = capsys.readouterr().out
    assert "linear CKA" in shown and "few for" in shown
    monkeypatch.setattr(sys, "argv", ["agreement.py", *map(str, arguments)])
    with pytest.raises(SystemExit):
        run_command(module.main)
    assert "pass --teacher" in capsys.readouterr().err
