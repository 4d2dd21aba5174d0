"""Towers in ONNX Runtime behind our models' interface: the features of the model they were exported from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from eval.measures.costs import measure_cost
from eval.towers.features import Encoding, encode_captions
from longclip_teacher import create_teacher
from longclip_teacher.packages import ONNX, missing_packages
from mobileclip_student import create_student
from mobileclip_student.model import variant_config

if missing_packages(ONNX):
    pytest.skip("the extra export is not installed", allow_module_level=True)

from eval.towers.exported_model import exported_in_memory

CAPTIONS = ["a red bus", "a long story " * 20, "a dog", ""]


def small_student() -> torch.nn.Module:
    config = variant_config("tiny")
    image = replace(config.image, image_size=32, layers=(1,), embed_dims=(8,))
    return create_student(replace(config, image=image), 20)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_features_are_those_of_the_model(kind: str) -> None:
    torch.manual_seed(0)
    model = (small_student() if kind == "student" else create_teacher("tiny", 20)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = exported_in_memory(model)
    pictures = torch.rand(3, 3, model.image_size, model.image_size)
    expected = model.encode_image(pictures, normalize=True)
    torch.testing.assert_close(found.encode_image(pictures), expected, rtol=0, atol=1e-5)
    texts, num_cut = encode_captions(found, CAPTIONS, Encoding(batch_size=2))
    expected = model.encode_text(model.tokenizer(CAPTIONS), normalize=True)
    torch.testing.assert_close(texts, expected, rtol=0, atol=1e-5)
    assert num_cut == 1 and found.context_length == 20
    weights = sum(value.numel() for value in model.parameters()) * 4
    assert 0.7 < found.num_bytes / weights < 1.2
    assert measure_cost(found, repeats=1)["image_ms"] > 0
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
