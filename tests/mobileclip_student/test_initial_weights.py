"""Initial weights of towers: another student, timm (with a fake download), a Long-CLIP, a truncated normal."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from longclip_teacher import LongCLIP, create_teacher
from longclip_teacher.activation import Activation
from longclip_teacher.ancestry import NOT_KNOWN, is_research_only
from longclip_teacher.config import ImageTowerConfig, TeacherConfig, TextTowerConfig
from longclip_teacher.errors import InputError
from longclip_teacher.positions import stretch_positions
from mobileclip_student import MobileCLIP, StudentConfig, create_student, override, reparameterize, save_student
from mobileclip_student.initial_weights import LongCLIPText, load_image_tower, load_text_tower, truncated_normal_
from mobileclip_student.model import variant_config

WIDTH, HEADS, LAYERS, EMBED_DIM = 48, 3, 5, 20


def _shaken(model: nn.Module) -> Any:
    """No weight at a neutral value such as 0 or 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def _teacher(activation: Activation = "quickgelu", context_length: int = 248) -> LongCLIP:
    torch.manual_seed(1)
    image = ImageTowerConfig(size=16, patch=8, width=16, layers=1, heads=2)
    text = TextTowerConfig(width=WIDTH, heads=HEADS, layers=LAYERS, context_length=context_length)
    config = TeacherConfig(EMBED_DIM, image, text, activation, num_frozen_positions=20)
    return _shaken(create_teacher(config)).requires_grad_(False)


def _text_of(teacher: LongCLIP) -> LongCLIPText:
    return LongCLIPText(teacher.text.state_dict(), teacher.config.text.heads, teacher.config.activation)


def _config(**changes: Any) -> StudentConfig:
    shape = {"embed_dim": EMBED_DIM, "text_width": WIDTH, "text_heads": HEADS, "text_layers": LAYERS}
    return override(variant_config("vit_tiny"), **{**shape, **changes})


def _student(**changes: Any) -> MobileCLIP:
    torch.manual_seed(0)
    return _shaken(create_student(_config(**changes)))


