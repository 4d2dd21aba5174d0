"""Readers of the retrieval benchmarks' own files. Each gives the pictures, in a fixed order, with their captions.

A reader takes the root and, if its protocol has an annotation file, the one that the user named (else None). It reports
in one line what is missing or malformed. protocols.py then checks the pictures and their number. All files are
untrusted: the paths in them must lie inside the root.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from eval.base.folders import pictures_below
from eval.base.images import is_picture
from eval.benchmarks.annotation_files import (
    inside_root,
    json_lines,
    one_line,
    read_json,
    read_lines,
    read_text,
    tab_separated_rows,
)
from eval.benchmarks.conversations import SHAREGPT4V_JSON, SHAREGPT4V_TEST_ROWS, conversation_rows
from longclip_teacher.errors import InputError

__all__ = [
    "Pairs",
    "read_coco_karpathy_test",
    "read_coco_val2017",
    "read_dci",
    "read_docci_test",
    "read_flickr30k_all",
    "read_flickr30k_karpathy_test",
    "read_folder",
    "read_imageinwords",
    "read_long_dci",
    "read_sharegpt4v_test",
    "read_urban1k",
]

CAPTIONS_PER_IMAGE = 5  # in COCO and Flickr30k; nobody uses the few further ones in COCO
FLICKR30K_FOLDERS = ("flickr30k-images", "flickr30k_images", "images")
# The folders of each part of ImageInWords' pictures; the first that exists is used.
IMAGEINWORDS_FOLDERS = {
    "IIW-400": ("docci_aar", "images_aar"),
    "DCI_Test": ("dci", "photos"),
    "DOCCI_Test": ("docci", "images"),
}
LONG_DCI_IMAGE_COLUMNS = ("filepath", "image", "image_path", "filename")
LONG_DCI_CAPTION_COLUMNS = ("title", "caption", "long_caption", "text")

Pairs = list[tuple[Path, list[str]]]  # each picture with its captions


# --- long captions ---


def read_sharegpt4v_test(root: Path, annotations: Path | None) -> Pairs:
    """Return the first 1000 rows of ShareGPT4V's array: `image` and the first answer of the conversation."""
    path = annotations or _sharegpt4v_json(root)
    pairs: Pairs = []
    for row in conversation_rows(path, stop=SHAREGPT4V_TEST_ROWS):
        if row.image is None or row.caption is None:
            raise InputError(f"{path}: row {row.number} is not a ShareGPT4V row (image, conversations with an answer)")
        pairs.append((inside_root(root, row.image, path), [row.caption]))
    return pairs


def _sharegpt4v_json(root: Path) -> Path:
    if (root / SHAREGPT4V_JSON).is_file():
        return root / SHAREGPT4V_JSON
    found = sorted(root.glob("*.json"))
    if len(found) != 1:
        what = f"{len(found)} JSON files" if found else "no JSON file"
        raise InputError(f"{what} in {root}: ShareGPT4V needs one ({SHAREGPT4V_JSON}), or name it with --annotations")
    return found[0]


def read_urban1k(root: Path, annotations: Path | None) -> Pairs:
    """Return image/N.jpg with the first line of caption/N.txt."""
    return [(image, [read_text(text).strip().split("\n")[0]]) for image, text in _paired_folders(root)]


def read_docci_test(root: Path, annotations: Path | None) -> Pairs:
    """Return the rows of docci_descriptions.jsonlines whose split is "test", in the file's order."""
    path = annotations or root / "docci_descriptions.jsonlines"
    folder = _folder(root, "DOCCI's pictures", "images")
    pairs: Pairs = []
    for number, row in json_lines(path):
        try:
            if row["split"] == "test":
                pairs.append((inside_root(folder, row["image_file"], path), [one_line(row["description"])]))
        except (KeyError, TypeError):
            raise InputError(f"{path}: line {number} is not a DOCCI row (split, image_file, description)") from None
    return pairs


