"""ViT students: the equations of a ViT and of DeiT's two tokens, and everything that a student must support."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from longclip_teacher.errors import InputError
from mobileclip_student import (
    VARIANTS,
    MobileCLIP,
    checkpoint,
    create_student,
    load_student,
    override,
    reparameterize,
    save_student,
)
from mobileclip_student.image_encoder import ImageConfig
from mobileclip_student.inference import fast_image_encoder
from mobileclip_student.model import variant_config

VIT = {"tower": "vit", "image_size": 32, "patch": 8, "width": 24, "depth": 2, "heads": 3}


def _student(distillation_token: bool, text_tower: str = "base") -> MobileCLIP:
    """A small ViT student whose weights are nowhere neutral (0 or 1)."""
    torch.manual_seed(0)
    config = override(
        variant_config("vit_tiny"), distillation_token=distillation_token, image_layers=2, text_tower=text_tower
    )
    student = create_student(config, context_length=20)
    with torch.no_grad():
        for parameter in student.image_encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return student.eval()


def _by_hand(student: MobileCLIP, images: Tensor) -> list[Tensor]:
    """An Image is Worth 16x16 Words, equations 1-4, and DeiT, section 4: a feature of each class token."""
    image, w = student.config.image, student.image_encoder.trunk.state_dict()
    patches = F.unfold(images, image.patch, stride=image.patch).transpose(1, 2)  # B N 3PP
    x = patches @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"]
    names = ["cls_token", "dist_token"][: 2 if image.distillation_token else 1]
    x = torch.cat([*(w[name].expand(len(x), -1, -1) for name in names), x], dim=1) + w["pos_embed"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]
        )

    for layer in range(image.depth):
        block = f"blocks.{layer}"
        projected = norm(x, f"{block}.norm1") @ w[f"{block}.attn.qkv.weight"].T + w[f"{block}.attn.qkv.bias"]
        query, key, value = (part.unflatten(2, (image.heads, -1)).transpose(1, 2) for part in projected.chunk(3, dim=2))
        scores = query @ key.transpose(2, 3) / math.sqrt(image.width // image.heads)
        mixed = (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
        x = x + mixed @ w[f"{block}.attn.proj.weight"].T + w[f"{block}.attn.proj.bias"]
        hidden = norm(x, f"{block}.norm2") @ w[f"{block}.mlp.fc1.weight"].T + w[f"{block}.mlp.fc1.bias"]
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        x = x + hidden @ w[f"{block}.mlp.fc2.weight"].T + w[f"{block}.mlp.fc2.bias"]
    x = norm(x, "norm")
    heads = ["head", "head_dist"][: len(names)]
    return [x[:, index] @ w[f"{head}.weight"].T + w[f"{head}.bias"] for index, head in enumerate(heads)]


@torch.no_grad()
@pytest.mark.parametrize("distillation_token", [False, True])
def test_features_follow_the_equations(distillation_token: bool) -> None:
    student = _student(distillation_token).double()
    images = torch.rand(3, 3, 48, 48, dtype=torch.float64)
    wanted = _by_hand(student, images)
    for training in (False, True):
        class_features, distillation_features = student.train(training).encode_image_heads(images)
        torch.testing.assert_close(class_features, wanted[0], rtol=0, atol=1e-10)
        assert (distillation_features is not None) == distillation_token
        if distillation_features is not None:
            torch.testing.assert_close(distillation_features, wanted[1], rtol=0, atol=1e-10)
            assert (wanted[0] - wanted[1]).abs().max() > 0.1  # two heads, two answers
        torch.testing.assert_close(student.encode_image(images), sum(wanted) / len(wanted), rtol=0, atol=1e-10)
    unit = student.encode_image(images, normalize=True)
    torch.testing.assert_close(unit, F.normalize(sum(wanted) / len(wanted), dim=1), rtol=0, atol=1e-10)


@torch.no_grad()
def test_other_towers_have_one_head() -> None:
    student, images = create_student("tiny").eval(), torch.rand(2, 3, 48, 48)
    class_features, distillation_features = student.encode_image_heads(images)
    assert distillation_features is None and torch.equal(class_features, student.encode_image(images))


def test_each_head_teaches_its_own_token() -> None:
    student = _student(True)
    features = student.encode_image_heads(torch.rand(2, 3, 48, 48))[1]
    assert features is not None
    features.sum().backward()
    trunk = student.image_encoder.trunk
    assert trunk.head.weight.grad is None and trunk.head_dist.weight.grad.abs().max() > 0
    assert trunk.dist_token.grad.abs().max() > 0 and trunk.patch_embed.proj.weight.grad.abs().max() > 0


@torch.no_grad()
@pytest.mark.parametrize("distillation_token", [False, True])
def test_saved_fused_and_fast_students_give_the_same(
    distillation_token: bool, captions: Callable, tmp_path: Path
) -> None:
    student = _student(distillation_token, text_tower="longclip")
    images, tokens = torch.rand(2, 3, 48, 48), captions(9, 20, width=20)
    image_features, text_features = student.encode_image(images), student.encode_text(tokens)
    save_student(student, tmp_path / "vit.safetensors")
    fused = reparameterize(student)
    save_student(fused, tmp_path / "fused.safetensors")
    for other in (load_student(tmp_path / "vit.safetensors"), fused, load_student(tmp_path / "fused.safetensors")):
        assert torch.equal(other.encode_image(images), image_features)
        assert torch.equal(other.encode_text(tokens), text_features)
    assert load_student(tmp_path / "vit.safetensors").config == student.config
    assert len(list(fused.modules())) == len(list(student.modules()))  # nothing to fold
    torch.testing.assert_close(fast_image_encoder(student, "eager")(images), image_features, rtol=0, atol=1e-6)


def test_stochastic_depth_rises_to_its_share() -> None:
    torch.manual_seed(0)
    student = create_student(override(variant_config("vit_tiny"), drop_path=0.4)).train()
    blocks = student.image_encoder.trunk.blocks
    shares = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]
    assert shares == pytest.approx([0.0, 0.2, 0.4])
    images = torch.rand(8, 3, 48, 48)
    assert not torch.equal(student.encode_image(images), student.encode_image(images))
    assert torch.equal(student.eval().encode_image(images), student.encode_image(images))


def test_our_variants_are_never_guessed_from_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They have no published files, so weights of unknown origin can only be those of published variants."""
    tried: list[str] = []
    monkeypatch.setattr(checkpoint, "fits", lambda _tensors, config: tried.append(config.variant))
    save_file({"visual.trunk.x": torch.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(InputError, match="fits none of the variants"):
        load_student(tmp_path / "weights.safetensors")
    assert set(tried) == set(VARIANTS) - {"tiny", "small", "vit_tiny", "vit_s", "vit_b"}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"patch": 7}, "image_size 32 is not a multiple of the patch 7"),
        ({"heads": 5}, "image width 24 is not a multiple of its 5 heads"),
        ({"depth": 0}, "needs a depth"),
        ({"width": 10**9}, "needs a width"),
        ({"heads": 2.0}, "needs a heads in"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"layers": (1,), "embed_dims": (8,)}, "layers and embed_dims"),
        ({"norm_eps": 1e-5}, "norm_eps"),
        ({"tower": "fastvit_mci0"}, "'vit' only"),
        ({"tower": "fastvit_mci0", "patch": 0, "width": 0, "depth": 0, "heads": 0, "distillation_token": True}, "only"),
    ],
)
def test_impossible_vits_are_refused(change: dict[str, object], complaint: str) -> None:
    ImageConfig(**VIT)
    with pytest.raises(InputError, match=complaint):
        ImageConfig(**{**VIT, **change})
