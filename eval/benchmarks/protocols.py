"""The retrieval benchmarks: files, split, caption rule, and number of captions per picture of each.

A protocol is one entry of `PROTOCOLS`. To add one, write the function that reads its pictures and captions
(protocol_readers.py), and the entry. Figures compare only under one protocol: similar names are different tests.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from eval.benchmarks import protocol_readers as readers
from eval.benchmarks.checksums import pairing_sha256
from eval.benchmarks.conversations import SHAREGPT4V_JSON
from eval.towers.features import MAX_UNREADABLE_SHARE
from longclip_teacher.errors import InputError

__all__ = ["PROTOCOLS", "TIES", "Protocol", "RetrievalSet", "load_retrieval_set"]

TIES = (
    "Ties, in every protocol: a rank is the place in a stable sort by score, so of equal scores the earlier picture or "
    "caption of the protocol's order counts first. `tied` is the percentage of queries affected, and `best_case` is "
    "recall if every tie is won: rank = 1 + the number that score strictly higher."
)
ONE_TO_ONE = "One caption per picture: a query has one match, both ways."
FIVE_CAPTIONS = (
    "Five captions per picture. Image to text: any of the five is a hit, and the best ranked counts. Text to image: "
    "each caption is a query of its own."
)


@dataclass(frozen=True)
class RetrievalSet:
    """Pictures and captions; caption j belongs to picture `caption_image[j]`, and every picture has a caption."""

    name: str
    images: list[Path]
    captions: list[str]
    caption_image: list[int]
    description: str
    count_mismatch: str | None = None
    """How the set differs from the benchmark's number of pictures and captions, or from its texts, if it does."""

    @cached_property
    def sha256(self) -> str:
        """Fingerprint of file names, captions and pairing: equal if two people evaluate the same texts."""
        return pairing_sha256(self.images, self.captions, self.caption_image)


@dataclass(frozen=True)
class Protocol:
    """A benchmark: its description, and its reader, (root, annotation file if given) -> pictures with their
    captions."""

    name: str
    about: str
    """Its pictures and texts, and the paper."""
    caption_rule: str
    """The part of the files' text that is a caption."""
    one_to_many: str
    """How many captions a picture has, and what counts as a hit."""
    compare: str
    """What its figures must not be compared with."""
    files: str
    read: Callable[[Path, Path | None], readers.Pairs]
    num_images: int | None = None
    num_captions: int | None = None
    count_tolerance: float = 0.0
    """Share by which the numbers may differ, if they are known only roughly."""
    known_sha256: str | None = None
    """`RetrievalSet.sha256` of the complete benchmark, if it was computed from the publisher's own files."""
    has_annotations: bool = False
    """Whether its captions come from one annotation file, which the user may name."""

    @property
    def definition(self) -> str:
        """The complete definition in one paragraph."""
        return " ".join((self.about, self.caption_rule, self.one_to_many, self.compare))


def load_retrieval_set(
    protocol: str, root: str | Path, limit: int | None = None, annotations: str | Path | None = None
) -> RetrievalSet:
    """Read a protocol's pictures (as paths) and captions under `root`.

    `limit` keeps only the first pictures, that many. `annotations` names the file of a protocol that has one, instead
    of the usual place. Raise InputError that says what is missing: a file, a folder, a caption, or more than 1% of the
    pictures (the encoder leaves out and names fewer).
    """
    if protocol not in PROTOCOLS:
        near = difflib.get_close_matches(protocol, PROTOCOLS, n=1)
        meant = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(PROTOCOLS)}"
        raise InputError(f"unknown protocol {protocol!r}: {meant}")
    if limit is not None and limit < 1:
        raise InputError(f"a limit of {limit} pictures leaves nothing: give 1 or more")
    entry, root = PROTOCOLS[protocol], Path(root)
    if annotations is not None and not entry.has_annotations:
        raise InputError(f"{entry.name} has no annotation file: drop --annotations")
    if not root.is_dir():
        raise InputError(f"no folder at {root}: {entry.name} needs {entry.files}")
    pairs = entry.read(root, Path(annotations) if annotations is not None else None)[:limit]
    if not pairs:
        raise InputError(f"no pictures in {root}: {entry.name} needs {entry.files}")
    for image, captions in pairs:
        if not captions or not all(caption.strip() for caption in captions):
            raise InputError(f"{image} has {'an empty' if captions else 'no'} caption")
    images = [image for image, _ in pairs]
    _require_pictures(entry, images)
    found = RetrievalSet(
        name=entry.name,
        images=images,
        captions=[caption for _, own in pairs for caption in own],
        caption_image=[row for row, (_, own) in enumerate(pairs) for _ in own],
        description=entry.definition,
    )
    return replace(found, count_mismatch=_mismatch(entry, found))


