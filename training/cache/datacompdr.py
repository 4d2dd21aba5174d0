"""DataCompDR's shards, which hold teacher features, augmentations and synthetic captions beside each sample's picture.

Layout: "MobileCLIP" (Vasu et al., CVPR 2024, section 3) and Apple's public generator of the data. Sample KEY has:

    KEY.syn.json    {"syn_text": [n captions]}, with more lists under keys that begin with syn_text
    KEY.paug.json   {"param_aug": [A augmentations]}, or the same list as a JSON string (as on the hub)
    KEY.npz         image_emb [A, D] and text_emb [1 + n, D], row 0 the ground truth's; in newer shards text_emb [1, D]
                    and syn_text_emb [n, D]. The features of two teachers stand side by side in D
    KEY.pth.gz      the same as bfloat16 tensors, gzipped; the npz is preferred if both exist
    KEY.txt         the ground-truth caption

One augmentation is [crop, flip?, ops?]: crop is [top, left, height, width]; flip is true or false if the recipe has it;
ops is [[op, magnitude], ...] with op an index of RandAugment's operations, or null for none.

All of it is untrusted: sizes are bounded before anything is unpacked, and only tensors are unpickled.
Shapes: A augmentations, n captions, D width of the features.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from eval.base.foreign_text import HALVES, whole_characters
from longclip_teacher.ancestry import DATACOMPDR, NOT_RECORDED, ancestry_from_json, ancestry_to_json
from longclip_teacher.errors import InputError
from training.cache.datacompdr_arrays import stored_arrays, two_dimensional
from training.data.index import RawSample, ShardIndex, is_remote
from training.data.samples import BadSample
from training.data.store import StoredDraw, TeacherInfo, choose_captions, choose_view
from training.data.stream import read_remote_shard
from training.data.transforms import RAND_AUGMENT_OPS, Augmentation

__all__ = ["DataCompDRStore", "datacompdr_teacher_info", "write_datacompdr_sample"]

OPS_SIZE = 224  # size in pixels of the pictures for which RandAugment magnitudes are stored
CONTEXT_LENGTH = 77  # tokens that CLIP, DataCompDR's teacher, reads
_MAX_PIXELS = 1 << 20  # bound on a crop's side
_MAX_OPS = 16
_FIRST_SAMPLES = 100  # at least one of these must be usable


class DataCompDRStore:
    """Draws of samples whose shard holds the teacher's features (`RawSample.extra`); a `TeacherStore`.

    The long caption is one of the synthetic captions, drawn anew each epoch; the short one is the ground-truth caption
    (txt). For a sample without txt, the short caption is a synthetic one too, drawn separately. Features are float32,
    divided by the norm of each teacher's part: DataCompDR stores them with unit norm, but bfloat16 changes it by up to
    2e-3.
    """

    def __init__(self, teacher_info: TeacherInfo) -> None:
        """Keep the teacher's description from `datacompdr_teacher_info`."""
        self.teacher_info = teacher_info

    def draw(self, raw: RawSample, seed: int, key: tuple[int, ...]) -> StoredDraw:
        """Return the draw of `raw` that (seed, key) decides; see `TeacherStore`. Raise BadSample with the cause."""
        arrays = stored_arrays(raw)
        image_rows, augmentations = two_dimensional(arrays, "image_emb"), _augmentations(raw)
        if not len(augmentations) or len(augmentations) != len(image_rows):
            raise BadSample("paug.json and image_emb have different lengths, or none")
        long_captions, long_rows = _synthetic(raw, arrays)
        short_captions, short_rows = _ground_truth(raw, arrays)
        if not short_captions:
            short_captions, short_rows = long_captions, long_rows
        view = choose_view(len(augmentations), seed, key)
        long, short = choose_captions(len(long_captions), len(short_captions), seed, key)
        return StoredDraw(
            augmentation=_augmentation(augmentations[view]),
            caption_long=long_captions[long],
            caption_short=short_captions[short],
            image=self._unit(image_rows[view]),
            long=self._unit(long_rows[long]),
            short=self._unit(short_rows[short]),
        )

    def _unit(self, row: np.ndarray) -> np.ndarray:
        """Return `row` [D] as float32, with each teacher's part divided by its norm."""
        if len(row) != self.teacher_info.embed_dim:
            raise BadSample("the width of the features differs from the first sample's")
        row = row.astype(np.float32)
        if not np.isfinite(row).all():
            raise BadSample("features are not finite")
        parts = np.split(row, np.cumsum(self.teacher_info.widths)[:-1])
        norms = [float(np.linalg.norm(part.astype(np.float64))) for part in parts]
        if min(norms) == 0:
            raise BadSample("features are zero")
        return np.concatenate([part / np.float32(norm) for part, norm in zip(parts, norms, strict=True)])


