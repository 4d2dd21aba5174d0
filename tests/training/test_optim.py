"""AdamW: which parameters decay, and one kernel against many."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from mobileclip_student import create_student
from training.config import OptimOptions
from training.optim import build_optimizer, learning_rate


def test_fused_steps_equal_separate_operations() -> None:
    torch.manual_seed(0)
    model = create_student("tiny", context_length=40)
    other = deepcopy(model)
    before = deepcopy(model)
    options = OptimOptions(lr=1e-2)
    optimizers = [build_optimizer(model, options, fused=True), build_optimizer(other, options, fused=False)]
    assert [optimizer.defaults["fused"] for optimizer in optimizers] == [True, False]
    assert [optimizer.defaults["foreach"] for optimizer in optimizers] == [False, True]
    for _ in range(5):
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
            ours.grad = torch.randn_like(ours)
            theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for (name, ours), theirs, old in zip(
        model.named_parameters(), other.parameters(), before.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=name)
        assert not torch.equal(ours, old), name


def test_devices_without_a_fused_kernel_take_separate_operations() -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 3)
    assert build_optimizer(model, OptimOptions()).defaults["fused"] is False


def test_vectors_and_positions_do_not_decay_and_frozen_parameters_do_not_move() -> None:
    model = create_student("tiny", context_length=40)
    model.text_encoder.token_embedding.weight.requires_grad_(False)
    decayed, plain = build_optimizer(model, OptimOptions(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decays, stays = ({names[id(parameter)] for parameter in group["params"]} for group in (decayed, plain))
    assert decays | stays == set(names.values()) - {"text_encoder.token_embedding.weight"}
    assert "text_encoder.projection" in decays
    assert {"logit_scale", "text_encoder.positional_embedding", "text_encoder.ln_final.weight"} <= stays


def test_learning_rate_rises_and_falls() -> None:
    options = OptimOptions(lr=2.0, warmup_steps=4, min_lr_share=0.1)
    rates = [learning_rate(step, 100, options) for step in range(100)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert max(rates) == 2.0 and rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(0.2, abs=1e-3)
    assert learning_rate(0, 20, options) == 1.0  # never more than a tenth of the run