def _distance(ours: Tensor, theirs: Tensor) -> float:
    return float(((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).max())


@torch.no_grad()
@pytest.mark.parametrize(
    ("tower", "activation"),
    [("longclip", "quickgelu"), ("causal", "gelu"), ("longclip", "gelu"), ("causal", "quickgelu")],
)
def test_a_causal_tower_becomes_long_clips_text_tower(
    tower: str, activation: Activation, captions: Callable, tmp_path: Path
) -> None:
    teacher, student = _teacher(activation), _student(text_tower=tower)
    tokens = captions(9, 248, 2, 100, width=248)
    assert _distance(student.encode_text(tokens), teacher.encode_text(tokens)) > 0.1
    load_text_tower(student, _text_of(teacher))
    assert _distance(student.encode_text(tokens), teacher.encode_text(tokens)) < 1e-5
    assert student.config.text.activation == activation
    save_student(student, tmp_path / "s.safetensors")  # the activation it took over goes with it
    copy = create_student(student.config)
    load_text_tower(copy, tmp_path / "s.safetensors")
    assert torch.equal(copy.encode_text(tokens), student.encode_text(tokens))
    for block in student.text_encoder.blocks:
        block.activation = "gelu" if activation == "quickgelu" else "quickgelu"
    assert _distance(student.encode_text(tokens), teacher.encode_text(tokens)) > 1e-4  # so 1e-5 tells them apart


@torch.no_grad()
@pytest.mark.parametrize(("layers", "taken"), [(1, [0]), (2, [0, 4]), (3, [0, 2, 4]), (4, [0, 1, 2, 4])])
def test_fewer_layers_are_evenly_spaced(
    layers: int, taken: list[int], captions: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    teacher, student = _teacher(), _student(text_tower="longclip", text_layers=layers)
    with caplog.at_level(logging.INFO):
        load_text_tower(student, _text_of(teacher))
    assert str([index + 1 for index in taken]) in caplog.text and "of the 5" in caplog.text
    blocks = teacher.text.transformer.resblocks
    teacher.text.transformer.resblocks = nn.ModuleList(blocks[index] for index in taken)
    tokens = captions(9, 60, width=60)
    assert _distance(student.encode_text(tokens), teacher.encode_text(tokens)) < 1e-5


@torch.no_grad()
def test_a_bidirectional_tower_starts_from_the_same_weights(captions: Callable) -> None:
    teacher, base, causal = _teacher(), _student(text_tower="base"), _student(text_tower="longclip")
    for student in (base, causal):
        load_text_tower(student, _text_of(teacher))
    weights = causal.text_encoder.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in base.text_encoder.state_dict().items())
    tokens = captions(9, 60, width=60)
    assert _distance(base.encode_text(tokens), causal.encode_text(tokens)) > 1e-2


@torch.no_grad()
def test_positions_are_cut_or_stretched(captions: Callable) -> None:
    teacher = _teacher()
    student = create_student(_config(text_tower="longclip"), context_length=77).eval()
    load_text_tower(student, _text_of(teacher))
    tokens = captions(9, 77, width=77)
    assert _distance(student.encode_text(tokens), teacher.encode_text(tokens)) < 1e-5
    short, student = _teacher(context_length=77), _student(text_tower="longclip")
    load_text_tower(student, _text_of(short))
    table = stretch_positions(short.text.position_table, 248)
    assert torch.equal(student.text_encoder.positional_embedding, table)
    with pytest.raises(InputError, match="50 positions"):
        load_text_tower(student, _text_of(_teacher(context_length=50)))


def test_another_embedding_width_keeps_the_fresh_projection(caplog: pytest.LogCaptureFixture) -> None:
    teacher, student = _teacher(), _student(text_tower="longclip", embed_dim=12)
    projection = student.text_encoder.projection.detach().clone()
    with caplog.at_level(logging.INFO):
        load_text_tower(student, _text_of(teacher))
    assert "projection is fresh" in caplog.text
    assert torch.equal(student.text_encoder.projection, projection)
    assert torch.equal(student.text_encoder.ln_final.weight, teacher.text.ln_final.weight)
    assert torch.equal(student.text_encoder.token_embedding.weight, teacher.text.token_embedding.weight)


@torch.no_grad()
@pytest.mark.parametrize("tower", ["hybrid", "base"])
def test_a_students_text_tower(tower: str, captions: Callable) -> None:
    source, student = _student(text_tower=tower), create_student(_config(text_tower=tower)).eval()
    images, tokens = torch.rand(1, 3, 48, 48), captions(9, 60, width=60)
    image_features = student.encode_image(images)
    assert _distance(student.encode_text(tokens), source.encode_text(tokens)) > 0.1
    load_text_tower(student, source)
    assert torch.equal(student.encode_text(tokens), source.encode_text(tokens))
    assert torch.equal(student.encode_image(images), image_features)


def _without(tensors: LongCLIPText, key: str) -> LongCLIPText:
    return replace(tensors, tensors={name: value for name, value in tensors.tensors.items() if name != key})


@pytest.mark.parametrize(
    ("changes", "source", "complaint"),
    [
        ({"text_tower": "hybrid"}, lambda: _text_of(_teacher()), "no RepMixer.*base, causal or longclip"),
        ({"text_width": 96}, lambda: _text_of(_teacher()), "width 48 and 3 heads.*set text_width 48 and text_heads 3"),
        ({"text_heads": 4}, lambda: _text_of(_teacher()), "set text_width 48 and text_heads 3"),
        ({"text_layers": 6}, lambda: _text_of(_teacher()), "5 layers, fewer than the student's 6"),
        ({}, lambda: _without(_text_of(_teacher()), "text_projection"), "has no projection"),
        ({}, lambda: _without(_text_of(_teacher()), "ln_final.bias"), r"missing keys \(ln_final.bias\)"),
        ({}, lambda: _student(text_tower="hybrid"), "has RepMixer blocks.*choose the text_tower hybrid"),
        ({"text_tower": "hybrid"}, lambda: reparameterize(_student(text_tower="hybrid")), "folded for inference"),
    ],
)
def test_text_towers_that_do_not_fit_are_one_line(
    changes: dict[str, Any], source: Callable[[], Any], complaint: str
) -> None:
    student = _student(**changes)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    with pytest.raises(InputError, match=complaint) as error:
        load_text_tower(student, source())
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize(
    "changes", [{}, {"distillation_token": True}, {"variant": "tiny"}], ids=["vit", "distilled", "fastvit"]
)
def test_a_students_image_tower_by_object_and_by_file(changes: dict[str, Any], tmp_path: Path) -> None:
    config = variant_config(changes.pop("variant", "vit_tiny"))
    source = _shaken(create_student(override(config, **changes)))
    save_student(source, tmp_path / "s.safetensors")
    images = torch.rand(2, 3, 48, 48)
    for given in (source, tmp_path / "s.safetensors", str(tmp_path / "s.safetensors")):
        student = create_student(source.config).eval()
        load_image_tower(student, given)
        assert torch.equal(student.encode_image(images), source.encode_image(images))


@torch.no_grad()
@pytest.mark.parametrize("variant", ["vit_tiny", "tiny"])
def test_an_image_tower_of_another_embedding_width(variant: str, caplog: pytest.LogCaptureFixture) -> None:
    source = _shaken(create_student(variant))
    image = replace(source.config.image, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    student = create_student(replace(source.config, embed_dim=12, image=image)).eval()
    head = {key: value.clone() for key, value in student.state_dict().items() if ".head." in key}
    with caplog.at_level(logging.INFO):
        load_image_tower(student, source)
    assert "projection is fresh" in caplog.text and len(head) == 2
    assert all(torch.equal(student.state_dict()[key], value) for key, value in head.items())
    images = torch.rand(2, 3, 48, 48)
    ours, theirs = (model.image_encoder.trunk.forward_features(images) for model in (student, source))
    assert torch.equal(ours, theirs)
    assert student.preprocess_cfg.mean == source.preprocess_cfg.mean  # what its weights know
    assert student.preprocess_cfg.std == source.preprocess_cfg.std


def test_positions_of_a_vit_are_resampled() -> None:
    source, student = (
        create_student(override(variant_config("vit_tiny"), image_size=size, distillation_token=True))
        for size in (48, 64)
    )
    with torch.no_grad():
        source.image_encoder.trunk.pos_embed[:, 2:] = torch.arange(96.0)  # the same anywhere on the grid
    load_image_tower(student, source)
    ours, theirs = (model.image_encoder.trunk.pos_embed.detach() for model in (student, source))
    assert ours.shape == (1, 2 + 8 * 8, 96)
    torch.testing.assert_close(ours[:, :2], theirs[:, :2])
    torch.testing.assert_close(ours[:, 2:], torch.arange(96.0).expand(1, 64, 96))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"image_heads": 2}, "heads 3, the student's 2"),
        ({"distillation_token": True}, "distillation_token False, the student's True"),
        ({"image_layers": 2}, "unexpected keys"),
        ({"image_patch": 16}, "wrong shapes"),
    ],
)
def test_image_towers_that_do_not_fit_are_one_line(changes: dict[str, Any], complaint: str) -> None:
    student, source = create_student(override(variant_config("vit_tiny"), **changes)), create_student("vit_tiny")
    with pytest.raises(InputError, match=complaint):
        load_image_tower(student, source)
    with pytest.raises(InputError, match="tower vit, the student's fastvit"):
        load_image_tower(create_student("tiny"), source)
    with pytest.raises(InputError, match="folded for inference"):
        load_image_tower(student, reparameterize(source))


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, nn.Module]]:
    """What timm was asked to download, with what it gave: random weights."""
    made, real = [], timm.create_model

    def create(name: str, pretrained: bool = False, **settings: Any) -> nn.Module:
        model = _shaken(real(name, **settings))
        if pretrained:
            made.append((name, model))
        return model

    monkeypatch.setattr(timm, "create_model", create)
    return made


