"""Whether a folder holds class folders, or is a level too high: train/ and val/ with the class folders in them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from eval.base.folders import subfolders
from eval.base.images import is_picture
from longclip_teacher.errors import InputError

__all__ = ["refuse_parent_folder"]

_PARTS = ("val", "valid", "validation", "test", "testing", "train", "training")  # the first that exists is proposed
_SYNSET = re.compile(r"n\d{8}")
_MOST_LEVELS = 4  # ILSVRC/Data/CLS-LOC/val is the deepest of the known layouts


def refuse_parent_folder(root: Path, folders: Sequence[Path], dataset: str) -> None:
    """Raise InputError, naming the folder to give instead, if `root`'s folders are parts of a set and not classes.

    They are if all are called train, val, test and the like; or if none holds a picture itself, but there are synsets
    (n01440764) below. With `dataset` "folder", which takes any names for classes, they are
    only if they are called so and none holds a picture itself.
    """
    holds_pictures = any(_holds_pictures(folder) for folder in folders)
    are_parts = all(folder.name.lower() in _PARTS for folder in folders)
    if holds_pictures and (not are_parts or dataset == "folder"):
        return
    found = next((inner for folder in _by_part(folders) if (inner := _class_root(folder, _MOST_LEVELS))), None)
    is_one_too_high = found is not None and dataset != "folder" and _has_synsets(found)
    if are_parts or is_one_too_high:
        names = ", ".join(folder.name for folder in folders[:4]) + (", ..." if len(folders) > 4 else "")
        raise InputError(
            f"{root} is a level too high: its folders ({names}) are not classes, but hold the class folders: give "
            f"{found or _by_part(folders)[0]}"
        )


def _class_root(folder: Path, levels: int) -> Path | None:
    """Return the folder at or below `folder` whose own folders hold pictures, or which holds shards."""
    inner = subfolders(folder)
    if any(_holds_pictures(one) for one in inner) or any(folder.glob("*.tar")):
        return folder
    if not levels:
        return None
    return next((found for one in _by_part(inner) if (found := _class_root(one, levels - 1))), None)


def _by_part(folders: Sequence[Path]) -> list[Path]:
    rank = {name: place for place, name in enumerate(_PARTS)}
    return sorted(folders, key=lambda folder: (rank.get(folder.name.lower(), len(rank)), folder.name))


def _holds_pictures(folder: Path) -> bool:
    return any(is_picture(path) for path in folder.iterdir())


def _has_synsets(folder: Path) -> bool:
    return any(_SYNSET.fullmatch(one.name) for one in subfolders(folder))
