"""The stretch, row by row, against the formulas of the paper and of the published weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from longclip_teacher.errors import InputError
from longclip_teacher.positions import stretch_positions


@pytest.fixture
def table() -> torch.Tensor:
    return torch.randn(77, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_published_table_row_by_row(table: torch.Tensor) -> None:
    old = table.numpy()
    expected = np.zeros((248, 6))
    expected[:20] = old[:20]
    for i in range(56):
        for j in range(4):
            expected[20 + 4 * i + j] = ((4 - j) * old[20 + i] + j * old[21 + i]) / 4
    for j in range(4):
        expected[244 + j] = old[76] + j / 4 * (old[76] - old[75])
    np.testing.assert_allclose(stretch_positions(table).numpy(), expected, atol=1e-12)


def test_paper_variant_keeps_20_and_ends_on_the_last_row(table: torch.Tensor) -> None:
    old = table.numpy()
    stretched = stretch_positions(table, method="paper").numpy()
    np.testing.assert_array_equal(stretched[:20], old[:20])
    where = np.linspace(20, 76, 228)
    expected = np.stack([np.interp(where, np.arange(77), old[:, column]) for column in range(6)], axis=1)
    np.testing.assert_allclose(stretched[20:], expected, atol=1e-12)
    np.testing.assert_allclose(stretched[-1], old[-1], atol=1e-12)
    assert np.abs(stretched[100] - stretch_positions(table).numpy()[100]).max() > 1e-3


def test_shorter_contexts_are_prefixes(table: torch.Tensor) -> None:
    assert torch.equal(stretch_positions(table, 77), table)
    assert torch.equal(stretch_positions(table, 30), table[:30])
    assert torch.equal(stretch_positions(table, 128), stretch_positions(table)[:128])
    assert stretch_positions(table, 400, method="paper").shape == (400, 6)


def test_the_result_is_a_copy_and_keeps_its_type(table: torch.Tensor) -> None:
    same = stretch_positions(table, 77)
    same += 1
    assert not torch.equal(same, table)
    assert stretch_positions(table.half()).dtype == torch.float16


@pytest.mark.parametrize(("rows", "context_length"), [(77, 249), (21, 40), (5, 6)])
def test_impossible_lengths_are_named(rows: int, context_length: int) -> None:
    with pytest.raises(InputError, match=str(rows)):
        stretch_positions(torch.zeros(rows, 4), context_length)