@torch.no_grad()
@pytest.mark.parametrize("distilled", [False, True])
def test_timms_weights_of_a_vit(downloads: list, distilled: bool) -> None:
    config = override(
        variant_config("vit_s"),
        image_width=192,
        image_heads=3,
        image_size=64,
        distillation_token=distilled,
        text_width=16,
        text_heads=1,
        text_layers=1,
    )
    student = create_student(config).eval()
    head = student.image_encoder.trunk.head.weight.clone()
    load_image_tower(student, "timm")
    [(name, reference)] = downloads
    assert name == f"deit_tiny{'_distilled' if distilled else ''}_patch16_224"
    assert {one.terms for one in student.ancestry} == {NOT_KNOWN, "apache-2.0"}  # the student's own, and DeiT's
    images, trunk = torch.rand(1, 3, 64, 64), student.image_encoder.trunk
    assert torch.equal(trunk.forward_features(images), reference.forward_features(images))
    assert torch.equal(trunk.head.weight, head)
    assert student.preprocess_cfg.mean == IMAGENET_DEFAULT_MEAN and student.preprocess_cfg.std == IMAGENET_DEFAULT_STD


@torch.no_grad()
def test_timms_weights_of_a_published_tower(downloads: list) -> None:
    config = override(variant_config("s0"), image_size=64, text_width=16, text_heads=1, text_layers=1)
    student = create_student(config).eval()
    load_image_tower(student, "timm")
    [(name, reference)] = downloads
    assert name == "fastvit_mci0" and student.config == config  # the same mean and std
    assert is_research_only(student.ancestry)
    images, trunk = torch.rand(1, 3, 64, 64), student.image_encoder.trunk
    assert _distance(trunk.forward_features(images).flatten(1), reference.forward_features(images).flatten(1)) < 1e-5


