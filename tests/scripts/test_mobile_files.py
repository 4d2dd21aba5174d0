"""Files for telephones. Those that need ExecuTorch or coremltools run in the environment of docs/deployment.md."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from exporting import mobile_files
from exporting.card import model_card
from exporting.checks import FULL, compare_images, compare_texts
from exporting.mobile_files import write_core_ml, write_executorch
from exporting.sources import Exported, load_source
from longclip_teacher.errors import InputError
from longclip_teacher.text import EOT, SOT
from mobileclip_student import create_student, save_student
from mobileclip_student.model import variant_config


@pytest.fixture
def model(tmp_path: Path) -> Exported:
    torch.manual_seed(0)
    config = variant_config("tiny")
    image = replace(
        config.image, image_size=32, layers=(1,), embed_dims=(8,), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)
    )
    save_student(create_student(replace(config, image=image), 20).eval(), tmp_path / "student.safetensors")
    return load_source(str(tmp_path / "student.safetensors"))


def test_what_cannot_be_converted_ends_in_one_line(
    model: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise NotImplementedError("no operator sigh\nmore of it")

    monkeypatch.setattr(mobile_files, "_program", refuse)
    with pytest.raises(InputError) as error:
        write_executorch(model, tmp_path)
    expected = "--executorch: the image tower cannot be converted (no operator sigh); leave --executorch out"
    assert str(error.value) == expected


def test_the_card_says_what_the_files_take_and_that_core_ml_was_not_run(model: Exported) -> None:
    card = model_card(model, [{"file": "executorch/text_model.pte"}])
    assert "[1, L] with L from 2 to 20: int64 in ExecuTorch" in card and "not run" not in card
    card = model_card(model, [{"file": "coreml/text_model.mlpackage"}])
    assert "The Core ML packages were converted but not run" in card
    assert "telephones" not in model_card(model, [{"file": "onnx/text_model.onnx"}])


def test_both_comparisons_refuse_other_features(model: Exported) -> None:
    def turned(features: torch.Tensor) -> torch.Tensor:
        return features.roll(1, dims=1)

    with pytest.raises(InputError, match=r"a\.pte differs from the model: cosine"):
        compare_images(model, lambda pixels: turned(model.encode_image(pixels)), "a.pte", FULL)
    with pytest.raises(InputError, match=r"b\.pte differs from the model: cosine"):
        compare_texts(model, lambda tokens: turned(model.encode_text(tokens)), "b.pte", FULL)


def test_executorch_gives_the_features_of_the_student(model: Exported, tmp_path: Path) -> None:
    pytest.importorskip("executorch", reason="the environment for telephones is not this one")
    from executorch.runtime import Runtime

    rows = write_executorch(model, tmp_path)
    assert [row["file"] for row in rows] == ["executorch/vision_model.pte", "executorch/text_model.pte"]
    method = Runtime.get().load_program(tmp_path / "executorch" / "text_model.pte").load_method("forward")
    for tokens in ([SOT, EOT], [SOT, *range(320, 338), EOT]):
        ids = torch.tensor([tokens])
        torch.testing.assert_close(method.execute([ids])[0], model.encode_text(ids), rtol=0, atol=1e-5)


def test_core_ml_packages_take_every_length(model: Exported, tmp_path: Path) -> None:
    coremltools = pytest.importorskip("coremltools", reason="the environment for telephones is not this one")
    rows = write_core_ml(model, tmp_path)
    assert [row["cosine"] for row in rows] == ["not run", "not run"]
    spec = coremltools.utils.load_spec(str(tmp_path / "coreml" / "text_model.mlpackage"))
    (given,), (found,) = spec.description.input, spec.description.output
    lengths = given.type.multiArrayType.shapeRange.sizeRanges[1]
    assert (given.name, lengths.lowerBound, lengths.upperBound) == ("input_ids", 2, 20)
    assert (found.name, list(found.type.multiArrayType.shape)) == ("text_embeds", [1, 96])
