"""The average of the weights: its formula, what it leaves alone, and its use by the loop for evaluation and saving."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eval.base.processes import start
from longclip_teacher.ancestry import NOT_RECORDED
from mobileclip_student import create_student
from training import loop
from training.checkpointing import TrainState
from training.data.mixing import mix
from training.data.samples import Batch
from training.data.shard_records import Contents
from training.distill import Distiller
from training.distillation import Distillation
from training.ema import ModelEma
from training.optim import learning_rate
from training.record.evaluate import Validation
from training.record.run_log import read_metrics
from training.settings.options import MixOptions
from training.settings.tree import parse_config

MOVES = torch.tensor(True)


def wander(model: nn.Module) -> None:
    """Move parameters, BatchNorm statistics and counters, as a training step does."""
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(torch.randn_like(value) if value.is_floating_point() else 1)


def expected(history: list[dict[str, Tensor]], decay: float) -> dict[str, np.ndarray]:
    """Return the average of the weights at the start and after each step, by the plain formula in float64."""
    averages = {name: value.double().numpy() for name, value in history[0].items()}
    for step, weights in enumerate(history[1:]):
        share = min(decay, (1 + step) / (10 + step))
        averages = {name: share * old + (1 - share) * weights[name].double().numpy() for name, old in averages.items()}
    return averages


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(("decay", "steps"), [(0.9, 120), (0.9999, 30), (0.3, 5)])
def test_the_average_is_the_plain_formula(decay: float, steps: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2).double())
    ema = ModelEma(model, decay)
    history = [snapshot(model)]
    for step in range(steps):
        wander(model)
        ema.update(model, step, MOVES)
        history.append(snapshot(model))
    averages = expected(history, decay)
    for name, value in ema.model.state_dict().items():
        if value.is_floating_point():
            np.testing.assert_allclose(value.numpy(), averages[name], rtol=1e-4, atol=1e-5, err_msg=name)
        else:
            assert value == history[-1][name] == steps, name
    for name, value in model.state_dict().items():
        assert torch.equal(value, history[-1][name]), f"{name}: the model is left alone"


def test_weights_that_stay_are_their_own_average() -> None:
    model = create_student("tiny", context_length=20)
    ema = ModelEma(model, 0.99)
    for step in range(20):
        ema.update(model, step, MOVES)
    for name, value in model.state_dict().items():
        assert torch.equal(value, ema.model.state_dict()[name]), name


def test_a_bad_step_leaves_the_average_alone() -> None:
    model = create_student("tiny", context_length=20)
    ema = ModelEma(model, 0.99)
    before = snapshot(ema.model)
    wander(model)
    for value, average in zip(model.buffers(), ema.model.buffers(), strict=True):
        value.copy_(average)  # the step's own business
    ema.update(model, 3, ~MOVES)
    assert all(torch.equal(value, before[name]) for name, value in ema.model.state_dict().items())


def test_the_copy_is_no_part_of_the_model() -> None:
    torch.manual_seed(0)
    model = create_student("tiny", context_length=20)
    names = list(model.state_dict())
    ema = ModelEma(model, 0.5)
    ours = {value.data_ptr() for value in model.state_dict().values()}
    assert not ours & {value.data_ptr() for value in ema.model.state_dict().values()}
    model.train()
    assert list(model.state_dict()) == names and all(p.requires_grad for p in model.parameters())
    assert not any(module.training for module in ema.model.modules())
    assert not any(p.requires_grad for p in ema.model.parameters())

    images, tokens = torch.rand(2, 3, 48, 48), torch.tensor([[49406, 5, 49407], [49406, 49407, 0]])
    for part in (model.text_encoder.token_embedding, model.image_encoder.trunk.head):
        wander(part)
    ema.update(model, 50, MOVES)
    reference = create_student("tiny", context_length=20)
    reference.load_state_dict(ema.model.state_dict())
    reference.eval()
    assert torch.equal(ema.model.encode_image(images), reference.encode_image(images))
    assert torch.equal(ema.model.encode_text(tokens), reference.encode_text(tokens))
    assert not torch.equal(ema.model.encode_text(tokens), model.eval().encode_text(tokens))


class Toy(nn.Module):
    """What the loop needs of a Distiller, with towers of one layer each."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.ancestry = NOT_RECORDED
        self.model.image_encoder = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.model.text_encoder = nn.Linear(2, 2)
        self.model.register_parameter("logit_scale", nn.Parameter(torch.tensor(4.0)))
        self.model.linear_logit_scale = torch.tensor(1.0)
        self.mask = None
        self.log_scales = nn.ParameterDict({"vrd": nn.Parameter(torch.tensor(4.6))})

    linear_scales, clamp_scales = Distiller.linear_scales, Distiller.clamp_scales


