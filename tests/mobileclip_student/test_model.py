"""The student's public interface: variants, configuration, attributes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from open_clip.constants import OPENAI_DATASET_MEAN
from PIL import Image

from longclip_teacher.errors import InputError
from mobileclip_student import VARIANTS, StudentConfig, create_student
from mobileclip_student.model import variant_config

# Millions of parameters of the image and text towers (MobileCLIP, table 1; MobileCLIP2, table 7)
PUBLISHED_SIZES = {
    "s0": (11.4, 42.4),
    "s1": (21.5, 63.4),
    "s2": (35.7, 63.4),
    "b": (86.3, 63.4),
    "mobileclip2_s0": (11.4, 63.4),
    "mobileclip2_s2": (35.7, 63.4),
    "mobileclip2_b": (86.3, 63.4),
    "mobileclip2_s3": (125.1, 123.6),
    "mobileclip2_s4": (321.6, 123.6),
    "mobileclip2_l14": (304.3, 123.6),
}


def test_all_variants_are_there() -> None:
    assert set(VARIANTS) == {*PUBLISHED_SIZES, "tiny", "small", "vit_tiny", "vit_s", "vit_b"}


@pytest.mark.parametrize("variant", PUBLISHED_SIZES)
def test_sizes_are_the_published_ones(variant: str) -> None:
    with torch.device("meta"):
        student = create_student(variant, context_length=77)
    for tower, size in zip((student.image_encoder, student.text_encoder), PUBLISHED_SIZES[variant], strict=True):
        assert sum(parameter.numel() for parameter in tower.parameters()) / 1e6 == pytest.approx(size, rel=0.005)


@pytest.mark.parametrize("variant", VARIANTS)
def test_configuration_survives_json(variant: str) -> None:
    config = replace(variant_config(variant), context_length=100, pad_mask=False)
    assert StudentConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_state_dict_holds_every_tensor(variant: str) -> None:
    """Loading relies on it: any other tensor would stay uninitialised."""
    with torch.device("meta"):
        student = create_student(variant)
    tensors = {name for name, _ in student.named_parameters()} | {name for name, _ in student.named_buffers()}
    assert tensors == set(student.state_dict())


def test_attributes_and_features() -> None:
    torch.manual_seed(0)
    student = create_student("tiny").eval()
    assert (student.embed_dim, student.image_size, student.context_length, student.pad_mask) == (96, 48, 248, True)
    assert student.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert student.linear_logit_scale.item() == pytest.approx(1 / 0.07)
    assert student.tokenizer.context_length == 248

    image = student.preprocess(Image.new("RGB", (60, 90), "red"))
    assert image.shape == (3, 48, 48)
    torch.testing.assert_close(image[:, 0, 0], torch.tensor([1.0, 0.0, 0.0]))  # no normalisation
    features = student.encode_image(image[None], normalize=True)
    text_features = student.encode_text(student.tokenizer(["a red board", "a blue one"]), normalize=True)
    assert features.shape == (1, 96) and text_features.shape == (2, 96)
    for vectors in (features, text_features):
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(vectors)))
    torch.testing.assert_close(
        features, torch.nn.functional.normalize(student.encode_image(image[None]), dim=1), rtol=0, atol=1e-6
    )


def test_wide_towers_normalise_as_openai_did() -> None:
    with torch.device("meta"):
        student = create_student("mobileclip2_s3")
    assert student.preprocess_cfg.mean == OPENAI_DATASET_MEAN
    assert student.preprocess_cfg.interpolation == "bilinear"
    assert student.preprocess_cfg.resize_mode == "shortest"


def test_arguments_override_the_variant() -> None:
    student = create_student("tiny", context_length=77, pad_mask=False)
    assert (student.context_length, student.pad_mask, student.tokenizer.context_length) == (77, False, 77)
    assert create_student(student.config).config == student.config


@pytest.mark.parametrize(
    ("change", "word"),
    [({"colour": 1}, "colour"), ({"image": 3}, "image"), ({"text": {"width": 64}}, "heads"), ({"embed_dim": 0}, "0")],
)
def test_broken_configurations_say_what_is_wrong(change: dict, word: str) -> None:
    with pytest.raises(InputError, match=word):
        StudentConfig.from_dict({**variant_config("tiny").to_dict(), **change})


def test_unknown_variant_names_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"s9.*mobileclip2_s0"):
        create_student("s9")
