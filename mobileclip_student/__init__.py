"""The student: MobileCLIP with a text tower that reads 248 tokens."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mobileclip_student.checkpoint import load_student, save_student
    from mobileclip_student.model import VARIANTS, MobileCLIP, StudentConfig, create_student, override
    from mobileclip_student.reparameterization import reparameterize

__all__ = [
    "VARIANTS",
    "MobileCLIP",
    "StudentConfig",
    "create_student",
    "load_student",
    "override",
    "reparameterize",
    "save_student",
]

_MODULE_OF = {
    "VARIANTS": "model",
    "MobileCLIP": "model",
    "StudentConfig": "model",
    "create_student": "model",
    "load_student": "checkpoint",
    "override": "model",
    "reparameterize": "reparameterization",
    "save_student": "checkpoint",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that importing this package does not import torch."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
