"""Packages that a machine lacks, carried there as wheels in a folder. Only the standard library is imported here."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from itertools import pairwise
from pathlib import Path

__all__ = ["LACKING", "collect", "put_on_path"]

ROOT = Path(__file__).parents[2]
LACKING = (
    "open_clip_torch", "ftfy", "wcwidth", "webdataset", "braceexpand", "tyro", "docstring_parser", "typeguard",
    "jaxtyping", "wadler_lindig", "tomli_w", "ImageHash", "PyWavelets",
)  # fmt: skip
"""What this project needs beyond torch, torchvision, timm and the usual scientific packages."""
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux2014_x86_64", "any")


def put_on_path(arguments: list[str]) -> None:
    """Make the project, and the wheels of the folder after --wheels, importable here and in child processes.

    It comes before every other import, because the command line itself is read by a package that may be among the
    wheels. A folder that is not there is left to the check of the options, or to the import that fails.
    """
    places = [str(ROOT), str(ROOT / "scripts")]
    given = [argument.partition("=")[2] for argument in arguments if argument.startswith("--wheels=")]
    given += [after for before, after in pairwise(arguments) if before == "--wheels"]
    wheels = sorted(Path(given[-1]).glob("*.whl")) if given else []
    if wheels:
        unpacked = tempfile.mkdtemp(prefix="wheels-")
        atexit.register(shutil.rmtree, unpacked, ignore_errors=True)
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(unpacked)
        places.append(unpacked)
    sys.path[1:1] = places
    known = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*places, *([known] if known else [])])


def collect(folder: Path, python_version: str) -> int:
    """Download the wheels of `LACKING` for 64-bit Linux into `folder`; return pip's exit code."""
    platforms = [word for name in _PLATFORMS for word in ("--platform", name)]
    call = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    call += ["--python-version", python_version, *platforms, "--dest", str(folder), *LACKING]
    return subprocess.run(call, check=False).returncode
