"""image: the image tower for inference, each backend against the training form in eager mode. B images."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import torch

from benches.measure import BenchOptions, Row, in_own_process, medians, peak_memory_gb
from mobileclip_student import create_student
from mobileclip_student.inference import Backend, choose_backend, fast_image_encoder

__all__ = ["bench_image", "image_case"]

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

VARIANT = "s0"
BATCH_SIZES = (1, 8)
_STEPS = 5  # passes timed together


def bench_image(options: BenchOptions) -> Iterator[Row]:
    """Measure each backend that can run here. The case of the default one says so."""
    for batch_size in BATCH_SIZES:
        for backend in _backends(options.device):
            yield in_own_process(image_case, VARIANT, batch_size, backend, options, torch.get_num_threads())


def image_case(variant: str, batch_size: int, backend: Backend, options: BenchOptions, num_threads: int) -> Row:
    """Measure one backend at one batch size, with random weights and pictures. Both sides take default memory
    format."""
    torch.set_num_threads(num_threads)
    torch.manual_seed(0)
    device = options.device
    student = create_student(variant).to(device).eval()
    images = torch.rand(batch_size, 3, student.image_size, student.image_size, device=device)
    encode = fast_image_encoder(student, backend)
    autocast = _AUTOCAST.get(options.precision)
    student.image_encoder.channels_last = False

    def ours() -> torch.Tensor:
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            for _ in range(_STEPS):
                features = encode(images)
        return features

    @torch.no_grad()
    def baseline() -> torch.Tensor:
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            for _ in range(_STEPS):
                features = student.encode_image(images)
        return features

    reference = baseline()
    scale = reference.float().norm(dim=1).mean()
    difference = float((ours().float() - reference.float()).abs().max() / scale)  # compiles and warms up too
    seconds_ours, seconds_baseline = medians([ours, baseline], options.rounds, device)
    chosen = ", the default" if backend == choose_backend(device) else ""
    return Row(
        case=f"{variant} {student.image_size} px, batch {batch_size}, {num_threads} threads, fused {backend}{chosen}",
        unit="s",
        ours=seconds_ours / _STEPS,
        baseline=seconds_baseline / _STEPS,
        ratio=seconds_baseline / seconds_ours,
        max_abs_diff=difference,  # of features divided by their mean norm
        peak_gb=peak_memory_gb(),
    )


def _backends(device: torch.device) -> list[Backend]:
    backends: list[Backend] = ["eager"]
    if device.type != "cpu" or any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        backends.append("compile")
    if choose_backend(device) == "onnxruntime":
        backends.append("onnxruntime")
    return backends
