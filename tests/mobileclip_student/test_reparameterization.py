"""The fused copy computes the same function with fewer modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from timm.models.fastvit import RepMixerBlock as ImageRepMixerBlock
from torch import Tensor, nn

from mobileclip_student import MobileCLIP, create_student, load_student, reparameterize, save_student
from mobileclip_student.image_encoder import ImageConfig
from mobileclip_student.model import variant_config


def _distance(ours: Tensor, theirs: Tensor) -> float:
    return float(((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).max())


def _modules(module: nn.Module) -> int:
    return sum(1 for _ in module.modules())


@pytest.fixture
def student(visible: Callable) -> MobileCLIP:
    torch.manual_seed(0)
    return visible(create_student("tiny", context_length=40)).eval()


@torch.no_grad()
def test_outputs_are_equal_and_the_original_untouched(student: MobileCLIP, captions: Callable) -> None:
    student.train()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    fused = reparameterize(student)
    assert student.training and not student.config.reparameterized
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())

    student.eval()
    images, tokens = torch.rand(2, 3, 48, 48), captions(9, 40, 25, width=40)
    assert not fused.training and fused.config == replace(student.config, reparameterized=True)
    assert _distance(fused.encode_image(images), student.encode_image(images)) < 1e-5
    assert _distance(fused.encode_text(tokens), student.encode_text(tokens)) < 1e-5
    assert _modules(fused.image_encoder) < 0.6 * _modules(student.image_encoder)
    assert _modules(fused.text_encoder) == _modules(student.text_encoder) - 2 * 7  # in each RepMixer block
    kinds = {type(module).__name__ for module in fused.modules()}
    assert not kinds & {"BatchNorm2d", "BatchNormAct2d", "TokenBatchNorm", "LayerScale", "LayerScale2d"}
    assert not any(parameter.requires_grad for parameter in fused.parameters())


@torch.no_grad()
def test_padding_still_does_not_matter(student: MobileCLIP, captions: Callable) -> None:
    tokens, fused = captions(9, 40, width=40), reparameterize(student)
    torch.testing.assert_close(fused.encode_text(tokens[:1, :9])[0], fused.encode_text(tokens)[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_no_block_is_invisible_here(student: MobileCLIP, captions: Callable) -> None:
    """If one were, the tests of this file would pass with that block fused wrongly."""
    fused = reparameterize(student)
    images, tokens = torch.rand(2, 3, 48, 48), captions(9, 40, width=40)
    image_features, text_features = student.encode_image(images), student.encode_text(tokens)
    num_blocks = 0
    for stage in fused.image_encoder.trunk.stages:
        for index, block in enumerate(stage.blocks):
            assert isinstance(block, ImageRepMixerBlock)
            stage.blocks[index] = nn.Identity()
            assert _distance(fused.encode_image(images), image_features) > 1e-3
            stage.blocks[index] = block
            num_blocks += 1
    for index in range(len(fused.text_encoder.blocks)):
        shorter = reparameterize(student)
        del shorter.text_encoder.blocks[index]
        assert _distance(shorter.encode_text(tokens), text_features) > 1e-3
    assert num_blocks == 4 and index == 2


@torch.no_grad()
def test_attention_stage_and_squeeze_excite_fold_too(visible: Callable) -> None:
    torch.manual_seed(0)
    config = replace(variant_config("tiny"), image=ImageConfig("fastvit_mci0", 64), context_length=8)
    student = visible(create_student(config)).double().eval()  # 20 such blocks in a row magnify fp32's rounding
    images = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    fused = reparameterize(student)
    assert _distance(fused.encode_image(images), student.encode_image(images)) < 1e-10
    assert _modules(fused.image_encoder) < 0.5 * _modules(student.image_encoder)


@torch.no_grad()
def test_fusing_twice_is_fusing_once(student: MobileCLIP) -> None:
    once = reparameterize(student)
    twice = reparameterize(once)
    assert twice is not once
    assert all(torch.equal(tensor, once.state_dict()[name]) for name, tensor in twice.state_dict().items())


@torch.no_grad()
def test_fused_students_are_saved_and_loaded(student: MobileCLIP, captions: Callable, tmp_path: Path) -> None:
    fused = reparameterize(student)
    save_student(fused, tmp_path / "fused.safetensors")
    loaded = load_student(tmp_path / "fused.safetensors")
    assert loaded.config == fused.config
    tokens = captions(9, 40, width=40)
    torch.testing.assert_close(loaded.encode_text(tokens), fused.encode_text(tokens), rtol=0, atol=0)
    images = torch.rand(2, 3, 48, 48)
    torch.testing.assert_close(loaded.encode_image(images), fused.encode_image(images), rtol=0, atol=0)


@torch.no_grad()
def test_base_text_towers_are_unchanged(captions: Callable) -> None:
    config = variant_config("tiny")
    student = create_student(replace(config, text=replace(config.text, hybrid=False), context_length=20)).eval()
    fused = reparameterize(student)
    assert _modules(fused.text_encoder) == _modules(student.text_encoder)
    tokens = captions(9, 20, width=20)
    assert torch.equal(fused.encode_text(tokens), student.encode_text(tokens))
