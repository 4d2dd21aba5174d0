"""open-clip: a step of the same work in open_clip's own training code, from its wheel, and in ours.

MobileCLIP-S1 learns from ViT-B/16 with CLIP's contrastive loss and the teacher's distribution over the batch. Both
students read 77 tokens and the teacher's pictures, because open_clip gives its teacher what the student reads. Both
sides start from the same random weights.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import open_clip
import torch
import torch.nn.functional as F
from open_clip import DistillClipLoss
from open_clip_train.train import train_one_epoch
from safetensors.torch import save_file
from torch import Tensor, nn

from benches.measure import BenchOptions, Row, in_own_process, medians, peak_memory_gb
from benches.step import Side, random_batch, with_stored_features
from eval.base.freed_memory import keep_freed_memory
from longclip_teacher import LongCLIP, load_teacher
from longclip_teacher.open_clip_parts import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from longclip_teacher.text import EOT
from mobileclip_student import MobileCLIP, load_student
from training.data.decoding import normalized
from training.data.samples import Batch
from training.distillation import assemble
from training.settings.losses import LossOptions
from training.teachers import Teachers

__all__ = ["TOKENS", "OpenClipSide", "bench_open_clip", "captions_of", "our_side", "same_weights"]

TOKENS = 77
_STUDENT, _TEACHER = "MobileCLIP-S1", "ViT-B-16"
_LENGTHS = (12, 60)  # tokens per caption
_BATCH_SIZE, _GPU_BATCH_SIZE, _SIDE = 16, 256, 224
_OURS = {"same function, pads attended, online": (False, False), "ours, online": (True, False)}
_OURS |= {"ours, stored features": (True, True)}  # pads masked, features stored
_LOSSES = LossOptions(clip_long=1.0, crd_long=1.0, clip_short=0.0, crd_short=0.0, label_smoothing=0.0)


def bench_open_clip(options: BenchOptions) -> Iterator[Row]:
    """Yield a step's seconds per case, then the peak memory of processes that make steps of one side alone."""
    batch_size = _BATCH_SIZE if options.device.type == "cpu" else _GPU_BATCH_SIZE
    threads = torch.get_num_threads()
    for case, (pad_mask, stored) in _OURS.items():
        for length in _LENGTHS if pad_mask else _LENGTHS[:1]:
            yield in_own_process(_time_case, case, pad_mask, stored, length, batch_size, options, threads)
    theirs = in_own_process(_peak_of, None, batch_size, options, threads)
    for case, how in _OURS.items():
        ours = in_own_process(_peak_of, how, batch_size, options, threads)
        name = f"{case}, captions of {_LENGTHS[-1]} tokens: peak memory of the process"
        yield Row(name, "GB", ours, theirs, theirs / ours, None, ours)


def _time_case(
    case: str, pad_mask: bool, stored: bool, length: int, batch_size: int, options: BenchOptions, threads: int
) -> Row:
    """Both sides in turn. max_abs_diff is that of the first step's loss, if both compute the same."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    batch = captions_of(random_batch(batch_size, _SIDE, _SIDE), length).to(options.device)
    models = same_weights(_SIDE, options.device)
    baseline = OpenClipSide(models, batch, options.precision)
    ours = our_side(models, batch, options.precision, pad_mask=pad_mask, stored=stored)
    difference = abs(float(ours.step()) - baseline.step())  # the first steps also warm up
    seconds, seconds_baseline = medians([ours.step, baseline.step], options.rounds, options.device)
    return Row(
        case=f"{case}: {_STUDENT} from {_TEACHER}, {TOKENS} tokens, captions of {length}, batch {batch_size}, "
        f"{threads} threads",
        unit="s",
        ours=seconds,
        baseline=seconds_baseline,
        ratio=seconds_baseline / seconds,
        max_abs_diff=None if pad_mask else difference,
        peak_gb=peak_memory_gb(),
    )


def _peak_of(how: tuple[bool, bool] | None, batch_size: int, options: BenchOptions, threads: int) -> float:
    """The peak memory in GB of a process that makes two steps: ours (pads masked, features stored) or open_clip's."""
    torch.set_num_threads(threads)
    batch = captions_of(random_batch(batch_size, _SIDE, _SIDE), _LENGTHS[-1]).to(options.device)
    models = same_weights(_SIDE, options.device)
    side: OpenClipSide | Side
    if how is None:
        side = OpenClipSide(models, batch, options.precision)
    else:
        pad_mask, stored = how
        side = our_side(models, batch, options.precision, pad_mask=pad_mask, stored=stored)
    for _ in range(2):
        side.step()
    return peak_memory_gb(options.device)


def captions_of(batch: Batch, length: int) -> Batch:
    """The batch with captions of `length` tokens, long and short alike, and the student's pictures for the teacher."""
    tokens = batch.long_tokens[:, :length].clone()
    tokens[(tokens == EOT) | (tokens == 0)] = 320
    tokens[:, -1] = EOT
    return replace(batch, teacher_images=(batch.images,), long_tokens=tokens, short_tokens=tokens)


