from __future__ import annotations

import itertools
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import nn

import eval.probes
from eval.benchmarks.labelled_features import LabelledFeatures
from eval.benchmarks.labelled_images import find_labelled_images
from eval.probes import (
    GRID,
    SweepStep,
    evaluate_probes,
    knn_answers,
    linear_answers,
    search_c,
    stratified_split,
)
from longclip_teacher.errors import InputError


def clusters(num_classes: int, per_class: int, noise: float, seed: int) -> LabelledFeatures:
    """Unit-norm features around one random centre per class; the centres are the same for every seed."""
    centres = torch.randn(num_classes, 12, generator=torch.Generator().manual_seed(99))
    targets = torch.arange(num_classes).repeat(per_class)
    spread = torch.randn(len(targets), 12, generator=torch.Generator().manual_seed(seed))
    return LabelledFeatures(F.normalize(centres[targets] + noise * spread, dim=-1), targets, [])


def accuracy(answers: torch.Tensor, targets: torch.Tensor) -> float:
    return float((answers == targets).double().mean() * 100)


def test_separate_classes_are_all_found() -> None:
    train, test = clusters(5, 12, 0.05, seed=0), clusters(5, 9, 0.05, seed=1)
    answers, _, _ = linear_answers(train, test.features)
    assert accuracy(answers, test.targets) == 100.0
    for found in knn_answers(train, test.features).values():
        assert accuracy(found, test.targets) == 100.0


def test_shuffled_labels_give_chance() -> None:
    """A quarter on average over the shuffles, each of which favours some classes."""
    train, test = clusters(4, 40, 1.0, seed=0), clusters(4, 100, 1.0, seed=1)
    assert accuracy(linear_answers(train, test.features)[0], test.targets) > 60
    linear, neighbours = [], []
    for seed in range(12):
        order = torch.randperm(len(train.targets), generator=torch.Generator().manual_seed(seed))
        shuffled = LabelledFeatures(train.features, train.targets[order], [])
        linear.append(accuracy(linear_answers(shuffled, test.features)[0], test.targets))
        neighbours.append(accuracy(knn_answers(shuffled, test.features, [20])[20], test.targets))
    for found in (linear, neighbours):
        assert abs(np.mean(found) - 25) < 15  # three standard errors: one shuffle's accuracy spreads by 16


def test_answers_have_the_class_numbers() -> None:
    train, test = clusters(3, 12, 0.05, seed=0), clusters(3, 6, 0.05, seed=1)
    numbers = torch.tensor([4, 900, 17])
    renamed = LabelledFeatures(train.features, numbers[train.targets], [])
    assert accuracy(linear_answers(renamed, test.features)[0], numbers[test.targets]) == 100.0
    assert accuracy(knn_answers(renamed, test.features, [3])[3], numbers[test.targets]) == 100.0


def test_the_grid_is_96_steps_of_an_eighth_decade() -> None:
    assert len(GRID) == 97 and GRID[0] == pytest.approx(1e-6) and GRID[-1] == pytest.approx(1e6)
    assert all(right / left == pytest.approx(10**0.125) for left, right in itertools.pairwise(GRID))


@pytest.mark.parametrize("peak", range(0, 97, 5))
def test_the_search_finds_every_single_peak(peak: int) -> None:
    def try_c(c: float) -> SweepStep:
        return SweepStep(c, -abs(math.log10(c) - math.log10(GRID[peak])), 1.0, True)

    sweep = search_c(try_c)
    assert max(sweep, key=lambda step: step.accuracy).c == GRID[peak]
    cs = [step.c for step in sweep]
    assert cs == sorted(set(cs)) and len(cs) <= 7 + 2 * 4  # each tried once; four halvings after the coarse sweep
    assert set(GRID[::16]) <= set(cs)


def test_log_loss_decides_between_equal_accuracies() -> None:
    sweep = search_c(lambda c: SweepStep(c, 50.0, abs(math.log10(c) - 2.5), True))
    assert min(sweep, key=lambda step: step.log_loss).c == pytest.approx(10**2.5)


