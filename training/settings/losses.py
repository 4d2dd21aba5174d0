"""The losses of a run: a weight for each, and their settings.

The weights are spelled out for editors, the type checker and `--help`. tests/training/settings/test_losses.py compares
them with the table of losses (training/losses/table.py).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from training.losses.table import LOSSES, Loss, Part, Stage
from training.settings.options import require

__all__ = ["LossOptions", "Term"]


@dataclasses.dataclass(frozen=True)
class Term:
    """One term of the objective: a loss, the caption length or tower that it applies to, and its weight."""

    loss: Loss
    part: Part
    weight: float

    @property
    def name(self) -> str:
        """Its name in LossOptions, in metrics.jsonl and in TensorBoard."""
        return self.loss.option(self.part)


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """Weights (0: off) and settings of the losses, in any combination. "Short" losses use short captions and image
    features after PCA; "image" and "text" losses compare one tower with the teacher's."""

    clip_long: float = 0.8
    """ITC of images and long captions."""
    clip_short: float = 0.4
    """ITC of images after PCA and short captions."""
    clip_sub: float = 0.0
    """ITC of images and single sentences of their long captions, a mean over captions.sub_captions of these
    (DreamLIP)."""
    crd_long: float = 1.5
    """KL between the teacher's and the student's image-text distributions, long captions (CLIP-KD, MobileCLIP)."""
    crd_short: float = 0.5
    """The same with short captions; both models' image features go through PCA on the same batch."""
    icl_long: float = 0.0
    """Interactive contrastive: student images against teacher texts and the reverse, with a learned scale (CLIP-KD)."""
    icl_short: float = 0.0
    """The same with short captions."""
    icl_sub: float = 0.0
    """The same with single sentences."""
    gd_long: float = 0.0
    """Squared distance of the contrastive loss's gradients between student and teacher features (CLIP-KD)."""
    gd_short: float = 0.0
    """The same with short captions."""
    afd_long: float = 0.0
    """Augmented features: ITC of learned mixtures of student and teacher features (CLIP-KD)."""
    afd_short: float = 0.0
    """The same with short captions."""
    vrd_long: float = 0.0
    """Vertical relations: the student's two directions follow each other's teacher-student relations (CLIP-RD)."""
    vrd_short: float = 0.0
    """The same with short captions."""
    vrd_sub: float = 0.0
    """The same with single sentences."""
    xrd_long: float = 0.0
    """Cross relations: symmetric KL between the teacher-student distributions of the two modalities (CLIP-RD)."""
    xrd_short: float = 0.0
    """The same with short captions."""
    kd_long: float = 0.0
    """Logit distillation: contrastive cross-entropy plus kd_lambda times 2 T^2 KL at temperature kd_temperature."""
    kd_short: float = 0.0
    """The same with short captions."""
    deit_soft_long: float = 0.0
    """(1 - deit_alpha) cross-entropy + deit_alpha T^2 KL at deit_temperature (DeiT)."""
    deit_soft_short: float = 0.0
    """The same with short captions."""
    deit_hard_long: float = 0.0
    """Mean of the cross-entropy with the true pair and with the teacher's best match (DeiT)."""
    deit_hard_short: float = 0.0
    """The same with short captions."""
    fd_image: float = 0.0
    """Squared distance to the teacher's image features, through a learned map if the widths differ (CLIP-KD)."""
    fd_text: float = 0.0
    """The same for text features, averaged over long and short captions."""
    l1_image: float = 0.0
    """L1 distance to the teacher's image features."""
    l1_text: float = 0.0
    """The same for text features."""
    cos_image: float = 0.0
    """1 - cosine with the teacher's image features."""
    cos_text: float = 0.0
    """The same for text features."""
    kl_image: float = 0.0
    """KL between the softmaxes over the channels of teacher and student image features, at kl_temperature."""
    kl_text: float = 0.0
    """The same for text features."""
    masked_fd: float = 0.0
    """fd_image with pictures that the student sees only in part (mask_ratio is hidden) and the teacher in full."""
    hidden_text: float = 0.0
    """Squared distance between the hidden states of matched layers, through a learned map if the widths differ
    (TinyBERT)."""
    hidden_image: float = 0.0
    """The same for the image towers. This loss and the image losses below need a ViT student."""
    attention_text: float = 0.0
    """Squared distance between the attention scores before the softmax, per head (TinyBERT)."""
    attention_image: float = 0.0
    """The same for the image towers."""
    attention_probs_text: float = 0.0
    """KL between the attention probabilities, per head (MiniLM)."""
    attention_probs_image: float = 0.0
    """The same for the image towers."""
    value_text: float = 0.0
    """Difference between the value-value relations (MiniLM), measured as value_kind says."""
    value_image: float = 0.0
    """The same for the image towers."""
    embedding_text: float = 0.0
    """Squared distance between the token embeddings (TinyBERT)."""
    embedding_image: float = 0.0
    """The same for the patch embeddings."""

    label_smoothing: float = 0.1
    """Label smoothing of the ITC losses."""
    teacher_scale: float | None = None
    """Linear logit scale for the teacher's distributions; None: the teacher's own."""
    pca_rank: int = 32
    """Components that PCA keeps."""
    pca_scope: Literal["global", "rank", "off"] = "global"
    """PCA over the global batch, over each process's share (as in Long-CLIP's published code), or none."""
    pca_side: Literal["image", "text"] = "image"
    """The side of the short losses that goes through PCA: the image, as in Long-CLIP, or the short text, as an
    ablation."""
    share_identical_captions: bool = False
    """Let samples with the same caption share the target of the ITC losses instead of being each other's negatives."""
    init_logit_scale: float | None = None
    """Linear logit scale at the start; None: the model's (1 / 0.07 from scratch)."""
    crd_temperature: float = 1.0
    """T of crd: it divides both models' logits, and T^2 multiplies the loss."""
    crd_direction: Literal["forward", "reverse", "symmetric"] = "forward"
    """forward: KL(teacher || student). reverse: KL(student || teacher). symmetric: their mean."""
    kd_temperature: float = 2.0
    """T of kd."""
    kd_lambda: float = 1.0
    """Weight of the KL in kd."""
    kd_direction: Literal["forward", "reverse"] = "forward"
    """Direction of the KL in kd."""
    deit_alpha: float = 0.5
    """Weight of the teacher in deit_soft."""
    deit_temperature: float = 3.0
    """T of deit_soft."""
    l1_scale: float = 1.0
    """Factor that multiplies l1."""
    cos_scale: float = 1.0
    """Factor that multiplies cos."""
    kl_scale: float = 1.0
    """Factor that multiplies kl."""
    kl_temperature: float = 1.0
    """T of kl."""
    mask_ratio: float = 0.5
    """masked_fd: share of the picture that is hidden from the student."""
    mask_patch: int = 16
    """masked_fd: side of the hidden squares in pixels."""
    layer_map: str = "uniform"
    """Layers that the layer losses compare: student layer i of M with teacher layer i L / M of L (uniform), the last
    layers of both (last), or pairs counted from 1, as in 1:3,2:6."""
    head_match: Literal["each", "mean"] = "each"
    """Compare attention head by head (both models need the same number) or as the mean over heads."""
    value_kind: Literal["kl", "mse"] = "kl"
    """value: KL between the relations after the softmax (MiniLM), or their squared difference before it."""
    embedding_positions: bool = True
    """embedding: compare with the positional embeddings added; False: the token embeddings alone."""

    def __post_init__(self) -> None:
        require(self.pca_rank >= 1, f"--loss.pca_rank must be at least 1, got {self.pca_rank}")
        weights = self.weights
        require(
            min(weights.values()) >= 0 and max(weights.values()) > 0,
            "loss weights must not be negative, and at least one must be positive",
        )
        for name in ("crd_temperature", "kd_temperature", "deit_temperature", "kl_temperature"):
            require(getattr(self, name) > 0, f"--loss.{name} must be positive, got {getattr(self, name)}")
        for name in ("deit_alpha", "mask_ratio"):
            require(0 <= getattr(self, name) <= 1, f"--loss.{name} is a share, 0 to 1, got {getattr(self, name)}")

    @property
    def weights(self) -> dict[str, float]:
        """The weight of every loss by name, including losses that are off."""
        return {loss.option(part): getattr(self, loss.option(part)) for loss in LOSSES for part in loss.parts}

    def terms(self, *, with_teacher: bool) -> tuple[Term, ...]:
        """The losses with positive weight, in the order of the table; without a teacher, only those that need none."""
        all_terms = (
            Term(loss, part, getattr(self, loss.option(part)))
            for loss in LOSSES
            if with_teacher or not loss.needs_teacher
            for part in loss.parts
        )
        return tuple(term for term in all_terms if term.weight > 0)

    def allowed_in(self, stage: Stage, *, with_prompts: bool) -> set[str]:
        """Names of the losses that a run of `stage` can use. `with_prompts`: the run has class prompts."""
        return {
            loss.option(part)
            for loss in LOSSES
            for part in loss.parts
            if loss.allowed_in(stage, part) and (with_prompts or stage == "both" or part == stage)
        }

    @property
    def distils(self) -> bool:
        """True if any loss needs a teacher."""
        return any(term.loss.needs_teacher for term in self.terms(with_teacher=True))
