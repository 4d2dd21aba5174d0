"""The student: MobileCLIP with a text tower that reads 248 tokens."""

from __future__ import annotations

from mobileclip_student.checkpoint import load_student, save_student
from mobileclip_student.model import VARIANTS, MobileCLIP, StudentConfig, create_student, override
from mobileclip_student.reparameterize import reparameterize

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
