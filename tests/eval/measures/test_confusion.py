from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval.measures.confusion import (
    confused_pairs,
    confusion_matrix,
    draw_confusion,
    mean_recall,
    recall_by_class,
)
from longclip_teacher.errors import InputError

TARGETS = torch.tensor([0, 0, 0, 1, 1, 3])
ANSWERS = torch.tensor([0, 2, 2, 1, 0, 2])
NAMES = ["cat", "dog", "fish", "owl", "never"]


def test_figures_by_hand() -> None:
    matrix = confusion_matrix(TARGETS, ANSWERS, len(NAMES))
    expected = np.zeros((5, 5), dtype=np.int64)
    for target, answer in zip(TARGETS.tolist(), ANSWERS.tolist(), strict=True):
        expected[target, answer] += 1
    np.testing.assert_array_equal(matrix, expected)
    assert mean_recall(matrix) == pytest.approx((100 / 3 + 50 + 0) / 3)  # three classes have pictures
    assert [row["class"] for row in recall_by_class(matrix, NAMES)] == ["cat", "dog", "owl"]
    assert [row["num_images"] for row in recall_by_class(matrix, NAMES)] == [3, 2, 1]
    assert [row["accuracy"] for row in recall_by_class(matrix, NAMES)] == pytest.approx([100 / 3, 50, 0])
    assert confused_pairs(matrix, NAMES) == [["cat", "fish", 2], ["dog", "cat", 1], ["owl", "fish", 1]]
    assert confused_pairs(matrix, NAMES, limit=1) == [["cat", "fish", 2]]
    np.testing.assert_array_equal(matrix, expected)  # drawing changes nothing


def test_at_most_twenty_pairs() -> None:
    assert len(confused_pairs(np.full((6, 6), 3), list("abcdef"))) == 20
    assert confused_pairs(np.diag([3, 4]), ["a", "b"]) == []


def text_in(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_a_small_matrix_has_names_and_percentages(tmp_path: Path) -> None:
    matrix = confusion_matrix(TARGETS, ANSWERS, len(NAMES))
    draw_confusion(matrix, ["$cat$", "dog", "fish" * 20, "owl", "never"], "4 classes", tmp_path / "a" / "plot.svg")
    drawn = text_in(tmp_path / "a" / "plot.svg")
    for text in ("$cat$", "dog", "owl", "4 classes", ">67<", ">33<", ">50<", ">100<"):
        assert text in drawn
    assert "never" not in drawn and "fish" * 20 not in drawn and "fishfish" in drawn
    draw_confusion(matrix, ["$cat$", "dog", "fish" * 20, "owl", "never"], "4 classes", tmp_path / "again.svg")
    assert text_in(tmp_path / "again.svg") == drawn


def test_each_of_a_million_cells_has_a_pixel(tmp_path: Path) -> None:
    matrix = np.diag(np.full(1000, 50))
    matrix[500, 20] = 1  # a single wrong answer in a million cells
    names = [f"class-{number}" for number in range(1000)]
    draw_confusion(matrix, names, "1000 classes", tmp_path / "with.png")
    matrix[500, 20] = 0
    draw_confusion(matrix, names, "1000 classes", tmp_path / "without.png")
    one, none = (
        np.asarray(Image.open(tmp_path / f"{name}.png").convert("L"), dtype=int) for name in ("with", "without")
    )
    assert one.shape == none.shape and (none - one).max() > 20


def test_a_large_matrix_has_numbers_that_are_the_classes(tmp_path: Path) -> None:
    matrix = np.zeros((500, 500), dtype=np.int64)
    matrix[np.arange(400, 500), np.arange(400, 500)] = 1
    draw_confusion(matrix, [f"class-{number}" for number in range(500)], "", tmp_path / "plot.svg")
    drawn = text_in(tmp_path / "plot.svg")
    assert ">440<" in drawn and ">40<" not in drawn  # numbers ignore classes without pictures
    assert "class-" not in drawn and "by class number" in drawn


def test_a_plot_of_unknown_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    for name in ("plot.jpeg", "plot", "folder.png"):
        with pytest.raises(InputError, match=r"ends in \.png or \.svg"):
            draw_confusion(np.eye(2, dtype=np.int64), ["a", "b"], "", tmp_path / name)
