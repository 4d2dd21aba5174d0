"""The trained model with what its losses learn, and beside it the frozen teachers.

Shapes: B pairs of this process, D embedding width, L tokens of the longest caption, C class prompts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from longclip_teacher import LongCLIP
from longclip_teacher.trace import Trace
from mobileclip_student import MobileCLIP
from mobileclip_student.vit_trace import trace_vit
from training.data.pictures import normalized
from training.data.samples import Batch
from training.data.store import TeacherFacts
from training.data.transforms import ViewSpec
from training.layer_losses import LayerLosses, student_shape, teacher_shape
from training.objective import Features
from training.settings.losses import LossOptions

__all__ = ["MAX_LOG_SCALE", "TOWERS", "Distiller", "Outputs", "Teachers", "Tower", "view_of"]

Tower = Literal["image", "text"]
TOWERS: tuple[Tower, ...] = ("image", "text")
MAX_LOG_SCALE = math.log(100)
"""CLIP's clamp of the logarithm of a logit scale: a larger one makes the softmax a hard maximum."""
_INITIAL_LOG_SCALE = math.log(1 / 0.07)
# losses that compare the student's rows with the teacher's, and therefore need them in one width
_ACROSS = {"icl", "gd", "vrd", "xrd", "fd", "l1", "cos", "kl"}
_SCALED = {"clip", "crd", "affinity", "gd", "kd", "deit_soft", "deit_hard"}  # by the model's logit scale


@dataclass
class Teachers:
    """The frozen teachers of a run: models that are run, or what is known of those whose features are stored."""

    long: list[LongCLIP] = field(default_factory=list)
    """Those of the pictures and the long captions, an ensemble if several; empty where their features are stored."""
    short: LongCLIP | None = None
    """The one that reads the short captions, where another than the first does."""
    stored: TeacherFacts | None = None
    """Those whose features are stored."""
    prompts: Float[Tensor, "C D"] | None = None
    """Features of class prompts, unit-norm, with which pictures without captions are compared."""

    @cached_property
    def facts(self) -> dict[str, TeacherFacts]:
        """What the losses of long and of short captions must know of their teachers: read once, for reading a scale
        waits for the GPU."""
        long = self.stored or _facts(self.long)
        return {"long": long, "short": long if self.short is None else _facts([self.short])}

    @property
    def models(self) -> list[LongCLIP]:
        """All that are run."""
        return [*self.long, *([] if self.short is None else [self.short])]

    def to(self, device: torch.device) -> None:
        """Move everything to `device`."""
        for model in self.models:
            model.to(device)
        if self.prompts is not None:
            self.prompts = self.prompts.to(device)


def _facts(models: list[LongCLIP]) -> TeacherFacts:
    scales = tuple(float(model.linear_logit_scale) for model in models)
    return TeacherFacts(
        widths=tuple(model.embed_dim for model in models),
        logit_scale=scales if len(scales) > 1 else scales[0],
        context_length=max(model.context_length for model in models),
    )


@dataclass
class Outputs:
    """What a forward pass gives the losses."""

    features: Features
    """Unit-norm rows of this process, with gradient (training/objective.py has their names)."""
    parameters: dict[str, Tensor]
    """The linear `logit_scale` and whatever else the losses learn, handed out so that DDP sees it used."""
    layers: dict[str, Tensor]
    """Losses between layers, which are computed here; the values are those of the joined batch of all processes."""