def _require_pictures(entry: Protocol, images: Sequence[Path]) -> None:
    """Raise InputError if more than 1% of the pictures are missing, because the figures would be those of another
    test."""
    names = {folder: _names_in(folder) for folder in {image.parent for image in images}}
    # a name that is not listed may still open on a file system that ignores case
    missing = [image for image in images if image.name not in names[image.parent] and not image.is_file()]
    if len(missing) > MAX_UNREADABLE_SHARE * len(images):
        raise InputError(
            f"{len(missing)} of the {len(images)} pictures of {entry.name} are missing, the first: {missing[0]}"
        )


def _names_in(folder: Path) -> set[str]:
    """Return the names in a folder by one listing, not by checking each of 31,000 pictures; none if it cannot be
    listed."""
    try:
        return {path.name for path in folder.iterdir()}
    except OSError:
        return set()


def _mismatch(entry: Protocol, found: RetrievalSet) -> str | None:
    """Return how a set differs from its protocol, in words, or None."""
    known = ((entry.num_images, len(found.images)), (entry.num_captions, len(found.captions)))
    if any(number is not None and abs(here - number) > entry.count_tolerance * number for number, here in known):
        about = "about " if entry.count_tolerance else ""
        return (
            f"{entry.name} has {about}{entry.num_images} pictures and {entry.num_captions} captions, but "
            f"{len(found.images)} and {len(found.captions)} were found: do not compare the figures with published ones"
        )
    if entry.known_sha256 is not None and entry.known_sha256 != found.sha256:
        return (
            f"{entry.name} has the right number of pictures and captions, but their names, texts or order differ from "
            f"the published ones (sha256 {found.sha256}, not {entry.known_sha256}): the figures may not be comparable"
        )
    return None


# --- the protocols ---

