"""Check that two people evaluate the same data: a fingerprint of texts and pairing, and files against SHA256SUMS."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from eval.base.plain_files import check_plain
from eval.benchmarks.annotation_files import inside_root, read_lines
from eval.towers.features import show_track
from longclip_teacher.errors import InputError
from longclip_teacher.weights_file import file_sha256

__all__ = ["SHA256SUMS", "pairing_sha256", "verify_sha256sums"]

SHA256SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")  # as sha256sum writes it, in text or binary mode


def pairing_sha256(images: Sequence[Path], captions: Sequence[str], caption_image: Sequence[int]) -> str:
    """Return the SHA-256 (hex) of the pictures' file names and captions in order, without pixels and folder names.

    The order counts, because it decides between equal scores. The result is equal on every machine and under every
    root.
    """
    own: list[list[str]] = [[] for _ in images]
    for caption, row in zip(captions, caption_image, strict=True):
        own[row].append(caption)
    digest = hashlib.sha256()
    for image, texts in zip(images, own, strict=True):
        digest.update(json.dumps([image.name, texts]).encode("ascii") + b"\n")
    return digest.hexdigest()


def verify_sha256sums(root: str | Path, show_progress: bool = False) -> int:
    """Check every file that root/SHA256SUMS names. Return their number.

    `sha256sum` writes that file, with paths relative to the root. Raise InputError with the number of files that are
    missing or differ and the first of each, or if there is no such file, if it is empty, or if a path in it leads out
    of the root.
    """
    sums = Path(root) / SHA256SUMS
    if not sums.is_file():
        raise InputError(f"no {SHA256SUMS} in {root}: create it with `sha256sum FILES > {SHA256SUMS}`")
    expected: list[tuple[Path, str]] = []
    for number, line in read_lines(sums):
        match = _LINE.fullmatch(line)
        if match is None:
            raise InputError(f"{sums}: line {number} is not a line of sha256sum (64 hex digits, two spaces, path)")
        expected.append((inside_root(Path(root), match[2], sums), match[1].lower()))
    if not expected:
        raise InputError(f"{sums} names no files")
    missing, differing = [], []
    for path, digest in show_track(expected, "sha256" if show_progress else None, len(expected)):
        try:
            check_plain(path)
            if file_sha256(path) != digest:
                differing.append(path)
        except OSError:
            missing.append(path)
    problems = [
        f"{len(paths)} of {len(expected)} files {what}, the first: {paths[0]}"
        for paths, what in ((differing, "differ from it"), (missing, "are missing or unreadable"))
        if paths
    ]
    if problems:
        raise InputError(f"{sums}: {'; '.join(problems)}")
    return len(expected)