@dataclass
class _Models:
    """open_clip's student and teacher with random weights, and the files that hold these."""

    student: nn.Module
    teacher: nn.Module
    folder: tempfile.TemporaryDirectory
    size: int

    def ours(self, pad_mask: bool) -> tuple[MobileCLIP, LongCLIP]:
        """Our student and teacher with the same weights, which read the pictures as open_clip's teacher does."""
        folder, device = Path(self.folder.name), next(self.teacher.parameters()).device
        teacher = load_teacher(folder / "teacher.safetensors", device, context_length=TOKENS, activation="gelu")
        student = load_student(folder / "student.safetensors", "s1", TOKENS, pad_mask, device)
        pictures = teacher.preprocess_cfg
        image = replace(student.config.image, image_size=self.size, mean=pictures.mean, std=pictures.std)
        student.config = replace(student.config, image=image)
        return student.requires_grad_(True).train(), teacher.requires_grad_(False).eval()


def same_weights(size: int, device: torch.device) -> _Models:
    """Draw the weights of both models for pictures of `size` pixels."""
    torch.manual_seed(0)
    student, teacher = (
        open_clip.create_model(name, device=device, force_image_size=size, output_dict=True)
        for name in (_STUDENT, _TEACHER)
    )
    folder = tempfile.TemporaryDirectory()
    for name, model in (("student", student), ("teacher", teacher)):
        tensors = {key: value.contiguous().clone() for key, value in model.state_dict().items()}
        save_file(tensors, Path(folder.name, f"{name}.safetensors"))
    return _Models(student, teacher.requires_grad_(False), folder, size)


def our_side(models: _Models, batch: Batch, precision: str, *, pad_mask: bool, stored: bool) -> Side:
    """Our step from the same weights. Without `pad_mask` the student reads all 77 positions, as open_clip's does."""
    student, teacher = models.ours(pad_mask)
    distillation = assemble(student, Teachers([teacher]), _LOSSES)
    if stored:
        assert distillation.teachers is not None
        batch, teacher_info = with_stored_features(batch, distillation.teachers, distillation.objective.needs)
        distillation = assemble(student, Teachers(stored=teacher_info), _LOSSES)
    distillation.distiller.to(batch.images.device)
    return Side(distillation, batch, precision, fused=True)


@dataclass
class OpenClipSide:
    """open_clip's `train_one_epoch` on a batch that already lies on the device, normalised."""

    models: _Models
    batch: Batch
    precision: str
    entropy: float = field(init=False)
    """Of the teacher's distributions, mean of both directions. Its loss is a cross-entropy, ours a divergence."""

    def __post_init__(self) -> None:
        device, student = self.batch.images.device, self.models.student
        tokens = F.pad(self.batch.long_tokens, (0, TOKENS - self.batch.long_tokens.shape[1]))
        mean, std = (torch.tensor(value, device=device) for value in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
        self._samples = normalized(self.batch.images, mean, std), tokens
        decayed = [parameter for parameter in student.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in student.parameters() if parameter.ndim <= 1]
        self._optimizer = torch.optim.AdamW(  # as open_clip_train.main builds it
            [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.2}], lr=1e-4
        )
        self._arguments = SimpleNamespace(
            device=str(device), precision={"bf16": "amp_bf16"}.get(self.precision, self.precision), distill=True,
            accum_freq=1, skip_scheduler=True, horovod=False, grad_clip_norm=1.0, log_every_n_steps=10**9,
            batch_size=len(tokens), world_size=1, rank=0, wandb=False,
        )  # fmt: skip
        with torch.no_grad():
            taught = self.models.teacher(*self._samples)
            logits = taught["logit_scale"] * taught["image_features"] @ taught["text_features"].T
            self.entropy = float(sum(_entropy(direction) for direction in (logits, logits.T)) / 2)

    def steps(self, count: int) -> None:
        """Make several steps without waiting between them."""
        self._loss = _KeptLoss()
        data = {"train": _Feed([self._samples] * count)}
        train_one_epoch(
            self.models.student, data, self._loss, 0, self._optimizer, None, None, self.models.teacher, self._arguments
        )

    def step(self) -> float:
        """Make a step. Returns the loss, less the teacher's entropy."""
        self.steps(1)
        return self._loss.last - self.entropy


def _entropy(logits: Tensor) -> Tensor:
    logarithms = logits.float().log_softmax(dim=1)
    return -(logarithms.exp() * logarithms).sum(dim=1).mean()


class _KeptLoss(DistillClipLoss):
    """open_clip's loss, which keeps the last value."""

    def forward(self, *args: Tensor, **options: Tensor) -> dict[str, Tensor]:
        losses = super().forward(*args, **options)
        self._last = [value.detach() for value in losses.values()]
        return losses

    @property
    def last(self) -> float:
        """The sum of the losses of the last step. Waits for the device."""
        return float(sum(self._last))


class _Feed:
    """What open_clip's loop asks of its data: batches, their number, and that of the samples."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.batches, self.dataloader = batches, self
        self.num_batches, self.num_samples = len(batches), sum(len(images) for images, _ in batches)

    def __iter__(self):
        return iter(self.batches)

    def set_epoch(self, epoch: int) -> None:
        """Batches are the same in every epoch."""
