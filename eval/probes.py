"""Classify with a model's image features alone, without its text tower: a linear probe, and k nearest neighbours.

Both use unit-norm embeddings, the features that retrieval and zero-shot classification compare. CLIP's paper probes
the image tower before the projection instead, so its figures cannot be compared with these.

Shapes: N training pictures, M test pictures, C classes, D embedding width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Table

from eval.base.arguments import answer_early, read_options
from eval.benchmarks.dataset_names import DatasetName
from eval.command_line import EvaluationOptions
from longclip_teacher.errors import InputError, run_command


@dataclass
class Options(EvaluationOptions):
    """Linear probe and k-nearest-neighbour accuracy of the image features of a student, a teacher or published weights.

    python eval/probes.py --checkpoint runs/distil --train data/pets/train --test data/pets/test --json probes.json
    python eval/probes.py --checkpoint longclip-b --dataset cifar10 --train data/cifar --test data/cifar
    """

    train: Annotated[str | None, tyro.conf.arg(metavar="DIR|'DIR/*.tar'")] = None
    """Labelled training pictures: one folder per class, or shards with .jpg and .cls; for CIFAR, its folder."""
    test: Annotated[str | None, tyro.conf.arg(metavar="DIR|'DIR/*.tar'")] = None
    """Labelled test pictures of the same classes; none of them may be among those of --train."""
    dataset: DatasetName = "auto"
    """Which set both belong to, as for eval/zeroshot_imagenet.py."""
    seed: int = 0
    """Seed that draws the tenth of the training pictures on which C is chosen."""

    def check(self) -> None:
        """Raise InputError for options that cannot work, before any data is read."""
        if self.train is None or self.test is None:
            lacking = "--train" if self.train is None else "--test"
            raise InputError(
                f"pass {lacking} DIR: a probe is trained on the pictures of --train and tested on those of --test"
            )
        super().check()


if __name__ == "__main__":
    answer_early(Options)  # --help and refused options end here: the imports below take seconds

import numpy as np
import torch
from jaxtyping import Float, Int64
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from eval.base.consoles import plain_console
from eval.benchmarks.labelled_features import LabelledFeatures, encode_labelled
from eval.benchmarks.labelled_images import LabelledImages, find_labelled_images
from eval.measures.confusion import confusion_matrix, mean_recall
from eval.towers.features import Encoding, show_track
from eval.towers.models import ClipModel
from longclip_teacher.atomic_files import write_json

__all__ = ["SweepStep", "evaluate_probes", "knn_answers", "linear_answers", "search_c", "stratified_split"]

STEPS_PER_DECADE = 8
GRID = tuple(10 ** (step / STEPS_PER_DECADE - 6) for step in range(12 * STEPS_PER_DECADE + 1))  # 1e-6 ... 1e6
COARSE_STEPS = 2 * STEPS_PER_DECADE  # the search starts at every second decade
MAX_ITERATIONS = 1000
VALIDATION_SHARE = 0.1
NEIGHBOURS = (1, 20, 200)
MAIN_NEIGHBOURS = 20
TEMPERATURE = 0.07
_SIMILARITIES_AT_ONCE = 1 << 25


@dataclass(frozen=True)
class SweepStep:
    """Result of one C on the validation split: accuracy in percent, mean negative log-likelihood in nats."""

    c: float
    accuracy: float
    log_loss: float
    converged: bool
    """Whether the fit converged within 1000 iterations."""


def stratified_split(targets: Int64[np.ndarray, " N"], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the fit part and of the validation part, which has a tenth of each class (at least one picture).

    `seed` draws them. A class of one picture is in the fit part only. InputError if no class has two pictures.
    """
    generator = np.random.default_rng(seed)
    fit, validation = [], []
    for number in np.unique(targets):
        rows = generator.permutation(np.flatnonzero(targets == number))
        num_held_out = max(1, round(VALIDATION_SHARE * len(rows))) if len(rows) > 1 else 0
        validation.append(rows[:num_held_out])
        fit.append(rows[num_held_out:])
    if not any(len(rows) for rows in validation):
        raise InputError("no class has two training pictures: the choice of C needs one to fit and one to check")
    return np.sort(np.concatenate(fit)), np.sort(np.concatenate(validation))


