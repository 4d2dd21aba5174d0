"""The pictures below a folder, found by the rule of all commands of this project (eval/base/folders.py).

Hidden files and folders are skipped. Links are followed within the folder, each folder once; links that lead out of it,
or to a folder that is read already (a loop), are passed over and told.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from photo_search.errors import InputError
from photo_search.images import is_picture

__all__ = ["FoundPictures", "find_pictures"]


class FoundPictures(NamedTuple):
    """What bears a picture's name below a folder, as paths relative to it, sorted as text."""

    files: list[str]
    missing: list[str]
    """Not files: links to nothing, pipes and the like."""
    passed_over: list[str]
    """Links that are not followed, to folders too."""


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


def _is_below(path: str, folders: Sequence[str]) -> bool:
    return any(Path(path).is_relative_to(folder) for folder in folders)