def read_dci(root: Path, annotations: Path | None, *, part: Literal["full", "extra", "short"]) -> Pairs:
    """Return the pictures of annotations/*.json in the order of their names, each with one of DCI's texts.

    "full" joins `short_caption` and `extra_caption`, which DCI's own code calls the extended caption. If a picture's
    extra_caption is empty, "full" is the short one alone, and "extra" leaves the picture out.
    """
    base = root / "densely_captioned_images" if (root / "densely_captioned_images").is_dir() else root
    folder = _folder(base, "DCI's pictures (of SA-1B's archive sa_000138)", "photos")
    files = sorted(_folder(base, "DCI's annotations", "annotations").glob("[!.]*.json"))
    pairs: Pairs = []
    for path in files:
        row = read_json(path)
        try:
            image, short, extra = row["image"], one_line(row["short_caption"]), one_line(row["extra_caption"])
        except (KeyError, TypeError):
            raise InputError(f"{path} is not a DCI annotation (image, short_caption, extra_caption)") from None
        caption = {"full": f"{short} {extra}".strip(), "extra": extra, "short": short}[part]
        if caption or part != "extra":
            pairs.append((inside_root(folder, image, path), [caption]))
    return pairs


def read_long_dci(root: Path, annotations: Path | None) -> Pairs:
    """Read a tab-separated table with a header: a column of picture paths and one of captions, with TULIP's or common
    names.

    The paths start at the root, or at root/photos if that folder exists.
    """
    tables = [path for path in (root / "dci_long.csv", root / "dci_long.tsv") if path.is_file()]
    path = annotations or (tables[0] if tables else root / "dci_long.csv")
    folder = root / "photos" if (root / "photos").is_dir() else root
    pairs: Pairs = []
    for number, row in tab_separated_rows(path):
        image = next((name for name in LONG_DCI_IMAGE_COLUMNS if name in row), None)
        text = next((name for name in LONG_DCI_CAPTION_COLUMNS if name in row), None)
        if image is None or text is None:
            found = ", ".join(str(name) for name in row)
            raise InputError(f"{path} has the columns {found}: Long-DCI's table has filepath and title, tab-separated")
        if row[text] is None:
            raise InputError(f"{path}: the row at line {number} has no {text}")
        pairs.append((inside_root(folder, row[image], path), [one_line(row[text])]))
    return pairs


def read_imageinwords(root: Path, annotations: Path | None, *, parts: tuple[str, ...]) -> Pairs:
    """Read PART/data.jsonl of the ImageInWords repository's datasets/, field "IIW", one part after the other."""
    pairs: Pairs = []
    for part in parts:
        places = [root / part / "data.jsonl", root / "datasets" / part / "data.jsonl"]
        path = next((place for place in places if place.is_file()), places[0])
        folder = _folder(root, f"the pictures of {part}", *IMAGEINWORDS_FOLDERS[part])
        for number, row in json_lines(path):
            try:
                name, caption = row.get("image/key", row.get("image")), one_line(row["IIW"])
            except (KeyError, TypeError, AttributeError):
                raise InputError(
                    f"{path}: line {number} is not an ImageInWords row (image/key or image, IIW)"
                ) from None
            if isinstance(name, str) and name and not is_picture(Path(name)):
                name += ".jpg"  # DOCCI's pictures are named by their key
            pairs.append((inside_root(folder, name, path), [caption]))
    return pairs


# --- short captions, five per picture ---


def read_coco_val2017(root: Path, annotations: Path | None) -> Pairs:
    """Read captions_val2017.json: pictures in the order of their ids, as pycocotools and torchvision give them."""
    path = annotations or root / "annotations" / "captions_val2017.json"
    folder = _folder(root, "COCO's validation pictures", "val2017")
    content = read_json(path)
    captions: dict[Any, list[str]] = {}
    try:
        images = sorted(content["images"], key=lambda image: image["id"])
        for annotation in content["annotations"]:
            captions.setdefault(annotation["image_id"], []).append(one_line(annotation["caption"]))
        return [
            (inside_root(folder, image["file_name"], path), captions.get(image["id"], [])[:CAPTIONS_PER_IMAGE])
            for image in images
        ]
    except (KeyError, TypeError):
        raise InputError(
            f"{path} is not a COCO captions file (images: id, file_name; annotations: image_id, caption)"
        ) from None


