"""Rename the keys of published CLIP checkpoints to LongCLIP's.

Layouts: OpenAI's (open_clip's `CLIP` and Long-CLIP share it), open_clip's `CustomTextCLIP` (the text tower under
`text.`) and transformers' `CLIPModel` (separate query, key and value; transposed projections).
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from longclip_teacher.errors import InputError
from longclip_teacher.positions import NUM_KEPT_POSITIONS

__all__ = ["FROZEN_POSITIONS", "POSITIONS", "to_our_keys"]

POSITIONS = "text.positional_embedding"
FROZEN_POSITIONS = "text.frozen_positional_embedding"
_POSITIONS_RES = "text.positional_embedding_res"  # Long-CLIP's second table, used from row 20 on

_OPENAI_CONSTANTS = ("input_resolution", "context_length", "vocab_size")  # only OpenAI's own files carry these numbers
_TRANSFORMERS_NAMES = {
    "logit_scale": "logit_scale",
    "text_projection.weight": "text.text_projection",
    "text_model.embeddings.token_embedding.weight": "text.token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": POSITIONS,
    "text_model.final_layer_norm.weight": "text.ln_final.weight",
    "text_model.final_layer_norm.bias": "text.ln_final.bias",
    "visual_projection.weight": "visual.proj",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
}
_TRANSFORMERS_BLOCK = re.compile(r"(text|vision)_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_TRANSFORMERS_BLOCK_NAMES = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_QUERY_KEY_VALUE = tuple(f"self_attn.{name}_proj" for name in "qkv")


def to_our_keys(tensors: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], bool]:
    """The tensors under LongCLIP's keys with one whole table of positions, and whether the layout implies QuickGELU.

    Long-CLIP's two tables and OpenAI's constants imply it. An unknown key is kept, so that the strict load names it.
    Raises InputError for a ResNet CLIP and for two tables that do not match.
    """
    if any(key.startswith("visual.layer1.") for key in tensors):
        raise InputError(f"{path} is a CLIP with a ResNet image tower: only vision transformers are supported")
    if any(key.startswith("text_model.") for key in tensors):
        return _from_transformers(tensors, path), False
    is_openai = all(key in tensors for key in _OPENAI_CONSTANTS)
    if is_openai:
        tensors = {key: value for key, value in tensors.items() if key not in _OPENAI_CONSTANTS}
    has_text_prefix = any(key.startswith("text.") for key in tensors)
    ours = {
        key if has_text_prefix or key == "logit_scale" or key.startswith("visual.") else f"text.{key}": value
        for key, value in tensors.items()
    }
    if _POSITIONS_RES not in ours:
        return ours, is_openai
    trained, first = ours.pop(_POSITIONS_RES), ours.get(POSITIONS)
    if first is None or first.shape != trained.shape or trained.ndim != 2:
        shape = None if first is None else tuple(first.shape)
        raise InputError(f"{path}: positional_embedding is {shape}, positional_embedding_res {tuple(trained.shape)}")
    ours[POSITIONS] = torch.cat([first[:NUM_KEPT_POSITIONS], trained[NUM_KEPT_POSITIONS:]])
    return ours, True


def _from_transformers(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    ours: dict[str, Tensor] = {}
    for key, value in tensors.items():
        block = _TRANSFORMERS_BLOCK.fullmatch(key)
        if key.endswith("embeddings.position_ids"):  # the numbers 0, 1, 2, ... that older versions saved
            continue
        if block is None:
            ours[_TRANSFORMERS_NAMES.get(key, key)] = value.t() if key.endswith("_projection.weight") else value
            continue
        tower, layer, name, kind = block.groups()
        prefix = f"{'text' if tower == 'text' else 'visual'}.transformer.resblocks.{layer}"
        if name in _QUERY_KEY_VALUE:
            ours[f"{prefix}.attn.in_proj_{kind}"] = _joined_projection(tensors, key, name, path)
        else:
            ours[f"{prefix}.{_TRANSFORMERS_BLOCK_NAMES.get(name, name)}.{kind}"] = value
    return ours


def _joined_projection(tensors: dict[str, Tensor], key: str, name: str, path: Path) -> Tensor:
    keys = [key.replace(name, part) for part in _QUERY_KEY_VALUE]
    for wanted in keys:
        if wanted not in tensors:
            raise InputError(f"{path} does not fit the model: 1 missing keys ({wanted})")
    if len({tensors[wanted].shape for wanted in keys}) > 1:
        raise InputError(f"{path}: {', '.join(keys)} differ in shape")
    return torch.cat([tensors[wanted] for wanted in keys])
