"""The wheel holds what the checkout holds: every module, preset, configuration and template."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

PACKAGES = ("longclip_teacher", "mobileclip_student", "training", "eval")
BUILD = "import setuptools.build_meta, sys; setuptools.build_meta.build_wheel(sys.argv[1])"


def test_a_wheel_holds_every_tracked_file_of_the_packages(tracked_files: list[Path], tmp_path: Path) -> None:
    root = Path(__file__).resolve().parent.parent
    tree, out = tmp_path / "tree", tmp_path / "out"
    tracked = {path for path in tracked_files if path.parts[0] in PACKAGES}
    for path in (*tracked, Path("pyproject.toml"), Path("README.md"), Path("LICENSE")):
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / path, tree / path)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(out)], cwd=tree, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("compact_longclip-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {Path(name) for name in archive.namelist() if ".dist-info/" not in name}
    assert len(tracked) > 100 and {path.suffix for path in tracked} >= {".py", ".json", ".toml", ".jinja"}
    assert held == tracked
