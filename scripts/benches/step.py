"""step: one training step of the S0 student from stored teacher features, against the teacher online."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benches.measure import BenchOptions, Row, in_own_process, medians, peak_memory_gb
from eval.base.freed_memory import keep_freed_memory
from longclip_teacher import LongCLIP, create_teacher
from longclip_teacher.text import CONTEXT_LENGTH, EOT, SOT, trim
from mobileclip_student import create_student
from training.checkpointing import TrainState
from training.data.samples import Batch
from training.data.store import TeacherInfo
from training.distillation import Distillation, assemble
from training.optim import build_optimizer
from training.resume import RunInputs
from training.settings.losses import LossOptions
from training.settings.needs import Needs
from training.settings.tree import TrainConfig
from training.step import backward_step
from training.teachers import Teachers
from training.update import Statistics, apply_update

__all__ = [
    "FEATURE_WIDTH",
    "Side",
    "bench_step",
    "random_batch",
    "step_case",
    "with_random_features",
    "with_stored_features",
]

STUDENT = "s0"
TEACHERS, FULL_TEACHERS = ("b16",), ("b16", "l14")
_LONG, _SHORT = 100, 12  # mean tokens per caption
_BATCH_SIZE, _GPU_BATCH_SIZE = 16, 256
FEATURE_WIDTH = 512
"""Width of the features of `with_random_features`, that of a B/16."""
_KEY = (0, 0)  # key of drop path; the same in every step
CONFIG = TrainConfig()
"""Its optimiser is the one that is measured."""


@dataclass
class Side:
    """What is trained, with its optimiser, and the batch that every one of its steps reads."""

    distillation: Distillation
    batch: Batch
    precision: str
    fused: bool
    module: nn.Module | None = None
    """What is run in place of the Distiller."""

    def __post_init__(self) -> None:
        self.module = self.module or self.distillation.distiller
        scaler = torch.amp.GradScaler(self.batch.images.device.type, enabled=self.precision == "fp16")
        optimizer = build_optimizer(self.module, CONFIG.optim, fused=self.fused)
        inputs = RunInputs(1, 1, None, {}, {})
        self.state = TrainState(self.distillation.distiller, optimizer, scaler, inputs)
        self.statistics = Statistics(self.distillation.distiller)

    def step(self, accumulation: int = 1) -> Tensor:
        """One step as the training loop makes it; returns the loss."""
        assert self.module is not None
        self.statistics.remember()
        losses = backward_step(
            self.module,
            self.batch,
            self.distillation.objective,
            self.distillation.teachers,
            precision=self.precision,
            accumulation=accumulation,
            scaler=self.state.scaler,
            key=_KEY,
        )
        apply_update(self.state, CONFIG, losses["loss"], self.statistics)
        return losses["loss"]


def bench_step(options: BenchOptions) -> Iterator[Row]:
    """Compare stored features, trimmed captions and every switch on with the teacher online and every switch off."""
    batch_size = _BATCH_SIZE if options.device.type == "cpu" else _GPU_BATCH_SIZE
    for teacher in FULL_TEACHERS if options.full else TEACHERS:
        yield in_own_process(step_case, STUDENT, teacher, batch_size, options, torch.get_num_threads())


def step_case(student: str, teacher_name: str, batch_size: int, options: BenchOptions, num_threads: int) -> Row:
    """Measure one teacher. Both sides have the same weights, pictures and captions, and one side stores the features.

    max_abs_diff is that of the first step's loss. Freed memory is kept on both sides, because the process decides it.
    """
    torch.set_num_threads(num_threads)
    keep_freed_memory()
    torch.manual_seed(0)
    teacher = create_teacher(teacher_name).to(options.device).requires_grad_(False).eval()
    pca_rank = min(32, batch_size // 2)  # PCA with as many components as samples would do nothing
    baseline = _baseline(student, teacher, LossOptions(pca_rank=pca_rank), batch_size, options)
    ours = _ours(student, baseline, options.precision)

    difference = float((ours.step() - baseline.step()).abs())  # the first steps also warm up
    seconds_ours, seconds_baseline = medians([ours.step, baseline.step], options.rounds, options.device)
    return Row(
        case=f"{student} from {teacher_name}, batch {batch_size}, {num_threads} threads, captions of ~{_LONG} and "
        f"~{_SHORT} tokens, PCA {pca_rank}",
        unit="s",
        ours=seconds_ours,
        baseline=seconds_baseline,
        ratio=seconds_baseline / seconds_ours,
        max_abs_diff=difference,
        peak_gb=peak_memory_gb(),
    )


def _baseline(student: str, teacher: LongCLIP, losses: LossOptions, batch_size: int, options: BenchOptions) -> Side:
    """Build the baseline: teacher online, captions padded, full matrices, one memory format, AdamW without fusion."""
    teacher.trim_captions = False
    torch.manual_seed(1)
    model = create_student(student).to(options.device).train()
    model.text_encoder.trim_captions = False
    model.image_encoder.channels_last = False
    distillation = assemble(model, Teachers([teacher]), losses, streaming=False)
    distillation.distiller.to(options.device)
    batch = random_batch(batch_size, model.image_size, teacher.image_size).to(options.device)
    long, short = (F.pad(x, (0, CONTEXT_LENGTH - x.shape[1])) for x in (batch.long_tokens, batch.short_tokens))
    return Side(distillation, replace(batch, long_tokens=long, short_tokens=short), options.precision, fused=False)


def _ours(student: str, baseline: Side, precision: str) -> Side:
    """Build the same student and batch with the teacher's features stored in fp16."""
    torch.manual_seed(1)
    device = baseline.batch.images.device
    model = create_student(student).to(device).train()
    assert baseline.distillation.teachers is not None
    objective = baseline.distillation.objective
    batch, teacher_info = with_stored_features(baseline.batch, baseline.distillation.teachers, objective.needs)
    distillation = assemble(model, Teachers(stored=teacher_info), objective.options)
    distillation.distiller.to(device)
    return Side(distillation, batch, precision, fused=True)


