"""Two processes equal one, chunks equal the whole batch, and a step leaves the right things behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ranks import run_ranks
from training.losses.table import LOSSES

ALL_LOSSES = {loss.option(part) for loss in LOSSES if loss.family != "layer" for part in loss.parts}
ALL_LOSSES |= {"loss"}
SCRIPT = Path(__file__).with_name("one_step.py")


def run(
    out: Path,
    *,
    world_size: int,
    accumulation: int = 1,
    pca_scope: str = "global",
    losses: str = "streaming",
    layers: str = "none",
) -> dict[str, dict[str, torch.Tensor]]:
    run_ranks([str(SCRIPT), str(out), str(accumulation), pca_scope, losses, layers], world_size)
    return torch.load(out, weights_only=True)


def assert_equal(ours: dict[str, dict[str, torch.Tensor]], reference: dict[str, dict[str, torch.Tensor]]) -> None:
    assert set(ours["losses"]) == set(reference["losses"])
    assert set(ours["losses"]) >= ALL_LOSSES
    for name, value in reference["losses"].items():
        torch.testing.assert_close(ours["losses"][name], value, rtol=1e-6, atol=0)
    for name, grad in reference["grads"].items():
        assert grad is not None, name
        error = (ours["grads"][name] - grad).norm() / grad.norm().clamp_min(1e-12)
        assert error < 1e-6, f"{name}: relative error {error:.1e}"
    assert reference["grads"]["model.logit_scale"].abs() > 1e-3
    for name in ("project.image.weight", "mixture.text", "log_scales.icl", "log_scales.afd", "log_scales.vrd"):
        assert reference["grads"][name].norm() > 1e-5, name


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    return run(tmp_path_factory.mktemp("one") / "step.pt", world_size=1)


def test_two_processes_equal_one(one_process: dict, tmp_path: Path) -> None:
    assert_equal(run(tmp_path / "step.pt", world_size=2), one_process)


def test_losses_between_layers_on_two_processes(tmp_path: Path) -> None:
    """Processes with captions of other lengths weigh their tokens, not themselves."""
    one, two = (run(tmp_path / f"{n}.pt", world_size=n, layers="layers") for n in (1, 2))
    assert {loss.option("text") for loss in LOSSES if loss.family == "layer"} <= set(one["losses"])
    assert_equal(two, one)


@pytest.mark.parametrize("world_size", [1, 2])
def test_streaming_losses_equal_full_matrices(one_process: dict, tmp_path: Path, world_size: int) -> None:
    assert_equal(run(tmp_path / "step.pt", world_size=world_size, losses="full"), one_process)


def test_chunks_equal_the_whole_batch(one_process: dict, tmp_path: Path) -> None:
    assert_equal(run(tmp_path / "step.pt", world_size=1, accumulation=3), one_process)


def test_chunks_on_two_processes_equal_the_whole_batch(one_process: dict, tmp_path: Path) -> None:
    assert_equal(run(tmp_path / "step.pt", world_size=2, accumulation=2), one_process)


def test_pca_of_each_process_depends_on_their_number(one_process: dict, tmp_path: Path) -> None:
    """The published scope, kept as an option: the short losses differ, the long ones do not."""
    two = run(tmp_path / "step.pt", world_size=2, pca_scope="rank")
    torch.testing.assert_close(two["losses"]["clip_long"], one_process["losses"]["clip_long"], rtol=1e-6, atol=0)
    assert (two["losses"]["clip_short"] - one_process["losses"]["clip_short"]).abs() > 1e-4
