"""Read students from Apple's, open_clip's and our own files, and write our own.

Published files hold 77 positions. They are kept, or stretched by the rule that leaves the first 20 unchanged.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor

from longclip_teacher.ancestry import (
    NOT_RECORDED,
    RESEARCH_ONLY,
    Ancestor,
    ancestry_to_json,
    recorded,
)
from longclip_teacher.errors import InputError
from longclip_teacher.positions import stretch_positions
from longclip_teacher.weights_file import (
    RECOGNISED,
    WeightsFile,
    load_strictly,
    read_weights,
    run_weights,
    write_weights,
)
from mobileclip_student.layouts import fits, is_apple, is_published, rename_keys
from mobileclip_student.model import VARIANTS, MobileCLIP, StudentConfig, create_student, variant_config
from mobileclip_student.reparameterization import reparameterize

__all__ = ["load_student", "resize_positions", "save_student"]

_FORMAT = "compact-longclip"
_PUBLISHED_LENGTH = 77
_POSITIONS = "text_encoder.positional_embedding"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_OUR_VARIANTS = ("small", "tiny", "vit_b", "vit_s", "vit_tiny")  # all other variants have published files
# mobileclip_s0.pt, MobileCLIP2-L-14-OpenCLIP ...; the wide towers have one architecture for both generations
_PUBLISHED_NAME = re.compile(r"mobileclip(2?)[-_](s[0-4]|b(?:[-_]?lt)?|l[-_]?14)(?![a-z0-9])")


def load_student(
    source: str | Path | WeightsFile,
    variant: str | None = None,
    context_length: int | None = None,
    pad_mask: bool | None = None,
    device: str | torch.device = "cpu",
) -> MobileCLIP:
    """A student in eval mode, from a file, a run folder or the hub (`apple/MobileCLIP-S0`,
    `timm/MobileCLIP2-S0-OpenCLIP`, ...).

    Args:
        source: our safetensors; a run folder, whose best weights are read; a hub name; or a state dict in
            ml-mobileclip's or open_clip's key layout, also as trainers wrap it (longclip_teacher.state_dicts). Or what
            `read_weights` has read of such a file.
        variant: needed for a published file if neither its name nor its weights show it.
        context_length: defaults to the stored one. A longer one stretches 77 positions, a shorter one keeps the first.
        pad_mask: defaults to the stored one. A published file has False, as published, unless it is stretched.
        device: the student's device.

    The log names the sha256 of the file or its contents and, for a published file, the model that was recognised.

    Raises InputError when the file is missing or broken, or does not fit the variant in every key and shape.
    """
    weights = source if isinstance(source, WeightsFile) else read_weights(_find(str(source)))
    path, name = weights.path, str(weights.path if isinstance(source, WeightsFile) else source)
    is_own = weights.metadata.get("format") == _FORMAT
    if is_own:
        config, tensors = _own(weights, variant)
    else:
        config, tensors = _published(weights, variant or _variant_in_name(f"{name} {path.name}"))
        if pad_mask is None and context_length is not None:
            pad_mask = context_length > _PUBLISHED_LENGTH
    origin = "official layout" if is_apple(weights.tensors) else "open_clip's layout"
    if context_length is not None and context_length != config.context_length:
        if context_length > config.context_length:
            origin += f", stretched from {config.context_length} tokens"
        tensors[_POSITIONS] = resize_positions(tensors[_POSITIONS], context_length, path)
        config = replace(config, context_length=context_length)
    if pad_mask is not None:
        config = replace(config, pad_mask=pad_mask)
    student = _empty_student(config)
    load_strictly(student, tensors, path)
    if is_own or weights.ancestry:  # ours may be laid out for open_clip
        student.ancestry = recorded(weights.ancestry, "student", weights.content_sha256)
    else:
        # A file in a published layout counts as Apple's: renamed and fine-tuned ones have it too
        is_local = isinstance(source, WeightsFile) or Path(source).exists()
        published = f"MobileCLIP {config.variant} in its published layout" if is_local else name
        student.ancestry = (Ancestor(published, RESEARCH_ONLY, weights.sha256),)
    if not is_own:
        RECOGNISED.info("%s: %s (%s)%s", name, config.describe(), origin, weights.remark)
    return student.to(device).eval()


def save_student(student: MobileCLIP, path: str | Path) -> None:
    """Write weights, configuration and ancestors to one safetensors file; `load_student` needs nothing else."""
    metadata = {"format": _FORMAT, "kind": "student", "config": json.dumps(student.config.to_dict())}
    ancestry = "" if student.ancestry == NOT_RECORDED else json.dumps(ancestry_to_json(student.ancestry))
    write_weights(path, student.state_dict(), metadata, ancestry)


def _empty_student(config: StudentConfig) -> MobileCLIP:
    """A student without weights: drawing random ones would take longer than reading the file."""
    with torch.device("meta"):
        student = create_student(replace(config, reparameterized=False))
        if config.reparameterized:
            student = reparameterize(student)
    return student.to_empty(device="cpu")  # every tensor of a student is in its state dict, so a strict load fills all


def _own(weights: WeightsFile, variant: str | None) -> tuple[StudentConfig, dict[str, Tensor]]:
    kind = weights.metadata.get("kind")
    if kind != "student":
        raise InputError(f"{weights.path} holds a {kind}, not a student: load it with load_teacher")
    try:
        values = json.loads(weights.metadata.get("config", ""))
    except json.JSONDecodeError:
        raise InputError(f"{weights.path} holds no readable configuration: save it again") from None
    config = StudentConfig.from_dict(values)
    if variant not in (None, config.variant):
        raise InputError(f"{weights.path} is a student of variant {config.variant}, not {variant}: leave variant out")
    return config, dict(weights.tensors)


def _published(weights: WeightsFile, variant: str | None) -> tuple[StudentConfig, dict[str, Tensor]]:
    if not is_published(weights.tensors):
        raise InputError(
            f"{weights.path} is not a MobileCLIP: its keys ({', '.join(list(weights.tensors)[:3])}, ...) follow "
            "neither ml-mobileclip's nor open_clip's layout"
        )
    variant = variant or _variant_in_weights(weights)
    config = replace(variant_config(variant), context_length=_PUBLISHED_LENGTH, pad_mask=False)
    tensors = rename_keys(weights.tensors, config)
    positions = tensors.get(_POSITIONS)
    if positions is not None and positions.dim() == 2:  # a file that has been stretched already
        config = replace(config, context_length=len(positions))
    return config, tensors


def _variant_in_name(name: str) -> str | None:
    """The variant that Apple's or the hub's name of a file shows; None if it shows none."""
    match = _PUBLISHED_NAME.search(name.lower())
    if match is None:
        return None
    generation, size = match[1], re.sub("[-_]", "", match[2]).removesuffix("lt")
    variant = f"mobileclip2_{size}" if generation or size in ("s3", "s4", "l14") else size
    return variant if variant in VARIANTS else None


def _variant_in_weights(weights: WeightsFile) -> str:
    """The only published variant with these keys and shapes; InputError if none or several fit."""
    names = [name for name in VARIANTS if name not in _OUR_VARIANTS]
    if is_apple(weights.tensors):
        names = [name for name in names if not name.startswith("mobileclip2")]
    fitting = [name for name in names if fits(weights.tensors, variant_config(name))]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise InputError(f"{weights.path} could be {' or '.join(fitting)}: give the variant")
    raise InputError(
        f"{weights.path} fits none of the variants {', '.join(names)}: give the variant to see what differs"
    )


def resize_positions(table: Tensor, context_length: int, source: str | Path) -> Tensor:
    """The table at another length: its first rows, or 77 rows stretched. Other lengths raise InputError."""
    if context_length > len(table) != _PUBLISHED_LENGTH:
        raise InputError(
            f"{source} has {len(table)} positions, and only tables of {_PUBLISHED_LENGTH} can be stretched: "
            f"ask for a context length of at most {len(table)}"
        )
    return stretch_positions(table, context_length)


def _find(name: str) -> Path:
    """The local file `name`, the best weights of the run folder `name`, or those of the hub repository `name`."""
    path = run_weights(name)
    if path.is_file():
        return path
    if path.suffix in (".pt", ".pth", ".bin", ".safetensors") or not _HUB_NAME.fullmatch(name):
        raise InputError(
            f"no weight file at {name}: give a file, a run folder, or a hub name such as apple/MobileCLIP-S0"
        )
    repository = name.split("/")[1].lower()
    apple_file = re.sub("[-_]", "_", repository).replace("b_lt", "blt").replace("l_14", "l14") + ".pt"
    files = _OPEN_CLIP_FILES if "openclip" in repository else (apple_file, "model.safetensors")
    return _download(name, files)


def _download(repository: str, files: tuple[str, ...]) -> Path:
    for file in files:
        try:
            return Path(hf_hub_download(repository, file))
        except EntryNotFoundError as error:
            reason: Exception = error
        except Exception as error:  # the hub client lets the errors of its HTTP library through
            reason = error
            break
    text = str(reason).strip().splitlines()
    raise InputError(
        f"no file {repository}, and the hub gives none of {', '.join(files)} under that name "
        f"({type(reason).__name__}: {text[0][:160] if text else ''})"
    ) from None
