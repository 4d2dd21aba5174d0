"""What int8 files are judged by: pairs of pictures and captions, and what they are made with: calibration pictures.

A run names both: its validation set, or else its first test, and its training shards.

Shapes: N pictures, M captions, R image side, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from eval.base.folders import pictures_below
from eval.base.images import open_image
from eval.benchmarks.protocols import RetrievalSet, load_retrieval_set
from eval.measures.recall import recall_metrics
from eval.measures.retrieval_set import encode_retrieval_set
from eval.towers.exported_model import ExportedModel
from eval.towers.features import encode_captions, encode_images
from exporting.checks import Written
from exporting.runtimes import Encoder
from exporting.sources import Exported
from longclip_teacher.errors import InputError
from training.data.index import ShardIndex, expand_patterns, is_remote

__all__ = ["MOST_LOST", "Judge", "calibration_pixels", "judged_pairs", "shown"]

MOST_LOST = 1.0
"""Points of R@1 that int8 files may lose, in either direction, against float32 files in the same runtime."""
_MOST_PAIRS, _FEWEST_PAIRS = 1000, 100  # below, one pair is more than a point
_LEAST_R1 = 10.0  # below, a loss of all that the model knows is hardly more than the point that is allowed
_FLOAT = ("model.onnx", "model.xml")
_MOST_CALIBRATION, _FEWEST_CALIBRATION = 128, 16


def judged_pairs(model: Exported, given: str | None) -> RetrievalSet:
    """At most the first 1,000 pairs of `given` (PROTOCOL:DIR) or, without it, of the run's own set.

    Raises InputError if there are none, or too few to tell a loss of one point.
    """
    place = given or _own_pairs(model)
    if place is None:
        raise InputError("--int8 is judged by R@1, and this source names no pairs: give --pairs PROTOCOL:DIR")
    protocol, colon, root = place.partition(":")
    if not (protocol and colon and root):
        raise InputError(f"--pairs {place}: write PROTOCOL:DIR, such as urban1k:data/Urban1k")
    try:
        pairs = load_retrieval_set(protocol, root, _MOST_PAIRS)
    except InputError as error:
        raise error if given else InputError(f"{error}; it is the run's own set: --pairs names another") from None
    if len(pairs.images) < _FEWEST_PAIRS:
        raise InputError(
            f"{place} has {len(pairs.images)} pairs, of which one is more than a point of R@1: --int8 needs "
            f"{_FEWEST_PAIRS}, give others with --pairs"
        )
    return pairs


def _own_pairs(model: Exported) -> str | None:
    if model.config is None:
        return None
    data = model.config.data
    if data.val is not None:
        return f"{data.val_protocol}:{data.val}"
    return data.tests[0].partition("=")[2] if data.tests else None


def calibration_pixels(model: Exported, folder: Path | None) -> Float[Tensor, "N 3 R R"]:
    """At most 128 pictures, spread evenly over `folder` or, without it, over the run's training shards, preprocessed.

    Raises InputError if there are none, or fewer than 16 that can be read.
    """
    pictures: Sequence[Path] | _ShardPictures
    if folder is not None:
        if not folder.is_dir():
            raise InputError(f"--calibration {folder}: no such folder")
        pictures, place = pictures_below(folder), f"--calibration {folder}"
    elif model.config is not None:
        pictures, place = _ShardPictures(model.config.data.shards), "the run's training shards"
    else:
        raise InputError("--int8 needs pictures like those of its use, for the ranges: give --calibration FOLDER")
    pixels = []
    for number in np.linspace(0, len(pictures) - 1, min(_MOST_CALIBRATION, len(pictures))).astype(int).tolist():
        try:
            pixels.append(model.model.preprocess(open_image(pictures[number])))
        except InputError:
            continue  # the others will do, and too few are refused below
    if len(pixels) < _FEWEST_CALIBRATION:
        raise InputError(
            f"{place}: {len(pixels)} pictures that can be read, and --int8 needs {_FEWEST_CALIBRATION}: "
            "name a folder with --calibration"
        )
    return torch.stack(pixels)


class _ShardPictures:
    """The undecoded pictures of training shards."""

    def __init__(self, patterns: Sequence[str]) -> None:
        try:
            shards = expand_patterns(patterns)
        except InputError as error:
            raise InputError(f"{error}; they are the run's own: name pictures with --calibration FOLDER") from None
        if is_remote(shards[0]):
            raise InputError("the run's training shards are remote: name pictures with --calibration FOLDER")
        self._index = ShardIndex(shards, stage="image")

    def __len__(self) -> int:
        return self._index.num_samples

    def __getitem__(self, number: int) -> bytes:
        return self._index.read(number).image or b""


class Judge:
    """Features of the pairs by exported files of one runtime, and the R@1 of two towers."""

    def __init__(self, model: Exported, pairs: RetrievalSet, image: Encoder, text: Encoder) -> None:
        """`image` and `text` are the float32 files. Raises InputError if they find too few pairs to judge others by."""
        self._model, self._image, self._text = model.model, image, text
        self._found = encode_retrieval_set(ExportedModel(model.model, image, text), pairs)
        self.float_images, self.float_texts = self._found.image_features, self._found.text_features
        self.float_r1 = self.r1(self.float_images, self.float_texts)
        if min(self.float_r1) < _LEAST_R1:
            raise InputError(
                f"R@1 of the model is {shown(self.float_r1)}% on {self.about}: too low to judge --int8 by, give pairs "
                "that it can tell apart with --pairs, or leave --int8 out"
            )

    @property
    def about(self) -> str:
        return f"{len(self._found.images)} pairs"

    def images(self, encoder: Encoder) -> Float[Tensor, "N D"]:
        return encode_images(ExportedModel(self._model, encoder, self._text), self._found.images).features

    def texts(self, encoder: Encoder) -> Float[Tensor, "M D"]:
        return encode_captions(ExportedModel(self._model, self._image, encoder), self._found.captions)[0]

    def r1(self, images: Tensor, texts: Tensor) -> tuple[float, float]:
        """R@1 in percent: picture to caption, caption to picture."""
        found = recall_metrics(images, texts, self._found.caption_image)
        return found["i2t"]["r1"], found["t2i"]["r1"]

    def lost(self, images: Tensor, texts: Tensor) -> float:
        """Points of R@1 that two towers lose against the float32 towers, in the worse direction."""
        lost = max(before - now for before, now in zip(self.float_r1, self.r1(images, texts), strict=True))
        return round(lost, 6)  # a point is a point: 98.0 - 97.0 may be a little more

    def with_r1(self, written: Sequence[Written]) -> list[Written]:
        """The files of this runtime, those in float32 with their R@1."""
        return [replace(one, r1=shown(self.float_r1)) if one.name.endswith(_FLOAT) else one for one in written]

    def refusal(self, images: Tensor, texts: Tensor, what: str) -> InputError:
        """What is said of two towers that lose too much."""
        return InputError(
            f"{what}: R@1 falls from {shown(self.float_r1)}% to {shown(self.r1(images, texts))}% on {self.about}, more "
            f"than {MOST_LOST:g} point: leave --int8 out, or calibrate with other pictures (--calibration); nothing "
            "was written"
        )


def shown(r1: tuple[float, float]) -> str:
    """R@1 both ways as it is printed."""
    return f"{r1[0]:.1f} / {r1[1]:.1f}"
