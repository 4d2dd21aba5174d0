"""The rates of a plan: how fast one GPU runs teacher and student, as measured, given, or computed from FLOPs."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from eval.measures.costs import count_flops
from eval.towers.features import evaluation_mode
from eval.towers.models import ClipModel
from longclip_teacher import create_teacher
from longclip_teacher.errors import InputError
from longclip_teacher.text import EOT, SOT
from mobileclip_student import create_student

if TYPE_CHECKING:
    from plan_run import Options

__all__ = ["Rate", "Rates", "find_rates"]

_BACKWARD = 3  # cost of forward and backward relative to forward alone


@dataclass(frozen=True)
class Rate:
    """The speed of one GPU and the source of that figure."""

    per_second: float
    origin: str


@dataclass(frozen=True)
class Rates:
    """The three rates of a plan."""

    teacher_images: Rate
    teacher_captions: Rate
    student_samples: Rate


def find_rates(options: Options) -> Rates:
    """Return the given rates, and compute the others from FLOPs and the assumed utilisation."""
    images = _given(options.teacher_images_per_second, "--teacher-images-per-second")
    captions = _given(options.teacher_captions_per_second, "--teacher-captions-per-second")
    student = _given(options.student_samples_per_second, "--student-samples-per-second")
    num_tokens = round(options.mean_caption_tokens)
    if images is None or captions is None:
        of_image, of_caption = _flops(create_teacher(options.teacher), num_tokens)
        images = images or _computed(of_image, options.gpu_tflops, options.teacher_utilisation)
        captions = captions or _computed(of_caption, options.gpu_tflops, options.teacher_utilisation)
    if student is None:
        of_image, of_caption = _flops(create_student(options.student), num_tokens)
        of_a_step = _BACKWARD * (of_image + options.drawn_captions * of_caption)
        student = _computed(of_a_step, options.gpu_tflops, options.student_utilisation)
    return Rates(images, captions, student)


def _computed(flops: float, tflops: float, utilisation: float) -> Rate:
    origin = f"assumed: {flops / 1e9:.3g} GFLOPs at {utilisation:.0%} of {tflops:g} TFLOP/s"
    return Rate(tflops * 1e12 * utilisation / flops, origin)


def _flops(model: ClipModel, num_tokens: int) -> tuple[float, float]:
    """Return the FLOPs (2 x MACs) of the forward pass for one picture and for one caption of `num_tokens` tokens."""
    pictures = torch.zeros(1, 3, model.image_size, model.image_size)
    tokens = torch.tensor([[SOT, *[EOT // 2] * (num_tokens - 2), EOT]])
    with evaluation_mode(model, "fp32"):
        return count_flops(lambda: model.encode_image(pictures)), count_flops(lambda: model.encode_text(tokens))


def _given(value: str | None, flag: str) -> Rate | None:
    """Read a flag's rate: a number, or the row of a bench's JSON."""
    if value is None:
        return None
    try:
        rate = Rate(float(value), "given")
    except ValueError:
        path, suffix, case = value.partition(".json")
        if not suffix:
            raise InputError(f"{flag} {value}: give a number, or FILE.json:CASE of a bench") from None
        rate = _bench_rate(Path(path + suffix), case.removeprefix(":"), flag)
    if not 0 < rate.per_second < math.inf:
        raise InputError(f"{flag} {value}: a rate must be positive")
    return rate


def _bench_rate(path: Path, case: str, flag: str) -> Rate:
    try:
        rows = json.loads(path.read_bytes())["rows"]
        found = [row for row in rows if case in row["case"] and row["unit"].endswith("/s")]
        rates = [Rate(float(row["ours"]), f"measured: {path.name}, {row['case']}") for row in found]
    except OSError as error:
        raise InputError(f"{flag}: cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{flag}: {path} was not written by scripts/bench.py --json") from None
    if len(rates) != 1:
        cases = ", ".join(f"{row['case']} ({row['unit']})" for row in rows)
        raise InputError(f"{flag}: {path} has {len(rates)} rates whose case contains {case!r}: {cases}")
    return rates[0]