def test_missing_and_unreachable_timm_weights_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no weights for the image tower fastvit"):
        load_image_tower(create_student("tiny"), "timm")
    with pytest.raises(InputError, match=r"192 with 3 heads, 384 with 6 heads.*not of 3 layers, patches of 8"):
        load_image_tower(create_student("vit_tiny"), "timm")
    config = override(variant_config("vit_s"), image_heads=6, text_width=16, text_heads=1, text_layers=1)
    student = create_student(config)

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("cannot resolve\nthe hub")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(InputError, match=r"weights of deit_small_patch16_224 .*cannot resolve") as error:
        load_image_tower(student, "timm")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("variant", "changes"), [("vit_tiny", {"distillation_token": True}), ("tiny", {})])
def test_truncated_normal_draws_only_linear_layers_and_embeddings(variant: str, changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    student = _shaken(create_student(override(variant_config(variant), **changes)))
    before = {key: value.clone() for key, value in student.state_dict().items()}
    truncated_normal_(student)
    drawn = {key: value for key, value in student.state_dict().items() if not torch.equal(value, before[key])}
    embeddings = {"pos_embed", "cls_token", "dist_token", "positional_embedding", "token_embedding.weight"}
    for key, value in before.items():
        is_embedding = any(key.endswith(name) for name in embeddings)
        is_linear = (value.ndim == 2 and key.endswith(".weight")) or key.endswith(".projection")
        assert (key in drawn) == (is_embedding or is_linear), key
    values = torch.cat([value.flatten() for value in drawn.values()])
    assert values.abs().max() <= 0.04
    # cut at two deviations, a normal distribution keeps 0.8796 of its deviation
    assert values.std().item() == pytest.approx(0.02 * 0.8796, rel=0.01)
    assert abs(values.mean().item()) < 5 * 0.02 / len(values) ** 0.5
    with torch.no_grad():
        assert student.encode_image(torch.rand(1, 3, 48, 48)).isfinite().all()
