"""The published students, written down independently of the package: key layouts, and the text tower's equations."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def apple_image_keys(trunk: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A timm FastViT's tensors under ml-mobileclip's keys: one flat `network`, in which stages, downsamplings and the
    conditional position encoding have each a number."""
    numbers, last = {}, -1
    for stage in sorted({key.split(".")[1] for key in trunk if key.startswith("stages.")}):
        parts = ["downsample.proj"] if f"stages.{stage}.downsample.proj.0.large_conv.conv.weight" in trunk else []
        parts += ["pos_emb.pos_enc"] if f"stages.{stage}.pos_emb.pos_enc.weight" in trunk else []
        for part in [*parts, "blocks"]:
            last += 1
            numbers[f"stages.{stage}.{part}"] = (
                last,
                {"downsample.proj": ".proj", "pos_emb.pos_enc": ".pe"}.get(part, ""),
            )
    published = {}
    for key, value in trunk.items():
        for ours, (number, suffix) in numbers.items():
            if key.startswith(ours + "."):
                key = f"network.{number}{suffix}" + key.removeprefix(ours)
        for ours, theirs in (
            ("stem.", "patch_embed."),
            ("conv_kxk", "rbr_conv"),
            ("conv_scale", "rbr_scale"),
            ("identity", "rbr_skip"),
            ("final_conv.se.fc1", "conv_exp.se.reduce"),
            ("final_conv.se.fc2", "conv_exp.se.expand"),
            ("final_conv", "conv_exp"),
            ("large_conv", "lkb_origin"),
            (".mlp.", ".convffn."),
            (".gamma", ""),
        ):
            key = key.replace(ours, theirs)
        if key == "head.fc.weight":
            key, value = "head.proj", value.T
        if key != "head.fc.bias":  # the published projection has none
            published[f"image_encoder.model.{key}"] = value
    return published