class Loader:
    steps_per_epoch = 4
    is_exact = True
    contents: ClassVar[dict[str, Contents]] = {}

    def batches(self, epoch: int, position: int) -> Iterator[Batch]:
        for step in range(position, self.steps_per_epoch):
            generator = torch.Generator().manual_seed(10 * epoch + step)
            images = torch.randint(0, 256, (5, 3, 9, 9), generator=generator, dtype=torch.uint8)
            tokens = torch.zeros(5, 0, dtype=torch.long)
            yield Batch(images, (), tokens, tokens, [str(i) for i in range(5)], [(epoch, i) for i in range(5)], {})


def test_the_loop_mixes_scales_the_rates_and_evaluates_the_average(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = parse_config(
        "--run.max_steps 6 --run.eval_every 2 --run.save_every 2 --run.seed 7 --run.global_batch_size 5 "
        "--optim.ema 0.25 --optim.image_lr_share 0.5 --optim.text_lr_share 0.1 --optim.schedule constant "
        "--teacher.checkpoint None --data.val None --optim.weight_decay 0 --mix.erase 1 "
        f"--run.out_dir {tmp_path / 'run'}".split()
    )
    torch.manual_seed(0)
    toy = Toy()
    history: list[dict[str, Tensor]] = []
    batches: list[Batch] = []
    evaluated: list[tuple[str, dict[str, Tensor]]] = []

    def backward_step(module: nn.Module, batch: Batch, *_: Any, **_options: Any) -> dict[str, Tensor]:
        history.append(snapshot(module.model))
        batches.append(batch)
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        return {"loss": torch.tensor(1.0)}

    def validate(model: nn.Module, _config: object, teacher: object) -> Validation:
        assert teacher == "the teacher"
        evaluated.append(("val", snapshot(model)))
        return Validation({"score": float(len(evaluated))}, None)

    monkeypatch.setattr(loop, "backward_step", backward_step)
    monkeypatch.setattr(loop, "validate", validate)
    monkeypatch.setattr(loop, "validation_teacher", lambda _config, _device: "the teacher")
    monkeypatch.setattr(loop, "save_weights", lambda path, model: evaluated.append((path.stem, snapshot(model))))
    with start("cpu") as runtime:
        distillation = Distillation(toy, None, None)  # type: ignore[arg-type]
        state: TrainState = loop.train(config, runtime, distillation, Loader())  # type: ignore[arg-type]
    history.append(snapshot(toy.model))

    (logged,) = read_metrics(config.run.out_dir)
    assert logged["logit_scale"] == 1.0
    assert logged["logit_scale_vrd"] == pytest.approx(math.exp(toy.log_scales["vrd"].item()))
    assert [name for name, _ in evaluated] == ["val", "best", "last"] * 3
    for steps, (name, weights) in zip([2] * 3 + [4] * 3 + [6] * 3, evaluated, strict=True):
        for key, average in expected(history[: steps + 1], 0.25).items():
            np.testing.assert_allclose(weights[key].numpy(), average, rtol=1e-5, atol=1e-6, err_msg=f"{name} {key}")
    assert state.ema is not None and state.evaluated_model is state.ema.model

    sources = [batch for epoch in (0, 1) for batch in Loader().batches(epoch, 0)]
    for step, (batch, source) in enumerate(zip(batches, sources, strict=False)):
        wanted = mix(source, MixOptions(erase=1.0), seed=7, step=step)
        assert torch.equal(batch.shown, wanted.shown) and not torch.equal(batch.shown, source.images)
        assert torch.equal(batch.images, source.images)

    for step in range(6):  # Adam moves by the rate while the gradient stays the same
        rate = learning_rate(step, 6, config.optim)
        for key, share in {"image_encoder.0.weight": 0.5, "text_encoder.bias": 0.1, "logit_scale": 1.0}.items():
            moved = history[step][key] - history[step + 1][key]
            torch.testing.assert_close(moved, torch.full_like(moved, rate * share), rtol=1e-3, atol=1e-6)
