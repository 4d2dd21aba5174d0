"""The frozen teachers of a run: models that are run, or what is known about teachers whose features are stored.

They are kept out of every module tree: no state_dict, optimiser, DDP or `.train()` sees them.

Shapes: B samples of this process, D width of the teachers' features side by side.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from longclip_teacher import LongCLIP
from longclip_teacher.ancestry import Ancestry, merged
from longclip_teacher.features import unit_features
from longclip_teacher.trace import Trace
from mobileclip_student import MobileCLIP
from training.data.samples import Batch
from training.data.store import TeacherInfo
from training.data.transforms import ViewSpec
from training.features import Features, TeacherOutputs, normalized_for, view_of
from training.settings.needs import Needs, Tower

__all__ = ["Teachers", "views_of"]


@dataclass
class Teachers:
    """The frozen teachers of a run."""

    long: list[LongCLIP] = field(default_factory=list)
    """The teachers of pictures and long captions, an ensemble if there are several; empty if features are stored."""
    short: LongCLIP | None = None
    """The teacher that reads the short captions, if that is not the first."""
    stored: TeacherInfo | None = None
    """What is known about teachers whose features are stored."""
    short_is_full: bool = False
    """True if short captions learn the feature of the full long caption, whatever they say themselves."""
    views: tuple[ViewSpec, ...] = ()
    """What a batch shows of each picture, the trained model's view first; see `views_of`."""

    @cached_property
    def info(self) -> dict[str, TeacherInfo]:
        """What the losses of long and of short captions must know about their teachers. It is read once, because
        reading a scale waits for the GPU."""
        long = self.stored or _teacher_info(self.long)
        return {"long": long, "short": long if self.short is None else _teacher_info([self.short])}

    @property
    def models(self) -> list[LongCLIP]:
        """All models that are run."""
        return [*self.long, *([] if self.short is None else [self.short])]

    @property
    def ancestry(self) -> Ancestry:
        """The ancestors of all teachers, run or stored."""
        stored = () if self.stored is None else self.stored.ancestry
        return merged(stored, *(model.ancestry for model in self.models))

    def to(self, device: torch.device) -> None:
        """Move the models to `device`."""
        for model in self.models:
            model.to(device)

    @torch.no_grad()
    def outputs(self, batch: Batch, needs: Needs) -> TeacherOutputs:
        """Return the features that `needs` asks for, and traces for layer losses.

        Features are stored with the batch or computed now. Rows have unit norm; with several teachers side by side,
        each part has.
        """
        lengths = ("long",) if self.short_is_full else needs.lengths
        if batch.teacher is not None:
            widths = self.info["long"].widths
            names = ("image", *lengths, *(["sub"] if needs.distils_sub else []))
            stored = Features.of({name: _unit_parts(batch.teacher[name], widths) for name in names})
            return TeacherOutputs(self._with_short(stored))
        traces: dict[Tower, Trace] = {}
        rows: dict[str, list[Tensor]] = {}
        for number, teacher in enumerate(self.long):
            if "image" in needs.towers:
                pictures = self._pictures_for(teacher, batch)
                if number == 0 and needs.layer_losses["image"]:
                    features, traces["image"] = teacher.trace_image(pictures)
                else:
                    features = teacher.encode_image(pictures)
                rows.setdefault("image", []).append(features)
            for length in lengths:
                if length == "short" and self.short is not None:
                    continue
                tokens = batch.long_tokens if length == "long" else batch.short_tokens
                if number == 0 and length == "long" and needs.layer_losses["text"]:
                    features, traces["text"] = teacher.trace_text(tokens)
                else:
                    features = teacher.encode_text(tokens)
                rows.setdefault(length, []).append(features)
        if self.short is not None and needs.reads_short:
            rows["short"] = [self.short.encode_text(batch.short_tokens)]
            rows["short_image"] = [self.short.encode_image(self._pictures_for(self.short, batch))]
        if needs.distils_sub:
            assert batch.sub_tokens is not None, "the loader draws them"
            flat, counts = batch.sub_tokens.flatten(0, 1), batch.sub_tokens.shape[:2]
            rows["sub"] = [teacher.encode_text(flat).unflatten(0, counts) for teacher in self.long]
        joined = {name: torch.cat([unit_features(part) for part in parts], dim=-1) for name, parts in rows.items()}
        return TeacherOutputs(self._with_short(Features.of(joined)), traces)

    def _with_short(self, features: Features) -> Features:
        return replace(features, short=features.long) if self.short_is_full else features

    def _pictures_for(self, teacher: LongCLIP, batch: Batch) -> Float[Tensor, "B 3 R R"]:
        """The complete pictures of `batch` as `teacher` wants them."""
        shown = (batch.images, *batch.teacher_images)
        return normalized_for(teacher, shown[self.views.index(view_of(teacher))])


def views_of(model: MobileCLIP | LongCLIP, teachers: Iterable[LongCLIP]) -> tuple[ViewSpec, ...]:
    """The distinct views of the trained model and of the teachers that are run, in this order."""
    return tuple(dict.fromkeys(view_of(found) for found in (model, *teachers)))


def _teacher_info(models: list[LongCLIP]) -> TeacherInfo:
    scales = tuple(float(model.linear_logit_scale) for model in models)
    return TeacherInfo(
        widths=tuple(model.embed_dim for model in models),
        logit_scale=scales if len(scales) > 1 else scales[0],
        context_length=max(model.context_length for model in models),
    )


def _unit_parts(features: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Restore the unit norm of each teacher's part, which float16 has rounded."""
    return torch.cat([unit_features(part) for part in features.split(widths, dim=-1)], dim=-1)
