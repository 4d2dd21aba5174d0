"""The trained model with what its losses learn: the module under DDP.

It returns features and traces of layers. The objective decides which losses read them, and with which weights.

Shapes: B pairs of this process, D embedding width, L tokens of the longest caption, K sub-captions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from torch.nn.functional import interpolate

from longclip_teacher import LongCLIP
from longclip_teacher.features import unit_features
from longclip_teacher.trace import Trace
from mobileclip_student import MobileCLIP
from mobileclip_student.vit_trace import trace_vit
from training.data.mixing import Mask
from training.features import Features, LossParameters, Outputs, normalized_for
from training.layer_losses import LayerMaps, LayerMatch
from training.settings.needs import TOWERS, Needs, Tower

__all__ = ["Distiller", "masked", "tower_of"]

_MAX_LOG_SCALE = math.log(100)  # CLIP's: a larger logit scale makes the softmax a hard maximum
_INITIAL_LOG_SCALE = math.log(1 / 0.07)


class Distiller(nn.Module):
    """The trained model and the parameters that its losses learn. A run without a teacher uses it too."""

    def __init__(
        self,
        model: MobileCLIP | LongCLIP,
        needs: Needs,
        *,
        teacher_width: int | None = None,
        short_teacher_width: int | None = None,
        layers: Mapping[Tower, LayerMatch] | None = None,
        mask: Mask | None = None,
        frozen: tuple[Tower, ...] = (),
    ) -> None:
        """Build what `needs` lists.

        `teacher_width` is the width of the teachers' rows, `short_teacher_width` that of another teacher for the short
        captions; both None without a teacher. `layers` match the layers that layer losses compare. `mask` hides parts
        of the pictures for masked_fd. The towers in `frozen` stay as they are, BatchNorm statistics included.
        """
        super().__init__()
        self.model = model
        self.needs, self.mask, self._frozen = needs, mask, frozen
        self._short_tower = "text" if short_teacher_width is None else "short_text"
        self.project = nn.ModuleDict()
        self.mixture = nn.ParameterDict()
        self.log_scales = nn.ParameterDict()
        self._add_maps(teacher_width, short_teacher_width)
        for name in needs.scales:
            self.log_scales[name] = nn.Parameter(torch.tensor(_INITIAL_LOG_SCALE))
        if needs.mixture and teacher_width is not None:
            for tower in needs.towers:
                self.mixture[tower] = nn.Linear(model.embed_dim + teacher_width, teacher_width, bias=False).weight
        self.layers = nn.ModuleDict({tower: LayerMaps(match) for tower, match in (layers or {}).items()})
        model.logit_scale.requires_grad_(needs.logit_scale)  # DDP waits for every parameter that has a gradient
        for tower in TOWERS:
            if tower not in needs.towers or tower in frozen:
                tower_of(model, tower).requires_grad_(False)

    def _add_maps(self, teacher_width: int | None, short_teacher_width: int | None) -> None:
        width = self.model.embed_dim
        for tower in self.needs.towers:
            for name, wanted in ((tower, teacher_width), (f"short_{tower}", short_teacher_width)):
                if name in self.needs.maps and wanted not in (None, width):
                    self.project[name] = nn.Linear(width, wanted)

    @property
    def linear_scales(self) -> dict[str, Float[Tensor, ""]]:
        """The logit scales by the names under which they are logged: the model's, and `logit_scale_LOSS` of each loss
        that learns its own."""
        own = {f"logit_scale_{name}": value.exp() for name, value in self.log_scales.items()}
        return {"logit_scale": self.model.linear_logit_scale, **own}

    @torch.no_grad()
    def clamp_scales(self, moves: Tensor) -> None:
        """Bring every logit scale into 1 .. 100, in place, unless `moves` is False. If it were clamped in the forward
        pass instead, a larger one would have no gradient and could not come back."""
        for value in (self.model.logit_scale, *self.log_scales.values()):
            value.copy_(value.clamp(0, _MAX_LOG_SCALE).where(moves, value))

    def forward(
        self,
        images: UInt8[Tensor, "B 3 H W"],
        long_tokens: Int[Tensor, "B L"],
        short_tokens: Int[Tensor, "B L2"],
        long_shift: Int[Tensor, " B"] | None = None,
        short_shift: Int[Tensor, " B"] | None = None,
        hidden: Bool[Tensor, "B P P"] | None = None,
        sub_tokens: Int[Tensor, "B K L3"] | None = None,
    ) -> Outputs:
        """Features and traces of the trained model, with gradient. Shifts move the positions of a student's tokens;
        `hidden` are the squares that `mask` asks for. `sub_tokens` are read if a loss of sub-captions is on."""
        raw: dict[str, Tensor] = {}
        traces: dict[Tower, Trace] = {}
        for tower in self._frozen if self.training else ():
            tower_of(self.model, tower).eval()
        for tower in self.needs.towers:
            with torch.set_grad_enabled(torch.is_grad_enabled() and tower not in self._frozen):
                if tower == "image":
                    found, trace = self._images(images, hidden)
                else:
                    captions = {"long": (long_tokens, long_shift), "short": (short_tokens, short_shift)}
                    read: dict[str, tuple[Tensor, Tensor | None]] = {
                        name: captions[name] for name in self.needs.lengths
                    }
                    if self.needs.reads_sub:
                        assert sub_tokens is not None, "the loader draws them"
                        read["sub"] = sub_tokens.flatten(0, 1), None
                    found, trace = self._captions(read)
                    if "sub" in found and sub_tokens is not None:
                        found["sub"] = found["sub"].unflatten(0, sub_tokens.shape[:2])
                raw |= found
            if trace is not None:
                traces[tower] = self.layers[tower](trace)
        features = Features.of({name: unit_features(value) for name, value in raw.items()})
        return Outputs(features, self._mapped(raw), self._loss_parameters(), traces)

    def _images(
        self, images: UInt8[Tensor, "B 3 H W"], hidden: Bool[Tensor, "B P P"] | None
    ) -> tuple[dict[str, Tensor], Trace | None]:
        model = self.model
        pictures = normalized_for(model, images)
        raw: dict[str, Tensor] = {}
        if self.mask is not None:
            assert hidden is not None, "training.data.mixing.mix draws it"
            norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
            with _statistics_kept(norms):
                raw["masked_image"] = model.encode_image(masked(pictures, hidden, self.mask.patch))
            if not (self.needs.features & {"image", "distilled_image"} or "image" in self.layers):
                if not norms:  # nothing looks at the complete picture
                    return raw, None
                with torch.no_grad():  # BatchNorm alone does
                    return raw | {"image": model.encode_image(pictures)}, None
        if not isinstance(model, MobileCLIP):
            return raw | {"image": model.encode_image(pictures)}, None
        trace = None
        if "image" in self.layers:
            heads, trace = trace_vit(model.image_encoder.trunk, pictures, model.encode_image_heads)
        else:
            heads = model.encode_image_heads(pictures)
        named = zip(("image", "distilled_image"), heads, strict=True)
        return raw | {name: value for name, value in named if value is not None}, trace

    def _captions(self, captions: Mapping[str, tuple[Tensor, Tensor | None]]) -> tuple[dict[str, Tensor], Trace | None]:
        """Features of tokens [B, L] with shifts [B], by name."""
        batches, shifts = zip(*captions.values(), strict=True)
        model = self.model
        trace = None
        if not isinstance(model, MobileCLIP):
            texts = [model.encode_text(tokens) for tokens in batches]
        elif "text" in self.layers:
            texts, traces = model.text_encoder.traced(*batches, shifts=shifts)
            trace = traces[0]
        else:  # together, for one set of BatchNorm statistics
            texts = model.encode_texts(*batches, shifts=shifts)
        return dict(zip(captions, texts, strict=True)), trace

    def _mapped(self, raw: Mapping[str, Tensor]) -> Features:
        """Unit-norm features in the teacher's width, if that differs from the student's."""
        # without pairs, the class token learns the teacher's features (Loss.student_features says the same)
        answering = raw.get("image") if self.needs.stage == "image" else raw.get("distilled_image", raw.get("image"))
        sources = {
            "image": ("image", answering),
            "masked_image": ("image", raw.get("masked_image")),
            "long": ("text", raw.get("long")),
            "short": (self._short_tower, raw.get("short")),
            "sub": ("text", raw.get("sub")),
            "short_image": ("short_image", answering),
        }
        return Features.of(
            {
                name: unit_features(self.project[layer](value))
                for name, (layer, value) in sources.items()
                if value is not None and layer in self.project
            }
        )

    def _loss_parameters(self) -> LossParameters:
        return LossParameters(
            self.model.linear_logit_scale,
            {name: value.exp() for name, value in self.log_scales.items()},
            {tower: self.mixture[tower].view_as(self.mixture[tower]) for tower in TOWERS if tower in self.mixture},
        )


def tower_of(model: MobileCLIP | LongCLIP, tower: Tower) -> nn.Module:
    """The image or the text tower of a model."""
    if isinstance(model, MobileCLIP):
        return model.image_encoder if tower == "image" else model.text_encoder
    return model.visual if tower == "image" else model.text


@contextmanager
def _statistics_kept(norms: Sequence[nn.modules.batchnorm._BatchNorm]) -> Iterator[None]:
    """Leave the running statistics of BatchNorms unchanged, because no picture is masked at inference."""
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def masked(pictures: Float[Tensor, "B 3 R R"], hidden: Bool[Tensor, "B P P"], patch: int) -> Float[Tensor, "B 3 R R"]:
    """Pictures with their `hidden` squares of `patch` pixels set to zero."""
    squares = interpolate((~hidden).unsqueeze(1).to(pictures.dtype), scale_factor=patch, mode="nearest")
    return pictures * squares[..., : pictures.shape[-2], : pictures.shape[-1]]
