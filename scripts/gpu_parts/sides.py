"""Training steps on random data as a run makes them, for the parts that measure or examine a step."""

from __future__ import annotations

import torch

from benches.step import Side, random_batch, with_stored_features
from gpu_parts.findings import Setting
from longclip_teacher import create_teacher
from mobileclip_student import create_student
from mobileclip_student.inference import compile_towers
from training.distillation import assemble
from training.settings.losses import LossOptions
from training.teachers import Teachers

__all__ = ["build_side", "sizes"]


def sizes(setting: Setting) -> tuple[str, tuple[str, ...], int]:
    """The student, its teachers and the batch of this setting."""
    return ("tiny", ("tiny",), 64) if setting.small else ("s0", ("b16", "l14"), 256)


def build_side(
    student: str, teacher: str, batch_size: int, precision: str, device: torch.device, *, stored: bool,
    compiled: bool = False,
) -> Side:  # fmt: skip
    """The student with the default losses, from the teacher's stored features or with the teacher online."""
    torch.manual_seed(0)
    with device:  # drawing an L/14's weights takes a CPU seconds
        frozen = create_teacher(teacher).requires_grad_(False).eval()
        model = create_student(student).train()
    batch = random_batch(batch_size, model.image_size, frozen.image_size).to(device)
    options = LossOptions(pca_rank=min(32, batch_size // 2))
    online = assemble(model, Teachers([frozen]), options)
    assert online.teachers is not None
    online.teachers.to(device)
    online.distiller.to(device)
    if compiled:
        compile_towers(model)
    if not stored:
        if compiled:
            compile_towers(frozen)
        return Side(online, batch, precision, fused=True)
    batch, teacher_info = with_stored_features(batch, online.teachers, online.objective.needs)
    distillation = assemble(model, Teachers(stored=teacher_info), options)
    distillation.distiller.to(device)
    return Side(distillation, batch, precision, fused=True)
