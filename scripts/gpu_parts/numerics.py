"""CUDA against the CPU: losses with their gradients, PCA, packed and bucketed captions, both towers.

Shapes: G global batch, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benches.step import random_batch
from benches.text import random_captions
from eval.base.tf32 import allow_tf32, full_float32
from gpu_parts.findings import Finding, Findings, Setting
from longclip_teacher import create_teacher
from longclip_teacher.text import caption_lengths
from mobileclip_student import MobileCLIP, create_student
from training.data.store import TeacherInfo
from training.features import Features, LossParameters, Outputs, TeacherOutputs, normalized_for
from training.losses.table import LOSSES
from training.objective import Objective
from training.pca import pca_project
from training.settings.losses import LossOptions
from training.settings.needs import needs_of
from training.step import losses_with_gradient

__all__ = ["every_loss", "losses_part", "tf32", "towers_part"]

WIDTH = 512
_TIMES_CPU_ERROR = 10
"""A device may be this much further from float64 than the CPU's float32 is: it sums in another order."""
_LEAST = 1e-6
_FEATURES = {"fp32": 2e-5, "fp32 with TF32": 5e-3, "bf16": 2e-2}
"""Largest difference of a unit feature's entry from the CPU's float32."""
_GRADIENTS = {"fp32": 1e-3, "fp32 with TF32": 5e-2, "bf16": 2e-1}
"""Largest norm of the difference of two gradients, relative to the norm of the CPU's."""


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Let float32 products of a GPU round their inputs to TF32, or not, while the block runs."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    allow_tf32(allowed)
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def losses_part(setting: Setting) -> Findings:
    """Every loss of pairs and features and PCA, against float64 on the CPU, with TF32 off and on."""
    batch = 96 if setting.small else 1024
    exact = _loss_results(batch, torch.device("cpu"), torch.float64)
    on_cpu = _distances(_loss_results(batch, torch.device("cpu"), torch.float32), exact)
    yield None
    for allowed in (False, True):
        with tf32(allowed):
            found = _distances(_loss_results(batch, setting.torch_device, torch.float32), exact)
        mode = "TF32 on" if allowed else "TF32 off"
        for name, value in found.items():
            limit = max(_LEAST, _TIMES_CPU_ERROR * on_cpu[name])
            yield Finding(
                f"{name}, G={batch}, {mode}", value, "relative to float64", limit, note=f"CPU {on_cpu[name]:.1e}"
            )


def every_loss() -> LossOptions:
    """All losses of pairs and features at once, those of sub-captions aside: they are the same functions."""
    weights = {"pair": 0.3, "across": 0.3, "feature": 0.7}
    on = {loss.option(part): weights.get(loss.family, 0.0) for loss in LOSSES for part in loss.parts if part != "sub"}
    on |= {"gd_long": 1e4, "gd_short": 1e4, "masked_fd": 0.0}
    return LossOptions(**on, share_identical_captions=True, teacher_scale=50.0)