def search_c(try_c: Callable[[float], SweepStep]) -> list[SweepStep]:
    """Every C that CLIP's parametric binary search tries (Radford et al. 2021, appendix A.3), in increasing order.

    The grid has 96 steps of equal ratio from 1e-6 to 1e6, 8 per decade. The search tries every second decade, then the
    points half as far to the left and right of the best so far, down to neighbours on the grid. The best C has the
    highest accuracy and, among equals, the lowest log loss. The search finds a peak, not always the highest one.
    """
    tried = {step: try_c(GRID[step]) for step in range(0, len(GRID), COARSE_STEPS)}
    width = COARSE_STEPS
    while width > 1:
        width //= 2
        peak = max(tried, key=lambda step: _merit(tried[step]))
        for step in (peak - width, peak + width):
            if 0 <= step < len(GRID) and step not in tried:
                tried[step] = try_c(GRID[step])
    return [tried[step] for step in sorted(tried)]


def linear_answers(
    train: LabelledFeatures, test_features: Float[Tensor, "M D"], seed: int = 0, show_progress: bool = False
) -> tuple[Int64[Tensor, " M"], SweepStep, list[SweepStep]]:
    """The answers of logistic regression on frozen features, the chosen C, and every C that was tried.

    A validation split of the training pictures chooses C; the final fit uses all of them.
    """
    features, targets = train.features.cpu().numpy(), train.targets.cpu().numpy()
    fit, validation = stratified_split(targets, seed)
    if len(np.unique(targets)) < 2:
        raise InputError("all training pictures are of one class: give at least two classes")
    console = plain_console(stderr=True)

    def try_c(c: float) -> SweepStep:
        model, converged = _fit(features[fit], targets[fit], c)
        probabilities = model.predict_proba(features[validation])
        own = probabilities[np.arange(len(validation)), np.searchsorted(model.classes_, targets[validation])]
        correct = model.classes_[probabilities.argmax(axis=1)] == targets[validation]
        log_loss = -np.log(np.maximum(own, np.finfo(own.dtype).tiny)).mean()
        step = SweepStep(c, float(correct.mean() * 100), float(log_loss), converged)
        if show_progress:
            console.print(f"C {c:.3g}: {step.accuracy:.1f}% on the validation split")
        return step

    sweep = search_c(try_c)
    best = max(sweep, key=_merit)
    model, _ = _fit(features, targets, best.c)
    return torch.from_numpy(model.predict(test_features.cpu().numpy())), best, sweep


