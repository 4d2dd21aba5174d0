"""Files below a folder and files that match a pattern: one rule for all commands.

Hidden files and folders are skipped. Links are followed within the folder, each folder once; links that lead out of it,
or to a folder that is read already (a loop), are passed over and told. Names are sorted as text. What exists is taken
literally before it is taken as a pattern.
"""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from eval.base.images import is_picture
from longclip_teacher.errors import InputError

__all__ = [
    "FoundPictures",
    "find_pictures",
    "literal_start",
    "matching_paths",
    "pictures_below",
    "subfolders",
    "tell_passed_over",
]


class FoundPictures(NamedTuple):
    """What bears a picture's name below a folder, as paths relative to it, sorted as text."""

    files: list[str]
    missing: list[str]
    """Not files: links to nothing, pipes and the like."""
    passed_over: list[str]
    """Links that are not followed, to folders too."""


def pictures_below(folder: Path) -> list[Path]:
    """Return the pictures of a folder and its subfolders, missing ones included, for the caller to count.

    Links passed over are told on stderr.
    """
    found = find_pictures(folder)
    tell_passed_over(folder, found.passed_over)
    return [folder / name for name in sorted(found.files + found.missing)]


def find_pictures(folder: Path, root: Path | None = None) -> FoundPictures:
    """Search a folder and its subfolders for pictures.

    With `root`, links may also lead to whatever is below `root`. Raise InputError naming a folder that cannot be read.
    """
    bounds = [os.path.realpath(place) for place in (folder, root or folder)]
    found = FoundPictures([], [], [])
    folders = [""]
    links: list[str] = []
    seen: set[str] = set()
    while folders or links:  # real folders first: a link to one of them is passed over, whatever the order on the disk
        if folders:
            name = folders.pop()
        else:
            links.sort(reverse=True)
            name = links.pop()
        place = os.path.realpath(folder / name)
        if place in seen or not _is_below(place, bounds):
            found.passed_over.append(name)
            continue
        seen.add(place)
        for entry in _entries(folder / name):
            path = str(Path(name, entry.name))
            if entry.is_dir(follow_symlinks=False):
                folders.append(path)
            elif entry.is_symlink() and _leads_to_folder(entry):
                links.append(path)
            elif is_picture(Path(entry.name)):
                if entry.is_symlink() and not _is_below(os.path.realpath(entry.path), bounds):
                    found.passed_over.append(path)
                else:
                    (found.files if _is_file(entry) else found.missing).append(path)
    return FoundPictures(*map(sorted, found))


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in `folder`, sorted by name. A link to a folder counts, but not if it leads back up."""
    own = os.path.realpath(folder)
    links_up = [entry.name for entry in _entries(folder) if _leads_up(entry, own)]
    tell_passed_over(folder, links_up)
    names = [entry.name for entry in _entries(folder) if entry.name not in links_up and _leads_to_folder(entry)]
    return [folder / name for name in sorted(names)]


def tell_passed_over(folder: Path, links: Sequence[str]) -> None:
    """Say on stderr how many links below `folder` are passed over; under torchrun, rank 0 alone says so."""
    if links and os.environ.get("RANK", "0") == "0":
        print(
            f"{folder}: {len(links)} links are passed over, the first: {min(links)} (links may not lead out of "
            "the folder, or to a folder that is read already)",
            file=sys.stderr,
        )


def matching_paths(pattern: str | Path) -> list[Path]:
    """Return what `pattern` names, sorted as text: an existing path itself, otherwise what matches * ? [ ] and **.

    The existing folders that a pattern begins with are taken literally. Nothing may match.
    """
    folder, rest = literal_start(pattern)
    if not rest:
        return [folder]
    start = "" if folder == Path() else f"{glob.escape(str(folder)).rstrip(os.sep)}{os.sep}"
    return [Path(match) for match in sorted(glob.glob(start + rest, recursive=True))]


def literal_start(pattern: str | Path) -> tuple[Path, str]:
    """Split a pattern into the longest path at its beginning that exists, and the rest, which may be empty."""
    whole = Path(pattern).expanduser()
    folder = next(path for path in (whole, *whole.parents, Path()) if path == Path() or os.path.lexists(path))
    return folder, "" if folder == whole else str(whole.relative_to(folder))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror})") from None


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link to itself
        return False


def _leads_up(entry: os.DirEntry[str], folder: str) -> bool:
    return entry.is_symlink() and _leads_to_folder(entry) and _is_below(folder, [os.path.realpath(entry.path)])


def _is_below(path: str, folders: Sequence[str]) -> bool:
    return any(Path(path).is_relative_to(folder) for folder in folders)
