"""Which of a source's rows are packed, and what is told of those that cannot be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from caption_sources import LeftOut, Pair, Row
from longclip_teacher.atomic_files import write_text
from longclip_teacher.errors import InputError

__all__ = ["causes", "check_missing", "select"]


def select(
    rows: Iterable[Row], include: Sequence[str], exclude: Sequence[str], limit: int | None
) -> tuple[list[Pair], list[LeftOut]]:
    """Return the rows that the patterns and the limit leave, in the source's order: pairs, and those left out.

    A pattern is also matched literally, so that a name with [ ] can be given. Raise InputError if no pair is left.
    """
    pairs: list[Pair] = []
    missing: list[LeftOut] = []
    for row in rows:
        if (include and not _matches(row.name, include)) or _matches(row.name, exclude):
            continue
        if isinstance(row, LeftOut):
            missing.append(row)
        elif row.path.is_file():
            pairs.append(row)
        else:
            missing.append(LeftOut(row.name, "no file"))
        if len(pairs) + len(missing) == limit:
            break
    if not pairs and not missing:
        raise InputError("no pictures are left: check the source, --include and --exclude")
    if not pairs:
        raise InputError(
            f"{len(missing)} of {len(missing)} pictures are missing, broken or without a caption "
            f"({causes(missing)}; the first: {missing[0].name}): check the source and its folder of pictures"
        )
    return pairs, missing


def check_missing(listing: Path, num_rows: int, missing: Sequence[LeftOut], max_share: float) -> None:
    """Write the names of `missing` to the file `listing`, or remove it if there are none.

    Raise InputError if they exceed `max_share`, the option --max-missing-share, of `num_rows`.
    """
    if not missing:
        listing.unlink(missing_ok=True)
        return
    names = "\n".join(sorted(row.name for row in missing)) + "\n"
    write_text(listing, names)
    if len(missing) > max_share * num_rows:
        raise InputError(
            f"{len(missing)} of {num_rows} pictures are missing, broken or without a caption "
            f"({causes(missing)}), more than --max-missing-share {max_share:g}: see {listing} "
            f"(the first: {missing[0].name})"
        )


def causes(missing: Iterable[LeftOut]) -> str:
    """Return how many rows each cause took, the most frequent first: `3 no file, 1 no caption`."""
    counts = Counter(row.cause for row in missing)
    return ", ".join(f"{count} {cause}" for cause, count in sorted(counts.items(), key=lambda item: (-item[1], item)))


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(name == pattern or fnmatchcase(name, pattern) for pattern in patterns)
