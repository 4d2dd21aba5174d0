"""Files from untrusted folders: pipes, devices and sockets are never opened, because that could wait for ever."""

from __future__ import annotations

import stat
from pathlib import Path

from longclip_teacher.errors import InputError

__all__ = ["check_plain"]


def check_plain(path: Path) -> None:
    """Raise InputError for a pipe, a device or a socket. A missing file and a folder pass, and fail to open."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise InputError(f"{path}: not a plain file")
