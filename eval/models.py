"""Any checkpoint to a model: students and teachers, ours and published, files, run directories and hub names."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

from safetensors import SafetensorError, safe_open

from longclip_teacher import LongCLIP, load_teacher
from longclip_teacher.checkpoint import HUB_NAMES as TEACHER_HUB_NAMES
from longclip_teacher.config import Activation
from longclip_teacher.errors import InputError
from longclip_teacher.weights_file import read_weights
from mobileclip_student import MobileCLIP, load_student

__all__ = ["ClipModel", "load_model"]

ClipModel: TypeAlias = LongCLIP | MobileCLIP
Kind = Literal["student", "teacher"]
BEST_WEIGHTS = "best.safetensors"  # what the training loop keeps in a run directory
_OUR_FORMAT = "compact-longclip"
# A key that starts like this is found in every file of its layout, and in no other's
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
    """A student or a teacher in eval mode from a file, a run directory (its best weights) or a hub name.

    Unless `context_length` or `pad_mask` say otherwise, published students are evaluated as published (77 tokens,
    padding attended), our own files as they were saved, teachers at 248 tokens. Where the file does not tell, `variant`
    names a published student's architecture and `activation` a CLIP teacher's. Raises InputError for anything else.
    """
    source = Path(checkpoint)
    if source.is_dir():
        source = source / BEST_WEIGHTS
        if not source.is_file():
            raise InputError(f"{checkpoint} is a folder without {BEST_WEIGHTS}: give a weight file or a run's folder")
    kind = _kind_of_file(source) if source.is_file() else _kind_of_name(str(checkpoint))
    if kind == "student":
        if activation is not None:
            raise InputError(f"{checkpoint} is a student: --activation is for teachers, leave it out")
        return load_student(source, variant, context_length, pad_mask, device)
    if variant is not None or pad_mask is not None:
        raise InputError(f"{checkpoint} is a teacher: --variant and --pad-mask are for students, leave them out")
    return load_teacher(source, device, context_length=context_length, activation=activation)


def _kind_of_file(path: Path) -> Kind:
    keys, metadata = _keys_and_metadata(path)
    if metadata.get("format") == _OUR_FORMAT:
        return "teacher" if metadata.get("kind") == "teacher" else "student"
    if any(key.startswith(_STUDENT_KEYS) for key in keys):
        return "student"
    if any(key.startswith(_TEACHER_KEYS) for key in keys):
        return "teacher"
    raise InputError(
        f"{path} holds neither a MobileCLIP student nor a CLIP teacher: it begins with {next(iter(keys), 'nothing')!r}"
    )


def _kind_of_name(name: str) -> Kind:
    """Which model a hub name means. A name that is no file and no model ends in one line."""
    if name in TEACHER_HUB_NAMES:
        return "teacher"
    if "mobileclip" in name.lower() and not Path(name).suffix and not name.startswith((".", "/", "~")):
        return "student"
    raise InputError(
        f"no checkpoint at {name}: give a weight file, a run's folder, or a hub name "
        f"({', '.join(TEACHER_HUB_NAMES)}, apple/MobileCLIP-S1-OpenCLIP, ...)"
    )


def _keys_and_metadata(path: Path) -> tuple[list[str], dict[str, str]]:
    if path.suffix != ".safetensors":
        return list(read_weights(path).tensors), {}
    try:
        with safe_open(path, framework="pt") as file:  # reads the header alone
            return list(file.keys()), file.metadata() or {}
    except (SafetensorError, OSError):
        weights = read_weights(path)  # words the error
        return list(weights.tensors), weights.metadata
