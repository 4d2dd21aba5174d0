"""With TF32 on for the towers, losses, PCA and their gradients are still those of full float32.

The CPU has no TF32. A dispatch mode rounds the inputs of float32 matrix products as a GPU would, whenever torch's
setting says so at the time of the product.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eval.base.processes import Runtime
from eval.base.tf32 import allow_tf32, full_float32
from loss_mixes import Case, batch_of, options_of, student_of, teacher_of
from training.distillation import assemble
from training.features import Outputs, TeacherOutputs
from training.objective import Objective
from training.step import backward_step
from training.teachers import Teachers

_PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "mv"}
_DROPPED = 13  # bits of float32's mantissa that TF32 leaves out
CASE = Case(
    {"clip_long": 1.0, "clip_short": 0.5, "crd_long": 1.0, "vrd_long": 1.0, "fd_image": 1.0, "attention_text": 1.0},
    settings={"head_match": "mean"},
)


def setting() -> bool:
    products = torch.backends.cuda.matmul
    if hasattr(products, "fp32_precision"):
        return products.fp32_precision == "tf32"
    return products.allow_tf32


def to_tf32(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return value
    bits = value.contiguous().view(torch.int32)
    return ((bits + (1 << (_DROPPED - 1))) & -(1 << _DROPPED)).view(torch.float32)


class EmulatedTf32(TorchDispatchMode):
    """Rounds the inputs of products under the setting of the moment, and counts both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.rounded = self.full = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in _PRODUCTS and any(isinstance(value, Tensor) and value.dtype == torch.float32 for value in args):
            if setting():
                self.rounded += 1
                addends = 1 if name.startswith(("addmm", "baddbmm")) else 0  # what is added is not rounded
                args = (*args[:addends], *(to_tf32(value) for value in args[addends:]))
            else:
                self.full += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def tf32_on() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    allow_tf32(True)
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


class Recorded(Objective):
    """An objective that keeps what it was given."""

    def __call__(self, outputs: Outputs, teacher: TeacherOutputs | None, *tokens: Tensor) -> dict[str, Tensor]:
        object.__setattr__(self, "given", (outputs, teacher, tokens))
        return super().__call__(outputs, teacher, *tokens)


def step(accumulation: int = 1, case: Case = CASE) -> tuple[dict[str, Tensor], Recorded]:
    """One step of a small student; the losses and the objective, which knows the gradients of its inputs."""
    torch.manual_seed(0)
    found = assemble(student_of(case).float().train(), Teachers([teacher_of(0, 24).float()]), options_of(case))
    objective = Recorded(**vars(found.objective))
    losses = backward_step(
        found.distiller, batch_of(Runtime(0, 1, torch.device("cpu"))), objective, found.teachers,
        precision="fp32", accumulation=accumulation, scaler=torch.amp.GradScaler("cpu", enabled=False), key=(0, 0),
    )  # fmt: skip
    return losses, objective


def differences(accumulation: int = 1, case: Case = CASE) -> dict[str, float]:
    """Losses and gradients of a step under emulated TF32, less those that float32 gives for the same features."""
    with EmulatedTf32() as products:
        losses, objective = step(accumulation, case)
    assert products.rounded > 20, "the towers' products are rounded"
    outputs, teacher, tokens = objective.given
    leaves = outputs.map(lambda tensor: tensor.detach().requires_grad_())
    expected = Objective.__call__(objective, leaves, teacher, *tokens)
    expected["loss"].backward()
    found = {name: float((losses[name] - value.detach()).abs()) for name, value in expected.items()}
    pairs = [*zip(outputs.rows(), leaves.rows(), strict=True)]
    pairs += zip(outputs.parameters.tensors(), leaves.parameters.tensors(), strict=True)
    for number, (ours, exact) in enumerate(pairs):
        if exact.grad is not None:
            assert ours.grad is not None
            found[f"gradient {number}"] = float((ours.grad - exact.grad).abs().max())
    assert len(found) > len(expected) + 4
    return found


CASES = [(1, CASE), (2, Case({name: weight for name, weight in CASE.losses.items() if name != "attention_text"}))]


@pytest.mark.usefixtures("tf32_on")
@pytest.mark.parametrize(("accumulation", "case"), CASES)
def test_losses_and_their_gradients_are_full_float32(accumulation: int, case: Case) -> None:
    assert set(differences(accumulation, case).values()) == {0.0}


@pytest.mark.usefixtures("tf32_on")
@pytest.mark.parametrize(("accumulation", "case"), CASES)
def test_without_the_guard_they_would_be_rounded(
    accumulation: int, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.step.full_float32", nullcontext)
    found = differences(accumulation, case)
    assert all(value > 1e-6 for name, value in found.items() if name in ("clip_long", "crd_long", "vrd_long", "loss"))
    assert sum(value > 0 for name, value in found.items() if name.startswith("gradient")) > 3


@pytest.mark.usefixtures("tf32_on")
def test_the_setting_comes_back() -> None:
    with pytest.raises(KeyError), full_float32():
        assert not setting()
        raise KeyError
    assert setting() and torch.backends.cuda.matmul.allow_tf32
    allow_tf32(False)
    with full_float32():
        assert not setting()
    assert not setting() and not torch.backends.cuda.matmul.allow_tf32
