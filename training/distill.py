"""Student and teacher features of a batch, and the losses between them.

Shapes: B pairs of this process, G pairs of all processes, D embedding width, L tokens of the longest caption.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn.functional import normalize

from longclip_teacher import LongCLIP
from mobileclip_student import MobileCLIP
from training.config import LossOptions
from training.distributed import gather
from training.losses import Factors, PairedLosses, fd_loss, full_matrix_losses, paired_losses
from training.pca import pca_factors
from training.pictures import normalized
from training.samples import Batch
from training.stored import TeacherFacts

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
    factors: list[Factors] | None = None
    """What `main_image` is the product of, for each teacher side by side; None where PCA was not global."""

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

    def __init__(
        self,
        model: MobileCLIP | LongCLIP,
        teacher: LongCLIP | None,
        options: LossOptions,
        facts: TeacherFacts | None = None,
        streaming: bool = True,
    ) -> None:
        """`facts` describe a teacher whose features come stored with the batches; by default those of `teacher`.

        `streaming` computes the image-text losses in blocks of rows (training/losses/streaming.py).
        """
        super().__init__()
        self.model = model
        self.options = options
        self.streaming = streaming
        self.__dict__["teacher"] = teacher
        if facts is None and teacher is not None:
            facts = TeacherFacts((teacher.embed_dim,), float(teacher.linear_logit_scale), teacher.context_length)
        self.facts = facts
        self.project = nn.ModuleDict()
        if facts is not None and options.fd > 0 and facts.embed_dim != model.embed_dim:
            self.project["image"] = nn.Linear(model.embed_dim, facts.embed_dim)
            self.project["text"] = nn.Linear(model.embed_dim, facts.embed_dim)
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
        """Features of the frozen teacher, stored with the batch or computed now; None without a teacher.

        Unit-norm; of several teachers side by side, each part is.
        """
        if batch.teacher is not None:
            assert self.facts is not None
            widths = self.facts.widths
            stored = {name: _unit_parts(value, widths) for name, value in batch.teacher.items()}
            return Features(stored["image"], stored["long"], stored["short"] if self.options.uses_short else None)
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
        return 1.0 if self.facts is None or self.facts.logit_scale is None else self.facts.logit_scale

    @property
    def teacher_widths(self) -> tuple[int, ...]:
        """Widths of the teachers whose features stand side by side; empty without a teacher."""
        return () if self.facts is None else self.facts.widths


def _unit(features: Tensor) -> Tensor:
    """Unit rows, in float32 at least."""
    return normalize(features if features.dtype == torch.float64 else features.float(), dim=-1)


def _unit_parts(features: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Unit rows of each teacher's part, which float16 has rounded."""
    return torch.cat([_unit(part) for part in features.split(widths, dim=-1)], dim=-1)


def _encode(model: MobileCLIP | LongCLIP, images: Tensor, long: Tensor, short: Tensor | None) -> dict[str, Tensor]:
    mean, std = (
        torch.tensor(value, dtype=model.logit_scale.dtype, device=images.device).view(3, 1, 1)
        for value in (model.preprocess_cfg.mean, model.preprocess_cfg.std)
    )
    captions = {"long": long} if short is None else {"long": long, "short": short}
    if isinstance(model, MobileCLIP):  # together, for one set of BatchNorm statistics
        texts = model.encode_texts(*captions.values())
    else:
        texts = [model.encode_text(tokens) for tokens in captions.values()]
    return {"image": model.encode_image(normalized(images, mean, std)), **dict(zip(captions, texts, strict=True))}


def gather_features(local: Features, options: LossOptions, widths: tuple[int, ...] | None = None) -> Features:
    """Features of the global batch [G, D] from those of each process [B, D], with the PCA'd image features added.

    `widths` are those of several teachers side by side, each of which has a PCA of its own.
    """
    gathered = Features.from_tensors({name: gather(value) for name, value in local.tensors().items()})
    if gathered.short is None:
        return gathered
    if options.pca_scope == "off":
        gathered.main_image = gathered.image
        return gathered
    source = gathered.image if options.pca_scope == "global" else local.image
    parts = [pca_factors(part, options.pca_rank) for part in source.split(widths or source.shape[1], dim=1)]
    projected = torch.cat([image for image, _ in parts], dim=1)
    if options.pca_scope == "rank":
        gathered.main_image = gather(projected)
        return gathered
    gathered.main_image = projected
    factors = [found for _, found in parts if found is not None]
    gathered.factors = factors if len(factors) == len(parts) else None
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
    *,
    teacher_widths: tuple[int, ...] | None = None,
    streaming: bool = True,
) -> dict[str, Tensor]:
    """Unweighted losses of a global batch by their name in LossOptions, those of weight 0 being left out, and their
    weighted sum as `loss`: the only one sure to carry a gradient.

    `logit_scale` and `teacher_scale` are linear. `groups` are the caption_groups of the long and of the short
    captions, where equal ones share the target. Without a teacher the distillation losses are absent. `streaming`
    computes in tiles, which the processes share; else each process holds full matrices.
    """
    losses: dict[str, Tensor] = {}
    totals = []
    for length in ("long", "short"):
        clip_weight = getattr(options, f"clip_{length}")
        crd_weight = 0.0 if teacher is None else getattr(options, f"crd_{length}")
        if clip_weight == crd_weight == 0:
            continue
        image, text, factors = _sides(student, length)
        teacher_image, teacher_text, teacher_factors = _sides(teacher, length) if teacher else (None, None, None)
        compute: Callable[..., PairedLosses] = full_matrix_losses
        if streaming:
            share = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
            ours = factors[0] if factors else None
            compute = partial(paired_losses, student_factors=ours, teacher_factors=teacher_factors, share=share)
        total, clip, crd = compute(
            image,
            text,
            logit_scale,
            teacher_image,
            teacher_text,
            teacher_scale,
            clip_weight=clip_weight,
            crd_weight=crd_weight,
            label_smoothing=options.label_smoothing,
            caption_groups=(groups or {}).get(length),
            teacher_widths=teacher_widths,
        )
        totals.append(total)
        losses |= {f"{name}_{length}": value for name, value in (("clip", clip), ("crd", crd)) if value is not None}
    if teacher is not None and options.fd:
        losses["fd"] = _feature_loss(student, teacher)
        totals.append(options.fd * losses["fd"])
    losses["loss"] = torch.stack(totals).sum()
    return losses


def _feature_loss(student: Features, teacher: Features) -> Tensor:
    """fd_loss of the images and the mean of that of the texts."""
    ours = student.projected or student.tensors()
    theirs = {name: normalize(value, dim=-1) for name, value in teacher.tensors().items()}  # of several: the whole row
    per_text = [fd_loss(ours[name], theirs[name]) for name in ("long", "short") if name in theirs]
    return fd_loss(ours["image"], theirs["image"]) + torch.stack(per_text).mean()


def _sides(features: Features, length: str) -> tuple[Tensor, Tensor, list[Factors] | None]:
    """Image and text features of the losses with long or with short captions, and the factors of the images."""
    if length == "long":
        return features.image, features.long, None
    assert features.main_image is not None and features.short is not None
    return features.main_image, features.short, features.factors
