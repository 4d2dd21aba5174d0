"""Student and teacher features of a batch, and the losses between them.

Shapes: B pairs of this process, G pairs of all processes, D embedding width, L tokens of the longest caption.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn.functional import normalize

from longclip_teacher import LongCLIP
from mobileclip_student import MobileCLIP
from training.config import LossOptions
from training.distributed import gather
from training.losses import clip_loss, crd_loss, fd_loss
from training.pca import pca_project
from training.shards import Batch

__all__ = ["Distiller", "Features", "caption_groups", "compute_losses", "gather_features"]


@dataclass
class Features:
    """Unit-norm features of a batch [B or G, D] and what the losses derive from them."""

    image: Tensor
    long: Tensor
    short: Tensor | None
    """None where no loss uses short captions."""
    projected: dict[str, Tensor] | None = None
    """Student only: features mapped to the teacher's width, unit-norm, by name (image, long, short)."""
    main_image: Tensor | None = None
    """PCA'd image features of the short losses; not unit-norm. Set by gather_features."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        named = {"image": self.image, "long": self.long, "short": self.short}
        named |= {f"projected_{name}": value for name, value in (self.projected or {}).items()}
        return {name: value for name, value in named.items() if value is not None}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Features:
        """Inverse of `tensors()`."""
        projected = {k.removeprefix("projected_"): v for k, v in tensors.items() if k.startswith("projected_")}
        return cls(tensors["image"], tensors["long"], tensors.get("short"), projected or None)


class Distiller(nn.Module):
    """The trained model with the parameters that belong to losses, and beside it the frozen teacher.

    This is the module under DDP. The teacher is kept out of the module tree: no state_dict, optimiser, DDP or
    `.train()` sees it. A run without distillation, or of a teacher, has `teacher` None.
    """

    teacher: LongCLIP | None

    def __init__(self, model: MobileCLIP | LongCLIP, teacher: LongCLIP | None, options: LossOptions) -> None:
        super().__init__()
        self.model = model
        self.options = options
        self.__dict__["teacher"] = teacher
        self.project = nn.ModuleDict()
        if teacher is not None and options.fd > 0 and teacher.embed_dim != model.embed_dim:
            self.project["image"] = nn.Linear(model.embed_dim, teacher.embed_dim)
            self.project["text"] = nn.Linear(model.embed_dim, teacher.embed_dim)
        used = max(options.clip_long, options.clip_short, options.crd_long, options.crd_short) > 0
        model.logit_scale.requires_grad_(used)  # DDP waits for the gradient of every parameter that has one

    def forward(
        self, images: UInt8[Tensor, "B 3 H W"], long_tokens: Int[Tensor, "B L"], short_tokens: Int[Tensor, "B L2"]
    ) -> tuple[Features, Float[Tensor, ""]]:
        """Features of the trained model, with gradient, and its linear logit scale."""
        raw = _encode(self.model, images, long_tokens, short_tokens if self.options.uses_short else None)
        unit = {name: _unit(value) for name, value in raw.items()}
        projected = None
        if self.project:
            layers = {"image": "image", "long": "text", "short": "text"}
            projected = {name: _unit(self.project[layers[name]](x)) for name, x in raw.items()}
        return Features(unit["image"], unit["long"], unit.get("short"), projected), self.model.linear_logit_scale

    @torch.no_grad()
    def teacher_features(self, batch: Batch) -> Features | None:
        """Unit-norm features of the frozen teacher; None without one."""
        if self.teacher is None:
            return None
        images = batch.images if batch.teacher_images is None else batch.teacher_images
        short_tokens = batch.short_tokens if self.options.uses_short else None
        raw = _encode(self.teacher, images, batch.long_tokens, short_tokens)
        unit = {name: _unit(value) for name, value in raw.items()}
        return Features(unit["image"], unit["long"], unit.get("short"))

    @property
    def teacher_scale(self) -> float:
        """Linear logit scale of the teacher's distributions."""
        if self.options.teacher_scale is not None:
            return self.options.teacher_scale
        return 1.0 if self.teacher is None else float(self.teacher.linear_logit_scale)


