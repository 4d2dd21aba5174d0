from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from benches import data
from benches.data import baseline_batch, bench_data, data_case, draw, jpeg_file, our_batch
from benches.measure import BenchOptions
from training.settings.augment import AugmentConfig


@pytest.fixture
def one_thread() -> object:
    """The case sets its process's threads; here it runs in ours."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_the_files_are_photographs_of_500_pixels() -> None:
    files = [jpeg_file(index) for index in range(3)]
    assert len(set(files)) == 3 and all(40_000 < len(file) < 120_000 for file in files)
    assert Image.open(io.BytesIO(files[0])).size == (500, 375)


@pytest.mark.parametrize("num_ops", [0, 2])
def test_both_sides_make_the_same_batch(num_ops: int) -> None:
    config = AugmentConfig(rand_augment_ops=num_ops)
    files = [jpeg_file(index) for index in range(6)]
    ours = our_batch(files, config)
    theirs = baseline_batch(files, [draw(index, data.DATA_PICTURE, config) for index in range(6)])
    assert ours.shape == theirs.shape == (6, 3, 256, 256) and ours.dtype == torch.uint8
    difference = (ours / 255 - (theirs * data._STD.view(3, 1, 1) + data._MEAN.view(3, 1, 1))).abs() * 255
    assert difference.mean() < 0.02 and (num_ops or difference.max() <= 2.01)


@pytest.mark.parametrize("normalise", [True, False])
def test_a_case_has_its_figures(normalise: bool, monkeypatch: pytest.MonkeyPatch, one_thread: object) -> None:
    monkeypatch.setattr(data, "DATA_BATCH", 3)
    row = data_case(num_ops=0, normalise=normalise, rounds=1)
    assert row.unit == "images/s" and row.ours > 0 and row.ratio == pytest.approx(row.ours / row.baseline)
    assert row.case == f"crop, batch 3, {'normalised' if normalise else 'uint8'}"
    assert row.max_abs_diff is not None and 0 < row.max_abs_diff <= 2.01


def test_the_bench_has_four_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "in_own_process", lambda function, *arguments: (function, *arguments))
    rows = list(bench_data(BenchOptions(False, 4, torch.device("cpu"), "fp32")))
    assert [row[1:] for row in rows] == [(0, False, 4), (0, True, 4), (2, False, 4), (2, True, 4)]
