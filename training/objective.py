"""The objective of a step. It turns features and traces of both models into named losses and their weighted sum.

The rows of training/losses/table.py say which function a loss calls, and with which values. training/loss_values.py
computes these values. G global batch, D width, C class prompts, K sub-captions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Literal, TypeAlias

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from longclip_teacher.transfer import sent
from training.data.store import TeacherInfo
from training.distributed import gather
from training.features import Features, LossParameters, Outputs, TeacherOutputs
from training.layer_losses import LayerMatch, layer_losses
from training.loss_values import FeatureValues, LogitValues, PairValues, reduced, teacher_scale
from training.losses.contrastive import similarity_logits
from training.losses.streaming import PairedLosses, full_matrix_losses, paired_losses
from training.losses.table import Loss
from training.settings.losses import LossOptions, Term
from training.settings.needs import Needs, Tower

__all__ = ["Objective", "caption_groups"]

_Models: TypeAlias = tuple[Features, Features, Features | None, LossParameters]
"""Gathered features: the student's, the same in the teacher's width, and the teacher's; and what the losses learn."""
_MAX_CONTEXT = 8192  # positions that have a hash weight: more than any model reads


@dataclass(frozen=True)
class Objective:
    """The losses of a run, with their weights, their settings and what they must know about the teachers."""

    options: LossOptions
    needs: Needs
    teacher_info: Mapping[str, TeacherInfo] = field(default_factory=dict)
    """The teachers of the long and of the short captions; empty without a teacher."""
    prompts: Float[Tensor, "C D"] | None = None
    """The teacher's features of class prompts, with which pictures without captions are compared."""
    layers: Mapping[Tower, LayerMatch] = field(default_factory=dict)
    """The layers that are compared, by tower."""
    streaming: bool = True
    """Compute contrastive and KL losses in tiles, which the processes share; False: full matrices in each process."""

    def __call__(
        self,
        outputs: Outputs,
        teacher: TeacherOutputs | None,
        long_tokens: Int[Tensor, "B L"],
        short_tokens: Int[Tensor, "B L2"],
        sub_tokens: Int[Tensor, "B K L3"] | None = None,
    ) -> dict[str, Float[Tensor, ""]]:
        """Return the unweighted losses of the global batch by name, and their weighted sum as `loss`.

        The arguments belong to this process. Features are gathered from all processes here. Only `loss` is sure to
        carry a gradient.
        """
        student, mapped = self._gathered(outputs.features), self._gathered(outputs.mapped)
        theirs = None if teacher is None else self._gathered_of_teacher(teacher.features)
        summands = _Summands()
        models = student, mapped, theirs, outputs.parameters
        for length in self.needs.lengths:
            self._add_pairs(
                summands, self._pair_values(length, long_tokens if length == "long" else short_tokens, models)
            )
        if self.needs.reads_sub:
            assert sub_tokens is not None, "the loader draws them"
            summands.add_mean([self._sub_losses(sub_tokens[:, k], k, models) for k in range(sub_tokens.shape[1])])
        if theirs is not None:
            if self.needs.compares_with_prompts:
                self._add_decisions(summands, student, outputs.parameters.logit_scale, theirs)
            self._add_features(summands, student, mapped, theirs)
        for tower, match in self.layers.items():
            assert teacher is not None
            found = layer_losses(match, self.options, outputs.traces[tower], teacher.traces[tower])
            for term in self.needs.terms:
                if term.name in found:
                    summands.add(term, found[term.name])
        return summands.result()

    def _pair_values(
        self, length: Literal["long", "short", "sub"], tokens: Int[Tensor, "B L"], models: _Models
    ) -> PairValues:
        student, mapped, teacher, parameters = models
        return PairValues(
            length,
            student,
            mapped,
            parameters,
            self.options,
            teacher=teacher,
            teacher_info=self.teacher_info.get("short" if length == "short" else "long"),
            groups=caption_groups(tokens, parameters.logit_scale.device)
            if self.options.share_identical_captions
            else None,
        )

    def _sub_losses(self, tokens: Int[Tensor, "B L"], k: int, models: _Models) -> _Summands:
        """Losses of sub-caption `k` of every picture. One of each picture at a time: those of the same picture never
        meet, so that none is another's negative (DreamLIP, Zheng et al. 2024, equation 4)."""
        student, mapped, teacher, parameters = models
        teacher = None if teacher is None else teacher.with_sub(k)
        summands = _Summands()
        models = student.with_sub(k), mapped.with_sub(k), teacher, parameters
        self._add_pairs(summands, self._pair_values("sub", tokens, models))
        return summands

    def _gathered(self, local: Features) -> Features:
        """Gather the student's features [B, D] of every process into those of the global batch [G, D].

        If PCA runs over each process's share, its results are gathered too.
        """
        sides = ("short",) if self.options.pca_side == "text" else ("image", "distilled_image", "short_image")
        return self._with_reduced(local, sides).map(gather)

    def _gathered_of_teacher(self, local: Features) -> Features:
        sides = ("short",) if self.options.pca_side == "text" else ("image",)
        if local.short_image is not None:  # a teacher of its own for short captions has no PCA
            return local.map(gather)
        return self._with_reduced(local, sides, self.teacher_info["long"].widths).map(gather)

    def _with_reduced(self, local: Features, sides: Sequence[str], widths: Sequence[int] | None = None) -> Features:
        if self.options.pca_scope != "rank" or not self.needs.reads_short:
            return local
        found = {name: value for name, value in local.tensors().items() if name in sides}
        rank = self.options.pca_rank
        parts = {name: reduced(value, rank, widths, gathered=False)[0] for name, value in found.items()}
        return replace(local, reduced=Features.of(parts))

    def _add_pairs(self, summands: _Summands, values: PairValues) -> None:
        """Losses that compare images with texts, for one caption length; those in tiles first."""
        terms = [
            term for term in self.needs.terms if term.loss.family in ("pair", "across") and term.part == values.length
        ]
        self._add_tiled(summands, values, {term.loss.name: term for term in terms if term.loss.tiled})
        for term in terms:
            if term.loss.reads("answering_logits"):  # the mean over both directions and over the teachers
                found = [self._call(term.loss, logits) for logits in values.logits]
                summands.add(term, torch.stack(found).mean())
            elif not term.loss.tiled:
                summands.add(term, self._call(term.loss, values))

    def _add_tiled(self, summands: _Summands, values: PairValues, terms: dict[str, Term]) -> None:
        """clip and crd: in tiles, and together where they compare the same features at the same scale."""
        if (crd := terms.get("crd")) is not None and self.options.crd_direction != "forward":
            summands.add(crd, self._call(crd.loss, values))
            terms = {name: term for name, term in terms.items() if name != "crd"}
        together = not values.has_token and self.options.crd_temperature == 1
        groups: list[list[str]] = [["clip", "crd"]] if together else [["clip"], ["crd"]]
        for names in groups:
            found = {name: terms[name] for name in names if name in terms}
            if found:
                self._add_tiles(summands, values, found)

    def _add_tiles(self, summands: _Summands, values: PairValues, terms: dict[str, Term]) -> None:
        """One pass over the tiles for clip, for crd, or for both."""
        image, factors = values.image_and_factors(answering="clip" not in terms)
        temperature = self.options.crd_temperature if "crd" in terms else 1.0
        teacher: tuple[Tensor, Tensor, float | tuple[float, ...]] | tuple[()] = ()
        widths = teacher_factors = None
        if "crd" in terms:
            teacher_image, teacher_factors = values.teacher_image_and_factors()
            teacher = teacher_image, values.teacher_text, _divided(values.teacher_scales, temperature)
            widths = values.teacher_widths
        compute: Callable[..., PairedLosses] = full_matrix_losses
        if self.streaming:
            compute = partial(
                paired_losses,
                student_factors=factors[0] if factors else None,
                teacher_factors=teacher_factors,
                share=(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1),
            )
        total, clip, crd = compute(
            image,
            values.text,
            values.logit_scale / temperature,
            *teacher,
            clip_weight=terms["clip"].weight if "clip" in terms else 0.0,
            crd_weight=terms["crd"].weight * temperature**2 if "crd" in terms else 0.0,
            label_smoothing=self.options.label_smoothing,
            caption_groups=values.caption_groups,
            teacher_widths=widths,
        )
        crd = None if crd is None else crd * temperature**2
        summands.add_weighted({f"clip_{values.length}": clip, f"crd_{values.length}": crd}, total)

    def _add_decisions(self, summands: _Summands, student: Features, scale: Tensor, teacher: Features) -> None:
        """Logit losses of pictures without captions: the classes are the prompts, in the teacher's space."""
        assert self.prompts is not None
        of_teacher = teacher_scale(self.teacher_info["long"], self.options)
        assert isinstance(of_teacher, float), "one teacher alone has prompts"
        logits = LogitValues(
            class_logits=similarity_logits(student["image"], self.prompts, scale),  # [G, C]
            answering_logits=similarity_logits(student[student.answering], self.prompts, scale),
            teacher_logits=similarity_logits(teacher["image"], self.prompts, of_teacher),
            targets=None,
        )
        for term in self.needs.terms:
            if term.loss.reads("answering_logits"):
                summands.add(term, self._call(term.loss, logits))

    def _add_features(self, summands: _Summands, student: Features, mapped: Features, teacher: Features) -> None:
        """Losses of one tower's features; those of texts are means over long and short captions."""
        sources: tuple[Literal["image", "long", "short"], ...] = ("image", *self.needs.lengths)
        values = {
            name: FeatureValues(
                name, student, mapped, teacher, self.teacher_info["short" if name == "short" else "long"],
                without_pairs=self.needs.stage == "image",
            )
            for name in sources
        }  # fmt: skip
        for term in self.needs.terms:
            if term.loss.family == "feature":
                names = sources[:1] if term.part == "image" else sources[1:]
                factor = getattr(self.options, term.loss.factor) if term.loss.factor else 1.0
                summands.add(term, factor * torch.stack([self._call(term.loss, values[name]) for name in names]).mean())

    def _call(self, loss: Loss, values: PairValues | LogitValues | FeatureValues) -> Tensor:
        """Call the function of a loss as its row says."""
        arguments = {keyword: getattr(values, name) for keyword, name in loss.arguments.items()}
        arguments |= {keyword: scales[loss.name] for keyword, scales in arguments.items() if isinstance(scales, dict)}
        settings = {keyword: getattr(self.options, option) for keyword, option in loss.settings.items()}
        return loss.resolve()(**arguments, **settings)