def _unit(features: Tensor) -> Tensor:
    """Unit rows, in float32 at least."""
    return normalize(features if features.dtype == torch.float64 else features.float(), dim=-1)


def _encode(model: MobileCLIP | LongCLIP, images: Tensor, long: Tensor, short: Tensor | None) -> dict[str, Tensor]:
    mean, std = (
        torch.tensor(value, dtype=model.logit_scale.dtype, device=images.device).view(3, 1, 1)
        for value in (model.preprocess_cfg.mean, model.preprocess_cfg.std)
    )
    pixels = images.to(mean.dtype) / 255
    captions = {"long": long} if short is None else {"long": long, "short": short}
    if isinstance(model, MobileCLIP):  # together, for one set of BatchNorm statistics
        texts = model.encode_texts(*captions.values())
    else:
        texts = [model.encode_text(tokens) for tokens in captions.values()]
    return {"image": model.encode_image((pixels - mean) / std), **dict(zip(captions, texts, strict=True))}


def gather_features(local: Features, options: LossOptions) -> Features:
    """Features of the global batch [G, D] from those of each process [B, D], with the PCA'd image features added."""
    gathered = Features.from_tensors({name: gather(value) for name, value in local.tensors().items()})
    if gathered.short is not None:
        if options.pca_scope == "global":
            gathered.main_image = pca_project(gathered.image, options.pca_rank)
        elif options.pca_scope == "rank":
            gathered.main_image = gather(pca_project(local.image, options.pca_rank))
        else:
            gathered.main_image = gathered.image
    return gathered


def caption_groups(tokens: Int[Tensor, "B L"], width: int = 248) -> Int[Tensor, " G"]:
    """A number for each caption of the global batch, equal for equal captions whatever their padding."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(1, 2**62, (width,), generator=generator).to(tokens.device)
    return gather((tokens * weights[: tokens.shape[1]]).sum(dim=1))  # int64 arithmetic wraps: a hash


def compute_losses(
    student: Features,
    logit_scale: Tensor,
    teacher: Features | None,
    teacher_scale: float,
    options: LossOptions,
    groups: dict[str, Int[Tensor, " G"]] | None = None,
) -> dict[str, Tensor]:
    """Unweighted losses of a global batch by their name in LossOptions; those of weight 0 are not computed.

    `logit_scale` and `teacher_scale` are linear. `groups` are the caption_groups of the long and of the short
    captions, where equal ones share the target. Without a teacher the distillation losses are absent.
    """
    losses = {}
    smoothing = options.label_smoothing
    if options.clip_long:
        losses["clip_long"] = clip_loss(
            student.image,
            student.long,
            logit_scale,
            label_smoothing=smoothing,
            caption_groups=(groups or {}).get("long"),
        )
    if options.clip_short:
        assert student.main_image is not None and student.short is not None
        losses["clip_short"] = clip_loss(
            student.main_image,
            student.short,
            logit_scale,
            label_smoothing=smoothing,
            caption_groups=(groups or {}).get("short"),
        )
    if teacher is None:
        return losses
    if options.crd_long:
        losses["crd_long"] = crd_loss(
            student.image, student.long, teacher.image, teacher.long, logit_scale, teacher_scale
        )
    if options.crd_short:
        assert student.main_image is not None and student.short is not None
        assert teacher.main_image is not None and teacher.short is not None
        losses["crd_short"] = crd_loss(
            student.main_image, student.short, teacher.main_image, teacher.short, logit_scale, teacher_scale
        )
    if options.fd:
        ours = student.projected or student.tensors()
        theirs = teacher.tensors()
        texts = [name for name in ("long", "short") if name in theirs]
        per_text = [fd_loss(ours[name], theirs[name]) for name in texts]
        losses["fd"] = fd_loss(ours["image"], theirs["image"]) + torch.stack(per_text).mean()
    return losses
