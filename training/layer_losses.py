"""Losses between matched layers of a student's tower and the teacher's, with the maps that they learn.

Shapes: B samples, L tokens, C width, H heads of each tower.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from longclip_teacher import LongCLIP
from longclip_teacher.errors import InputError
from longclip_teacher.trace import Trace
from mobileclip_student import MobileCLIP
from training.losses.intermediate import LossSum, attention_cells, relation_scores
from training.losses.table import Loss
from training.settings.losses import LossOptions
from training.settings.needs import Tower

__all__ = [
    "LayerMaps",
    "LayerMatch",
    "TowerShape",
    "layer_losses",
    "layer_pairs",
    "layer_sums",
    "match_layers",
    "student_shape",
    "sum_parts",
    "teacher_shape",
    "traced_tensors",
]


@dataclass(frozen=True)
class TowerShape:
    """The dimensions of a tower that decide how its layers are matched."""

    layers: int
    """Attention blocks; others, such as the RepMixer blocks of a hybrid text tower, are not counted."""
    width: int
    """Channels of a token."""
    heads: int
    """Attention heads of a block."""


@dataclass(frozen=True)
class LayerMatch:
    """Which layers of one tower are compared, and by which losses."""

    tower: Tower
    losses: tuple[Loss, ...]
    """Rows of the table, of the family layer."""
    pairs: tuple[tuple[int, int], ...]
    """Layers of student and teacher, counted from 1."""
    student: TowerShape
    teacher: TowerShape

    def reads(self, *values: str) -> bool:
        """True if a loss reads any of these values."""
        return any(loss.reads(*values) for loss in self.losses)


def match_layers(
    losses: Iterable[Loss], options: LossOptions, tower: Tower, student: TowerShape, teacher: TowerShape
) -> LayerMatch:
    """The match of two towers for the given layer losses.

    Raises InputError if the layer map does not fit the towers, or if heads are compared one by one and their numbers
    differ.
    """
    match = LayerMatch(
        tower, tuple(losses), tuple(layer_pairs(options.layer_map, student.layers, teacher.layers)), student, teacher
    )
    if match.reads("cells") and options.head_match == "each" and student.heads != teacher.heads:
        raise InputError(
            f"the student's {tower} tower has {student.heads} heads and the teacher's {teacher.heads}: compare "
            "their means with --loss.head_match mean, or give the student as many"
        )
    return match


class LayerMaps(nn.Module):
    """Learned linear maps of a student's hidden states and embeddings to the teacher's width.

    All layers share one map of hidden states; embeddings have another (TinyBERT, section 3.1). There is no map if the
    widths agree.
    """

    def __init__(self, match: LayerMatch) -> None:
        super().__init__()
        ours, theirs = match.student.width, match.teacher.width
        self._layers = {layer - 1 for layer, _ in match.pairs}
        self.maps = nn.ModuleDict(
            {name: nn.Linear(ours, theirs) for name in ("hidden", "embedding") if match.reads(name) and ours != theirs}
        )

    def forward(self, trace: Trace) -> Trace:
        """Return `trace` with the hidden states and embeddings that losses read mapped to the teacher's width."""
        if "hidden" in self.maps:
            map_hidden = self.maps["hidden"]
            hidden = [map_hidden(x) if i in self._layers else x for i, x in enumerate(trace.hidden)]
            trace = replace(trace, hidden=hidden)
        if "embedding" in self.maps:
            map_embedding = self.maps["embedding"]
            trace = replace(trace, embedding=map_embedding(trace.embedding), tokens=map_embedding(trace.tokens))
        return trace


def layer_losses(
    match: LayerMatch, options: LossOptions, student: Trace, teacher: Trace
) -> dict[str, Float[Tensor, ""]]:
    """Unweighted losses by their name in LossOptions (hidden_text, ...), from the traces of this process's batch.

    `student` comes from LayerMaps. A loss is the mean over the pairs of layers, so that its weight means the same for
    any number of them. Every process gets the value that one process would get from the joined batch. The gradient is
    that of this process's part, times the number of processes: their mean, which DDP takes, is the gradient of the
    joined batch. Raises InputError for pictures cut into different grids.
    """
    parts = layer_sums(match, options, student, teacher)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return {name: part.total / part.terms.clamp(min=1) for name, part in parts.items()}
    joined = sum_parts([parts])
    losses = {}
    for name, part in parts.items():
        total, terms = (value.to(part.total) for value in joined[name])
        share = dist.get_world_size() * part.total / terms.clamp(min=1)
        losses[name] = share + (total / terms.clamp(min=1) - share).detach()
    return losses


