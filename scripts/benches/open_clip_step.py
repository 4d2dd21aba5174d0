"""open-clip: a step of the same work in open_clip's own training code, from its wheel, and in ours.

MobileCLIP-S1 learns from ViT-B/16 with CLIP's contrastive loss and the teacher's distribution over the batch. Both
students read at most 77 tokens and the teacher's pictures, because open_clip gives its teacher what the student reads.
Both sides start from the same random weights.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
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
from benches.step import FEATURE_WIDTH, Side, random_batch, with_random_features
from benches.step_parts import part_rows, settings_of_main
from eval.base.freed_memory import keep_freed_memory
from eval.base.tf32 import allow_tf32
from longclip_teacher import LongCLIP, load_teacher
from longclip_teacher.errors import InputError
from longclip_teacher.open_clip_parts import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from longclip_teacher.text import EOT
from mobileclip_student import MobileCLIP, load_student
from training.data.decoding import normalized
from training.data.samples import Batch
from training.data.store import TeacherInfo
from training.distillation import assemble
from training.settings.losses import LossOptions
from training.teachers import Teachers

__all__ = [
    "CASES", "STUDENT", "STUDENT_FILE", "TOKENS", "OpenClipSide", "bench_open_clip", "captions_of", "entropy_of",
    "open_clip_models", "our_side", "our_student", "our_teacher", "write_weights",
]  # fmt: skip

TOKENS = 77
STUDENT, _TEACHER = "MobileCLIP-S1", "ViT-B-16"
STUDENT_FILE, _TEACHER_FILE = "student.safetensors", "teacher.safetensors"
_LENGTHS = (12, 60)  # tokens per caption
_BATCH_SIZES = {"cpu": 12, "cuda": 256}
_FULL_BATCH_SIZES = {"cpu": 64, "cuda": 512}
_SIDE = 224
CASES = {  # whether pads are masked, and features stored
    "same function, pads attended, online": (False, False),
    "ours, online": (True, False),
    "ours, stored features": (True, True),
}
_LOSSES = LossOptions(clip_long=1.0, crd_long=1.0, clip_short=0.0, crd_short=0.0, label_smoothing=0.0)


def bench_open_clip(options: BenchOptions) -> Iterator[Row]:
    """Yield the samples/s of the cases and the seconds of their parts, which one process makes in turns, then the peak
    memory of processes that make steps of one side alone."""
    if options.precision == "fp16" and options.device.type == "cpu":
        raise InputError("--precision fp16: open_clip's training code has it on a GPU alone; give bf16 or fp32")
    batch_size = (_FULL_BATCH_SIZES if options.full else _BATCH_SIZES)[options.device.type]
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as name:
        yield from in_own_process(_rates, Path(name), batch_size, options, threads)
        theirs = in_own_process(_peak_of_open_clip, batch_size, options, threads)
        for case, (pad_mask, stored) in CASES.items():
            ours = in_own_process(_peak_of_ours, Path(name), pad_mask, stored, batch_size, options, threads)
            told = f"{case}, captions of {_LENGTHS[-1]} tokens, batch {batch_size}: peak memory of the process"
            yield Row(told, "GB", ours, theirs, theirs / ours, None, ours)


def _rates(folder: Path, batch_size: int, options: BenchOptions, threads: int) -> list[Row]:
    """All cases and open_clip's step in turns. max_abs_diff is that of the first step's loss, if both compute the same.

    open_clip pads every caption to 77 tokens, so its step is measured once for all lengths.
    """
    torch.set_num_threads(threads)
    keep_freed_memory()
    batches = {length: _batch(batch_size, length, options.device) for length in _LENGTHS}
    longest = batches[_LENGTHS[-1]]
    models = open_clip_models(_SIDE)
    write_weights(models, folder)
    teacher = our_teacher(folder)
    students = {pad_mask: our_student(folder, _SIDE, pad_mask=pad_mask) for pad_mask in (False, True)}
    theirs = OpenClipSide(*models, longest, options.precision)
    sides = {
        (case, length): our_side(students[pad_mask], None if stored else teacher, batches[length], options.precision)
        for case, (pad_mask, stored) in CASES.items()
        for length in (_LENGTHS if pad_mask else _LENGTHS[-1:])
    }
    same, *others = sides.values()
    difference = abs(float(same.step()) - theirs.step())  # the first steps also warm up
    allow_tf32(True)  # as both training commands do on a GPU; the losses are compared without it
    for side in others:
        side.step()
    names = ["open_clip", *(f"{case}, {length} tokens" for case, length in sides)]
    functions = [lambda: theirs.steps(1), *(side.step for side in sides.values())]
    seconds, *ours = medians(functions, options.rounds, options.device, names)
    rows = [
        Row(
            case=f"{case}: {STUDENT} from {_TEACHER}, captions of {length} tokens, batch {batch_size}, "
            f"{threads} threads",
            unit="samples/s",
            ours=batch_size / taken,
            baseline=batch_size / seconds,
            ratio=seconds / taken,
            max_abs_diff=difference if side is same else None,
            peak_gb=None,
        )
        for ((case, length), side), taken in zip(sides.items(), ours, strict=True)
    ]
    hiding = {length: side for (_, length), side in sides.items() if side.distillation.teacher and side is not same}
    return rows + part_rows(theirs, hiding, teacher, options.rounds)


def _peak_of_open_clip(batch_size: int, options: BenchOptions, threads: int) -> float:
    """The peak memory in GB of a process that makes two of open_clip's steps and holds its models alone."""
    torch.set_num_threads(threads)
    side = OpenClipSide(*open_clip_models(_SIDE), _batch(batch_size, _LENGTHS[-1], options.device), options.precision)
    for _ in range(2):
        side.steps(1)
    return peak_memory_gb(options.device)


