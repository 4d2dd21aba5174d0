"""The Long-CLIP teacher: CLIP at 248 tokens, its captions, its weights. Knows nothing of training."""

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
