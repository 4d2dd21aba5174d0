"""Losses between matched layers of a student's tower and the teacher's, with the maps that they learn.

Shapes: B samples, L tokens, C width, H heads of each tower.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from longclip_teacher import LongCLIP
from longclip_teacher.errors import InputError
from longclip_teacher.trace import Trace
from mobileclip_student import MobileCLIP
from training.losses.intermediate import (
    LossSum,
    attention_cells,
    relation_scores,
    score_kl,
    score_mse,
    token_mse,
)
from training.settings.losses import LAYER_LOSSES, LossOptions

__all__ = ["LayerLosses", "TowerShape", "layer_pairs", "student_shape", "sum_parts", "teacher_shape"]

Tower = Literal["image", "text"]
_SCORE_LOSSES = {"attention", "attention_probs", "value"}


@dataclass(frozen=True)
class TowerShape:
    """What of a tower decides how its layers are matched."""

    layers: int
    """Attention blocks; others, such as the RepMixer blocks of a hybrid text tower, are not counted."""
    width: int
    """Channels of a token."""
    heads: int
    """Attention heads of a block."""


class LayerLosses(nn.Module):
    """The active losses (`LossOptions.layer_losses`) between one tower of the student and the same of the teacher.

    Hidden states of all layers go through one learned linear map to the teacher's width, embeddings through another
    (TinyBERT, section 3.1); where the widths agree there is none. A loss is the mean over the pairs of layers, so that
    its weight means the same for any number of them.

    Raises InputError where the layer map does not fit the towers, or heads are to be compared one by one whose numbers
    differ.
    """

    def __init__(self, options: LossOptions, tower: Tower, student: TowerShape, teacher: TowerShape) -> None:
        super().__init__()
        self.options, self.tower = options, tower
        self.active = options.layer_losses[tower]
        self.pairs = layer_pairs(options.layer_map, student.layers, teacher.layers)
        if self.active & _SCORE_LOSSES and options.head_match == "each" and student.heads != teacher.heads:
            raise InputError(
                f"the student's {tower} tower has {student.heads} heads and the teacher's {teacher.heads}: compare "
                "their means with --loss.head_match mean, or give the student as many"
            )
        self.maps = nn.ModuleDict(
            {
                name: nn.Identity() if student.width == teacher.width else nn.Linear(student.width, teacher.width)
                for name in ("hidden", "embedding")
                if name in self.active
            }
        )

    def forward(self, student: Trace, teacher: Trace) -> dict[str, Float[Tensor, ""]]:
        """Unweighted losses by their name in LossOptions (hidden_text, ...), from the traces of this process' batch.

        Every process gets the value that one process would get from the joined batch, for the log as for the sum of
        losses. The gradient is that of this process' part, times the number of processes: their mean, which DDP
        takes, is the gradient of the joined batch. Pictures cut into different grids are an InputError.
        """
        parts = self.sums(student, teacher)
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return {name: part.total / part.terms.clamp(min=1) for name, part in parts.items()}
        joined = sum_parts([parts])
        losses = {}
        for name, part in parts.items():
            total, terms = (value.to(part.total) for value in joined[name])
            share = dist.get_world_size() * part.total / terms.clamp(min=1)
            losses[name] = share + (total / terms.clamp(min=1) - share).detach()
        return losses

    def sums(self, student: Trace, teacher: Trace) -> dict[str, LossSum]:
        """The losses before their means are taken, of this process' batch or of a chunk of it; see `sum_parts`."""
        student, teacher, valid = self._aligned(student, teacher)
        cells = attention_cells(valid, causal=student.causal or teacher.causal)
        parts: list[tuple[str, LossSum]] = []
        if "embedding" in self.active:
            ours, theirs = (
                trace.embedding if self.options.embedding_positions else trace.tokens for trace in (student, teacher)
            )
            parts.append(("embedding", token_mse(self.maps["embedding"](ours), theirs.detach(), valid)))
        for pair in self.pairs:
            layers = (student, pair[0] - 1), (teacher, pair[1] - 1)
            if "hidden" in self.active:
                ours, theirs = (trace.hidden[layer] for trace, layer in layers)
                parts.append(("hidden", token_mse(self.maps["hidden"](ours), theirs.detach(), valid)))
            if {"attention", "attention_probs"} & self.active:
                scores = [relation_scores(trace.query[layer], trace.key[layer]) for trace, layer in layers]
                parts += self._score_losses(scores, cells, {"attention": "mse", "attention_probs": "kl"})
            if "value" in self.active:
                scores = [relation_scores(trace.value[layer], trace.value[layer]) for trace, layer in layers]
                parts += self._score_losses(scores, cells, {"value": self.options.value_kind})
        return {
            f"{name}_{self.tower}": _add(part for other, part in parts if other == name)
            for name in LAYER_LOSSES
            if name in self.active
        }

    def _score_losses(
        self, scores: Sequence[Float[Tensor, "B H L L"]], cells: Bool[Tensor, "B L L"], kinds: dict[str, str]
    ) -> list[tuple[str, LossSum]]:
        student, teacher = scores[0], scores[1].detach()
        losses = {"mse": score_mse, "kl": score_kl}
        return [
            (name, losses[kind](student, teacher, cells, head_match=self.options.head_match))
            for name, kind in kinds.items()
            if name in self.active
        ]

    def _aligned(self, student: Trace, teacher: Trace) -> tuple[Trace, Trace, Bool[Tensor, "B L"]]:
        """Both traces cut to the tokens that they share, and which of these are real in both."""
        if self.tower == "image":
            if student.num_prefix_tokens != teacher.num_prefix_tokens:
                student, teacher = (_cut(trace, slice(trace.num_prefix_tokens, None)) for trace in (student, teacher))
            ours, theirs = (trace.valid.shape[1] - trace.num_prefix_tokens for trace in (student, teacher))
            if ours != theirs:
                raise InputError(
                    f"layer losses compare patch by patch, but the student cuts a picture into {ours} patches and the "
                    f"teacher into {theirs}: choose --student.image_size and --student.image_patch to match"
                )
            return student, teacher, student.valid & teacher.valid
        lengths, teacher_lengths = student.valid.sum(dim=1), teacher.valid.sum(dim=1)  # [B]
        shared = slice(min(student.valid.shape[1], teacher.valid.shape[1]))
        student, teacher = _cut(student, shared), _cut(teacher, shared)
        # a caption that one model has cut ends there in EOT, where the other has a word
        compared = torch.minimum(lengths, teacher_lengths) - (lengths != teacher_lengths).long()
        valid = torch.arange(student.valid.shape[1], device=lengths.device) < compared.unsqueeze(1)
        return student, teacher, valid