def datacompdr_teacher_info(shards: Sequence[str | Path], widths: Sequence[int] | None = None) -> TeacherInfo:
    """Read the teacher of `shards` (paths or URLs, see `expand_patterns`) from the first shard's first usable sample.

    widths    of the teachers side by side. None: as our own exports record them, else two of 768 in 1536, else one

    The logit scale is None unless our own export records it: DataCompDR's shards do not. Raise a one-line InputError if
    the shards hold no such members or their features do not fit `widths`.
    """
    shard = str(shards[0])
    causes: list[InputError] = []
    for raw in islice(_samples(shard), _FIRST_SAMPLES):
        try:
            return _teacher_info(raw, shard, widths)
        except InputError as error:
            causes.append(error)
    raise causes[0] if causes else InputError(f"{shard} is an empty shard: remove it or make it again")


def _samples(shard: str) -> Iterator[RawSample]:
    if not is_remote(shard):
        index = ShardIndex([shard])
        yield from map(index.read, range(index.num_samples))
    else:
        yield from read_remote_shard(shard)


def _teacher_info(raw: RawSample, shard: str, widths: Sequence[int] | None) -> TeacherInfo:
    members = {"syn.json": {"syn.json"}, "paug.json": {"paug.json"}, "npz or pth.gz": {"npz", "pth.gz"}}
    missing = [name for name, any_of in members.items() if not any_of & raw.extra.keys()]
    if missing:
        raise InputError(
            f"{shard}: sample {raw.key} has no {', no '.join(missing)}; --teacher.cache datacompdr needs DataCompDR's "
            "shards (if it has them, its index is older: run make_shards.py index again or delete NAME.tar.index)"
        )
    try:
        width = two_dimensional(stored_arrays(raw), "image_emb").shape[1]
        told = _told(raw)
        widths = tuple(widths or told.get("widths") or ((768, 768) if width == 1536 else (width,)))
        if sum(widths) != width or min(widths) < 1:
            raise InputError(
                f"{shard}: sample {raw.key} has features of width {width}, not {' + '.join(map(str, widths))}: "
                "set --teacher.stored_widths to the widths of the teachers side by side"
            )
        length = told.get("context_length", CONTEXT_LENGTH)
        teacher_info = TeacherInfo(widths, told.get("logit_scale"), length, told.get("ancestry", DATACOMPDR))
        DataCompDRStore(teacher_info).draw(raw, 0, (0, 0))
    except BadSample as error:
        raise InputError(f"{shard}: sample {raw.key} holds no usable teacher features: {error}") from None
    return teacher_info


def _told(raw: RawSample) -> dict[str, Any]:
    """Return what `write_datacompdr_sample` recorded of the teacher in the json member; empty for shards of others."""
    try:
        told = json.loads(raw.json or b"{}")["stored_teacher"]
        scale = None if told["logit_scale"] is None else float(told["logit_scale"])
        widths = tuple(int(width) for width in told["widths"])
        ancestry = ancestry_from_json(told["ancestry"]) if "ancestry" in told else NOT_RECORDED
        length = int(told["context_length"])
        return {"widths": widths, "logit_scale": scale, "context_length": length, "ancestry": ancestry}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return {}


