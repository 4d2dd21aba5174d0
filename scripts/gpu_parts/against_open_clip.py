"""Our step against open_clip's own training code on the same work: MobileCLIP-S1 learns from ViT-B/16 online.

Both students read 77 tokens and 224 pixels, because open_clip gives its teacher the student's pictures. Both learn
CLIP's contrastive loss and the teacher's distribution over the batch.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from types import SimpleNamespace

import open_clip
import torch
from open_clip import DistillClipLoss
from open_clip_train.train import train_one_epoch
from torch import Tensor

from benches.measure import synchronize
from benches.step import Side, random_batch, with_stored_features
from eval.base.processes import leave_out_cudnn_attention
from gpu_parts.findings import Finding, Findings, Setting
from gpu_parts.numerics import tf32
from gpu_parts.speed import rate
from longclip_teacher import create_teacher
from longclip_teacher.config import TEACHERS
from longclip_teacher.text import EOT
from mobileclip_student import create_student
from mobileclip_student.model import override, variant_config
from training.data.samples import Batch
from training.distillation import assemble
from training.features import normalized_for
from training.settings.losses import LossOptions
from training.teachers import Teachers

__all__ = ["open_clip_part"]

_TOKENS = 77
_STEPS, _ROUNDS = 5, 3


def open_clip_part(setting: Setting) -> Findings:
    """Samples per second of both, and ours from stored features."""
    batch_size, side = (2, 64) if setting.small else (256, 224)
    precision = "fp32" if setting.small else "bf16"
    batch = _captions_of(random_batch(batch_size, side, side), 12)
    yield None
    batch = batch.to(setting.torch_device)
    with tf32(True):
        torch.backends.cuda.enable_cudnn_sdp(True)  # torch's default, with which open_clip runs
        theirs = _open_clip_rate(batch, setting, precision)
        leave_out_cudnn_attention()
        name = f"MobileCLIP-S1 from ViT-B/16, 77 tokens, {precision}, batch {batch_size}"
        yield Finding(f"{name}: open_clip, online", theirs, "samples/s")
        for case, ours in _our_sides(batch, setting, precision).items():
            found = rate(ours, setting)
            yield Finding(f"{name}: ours, {case}", found, "samples/s", note=f"{found / theirs:.2f} times open_clip")


def _captions_of(batch: Batch, length: int) -> Batch:
    """The batch with captions of `length` tokens."""
    tokens = batch.short_tokens[:, :length].clone()
    tokens[:, -1] = EOT
    tokens = torch.where((tokens == EOT) & (torch.arange(length) < length - 1), 320, tokens)
    tokens[tokens == 0] = 320
    return replace(batch, long_tokens=tokens, short_tokens=tokens)


def _our_sides(batch: Batch, setting: Setting, precision: str) -> dict[str, Side]:
    """The same function (all 77 positions, pads attended) online; then ours as it is meant, online and stored."""
    device = setting.torch_device
    size = batch.images.shape[-1]
    config = replace(TEACHERS["b16"], image=replace(TEACHERS["b16"].image, size=size))
    teacher = create_teacher(config, context_length=_TOKENS).to(device).requires_grad_(False).eval()
    options = LossOptions(clip_long=1.0, crd_long=1.0, clip_short=0.0, crd_short=0.0)
    sides = {}
    for case, pad_mask, stored in (
        ("same function, online", False, False),
        ("pads masked, online", True, False),
        ("pads masked, stored", True, True),
    ):
        shape = override(variant_config("s1"), image_size=size)
        model = create_student(shape, context_length=_TOKENS, pad_mask=pad_mask).to(device).train()
        distillation = assemble(model, Teachers([teacher]), options)
        distillation.distiller.to(device)
        given = batch
        if stored:
            assert distillation.teachers is not None
            given, teacher_info = with_stored_features(batch, distillation.teachers, distillation.objective.needs)
            distillation = assemble(model, Teachers(stored=teacher_info), options)
        sides[case] = Side(distillation, given, precision, fused=True)
    return sides


def _open_clip_rate(batch: Batch, setting: Setting, precision: str) -> float:
    """Time open_clip's epochs of a few steps on one batch that already lies on the device, normalised."""
    device = setting.torch_device
    size, steps, rounds = batch.images.shape[-1], *((1, 1) if setting.small else (_STEPS, _ROUNDS))
    student = open_clip.create_model("MobileCLIP-S1", device=device, force_image_size=size, output_dict=True)
    teacher = open_clip.create_model("ViT-B-16", device=device, force_image_size=size, output_dict=True)
    teacher.requires_grad_(False)
    tokens = torch.nn.functional.pad(batch.long_tokens, (0, _TOKENS - batch.long_tokens.shape[1])).to(device)
    images = normalized_for(create_teacher("tiny").to(device), batch.images)
    decayed = [parameter for parameter in student.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in student.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(  # as open_clip_train.main builds it
        [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.2}], lr=1e-4
    )
    arguments = SimpleNamespace(
        device=str(device), precision={"bf16": "amp_bf16"}.get(precision, precision), distill=True, accum_freq=1,
        skip_scheduler=True, horovod=False, grad_clip_norm=1.0, log_every_n_steps=10**9, batch_size=len(tokens),
        world_size=1, rank=0, wandb=False,
    )  # fmt: skip

    def epoch(steps: int) -> None:
        data = {"train": _Feed([(images, tokens)] * steps)}
        train_one_epoch(student, data, DistillClipLoss(), 0, optimizer, None, None, teacher, arguments)

    epoch(1 if setting.small else 2)
    seconds = []
    for _ in range(rounds):
        synchronize(device)
        begun = time.perf_counter()
        epoch(steps)
        synchronize(device)
        seconds.append(time.perf_counter() - begun)
    return steps * len(tokens) / statistics.median(seconds)


class _Feed:
    """What open_clip's loop asks of its data: batches, their number, and that of the samples."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.batches, self.dataloader = batches, self
        self.num_batches, self.num_samples = len(batches), sum(len(images) for images, _ in batches)

    def __iter__(self):
        return iter(self.batches)

    def set_epoch(self, epoch: int) -> None:
        """Batches are the same in every epoch."""
