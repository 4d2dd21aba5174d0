"""Where the device's time in a training step goes: to which tower, and to which kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benches.measure import medians, synchronize
from benches.step import Side
from gpu_parts.findings import Finding, Findings, Setting
from gpu_parts.numerics import tf32
from gpu_parts.sides import build_side, sizes

__all__ = ["kernels_part"]

_ROUNDS, _WARM_UP = 3, 2
_MOST_KERNELS = 12
_NAME_LENGTH = 90  # kernels of templates have names of thousands of letters


def kernels_part(setting: Setting) -> Findings:
    """Time each tower, then the kernels of a whole step from stored features, in bf16."""
    yield None
    student, teachers, batch = sizes(setting)
    side = build_side(student, teachers[0], batch, "bf16", setting.torch_device, stored=True)
    name = f"{student}, bf16, batch {batch}"
    with tf32(True):
        for _ in range(1 if setting.small else _WARM_UP):
            side.step()
        for part, function in {"step": side.step, **_towers(side)}.items():
            seconds = medians([function], 1 if setting.small else _ROUNDS, setting.torch_device)[0]
            yield Finding(f"{name}: {part}", seconds * 1e3, "ms")
        yield from _kernels(side.step, name, setting.torch_device)


def _towers(side: Side) -> dict[str, Callable[[], object]]:
    """Each tower forward and backward, on the step's own batch."""
    model, batch = side.distillation.distiller.model, side.batch

    def backward(features: torch.Tensor) -> None:
        features.float().sum().backward()
        model.zero_grad(set_to_none=True)

    def tower(encode: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor) -> Callable[[], None]:
        def run() -> None:
            with torch.autocast(batch.images.device.type, torch.bfloat16):
                features = encode(inputs)
            backward(features)

        return run

    pictures = torch.rand(len(batch.keys), 3, model.image_size, model.image_size, device=batch.images.device)
    return {
        "image tower, forward and backward": tower(model.encode_image, pictures),
        "text tower, long captions, forward and backward": tower(model.encode_text, batch.long_tokens),
    }


def _kernels(step: Callable[[], object], name: str, device: torch.device) -> Iterator[Finding]:
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiled:
        step()
        synchronize(device)

    def microseconds(event: torch.autograd.profiler_util.FunctionEventAvg) -> float:
        return event.self_device_time_total if on_gpu else event.self_cpu_time_total

    # on a GPU the operations of the host are listed beside the kernels that they start
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = [event for event in profiled.key_averages() if event.device_type == wanted]
    total = sum(microseconds(event) for event in events)
    calls = sum(event.count for event in events)
    yield Finding(f"{name}: all kernels of a step", total / 1e3, "ms", note=f"{calls} calls")
    for event in sorted(events, key=microseconds, reverse=True)[:_MOST_KERNELS]:
        share = microseconds(event) / total
        note = f"{microseconds(event) / 1e3:.1f} ms, {event.count} calls"
        yield Finding(f"{name}: {event.key[:_NAME_LENGTH]}", share, "of the kernels' time", note=note)