def with_stored_features(batch: Batch, teachers: Teachers, needs: Needs) -> tuple[Batch, TeacherInfo]:
    """The batch as a cache gives it, with the features that `needs` asks for in fp16, and what the cache says about the
    teacher."""
    features = teachers.outputs(batch, needs).features
    stored = replace(
        batch,
        teacher_images=(),
        long_tokens=trim(batch.long_tokens).contiguous(),
        short_tokens=trim(batch.short_tokens).contiguous(),
        teacher={name: value.half() for name, value in features.tensors().items()},
    )
    return stored, teachers.info["long"]


def with_random_features(batch: Batch) -> Batch:
    """The batch with random stored features of unit norm, for a step that needs no teacher."""
    generator = torch.Generator().manual_seed(0)

    def features() -> Tensor:
        drawn = F.normalize(torch.randn(len(batch.keys), FEATURE_WIDTH, generator=generator), dim=-1)
        return drawn.half().to(batch.images.device)

    return replace(batch, teacher={name: features() for name in ("image", "long", "short")})


def random_batch(batch_size: int, image_size: int, teacher_image_size: int | None = None) -> Batch:
    """Make random pictures and captions of about 100 and 12 tokens, trimmed to the longest, on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def pictures(side: int) -> Tensor:
        return torch.randint(0, 256, (batch_size, 3, side, side), generator=generator, dtype=torch.uint8)

    def captions(mean: int) -> Tensor:
        lengths = (mean * (1 + torch.randn(batch_size, generator=generator) / 4)).round().long()
        lengths = lengths.clamp(4, CONTEXT_LENGTH)
        tokens = torch.randint(1, SOT, (batch_size, int(lengths.max())), generator=generator)
        positions = torch.arange(tokens.shape[1])
        tokens[:, 0] = SOT
        tokens[positions == lengths[:, None] - 1] = EOT
        tokens[positions >= lengths[:, None]] = 0
        return tokens

    return Batch(
        images=pictures(image_size),
        teacher_images=() if teacher_image_size is None else (pictures(teacher_image_size),),
        long_tokens=captions(_LONG),
        short_tokens=captions(_SHORT),
        keys=[str(number) for number in range(batch_size)],
        draws=[(0, number) for number in range(batch_size)],
        skipped={},
    )
