"""The values that losses read, by the names that the rows of training/losses/table.py use.

G global batch, D width, C classes (texts of the batch, or class prompts).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from training.data.store import TeacherInfo
from training.features import Features, LossParameters
from training.losses.contrastive import contrastive_targets, similarity_logits
from training.losses.relational import split_teachers
from training.losses.tiles import Factors
from training.pca import pca_factors
from training.settings.losses import LossOptions

__all__ = ["FeatureValues", "LogitValues", "PairValues", "reduced", "teacher_scale"]


class PairValues:
    """What losses of images and texts read for one caption length, or for one sub-caption of each picture ("sub").

    With short captions, image features are PCA'd (or as an ablation the texts, loss.pca_side). A teacher of its own for
    short captions has image features of its own and no PCA.
    """

    def __init__(
        self,
        length: Literal["long", "short", "sub"],
        student: Features,
        mapped: Features,
        parameters: LossParameters,
        options: LossOptions,
        *,
        teacher: Features | None = None,
        teacher_info: TeacherInfo | None = None,
        groups: Int[Tensor, " G"] | None = None,
    ) -> None:
        """Keep the features of one caption length.

        teacher, teacher_info    of this length's teacher; features with `short_image` come from a teacher that the long
                                 captions do not have
        groups                   the caption_groups, if equal captions share a target
        """
        self.length, self.options, self.caption_groups = length, options, groups
        self._student, self._mapped, self._teacher, self._teacher_info = student, mapped, teacher, teacher_info
        self._parameters = parameters
        self._own_teacher = length == "short" and teacher is not None and teacher.short_image is not None
        self._reductions: dict[tuple[int, str], tuple[Tensor, list[Factors] | None]] = {}

    # the student's

    @property
    def image(self) -> Float[Tensor, "G D"]:
        return self.image_and_factors()[0]

    @property
    def answering_image(self) -> Float[Tensor, "G D"]:
        return self.image_and_factors(answering=True)[0]

    def image_and_factors(self, *, answering: bool = False) -> tuple[Float[Tensor, "G D"], list[Factors] | None]:
        """Image features and, if PCA has reduced them, the factors whose product they are."""
        return self._image_of(self._student, self._student.answering if answering else "image")

    @property
    def has_token(self) -> bool:
        """True if a feature other than `image` learns from the teacher."""
        return self._student.answering != "image"

    @property
    def text(self) -> Float[Tensor, "G D"]:
        return self._text_of(self._student)

    @property
    def mapped_image(self) -> Float[Tensor, "G Dt"]:
        name = "short_image" if self._own_teacher else "image"
        return self.answering_image if getattr(self._mapped, name) is None else self._image_of(self._mapped, name)[0]

    @property
    def mapped_text(self) -> Float[Tensor, "G Dt"]:
        return self.text if getattr(self._mapped, self.length) is None else self._text_of(self._mapped)

    # the teacher's

    @property
    def teacher_image(self) -> Float[Tensor, "G Dt"]:
        return self.teacher_image_and_factors()[0]

    def teacher_image_and_factors(self) -> tuple[Float[Tensor, "G Dt"], list[Factors] | None]:
        """The same as `image_and_factors`, with a pair of factors for each teacher."""
        assert self._teacher is not None
        if self._own_teacher:
            return self._teacher["short_image"], None
        return self._image_of(self._teacher, "image", self.teacher_widths)

    @property
    def teacher_text(self) -> Float[Tensor, "G Dt"]:
        assert self._teacher is not None
        return self._teacher["short"] if self._own_teacher else self._text_of(self._teacher, self.teacher_widths)

    @property
    def whole_teacher_image(self) -> Float[Tensor, "G Dt"]:
        return self.teacher_image * (1 / math.sqrt(len(self.teacher_widths)))

    @property
    def whole_teacher_text(self) -> Float[Tensor, "G Dt"]:
        return self.teacher_text * (1 / math.sqrt(len(self.teacher_widths)))

    @property
    def teacher_widths(self) -> tuple[int, ...]:
        assert self._teacher_info is not None
        return self._teacher_info.widths

    @property
    def teacher_scales(self) -> float | tuple[float, ...]:
        assert self._teacher_info is not None
        return teacher_scale(self._teacher_info, self.options)

    @property
    def teacher_scale(self) -> float:
        scales = self.teacher_scales
        return sum(scales) / len(scales) if isinstance(scales, tuple) else scales

    # scales and learned parts

    @property
    def logit_scale(self) -> Float[Tensor, ""]:
        return self._parameters.logit_scale

    @property
    def own_scale(self) -> dict[str, Float[Tensor, ""]]:
        """Scales by loss; each loss reads its own."""
        return self._parameters.scales

    @property
    def relation_scale(self) -> Float[Tensor, ""]:
        # flat distributions agree perfectly: a scale that xrd could move would be driven there
        return self._parameters.scales.get("icl", self.logit_scale).detach()

    @property
    def image_mixture(self) -> Float[Tensor, "Do Ds+Dt"]:
        return self._parameters.mixtures["image"]

    @property
    def text_mixture(self) -> Float[Tensor, "Do Ds+Dt"]:
        return self._parameters.mixtures["text"]

    # logits

    @cached_property
    def logits(self) -> list[LogitValues]:
        """Both directions of each teacher."""
        class_logits = similarity_logits(self.image, self.text, self.logit_scale)  # [G, G]
        answers = similarity_logits(self.answering_image, self.text, self.logit_scale)
        targets = contrastive_targets(class_logits, self.caption_groups)  # [G] or [G, G]
        found = []
        for side in split_teachers(self.teacher_image, self.teacher_text, self.teacher_scales, self.teacher_widths):
            theirs = similarity_logits(*side)
            found += [
                LogitValues(class_logits, answers, theirs, targets),
                LogitValues(class_logits.T, answers.T, theirs.T, targets),
            ]
        return found

    # PCA

    def _image_of(
        self, features: Features, name: str, widths: Sequence[int] | None = None
    ) -> tuple[Tensor, list[Factors] | None]:
        return self._maybe_reduced(features, name, widths, self.options.pca_side == "image")

    def _text_of(self, features: Features, widths: Sequence[int] | None = None) -> Tensor:
        return self._maybe_reduced(features, self.length, widths, self.options.pca_side == "text")[0]

    def _maybe_reduced(
        self, features: Features, name: str, widths: Sequence[int] | None, is_reduced_side: bool
    ) -> tuple[Tensor, list[Factors] | None]:
        if self.length != "short" or not is_reduced_side or self.options.pca_scope == "off":
            return features[name], None
        if features.reduced is not None:  # by each process
            return features.reduced[name], None
        key = id(features), name
        if key not in self._reductions:
            self._reductions[key] = reduced(features[name], self.options.pca_rank, widths, gathered=True)
        return self._reductions[key]


@dataclass(frozen=True)
class LogitValues:
    """What logit losses read: the logits of one direction and of one teacher."""

    class_logits: Float[Tensor, "N C"]
    answering_logits: Float[Tensor, "N C"]
    teacher_logits: Float[Tensor, "N C"]
    targets: Int[Tensor, " N"] | Float[Tensor, "N C"] | None


@dataclass(frozen=True)
class FeatureValues:
    """What a feature loss reads: one feature of the student in the teacher's width, and the teacher's."""

    name: Literal["image", "long", "short"]
    student: Features
    mapped_features: Features
    teacher: Features
    teacher_info: TeacherInfo
    without_pairs: bool
    """True if the run trains the image tower alone. The class token then learns the teacher's features."""

    @property
    def mapped(self) -> Float[Tensor, "G Dt"]:
        own = self.student.answering if self.name == "image" and not self.without_pairs else self.name
        return self._in_teacher_width(self.name, own)

    @property
    def mapped_masked_image(self) -> Float[Tensor, "G Dt"]:
        return self._in_teacher_width("masked_image", "masked_image")

    @property
    def whole_teacher(self) -> Float[Tensor, "G Dt"]:
        return self.teacher[self.name] / math.sqrt(len(self.teacher_info.widths))

    def _in_teacher_width(self, name: str, own: str) -> Tensor:
        return self.student[own] if getattr(self.mapped_features, name) is None else self.mapped_features[name]


def teacher_scale(teacher_info: TeacherInfo, options: LossOptions) -> float | tuple[float, ...]:
    """Linear logit scale of the teacher's distributions, or of each teacher's."""
    if options.teacher_scale is not None:
        return options.teacher_scale
    return 1.0 if teacher_info.logit_scale is None else teacher_info.logit_scale


def reduced(
    features: Float[Tensor, "G D"], rank: int, widths: Sequence[int] | None, *, gathered: bool
) -> tuple[Float[Tensor, "G D"], list[Factors] | None]:
    """PCA of each teacher's part separately, and the factors if every part has them. `gathered`: the features are those
    of the global batch, the same on every process."""
    split = features.split(widths or features.shape[1], dim=1)
    parts = [pca_factors(part, rank, same_on_every_process=gathered) for part in split]
    factors = [found for _, found in parts if found is not None]
    return torch.cat([part for part, _ in parts], dim=1), factors if len(factors) == len(parts) else None