# --- captions ---------------------------------------------------------------------------------------------------------


def _synthetic(raw: RawSample, arrays: Mapping[str, np.ndarray]) -> tuple[list[str], np.ndarray]:
    """Return the synthetic captions and their features [n, D], from all lists whose key begins with syn_text."""
    by_key = {key: _texts(value) for key, value in _object(raw, "syn.json").items() if key.startswith("syn_text")}
    with_own = [key for key in by_key if f"{key}_emb" in arrays]
    if with_own:
        rows = [two_dimensional(arrays, f"{key}_emb") for key in with_own]
        fits = all(len(by_key[key]) == len(part) for key, part in zip(with_own, rows, strict=True))
        fits = fits and len({part.shape[1] for part in rows}) == 1
    else:  # all captions in text_emb, the ground truth's first
        rows = [two_dimensional(arrays, "text_emb")[1:]]
        fits = sum(map(len, by_key.values())) == len(rows[0])
    texts = [text for key in with_own or by_key for text in by_key[key]]
    if not fits:
        raise BadSample("syn.json and text_emb have different lengths")
    filled = [number for number, text in enumerate(texts) if text.strip()]
    if not filled:
        raise BadSample("no synthetic caption")
    return [texts[number].strip() for number in filled], np.concatenate(rows)[filled]


def _ground_truth(raw: RawSample, arrays: Mapping[str, np.ndarray]) -> tuple[list[str], np.ndarray]:
    """Return the ground-truth caption and its features [1, D]; no caption if the txt is missing or empty."""
    rows = two_dimensional(arrays, "text_emb")[:1]
    if not len(rows):
        raise BadSample("text_emb is empty")
    try:
        text = whole_characters((raw.txt or b"").decode("utf-8", HALVES)).strip()
    except UnicodeDecodeError:
        raise BadSample("txt is not UTF-8") from None
    return [text] if text else [], rows


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise BadSample("syn.json holds no lists of captions")
    return [whole_characters(text) for text in value]


def _object(raw: RawSample, name: str) -> dict[str, Any]:
    """Return the JSON object in the member `name`."""
    if name not in raw.extra:
        raise BadSample(f"no {name}, or one of more than 4 MB")
    try:
        value = json.loads(raw.extra[name])
    except (ValueError, RecursionError):
        raise BadSample(f"{name} is damaged") from None
    if not isinstance(value, dict):
        raise BadSample(f"{name} is not an object")
    return value


# --- augmentations ----------------------------------------------------------------------------------------------------


def _augmentations(raw: RawSample) -> list[Any]:
    """Return the entries of param_aug, not yet parsed."""
    value = _object(raw, "paug.json").get("param_aug")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BadSample("paug.json is damaged") from None
    if not isinstance(value, list):
        raise BadSample("paug.json holds no list of augmentations")
    return value


def _augmentation(entry: Any) -> Augmentation:
    """Parse one augmentation. Raise BadSample for recipes that also resize, erase or mix pictures, which we cannot
    replay."""
    if not isinstance(entry, list) or not 1 <= len(entry) <= 3:
        raise BadSample("an augmentation is not [crop, flip, ops]")
    crop, *rest = entry
    flip = rest.pop(0) if rest and isinstance(rest[0], bool) else False
    ops = rest.pop(0) if rest else None
    if rest or not _are_whole(crop, 4):
        raise BadSample("an augmentation is not [crop, flip, ops]")
    top, left, height, width = crop
    if height < 1 or width < 1:
        raise BadSample("a stored crop is empty")
    box = (left, top, left + width, top + height)
    try:
        return Augmentation(box, ops=_operations(ops), ops_size=OPS_SIZE, flip=flip)
    except InputError:
        raise BadSample("a stored operation cannot have its magnitude") from None