def read_coco_karpathy_test(root: Path, annotations: Path | None) -> Pairs:
    """Read dataset_coco.json, split "test". Its pictures are part of val2014."""
    _folder(root, "COCO's pictures of 2014", "val2014")
    return _karpathy_test(annotations or _beside(root, "dataset_coco.json"), root)


def read_flickr30k_karpathy_test(root: Path, annotations: Path | None) -> Pairs:
    """Read dataset_flickr30k.json, split "test"."""
    folder = _folder(root, "Flickr30k's pictures", *FLICKR30K_FOLDERS)
    return _karpathy_test(annotations or _beside(root, "dataset_flickr30k.json"), folder)


def _karpathy_test(path: Path, folder: Path) -> Pairs:
    """Return the test split of one of Karpathy's files, in its order. A picture is [filepath/]filename below the
    folder."""
    content = read_json(path)
    pairs: Pairs = []
    try:
        for row in content["images"]:
            if row["split"] == "test":
                name = f"{row['filepath']}/{row['filename']}" if "filepath" in row else row["filename"]
                captions = [one_line(sentence["raw"]) for sentence in row["sentences"][:CAPTIONS_PER_IMAGE]]
                pairs.append((inside_root(folder, name, path), captions))
    except (KeyError, TypeError):
        raise InputError(
            f"{path} is not a file of Karpathy's splits (images: split, filename, sentences with raw)"
        ) from None
    return pairs


def read_flickr30k_all(root: Path, annotations: Path | None) -> Pairs:
    """Read lines of results_20130124.token, `PICTURE.jpg#N<tab>caption`, pictures in the order of their first line."""
    path = annotations or _beside(root, "results_20130124.token")
    folder = _folder(root, "Flickr30k's pictures", *FLICKR30K_FOLDERS)
    captions: dict[str, list[str]] = {}
    for number, line in read_lines(path):
        key, tab, caption = line.partition("\t")
        name, mark, _ = key.rpartition("#")
        if not tab or not mark:
            raise InputError(f"{path}: line {number} is not a caption of Flickr30k (PICTURE.jpg#N, a tab, the caption)")
        captions.setdefault(name, []).append(caption.strip())
    return [(inside_root(folder, name, path), own) for name, own in captions.items()]


# --- your own ---


def read_folder(root: Path, annotations: Path | None) -> Pairs:
    """Read pictures with a .txt of the same name beside them, or image/N.jpg with caption/N.txt, with all of each
    text."""
    if (root / "image").is_dir() and (root / "caption").is_dir():
        files = _paired_folders(root)
    else:
        files = [(image, image.with_suffix(".txt")) for image in pictures_below(root)]
        _require_captions(files)
    return [(image, [one_line(read_text(text))]) for image, text in files]


# --- shared ---


def _folder(root: Path, what: str, *names: str) -> Path:
    """Return the first of the folders root/name that exists."""
    found = next((root / name for name in names if (root / name).is_dir()), None)
    if found is None:
        raise InputError(f"no folder {' or '.join(names)} in {root}: {what} belong there")
    return found


def _beside(root: Path, name: str) -> Path:
    """Return root/name, or root/annotations/name if only that exists."""
    inner = root / "annotations" / name
    return inner if inner.is_file() and not (root / name).is_file() else root / name


def _paired_folders(root: Path) -> list[tuple[Path, Path]]:
    """Return pictures in root/image and their captions in root/caption, by name; numbers in numerical order."""
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