class Distiller(nn.Module):
    """The trained model with the parameters that belong to losses, and beside it the frozen teachers.

    This is the module under DDP. The teachers are kept out of the module tree: no state_dict, optimiser, DDP or
    `.train()` sees them. A run without distillation, or of a teacher, has `teachers` None.
    """

    teachers: Teachers | None

    def __init__(
        self,
        model: MobileCLIP | LongCLIP,
        teachers: Teachers | None,
        options: LossOptions,
        *,
        towers: tuple[Tower, ...] = TOWERS,
        frozen: tuple[Tower, ...] = (),
        streaming: bool = True,
    ) -> None:
        """`towers` are those that are run, `frozen` those of them that stay as they are, BatchNorm statistics included.

        `streaming` computes the image-text losses in blocks of rows (training/losses/streaming.py).
        """
        super().__init__()
        self.model = model
        self.options = options
        self.streaming = streaming
        self.towers, self._frozen = towers, frozen
        self.__dict__["teachers"] = teachers
        self.views = _views([model, *([] if teachers is None else teachers.models)])
        """What a batch must show of each picture: the model's view, then the teachers' that differ from it."""
        names = {name.rsplit("_", 1)[0] for name in options.active}  # without _long, _short, _image, _text
        self.project = nn.ModuleDict()
        self.mixture = nn.ParameterDict()
        self.log_scales = nn.ParameterDict()
        self.layers = nn.ModuleDict()
        if teachers is not None:
            self._add_loss_parameters(teachers, names | ({"fd"} if options.masked_fd > 0 else set()))
        model.logit_scale.requires_grad_(bool(names & _SCALED))  # DDP waits for every parameter that has a gradient
        for tower in TOWERS:
            if tower not in towers or tower in frozen:
                tower_of(model, tower).requires_grad_(False)

    def _add_loss_parameters(self, teachers: Teachers, names: set[str]) -> None:
        width, facts = self.model.embed_dim, teachers.facts
        if names & _ACROSS:
            for tower in self.towers:
                self._project_to(tower, width, facts["long"].embed_dim)
                if teachers.short is not None and self.options.uses_short:
                    self._project_to(f"short_{tower}", width, facts["short"].embed_dim)
        for name in sorted(names & {"icl", "afd", "vrd"}):
            self.log_scales[name] = nn.Parameter(torch.tensor(_INITIAL_LOG_SCALE))
        if "afd" in names:
            for tower in self.towers:
                teacher_width = facts["long"].embed_dim
                self.mixture[tower] = nn.Linear(width + teacher_width, teacher_width, bias=False).weight
        for tower in self.towers:
            if self.options.layer_losses[tower] and isinstance(self.model, MobileCLIP):
                shapes = student_shape(self.model, tower), teacher_shape(teachers.long[0], tower)
                self.layers[tower] = LayerLosses(self.options, tower, *shapes)

    def _project_to(self, name: str, width: int, teacher_width: int) -> None:
        if teacher_width != width:
            self.project[name] = nn.Linear(width, teacher_width)

    def forward(
        self,
        images: UInt8[Tensor, "B 3 H W"],
        long_tokens: Int[Tensor, "B L"],
        short_tokens: Int[Tensor, "B L2"],
        traces: dict[str, Trace] | None = None,
    ) -> Outputs:
        """Features of the trained model, with gradient. `traces` are the teacher's, by tower, for the layer losses."""
        raw: Features = {}
        layers: dict[str, Tensor] = {}
        for tower in self._frozen if self.training else ():
            tower_of(self.model, tower).eval()
        for tower in self.towers:
            with torch.set_grad_enabled(torch.is_grad_enabled() and tower not in self._frozen):
                if tower == "image":
                    found, trace = self._images(images, traced=tower in self.layers)
                else:
                    found, trace = self._captions(long_tokens, short_tokens, traced=tower in self.layers)
                raw |= found
            if trace is not None:
                assert traces is not None
                layers |= self.layers[tower](trace, traces[tower])
        features = {name: _unit(value) for name, value in raw.items()}
        return Outputs(features | self._projected(raw), self._loss_parameters(), layers)

    def _images(self, images: UInt8[Tensor, "B 3 H W"], traced: bool) -> tuple[Features, Trace | None]:
        model, options = self.model, self.options
        pictures = _normalized(model, images)
        raw: Features = {}
        trace = None
        if options.masked_fd > 0:
            norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
            with _statistics_kept(norms):
                raw["masked_image"] = model.encode_image(_masked(pictures, options))
            if not (options.active - {"masked_fd"}):  # no loss looks at the whole picture, only BatchNorms do
                if not norms:
                    return raw | {"image": raw["masked_image"]}, None
                with torch.no_grad():
                    return raw | {"image": model.encode_image(pictures)}, None
        if not isinstance(model, MobileCLIP):
            return raw | {"image": model.encode_image(pictures)}, None
        if traced:
            heads, trace = trace_vit(model.image_encoder.trunk, pictures, model.encode_image_heads)
        else:
            heads = model.encode_image_heads(pictures)
        named = zip(("image", "distilled_image"), heads, strict=True)
        return raw | {name: value for name, value in named if value is not None}, trace

    def _captions(
        self, long: Int[Tensor, "B L"], short: Int[Tensor, "B L2"], traced: bool
    ) -> tuple[Features, Trace | None]:
        captions = {"long": long, "short": short} if self.options.uses_short else {"long": long}
        model = self.model
        trace = None
        if not isinstance(model, MobileCLIP):
            texts = [model.encode_text(tokens) for tokens in captions.values()]
        elif traced:
            texts, traces = model.text_encoder.traced(*captions.values())
            trace = traces[0]
        else:  # together, for one set of BatchNorm statistics
            texts = model.encode_texts(*captions.values())
        return dict(zip(captions, texts, strict=True)), trace

    def _projected(self, raw: Features) -> Features:
        """Features mapped to the teacher's width, unit-norm; the images those that answer to the teacher."""
        answering = raw.get("distilled_image", raw.get("image"))
        sources = {"image": answering, "masked_image": raw.get("masked_image"), "long": raw.get("long")}
        layers = {"image": "image", "masked_image": "image", "long": "text", "short": "text"}
        if self.teachers is not None and self.teachers.short is not None:
            layers |= {"short": "short_text", "short_image": "short_image"}
            sources["short_image"] = answering
        sources["short"] = raw.get("short")
        return {
            f"projected_{name}": _unit(self.project[layers[name]](value))
            for name, value in sources.items()
            if value is not None and layers[name] in self.project
        }

    def _loss_parameters(self) -> dict[str, Tensor]:
        found = {"logit_scale": self.model.linear_logit_scale}
        found |= {f"{name}_scale": value.clamp(max=MAX_LOG_SCALE).exp() for name, value in self.log_scales.items()}
        return found | {f"afd_{tower}": weight.view_as(weight) for tower, weight in self.mixture.items()}

    @torch.no_grad()
    def teacher_outputs(self, batch: Batch) -> tuple[Features | None, dict[str, Trace]]:
        """Features of the frozen teachers, stored with the batch or computed now, and traces for the layer losses.

        None without a teacher. Unit-norm; of several teachers side by side, each part is.
        """
        teachers = self.teachers
        if teachers is None:
            return None, {}
        if batch.teacher is not None:
            widths = teachers.facts["long"].widths
            stored = {name: _unit_parts(value, widths) for name, value in batch.teacher.items()}
            return {name: stored[name] for name in ("image", *self._lengths)}, {}
        traces: dict[str, Trace] = {}
        rows: dict[str, list[Tensor]] = {}
        for number, teacher in enumerate(teachers.long):
            if "image" in self.towers:
                pictures = self._pictures_for(teacher, batch)
                if number == 0 and "image" in self.layers:
                    features, traces["image"] = teacher.trace_image(pictures)
                else:
                    features = teacher.encode_image(pictures)
                rows.setdefault("image", []).append(features)
            for length in self._lengths:
                tokens = batch.long_tokens if length == "long" else batch.short_tokens
                if length == "short" and teachers.short is not None:
                    continue
                if number == 0 and length == "long" and "text" in self.layers:
                    features, traces["text"] = teacher.trace_text(tokens)
                else:
                    features = teacher.encode_text(tokens)
                rows.setdefault(length, []).append(features)
        if teachers.short is not None and "short" in self._lengths:
            rows["short"] = [teachers.short.encode_text(batch.short_tokens)]
            rows["short_image"] = [teachers.short.encode_image(self._pictures_for(teachers.short, batch))]
        return {name: torch.cat([_unit(part) for part in parts], dim=1) for name, parts in rows.items()}, traces

    @property
    def teacher(self) -> LongCLIP | None:
        """The first teacher, where one is run with both towers."""
        if self.teachers is None or not self.teachers.long or self.towers != TOWERS:
            return None
        return self.teachers.long[0]

    @property
    def _lengths(self) -> tuple[str, ...]:
        """Captions that are read."""
        if "text" not in self.towers:
            return ()
        return ("long", "short") if self.options.uses_short else ("long",)

    def _pictures_for(self, teacher: LongCLIP, batch: Batch) -> Float[Tensor, "B 3 R R"]:
        """The pictures of `batch` as `teacher` wants them."""
        # the student's erased pictures stand before the views
        shown = (batch.images, *batch.teacher_images)[-len(self.views) :]
        return _normalized(teacher, shown[self.views.index(view_of(teacher))])