def apple_b_image_keys(trunk: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's `vit_base_mci_224` under ml-mobileclip's keys."""
    published = {}
    for key, value in trunk.items():
        for pattern, replacement in (
            (r"^patch_embed\.backbone\.(\d)\.conv\.", r"patch_emb.\1.block.conv."),
            (r"^patch_embed\.backbone\.(\d)\.bn\.", r"patch_emb.\1.block.norm."),
            (r"^norm\.", "post_transformer_norm."),
            (r"^blocks\.(\d+)\.norm1\.", r"transformer.\1.pre_norm_mha.0."),
            (r"^blocks\.(\d+)\.attn\.qkv\.", r"transformer.\1.pre_norm_mha.1.qkv_proj."),
            (r"^blocks\.(\d+)\.attn\.proj\.", r"transformer.\1.pre_norm_mha.1.out_proj."),
            (r"^blocks\.(\d+)\.norm2\.", r"transformer.\1.pre_norm_ffn.0."),
            (r"^blocks\.(\d+)\.mlp\.fc1\.", r"transformer.\1.pre_norm_ffn.1."),
            (r"^blocks\.(\d+)\.mlp\.fc2\.", r"transformer.\1.pre_norm_ffn.4."),
        ):
            key = re.sub(pattern, replacement, key)
        if key == "head.weight":
            key, value = "classifier.proj", value.T
        if key == "pos_embed":
            key, value = "pos_embed.pos_embed.pos_embed", value.unsqueeze(0)
        if key != "head.bias":
            published[f"image_encoder.model.{key}"] = value
    return published


def apple_text_state(
    *, width: int, layers: int, embed_dim: int, hybrid: bool, device: str = "cpu"
) -> dict[str, Tensor]:
    """Random weights of a text tower of 77 positions in ml-mobileclip's layout, no block of it invisible."""

    def normal(*shape: int, std: float) -> Tensor:
        return torch.empty(shape, device=device).normal_(0, std)

    def uniform(*shape: int) -> Tensor:
        return torch.empty(shape, device=device).uniform_(0.5, 1.5)

    def norm(name: str, *, running: bool) -> dict[str, Tensor]:
        entries = {f"{name}.weight": uniform(width), f"{name}.bias": uniform(width)}
        if running:
            entries |= {f"{name}.running_mean": uniform(width), f"{name}.running_var": uniform(width)}
            entries[f"{name}.num_batches_tracked"] = torch.zeros((), dtype=torch.int64, device=device)
        return entries

    def linear(name: str, rows: int, columns: int, *kernel: int) -> dict[str, Tensor]:
        weight = normal(rows, columns, *kernel, std=columns**-0.5)
        return {f"{name}.weight": weight, f"{name}.bias": normal(rows, std=0.1)}

    def attention(name: str) -> dict[str, Tensor]:
        return {
            **norm(f"{name}.pre_norm_mha.0", running=False),
            **linear(f"{name}.pre_norm_mha.1.qkv_proj", 3 * width, width),
            **linear(f"{name}.pre_norm_mha.1.out_proj", width, width),
            **norm(f"{name}.pre_norm_ffn.0", running=False),
            **linear(f"{name}.pre_norm_ffn.1", 4 * width, width),
            **linear(f"{name}.pre_norm_ffn.4", width, 4 * width),
        }

    def repmixer(name: str) -> dict[str, Tensor]:
        return {
            f"{name}.layer_scale": uniform(width, 1, 1),
            f"{name}.token_mixer.layer_scale": uniform(width, 1, 1),
            **norm(f"{name}.token_mixer.norm.rbr_skip", running=True),
            **norm(f"{name}.token_mixer.mixer.rbr_skip", running=True),
            f"{name}.token_mixer.mixer.rbr_conv.0.conv.weight": normal(width, 1, 1, 11, std=0.3),
            **norm(f"{name}.token_mixer.mixer.rbr_conv.0.bn", running=True),
            f"{name}.convffn.conv.conv.weight": normal(width, 1, 1, 11, std=0.3),
            **norm(f"{name}.convffn.conv.bn", running=True),
            **linear(f"{name}.convffn.fc1", 4 * width, width, 1, 1),
            **linear(f"{name}.convffn.fc2", width, 4 * width, 1, 1),
        }

    blocks = [attention] * layers
    if hybrid:
        blocks = [repmixer, *blocks, repmixer]
    entries = {
        "embedding_layer.weight": normal(49408, width, std=1.0),
        "positional_embedding.pos_embed.pos_embed": normal(1, 1, 77, width, std=1.0),
        "projection_layer": normal(width, embed_dim, std=width**-0.5),
        **norm("final_layer_norm", running=False),
    }
    for index, block in enumerate(blocks):
        entries |= block(f"transformer.{index}")
    return {f"text_encoder.{key}": value for key, value in entries.items()}


def open_clip_text_state(apple: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A base text tower's tensors, moved from ml-mobileclip's layout to open_clip's."""
    published = {}
    for key, value in apple.items():
        for theirs, open_clip in (
            ("text_encoder.", "text."),
            ("embedding_layer", "token_embedding"),
            ("positional_embedding.pos_embed.pos_embed", "positional_embedding"),
            ("projection_layer", "text_projection"),
            ("final_layer_norm", "ln_final"),
            (".transformer.", ".transformer.resblocks."),
            ("pre_norm_mha.0", "ln_1"),
            ("pre_norm_mha.1.qkv_proj.", "attn.in_proj_"),
            ("pre_norm_mha.1.", "attn."),
            ("pre_norm_ffn.0", "ln_2"),
            ("pre_norm_ffn.1", "mlp.c_fc"),
            ("pre_norm_ffn.4", "mlp.c_proj"),
        ):
            key = key.replace(theirs, open_clip)
        published[key] = value[0, 0] if key == "text.positional_embedding" else value
    return published


def text_features(state: Mapping[str, Tensor], tokens: Tensor, *, heads: int, causal: bool) -> Tensor:
    """MobileCLIP's text tower in plain tensor operations on ml-mobileclip's keys: 77 positions, pads attended."""
    state = {key.removeprefix("text_encoder."): value for key, value in state.items()}
    x = state["embedding_layer.weight"][tokens] + state["positional_embedding.pos_embed.pos_embed"][0, 0]
    index = 0
    while any(key.startswith(f"transformer.{index}.") for key in state):
        prefix = f"transformer.{index}."
        block = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        x = _repmixer(block, x) if "layer_scale" in block else _attention(block, x, heads, causal)
        index += 1
    x = _layer_norm(state, "final_layer_norm", x)
    return x[torch.arange(len(x)), tokens.argmax(dim=1)] @ state["projection_layer"]


def _attention(block: Mapping[str, Tensor], x: Tensor, heads: int, causal: bool) -> Tensor:
    batch, length, width = x.shape
    normed = _layer_norm(block, "pre_norm_mha.0", x)
    query, key, value = _linear(block, "pre_norm_mha.1.qkv_proj", normed).split(width, dim=2)
    split = (batch, length, heads, width // heads)
    query, key, value = (part.reshape(split).transpose(1, 2) for part in (query, key, value))
    scores = query @ key.mT / (width // heads) ** 0.5
    if causal:
        scores = scores + torch.full((length, length), float("-inf")).triu(1)
    mixed = (scores.softmax(dim=3) @ value).transpose(1, 2).reshape(batch, length, width)
    x = x + _linear(block, "pre_norm_mha.1.out_proj", mixed)
    hidden = _gelu(_linear(block, "pre_norm_ffn.1", _layer_norm(block, "pre_norm_ffn.0", x)))
    return x + _linear(block, "pre_norm_ffn.4", hidden)


def _repmixer(block: Mapping[str, Tensor], x: Tensor) -> Tensor:
    x = x.mT.unsqueeze(2)  # B C 1 L
    mixer = _batch_norm(block, "token_mixer.mixer.rbr_conv.0.bn", _conv(block, "token_mixer.mixer.rbr_conv.0.conv", x))
    mixer = mixer + _batch_norm(block, "token_mixer.mixer.rbr_skip", x)
    x = x + block["token_mixer.layer_scale"] * (mixer - _batch_norm(block, "token_mixer.norm.rbr_skip", x))
    hidden = _batch_norm(block, "convffn.conv.bn", _conv(block, "convffn.conv.conv", x))
    hidden = _gelu(F.conv2d(hidden, block["convffn.fc1.weight"], block["convffn.fc1.bias"]))
    hidden = F.conv2d(hidden, block["convffn.fc2.weight"], block["convffn.fc2.bias"])
    return (x + block["layer_scale"] * hidden).squeeze(2).mT


def _conv(block: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Depthwise over tokens, as a sum over the kernel's taps."""
    weight = block[f"{name}.weight"]
    reach = weight.shape[3] // 2
    padded = F.pad(x, (reach, reach))
    return sum(weight[:, 0, 0, tap, None, None] * padded[..., tap : tap + x.shape[3]] for tap in range(weight.shape[3]))


def _batch_norm(block: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    mean, var, weight, bias = (
        block[f"{name}.{entry}"][:, None, None] for entry in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def _layer_norm(state: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    deviation = (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    return centred / deviation * state[f"{name}.weight"] + state[f"{name}.bias"]


def _linear(state: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].mT + state[f"{name}.bias"]


def _gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))