def sum_parts(parts: Sequence[dict[str, LossSum]]) -> dict[str, LossSum]:
    """Sums over the chunks of a batch and over all processes, by name; float64 and without gradient."""
    names = list(parts[0])
    sums = torch.stack(
        [torch.stack([torch.stack(part[name]).detach().double() for name in names]) for part in parts]
    ).sum(dim=0)  # [losses, 2]
    if dist.is_initialized():
        dist.all_reduce(sums)
    return {name: LossSum(*row) for name, row in zip(names, sums, strict=True)}


def layer_pairs(layer_map: str, student: int, teacher: int) -> list[tuple[int, int]]:
    """Layers of student and teacher that are compared, counted from 1, for towers of so many layers.

    uniform: student layer i with teacher layer i * teacher / student (TinyBERT), rounded up. last: the last of both
    (MiniLM). Or pairs such as 1:3,2:6. InputError for anything else, and for a layer that is not there.
    """
    if layer_map == "uniform":
        return [(layer, -(-layer * teacher // student)) for layer in range(1, student + 1)]
    if layer_map == "last":
        return [(student, teacher)]
    if not re.fullmatch(r"\d{1,4}:\d{1,4}(,\d{1,4}:\d{1,4})*", layer_map):
        raise InputError(f"--loss.layer_map is uniform, last or pairs such as 1:3,2:6, not {layer_map!r}")
    pairs = [(int(ours), int(theirs)) for ours, theirs in (pair.split(":") for pair in layer_map.split(","))]
    for ours, theirs in pairs:
        if not (1 <= ours <= student and 1 <= theirs <= teacher):
            raise InputError(
                f"--loss.layer_map has {ours}:{theirs}, but the student has layers 1 to {student} and the teacher "
                f"1 to {teacher}"
            )
    if len(set(pairs)) < len(pairs):
        raise InputError(f"--loss.layer_map {layer_map} names a pair of layers twice: name each once")
    return pairs


def student_shape(model: MobileCLIP, tower: Tower) -> TowerShape:
    """Shape of a student's tower. InputError for an image tower that is no ViT: it has no attention to compare."""
    if tower == "text":
        text = model.config.text
        return TowerShape(text.layers, text.width, text.heads)
    trunk = model.image_encoder.trunk
    if not isinstance(trunk, VisionTransformer):
        raise InputError(
            f"layer losses of the image tower need a ViT, which {model.config.variant} has not: choose "
            "--student.variant vit_s, vit_b or vit_tiny, or compare the text towers"
        )
    blocks: Any = trunk.blocks
    return TowerShape(len(blocks), trunk.embed_dim, blocks[0].attn.num_heads)


def teacher_shape(model: LongCLIP, tower: Tower) -> TowerShape:
    """Shape of a teacher's tower."""
    config = model.config.image if tower == "image" else model.config.text
    return TowerShape(config.layers, config.width, config.heads)


def _cut(trace: Trace, positions: slice) -> Trace:
    """The tokens at `positions`; none of them counts as a class token if the cut takes those away."""
    first = positions.start or 0
    return replace(
        trace,
        embedding=trace.embedding[:, positions],
        tokens=trace.tokens[:, positions],
        hidden=[x[:, positions] for x in trace.hidden],
        query=[x[:, :, positions] for x in trace.query],
        key=[x[:, :, positions] for x in trace.key],
        value=[x[:, :, positions] for x in trace.value],
        valid=trace.valid[:, positions],
        num_prefix_tokens=max(trace.num_prefix_tokens - first, 0),
    )


def _add(parts: Iterable[LossSum]) -> LossSum:
    totals, terms = zip(*parts, strict=True)
    return LossSum(torch.stack(totals).sum(), torch.stack(terms).sum())
