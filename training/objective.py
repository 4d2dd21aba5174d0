"""The objective of a step: gathered features of student and teacher to named losses and their weighted sum.

Features are dictionaries of rows [B, D] of a process or [G, D] of all, of unit norm, by name:

    image, long, short      pictures, long and short captions, as far as the run's stage has them
    distilled_image         student with a distillation token: what answers to the teacher; `image` answers to the pairs
    masked_image            student: pictures of which a part is hidden
    short_image             teacher: pictures, by the other teacher that reads the short captions
    projected_NAME          student: NAME mapped to the teacher's width, where the widths differ
    pca_NAME                NAME after PCA over the process' share; not of unit norm (loss.pca_scope rank)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeAlias

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from training.data.store import TeacherFacts
from training.distributed import gather
from training.losses import (
    Factors,
    afd_loss,
    affinity_loss,
    contrastive_targets,
    cos_loss,
    crd_loss,
    deit_hard_loss,
    deit_soft_loss,
    fd_loss,
    full_matrix_losses,
    gd_loss,
    icl_loss,
    kd_loss,
    kl_loss,
    l1_loss,
    paired_losses,
    similarity_logits,
    vrd_loss,
    xrd_loss,
)
from training.losses.relational import split_teachers
from training.pca import pca_factors
from training.settings.losses import PAIR_LOSSES, LossOptions

__all__ = ["Features", "caption_groups", "compute_losses", "gather_features"]

Features: TypeAlias = dict[str, Tensor]
_LOGIT_LOSSES = ("kd", "deit_soft", "deit_hard")


def gather_features(local: Features, options: LossOptions, widths: tuple[int, ...] | None = None) -> Features:
    """Features of the global batch [G, D] from those of each process [B, D].

    With PCA over each process' share, its results are added. `widths` are those of several teachers side by side, each
    of which has a PCA of its own.
    """
    features = dict(local)
    if options.pca_scope == "rank" and "short" in local:
        for name in _reduced_names(local, options):
            features[f"pca_{name}"] = _pca(local[name], options.pca_rank, widths)[0]
    return {name: gather(value) for name, value in features.items()}


def caption_groups(tokens: Int[Tensor, "B L"], width: int = 248) -> Int[Tensor, " G"]:
    """A number for each caption of the global batch, equal for equal captions whatever their padding."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(1, 2**62, (width,), generator=generator).to(tokens.device)
    return gather((tokens * weights[: tokens.shape[1]]).sum(dim=1))  # int64 arithmetic wraps: a hash


def compute_losses(
    student: Features,
    parameters: Mapping[str, Tensor],
    teacher: Features | None,
    facts: Mapping[str, TeacherFacts],
    options: LossOptions,
    groups: Mapping[str, Int[Tensor, " G"]] | None = None,
    *,
    prompts: Float[Tensor, "C D"] | None = None,
    streaming: bool = True,
) -> dict[str, Tensor]:
    """Unweighted losses of a global batch by their name in LossOptions, those of weight 0 being left out, and their
    weighted sum as `loss`: the only one sure to carry a gradient.

    `parameters` hold the linear `logit_scale` and what else is learned by the losses. `facts` describe the teachers of
    the long and of the short captions. `groups` are the caption_groups of the long and of the short captions, where
    equal ones share the target. Without a teacher the distillation losses are absent. With `prompts`, the teacher's
    features of class prompts, the logit losses of pictures without captions compare with those. `streaming` computes
    contrastive and KL losses in tiles, which the processes share; the other losses hold full matrices in each.
    """
    terms = _Terms()
    for length in ("long", "short"):
        weights = {name: getattr(options, f"{name}_{length}") for name in PAIR_LOSSES}
        wanted = {name for name, weight in weights.items() if weight > 0 and (teacher is not None or name == "clip")}
        if length not in student or not wanted:
            continue
        ours = _Side(student, length, options)
        theirs = None if teacher is None else _TeacherSide(teacher, length, options, facts[length])
        pair = _Pair(ours, theirs, parameters, options, None if groups is None else groups.get(length))
        _tiled_losses(terms, pair, {name: weights[name] for name in wanted & {"clip", "crd"}}, streaming)
        for name in sorted(wanted - {"clip", "crd"}, key=PAIR_LOSSES.index):
            terms.add(f"{name}_{length}", weights[name], pair.loss(name))
    if teacher is not None:
        if prompts is not None:
            _prompt_losses(terms, student, parameters["logit_scale"], teacher, facts["long"], prompts, options)
        _feature_losses(terms, student, teacher, facts, options)
    return terms.result()


