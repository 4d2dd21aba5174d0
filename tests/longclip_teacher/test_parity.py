"""LongCLIP against a plain forward written from the published equations, on random weights in the published layout."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longclip_teacher import LongCLIP, export_official, load_teacher

Weights = dict[str, Tensor]
MakeWeights = Callable[..., Weights]
MakeTokens = Callable[..., Tensor]
LENGTHS = [248, 2, 19, 20, 21, 100, 101, 150, 60, 40, 33, 7]  # around the 20 kept positions, and in several buckets


def layer_norm(x: Tensor, w: Weights, name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def attention(x: Tensor, w: Weights, name: str, causal: bool) -> Tensor:
    batch, length, width = x.shape
    heads = width // 64
    joined = x @ w[f"{name}.in_proj_weight"].T + w[f"{name}.in_proj_bias"]
    query, key, value = (part.reshape(batch, length, heads, 64).transpose(1, 2) for part in joined.split(width, dim=-1))
    scores = query @ key.transpose(2, 3) / 8  # square root of 64
    if causal:
        for row in range(length):
            scores[:, :, row, row + 1 :] = -math.inf
    mixed = (scores.exp() / scores.exp().sum(-1, keepdim=True)) @ value
    mixed = mixed.transpose(1, 2).reshape(batch, length, width)
    return mixed @ w[f"{name}.out_proj.weight"].T + w[f"{name}.out_proj.bias"]


def transformer(x: Tensor, w: Weights, name: str, causal: bool) -> Tensor:
    layer = 0
    while f"{name}.resblocks.{layer}.ln_1.weight" in w:
        block = f"{name}.resblocks.{layer}"
        x = x + attention(layer_norm(x, w, f"{block}.ln_1"), w, f"{block}.attn", causal)
        hidden = layer_norm(x, w, f"{block}.ln_2") @ w[f"{block}.mlp.c_fc.weight"].T + w[f"{block}.mlp.c_fc.bias"]
        hidden = hidden / (1 + (-1.702 * hidden).exp())  # QuickGELU
        x = x + hidden @ w[f"{block}.mlp.c_proj.weight"].T + w[f"{block}.mlp.c_proj.bias"]
        layer += 1
    return x


def image_features(w: Weights, images: Tensor) -> Tensor:
    patch = w["visual.conv1.weight"].shape[-1]
    cut = images.unfold(2, patch, patch).unfold(3, patch, patch)  # [B, 3, rows, columns, p, p]
    pixels = cut.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = pixels @ w["visual.conv1.weight"].flatten(1).T
    x = torch.cat([w["visual.class_embedding"].expand(len(x), 1, -1), x], dim=1) + w["visual.positional_embedding"]
    x = transformer(layer_norm(x, w, "visual.ln_pre"), w, "visual.transformer", causal=False)
    return layer_norm(x[:, 0], w, "visual.ln_post") @ w["visual.proj"]


def text_features(w: Weights, tokens: Tensor) -> Tensor:
    mask1 = torch.zeros(248, 1)
    mask1[:20] = 1
    mask2 = torch.zeros(248, 1)
    mask2[20:] = 1
    x = w["token_embedding.weight"][tokens]
    x = x + w["positional_embedding"] * mask1 + w["positional_embedding_res"] * mask2
    x = layer_norm(transformer(x, w, "transformer", causal=True), w, "ln_final")
    return torch.stack([row[ids.argmax()] for row, ids in zip(x, tokens, strict=True)]) @ w["text_projection"]


def load_official(weights: Weights, folder: Path) -> LongCLIP:
    torch.save(weights, folder / "longclip.pt")
    return load_teacher(folder / "longclip.pt")


@torch.no_grad()
def test_features_equal_the_published_equations(
    official_weights: MakeWeights, caption_tokens: MakeTokens, tmp_path: Path
) -> None:
    weights = official_weights()
    model = load_official(weights, tmp_path)
    tokens, images = caption_tokens(LENGTHS), torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    exact = {key: value.double() for key, value in weights.items()}
    image, text = image_features(exact, images.double()), text_features(exact, tokens)
    assert 0.3 < image.std() < 3
    assert 0.3 < text.std() < 3
    torch.testing.assert_close(model.encode_image(images).double(), image, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.encode_text(tokens).double(), text, atol=1e-5, rtol=0)
    unit = image / image.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(model.encode_image(images, normalize=True).double(), unit, atol=1e-6, rtol=0)
    unit = text / text.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(model.encode_text(tokens, normalize=True).double(), unit, atol=1e-6, rtol=0)
    assert model.linear_logit_scale.item() == pytest.approx(math.exp(3.7), rel=1e-6)


@torch.no_grad()
def test_deleting_any_block_changes_the_features(
    official_weights: MakeWeights, caption_tokens: MakeTokens, tmp_path: Path
) -> None:
    model = load_official(official_weights(), tmp_path)
    tokens, images = caption_tokens(LENGTHS), torch.randn(4, 3, 32, 32)
    image, text = model.encode_image(images), model.encode_text(tokens)
    for layer in range(3):
        shorter = copy.deepcopy(model)
        del shorter.visual.transformer.resblocks[layer]
        assert (shorter.encode_image(images) - image).abs().max() > 0.1
    for layer in range(2):
        shorter = copy.deepcopy(model)
        del shorter.text.transformer.resblocks[layer]
        assert (shorter.encode_text(tokens) - text).abs().max() > 0.1


@torch.no_grad()
def test_every_weight_of_the_file_matters(
    official_weights: MakeWeights, caption_tokens: MakeTokens, tmp_path: Path
) -> None:
    weights = official_weights()
    tokens, images = caption_tokens([30, 248, 9]), torch.randn(2, 3, 32, 32)

    def outputs(changed: Weights) -> Tensor:
        model = load_official(changed, tmp_path)
        parts = (model.encode_image(images), model.encode_text(tokens), model.linear_logit_scale)
        return torch.cat([part.flatten() for part in parts])

    before = outputs(weights)
    for key, value in weights.items():
        change = (outputs({**weights, key: value + 0.3 * torch.randn_like(value)}) - before).abs().max()
        assert change > 1e-3, key


@torch.no_grad()
def test_each_position_table_is_used_only_on_its_side_of_row_20(
    official_weights: MakeWeights, caption_tokens: MakeTokens, tmp_path: Path
) -> None:
    weights = official_weights()
    tokens = caption_tokens([248, 25])
    before = load_official(weights, tmp_path).encode_text(tokens)
    for key, unused, used in (
        ("positional_embedding", slice(20, None), slice(0, 20)),
        ("positional_embedding_res", slice(0, 20), slice(20, None)),
    ):
        for rows, matters in ((unused, False), (used, True)):
            table = weights[key].clone()
            table[rows] += 1
            after = load_official({**weights, key: table}, tmp_path).encode_text(tokens)
            assert torch.equal(after, before) is not matters


@torch.no_grad()
def test_vit_b16_at_its_real_shapes(official_weights: MakeWeights, caption_tokens: MakeTokens, tmp_path: Path) -> None:
    weights = official_weights(
        image_width=768,
        image_layers=12,
        patch=16,
        image_size=224,
        text_width=512,
        text_layers=12,
        vocab_size=49408,
        embed_dim=512,
        shared_layers=True,
    )
    model = load_official(weights, tmp_path)
    tokens, images = caption_tokens([120, 12], sot=49406, eot=49407), torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(model.encode_image(images), image_features(weights, images), atol=1e-5, rtol=0)
    torch.testing.assert_close(model.encode_text(tokens), text_features(weights, tokens), atol=1e-5, rtol=0)


@torch.no_grad()
def test_export_restores_the_published_layout(
    official_weights: MakeWeights, caption_tokens: MakeTokens, tmp_path: Path
) -> None:
    weights = official_weights()
    model = load_official(weights, tmp_path)
    exported = export_official(model)
    assert {key: value.shape for key, value in exported.items()} == {key: value.shape for key, value in weights.items()}
    tokens = caption_tokens([248, 25])
    torch.testing.assert_close(text_features(exported, tokens), text_features(weights, tokens), atol=1e-5, rtol=0)
    assert torch.equal(load_official(exported, tmp_path).encode_text(tokens), model.encode_text(tokens))
