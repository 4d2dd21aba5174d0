"""What each retrieval benchmark is: its files, its split, its caption rule, how many captions a picture has.

A protocol is one entry of `PROTOCOLS`; to add one, write the function that reads its pictures and captions, and the
entry.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.annotation_files import first_json_rows, inside_root, one_line, read_json, read_text
from eval.images import is_picture
from longclip_teacher.errors import InputError

__all__ = ["PROTOCOLS", "Protocol", "RetrievalSet", "load_retrieval_set"]

SHAREGPT4V_JSON = "share-captioner_coco_lcs_sam_1246k_1107.json"
SHAREGPT4V_TEST_ROWS = 1000
COCO_CAPTIONS_PER_IMAGE = 5

Pairs = list[tuple[Path, list[str]]]  # each picture with its captions


@dataclass(frozen=True)
class RetrievalSet:
    """Pictures and captions; caption j belongs to picture `caption_image[j]`, and every picture has a caption."""

    name: str
    images: list[Path]
    captions: list[str]
    caption_image: list[int]
    description: str
    count_mismatch: str | None = None
    """What differs from the benchmark's own number of pictures and captions, if anything does."""


@dataclass(frozen=True)
class Protocol:
    """A benchmark: its definition, and its reader, (root, annotation file if given) -> pictures with their captions."""

    name: str
    definition: str
    files: str
    read: Callable[[Path, Path | None], Pairs]
    num_images: int | None = None
    num_captions: int | None = None
    has_annotations: bool = False
    """Whether its captions come from an annotation file, which the user may name."""


def load_retrieval_set(
    protocol: str, root: str | Path, limit: int | None = None, annotations: str | Path | None = None
) -> RetrievalSet:
    """Read a protocol's pictures (as paths) and captions under `root`.

    `limit` keeps the first so many pictures; `annotations` names the JSON of a protocol that has one, instead of the
    usual place. Raises InputError that says what is missing.
    """
    if protocol not in PROTOCOLS:
        near = difflib.get_close_matches(protocol, PROTOCOLS, n=1)
        meant = f"did you mean {near[0]}?" if near else f"it is one of {', '.join(PROTOCOLS)}"
        raise InputError(f"unknown protocol {protocol!r}: {meant}")
    if limit is not None and limit < 1:
        raise InputError(f"a limit of {limit} pictures leaves nothing: give 1 or more")
    entry, root = PROTOCOLS[protocol], Path(root)
    if annotations is not None and not entry.has_annotations:
        raise InputError(f"{entry.name} has no annotation file: leave --annotations out")
    if not root.is_dir():
        raise InputError(f"no folder at {root}: {entry.name} needs {entry.files}")
    pairs = entry.read(root, Path(annotations) if annotations is not None else None)[:limit]
    if not pairs:
        raise InputError(f"no pictures in {root}: {entry.name} needs {entry.files}")
    for image, captions in pairs:
        if not captions or not all(caption.strip() for caption in captions):
            raise InputError(f"{image} has {'an empty' if captions else 'no'} caption")
    captions = [caption for _, own in pairs for caption in own]
    return RetrievalSet(
        name=entry.name,
        images=[image for image, _ in pairs],
        captions=captions,
        caption_image=[row for row, (_, own) in enumerate(pairs) for _ in own],
        description=entry.definition,
        count_mismatch=_count_mismatch(entry, len(pairs), len(captions)),
    )


def _count_mismatch(entry: Protocol, num_images: int, num_captions: int) -> str | None:
    expected = entry.num_images or num_images, entry.num_captions or num_captions
    if (num_images, num_captions) == expected:
        return None
    return (
        f"{entry.name} has {expected[0]} pictures and {expected[1]} captions, "
        f"here are {num_images} and {num_captions}: the figures do not compare with published ones"
    )


# --- readers ---


def _read_sharegpt4v(root: Path, annotations: Path | None) -> Pairs:
    path = annotations or _sharegpt4v_json(root)
    pairs: Pairs = []
    for number, row in enumerate(first_json_rows(path, SHAREGPT4V_TEST_ROWS)):
        try:
            image, caption = row["image"], one_line(row["conversations"][1]["value"])
        except (KeyError, IndexError, TypeError):
            raise InputError(f"{path}: row {number} is no ShareGPT4V row (image, conversations[1].value)") from None
        pairs.append((inside_root(root, image, path), [caption]))
    return pairs