def layer_sums(match: LayerMatch, options: LossOptions, student: Trace, teacher: Trace) -> dict[str, LossSum]:
    """Sums and counts of the losses over this process's batch, or over a chunk of it; see `sum_parts`."""
    student, teacher, valid = _aligned(match.tower, student, teacher)
    cells = attention_cells(valid, causal=student.causal or teacher.causal)
    layers = [
        _LayerValues((student, ours - 1), (teacher, theirs - 1), valid, cells, options.embedding_positions)
        for ours, theirs in match.pairs
    ]
    sums = {}
    for loss in match.losses:
        compute = loss.resolve()
        settings = {keyword: getattr(options, option) for keyword, option in loss.settings.items()}
        compared = layers[:1] if loss.reads("embedding") else layers  # there is one embedding, whatever the layer
        sums[loss.option(match.tower)] = _add(
            compute(**{keyword: getattr(values, value) for keyword, value in loss.arguments.items()}, **settings)
            for values in compared
        )
    return sums


class _LayerValues:
    """What layer losses read from one pair of layers, by the names in the table. The teacher's values are detached."""

    def __init__(
        self,
        student: tuple[Trace, int],
        teacher: tuple[Trace, int],
        valid: Bool[Tensor, "B L"],
        cells: Bool[Tensor, "B L L"],
        embedding_positions: bool,
    ) -> None:
        self._student, self._teacher = student, teacher
        self.valid, self.cells = valid, cells
        self._embedding = "embedding" if embedding_positions else "tokens"

    @property
    def hidden(self) -> Tensor:
        return _hidden(self._student)

    @property
    def teacher_hidden(self) -> Tensor:
        return _hidden(self._teacher).detach()

    @property
    def embedding(self) -> Tensor:
        return getattr(self._student[0], self._embedding)

    @property
    def teacher_embedding(self) -> Tensor:
        return getattr(self._teacher[0], self._embedding).detach()

    @cached_property
    def attention_scores(self) -> Tensor:
        return _attention(self._student)

    @cached_property
    def teacher_attention_scores(self) -> Tensor:
        return _attention(self._teacher).detach()

    @property
    def value_scores(self) -> Tensor:
        return _value(self._student)

    @property
    def teacher_value_scores(self) -> Tensor:
        return _value(self._teacher).detach()


def _hidden(layer: tuple[Trace, int]) -> Tensor:
    trace, number = layer
    return trace.hidden[number]


def _attention(layer: tuple[Trace, int]) -> Tensor:
    trace, number = layer
    return relation_scores(trace.query[number], trace.key[number])


def _value(layer: tuple[Trace, int]) -> Tensor:
    trace, number = layer
    return relation_scores(trace.value[number], trace.value[number])


def traced_tensors(match: LayerMatch, trace: Trace, *, embedding_positions: bool) -> list[Tensor]:
    """The tensors of a student's trace that the losses of `match` read, through which alone gradients reach it."""
    read: list[Tensor] = []
    if match.reads("embedding"):
        read.append(trace.embedding if embedding_positions else trace.tokens)
    for layer, _ in match.pairs:
        if match.reads("hidden"):
            read.append(trace.hidden[layer - 1])
        if match.reads("attention_scores"):
            read += [trace.query[layer - 1], trace.key[layer - 1]]
        if match.reads("value_scores"):
            read.append(trace.value[layer - 1])
    return read


def _aligned(tower: Tower, student: Trace, teacher: Trace) -> tuple[Trace, Trace, Bool[Tensor, "B L"]]:
    """Both traces cut to the tokens that they share, and which of these are real in both."""
    if tower == "image":
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