_THREE_DCI = "dci_full, dci_extra and dci_short are not comparable: their captions differ."
_TWO_COCO = "coco2017val and coco_karpathy_5k are not comparable: they use different pictures of COCO."
_TWO_FLICKR30K = "flickr30k_1k_test and flickr30k_all are not comparable: all has thirty times the candidates."
_DCI_FILES = "annotations/*.json and photos/ (or both in densely_captioned_images/), as DCI's repository unpacks them"
_LINE_BREAKS = "line breaks become spaces"

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="sharegpt4v_1k",
            about="Rows 0 to 999 of ShareGPT4V's 1.2M machine-written captions (Chen et al. 2023), which Long-CLIP "
            "(Zhang et al. 2024, section 4) keeps for testing: its training starts at row 1000.",
            caption_rule=f"The complete caption; {_LINE_BREAKS}.",
            one_to_many=ONE_TO_ONE,
            compare="Not comparable with tests of other rows, such as LoTLIP's 10k, nor for a model that "
            "trained on all rows.",
            files=f"{SHAREGPT4V_JSON} (or the only .json there, or --annotations FILE) and the pictures that it names",
            read=readers.read_sharegpt4v_test,
            num_images=1000,
            num_captions=1000,
            has_annotations=True,
        ),
        Protocol(
            name="urban1k",
            about="Urban-1k (Zhang et al. 2024, Long-CLIP): 1000 similar street scenes.",
            caption_rule="The first line of the caption's file.",
            one_to_many=ONE_TO_ONE,
            compare="Not comparable with Urban-200, its first version.",
            files="image/N.jpg and caption/N.txt, N = 1 to 1000 (Hugging Face: BeichenZhang/Urban1k)",
            read=readers.read_urban1k,
            num_images=1000,
            num_captions=1000,
        ),
        Protocol(
            name="docci",
            about="DOCCI (Onoe et al. 2024): the 5000 pictures of its test split.",
            caption_rule=f"The complete description, written by one person; {_LINE_BREAKS}.",
            one_to_many=ONE_TO_ONE,
            compare="Not comparable with tests on qual_test (100 pictures) or on all splits.",
            files="docci_descriptions.jsonlines (or --annotations FILE) and images/, both from google.github.io/docci",
            read=readers.read_docci_test,
            num_images=5000,
            num_captions=5000,
            has_annotations=True,
        ),
        Protocol(
            name="dci_full",
            about="Densely Captioned Images (Urbanek et al. 2024): all 7805 pictures of all its splits.",
            caption_rule="short_caption, a space, extra_caption (DCI's extended caption; the short one alone if the "
            f"extra is empty), without the texts of the picture's parts; {_LINE_BREAKS}.",
            one_to_many=ONE_TO_ONE,
            compare=f"{_THREE_DCI} LoTLIP uses these texts but joins the sentences differently.",
            files=_DCI_FILES,
            read=partial(readers.read_dci, part="full"),
            num_images=7805,
            num_captions=7805,
        ),
        Protocol(
            name="dci_extra",
            about="Densely Captioned Images (Urbanek et al. 2024): the pictures that have an extra_caption, about 7600 "
            "of 7805.",
            caption_rule=f"extra_caption alone, which often continues the short one; {_LINE_BREAKS}.",
            one_to_many=ONE_TO_ONE,
            compare=f"{_THREE_DCI} It is comparable with long_dci if the sha256 is the same.",
            files=_DCI_FILES,
            read=partial(readers.read_dci, part="extra"),
            num_images=7600,
            num_captions=7600,
            count_tolerance=0.03,
        ),
        Protocol(
            name="dci_short",
            about="Densely Captioned Images (Urbanek et al. 2024): all 7805 pictures of all its splits.",
            caption_rule=f"short_caption alone, about a sentence; {_LINE_BREAKS}.",
            one_to_many=ONE_TO_ONE,
            compare=f"{_THREE_DCI} Not comparable with sDCI either, whose captions are machine-written summaries.",
            files=_DCI_FILES,
            read=partial(readers.read_dci, part="short"),
            num_images=7805,
            num_captions=7805,
        ),
        Protocol(
            name="long_dci",
            about="Long-DCI (Najdenkoska et al. 2024, TULIP): a table of the pictures of DCI that have an "
            "extra_caption, about 7600.",
            caption_rule=f"The table's title column, DCI's extra_caption; {_LINE_BREAKS}.",
            one_to_many=ONE_TO_ONE,
            compare="Not comparable with dci_full and dci_short; comparable with dci_extra if the sha256 is the same.",
            files="dci_long.csv (tab-separated with a header, filepath and title; or --annotations FILE) and the "
            "pictures that it names, beside it or in photos/",
            read=readers.read_long_dci,
            num_images=7600,
            num_captions=7600,
            count_tolerance=0.03,
            has_annotations=True,
        ),
        Protocol(
            name="iiw_400",
            about="ImageInWords (Garg et al. 2024): IIW-400, 400 pictures of DOCCI-AAR.",
            caption_rule=f"The field IIW, written by people, never the model's IIW-P5B; {_LINE_BREAKS}.",
            one_to_many=ONE_TO_ONE,
            compare="Not comparable with iiw_612, which contains it.",
            files="IIW-400/data.jsonl (github.com/google/imageinwords, datasets/) and DOCCI-AAR's pictures in "
            "images_aar/ or docci_aar/",
            read=partial(readers.read_imageinwords, parts=("IIW-400",)),
            num_images=400,
            num_captions=400,
            known_sha256="3c185ddd5d37bf44d12db0552316f268da54c1c3e75cb7fa552e6d66db43a41a",
        ),
        Protocol(
            name="iiw_612",
            about="ImageInWords (Garg et al. 2024): IIW-400, then the 112 pictures of DCI_Test and the 100 of "
            "DOCCI_Test, as LoTLIP (Wu et al. 2024) combines them.",
            caption_rule=f"The field IIW, written by people, never the model's IIW-P5B; {_LINE_BREAKS}.",
            one_to_many=ONE_TO_ONE,
            compare="Not comparable with iiw_400, a part of it; LoTLIP joins the sentences differently.",
            files="IIW-400/, DCI_Test/ and DOCCI_Test/ with a data.jsonl each (github.com/google/imageinwords, "
            "datasets/), and the pictures in images_aar/, photos/ and images/ (or docci_aar/, dci/ and docci/)",
            read=partial(readers.read_imageinwords, parts=("IIW-400", "DCI_Test", "DOCCI_Test")),
            num_images=612,
            num_captions=612,
            known_sha256="729a530cd27e468d4c9d983b3b56c2fbe99dcf102645cb2b0d5c81f01f30b727",
        ),
        Protocol(
            name="coco2017val",
            about="COCO val2017 (Lin et al. 2014; captions Chen et al. 2015), all 5000 pictures, as in Long-CLIP.",
            caption_rule=f"The first five captions of each in the file's order; {_LINE_BREAKS}.",
            one_to_many=FIVE_CAPTIONS,
            compare=_TWO_COCO,
            files="val2017/*.jpg and annotations/captions_val2017.json (cocodataset.org, or --annotations FILE)",
            read=readers.read_coco_val2017,
            num_images=5000,
            num_captions=25000,
            has_annotations=True,
        ),
        Protocol(
            name="coco_karpathy_5k",
            about="The 5000 test pictures of Karpathy and Fei-Fei's split (2015) of COCO, out of val2014, as in "
            "MobileCLIP and DataComp.",
            caption_rule=f"The first five captions of each in the file's order, as written (raw); {_LINE_BREAKS}.",
            one_to_many=FIVE_CAPTIONS,
            compare=f"{_TWO_COCO} It is not the mean of five folds of 1000, called 1k, either.",
            files="dataset_coco.json (there or in annotations/, or --annotations FILE) and val2014/*.jpg",
            read=readers.read_coco_karpathy_test,
            num_images=5000,
            num_captions=25000,
            has_annotations=True,
        ),
        Protocol(
            name="flickr30k_1k_test",
            about="The 1000 test pictures of Karpathy and Fei-Fei's split (2015) of Flickr30k (Young et al. 2014), "
            "the usual test.",
            caption_rule=f"All five captions in the file's order, as written (raw); {_LINE_BREAKS}.",
            one_to_many=FIVE_CAPTIONS,
            compare=_TWO_FLICKR30K,
            files="dataset_flickr30k.json (there or in annotations/, or --annotations FILE) and flickr30k-images/",
            read=readers.read_flickr30k_karpathy_test,
            num_images=1000,
            num_captions=5000,
            has_annotations=True,
        ),
        Protocol(
            name="flickr30k_all",
            about="All 31783 pictures of Flickr30k (Young et al. 2014), including training pictures, as in Long-CLIP.",
            caption_rule="All five captions, in the file's order.",
            one_to_many=FIVE_CAPTIONS,
            compare=_TWO_FLICKR30K,
            files="results_20130124.token (there or in annotations/, or --annotations FILE) and flickr30k-images/",
            read=readers.read_flickr30k_all,
            num_images=31783,
            num_captions=158915,
            has_annotations=True,
        ),
        Protocol(
            name="folder",
            about="Your own pairs.",
            caption_rule=f"The complete text file; {_LINE_BREAKS}.",
            one_to_many=ONE_TO_ONE,
            compare="Compare only if the sha256 is the same.",
            files="pictures with a .txt of the same name beside them (subfolders too), or image/N.jpg, caption/N.txt",
            read=readers.read_folder,
        ),
    )
}
