"""Load any checkpoint: our own and published students and teachers, and any CLIP of open_clip."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from eval.towers.open_clip_model import (
    OPEN_CLIP_CONFIG,
    OpenClipModel,
    is_open_clip_name,
    load_open_clip,
    open_clip_weights_file,
)
from eval.towers.tower_pair import TowerPair
from longclip_teacher import LongCLIP, load_teacher
from longclip_teacher.activation import Activation
from longclip_teacher.checkpoint import HUB_NAMES as TEACHER_HUB_NAMES
from longclip_teacher.errors import InputError
from longclip_teacher.weights_file import WeightsFile, read_weights, run_weights
from mobileclip_student import MobileCLIP, load_student

__all__ = ["ClipModel", "cut_tokens", "describe_model", "load_model", "weights_file"]

ClipModel: TypeAlias = LongCLIP | MobileCLIP | OpenClipModel | TowerPair
Kind = Literal["student", "teacher"]
_OUR_FORMAT = "compact-longclip"
# Every file of a layout has keys with its prefix, and no file of another layout does
_STUDENT_KEYS = ("image_encoder.", "visual.trunk.")  # ml-mobileclip, open_clip's MobileCLIP
_TEACHER_KEYS = (
    "visual.conv1.",
    "visual.class_embedding",
    "vision_model.",
)  # OpenAI / Long-CLIP / open_clip, transformers


def load_model(
    checkpoint: str | Path,
    *,
    variant: str | None = None,
    context_length: int | None = None,
    pad_mask: bool | None = None,
    activation: Activation | None = None,
    device: str = "cpu",
) -> ClipModel:
    """A model in eval mode from a file, a run folder (its best weights), a hub name, or an open_clip name.

    By default, published students run as published (77 tokens, padding attended), our own files as they were saved, and
    teachers at 248 tokens; `context_length` and `pad_mask` override this. If the file does not show them, `variant`
    gives a published student's architecture and `activation` a CLIP teacher's activation.
    `open_clip:ARCHITECTURE/WEIGHTS`, `hf-hub:ORGANISATION/NAME`, `local-dir:FOLDER` and a folder with
    open_clip_config.json are open_clip models, which run as in open_clip and take no options. Raises InputError for
    anything else.
    """
    name = _open_clip_name(checkpoint)
    if name is not None:
        if (variant, context_length, pad_mask, activation) != (None,) * 4:
            raise InputError(
                f"{checkpoint} is an open_clip model, whose configuration decides: "
                "leave --variant, --context-length, --pad-mask and --activation out"
            )
        return load_open_clip(name, device)
    path = _local_source(checkpoint)
    source = read_weights(path) if path.is_file() else path
    kind = _kind_of_file(source) if isinstance(source, WeightsFile) else _kind_of_name(str(checkpoint))
    if kind == "student":
        if activation is not None:
            raise InputError(f"{checkpoint} is a student: --activation is for teachers, leave it out")
        return load_student(source, variant, context_length, pad_mask, device)
    if variant is not None or pad_mask is not None:
        raise InputError(f"{checkpoint} is a teacher: --variant and --pad-mask are for students, leave them out")
    return load_teacher(source, device, context_length=context_length, activation=activation)


def cut_tokens(model: ClipModel, texts: Sequence[str], num_tokens: int) -> Int[Tensor, "B L"]:
    """Token ids of captions cut at `num_tokens`, with EOT kept. open_clip's models need their whole context, padded as
    their tokenizer does."""
    tokens = model.tokenizer(texts, num_tokens)
    if not isinstance(model, OpenClipModel) or tokens.shape[1] == model.context_length:
        return tokens
    padding = int(model.tokenizer("", model.context_length)[0, -1])
    return F.pad(tokens, (0, model.context_length - tokens.shape[1]), value=padding)


def describe_model(model: ClipModel) -> str:
    """The model in one phrase for people, such as `MobileCLIP student s0, 77 tokens, pads attended`."""
    if isinstance(model, (LongCLIP, MobileCLIP)):
        return model.config.describe()
    if isinstance(model, TowerPair):
        image, text = model.config
        return f"image tower of {image.describe()}; text tower of {text.describe()}"
    return f"open_clip model, {model.context_length} tokens"


def weights_file(checkpoint: str | Path) -> Path | None:
    """The weight file on this machine that `load_model` reads for `checkpoint`; None if it comes from the hub."""
    name = _open_clip_name(checkpoint)
    if name is not None:
        return open_clip_weights_file(name)
    source = _local_source(checkpoint)
    return source if source.is_file() else None


def _open_clip_name(checkpoint: str | Path) -> str | None:
    """The name under which open_clip loads `checkpoint`; None if it is not an open_clip model."""
    if is_open_clip_name(str(checkpoint)):
        return str(checkpoint)
    return f"local-dir:{checkpoint}" if (Path(checkpoint) / OPEN_CLIP_CONFIG).is_file() else None


def _local_source(checkpoint: str | Path) -> Path:
    """`checkpoint` as a path, which need not exist; for a run folder, its weight file."""
    try:
        return run_weights(checkpoint)
    except InputError as error:
        raise InputError(f"{error}, or a folder with {OPEN_CLIP_CONFIG}") from None


def _kind_of_file(file: WeightsFile) -> Kind:
    keys = list(file.tensors)
    if file.metadata.get("format") == _OUR_FORMAT:
        return "teacher" if file.metadata.get("kind") == "teacher" else "student"
    if any(key.startswith(_STUDENT_KEYS) for key in keys):
        return "student"
    if any(key.startswith(_TEACHER_KEYS) for key in keys):
        return "teacher"
    raise InputError(
        f"{file.path} holds neither a MobileCLIP student nor a CLIP teacher: it begins with "
        f"{next(iter(keys), 'nothing')!r}"
    )


def _kind_of_name(name: str) -> Kind:
    """The kind of model that a hub name means; InputError for a name that is neither a file nor a model."""
    if name in TEACHER_HUB_NAMES:
        return "teacher"
    if "mobileclip" in name.lower() and not Path(name).suffix and not name.startswith((".", "/", "~")):
        return "student"
    raise InputError(
        f"no checkpoint at {name}: give a weight file, a run folder, or a hub name "
        f"({', '.join(TEACHER_HUB_NAMES)}, apple/MobileCLIP-S1-OpenCLIP, open_clip:ViT-B-16/openai, ...)"
    )
