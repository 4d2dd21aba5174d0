"""The Long-CLIP teacher: CLIP at 248 tokens, its captions, its weights. Knows nothing of training."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longclip_teacher.checkpoint import export_official, load_teacher, save_teacher
    from longclip_teacher.config import TeacherConfig
    from longclip_teacher.model import LongCLIP, create_teacher
    from longclip_teacher.positions import stretch_positions
    from longclip_teacher.text import CaptionTokenizer

__all__ = [
    "CaptionTokenizer",
    "LongCLIP",
    "TeacherConfig",
    "create_teacher",
    "export_official",
    "load_teacher",
    "save_teacher",
    "stretch_positions",
]

_MODULE_OF = {
    "CaptionTokenizer": "text",
    "LongCLIP": "model",
    "TeacherConfig": "config",
    "create_teacher": "model",
    "export_official": "checkpoint",
    "load_teacher": "checkpoint",
    "save_teacher": "checkpoint",
    "stretch_positions": "positions",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: a command answers --help from `longclip_teacher.errors` alone,
    without torch."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
