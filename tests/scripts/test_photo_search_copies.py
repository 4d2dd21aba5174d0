"""Photo search imports none of our packages: what stands there a second time is the same text."""

from __future__ import annotations

import ast
import inspect
from types import ModuleType

import pytest

import eval.base.folders
import eval.base.images
import eval.base.picture_structure
import eval.base.plain_files
import eval.base.sentences
import photo_search.folders
import photo_search.images
import photo_search.picture_structure
import photo_search.sentences

COPIES = [
    (photo_search.folders, eval.base.folders),
    (photo_search.images, eval.base.images),
    (photo_search.images, eval.base.plain_files),
    (photo_search.picture_structure, eval.base.picture_structure),
    (photo_search.sentences, eval.base.sentences),
]
OWN = {"IMAGE_SUFFIXES", "__all__"}  # HEIC beside the others


def definitions(module: ModuleType) -> dict[str, str]:
    """Functions, classes and constants of a module, by name, as code without comments."""
    found = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = ast.unparse(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            found[ast.unparse(target)] = ast.unparse(node)
    return found


@pytest.mark.parametrize(("copy", "original"), COPIES, ids=lambda module: module.__name__)
def test_what_both_define_is_the_same(copy: ModuleType, original: ModuleType) -> None:
    ours, theirs = definitions(copy), definitions(original)
    shared = ours.keys() & theirs.keys() - OWN
    assert shared and {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}


def test_nothing_else_is_defined() -> None:
    originals = {copy: set() for copy, _ in COPIES}
    for copy, original in COPIES:
        originals[copy] |= definitions(original).keys()
    own = {name for copy, known in originals.items() for name in definitions(copy).keys() - known}
    assert own == {"_HEIC_SUFFIXES", "check_readable"}
    assert eval.base.images.IMAGE_SUFFIXES | {".heic", ".heif"} == photo_search.images.IMAGE_SUFFIXES
