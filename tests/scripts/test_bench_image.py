"""The bench of the image tower measures what it says."""

from __future__ import annotations

import pytest
import torch

from benches import image
from benches.image import bench_image, image_case
from benches.measure import BenchOptions
from mobileclip_student.inference import choose_backend

OPTIONS = BenchOptions(full=False, rounds=1, device=torch.device("cpu"), precision="fp32")


def test_a_case_compares_equal_features() -> None:
    threads = torch.get_num_threads()
    row = image_case("tiny", 2, "eager", OPTIONS, threads)
    assert row.case.startswith(f"tiny 48 px, batch 2, {threads} threads, fused eager")
    assert row.ratio == pytest.approx(row.baseline / row.ours) and row.ours > 0
    assert row.max_abs_diff is not None and 0 < row.max_abs_diff < 1e-5


def test_each_backend_is_a_row_and_one_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, str]] = []
    monkeypatch.setattr(image, "in_own_process", lambda function, variant, *args: asked.append(args[:2]))
    assert len(list(bench_image(OPTIONS))) == len(asked)
    assert {size for size, _ in asked} == {1, 8}
    assert {(1, "eager"), (8, choose_backend(OPTIONS.device))} <= set(asked)
