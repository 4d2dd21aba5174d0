"""The inputs of zero-shot classification: class names from a file, and templates of CLIP's authors or of the user."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

from eval.benchmarks.annotation_files import read_text
from longclip_teacher.errors import InputError

__all__ = ["CIFAR_TEMPLATES", "OPENAI_TEMPLATES", "SIMPLE_TEMPLATES", "read_classnames", "read_templates"]

OPENAI_TEMPLATES: tuple[str, ...] = tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)  # 80
SIMPLE_TEMPLATES: tuple[str, ...] = tuple(template("{}") for template in SIMPLE_IMAGENET_TEMPLATES)  # 7
_CIFAR_PHOTOS = (
    *("a photo of {} {{}}.", "a blurry photo of {} {{}}.", "a black and white photo of {} {{}}."),
    *("a low contrast photo of {} {{}}.", "a high contrast photo of {} {{}}.", "a bad photo of {} {{}}."),
    *("a good photo of {} {{}}.", "a photo of {} small {{}}.", "a photo of {} big {{}}."),
)
CIFAR_TEMPLATES: tuple[str, ...] = tuple(  # 18, those of CLIP's authors for CIFAR-10 and -100
    photo.format(article) for article in ("a", "the") for photo in _CIFAR_PHOTOS
)


def read_classnames(path: Path | None) -> list[str] | None:
    """Read the class names of a text file, one per line. Return None without a file: the data set has its own."""
    return None if path is None else _lines(path)


def read_templates(choice: str) -> Sequence[str] | None:
    """Return the templates that --templates selects, or None to leave them to the data set."""
    named = {"auto": None, "openai": OPENAI_TEMPLATES, "simple": SIMPLE_TEMPLATES, "cifar": CIFAR_TEMPLATES}
    if choice in named:
        return named[choice]
    if "{}" in choice:
        return [choice]
    if not Path(choice).is_file():
        raise InputError(f"--templates {choice!r}: give a file, a sentence with {{}}, or one of {', '.join(named)}")
    templates = _lines(Path(choice))
    for number, template in enumerate(templates, start=1):
        if "{}" not in template:
            raise InputError(f"{choice}, template {number}: {template!r} has no {{}} for the class name")
    return templates


def _lines(path: Path) -> list[str]:
    """Return the non-empty lines of a text file."""
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not lines:
        raise InputError(f"{path} is empty: write one entry per line")
    return lines
