"""Costs: what is counted, what is timed, and that a slow machine is shared fairly."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from eval.cost import CAPTION_TOKENS, measure_cost, measure_costs
from longclip_teacher.errors import InputError
from longclip_teacher.text import CaptionTokenizer
from mobileclip_student import MobileCLIP, create_student, reparameterize, save_student


class SleepyClip(nn.Module):
    """The interface of both models; a call takes the time it is told to and is written down in a common log."""

    image_size = 8

    def __init__(
        self, name: str, log: list, *, image_ms: float = 0, text_ms: float = 0, context_length: int = 248
    ) -> None:
        super().__init__()
        self.name, self.log, self.context_length = name, log, context_length
        self.seconds = {"image": image_ms / 1e3, "text": text_ms / 1e3}
        self.tokenizer = CaptionTokenizer(context_length)
        self.weight = nn.Parameter(torch.ones(7, 3))
        self.register_buffer("statistics", torch.ones(5))

    def encode_image(self, images: Tensor) -> Tensor:
        return self._note("image", images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self._note("text", tokens)

    def _note(self, kind: str, argument: Tensor) -> Tensor:
        self.log.append((self.name, kind, argument, self.training, torch.is_grad_enabled()))
        time.sleep(self.seconds[kind])
        return torch.ones(1, 4)


@pytest.fixture
def tiny_student() -> MobileCLIP:
    torch.manual_seed(0)
    return create_student("tiny").eval()


def test_milliseconds_are_those_of_one_call() -> None:
    cost = measure_cost(SleepyClip("a", [], image_ms=40, text_ms=5), repeats=5)  # type: ignore[arg-type]
    assert 40 <= cost["image_ms"] < 80  # not two calls
    assert 5 <= cost["text_ms"] < 40
    assert cost["params"] == 21  # a parameter of 7x3; a buffer is none
    assert cost["bytes"] is None


def test_models_take_turns_and_each_counted_call_follows_a_warm_one() -> None:
    log: list = []
    models = {name: SleepyClip(name, log).train() for name in "abc"}
    measure_costs(models, repeats=2)  # type: ignore[arg-type]
    one_turn = [(name, kind) for name in "abc" for kind in ("image", "image", "text", "text")]
    assert [(name, kind) for name, kind, *_ in log] == one_turn * 2
    assert not any(training or grad for *_, training, grad in log)
    assert all(model.training for model in models.values())  # as it was before


def test_what_is_encoded_is_one_picture_and_one_caption_of_the_stated_length() -> None:
    log: list = []
    measure_costs({"long": SleepyClip("long", log), "cut": SleepyClip("cut", log, context_length=77)}, repeats=1)  # type: ignore[dict-item]
    shapes = {(name, kind): argument for name, kind, argument, *_ in log}
    assert shapes["long", "image"].shape == (1, 3, 8, 8)
    assert shapes["long", "text"].shape == (1, 248)
    assert (shapes["long", "text"] > 0).sum() == CAPTION_TOKENS == 100
    assert shapes["cut", "text"].shape == (1, 77)
    assert shapes["cut", "text"][0, -1] == 49407


def test_a_real_student_and_its_file(tiny_student: MobileCLIP, tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    save_student(tiny_student, path)
    fused = reparameterize(tiny_student)
    before = torch.random.get_rng_state()
    costs = measure_costs({"plain": tiny_student, "fused": fused}, {"plain": path}, repeats=2)
    assert torch.equal(before, torch.random.get_rng_state())  # measuring during a training changes nothing in it
    assert costs["plain"]["bytes"] == len(path.read_bytes())
    assert costs["fused"]["bytes"] is None
    assert costs["plain"]["params"] == sum(
        len(p.flatten()) for p in tiny_student.state_dict(keep_vars=True).values() if p.requires_grad
    )
    assert costs["fused"]["params"] < costs["plain"]["params"]
    assert all(cost[way] > 0 for cost in costs.values() for way in ("image_ms", "text_ms"))


def test_no_repeats_is_an_error(tiny_student: MobileCLIP) -> None:
    with pytest.raises(InputError, match="1 or more repeats, got 0"):
        measure_cost(tiny_student, repeats=0)
