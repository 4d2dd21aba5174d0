"""How a result was made: command, commit, versions and machine, as a record for JSON and as lines of text."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

__all__ = ["environment_record", "provenance", "uncommitted_changes"]

_PACKAGES = ("torch", "torchvision", "timm", "open_clip_torch", "webdataset", "numpy", "pillow")
_ROOT = Path(__file__).resolve().parents[2]


def environment_record() -> dict[str, Any]:
    """Return command, versions, machine and commit of this process, ready for JSON."""
    return {
        "command": [sys.executable, *sys.argv],
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "machine": platform.platform(),
        "cpu_count": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "threads": torch.get_num_threads(),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(uncommitted_changes()),
    }


def provenance(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the record as a page shows it."""
    commit = record["commit"] or "not in a git checkout"
    return {
        "command": shlex.join(record["command"]),
        "commit": commit + (" with uncommitted changes" if record["uncommitted_changes"] else ""),
        "machine": f"{record['machine']}, {record['cpu_count']} CPUs, {record['gpu'] or 'no GPU'}",
        "processes": f"{record['world_size']}, {record['threads']} threads each",
        "software": f"Python {record['python']}, "
        + ", ".join(f"{name} {version}" for name, version in record["packages"].items() if version),
    }


def uncommitted_changes() -> str | None:
    """Return the difference from the commit as a patch, or None outside a checkout."""
    return _git("diff", "HEAD")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        return subprocess.run(
            ["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
