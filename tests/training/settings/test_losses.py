"""The options of the losses agree with the table of losses, and the table with the functions."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

from training.loss_values import FeatureValues, LogitValues, PairValues
from training.losses.table import LOSSES, Loss
from training.settings.losses import LossOptions
from training.settings.needs import needs_of

WEIGHTS = [loss.option(part) for loss in LOSSES for part in loss.parts]
GENERAL = {  # settings that belong to no single function
    "teacher_scale", "pca_rank", "pca_scope", "pca_side", "share_identical_captions", "init_logit_scale",
    "mask_ratio", "mask_patch", "layer_map", "embedding_positions",
}  # fmt: skip
each_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)


def test_every_row_has_its_weights_and_settings_and_there_are_no_others() -> None:
    fields = {field.name: field for field in dataclasses.fields(LossOptions)}
    settings = {option for loss in LOSSES for option in (*loss.settings.values(), loss.factor) if option}
    assert set(fields) == {*WEIGHTS, *settings, *GENERAL}
    assert list(fields)[: len(WEIGHTS)] and all(fields[name].type == "float" for name in WEIGHTS)
    assert list(LossOptions().weights) == WEIGHTS
    assert len(set(WEIGHTS)) == len(WEIGHTS)


@each_loss
def test_a_function_takes_what_its_row_gives(loss: Loss) -> None:
    parameters = inspect.signature(loss.resolve()).parameters
    given = {*loss.arguments, *loss.settings}
    required = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
    assert required <= given <= set(parameters)


@each_loss
def test_the_values_of_a_row_exist(loss: Loss) -> None:
    if loss.family == "layer":
        from training.layer_losses import _LayerValues as kind

        assert all(name in ("valid", "cells") or hasattr(kind, name) for name in loss.arguments.values())
        return
    kinds = {"feature": FeatureValues, "pair": PairValues, "across": PairValues}
    known = set(dir(kinds[loss.family])) | {"caption_groups"}
    if loss.reads("answering_logits"):
        known = set(LogitValues.__annotations__)
    assert set(loss.arguments.values()) <= known


@each_loss
def test_an_option_turns_its_loss_on_and_names_what_it_learns(loss: Loss) -> None:
    off = dict.fromkeys(WEIGHTS, 0.0)
    for part in loss.parts:
        needs = needs_of(LossOptions(**{**off, loss.option(part): 2.0}))
        (term,) = needs.terms
        assert (term.loss, term.part, term.weight, term.name) == (loss, part, 2.0, loss.option(part))
        assert needs.scales == ((loss.name,) if "scale" in loss.learns else ())
        assert needs.logit_scale == loss.uses_logit_scale and needs.mixture == ("mixture" in loss.learns)
        assert bool(needs.maps) == (loss.needs_same_width and loss.family != "layer")
        tower = needs.reaches("image"), needs.reaches("text")
        assert tower == (part != "text", part != "image")
        assert bool(needs_of(LossOptions(**{**off, loss.option(part): 2.0}), with_teacher=False).terms) == (
            not loss.needs_teacher
        )