class _Terms:
    """Losses by name and what they add to the sum."""

    def __init__(self) -> None:
        self._values: dict[str, Tensor] = {}
        self._weighted: list[Tensor] = []

    def add(self, name: str, weight: float, value: Tensor) -> None:
        self._values[name] = value
        self._weighted.append(weight * value)

    def add_joint(self, values: Mapping[str, Tensor | None], total: Tensor) -> None:
        """Losses whose weighted sum alone carries the gradient."""
        self._values |= {name: value for name, value in values.items() if value is not None}
        self._weighted.append(total)

    def result(self) -> dict[str, Tensor]:
        return {**self._values, "loss": torch.stack(self._weighted).sum()}


class _Side:
    """Image and text features of one model that the losses of one caption length compare."""

    def __init__(
        self, features: Features, length: str, options: LossOptions, widths: tuple[int, ...] | None = None
    ) -> None:
        self.features, self.length = features, length
        self._options, self._widths = options, widths
        self._reduced: dict[str, tuple[Tensor, list[Factors] | None]] = {}

    def image(self, name: str = "image") -> tuple[Tensor, list[Factors] | None]:
        """Image features, PCA'd for short captions, and what they are then the product of."""
        return self._maybe_reduced(name, self.length == "short" and self._options.pca_side == "image")

    def text(self, prefix: str = "") -> Tensor:
        """Text features; PCA'd where that is asked for."""
        name = prefix + self.length
        return self._maybe_reduced(name, self.length == "short" and self._options.pca_side == "text")[0]

    def _maybe_reduced(self, name: str, reduce: bool) -> tuple[Tensor, list[Factors] | None]:
        if not reduce or self._options.pca_scope == "off":
            return self.features[name], None
        if (found := self.features.get(f"pca_{name}")) is not None:
            return found, None
        if name not in self._reduced:
            self._reduced[name] = _pca(self.features[name], self._options.pca_rank, self._widths)
        return self._reduced[name]

    def answering_image(self) -> tuple[Tensor, list[Factors] | None]:
        """Student: image features that answer to the teacher."""
        return self.image("distilled_image" if "distilled_image" in self.features else "image")

    def projected(self) -> tuple[Tensor, Tensor]:
        """Student: image and text features in the teacher's width."""
        own_teacher = f"projected_{self.length}_image"
        image = own_teacher if own_teacher in self.features else "projected_image"
        if image in self.features:
            return self.image(image)[0], self.text("projected_")
        return self.answering_image()[0], self.text()


class _TeacherSide(_Side):
    """The teacher's; a teacher for short captions alone has image features of its own and no PCA."""

    def __init__(self, features: Features, length: str, options: LossOptions, facts: TeacherFacts) -> None:
        super().__init__(features, length, options, facts.widths)
        self.widths = facts.widths
        self.scale = teacher_scale(facts, options)
        self._has_own_image = length == "short" and "short_image" in features

    def image(self, name: str = "image") -> tuple[Tensor, list[Factors] | None]:
        return (self.features["short_image"], None) if self._has_own_image else super().image(name)

    def text(self, prefix: str = "") -> Tensor:
        return self.features["short"] if self._has_own_image else super().text(prefix)

    @property
    def mean_scale(self) -> float:
        """One linear logit scale where a loss takes the teachers' rows as one."""
        return sum(self.scale) / len(self.scale) if isinstance(self.scale, tuple) else self.scale

    def whole_rows(self) -> tuple[Tensor, Tensor]:
        """Image and text features as if of one teacher: unit rows where the parts are."""
        factor = 1 / math.sqrt(len(self.widths))
        return self.image()[0] * factor, self.text() * factor


def teacher_scale(facts: TeacherFacts, options: LossOptions) -> float | tuple[float, ...]:
    """Linear logit scale of the teacher's distributions, or of each teacher's."""
    if options.teacher_scale is not None:
        return options.teacher_scale
    return 1.0 if facts.logit_scale is None else facts.logit_scale