def _loss_results(batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Each loss by name, gradients of their sum, and PCA's result and gradient, on the CPU in float64."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(batch, WIDTH, generator=generator, dtype=torch.float64)

    def features(noise: float) -> Tensor:
        drawn = torch.randn(batch, WIDTH, generator=generator, dtype=torch.float64)
        return normalize(common + noise * drawn, dim=1).to(device, dtype)

    student = {name: features(2.0).requires_grad_() for name in ("image", "long", "short")}
    teacher = {name: features(1.0) for name in ("image", "long", "short")}
    options = every_loss()
    needs = needs_of(options)
    leaf = torch.tensor(30.0, device=device, dtype=dtype, requires_grad=True)
    mixture = torch.randn(WIDTH, 2 * WIDTH, generator=generator, dtype=torch.float64).to(device, dtype) / WIDTH**0.5
    parameters = LossParameters(leaf, dict.fromkeys(needs.scales, leaf), {"image": mixture, "text": mixture})
    objective = Objective(options, needs, dict.fromkeys(("long", "short"), TeacherInfo((WIDTH,), 50.0, 248)))
    tokens = random_captions(12, batch)
    tokens[1::7] = tokens[0]  # they stay on the host, as in training
    outputs = Outputs(Features.of(student), Features(), parameters)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    taught = TeacherOutputs(Features.of(teacher))
    found = losses_with_gradient(objective, outputs, taught, (tokens, tokens, None), scaler)
    results = {name: value.detach() for name, value in found.items()}
    leaves = {**student, "scale": leaf}
    results |= {f"gradient of {name}": value.grad for name, value in leaves.items() if value.grad is not None}
    with full_float32():  # as the step does
        reduced = pca_project(student["image"])
        results["gradient of PCA"] = torch.autograd.grad(reduced, student["image"], teacher["long"])[0]
    results["PCA"] = reduced.detach()
    return {name: value.double().cpu() for name, value in results.items()}


def _distances(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference of each result, relative to the largest entry. Losses are told as the worst of them."""
    errors = {name: float((value - exact[name]).abs().max() / exact[name].abs().max()) for name, value in found.items()}
    losses = {name: error for name, error in errors.items() if not name.startswith(("gradient", "PCA"))}
    worst = max(losses, key=lambda name: losses[name])
    told = {"total loss": losses["loss"], f"worst of {len(losses) - 1} losses": losses[worst]}
    return told | {name: error for name, error in errors.items() if name not in losses}


def towers_part(setting: Setting) -> Findings:
    """The features of teacher and student and the student's gradient, against float32 on the CPU."""
    torch.manual_seed(0)
    teacher_name, student_name, batch = ("tiny", "tiny", 4) if setting.small else ("b16", "s0", 8)
    teacher = create_teacher(teacher_name).requires_grad_(False).eval()
    student = create_student(student_name).train()
    pictures = random_batch(batch, student.image_size, teacher.image_size)
    captions = random_captions(40, 2 * batch)
    captions[1] = captions[0]
    images = normalized_for(teacher, pictures.teacher_images[0])
    expected = {
        "teacher, pictures": teacher.encode_image(images, normalize=True),
        "teacher, captions": teacher.encode_text(captions, normalize=True),
    }
    state = {name: value.clone() for name, value in student.state_dict().items()}
    of_student, gradient = _student_results(student, pictures.images, captions, None)
    yield None

    device = setting.torch_device
    teacher.to(device)
    for mode, dtype in (("fp32", None), ("fp32 with TF32", None), ("bf16", torch.bfloat16)):
        with tf32("TF32" in mode), torch.autocast(device.type, dtype, enabled=dtype is not None):
            found = {
                "teacher, pictures": teacher.encode_image(images.to(device), normalize=True),
                "teacher, captions": teacher.encode_text(captions.to(device), normalize=True),
                "teacher, captions packed": _packed(teacher.text, captions.to(device), captions),
            }
        for name, value in found.items():
            reference = expected[name.removesuffix(" packed")]
            yield Finding(f"{name}, {mode}", _largest(value, reference), "of a unit feature", _FEATURES[mode])
        student.load_state_dict(state)
        student.to(device)
        with tf32("TF32" in mode):
            results, slope = _student_results(student, pictures.images.to(device), captions.to(device), dtype)
        for name, value in results.items():
            yield Finding(
                f"student, {name}, {mode}", _largest(value, of_student[name]), "of a unit feature", _FEATURES[mode]
            )
        error = float((slope.cpu() - gradient).norm() / gradient.norm())
        yield Finding(f"student's gradient, {mode}", error, "relative norm", _GRADIENTS[mode])


def _packed(tower: torch.nn.Module, tokens: Tensor, on_cpu: Tensor) -> Tensor:
    """Unit features of captions computed end to end, as the CPU does."""
    lengths = caption_lengths(on_cpu)
    order = lengths.argsort(descending=True, stable=True)
    features = tower.packed(tokens[order.to(tokens.device)], lengths[order].tolist())
    return normalize(features.float(), dim=-1)[order.argsort().to(tokens.device)]


def _student_results(
    student: MobileCLIP, images: Tensor, captions: Tensor, dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], Tensor]:
    """Unit features of a training-mode pass, and the gradient of all parameters as one vector."""
    student.zero_grad(set_to_none=True)
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        raw = {
            "pictures": student.encode_image(normalized_for(student, images)),
            "captions": student.encode_text(captions),
        }
    features = {name: normalize(value.float(), dim=-1) for name, value in raw.items()}
    generator = torch.Generator().manual_seed(1)
    wanted = {name: torch.randn(value.shape, generator=generator).to(images.device) for name, value in features.items()}
    sum((value * wanted[name]).sum() for name, value in features.items()).backward()
    parts = [parameter.grad.flatten() for parameter in student.parameters() if parameter.grad is not None]
    return {name: value.detach() for name, value in features.items()}, torch.cat(parts)


def _largest(value: Tensor, reference: Tensor) -> float:
    return float((value.float().cpu() - reference.float()).abs().max())
