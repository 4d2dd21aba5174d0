"""mobileclip: a step of MobileCLIP's published training on reinforced data, from the user's checkout, and ours.

That training code is a patch for an older open_clip, which cannot be imported beside the one that we use. It runs in a
process of its own (mobileclip_loop.py), which takes turns with ours. MobileCLIP-S1 learns from the stored features of
two teachers of 768 dimensions, as DataCompDR has them: the distributions over the batch of a caption and of a synthetic
one. Both sides start from the same random weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from benches.checkout import patched_open_clip
from benches.measure import BenchOptions, Row, in_own_process, medians, peak_memory_gb
from benches.open_clip_step import STUDENT, STUDENT_FILE, TOKENS, captions_of, entropy_of, our_student
from benches.step import Side, random_batch
from eval.base.freed_memory import keep_freed_memory
from eval.base.tf32 import allow_tf32
from longclip_teacher.errors import InputError
from longclip_teacher.open_clip_parts import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from mobileclip_student import MobileCLIP
from training.data.decoding import normalized
from training.data.samples import Batch
from training.data.store import TeacherInfo
from training.distillation import assemble
from training.settings.tree import parse_config
from training.teachers import Teachers

__all__ = ["PublishedLoop", "bench_mobileclip", "reinforced"]

_ROOT = Path(__file__).parents[2]
_LENGTHS = (12, 60)  # tokens per caption
_BATCH_SIZES = {"cpu": 12, "cuda": 256}
_FULL_BATCH_SIZES = {"cpu": 64, "cuda": 512}
_SIDE = 256
_TEACHERS = TeacherInfo((768, 768), (100.0, 100.0), TOKENS)
_CASES = {"same function, pads attended": False, "ours": True}  # whether pads are masked, and PCA on


def bench_mobileclip(options: BenchOptions) -> Iterator[Row]:
    """Yield the samples/s of the cases, which take turns with the published loop, then the peak memory of processes
    that make steps of one side alone."""
    source = patched_open_clip(options.checkout)
    if options.precision == "fp16" and options.device.type == "cpu":
        raise InputError("--precision fp16: the published loop has it on a GPU alone; give bf16 or fp32")
    batch_size = (_FULL_BATCH_SIZES if options.full else _BATCH_SIZES)[options.device.type]
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as name:
        rows, theirs = in_own_process(_rates, source, Path(name), batch_size, options, threads)
        yield from rows
        for case, is_ours in _CASES.items():
            ours = in_own_process(_peak_of_ours, Path(name), is_ours, batch_size, options, threads)
            told = f"{case}, captions of {_LENGTHS[-1]} tokens, batch {batch_size}: peak memory of the process"
            yield Row(told, "GB", ours, theirs, theirs / ours, None, ours)


def _rates(source: Path, folder: Path, batch_size: int, options: BenchOptions, threads: int) -> tuple[list[Row], float]:
    """All cases and the published loop in turns, and the peak memory of the latter's process. max_abs_diff is that of
    the first step's loss, if both compute the same."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    batches = {length: reinforced(random_batch(batch_size, _SIDE), length) for length in _LENGTHS}
    longest = batches[_LENGTHS[-1]]
    with PublishedLoop(source, folder, longest, _SIDE, options, threads) as theirs:
        students = {pad_mask: our_student(folder, _SIDE, pad_mask=pad_mask) for pad_mask in (False, True)}
        sides = {
            (case, length): our_side(students[is_ours], batches[length].to(options.device), options.precision, is_ours)
            for case, is_ours in _CASES.items()
            for length in (_LENGTHS if is_ours else _LENGTHS[-1:])
        }
        same, *others = sides.values()
        difference = abs(float(same.step()) - theirs.step())  # the first steps also warm up
        allow_tf32(True)  # as both training commands do on a GPU
        for side in others:
            side.step()
        names = ["published loop", *(f"{case}, {length} tokens" for case, length in sides)]
        functions = [theirs.step, *(side.step for side in sides.values())]
        seconds, *ours = medians(functions, options.rounds, options.device, names)
        rows = [
            Row(
                case=f"{case}: {STUDENT}, captions of {length} tokens, batch {batch_size}, {threads} threads",
                unit="samples/s",
                ours=batch_size / taken,
                baseline=batch_size / seconds,
                ratio=seconds / taken,
                max_abs_diff=difference if side is same else None,
                peak_gb=None,
            )
            for ((case, length), side), taken in zip(sides.items(), ours, strict=True)
        ]
        return rows, theirs.peak_gb