class _Pair:
    """The losses of one caption length that hold full matrices."""

    def __init__(
        self,
        ours: _Side,
        theirs: _TeacherSide | None,
        parameters: Mapping[str, Tensor],
        options: LossOptions,
        groups: Tensor | None,
    ) -> None:
        self.ours, self.theirs, self.parameters, self.options, self.groups = ours, theirs, parameters, options, groups
        self.scale = parameters["logit_scale"]

    def loss(self, name: str) -> Tensor:
        """The unweighted loss of that name, of those that need a teacher."""
        assert self.theirs is not None
        options, theirs, parameters = self.options, self.theirs, self.parameters
        sides = (self.ours.answering_image()[0], self.ours.text())
        if name in ("crd", "affinity"):
            compute = partial(crd_loss, direction=options.crd_direction) if name == "crd" else affinity_loss
            return compute(
                *sides,
                theirs.image()[0],
                theirs.text(),
                self.scale,
                theirs.scale,
                teacher_widths=theirs.widths,
                temperature=options.crd_temperature,
            )
        if name in _LOGIT_LOSSES:
            return self._logit_loss(name)
        if name == "afd":
            compute_afd = partial(afd_loss, label_smoothing=options.label_smoothing, caption_groups=self.groups)
            weights = parameters["afd_image"], parameters["afd_text"]
            return compute_afd(*sides, *theirs.whole_rows(), *weights, parameters["afd_scale"])
        across = (*self.ours.projected(), *theirs.whole_rows())
        if name == "icl":
            compute_icl = partial(icl_loss, label_smoothing=options.label_smoothing, caption_groups=self.groups)
            return compute_icl(*across, parameters["icl_scale"])
        if name == "gd":
            return gd_loss(*across, self.scale, theirs.mean_scale)
        if name == "vrd":
            return vrd_loss(*across, parameters["vrd_scale"])
        # flat distributions agree perfectly: the scale, which would be driven there, is learned from other losses alone
        return xrd_loss(*across, parameters.get("icl_scale", self.scale).detach())

    def _logit_loss(self, name: str) -> Tensor:
        """Mean over the directions and the teachers."""
        assert self.theirs is not None
        text = self.ours.text()
        class_logits = similarity_logits(self.ours.image()[0], text, self.scale)  # [G, G]
        answers = similarity_logits(self.ours.answering_image()[0], text, self.scale)
        targets = contrastive_targets(class_logits, self.groups)  # [G] or [G, G]
        teachers = split_teachers(self.theirs.image()[0], self.theirs.text(), self.theirs.scale, self.theirs.widths)
        losses = []
        for image, texts, scale in teachers:
            logits = similarity_logits(image, texts, scale)
            for turn in (False, True):
                ours, answer, theirs = (x.T if turn else x for x in (class_logits, answers, logits))
                losses.append(_logit_loss(name, ours, answer, theirs, targets, self.options))
        return torch.stack(losses).mean()


def _tiled_losses(terms: _Terms, pair: _Pair, weights: Mapping[str, float], streaming: bool) -> None:
    """clip and crd: in tiles where `streaming`, together where they compare the same features at the same scale."""
    if not weights:
        return
    options, ours, theirs = pair.options, pair.ours, pair.theirs
    length = ours.length
    temperature = options.crd_temperature
    answers_itself = "distilled_image" not in ours.features
    for names in (("clip", "crd"),) if answers_itself and temperature == 1 else (("clip",), ("crd",)):
        found = {name: weights[name] for name in names if name in weights}
        if found.keys() >= {"crd"} and options.crd_direction != "forward":
            terms.add(f"crd_{length}", found.pop("crd"), pair.loss("crd"))
        if not found:
            continue
        image, factors = ours.image() if "clip" in found else ours.answering_image()
        cooled = temperature if "crd" in found and theirs is not None else 1.0
        teacher_image = teacher_text = teacher_factors = widths = None
        scale_of_teacher: float | tuple[float, ...] = 1.0
        if theirs is not None and "crd" in found:
            teacher_image, teacher_factors = theirs.image()
            teacher_text, widths, scale_of_teacher = theirs.text(), theirs.widths, _divided(theirs.scale, cooled)
        compute = full_matrix_losses
        if streaming:
            share = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
            compute = partial(
                paired_losses,
                student_factors=factors[0] if factors else None,
                teacher_factors=teacher_factors,
                share=share,
            )
        total, clip, crd = compute(
            image,
            ours.text(),
            pair.scale / cooled,
            teacher_image,
            teacher_text,
            scale_of_teacher,
            clip_weight=found.get("clip", 0.0),
            crd_weight=found.get("crd", 0.0) * cooled**2,
            label_smoothing=options.label_smoothing,
            caption_groups=pair.groups,
            teacher_widths=widths,
        )
        crd = None if crd is None else crd * cooled**2
        terms.add_joint({f"clip_{length}": clip, f"crd_{length}": crd}, total)