def _sharegpt4v_json(root: Path) -> Path:
    if (root / SHAREGPT4V_JSON).is_file():
        return root / SHAREGPT4V_JSON
    found = sorted(root.glob("*.json"))
    if len(found) != 1:
        what = f"{len(found)} JSON files" if found else "no JSON file"
        raise InputError(f"{what} in {root}: ShareGPT4V needs one ({SHAREGPT4V_JSON}), or name it with --annotations")
    return found[0]


def _read_coco_val2017(root: Path, annotations: Path | None) -> Pairs:
    path = annotations or root / "annotations" / "captions_val2017.json"
    folder = root / "val2017"
    if not folder.is_dir():
        raise InputError(f"no folder {folder}: COCO's validation pictures belong there")
    content = read_json(path)
    captions: dict[Any, list[str]] = {}
    try:
        images = sorted(content["images"], key=lambda image: image["id"])
        for annotation in content["annotations"]:
            captions.setdefault(annotation["image_id"], []).append(one_line(annotation["caption"]))
        return [
            (inside_root(folder, image["file_name"], path), captions.get(image["id"], [])[:COCO_CAPTIONS_PER_IMAGE])
            for image in images
        ]
    except (KeyError, TypeError):
        raise InputError(
            f"{path} is no COCO captions file (images: id, file_name; annotations: image_id, caption)"
        ) from None


def _read_urban1k(root: Path, annotations: Path | None) -> Pairs:
    return [(image, [read_text(text).strip().split("\n")[0]]) for image, text in _paired_folders(root)]


def _read_folder(root: Path, annotations: Path | None) -> Pairs:
    if (root / "image").is_dir() and (root / "caption").is_dir():
        files = _paired_folders(root)
    else:
        images = sorted(path for path in root.rglob("*") if is_picture(path))
        files = [(image, image.with_suffix(".txt")) for image in images]
        _require_captions(files)
    return [(image, [one_line(read_text(text))]) for image, text in files]


def _paired_folders(root: Path) -> list[tuple[Path, Path]]:
    """Pictures in root/image and their captions in root/caption, by name; numbers in numerical order."""
    for name in ("image", "caption"):
        if not (root / name).is_dir():
            raise InputError(f"no folder {root / name}: the pairs are image/N.jpg and caption/N.txt")
    images = [path for path in (root / "image").iterdir() if is_picture(path)]
    images.sort(key=lambda path: (0, int(path.stem), "") if path.stem.isdecimal() else (1, 0, path.stem))
    files = [(image, root / "caption" / f"{image.stem}.txt") for image in images]
    _require_captions(files)
    stems = {image.stem for image in images}
    alone = sorted(path.name for path in (root / "caption").glob("[!.]*.txt") if path.stem not in stems)
    if alone:
        raise InputError(
            f"{len(alone)} captions in {root / 'caption'} have no picture in image/, the first: {alone[0]}"
        )
    return files


def _require_captions(files: list[tuple[Path, Path]]) -> None:
    missing = [text for _, text in files if not text.is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(files)} pictures have no caption file, the first missing: {missing[0]}"
        )


# --- the protocols ---

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="sharegpt4v_1k",
            definition="Rows 0 to 999 of ShareGPT4V's captions (training starts at row 1000), one long caption a "
            "picture; line breaks become spaces. As in Long-CLIP (Zhang et al. 2024, section 4).",
            files=f"{SHAREGPT4V_JSON} (or the only .json there, or --annotations FILE) and the pictures that it names",
            read=_read_sharegpt4v,
            num_images=1000,
            num_captions=1000,
            has_annotations=True,
        ),
        Protocol(
            name="urban1k",
            definition="Urban-1k (Zhang et al. 2024): 1000 street scenes, one caption each, its file's first line.",
            files="image/N.jpg and caption/N.txt, N = 1 to 1000 (Hugging Face: BeichenZhang/Urban1k)",
            read=_read_urban1k,
            num_images=1000,
            num_captions=1000,
        ),
        Protocol(
            name="coco2017val",
            definition="COCO val2017, all 5000 pictures, the first five captions of each in the file's order; image to "
            "text, any of the five is a hit. Not the Karpathy 5k split, whose figures do not compare.",
            files="val2017/*.jpg and annotations/captions_val2017.json (cocodataset.org, or --annotations FILE)",
            read=_read_coco_val2017,
            num_images=5000,
            num_captions=25000,
            has_annotations=True,
        ),
        Protocol(
            name="folder",
            definition="Your own pairs, one caption a picture: all of the text file, line breaks become spaces.",
            files="pictures with a .txt of the same name beside them (sub-folders too), or image/N.jpg, caption/N.txt",
            read=_read_folder,
        ),
    )
}
