"""Initial weights of a student's towers: another student's, timm's pretrained ones, a Long-CLIP's text tower, or a
truncated normal.

The projection into the joint space is not taken over where its width D differs.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from longclip_teacher.activation import Activation
from longclip_teacher.ancestry import NOT_KNOWN, NOT_RECORDED, RESEARCH_ONLY, Ancestor, Ancestry, merged
from longclip_teacher.errors import InputError
from longclip_teacher.weights_file import content_sha256, load_strictly
from mobileclip_student.checkpoint import load_student, resize_positions
from mobileclip_student.image_encoder import PUBLISHED_TOWERS, VIT, ImageConfig
from mobileclip_student.layouts import rename_clip_text
from mobileclip_student.model import MobileCLIP
from mobileclip_student.text_encoder import AttentionBlock

__all__ = ["TIMM", "LongCLIPText", "load_image_tower", "load_text_tower", "truncated_normal_"]

logger = logging.getLogger(__name__)
TIMM = "timm"  # the name of timm's pretrained weights as the source of an image tower
_IMAGE_HEADS = ("head.", "head_dist.")  # the projections of an image tower; FastViT's is head.fc
# timm has weights of these ViTs: DeiT by width and heads (DeiT, table 1), each with 12 blocks and patches of 16 pixels
_DEIT = {(192, 3): "tiny", (384, 6): "small", (768, 12): "base"}
_DEIT_DEPTH, _DEIT_PATCH = 12, 16
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_POSITIONS, _FROZEN_POSITIONS, _PROJECTION = "positional_embedding", "frozen_positional_embedding", "projection"
_INITIAL_STD = 0.02


@dataclass(frozen=True)
class LongCLIPText:
    """The text tower of a Long-CLIP, with the settings that its tensors do not show."""

    tensors: Mapping[str, Tensor]
    """its state dict (`LongCLIP.text.state_dict()`)"""
    heads: int
    activation: Activation
    ancestry: Ancestry = NOT_RECORDED


@dataclass(frozen=True)
class _TextTower:
    """A text tower to take over, with its tensors under our keys."""

    name: str
    tensors: dict[str, Tensor]
    heads: int
    hybrid: bool
    causal: bool
    activation: Activation
    ancestry: Ancestry


def load_image_tower(student: MobileCLIP, source: MobileCLIP | str | Path) -> None:
    """Give `student`, in place, the image tower of `source` and the mean and std that this tower was trained with.

    Args:
        student: the student to be trained.
        source: a student, its file, run folder or hub name; or "timm" for timm's pretrained weights of this tower. For
            a ViT these are DeiT's, trained on ImageNet-1k; for a published tower MobileCLIP's or a CLIP's. The log
            names them and their licence.

    The positions of a ViT are resampled to the student's grid. The projection stays freshly initialised where D
    differs, and always with timm's weights. Raises InputError if timm has no such weights or cannot fetch them, or if
    a tower does not fit.
    """
    ours, trunk = student.config.image, student.image_encoder.trunk
    if source == TIMM:
        name = "timm's weights"
        tensors, theirs, ancestry = _timm_tower(ours)
    else:
        other, name = _student(source)
        ancestry = other.ancestry
        tensors, theirs = other.image_encoder.trunk.state_dict(), other.config.image
        if other.embed_dim != student.embed_dim:
            tensors = {key: value for key, value in tensors.items() if not key.startswith(_IMAGE_HEADS)}
    for field in ("tower", "heads", "distillation_token"):
        if getattr(ours, field) != getattr(theirs, field):
            raise InputError(
                f"the image tower of {name} has {field} {getattr(theirs, field)}, the student's "
                f"{getattr(ours, field)}: they must agree"
            )
    if ours.tower == VIT and ours.image_size != theirs.image_size:
        tensors = {**tensors, "pos_embed": _resampled(tensors["pos_embed"], ours, theirs)}
    fresh = {
        key: value for key, value in trunk.state_dict().items() if key.startswith(_IMAGE_HEADS) and key not in tensors
    }
    load_strictly(trunk, {**tensors, **fresh}, f"the image tower of {name}")
    student.ancestry = merged(student.ancestry, ancestry)
    logger.info("image tower from %s%s", name, "; its projection is fresh" if fresh else "")
    if (ours.mean, ours.std) != (theirs.mean, theirs.std):
        logger.info("pictures are normalised as that tower knows them: mean %s, std %s", theirs.mean, theirs.std)
        student.config = replace(student.config, image=replace(ours, mean=theirs.mean, std=theirs.std))


def load_text_tower(student: MobileCLIP, source: MobileCLIP | LongCLIPText | str | Path) -> None:
    """Give `student`, in place, the text tower of `source` and its activation.

    Args:
        student: the student to be trained.
        source: a student, its file, run folder or hub name; or a Long-CLIP's text tower, for a base, causal or longclip
            tower of the same width and heads. A causal tower with as many layers then gives Long-CLIP's own features.

    If the source has more layers than the student, evenly spaced ones are taken, the first and the last among them (a
    single layer is the first); a tower with RepMixer blocks must have equally many. Positions are cut, or stretched
    from 77. The projection stays freshly initialised where D differs. Raises InputError if the towers do not fit.
    """
    config, encoder = student.config.text, student.text_encoder
    theirs = _text_tower(source)
    if config.hybrid != theirs.hybrid:
        raise InputError(
            f"the text tower of {theirs.name} has {'' if theirs.hybrid else 'no '}RepMixer blocks, unlike the "
            f"student's: choose the text_tower {'hybrid' if theirs.hybrid else 'base, causal or longclip'}"
        )
    width = len(theirs.tensors["ln_final.weight"])
    if (width, theirs.heads) != (config.width, config.heads):
        raise InputError(
            f"the text tower of {theirs.name} has width {width} and {theirs.heads} heads, the student's {config.width} "
            f"and {config.heads}: set text_width {width} and text_heads {theirs.heads}"
        )
    tensors = theirs.tensors if config.hybrid else _spaced_layers(theirs, config.layers)
    tensors[_POSITIONS] = resize_positions(tensors[_POSITIONS], student.context_length, theirs.name)
    is_fresh = tensors[_PROJECTION].shape[1] != student.embed_dim
    if is_fresh:
        tensors[_PROJECTION] = encoder.projection.detach()
    load_strictly(encoder, tensors, f"the text tower of {theirs.name}")
    student.ancestry = merged(student.ancestry, theirs.ancestry)
    logger.info("text tower from %s%s", theirs.name, "; its projection is fresh" if is_fresh else "")
    if config.causal != theirs.causal:
        logger.info(
            "that tower is %s, the student's is %s",
            *("causal" if causal else "not causal" for causal in (theirs.causal, config.causal)),
        )
    if config.activation != theirs.activation:
        logger.info("the student's text tower takes over its activation, %s", theirs.activation)
        student.config = replace(student.config, text=replace(config, activation=theirs.activation))
        for block in encoder.blocks:
            if isinstance(block, AttentionBlock):
                block.activation = theirs.activation


@torch.no_grad()
def truncated_normal_(student: MobileCLIP) -> None:
    """Redraw the weights of linear layers and embeddings in place: normal, deviation 0.02, cut at two deviations.

    Embeddings are those of tokens and positions and a ViT's class tokens; the text projection counts as a linear layer.
    Biases, norms, convolutions, layer scales and the logit scale do not change. Uses torch's global generator.
    """
    trunk, encoder = student.image_encoder.trunk, student.text_encoder
    weights = [module.weight for module in student.modules() if isinstance(module, (nn.Linear, nn.Embedding))]
    weights += [encoder.positional_embedding, encoder.projection]
    weights += [value for name, value in trunk.named_parameters() if name in ("pos_embed", "cls_token", "dist_token")]
    for weight in weights:
        nn.init.trunc_normal_(weight, std=_INITIAL_STD, a=-2 * _INITIAL_STD, b=2 * _INITIAL_STD)


def _student(source: MobileCLIP | str | Path) -> tuple[MobileCLIP, str]:
    """The student and its name for messages. InputError if its branches are folded: such towers cannot be trained."""
    other = source if isinstance(source, MobileCLIP) else load_student(source)
    name = f"student {other.config.variant}" if isinstance(source, MobileCLIP) else str(source)
    if other.config.reparameterized:
        raise InputError(f"{name} is folded for inference: start from its weights before reparameterisation")
    return other, name


def _timm_tower(image: ImageConfig) -> tuple[dict[str, Tensor], ImageConfig, Ancestry]:
    """timm's pretrained tensors of this tower without the head, the tower's configuration with their mean and std, and
    their ancestry."""
    name = image.tower
    if image.tower == VIT:
        kind = _DEIT.get((image.width, image.heads))
        if kind is None or (image.depth, image.patch) != (_DEIT_DEPTH, _DEIT_PATCH):
            known = ", ".join(f"{width} with {heads} heads" for width, heads in _DEIT)
            raise InputError(
                f"timm has weights of ViTs with {_DEIT_DEPTH} layers, patches of {_DEIT_PATCH} pixels and width "
                f"{known}; not of {image.depth} layers, patches of {image.patch} and width {image.width} with "
                f"{image.heads} heads"
            )
        name = f"deit_{kind}{'_distilled' if image.distillation_token else ''}_patch{_DEIT_PATCH}_224"
    elif image.tower not in PUBLISHED_TOWERS:
        raise InputError(f"timm has no weights for the image tower {image.tower}: start it from a student's file")
    size: dict[str, Any] = {"img_size": image.image_size} if image.tower == VIT else {}  # timm resamples the positions
    try:
        model: Any = timm.create_model(name, pretrained=True, num_classes=0, **size)
    except Exception as error:  # errors of timm, the hub's client and its HTTP library
        lines = str(error).strip().splitlines()
        raise InputError(
            f"cannot get timm's weights of {name} ({type(error).__name__}: {lines[0][:160] if lines else ''}): "
            "fetch them where there is a network, or start the image tower from a student's file"
        ) from None
    pretrained = model.pretrained_cfg
    source, terms = f"timm/{name}.{pretrained.get('tag')}", pretrained.get("license") or NOT_KNOWN
    if "apple" in f"{pretrained.get('tag')} {pretrained.get('hf_hub_id')}":  # not every version of timm tells
        terms = RESEARCH_ONLY
    logger.info("timm's %s, licence %s", source.removeprefix("timm/"), terms)
    tower = replace(image, mean=tuple(pretrained["mean"]), std=tuple(pretrained["std"]))
    tensors = model.state_dict()
    return tensors, tower, (Ancestor(source, terms, content_sha256(tensors, {})),)


def _resampled(positions: Tensor, ours: ImageConfig, theirs: ImageConfig) -> Tensor:
    """A ViT's positions, resampled to the student's grid."""
    new, old = (config.image_size // config.patch for config in (ours, theirs))
    prefix = 2 if ours.distillation_token else 1
    return resample_abs_pos_embed(positions, [new, new], [old, old], num_prefix_tokens=prefix)


def _text_tower(source: MobileCLIP | LongCLIPText | str | Path) -> _TextTower:
    if not isinstance(source, LongCLIPText):
        other, name = _student(source)
        text = other.config.text
        tensors = dict(other.text_encoder.state_dict())
        return _TextTower(name, tensors, text.heads, text.hybrid, text.causal, text.activation, other.ancestry)
    name, tensors = "the given Long-CLIP", rename_clip_text(source.tensors)
    frozen = tensors.pop(_FROZEN_POSITIONS, None)
    for key in (_POSITIONS, _PROJECTION, "ln_final.weight"):
        if key not in tensors:
            raise InputError(f"{name} has no {key} in its text tower: give LongCLIP.text.state_dict()")
    if frozen is not None:
        tensors[_POSITIONS] = torch.cat([frozen, tensors[_POSITIONS]])
    return _TextTower(
        name,
        tensors,
        source.heads,
        hybrid=False,
        causal=True,
        activation=source.activation,
        ancestry=source.ancestry,
    )


def _spaced_layers(theirs: _TextTower, layers: int) -> dict[str, Tensor]:
    """The tensors with `layers` evenly spaced blocks, renumbered."""
    blocks = sorted({int(match[1]) for key in theirs.tensors if (match := _BLOCK.match(key))})
    if layers > len(blocks):
        raise InputError(
            f"the text tower of {theirs.name} has {len(blocks)} layers, fewer than the student's {layers}: "
            f"set text_layers {len(blocks)} or less"
        )
    taken = [blocks[index * (len(blocks) - 1) // max(layers - 1, 1)] for index in range(layers)]
    if layers < len(blocks):
        logger.info("layers %s of the %d of %s", [block + 1 for block in taken], len(blocks), theirs.name)
    tensors = {key: value for key, value in theirs.tensors.items() if not _BLOCK.match(key)}
    for new, old in enumerate(taken):
        prefix = f"blocks.{old}."
        tensors |= {
            f"blocks.{new}.{key.removeprefix(prefix)}": value
            for key, value in theirs.tensors.items()
            if key.startswith(prefix)
        }
    return tensors
