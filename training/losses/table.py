"""The table of losses: one row per loss, as plain data.

Everything that depends on which losses there are follows from these rows: the weights that a run may set, the learned
parameters, the checks of a configuration, the weighted sum, the curves of a report and the table in docs/losses.md.

To add a loss, write its function in this folder, add its row here, and add its weights and settings to
training/settings/losses.py (a test compares the two).

This module imports nothing heavy, so that `--help` and the checks of a configuration answer at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

__all__ = ["LOSSES", "Family", "Loss", "Part", "Stage"]

Family = Literal["pair", "across", "feature", "layer"]
"""pair: compares images with texts within each model. across: compares the student's rows with the teacher's rows.
feature: compares each feature of the student with the teacher's of the same sample. layer: compares matched layers."""
Stage = Literal["both", "image", "text"]
Part = Literal["long", "short", "sub", "image", "text"]
"""Where one weight of a loss applies: long, short or sub-captions (pair, across) or a tower (feature, layer)."""

_PARTS: dict[Family, tuple[Part, ...]] = {
    "pair": ("long", "short"),
    "across": ("long", "short"),
    "feature": ("image", "text"),
    "layer": ("image", "text"),
}


@dataclass(frozen=True)
class Loss:
    """One loss: its function, and where each argument of that function comes from.

    `arguments` maps the function's parameters to values of the step, which training/objective.py (pair, across,
    feature) and training/layer_losses.py (layer) compute under these names:

        image, text                      the student's features that are trained on the pairs
        answering_image                  the student's image features that follow the teacher: those of the
                                         distillation token if the student has one, otherwise `image`
        mapped_image, mapped_text        the same, mapped to the teacher's width where the widths differ
        mapped, mapped_masked_image      one feature of the student in the teacher's width; the same of masked pictures
        teacher_image, teacher_text      the teacher's; several teachers lie side by side, each part of unit norm
        whole_teacher_image, ..._text    the same with rows of unit norm; `whole_teacher` is the one that `mapped` meets
        class_logits, answering_logits   logits of `image` and of `answering_image` against the texts
        teacher_logits, targets          the teacher's logits, and the true pairs (None if there are none)
        caption_groups                   equal numbers for equal captions, or None
        logit_scale, own_scale           linear scales: the model's, and one that the loss learns for itself
        relation_scale                   that of icl if it is on, otherwise the model's, without gradient
        teacher_scale, teacher_scales    the teacher's linear scale (a mean), and one for each teacher
        teacher_widths                   widths of the teachers' parts of a row
        image_mixture, text_mixture      learned matrices over student and teacher features side by side
        hidden, embedding, *_scores      what layers compute, with teacher_hidden, ...; `valid` tokens, `cells`
    """

    name: str
    function: str
    """Module of this folder and function."""
    title: str
    """What a report's curve is called."""
    family: Family
    arguments: Mapping[str, str]
    paper: str
    settings: Mapping[str, str] = field(default_factory=dict)
    """The function's keyword arguments that are options, by the option's name."""
    factor: str = ""
    """Option that multiplies the value, if there is one."""
    parts: tuple[Part, ...] = ()
    """The parts that have a weight; by default both of the family."""
    stages: tuple[Stage, ...] = ("both",)
    """Stages of a run (run.stage) in which the loss can be used; a tower's weights need that tower's stage."""
    tiled: bool = False
    """Computed in tiles of the similarity matrix, which the processes share (training/losses/streaming.py)."""

    def __post_init__(self) -> None:
        if not self.parts:
            object.__setattr__(self, "parts", _PARTS[self.family])

    def option(self, part: Part) -> str:
        """Name of the weight under --loss: NAME_PART, or NAME if the loss has only one part."""
        return self.name if len(self.parts) == 1 else f"{self.name}_{part}"

    def resolve(self) -> Callable[..., Any]:
        """Import and return the function."""
        module, name = self.function.split(".")
        return getattr(import_module(f"training.losses.{module}"), name)

    def allowed_in(self, stage: Stage, part: Part) -> bool:
        """True if the weight of `part` may be positive in a run of `stage`.

        Without pairs, logit losses compare pictures with class prompts; their weight is that of long captions.
        """
        if stage not in self.stages:
            return False
        return stage == "both" or part == stage or (self.reads("answering_logits") and part == "long")

    def reads(self, *values: str) -> bool:
        """True if the function reads any of these values."""
        return any(value in self.arguments.values() for value in values)

    @property
    def needs_teacher(self) -> bool:
        """False for the contrastive loss alone."""
        return any("teacher" in value for value in self.arguments.values())

    @property
    def uses_logit_scale(self) -> bool:
        """True if the model's logit scale gets a gradient from this loss."""
        return self.reads("logit_scale", "class_logits", "answering_logits")

    @property
    def uses_teacher_scale(self) -> bool:
        """True if the teacher's logit scale decides the value."""
        return self.reads("teacher_scale", "teacher_scales", "teacher_logits")

    @property
    def needs_same_width(self) -> bool:
        """True if both models' features must have the same width; if they do not, the student's are mapped."""
        return self.reads("mapped", "mapped_image", "mapped_text", "mapped_masked_image", "hidden", "embedding")

    @property
    def learns(self) -> tuple[str, ...]:
        """What the loss learns beside the model: scale, mixture, and map if the student's width may need mapping."""
        found = {"own_scale": "scale", "image_mixture": "mixture"}
        learned = [kind for value, kind in found.items() if self.reads(value)]
        return (*learned, "map") if self.needs_same_width else tuple(learned)

    def student_features(self, part: Part, stage: Stage) -> set[str]:
        """Features of the student that get a gradient: image, distilled_image, masked_image, text.

        `distilled_image` is `image` if the student has no distillation token. If a run trains the image tower alone,
        the class token follows the teacher's features and the distillation token its decisions among prompts."""
        if self.family == "layer":
            return set()
        if self.family == "feature":
            if self.reads("mapped_masked_image"):
                return {"masked_image"}
            return {"text"} if part == "text" else {"image" if stage == "image" else "distilled_image"}
        if stage == "image":
            return {"distilled_image"}
        found = {"text"}
        if self.reads("image", "class_logits"):
            found.add("image")
        if self.reads("answering_image", "mapped_image", "answering_logits"):
            found.add("distilled_image")
        return found


