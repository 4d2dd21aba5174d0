"""Rename the keys of published students to ours. There are two published layouts:

`ml-mobileclip` (S0, S1, S2, B): `image_encoder.model.*`, `text_encoder.*`; the image keys go through timm's filters.
`open_clip` (all but S0): `visual.trunk.*`, `text.*`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

import torch
from timm.models import fastvit, vision_transformer_hybrid
from torch import Tensor

from longclip_teacher.errors import InputError
from mobileclip_student.image_encoder import ImageEncoder
from mobileclip_student.model import MobileCLIP, StudentConfig

__all__ = ["fits", "is_apple", "is_published", "rename_clip_text", "rename_keys"]

_APPLE_IMAGE, _APPLE_TEXT = "image_encoder.model.", "text_encoder."
_OPEN_CLIP_IMAGE, _OPEN_CLIP_TEXT = "visual.", "text."

_POSITIONS = "text_encoder.positional_embedding"
_Rules = tuple[tuple[str, str], ...]

# Within the text tower: their pattern, our key; applied in this order
_APPLE_TEXT_KEYS: _Rules = (
    (r"^embedding_layer\.", "token_embedding."),
    (r"^positional_embedding\.pos_embed\.pos_embed$", "positional_embedding"),
    (r"^final_layer_norm\.", "ln_final."),
    (r"^projection_layer$", "projection"),
    (r"^transformer\.(\d+)\.", r"blocks.\1."),
    (r"\.pre_norm_mha\.0\.", ".ln_1."),
    (r"\.pre_norm_mha\.1\.qkv_proj\.", ".in_proj_"),
    (r"\.pre_norm_mha\.1\.out_proj\.", ".out."),
    (r"\.pre_norm_ffn\.0\.", ".ln_2."),
    (r"\.pre_norm_ffn\.1\.", ".fc1."),
    (r"\.pre_norm_ffn\.4\.", ".fc2."),
    (r"\.token_mixer\.norm\.rbr_skip\.", ".token_mixer.norm."),
    (r"\.token_mixer\.mixer\.rbr_skip\.", ".token_mixer.skip_norm."),
    (r"\.token_mixer\.mixer\.rbr_conv\.0\.conv\.", ".token_mixer.conv."),
    (r"\.token_mixer\.mixer\.rbr_conv\.0\.bn\.", ".token_mixer.conv_norm."),
    (r"\.convffn\.conv\.conv\.", ".ffn_conv.conv."),
    (r"\.convffn\.conv\.bn\.", ".ffn_conv.norm."),
    (r"\.convffn\.(fc\d)\.", r".\1."),
    (r"\.layer_scale$", ".layer_scale.gamma"),
)
_OPEN_CLIP_TEXT_KEYS: _Rules = (
    (r"^text_projection$", "projection"),
    (r"^transformer\.resblocks\.(\d+)\.", r"blocks.\1."),
    (r"\.attn\.in_proj_", ".in_proj_"),
    (r"\.attn\.out_proj\.", ".out."),
    (r"\.mlp\.c_fc\.", ".fc1."),
    (r"\.mlp\.c_proj\.", ".fc2."),
)


def is_apple(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these keys follow ml-mobileclip's layout."""
    return any(key.startswith(_APPLE_IMAGE) for key in tensors)


def is_published(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these keys follow one of the two published layouts."""
    return is_apple(tensors) or any(key.startswith(_OPEN_CLIP_IMAGE + "trunk.") for key in tensors)


def rename_keys(tensors: Mapping[str, Tensor], config: StudentConfig) -> dict[str, Tensor]:
    """The tensors under our keys, in our shapes. An unknown key keeps its name, so that the strict load names it."""
    if is_apple(tensors):
        image_prefix, text_prefix, text_keys = _APPLE_IMAGE, _APPLE_TEXT, _APPLE_TEXT_KEYS
        image_tensors = {key: value for key, value in tensors.items() if key.startswith(image_prefix)}
        renamed = _apple_image(image_tensors, config)
    else:
        image_prefix, text_prefix, text_keys = _OPEN_CLIP_IMAGE, _OPEN_CLIP_TEXT, _OPEN_CLIP_TEXT_KEYS
        renamed = {
            f"image_encoder.{key.removeprefix(image_prefix)}": value
            for key, value in tensors.items()
            if key.startswith(image_prefix)
        }
    for key, value in tensors.items():
        if key.startswith(text_prefix):
            renamed.update(_text_entry(key.removeprefix(text_prefix), value, text_keys))
        elif not key.startswith(image_prefix):
            renamed[key] = value
    return renamed


def rename_clip_text(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of open_clip's (and Long-CLIP's) text transformer under the keys of our text encoder."""
    renamed: dict[str, Tensor] = {}
    for key, value in tensors.items():
        renamed.update(_text_entry(key, value, _OPEN_CLIP_TEXT_KEYS))
    return {key.removeprefix("text_encoder."): value for key, value in renamed.items()}


def fits(tensors: Mapping[str, Tensor], config: StudentConfig) -> bool:
    """Whether these published tensors have the keys and shapes of `config`. The number of positions may differ."""
    try:
        renamed = rename_keys(tensors, config)
    except InputError:
        return False
    return {key: value.shape for key, value in renamed.items() if key != _POSITIONS} == _wanted_shapes(config)


@lru_cache
def _wanted_shapes(config: StudentConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        student = MobileCLIP(config)
    return {key: value.shape for key, value in student.state_dict().items() if key != _POSITIONS}


def _text_entry(key: str, value: Tensor, rules: _Rules) -> dict[str, Tensor]:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    if key == "positional_embedding" and value.dim() == 4:
        value = value.flatten(0, 2)  # 1 1 L C -> L C
    elif key.endswith(".layer_scale.gamma"):
        value = value.flatten()  # C 1 1 -> C
    elif re.search(r"\.fc\d\.weight$", key) and value.dim() == 4:
        value = value.flatten(1)  # a 1 x 1 convolution is a linear layer
    match = re.fullmatch(r"(.*)\.in_proj_(weight|bias)", key)
    if match is None or value.dim() == 0:
        return {f"text_encoder.{key}": value}
    width = len(value) // 3  # rows: query, key, value
    block, kind = match.groups()
    return {
        f"text_encoder.{block}.query.{kind}": value[:width],
        f"text_encoder.{block}.key_value.{kind}": value[width:],
    }


def _apple_image(tensors: dict[str, Tensor], config: StudentConfig) -> dict[str, Tensor]:
    with torch.device("meta"):  # the filters only look at the model's structure
        trunk = ImageEncoder(config.image, config.embed_dim).trunk
    module = vision_transformer_hybrid if config.image.tower == "vit_base_mci_224" else fastvit
    try:
        renamed = module.checkpoint_filter_fn(tensors, trunk)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        raise InputError(f"the image tower in this file is not that of variant {config.variant}") from None
    return {f"image_encoder.trunk.{key}": value for key, value in renamed.items()}
