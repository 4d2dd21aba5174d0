"""The text benches at small sizes: both sides compute the same, and the captions match the row's description."""

from __future__ import annotations

import pytest
import torch

from benches import text as bench
from benches.measure import BenchOptions
from benches.text import (
    random_captions,
    student_text_case,
    teacher_text_case,
    tokenize_case,
    written_captions,
)
from longclip_teacher.text import caption_lengths

OPTIONS = BenchOptions(full=False, rounds=1, device=torch.device("cpu"), precision="fp32")


def test_teacher_text_compares_the_same_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "TEACHER", "tiny")
    monkeypatch.setattr(bench, "TEACHER_BATCHES", (2, 4))
    row = teacher_text_case(20, 6, OPTIONS)
    assert row.case.startswith("tiny, 6 captions of mean") and row.unit == "captions/s"
    assert row.max_abs_diff is not None and 0 < row.max_abs_diff < 1e-5
    assert row.ratio == pytest.approx(row.ours / row.baseline)


@pytest.mark.parametrize("pad_mask", [False, True])
def test_student_text_compares_where_both_compute_the_same(monkeypatch: pytest.MonkeyPatch, pad_mask: bool) -> None:
    monkeypatch.setattr(bench, "STUDENT_BATCH", 2)
    row = student_text_case(pad_mask, OPTIONS)
    assert row.ours > 0 and row.ratio == pytest.approx(row.ours / row.baseline)
    if pad_mask:
        assert row.max_abs_diff is not None and row.max_abs_diff < 1e-5
    else:
        assert row.max_abs_diff is None


def test_tokenize_compares_every_id() -> None:
    row = tokenize_case(300, 0.3)
    assert row.max_abs_diff == 0 and row.case.startswith("300 captions of 9") and "30% not plain" in row.case


def test_written_captions_are_distinct_and_as_odd_as_asked() -> None:
    captions = written_captions(2000, 0.1)
    assert len(set(captions)) == 2000
    odd = sum(not caption.isascii() or "&" in caption or "\x00" in caption for caption in captions)
    assert 140 < odd < 260


@pytest.mark.parametrize("mean", [100, 56, 12])
def test_random_captions_are_distinct_and_spread_about_their_mean(mean: int) -> None:
    tokens = random_captions(mean, 256)
    lengths = caption_lengths(tokens).float()
    assert lengths.mean().item() == pytest.approx(mean, rel=0.05)
    assert 0.2 < lengths.std().item() / mean < 0.4
    assert len({tuple(row) for row in tokens.tolist()}) == 256
    assert all(row[int(length) :].sum() == 0 for row, length in zip(tokens, lengths, strict=True))
