"""Text and JSON files written atomically: readers see the old file or the whole new one."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from longclip_teacher.errors import InputError

__all__ = ["write_json", "write_text"]


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 and make the folder if need be. Raises InputError if the place cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror})") from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).chmod(0o644)  # mkstemp's 0600 would keep a shared run folder unreadable
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as indented JSON. Raises ValueError for a NaN or an infinity, InputError as `write_text`."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
