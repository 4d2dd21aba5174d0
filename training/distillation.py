"""The parts of a run put together: the trained model, its losses and its teachers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from longclip_teacher import LongCLIP
from mobileclip_student import MobileCLIP
from training.data.mixing import Mask
from training.distill import Distiller
from training.layer_losses import match_layers, student_shape, teacher_shape
from training.losses.table import Stage
from training.objective import Objective
from training.settings.losses import LossOptions
from training.settings.needs import Tower, needs_of
from training.teachers import Teachers, views_of
from training.unreached import check_heads, freeze_unreached

__all__ = ["Distillation", "assemble"]


@dataclass
class Distillation:
    """The trained model, the losses, and the frozen teachers if there are any."""

    distiller: Distiller
    objective: Objective
    teachers: Teachers | None

    @property
    def teacher(self) -> LongCLIP | None:
        """The first teacher, if the run loads one with both towers."""
        if self.teachers is None or not self.teachers.long or self.objective.needs.stage != "both":
            return None
        return self.teachers.long[0]


def assemble(
    model: MobileCLIP | LongCLIP,
    teachers: Teachers | None,
    options: LossOptions,
    *,
    stage: Stage = "both",
    frozen: tuple[Tower, ...] = (),
    prompts: Tensor | None = None,
    streaming: bool = True,
) -> Distillation:
    """Put together `model`, `teachers` (None: it learns from pairs alone) and the losses of `options`.

    `frozen` towers stay as they are. `prompts` are the teacher's features of class prompts. `streaming` computes
    image-text losses in tiles.

    Raises InputError if layers cannot be matched, or if no loss reaches a part of the model.
    """
    short = None if teachers is None else teachers.short
    needs = needs_of(options, stage=stage, with_teacher=teachers is not None, short_teacher=short is not None)
    teacher_info = {} if teachers is None else teachers.info
    layers = {}
    if teachers is not None and isinstance(model, MobileCLIP):
        for tower, losses in needs.layer_losses.items():
            if losses:
                shapes = student_shape(model, tower), teacher_shape(teachers.long[0], tower)
                layers[tower] = match_layers(losses, options, tower, *shapes)
    distiller = Distiller(
        model,
        needs,
        teacher_width=teacher_info["long"].embed_dim if teacher_info else None,
        short_teacher_width=None if short is None else short.embed_dim,
        layers=layers,
        mask=Mask(options.mask_ratio, options.mask_patch) if "masked_image" in needs.features else None,
        frozen=frozen,
    )
    check_heads(distiller)
    freeze_unreached(distiller, layers, embedding_positions=options.embedding_positions)
    if teachers is not None:
        teachers.views = views_of(model, teachers.models)
    return Distillation(distiller, Objective(options, needs, teacher_info, prompts, layers, streaming), teachers)