class _Summands:
    """Losses by name, and what they add to the sum. This is the one place where losses are weighted and summed."""

    def __init__(self) -> None:
        self._values: dict[str, Tensor] = {}
        self._weighted: list[Tensor] = []

    def add(self, term: Term, value: Tensor) -> None:
        """A loss and its weight."""
        self._values[term.name] = value
        self._weighted.append(term.weight * value)

    def add_weighted(self, values: Mapping[str, Tensor | None], total: Tensor) -> None:
        """Losses of which only the weighted sum `total` carries a gradient."""
        self._values |= {name: value for name, value in values.items() if value is not None}
        self._weighted.append(total)

    def add_mean(self, parts: Sequence[_Summands]) -> None:
        """The mean of several sums of the same losses."""
        for name in parts[0]._values:
            self._values[name] = torch.stack([part._values[name] for part in parts]).mean()
        self._weighted.append(torch.stack([part.result()["loss"] for part in parts]).mean())

    def result(self) -> dict[str, Tensor]:
        """Everything by name, and the sum as `loss`."""
        return {**self._values, "loss": torch.stack(self._weighted).sum()}


def caption_groups(tokens: Int[Tensor, "B L"], device: torch.device) -> Int[Tensor, " G"]:
    """Give each caption of the global batch a number, on `device`. Equal captions get equal numbers, whatever their
    padding. `tokens` are on the host."""
    weights = _hash_weights()[: tokens.shape[1]]
    return gather(sent((tokens * weights).sum(dim=1), device))  # int64 arithmetic wraps: a hash


@cache
def _hash_weights() -> Int[Tensor, " L"]:
    return torch.randint(1, 2**62, (_MAX_CONTEXT,), generator=torch.Generator().manual_seed(0))


def _divided(scale: float | tuple[float, ...], by: float) -> float | tuple[float, ...]:
    return tuple(value / by for value in scale) if isinstance(scale, tuple) else scale / by