_ACROSS = {
    "student_image": "mapped_image",
    "student_text": "mapped_text",
    "teacher_image": "whole_teacher_image",
    "teacher_text": "whole_teacher_text",
}
_DECISIONS = {
    "class_logits": "class_logits",
    "distillation_logits": "answering_logits",
    "teacher_logits": "teacher_logits",
    "targets": "targets",
}
_FEATURE = {"student": "mapped", "teacher": "whole_teacher"}
_TOWERS: tuple[Stage, ...] = ("both", "image", "text")
_CAPTIONS: tuple[Part, ...] = ("long", "short", "sub")

LOSSES: tuple[Loss, ...] = (
    Loss(
        name="clip",
        function="contrastive.clip_loss",
        title="Contrastive",
        family="pair",
        arguments={
            "image_features": "image",
            "text_features": "text",
            "logit_scale": "logit_scale",
            "caption_groups": "caption_groups",
        },
        settings={"label_smoothing": "label_smoothing"},
        tiled=True,
        parts=_CAPTIONS,
        paper="CLIP (Radford et al. 2021)",
    ),
    Loss(
        name="crd",
        function="relational.crd_loss",
        title="KL to the teacher",
        family="pair",
        arguments={
            "student_image": "answering_image",
            "student_text": "text",
            "teacher_image": "teacher_image",
            "teacher_text": "teacher_text",
            "student_scale": "logit_scale",
            "teacher_scale": "teacher_scales",
            "teacher_widths": "teacher_widths",
        },
        settings={"temperature": "crd_temperature", "direction": "crd_direction"},
        tiled=True,
        paper="CLIP-KD (Yang et al. 2024), MobileCLIP (Vasu et al. 2024); TinyCLIP's affinity (Wu et al. 2023)",
    ),
    Loss(
        name="icl",
        function="relational.icl_loss",
        title="Interactive contrastive",
        family="across",
        arguments={**_ACROSS, "logit_scale": "own_scale", "caption_groups": "caption_groups"},
        settings={"label_smoothing": "label_smoothing"},
        parts=_CAPTIONS,
        paper="CLIP-KD (Yang et al. 2024)",
    ),
    Loss(
        name="gd",
        function="relational.gd_loss",
        title="Distance of the contrastive gradients",
        family="across",
        arguments={**_ACROSS, "student_scale": "logit_scale", "teacher_scale": "teacher_scale"},
        paper="CLIP-KD (Yang et al. 2024)",
    ),
    Loss(
        name="afd",
        function="relational.afd_loss",
        title="Contrastive, fused features",
        family="across",
        arguments={
            "student_image": "answering_image",
            "student_text": "text",
            "teacher_image": "whole_teacher_image",
            "teacher_text": "whole_teacher_text",
            "image_weight": "image_mixture",
            "text_weight": "text_mixture",
            "logit_scale": "own_scale",
            "caption_groups": "caption_groups",
        },
        settings={"label_smoothing": "label_smoothing"},
        paper="CLIP-KD (Yang et al. 2024)",
    ),
    Loss(
        name="vrd",
        function="relational.vrd_loss",
        title="Vertical relations",
        family="across",
        arguments={**_ACROSS, "logit_scale": "own_scale"},
        parts=_CAPTIONS,
        paper="CLIP-RD (Chung et al. 2026)",
    ),
    Loss(
        name="xrd",
        function="relational.xrd_loss",
        title="Cross relations",
        family="across",
        arguments={**_ACROSS, "logit_scale": "relation_scale"},
        paper="CLIP-RD (Chung et al. 2026)",
    ),
    Loss(
        name="kd",
        function="logits.kd_loss",
        title="Logit distillation",
        family="pair",
        arguments={
            "student_logits": "answering_logits",
            "teacher_logits": "teacher_logits",
            "targets": "targets",
        },
        settings={
            "temperature": "kd_temperature",
            "kd_lambda": "kd_lambda",
            "direction": "kd_direction",
            "label_smoothing": "label_smoothing",
        },
        stages=("both", "image"),
        paper="Hinton et al. 2015",
    ),
    Loss(
        name="deit_soft",
        function="logits.deit_soft_loss",
        title="DeiT, soft targets",
        family="pair",
        arguments=_DECISIONS,
        settings={
            "alpha": "deit_alpha",
            "temperature": "deit_temperature",
            "label_smoothing": "label_smoothing",
        },
        stages=("both", "image"),
        paper="DeiT (Touvron et al. 2021), equation 2",
    ),
    Loss(
        name="deit_hard",
        function="logits.deit_hard_loss",
        title="DeiT, hard targets",
        family="pair",
        arguments=_DECISIONS,
        settings={"label_smoothing": "label_smoothing"},
        stages=("both", "image"),
        paper="DeiT (Touvron et al. 2021), equation 3",
    ),
    Loss(
        name="fd",
        function="feature.fd_loss",
        title="Squared distance to the teacher's features",
        family="feature",
        arguments=_FEATURE,
        stages=_TOWERS,
        paper="CLIP-KD (Yang et al. 2024)",
    ),
    Loss(
        name="l1",
        function="feature.l1_loss",
        title="L1 distance to the teacher's features",
        family="feature",
        arguments=_FEATURE,
        factor="l1_scale",
        stages=_TOWERS,
        paper="",
    ),
    Loss(
        name="cos",
        function="feature.cos_loss",
        title="One minus cosine with the teacher's features",
        family="feature",
        arguments=_FEATURE,
        factor="cos_scale",
        stages=_TOWERS,
        paper="",
    ),
    Loss(
        name="kl",
        function="feature.kl_loss",
        title="KL between the channels of the teacher's features and the student's",
        family="feature",
        arguments=_FEATURE,
        settings={"temperature": "kl_temperature"},
        factor="kl_scale",
        stages=_TOWERS,
        paper="",
    ),
    Loss(
        name="masked_fd",
        function="feature.fd_loss",
        title="Squared distance to the teacher's features, masked pictures",
        family="feature",
        arguments={"student": "mapped_masked_image", "teacher": "whole_teacher"},
        parts=("image",),
        stages=("both", "image"),
        paper="CLIP-KD (Yang et al. 2024)",
    ),
    Loss(
        name="hidden",
        function="intermediate.token_mse",
        title="Squared distance of hidden states",
        family="layer",
        arguments={"student": "hidden", "teacher": "teacher_hidden", "valid": "valid"},
        stages=_TOWERS,
        paper="TinyBERT (Jiao et al. 2020), equation 8",
    ),
    Loss(
        name="attention",
        function="intermediate.score_mse",
        title="Squared distance of attention scores",
        family="layer",
        arguments={"student": "attention_scores", "teacher": "teacher_attention_scores", "cells": "cells"},
        settings={"head_match": "head_match"},
        stages=_TOWERS,
        paper="TinyBERT (Jiao et al. 2020), equation 7",
    ),
    Loss(
        name="attention_probs",
        function="intermediate.score_kl",
        title="KL between attention probabilities",
        family="layer",
        arguments={"student": "attention_scores", "teacher": "teacher_attention_scores", "cells": "cells"},
        settings={"head_match": "head_match"},
        stages=_TOWERS,
        paper="MiniLM (Wang et al. 2020), equation 1",
    ),
    Loss(
        name="value",
        function="intermediate.value_loss",
        title="Difference of value relations",
        family="layer",
        arguments={"student": "value_scores", "teacher": "teacher_value_scores", "cells": "cells"},
        settings={"kind": "value_kind", "head_match": "head_match"},
        stages=_TOWERS,
        paper="MiniLM (Wang et al. 2020), equation 3",
    ),
    Loss(
        name="embedding",
        function="intermediate.token_mse",
        title="Squared distance of embeddings",
        family="layer",
        arguments={"student": "embedding", "teacher": "teacher_embedding", "valid": "valid"},
        stages=_TOWERS,
        paper="TinyBERT (Jiao et al. 2020), equation 9",
    ),
)
"""Every loss, in the order in which the objective adds them up."""
