"""Retrieval sets named on a command line as NAME=PROTOCOL:FOLDER, and a digest of a set's content."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from eval.base.plain_files import check_plain
from eval.benchmarks.protocols import RetrievalSet, load_retrieval_set
from longclip_teacher.errors import InputError

__all__ = ["is_plain_name", "parse_sets", "set_digest"]


def parse_sets(entries: Sequence[str], flag: str) -> dict[str, RetrievalSet]:
    """Return the sets by name, in order. `flag` is what the user typed. Raise InputError for an entry that is not
    NAME=PROTOCOL:FOLDER, a repeated name, or a folder that does not fit its protocol."""
    sets: dict[str, RetrievalSet] = {}
    for entry in entries:
        name, equals, place = entry.partition("=")
        protocol, colon, root = place.partition(":")
        if not (name and equals and colon and root):
            raise InputError(f"{flag} {entry}: write NAME=PROTOCOL:FOLDER, such as urban=urban1k:data/Urban1k")
        if name in sets:
            raise InputError(f"{flag} {entry}: the name {name} is taken, give each set its own")
        sets[name] = load_retrieval_set(protocol, root)
    return sets


def is_plain_name(name: str) -> bool:
    """Return whether a name can be part of a file's name."""
    return re.fullmatch(r"\w[\w.+-]*", name) is not None


def set_digest(retrieval_set: RetrievalSet) -> str:
    """Return the sha256 of the set's pictures (their bytes) and captions in order. The folder's place does not
    matter."""
    digest = hashlib.sha256()
    for image in retrieval_set.images:
        check_plain(image)
        try:
            content = image.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read {image} ({error.strerror})") from None
        digest.update(hashlib.sha256(content).digest())
    for caption, owner in zip(retrieval_set.captions, retrieval_set.caption_image, strict=True):
        digest.update(f"{owner} {len(caption)} {caption}".encode())
    return digest.hexdigest()