def _operations(ops: Any) -> tuple[tuple[str, float], ...]:
    """Return RandAugment's operations by name, with signed magnitudes; none for null."""
    if ops is None:
        return ()
    if not isinstance(ops, list) or len(ops) > _MAX_OPS:
        raise BadSample("stored operations are not a list of [op, magnitude]")
    named = []
    for pair in ops:
        if not isinstance(pair, list) or len(pair) != 2 or not _are_whole(pair[:1], 1, len(RAND_AUGMENT_OPS) - 1):
            raise BadSample("stored operations are not a list of [op, magnitude]")
        if type(pair[1]) not in (int, float) or (type(pair[1]) is int and abs(pair[1]) > _MAX_PIXELS):
            raise BadSample("a stored magnitude is not a number in bounds")
        named.append((RAND_AUGMENT_OPS[pair[0]], float(pair[1])))
    return tuple(named)


def _are_whole(numbers: Any, count: int, largest: int = _MAX_PIXELS) -> bool:
    """Return whether `numbers` is a list of `count` integers from 0 to `largest`."""
    return (
        isinstance(numbers, list)
        and len(numbers) == count
        and all(type(number) is int and 0 <= number <= largest for number in numbers)
    )


# --- writing ----------------------------------------------------------------------------------------------------------


def write_datacompdr_sample(
    image: bytes,
    *,
    image_features: np.ndarray,
    text_features: np.ndarray,
    captions: Sequence[str],
    ground_truth: str,
    augmentations: Sequence[Augmentation],
    teacher_info: TeacherInfo,
) -> dict[str, bytes]:
    """Return the members of one sample in DataCompDR's layout, by suffix: {"jpg": ..., "npz": ...}.

    image             the picture's file, written unchanged
    image_features    [A, D], one row per augmentation
    text_features     [1 + n, D]: the ground truth's, then the captions'
    captions          n synthetic captions, from which the long one is drawn
    ground_truth      the short caption

    The json member records what DataCompDR does not: the teacher's widths, logit scale, context length and ancestors.
    Raise InputError for an augmentation that DataCompDR cannot hold.
    """
    if len(augmentations) != len(image_features) or 1 + len(captions) != len(text_features):
        raise InputError("give one row of features per augmentation, and per caption plus one")
    arrays = io.BytesIO()
    np.savez(arrays, image_emb=image_features, text_emb=text_features)
    has_flip = any(augmentation.flip for augmentation in augmentations)
    told = {
        "widths": list(teacher_info.widths),
        "logit_scale": teacher_info.logit_scale,
        "context_length": teacher_info.context_length,
        "ancestry": ancestry_to_json(teacher_info.ancestry),
    }
    return {
        _image_suffix(image): image,
        "txt": ground_truth.encode(),
        "json": json.dumps({"stored_teacher": told}).encode(),
        "syn.json": json.dumps({"syn_text": list(captions)}, ensure_ascii=False).encode(),
        "paug.json": json.dumps({"param_aug": [_entry(one, has_flip) for one in augmentations]}).encode(),
        "npz": arrays.getvalue(),
    }


def _image_suffix(image: bytes) -> str:
    suffixes = {b"\x89PNG": "png", b"RIFF": "webp"}
    return suffixes.get(image[:4], "jpg")


def _entry(augmentation: Augmentation, has_flip: bool) -> list[Any]:
    """Invert `_augmentation`. Either all entries of a file have a flip or none has."""
    left, top, right, bottom = augmentation.box
    if augmentation.ops and augmentation.ops_size != OPS_SIZE:
        raise InputError(
            f"RandAugment was drawn at {augmentation.ops_size} pixels, but DataCompDR's magnitudes are for {OPS_SIZE}: "
            "this cache cannot be exported"
        )
    ops = [[RAND_AUGMENT_OPS.index(name), magnitude] for name, magnitude in augmentation.ops] or None
    return [[top, left, bottom - top, right - left], *([augmentation.flip] if has_flip else []), ops]
