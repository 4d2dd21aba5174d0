"""A student as a folder that open_clip loads by itself, where open_clip can say what the student is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporting.checks import Agreement, Bounds
from exporting.sources import Exported
from longclip_teacher.ancestry import ancestry_to_json
from longclip_teacher.atomic_files import write_json
from longclip_teacher.errors import InputError
from longclip_teacher.weights_file import write_weights
from mobileclip_student import MobileCLIP
from mobileclip_student.image_encoder import PUBLISHED_TOWERS

__all__ = ["refuse_what_open_clip_cannot_say", "write_open_clip"]

_BOUNDS = Bounds(0.99999, 1e-5)
_CAPTIONS = ["a red bus", "", "a long caption " * 200]
# Within the text tower: our key, theirs; the inverse of the layouts that load_student reads
_TEXT_KEYS = (
    (r"^projection$", "text_projection"),
    (r"^blocks\.(\d+)\.", r"transformer.resblocks.\1."),
    (r"\.out\.", ".attn.out_proj."),
    (r"\.fc1\.", ".mlp.c_fc."),
    (r"\.fc2\.", ".mlp.c_proj."),
)


def refuse_what_open_clip_cannot_say(model: Exported, source: str) -> None:
    """Raise InputError, with the reason, for a model that open_clip would refuse or load with other features."""
    own = model.unfused
    if not isinstance(own, MobileCLIP):
        reason = "it is a teacher"
    elif own.config.reparameterized:
        reason = "its branches are merged: export the weights from before"
    elif own.config.image.tower not in PUBLISHED_TOWERS:
        reason = f"open_clip has no image tower {own.config.image.tower} of its shape"
    elif own.config.text.hybrid:
        reason = "open_clip has no text tower with RepMixer blocks"
    elif own.config.pad_mask and not own.config.text.causal:
        reason = "open_clip's text towers see padding, which this one hides"
    elif (own.config.image.norm_eps, own.config.image.stem_padding) != (None, None):
        reason = "open_clip builds the stem and the norms of its image tower in timm's way"
    else:
        return
    raise InputError(f"--open-clip: {source} cannot be an open_clip folder: {reason}; leave --open-clip out")


def write_open_clip(model: MobileCLIP, folder: Path) -> None:
    """Write configuration and weights of a student with its branches, and compare what open_clip makes of them."""
    folder.mkdir()
    config = {"model_cfg": _model_config(model), "preprocess_cfg": _preprocessing(model)}
    write_json(folder / "open_clip_config.json", config)
    tensors, record = _their_keys(model.state_dict()), json.dumps(ancestry_to_json(model.ancestry))
    write_weights(folder / "open_clip_model.safetensors", tensors, {"format": "pt"}, record)
    _compare(model, folder)


def _model_config(model: MobileCLIP) -> dict[str, Any]:
    image, text = model.config.image, model.config.text
    return {
        "embed_dim": model.embed_dim,
        "quick_gelu": text.activation == "quickgelu",
        "vision_cfg": {
            "timm_model_name": image.tower,
            "timm_model_pretrained": False,
            "timm_pool": "token" if image.tower.startswith("vit") else "avg",
            "timm_proj": None,
            "image_size": image.image_size,
        },
        "text_cfg": {
            "context_length": model.context_length,
            "vocab_size": text.vocab_size,
            "width": text.width,
            "heads": text.heads,
            "layers": text.layers,
            "mlp_ratio": text.mlp_ratio,
            "no_causal_mask": not text.causal,
        },
        "custom_text": True,
    }


def _preprocessing(model: MobileCLIP) -> dict[str, Any]:
    image = model.config.image
    settings = {"mean": list(image.mean), "std": list(image.std), "interpolation": image.interpolation}
    return {**settings, "resize_mode": "shortest"}


def _their_keys(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in tensors.items():
        tower, _, rest = key.partition(".")
        if tower == "image_encoder":
            renamed[f"visual.{rest}"] = value
        elif tower != "text_encoder":
            renamed[key] = value
        elif (match := re.fullmatch(r"(.*)\.query\.(weight|bias)", rest)) is not None:
            both = torch.cat([value, tensors[f"text_encoder.{match[1]}.key_value.{match[2]}"]])
            renamed["text." + _their_text_key(f"{match[1]}.attn.in_proj_{match[2]}")] = both
        elif ".key_value." not in rest:
            renamed["text." + _their_text_key(rest)] = value
    return renamed


def _their_text_key(key: str) -> str:
    for pattern, replacement in _TEXT_KEYS:
        key = re.sub(pattern, replacement, key)
    return key


@torch.no_grad()
def _compare(model: MobileCLIP, folder: Path) -> None:
    """Raise InputError if open_clip's model of the folder has other features than `model`."""
    import open_clip

    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    theirs.eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(_CAPTIONS)
    pictures = torch.rand(2, 3, model.image_size, model.image_size, generator=torch.Generator().manual_seed(0))
    found = Agreement()
    texts = theirs.encode_text(tokens, normalize=True), model.encode_text(model.tokenizer(_CAPTIONS), normalize=True)
    found.add(*texts, "open_clip")
    found.add(theirs.encode_image(pictures, normalize=True), model.encode_image(pictures, normalize=True), "open_clip")
    found.hold(_BOUNDS, "what open_clip loads")