def _prompt_losses(
    terms: _Terms,
    student: Features,
    scale: Tensor,
    teacher: Features,
    facts: TeacherFacts,
    prompts: Float[Tensor, "C D"],
    options: LossOptions,
) -> None:
    """The logit losses of pictures without captions: classes are the prompts, in the teacher's space on both sides."""
    class_logits = similarity_logits(student["image"], prompts, scale)  # [G, C]
    answers = similarity_logits(student.get("distilled_image", student["image"]), prompts, scale)
    of_teacher = teacher_scale(facts, options)
    assert isinstance(of_teacher, float), "one teacher alone has prompts"
    logits = similarity_logits(teacher["image"], prompts, of_teacher)
    for name in _LOGIT_LOSSES:
        if (weight := getattr(options, f"{name}_long")) > 0:
            terms.add(f"{name}_long", weight, _logit_loss(name, class_logits, answers, logits, None, options))


def _logit_loss(
    name: str,
    class_logits: Float[Tensor, "N C"],
    answers: Float[Tensor, "N C"],
    teacher_logits: Float[Tensor, "N C"],
    targets: Tensor | None,
    options: LossOptions,
) -> Tensor:
    if name == "kd":
        return kd_loss(
            answers,
            teacher_logits,
            targets,
            temperature=options.kd_temperature,
            kd_lambda=options.kd_lambda,
            direction=options.kd_direction,
            label_smoothing=options.label_smoothing,
        )
    sides = class_logits, answers, teacher_logits, targets
    if name == "deit_soft":
        return deit_soft_loss(
            *sides,
            alpha=options.deit_alpha,
            temperature=options.deit_temperature,
            label_smoothing=options.label_smoothing,
        )
    return deit_hard_loss(*sides, label_smoothing=options.label_smoothing)


def _feature_losses(
    terms: _Terms, student: Features, teacher: Features, facts: Mapping[str, TeacherFacts], options: LossOptions
) -> None:
    """Those of the images, and the mean over long and short captions of those of the texts."""
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "fd": fd_loss,
        "l1": l1_loss,
        "cos": cos_loss,
        "kl": partial(kl_loss, temperature=options.kl_temperature),
    }
    towers: dict[str, list[str]] = {"image": ["image"], "text": [name for name in ("long", "short") if name in student]}
    for name, loss in losses.items():
        for tower, sources in towers.items():
            weight = getattr(options, f"{name}_{tower}")
            if weight > 0:
                values = [loss(*_matched(student, teacher, source, facts)) for source in sources]
                terms.add(f"{name}_{tower}", weight, getattr(options, f"{name}_scale") * torch.stack(values).mean())
    if options.masked_fd > 0 and "masked_image" in student:
        value = fd_loss(*_matched(student, teacher, "masked_image", facts))
        terms.add("masked_fd", options.masked_fd, options.fd_scale * value)


def _matched(
    student: Features, teacher: Features, name: str, facts: Mapping[str, TeacherFacts]
) -> tuple[Tensor, Tensor]:
    """The student's features of that name in the teacher's width, and the teacher's as whole unit rows."""
    ours = student.get(f"projected_{name}")
    if ours is None:
        ours = student.get("distilled_image", student["image"]) if name == "image" else student[name]
    theirs = teacher["image" if name == "masked_image" else name]
    return ours, theirs / math.sqrt(len(facts["short" if name == "short" else "long"].widths))


def _reduced_names(features: Features, options: LossOptions) -> list[str]:
    """What the losses of short captions may ask to be PCA'd."""
    if options.pca_side == "text":
        return [name for name in ("short", "projected_short") if name in features]
    names = ("image", "distilled_image", "projected_image", "projected_short_image")
    return [name for name in names if name in features]


def _pca(
    features: Float[Tensor, "G D"], rank: int, widths: tuple[int, ...] | None
) -> tuple[Float[Tensor, "G D"], list[Factors] | None]:
    """PCA of each teacher's part by itself, and the factors where every part has them."""
    parts = [pca_factors(part, rank) for part in features.split(widths or features.shape[1], dim=1)]
    factors = [found for _, found in parts if found is not None]
    return torch.cat([part for part, _ in parts], dim=1), factors if len(factors) == len(parts) else None


def _divided(scale: float | tuple[float, ...], by: float) -> float | tuple[float, ...]:
    return tuple(value / by for value in scale) if isinstance(scale, tuple) else scale / by