def view_of(model: MobileCLIP | LongCLIP) -> ViewSpec:
    """What a model wants to see of a picture."""
    return ViewSpec(model.image_size, model.preprocess_cfg.interpolation)


def _views(models: Iterable[MobileCLIP | LongCLIP]) -> list[ViewSpec]:
    """The distinct views of the models, in their order."""
    return list(dict.fromkeys(view_of(model) for model in models))


def tower_of(model: MobileCLIP | LongCLIP, tower: str) -> nn.Module:
    """The image or the text tower of a model."""
    if isinstance(model, MobileCLIP):
        return model.image_encoder if tower == "image" else model.text_encoder
    return model.visual if tower == "image" else model.text


def _unit(features: Tensor) -> Tensor:
    """Unit rows, in float32 at least."""
    return normalize(features if features.dtype == torch.float64 else features.float(), dim=-1)


def _unit_parts(features: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Unit rows of each teacher's part, which float16 has rounded."""
    return torch.cat([_unit(part) for part in features.split(widths, dim=-1)], dim=-1)


def _normalized(model: MobileCLIP | LongCLIP, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
    mean, std = (
        torch.tensor(value, dtype=model.logit_scale.dtype, device=images.device).view(3, 1, 1)
        for value in (model.preprocess_cfg.mean, model.preprocess_cfg.std)
    )
    return normalized(images, mean, std)


@contextmanager
def _statistics_kept(norms: Sequence[nn.modules.batchnorm._BatchNorm]) -> Iterator[None]:
    """Leave the running statistics of BatchNorms as they are: at inference no picture is masked."""
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _masked(pictures: Float[Tensor, "B 3 R R"], options: LossOptions) -> Float[Tensor, "B 3 R R"]:
    """Pictures with `mask_ratio` of their squares of `mask_patch` pixels set to zero, drawn anew for each."""
    side = math.ceil(pictures.shape[-1] / options.mask_patch)
    num_hidden = round(options.mask_ratio * side**2)
    order = torch.rand(len(pictures), side**2, device=pictures.device).argsort(dim=1)
    shown = (order.argsort(dim=1) >= num_hidden).view(-1, 1, side, side).to(pictures.dtype)
    mask = interpolate(shown, scale_factor=options.mask_patch, mode="nearest")
    return pictures * mask[..., : pictures.shape[-2], : pictures.shape[-1]]