def _peak_of_ours(folder: Path, is_ours: bool, batch_size: int, options: BenchOptions, threads: int) -> float:
    """The peak memory in GB of a process that makes two of our steps and holds our student alone."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    batch = reinforced(random_batch(batch_size, _SIDE), _LENGTHS[-1]).to(options.device)
    side = our_side(our_student(folder, _SIDE, pad_mask=is_ours), batch, options.precision, is_ours)
    for _ in range(2):
        side.step()
    return peak_memory_gb(options.device)


def our_side(student: MobileCLIP, batch: Batch, precision: str, with_pca: bool) -> Side:
    """Our step with the losses of the preset dr_offline, at DataCompDR's scale of the teachers."""
    preset = parse_config(["dr_offline"]).loss
    rank = min(preset.pca_rank, len(batch.keys) // 2)  # as many components as samples would do nothing
    losses = replace(preset, teacher_scale=100.0, pca_rank=rank, pca_scope=preset.pca_scope if with_pca else "off")
    distillation = assemble(student, Teachers(stored=_TEACHERS), losses)
    distillation.distiller.to(batch.images.device)
    return Side(distillation, batch, precision, fused=True)


def reinforced(batch: Batch, length: int) -> Batch:
    """The batch with captions and other synthetic ones of `length` tokens, and random features of the teachers."""
    generator = torch.Generator().manual_seed(0)

    def features() -> Tensor:
        drawn = torch.randn(len(batch.keys), len(_TEACHERS.widths), _TEACHERS.widths[0], generator=generator)
        return F.normalize(drawn, dim=-1).flatten(1)

    captions = captions_of(batch, length)
    synthetic = captions.long_tokens.clone()
    synthetic[:, 1:-1] = captions.long_tokens[:, 1:-1].flip(0)
    teacher = {name: features() for name in ("image", "long", "short")}
    return replace(captions, short_tokens=synthetic, teacher=teacher)


@dataclass
class PublishedLoop:
    """The published loop on a batch of `reinforced`, in a process of its own. It writes the student's random weights to
    `folder` before it answers."""

    source: Path
    folder: Path
    batch: Batch
    size: int
    options: BenchOptions
    threads: int
    peak_gb: float = 0.0
    """The peak memory of its process so far."""

    def __post_init__(self) -> None:
        assert self.batch.teacher is not None
        taught = self.batch.teacher
        mean, std = (torch.tensor(value) for value in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
        texts, synthetic = (
            F.pad(tokens, (0, TOKENS - tokens.shape[1])) for tokens in (self.batch.long_tokens, self.batch.short_tokens)
        )
        samples = {
            "images": normalized(self.batch.images, mean, std), "texts": texts, "synthetic_texts": synthetic,
            "image_features": taught["image"], "text_features": taught["long"], "synthetic_features": taught["short"],
        }  # fmt: skip
        save_file(samples, self.folder / "batch.safetensors")
        self._entropy = sum(_ensemble_entropy(taught["image"], taught[name]) for name in ("long", "short"))
        places = os.pathsep.join([str(self.source), str(_ROOT)])
        words = [
            STUDENT, self.size, self.options.device, self.options.precision, self.threads,
            self.folder / "batch.safetensors", self.folder / STUDENT_FILE,
        ]  # fmt: skip
        self._log = (self.folder / "log.txt").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-u", str(Path(__file__).with_name("mobileclip_loop.py")), *map(str, words)],
            env={**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": str(self.threads)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip
        self._ask(0)

    def __enter__(self) -> PublishedLoop:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def step(self) -> float:
        """Make a step. Returns the loss, less the entropy of the teachers' distributions."""
        return self._ask(1) - self._entropy

    def _ask(self, steps: int) -> float:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(steps, file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._process.wait()
            self._log.seek(0)
            told = [line for line in self._log.read().splitlines() if line.strip()][-1:] or ["no output"]
            raise InputError(f"--checkout {self.source}: its training code failed: {told[0]}")
        content = json.loads(answer)
        self.peak_gb = content["peak_gb"]
        return content["loss"]


def _ensemble_entropy(image: Tensor, text: Tensor) -> float:
    """The entropy of each teacher's distributions over the batch, mean of teachers and directions."""
    parts = zip(image.split(_TEACHERS.widths, dim=1), text.split(_TEACHERS.widths, dim=1), strict=True)
    logits = [100.0 * one @ other.T for one, other in parts]
    return float(sum(entropy_of(x) + entropy_of(x.T) for x in logits) / (2 * len(logits)))