def noisy_classes(num_images: int, num_dims: int, seed: int) -> LabelledFeatures:
    """Two classes that differ in two faint dimensions of many, a tenth of the labels wrong: C must not be too small to
    see them, nor so large that it learns the noise."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, 2, (num_images,), generator=generator)
    features = torch.randn(num_images, num_dims, generator=generator)
    features[:, 0] *= 3
    features[:, 1:] *= 0.1
    features[:, 1] += 0.12 * (2 * targets - 1)
    features[:, 2] += 0.1 * (2 * targets - 1)
    wrong = torch.rand(num_images, generator=generator) < 0.1
    return LabelledFeatures(F.normalize(features, dim=-1), torch.where(wrong, 1 - targets, targets), [])


@pytest.mark.parametrize(("train", "within"), [(noisy_classes(600, 60, 1), 1), (noisy_classes(400, 30, 0), 8)])
def test_the_search_finds_what_the_full_sweep_finds(train: LabelledFeatures, within: int) -> None:
    """Against scikit-learn called for all 97 values: the best accuracy, at the sweep's C or within one step of it where
    the accuracy has one peak, within a decade where it is ragged (40 validation pictures, the same accuracy twice)."""
    _, best, sweep = linear_answers(train, train.features[:1], seed=0)
    features, targets = train.features.numpy(), train.targets.numpy()
    fit, validation = stratified_split(targets, 0)
    full = []
    for c in GRID:
        model = LogisticRegression(C=c, max_iter=1000).fit(features[fit], targets[fit])
        chances = model.predict_proba(features[validation])[np.arange(len(validation)), targets[validation]]
        correct = model.predict(features[validation]) == targets[validation]
        full.append((correct.mean() * 100, np.log(np.maximum(chances, 1e-30)).mean()))
    assert (best.accuracy, -best.log_loss) == pytest.approx(full[GRID.index(best.c)])
    assert best.accuracy == pytest.approx(max(full)[0])
    assert abs(GRID.index(best.c) - full.index(max(full))) <= within
    assert len(sweep) <= 15 and best.accuracy > full[0][0] + 20 and best.accuracy > full[-1][0] + 5


def test_the_split_is_stratified_and_seeded() -> None:
    targets = np.repeat([0, 1, 2, 3], [50, 20, 2, 1])
    fit, validation = stratified_split(targets, 7)
    assert sorted([*fit, *validation]) == list(range(73))
    assert np.bincount(targets[validation]).tolist() == [5, 2, 1]
    np.testing.assert_array_equal(validation, stratified_split(targets, 7)[1])
    assert validation.tolist() != stratified_split(targets, 8)[1].tolist()
    with pytest.raises(InputError, match="no class has two training pictures"):
        stratified_split(np.array([1, 2, 3]), 0)


def test_neighbours_vote_as_in_a_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eval.probes, "_SIMILARITIES_AT_ONCE", 90 * 7)  # several blocks, the last one short
    train, test = clusters(6, 15, 3.0, seed=3), clusters(6, 10, 3.0, seed=4)
    found = knn_answers(train, test.features, [1, 20, 90, 200])
    assert list(found) == [1, 20, 90]  # 200 neighbours are not there
    for k, answers in found.items():
        for row, feature in enumerate(test.features.double()):
            cosines = sorted(
                ((float(feature @ other.double()), int(target)) for other, target in zip(*_pairs(train), strict=True)),
                reverse=True,
            )
            votes = [0.0] * 6
            for cosine, target in cosines[:k]:
                votes[target] += math.exp(cosine / 0.07)
            assert int(answers[row]) == votes.index(max(votes))
    assert len({tuple(answers.tolist()) for answers in found.values()}) == 3  # k makes a difference here


def _pairs(labelled: LabelledFeatures) -> tuple[torch.Tensor, list[int]]:
    return labelled.features, labelled.targets.tolist()


def test_figures_on_pictures(colour_model: nn.Module, colour_classes: Path, tmp_path: Path) -> None:
    shutil.copytree(colour_classes, tmp_path / "test")
    for wrong in ("red_board", "white_board"):  # filed under a class they are not
        shutil.copy(colour_classes / "black_board" / "0.png", tmp_path / "test" / wrong / "black.png")
    train, test = find_labelled_images(colour_classes), find_labelled_images(tmp_path / "test")
    result = evaluate_probes(colour_model, train, test)
    assert (result["num_train"], result["num_test"], result["num_classes"]) == (24, 26, 8)
    for figures in (result["linear"], result["knn"]["1"], result["knn"]["20"]):
        assert figures["top1"] == pytest.approx(24 / 26 * 100)
        assert figures["mean_per_class"] == pytest.approx((6 * 100 + 2 * 75) / 8)
    assert list(result["knn"]) == ["1", "20"] and 7 <= len(result["linear"]["sweep"]) <= 15
    assert result["linear"]["c"] in {step["c"] for step in result["linear"]["sweep"]}


def test_sets_with_different_classes_are_refused(colour_model: nn.Module, colour_classes: Path, tmp_path: Path) -> None:
    shutil.copytree(colour_classes, tmp_path / "test")
    (tmp_path / "test" / "red_board").rename(tmp_path / "test" / "pink_board")
    with pytest.raises(InputError, match="have different classes, the first that only one has: pink board"):
        evaluate_probes(colour_model, find_labelled_images(colour_classes), find_labelled_images(tmp_path / "test"))


def called(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["probes.py", *map(str, arguments)])
    try:
        eval.probes.run_command(eval.probes.main)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_the_command(
    colour_model: nn.Module,
    colour_classes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(eval.probes.Options, "load", lambda options: colour_model)
    shutil.copytree(colour_classes, tmp_path / "test")
    common = ("--checkpoint", "colours", "--test", tmp_path / "test", "--num-workers", 0, "--device", "cpu")
    output = ("--json", tmp_path / "out.json")
    assert called(monkeypatch, *common, "--train", colour_classes, *output) == 0
    shown = capsys.readouterr()
    assert "linear, C" in shown.out and "20 nearest neighbours" in shown.out and "C 1e-06:" in shown.err
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["linear"]["top1"] == result["knn"]["1"]["top1"] == 100.0
    assert result["checkpoint"] == "colours" and result["train"] == str(colour_classes)
    for arguments, message in (
        (common, "pass --train DIR"),
        (("--checkpoint", "colours", "--train", colour_classes), "pass --test DIR"),
        ((*common, "--train", f"{tmp_path}/classes/../test"), "hold pictures out"),
        ((*common, "--train", colour_classes, "--dataset", "cifar10"), "CIFAR-10 is read from"),
    ):
        assert called(monkeypatch, *arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and message in line
