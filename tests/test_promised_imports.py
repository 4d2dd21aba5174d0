"""What other programs import from the packages: the names, and the calls and attributes that they rely on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from longclip_teacher import create_teacher, load_teacher, save_teacher, stretch_positions
from mobileclip_student import create_student, load_student, reparameterize, save_student
from training.pca import pca_project

CAPTIONS = ["a red square", "a long caption " * 30]


def saved_and_loaded_teacher(folder: Path) -> nn.Module:
    save_teacher(create_teacher("tiny"), folder / "teacher.safetensors")
    return load_teacher(folder / "teacher.safetensors", device="cpu")


def saved_and_loaded_student(folder: Path) -> nn.Module:
    save_student(create_student("tiny", context_length=248), folder / "student.safetensors")
    return load_student(folder / "student.safetensors", variant="tiny")


@pytest.mark.parametrize("load", [saved_and_loaded_teacher, saved_and_loaded_student])
def test_both_models_have_one_interface(load: Callable[[Path], nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = load(tmp_path)
    assert not model.training and model.context_length == 248
    assert hasattr(model, "pad_mask") == (load is saved_and_loaded_student)
    picture = model.preprocess(Image.new("RGB", (50, 40), "red"))
    assert picture.shape == (3, model.image_size, model.image_size)
    tokens = model.tokenizer(CAPTIONS)
    with torch.no_grad():
        for features, unit in (
            (model.encode_image(picture[None]), model.encode_image(picture[None], normalize=True)),
            (model.encode_text(tokens), model.encode_text(tokens, normalize=True)),
        ):
            assert features.shape[1] == model.embed_dim
            torch.testing.assert_close(nn.functional.normalize(features, dim=1), unit)
            assert not torch.allclose(features.norm(dim=1), torch.ones(1))  # False is the default
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)  # the parameter is a logarithm


def test_a_published_variant_fuses_to_the_same_outputs() -> None:
    torch.manual_seed(0)
    student = create_student("s0", context_length=248).eval()
    fast = reparameterize(student)
    image, tokens = torch.rand(1, 3, student.image_size, student.image_size), student.tokenizer(CAPTIONS)
    with torch.no_grad():
        for ours, theirs in (
            (student.encode_image(image, normalize=True), fast.encode_image(image, normalize=True)),
            (student.encode_text(tokens, normalize=True), fast.encode_text(tokens, normalize=True)),
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert sum(value.numel() for value in fast.parameters()) < sum(value.numel() for value in student.parameters())


def test_positions_stretch_and_features_are_projected() -> None:
    assert stretch_positions(torch.rand(77, 8)).shape == (248, 8)
    features = torch.randn(40, 8)
    projected = pca_project(features, rank=3)
    assert projected.shape == features.shape
    assert torch.linalg.matrix_rank(projected - projected.mean(dim=0), rtol=1e-4) == 3
    assert pca_project(torch.randn(40, 64)).shape == (40, 64)  # 32 directions unless told otherwise