def _peak_of_ours(
    folder: Path, pad_mask: bool, stored: bool, batch_size: int, options: BenchOptions, threads: int
) -> float:
    """The same of ours. Freed memory is kept, as in training, which makes the peak a little higher."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    student, teacher = our_student(folder, _SIDE, pad_mask=pad_mask), None if stored else our_teacher(folder)
    side = our_side(student, teacher, _batch(batch_size, _LENGTHS[-1], options.device), options.precision)
    for _ in range(2):
        side.step()
    return peak_memory_gb(options.device)


def _batch(batch_size: int, length: int, device: torch.device) -> Batch:
    return captions_of(random_batch(batch_size, _SIDE), length).to(device)


def captions_of(batch: Batch, length: int) -> Batch:
    """The batch with captions of `length` tokens, long and short alike."""
    tokens = batch.long_tokens[:, :length].clone()
    tokens[(tokens == EOT) | (tokens == 0)] = 320
    tokens[:, -1] = EOT
    return replace(batch, long_tokens=tokens, short_tokens=tokens)


def open_clip_models(size: int) -> tuple[nn.Module, nn.Module]:
    """open_clip's student and teacher for pictures of `size` pixels, with the same random weights at every call."""
    torch.manual_seed(0)
    student, teacher = (
        open_clip.create_model(name, force_image_size=size, output_dict=True) for name in (STUDENT, _TEACHER)
    )
    return student, teacher.requires_grad_(False)


def write_weights(models: tuple[nn.Module, nn.Module], folder: Path) -> None:
    """Write open_clip's student and teacher for `our_models`."""
    for file, model in zip((STUDENT_FILE, _TEACHER_FILE), models, strict=True):
        save_file({key: value.contiguous().clone() for key, value in model.state_dict().items()}, folder / file)


def our_teacher(folder: Path) -> LongCLIP:
    """Our teacher with the weights of `folder`."""
    teacher = load_teacher(folder / _TEACHER_FILE, context_length=TOKENS, activation="gelu")
    return teacher.requires_grad_(False).eval()


def our_student(folder: Path, size: int, *, pad_mask: bool) -> MobileCLIP:
    """Our student with the weights of `folder`, which reads the same pictures as the teacher. Without `pad_mask` it
    reads all 77 positions, as open_clip's does."""
    student = load_student(folder / STUDENT_FILE, "s1", TOKENS, pad_mask)
    seen = {"image_size": size, "mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD, "interpolation": "bicubic"}
    student.config = replace(student.config, image=replace(student.config.image, **seen))
    return student.requires_grad_(True).train()


def our_side(student: MobileCLIP, teacher: LongCLIP | None, batch: Batch, precision: str) -> Side:
    """Our step, on the device of the pictures. Without a teacher its features are stored, and random."""
    if teacher is None:
        batch, teachers = with_random_features(batch), Teachers(stored=TeacherInfo((FEATURE_WIDTH,), 100.0, TOKENS))
    else:
        teachers = Teachers([teacher])
    distillation = assemble(student, teachers, _LOSSES)
    teachers.to(batch.images.device)
    distillation.distiller.to(batch.images.device)
    return Side(distillation, batch, precision, fused=True)


@dataclass
class OpenClipSide:
    """open_clip's `train_one_epoch` on a batch that already lies on the device, normalised, with the settings that
    `open_clip_train.main` makes before."""

    student: nn.Module
    teacher: nn.Module
    batch: Batch
    precision: str

    def __post_init__(self) -> None:
        device, student = self.batch.images.device, self.student.to(self.batch.images.device)
        self.teacher.to(device)
        tokens = F.pad(self.batch.long_tokens, (0, TOKENS - self.batch.long_tokens.shape[1])).to(device)
        mean, std = (torch.tensor(value, device=device) for value in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
        self.samples = normalized(self.batch.images, mean, std), tokens
        decayed = [parameter for parameter in student.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in student.parameters() if parameter.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.2}], lr=1e-4
        )
        is_half = self.precision == "fp16"
        self._scaler = torch.amp.GradScaler(device.type) if is_half else None
        self._loss = _KeptLoss()
        self._arguments = SimpleNamespace(
            device=str(device), precision={"bf16": "amp_bf16", "fp16": "amp"}.get(self.precision, self.precision),
            distill=True, accum_freq=1, skip_scheduler=True, horovod=False, grad_clip_norm=1.0,
            log_every_n_steps=10**9, batch_size=len(tokens), world_size=1, wandb=False,
            rank=1,  # rank 0 would log the first and the last step, and wait for the device
        )  # fmt: skip

    def update(self) -> None:
        """Clip the gradient, move the weights and clear the gradient, as each step does."""
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), self._arguments.grad_clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @cached_property
    def entropy(self) -> float:
        """The entropy of the teacher's distributions, mean of both directions. open_clip's loss is a cross-entropy,
        ours a divergence."""
        with torch.no_grad():
            taught = self.teacher(*self.samples)
            logits = taught["logit_scale"] * taught["image_features"] @ taught["text_features"].T
            return float(sum(entropy_of(direction) for direction in (logits, logits.T)) / 2)

    def steps(self, count: int) -> None:
        """Make several steps without waiting between them."""
        data = {"train": _Feed([self.samples] * count)}
        with settings_of_main():
            train_one_epoch(
                self.student, data, self._loss, 0, self.optimizer, self._scaler, None, self.teacher, self._arguments
            )

    def step(self) -> float:
        """Make a step. Returns the loss, less the teacher's entropy."""
        self.steps(1)
        return self._loss.last - self.entropy


def entropy_of(logits: Tensor) -> Tensor:
    """The entropy of the softmax over each row, mean over rows."""
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
