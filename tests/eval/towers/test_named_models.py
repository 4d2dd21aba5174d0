"""Entries of the form NAME=CHECKPOINT,...@SETTING=VALUE,... are parsed as documented, and no existing path is split."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.towers.named_models import NamedModel, ReadSettings, parse_models
from longclip_teacher.errors import InputError


def test_names_and_seeds(tmp_path: Path) -> None:
    odd = tmp_path / "a=b.pt"
    odd.touch()
    entries = ["longclip-b", "runs/x/best.safetensors", "runs/z/last.safetensors", "runs/y", "s=p,q", str(odd)]
    assert parse_models(entries) == {
        "longclip-b": NamedModel(("longclip-b",)),
        "x": NamedModel(("runs/x/best.safetensors",)),
        "z": NamedModel(("runs/z/last.safetensors",)),
        "y": NamedModel(("runs/y",)),
        "s": NamedModel(("p", "q")),
        "a=b.pt": NamedModel((str(odd),)),
    }


def test_settings() -> None:
    entries = [
        "cut=runs/s0@context_length=77",
        "official=mobileclip_s0.pt@variant=s0,context_length=248,pad_mask=True",
        "clip=model.safetensors@activation=quickgelu",
        "seeds=runs/a,runs/b@pad_mask=false",
        "runs/s0@context_length=77",
    ]
    assert parse_models(entries) == {
        "cut": NamedModel(("runs/s0",), ReadSettings(context_length=77)),
        "official": NamedModel(("mobileclip_s0.pt",), ReadSettings("s0", 248, True)),
        "clip": NamedModel(("model.safetensors",), ReadSettings(activation="quickgelu")),
        "seeds": NamedModel(("runs/a", "runs/b"), ReadSettings(pad_mask=False)),
        "s0-context_length-77": NamedModel(("runs/s0",), ReadSettings(context_length=77)),
    }


def test_an_at_sign_in_a_name_is_not_a_setting(tmp_path: Path) -> None:
    run = tmp_path / "s0@lr=0.1"
    run.mkdir()
    revision = "hf-hub:timm/ViT-B-16-SigLIP@main"
    entries = [f"a={run}", str(run), f"b={run},{tmp_path}", f"c={revision}", f"d={run}@context_length=77"]
    assert parse_models(entries) == {
        "a": NamedModel((str(run),)),
        "s0@lr=0.1": NamedModel((str(run),)),
        "b": NamedModel((str(run), str(tmp_path))),
        "c": NamedModel((revision,)),
        "d": NamedModel((str(run),), ReadSettings(context_length=77)),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("=p", "write NAME=CHECKPOINT"),
        ("a=", "write NAME=CHECKPOINT"),
        ("a=p,,q", "write NAME=CHECKPOINT"),
        ("a=@pad_mask=True", "write NAME=CHECKPOINT"),
        ("a=p,p", "the same checkpoint twice"),
        ("a=p@contextlength=77", "'contextlength' is no setting of a model: after @ write variant, context_length"),
        ("a=p@context_length=77,", "'' is no setting"),
        ("a=p@context_length=77,context_length=78", "context_length is given twice"),
        ("a=p@context_length=1", "a number of tokens, 2 or more, not '1'"),
        ("a=p@context_length=-5", "not '-5'"),
        ("a=p@context_length=many", "not 'many'"),
        ("a=p@pad_mask=1", "pad_mask is True or False, not '1'"),
        ("a=p@variant=s9", "no student variant 's9': choose "),
        ("a=p@activation=relu", "activation is quickgelu or gelu, not 'relu'"),
    ],
)
def test_malformed_entries_are_one_line(entry: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_models([entry])
    assert "\n" not in str(caught.value)
