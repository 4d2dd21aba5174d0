"""Build the page with npm, if it is not built or its sources have changed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from photo_search.errors import InputError

__all__ = ["WEB", "built_page", "install"]

WEB = Path(__file__).resolve().parent
_OLDEST_NODE = (20, 19)


def built_page() -> Path:
    """The folder of the built page. Raises InputError if node is missing, or npm fails."""
    install()
    built = WEB / "dist"
    sources = [WEB, *WEB.glob("*.*"), *(WEB / "public").rglob("*"), *(WEB / "src").rglob("*")]
    newest = max(path.stat().st_mtime for path in sources if path.is_file())
    page = built / "index.html"
    if not page.is_file() or page.stat().st_mtime < newest:
        _npm("run", "--silent", "build")
    return built


def install() -> None:
    """Install the packages of package-lock.json, if they are not there."""
    _check_node()
    there = WEB / "node_modules/.package-lock.json"
    if not there.is_file() or there.stat().st_mtime < (WEB / "package-lock.json").stat().st_mtime:
        _npm("ci", "--ignore-scripts", "--no-audit", "--no-fund")
        there.touch()


def _check_node() -> None:
    needed = f"Node.js {'.'.join(map(str, _OLDEST_NODE))} or later"
    if shutil.which("node") is None or shutil.which("npm") is None:
        raise InputError(f"node and npm are not installed: the page needs {needed}")
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if tuple(int(part) for part in version.removeprefix("v").split(".")[:2]) < _OLDEST_NODE:
        raise InputError(f"node is {version}: the page needs {needed}")


def _npm(*arguments: str) -> None:
    done = subprocess.run(["npm", *arguments], cwd=WEB, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise InputError(f"npm {' '.join(arguments)} failed: {lines[-1] if lines else 'it says nothing'}")
