"""PCA of a batch that several processes share: one rank's eigenvectors are every rank's.

Eigenvectors are unique up to signs, those of equal eigenvalues up to a rotation. Here the second of two processes has
an eigh that returns other ones than the first. Losses and gradients must be those of one process.

Run as a program (OUT, under torchrun's environment variables) it is one process of one or two.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from eval.base.processes import Runtime, start
from ranks import run_ranks
from training.data.store import TeacherInfo
from training.features import Features, LossParameters, Outputs, TeacherOutputs
from training.objective import Objective
from training.settings.losses import LossOptions
from training.settings.needs import needs_of

BATCH, WIDTH, RANK = 16, 8, 3
WEIGHTS = {"clip_short": 1.0, "crd_short": 1.0, "vrd_short": 1.0}
OPTIONS = LossOptions(**(dict.fromkeys(LossOptions().weights, 0.0) | WEIGHTS), pca_rank=RANK)


def images() -> dict[str, Tensor]:
    """Rows by which of their eigenvalues are equal."""
    axes = torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)]).double()  # the variance is the same along every axis
    lengths = torch.tensor([2.0] * RANK + [1 - 0.1 * axis for axis in range(WIDTH - RANK)]).repeat(2)[:, None]
    return {"none": _rows(0), "the kept ones": lengths * axes, "all, across the cut": axes}


def _rows(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(BATCH, WIDTH, generator=generator, dtype=torch.float64), dim=1)


def another_eigh(eigh: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """An eigh that is as right as `eigh`: signs are flipped, and equal eigenvalues have rotated eigenvectors."""

    def found(matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = eigh(matrix)
        signs = 1 - 2 * (torch.arange(len(values)) % 2)
        generator = torch.Generator().manual_seed(9)
        for value in values:
            equal = (values - value).abs() < 1e-9
            count = int(equal.sum())
            rotation, _ = torch.linalg.qr(torch.randn(count, count, generator=generator, dtype=values.dtype))
            vectors[:, equal] = vectors[:, equal] @ rotation
        vectors = vectors * signs
        torch.testing.assert_close(vectors @ torch.diag(values) @ vectors.T, matrix, rtol=0, atol=1e-12)
        return values, vectors

    return found


def losses_and_gradients(image: Tensor, runtime: Runtime, *, streaming: bool) -> list[Tensor]:
    """The losses, and the gradients of images and short captions over all processes."""
    share = BATCH // runtime.world_size
    mine = slice(runtime.rank * share, (runtime.rank + 1) * share)
    leaves = [side[mine].clone().requires_grad_() for side in (image, _rows(1))]
    teacher = TeacherOutputs(Features(image=image[mine], short=_rows(2)[mine]))
    info = TeacherInfo((WIDTH,), 20.0, 16)
    objective = Objective(
        OPTIONS, needs_of(OPTIONS, with_teacher=True), {"long": info, "short": info}, streaming=streaming
    )
    outputs = Outputs(
        Features(image=leaves[0], short=leaves[1]),
        Features(),
        LossParameters(torch.tensor(10.0, dtype=torch.float64), {"vrd": torch.tensor(5.0, dtype=torch.float64)}),
    )
    tokens = torch.zeros(share, 3, dtype=torch.long)
    losses = objective(outputs, teacher, tokens, tokens)
    losses["loss"].backward()
    # gather multiplies by the number of processes, and DDP divides by it
    gradients = [leaf.grad / runtime.world_size for leaf in leaves if leaf.grad is not None]
    return [losses["loss"].detach(), *gradients]


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Tensor]]]:
    """What one process finds, and what each of two finds."""
    out = tmp_path_factory.mktemp("ranks")
    for world_size in (1, 2):
        run_ranks([__file__, str(out)], world_size)
    return [torch.load(out / name, weights_only=True) for name in ("0 of 1.pt", "0 of 2.pt", "1 of 2.pt")]


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("equal", list(images()))
def test_gradients_are_those_of_one_process(
    computed: list[dict[str, list[Tensor]]], equal: str, streaming: bool
) -> None:
    alone, *shared = [found[f"{equal} {streaming}"] for found in computed]
    for found in shared:
        torch.testing.assert_close(found[0], alone[0], rtol=1e-12, atol=0)
    assert len(alone) == 3
    for number in (1, 2):
        together = torch.cat([found[number] for found in shared])
        largest = alone[number].abs().max().item()
        assert largest > 1e-3
        torch.testing.assert_close(together, alone[number], rtol=0, atol=1e-10 * largest)


def main() -> None:
    with start("cpu") as runtime:
        if runtime.rank == 1:
            torch.linalg.eigh = another_eigh(torch.linalg.eigh)
        found = {
            f"{equal} {streaming}": losses_and_gradients(image, runtime, streaming=streaming)
            for equal, image in images().items()
            for streaming in (True, False)
        }
        torch.save(found, Path(sys.argv[1]) / f"{runtime.rank} of {runtime.world_size}.pt")


if __name__ == "__main__":
    main()
