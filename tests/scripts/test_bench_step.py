"""The benches of the training step and of its memory run the real step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benches import memory
from benches.measure import BenchOptions, in_own_process
from benches.memory import ChunkedDistiller, bench_memory, step_peak
from benches.open_clip_step import (
    OpenClipSide,
    captions_of,
    open_clip_models,
    our_side,
    our_student,
    our_teacher,
    write_weights,
)  # fmt: skip
from benches.step import FEATURE_WIDTH, Side, random_batch, step_case, with_random_features
from benches.step_parts import part_rows
from longclip_teacher.text import caption_lengths
from mobileclip_student import create_student
from training.data.store import TeacherInfo
from training.distillation import assemble
from training.settings.losses import LossOptions
from training.teachers import Teachers

OPTIONS = BenchOptions(full=False, rounds=1, device=torch.device("cpu"), precision="fp32")


def test_both_sides_of_a_step_have_the_same_loss() -> None:
    row = step_case("tiny", "tiny", 12, OPTIONS, torch.get_num_threads())
    assert row.case.startswith("tiny from tiny, batch 12,") and row.ratio == pytest.approx(row.baseline / row.ours)
    assert row.max_abs_diff is not None and row.max_abs_diff < 1e-3  # features stored in fp16


def test_open_clips_step_and_ours_from_the_same_weights_have_the_same_loss(tmp_path: Path) -> None:
    batch = captions_of(random_batch(4, 64), 12)
    models = open_clip_models(64)
    write_weights(models, tmp_path)
    theirs = OpenClipSide(*models, batch, "fp32")
    teacher = our_teacher(tmp_path)
    ours = our_side(our_student(tmp_path, 64, pad_mask=False), teacher, batch, "fp32")
    assert theirs.entropy > 1  # of four pictures, at most log 4
    assert float(ours.step()) == pytest.approx(theirs.step(), abs=1e-4)

    convolutions = [_first_convolution(model) for model in (theirs.student, ours.distillation.distiller)]
    before = [weight.detach().clone() for weight in convolutions]
    rows = part_rows(theirs, {12: ours}, teacher, rounds=1)
    assert len(rows) == 5 and all(row.unit == "s" and row.ours > 0 and row.baseline > 0 for row in rows)
    moved = [not torch.equal(old, new) for old, new in zip(before, convolutions, strict=True)]
    assert moved == [True, True], "the last part is the update"


def test_open_clip_reads_everything_on_the_device() -> None:
    batch = captions_of(random_batch(2, 8), 12)
    elsewhere = replace(batch, images=batch.images.to("meta"))  # as on a GPU: tokens stay on the host
    side = OpenClipSide(nn.Linear(2, 2), nn.Linear(2, 2), elsewhere, "fp32")
    assert [sample.device.type for sample in side.samples] == ["meta", "meta"]


def _first_convolution(model: nn.Module) -> nn.Parameter:
    return next(parameter for parameter in model.parameters() if parameter.ndim == 4)


def test_captions_have_the_stated_lengths() -> None:
    batch = random_batch(400, 4, 6)
    assert batch.images.shape == (400, 3, 4, 4)
    assert [view.shape for view in batch.teacher_images] == [(400, 3, 6, 6)]
    long, short = (caption_lengths(tokens).float() for tokens in (batch.long_tokens, batch.short_tokens))
    assert 95 < long.mean() < 105 and 11 < short.mean() < 13
    assert long.max() == batch.long_tokens.shape[1]


def test_a_step_moves_the_weights() -> None:
    torch.manual_seed(0)
    model = create_student("tiny", context_length=40).train()
    teacher_info = TeacherInfo((FEATURE_WIDTH,), 100.0, 248)
    batch = with_random_features(random_batch(12, 48))
    distillation = assemble(model, Teachers(stored=teacher_info), LossOptions(pca_rank=4))
    module = ChunkedDistiller(distillation.distiller, 2)
    side = Side(distillation, batch, "fp32", fused=True, module=module)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    assert side.step(accumulation=3).isfinite()
    assert module.chunks_seen == {False: 3, True: 3}
    assert all(not torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_a_drawn_chunk_trains_the_scale_alone() -> None:
    torch.manual_seed(0)
    model = create_student("tiny", context_length=40).train()
    distiller = ChunkedDistiller(assemble(model, None, LossOptions(pca_rank=4)).distiller, 0)
    batch = random_batch(6, 48)
    features = distiller(batch.images, batch.long_tokens, batch.short_tokens).features
    sum(value.square().sum() for value in features.tensors().values()).backward()
    assert [name for name, value in model.named_parameters() if value.grad is not None] == ["logit_scale"]
    torch.testing.assert_close(features["image"].norm(dim=1), torch.ones(6))


def test_memory_names_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the arithmetic on given peaks."""
    gigabytes = {(256, 0, True): 1.1, (256, 0, False): 2.0, (256, 2, True): 1.8, (64, 1, True): 1.7, (32, 1, True): 1.4}

    def peak(function: object, variant: str, size: int, chunks: int, run: int, streaming: bool, _: object) -> object:
        return memory._Peak(before=1.0, peak=gigabytes[size, run, streaming])

    monkeypatch.setattr(memory, "STUDENT", "tiny")
    monkeypatch.setattr(memory, "BATCH_SIZE", 256)
    monkeypatch.setattr(memory, "in_own_process", peak)
    total, *parts = bench_memory(OPTIONS)
    assert total.case == (
        "tiny, batch 256, stored teacher: peak in 4 chunks, 2 of them run and the others random; baseline extrapolated"
    )
    assert total.ours == 1.8
    assert total.baseline == pytest.approx(1.8 + 0.3 / 32 * (256 - 64) + 0.9)
    assert parts[0].case.startswith("activations, 64 pairs at a time") and parts[0].case.endswith("33% of the peak")
    assert parts[0].ours == pytest.approx(0.6) and parts[0].baseline == pytest.approx(2.4)
    assert [part.ours for part in parts] == sorted((part.ours for part in parts), reverse=True)
    assert {"losses", "pictures", "weights", "gradients", "AdamW's"} <= {
        part.case.split()[0].strip(":,") for part in parts
    }


def test_peaks_are_measured() -> None:
    # In its own process, as the bench does: below a peak that earlier tests have set, the kernel rounds a reading down.
    measured = in_own_process(step_peak, "tiny", 64, 2, 2, True, OPTIONS)
    assert 0 < measured.before < measured.peak < measured.before + 1