def knn_answers(
    train: LabelledFeatures,
    test_features: Float[Tensor, "M D"],
    num_neighbours: Sequence[int] = NEIGHBOURS,
    show_progress: bool = False,
) -> dict[int, Int64[Tensor, " M"]]:
    """For each k <= N: the class of each test picture by the votes of its k nearest, weighted by exp(cos / T).

    T is 0.07, as in Wu et al. 2018 (equation 9's vote) and DINO. Features have unit norm.
    """
    allowed = [k for k in num_neighbours if k <= len(train.targets)]
    num_classes = int(train.targets.max()) + 1
    blocks = test_features.split(max(1, _SIMILARITIES_AT_ONCE // len(train.targets)))
    answers: dict[int, list[Tensor]] = {k: [] for k in allowed}
    for block in show_track(blocks, "neighbours" if show_progress else None, len(blocks)):
        nearest = (block @ train.features.T).topk(max(allowed), dim=1)  # [B,K], nearest first
        weights = ((nearest.values - 1) / TEMPERATURE).exp()  # without the factor exp(1/T), on which no vote depends
        classes = train.targets[nearest.indices]
        for k in allowed:
            votes = torch.zeros(len(block), num_classes, device=block.device)
            votes.scatter_add_(1, classes[:, :k], weights[:, :k])
            answers[k].append(votes.argmax(dim=1))
    return {k: torch.cat(parts) for k, parts in answers.items()}


def evaluate_probes(
    model: ClipModel, train: LabelledImages, test: LabelledImages, encoding: Encoding = Encoding(), seed: int = 0
) -> dict[str, Any]:
    """The figures of both probes, as in the JSON: percentages 0..100, and the sweep of C as a table.

    Raises InputError if the two sets have different classes.
    """
    _require_same_classes(train, test)
    train_features, test_features = encode_labelled(model, train, encoding), encode_labelled(model, test, encoding)
    unseen = sorted(set(test_features.targets.tolist()) - set(train_features.targets.tolist()))
    if unseen:
        raise InputError(
            f"{len(unseen)} classes of {test.source} have no picture in {train.source}, the first: "
            f"{test.classnames[unseen[0]]}"
        )
    neighbours = knn_answers(train_features, test_features.features, show_progress=encoding.show_progress)
    answers, best, sweep = linear_answers(train_features, test_features.features, seed, encoding.show_progress)
    num_classes = len(test.classnames)
    knn = {str(k): _figures(test_features.targets, found, num_classes) for k, found in neighbours.items()}
    return {
        "dataset": test.name,
        "train": train.source,
        "test": test.source,
        "num_train": len(train_features.targets),
        "num_test": len(test_features.targets),
        "num_classes": num_classes,
        "num_unreadable": len(train_features.unreadable) + len(test_features.unreadable),
        "unreadable": [lost.name for lost in (*train_features.unreadable, *test_features.unreadable)],
        "count_mismatch": train.count_mismatch(train_features.num_found)
        or test.count_mismatch(test_features.num_found),
        "features": "unit-norm embedding",
        "linear": {
            **_figures(test_features.targets, answers, num_classes),
            "c": best.c,
            "validation_share": VALIDATION_SHARE,
            "seed": seed,
            "sweep": [vars(step) for step in sweep],
        },
        "knn": knn,
    }


def _merit(step: SweepStep) -> tuple[float, float]:
    return step.accuracy, -step.log_loss


def _fit(features: np.ndarray, targets: np.ndarray, c: float) -> tuple[LogisticRegression, bool]:
    model = LogisticRegression(C=c, solver="lbfgs", max_iter=MAX_ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the sweep's table says it
        model.fit(features, targets)
    return model, int(model.n_iter_.max()) < MAX_ITERATIONS


def _figures(targets: Tensor, answers: Tensor, num_classes: int) -> dict[str, float]:
    matrix = confusion_matrix(targets, answers, num_classes)
    return {"top1": float(matrix.trace() * 100 / matrix.sum()), "mean_per_class": mean_recall(matrix)}


def _require_same_classes(train: LabelledImages, test: LabelledImages) -> None:
    if train.classnames == test.classnames:
        return
    alone = sorted(set(train.classnames) ^ set(test.classnames))
    what = f"the first that only one has: {alone[0]}" if alone else "in another order"
    raise InputError(f"{train.source} and {test.source} have different classes, {what}")


def main() -> None:
    """Run the command."""
    options = read_options(Options)
    assert options.train is not None and options.test is not None  # check() has seen to it
    train = find_labelled_images(options.train, dataset=options.dataset, split="train")
    test = find_labelled_images(options.test, dataset=options.dataset, split="test")
    if train.cifar is None and Path(options.train).resolve() == Path(options.test).resolve():
        raise InputError(f"--train and --test are both {options.test}: hold pictures out, in a folder of their own")
    result = {"checkpoint": options.checkpoint, "precision": options.precision}
    result |= evaluate_probes(options.load(), train, test, options.encoding(), options.seed)
    if options.json is not None:
        write_json(options.json, result)
    print_table(result)


def print_table(result: dict[str, Any]) -> None:
    """Print the figures as a table on stdout."""
    title = f"probes: {result['num_train']} training pictures, {result['num_test']} test pictures"
    table = Table(title=title, title_justify="left")
    for column in ("", "top-1 %", "mean per class %"):
        table.add_column(column, justify="right" if column else "left")
    linear = result["linear"]
    rows = {f"linear, C = {linear['c']:.3g}": linear}
    rows |= {f"{k} nearest neighbour{'s' * (k != '1')}": figures for k, figures in result["knn"].items()}
    for name, figures in rows.items():
        table.add_row(name, f"{figures['top1']:.1f}", f"{figures['mean_per_class']:.1f}")
    plain_console().print(table)
    if result["num_unreadable"]:
        print(f"{result['num_unreadable']} unreadable pictures were left out, the first: {result['unreadable'][0]}")
    unfinished = sum(not step["converged"] for step in linear["sweep"])
    if unfinished:
        print(f"{unfinished} of {len(linear['sweep'])} fits of the sweep stopped at {MAX_ITERATIONS} iterations")
    if result["count_mismatch"]:
        plain_console(stderr=True).print(f"warning: {result['count_mismatch']}", soft_wrap=True)


if __name__ == "__main__":
    run_command(main)
