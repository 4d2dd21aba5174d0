"""What the parts of a step take in open_clip's models and in ours: a profile that explains the ratio of whole steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benches.measure import Row, medians
from benches.step import CONFIG, Side
from longclip_teacher import LongCLIP
from mobileclip_student import MobileCLIP
from training.update import apply_update

if TYPE_CHECKING:
    from benches.open_clip_step import OpenClipSide

__all__ = ["part_rows", "settings_of_main"]

Functions = dict[str, tuple[Callable[[], None], Callable[[], None]]]


def part_rows(theirs: OpenClipSide, ours: Mapping[int, Side], teacher: LongCLIP, rounds: int) -> list[Row]:
    """Seconds of each part, ours and open_clip's in turns; the losses are not among them.

    `ours` are sides of one student by the captions' length, with pads masked.
    """
    device = theirs.batch.images.device
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(theirs.precision)

    def in_turns(functions: Functions) -> list[Row]:
        rows = []
        for name, (mine, other) in functions.items():
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                seconds, baseline = medians([mine, lambda other=other: _as_in_main(other)], rounds, device)
            rows.append(Row(f"of which {name}", "s", seconds, baseline, baseline / seconds, None, None))
        return rows

    images, tokens = theirs.samples
    side = next(iter(ours.values()))
    student = side.distillation.distiller.model
    assert isinstance(student, MobileCLIP)
    functions: Functions = {
        "student's image tower": (
            lambda: _backward(student.encode_image(images)),
            lambda: _backward(theirs.student.encode_image(images)),
        ),
        "teacher's image tower": (
            lambda: _without_graph(lambda: teacher.encode_image(images)),
            lambda: _without_graph(lambda: theirs.teacher.encode_image(images)),
        ),
    }
    for length, other in ours.items():
        captions = other.batch.long_tokens
        functions[f"student's text tower, captions of {length} tokens"] = (
            lambda captions=captions: _backward(student.encode_text(captions)),
            lambda: _backward(theirs.student.encode_text(tokens)),
        )
        functions[f"teacher's text tower, captions of {length} tokens"] = (
            lambda captions=captions: _without_graph(lambda: teacher.encode_text(captions)),
            lambda: _without_graph(lambda: theirs.teacher.encode_text(tokens)),
        )
    rows = in_turns(functions)

    gradients = [
        {parameter: parameter.grad for parameter in model.parameters() if parameter.grad is not None}
        for model in (student, theirs.student)
    ]

    def with_gradients(number: int, update: Callable[[], None]) -> None:
        for parameter, gradient in gradients[number].items():
            parameter.grad = gradient
        update()

    def our_update() -> None:
        side.statistics.remember()
        apply_update(side.state, CONFIG, torch.ones((), device=device), side.statistics)

    update = (lambda: with_gradients(0, our_update), lambda: with_gradients(1, theirs.update))
    return rows + in_turns({"clipping of the gradient and optimizer": update})


@contextmanager
def settings_of_main() -> Iterator[None]:
    """On a GPU, have cuDNN try which convolutions are fastest, as `open_clip_train.main` does, and let torch choose
    cuDNN's attention, as it does by default."""
    before = torch.backends.cudnn.benchmark, torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before[0]
        torch.backends.cuda.enable_cudnn_sdp(before[1])


def _as_in_main(function: Callable[[], None]) -> None:
    with settings_of_main():
        function()


def _backward(features: Tensor) -> None:
    features.float().square().sum().backward()


@torch.no_grad()
def _without_graph(function: Callable[[], Tensor]) -> None:
    function()
