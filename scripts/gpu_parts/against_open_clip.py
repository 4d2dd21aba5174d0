"""Our step against open_clip's own training code on the same work: MobileCLIP-S1 learns from ViT-B/16."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benches.measure import medians
from benches.open_clip_step import (
    CASES,
    TOKENS,
    OpenClipSide,
    captions_of,
    open_clip_models,
    our_side,
    our_student,
    our_teacher,
    write_weights,
)  # fmt: skip
from benches.step import Side, random_batch
from gpu_parts.findings import Finding, Findings, Setting
from gpu_parts.numerics import tf32

__all__ = ["open_clip_part"]

_STEPS, _MOST_ROUNDS = 3, 3
_OF_THE_TIME = 0.6  # for the timed rounds, of what the warm-up leaves
_LENGTH = 12  # tokens per caption
_COMPARED = 16  # pairs whose first loss is compared in float32
_OPEN_CLIP = "open_clip, online"


def open_clip_part(setting: Setting) -> Findings:
    """The first loss of both, then samples/s: open_clip's and ours take turns, as many as fit the time."""
    batch_size, side = (2, 64) if setting.small else (256, 224)
    precision = "fp32" if setting.small else "bf16"
    batch = captions_of(random_batch(batch_size, side), _LENGTH)
    models = open_clip_models(side)  # all weights are drawn and moved about before the time runs
    with tempfile.TemporaryDirectory() as name:
        write_weights(models, Path(name))
        teacher = our_teacher(Path(name))
        students = {pad_mask: our_student(Path(name), side, pad_mask=pad_mask) for pad_mask in (False, True)}
    seconds = yield None
    end = time.monotonic() + seconds

    batch = batch.to(setting.torch_device)
    some = batch.rows(slice(_COMPARED))
    with tf32(False):
        first = OpenClipSide(*models, some, "fp32").step()
        difference = abs(float(our_side(students[False], teacher, some, "fp32").step()) - first)
    yield Finding(f"first loss, fp32, batch {len(some.keys)}: ours against open_clip's", difference, "absolute", 1e-4)

    theirs = OpenClipSide(*models, batch, precision)
    sides = {
        case: our_side(students[pad_mask], None if stored else teacher, batch, precision)
        for case, (pad_mask, stored) in CASES.items()
    }
    steps = 1 if setting.small else _STEPS
    functions: dict[str, Callable[[], None]] = {_OPEN_CLIP: lambda: theirs.steps(steps)}
    functions |= {case: _several(trained, steps) for case, trained in sides.items()}
    if setting.device == "cuda":
        case = next(reversed(sides))
        functions[f"{case}, convolutions chosen by trial as in open_clip"] = _by_trial(functions[case])
    with tf32(True):
        yield from _rates(functions, setting, end, steps * batch_size, f"{precision}, batch {batch_size}")


def _rates(
    functions: dict[str, Callable[[], None]], setting: Setting, end: float, samples: int, what: str
) -> Iterator[Finding]:
    """Samples/s of each function, which processes `samples`; first those that do not fit the device."""
    device, memory, a_round = setting.torch_device, dict[str, str](), 0.0
    name = f"MobileCLIP-S1 from ViT-B/16, {TOKENS} tokens at most, captions of {_LENGTH}, {what}"
    for case, function in list(functions.items()):
        try:
            function()
            memory[case] = _memory_of(function, device)
        except torch.OutOfMemoryError:
            del functions[case]
            yield Finding(f"{name}: {case}", note="does not fit")
            continue
        a_round += medians([function], 1, device)[0]
    left = _OF_THE_TIME * (end - time.monotonic())
    rounds = 1 if setting.small else max(1, min(_MOST_ROUNDS, int(left / a_round)))
    taken = medians([*functions.values()], rounds, device)
    rates = {case: samples / seconds for case, seconds in zip(functions, taken, strict=True)}
    for case, rate in rates.items():
        is_ours = case != _OPEN_CLIP and _OPEN_CLIP in rates
        against = f"{rate / rates[_OPEN_CLIP]:.2f} times open_clip, " if is_ours else ""
        yield Finding(f"{name}: {case}", rate, "samples/s", note=f"{against}{memory[case]}median of {rounds} rounds")


def _memory_of(function: Callable[[], None], device: torch.device) -> str:
    """What the function's tensors take on a GPU at most, in words. The models of all cases lie there before."""
    if device.type != "cuda":
        function()
        return ""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    return f"{(torch.cuda.max_memory_allocated(device) - before) / 1e9:.1f} GB beyond weights and optimizer, "


def _several(side: Side, steps: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(steps):
            side.step()

    return run


def _by_trial(function: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        torch.backends.cudnn.benchmark = True
        try:
            function()
        finally:
            torch.backends.cudnn.benchmark = False

    return run
