"""State dicts as trainers save them: which one is read, under which keys, and what is said of it."""

from __future__ import annotations

import logging
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from eval.towers.models import load_model
from longclip_teacher.errors import InputError
from longclip_teacher.model import LongCLIP
from longclip_teacher.state_dicts import bare_keys, find_state_dict
from longclip_teacher.weights_file import read_weights

ONE, TWO = torch.ones(2), torch.full((2,), 2.0)
PATH = Path("x.pt")


@pytest.mark.parametrize(
    ("content", "value", "place"),
    [
        ({"a.b": ONE}, ONE, ""),
        (OrderedDict({"a.b": ONE}), ONE, ""),
        ({"state_dict": {"a.b": ONE}, "epoch": 3}, ONE, "state_dict"),
        ({"model": {"a.b": ONE}, "optimizer": {"state": {}}}, ONE, "model"),
        ({"model_state_dict": {"module.a.b": ONE}}, ONE, "model_state_dict"),
        ({"model": {"state_dict": {"a.b": ONE}, "args": None}}, ONE, "model.state_dict"),
        ({"ema": {"a.b": ONE}}, ONE, "ema (an averaged copy)"),
        ({"ema": {"module": {"a.b": ONE}, "decay": 0.9}}, ONE, "ema.module (an averaged copy)"),
        ({"state_dict": {"a.b": TWO}, "state_dict_ema": {"a.b": ONE}}, ONE,
         "state_dict_ema (an averaged copy, preferred to state_dict)"),
        ({"model": {"a.b": TWO}, "model_ema": {"module.a.b": ONE, "n_averaged": TWO}}, ONE,
         "model_ema (an averaged copy, preferred to model)"),
        ({"state_dict": {"a.b": ONE}, "state_dict_ema": None}, ONE, "state_dict"),
    ],
)  # fmt: skip
def test_the_state_dict_is_found_and_its_place_is_said(content: object, value: torch.Tensor, place: str) -> None:
    tensors, found = find_state_dict(content, PATH)
    assert list(tensors) == ["a.b"] and torch.equal(tensors["a.b"], value) and found == place


@pytest.mark.parametrize(
    "key",
    [
        "module.a.b", "_orig_mod.a.b", "module._orig_mod.a.b", "_orig_mod.module.a.b", "module.module._orig_mod.a.b",
        "_orig_mod._orig_mod.a.b", "a._orig_mod.b", "module.a._orig_mod.b", "_fsdp_wrapped_module.a.b",
        "a._checkpoint_wrapped_module.b", "model.a.b", "model._orig_mod.a.b", "module.model.a.b",
    ],
)  # fmt: skip
def test_prefixes_are_removed_in_any_order(key: str) -> None:
    assert bare_keys([key]) == {key: "a.b"}


def test_only_prefixes_are_removed() -> None:
    for key in ("my_module.a", "a_orig_mod.b", "a.module.b", "image_encoder.model.a", "_orig_model.a"):
        assert bare_keys([key]) == {key: key}
    assert bare_keys(["model.a", "b"]) == {"model.a": "model.a", "b": "b"}  # not all keys have it


def test_a_real_averaged_model_is_read() -> None:
    model = nn.Linear(2, 2)
    assert find_state_dict(AveragedModel(model).state_dict(), PATH)[0].keys() == model.state_dict().keys()
    assert find_state_dict({"n_averaged": ONE, "weight": ONE}, PATH)[0].keys() == {
        "n_averaged",
        "weight",
    }  # not torch's


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no state dict"),
        ({"epoch": 3}, "holds no state dict"),
        ({"state_dict": {"a": 1}}, "holds no state dict"),
        ({"model": {"model": {"model": {"model": {"model": {"a": ONE}}}}}}, "holds no state dict"),
        ([ONE], "holds no state dict"),
        ({"module.a": ONE, "a": TWO}, "weights twice"),
        ({"distiller": {}, "optimizer": {}, "ema": {"a": ONE}}, r"training checkpoint: give the best\.safetensors"),
    ],
)
def test_what_holds_no_weights_is_refused(content: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_state_dict(content, PATH)


def test_safetensors_lose_their_prefixes_too(tmp_path: Path) -> None:
    save_file({"module._orig_mod.a": ONE}, tmp_path / "x.safetensors")
    assert list(read_weights(tmp_path / "x.safetensors").tensors) == ["a"]


@pytest.mark.parametrize("wrap", ["state_dict", "model", "model_state_dict", "state_dict_ema"])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
def test_official_long_clip_files_load_as_saved(
    wrap: str, prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, official_weights: Any
) -> None:
    weights = official_weights()
    path = tmp_path / "longclip.pt"
    other = {key: torch.zeros_like(value) for key, value in weights.items()}
    rest: dict[str, Any] = {"state_dict": other} if wrap == "state_dict_ema" else {"epoch": 3}
    torch.save({wrap: {prefix + key: value for key, value in weights.items()}, **rest}, path)
    with caplog.at_level(logging.INFO, "longclip_teacher.recognised"):
        model = load_model(path)
    assert isinstance(model, LongCLIP)
    assert torch.equal(model.visual.proj, weights["visual.proj"])
    remark = "state_dict_ema (an averaged copy, preferred to state_dict)" if wrap == "state_dict_ema" else wrap
    assert caplog.messages[-1].endswith(f", weights from {remark}")
    missing = dict(weights)
    del missing["visual.ln_pre.weight"]
    torch.save({wrap: {prefix + key: value for key, value in missing.items()}}, path)
    with pytest.raises(InputError, match=r"1 missing keys \(visual\.ln_pre\.weight\)"):
        load_model(path)
