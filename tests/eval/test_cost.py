"""Costs: what is counted, what is timed, and that a slow machine is shared fairly."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import eval.cost
from eval.measures import costs
from eval.measures.costs import CAPTION_TOKENS, measure_cost, measure_costs, measure_full_cost, measure_full_costs
from longclip_teacher import LongCLIP, create_teacher, save_teacher
from longclip_teacher.config import ImageTowerConfig, TeacherConfig, TextTowerConfig
from longclip_teacher.errors import InputError
from longclip_teacher.text import CaptionTokenizer
from mobileclip_student import MobileCLIP, create_student, reparameterize, save_student


class SleepyClip(nn.Module):
    """The interface of both models; a call takes the given time and is recorded in a common log."""

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


def test_one_picture_and_one_caption_of_the_stated_length_are_encoded() -> None:
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
    with pytest.raises(InputError, match="needs 1 or more repeats, got 0"):
        measure_cost(tiny_student, repeats=0)


def block_flops(length: int, width: int, queries: int) -> int:
    """FLOPs of a transformer block with `queries` outputs from `length` positions; a multiply-accumulate counts two."""
    keys_and_values = length * width * 2 * width
    query_and_output = 2 * queries * width * width
    attention = 2 * queries * length * width  # scores, then the weighted sum of the values
    mlp = 2 * queries * width * 4 * width
    return 2 * (keys_and_values + query_and_output + attention + mlp)


@pytest.fixture(scope="module")
def tiny_teacher() -> LongCLIP:
    torch.manual_seed(0)
    return create_teacher("tiny").eval()


@pytest.mark.parametrize("num_tokens", [77, 248])
def test_flops_of_a_caption_follow_the_equations(tiny_teacher: LongCLIP, num_tokens: int) -> None:
    """Two causal blocks 96 wide, of which the last is computed at the end token alone, and a projection to 128."""
    by_hand = block_flops(num_tokens, 96, num_tokens) + block_flops(num_tokens, 96, 1) + 2 * 96 * 128
    assert measure_full_cost(tiny_teacher, repeats=1)[f"flops_text_{num_tokens}"] == by_hand


def test_flops_of_a_picture_follow_the_equations(tiny_teacher: LongCLIP) -> None:
    """3x3 convolutions of stride 2 to 24, 48 and 96 channels, 1x1 to 96, then three blocks on 36 patches + class."""
    stem = 9 * (3 * 24 * 24**2 + 24 * 48 * 12**2 + 48 * 96 * 6**2) + 96 * 96 * 6**2
    by_hand = 2 * stem + 2 * block_flops(37, 96, 37) + block_flops(37, 96, 1) + 2 * 96 * 128
    assert measure_full_cost(tiny_teacher, repeats=1)["flops_image"] == by_hand


@pytest.mark.parametrize("groups", [1, 4, 16])
def test_a_gradient_costs_as_much_as_its_convolution_for_any_groups(groups: int) -> None:
    pictures = torch.randn(2, 16, 9, 9)
    weight = torch.randn(32, 16 // groups, 3, 3, requires_grad=True)

    def backward(inputs: torch.Tensor) -> torch.Tensor:
        features = torch.nn.functional.conv2d(inputs, weight, padding=1, groups=groups)
        features.sum().backward()
        return features

    forward = 2 * 2 * 32 * 81 * (16 // groups) * 9
    assert costs.count_flops(lambda: backward(pictures)) == 2 * forward  # the convolution, and its weight's gradient
    assert costs.count_flops(lambda: backward(pictures.requires_grad_())) == 3 * forward


def test_flops_do_not_depend_on_how_attention_is_computed(tmp_path: Path) -> None:
    """A plain ViT in eval mode without gradients takes torch's fused path, which a counter would miss."""
    layer = nn.TransformerEncoderLayer(32, 4, dim_feedforward=128, batch_first=True).eval()
    tokens = torch.randn(1, 10, 32)
    with torch.no_grad():
        assert costs._flops(lambda: layer(tokens)) == block_flops(10, 32, 10)
        assert torch.backends.mha.get_fastpath_enabled()  # as it was before
        depthwise = nn.Conv2d(8, 8, 5, groups=8, padding=2)
        assert costs._flops(lambda: depthwise(torch.randn(2, 8, 6, 6))) == 2 * 2 * 8 * 25 * 36


def test_flops_of_a_masked_student_count_what_it_reads(tiny_student: MobileCLIP) -> None:
    """The student's towers are not causal: a caption of 77 tokens costs what it costs at a context of 77."""
    torch.manual_seed(0)
    short = create_student("tiny", context_length=77).eval()
    long_cost, short_cost = measure_full_cost(tiny_student, repeats=1), measure_full_cost(short, repeats=1)
    assert long_cost["flops_text_77"] == short_cost["flops_text_77"]
    assert long_cost["flops_text_248"] > 3 * long_cost["flops_text_77"]  # attention grows with the square
    absent = {key for key, value in short_cost.items() if value is None}
    assert absent == {"bytes", "flops_text_248", "text_248_ms_b1", "text_248_ms_b32"}


def test_full_costs_before_and_after_reparameterisation(tiny_student: MobileCLIP) -> None:
    costs = measure_full_costs({"plain": tiny_student, "fused": reparameterize(tiny_student)}, repeats=1)
    plain, fused = costs["plain"], costs["fused"]
    assert plain.keys() == fused.keys()
    for key in ("params", "params_image", "params_text", "flops_image"):
        assert 0 < fused[key] < plain[key], key  # type: ignore[operator]
    assert fused["flops_text_248"] == plain["flops_text_248"]  # its one branch is a BatchNorm, which is not counted
    for cost in costs.values():
        assert cost["params"] == cost["params_image"] + cost["params_text"] + 1  # type: ignore[operator]
        assert cost["peak_bytes_b32"] > cost["peak_bytes_b1"] > 4 * cost["params"]  # type: ignore[operator]
        assert cost["text_248_ms_b32"] > cost["text_77_ms_b1"] > 0  # type: ignore[operator]
        assert cost["threads"] == torch.get_num_threads()
    assert not tiny_student.training


def test_peak_memory_is_the_most_that_is_alive_at_a_time() -> None:
    def call() -> Tensor:
        first = torch.ones(1 << 20)  # 4 MiB
        second = first + 1  # 8 MiB alive
        del first
        return (second + 1).sum()  # 8 MiB again, never 12

    peak = costs._peak_of_call(call, torch.device("cpu"))
    assert peak is not None and 8 << 20 <= peak < (8 << 20) + 1000


def test_captions_have_exactly_the_length_asked_for(tiny_student: MobileCLIP) -> None:
    class PairsTokenizer:  # each word is two tokens, "a" is one, and one token ends the caption
        def count_tokens(self, text: str) -> int:
            return 1 + sum(1 if word == "a" else 2 for word in text.split())

    class Other:
        tokenizer = PairsTokenizer()

    for num_tokens in (77, 100, 248):
        for model in (tiny_student, Other()):
            caption = costs._caption(model, num_tokens)  # type: ignore[arg-type]
            assert model.tokenizer.count_tokens(caption) == num_tokens  # type: ignore[attr-defined]


def test_the_command(
    tiny_student: MobileCLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_student(tiny_student, tmp_path / "run" / "best.safetensors")
    small = TeacherConfig(16, ImageTowerConfig(16, 8, 16, 1, 1), TextTowerConfig(16, 1, 1, 77))
    save_teacher(LongCLIP(small), tmp_path / "teacher.safetensors")
    for checkpoint, names in (("run", ["as loaded", "reparameterised"]), ("teacher.safetensors", ["as loaded"])):
        arguments = ["--checkpoint", str(tmp_path / checkpoint), "--repeats", "1", "--json", str(tmp_path / "a.json")]
        monkeypatch.setattr(sys, "argv", ["cost.py", *arguments, "--device", "cpu"])
        eval.cost.main()
        shown, written = capsys.readouterr().out, json.loads((tmp_path / "a.json").read_text())
        assert list(written["costs"]) == names
        assert all(name in shown for name in names) and "FLOPs are 2 x MACs" in shown
        assert "median of 1 calls" in shown and ("branches of the loaded model are fused" in shown) == (len(names) > 1)
        assert all(cost["bytes"] > cost["params"] for cost in written["costs"].values())
    assert "-" in shown  # no caption of 248 tokens for this teacher
    monkeypatch.setattr(sys, "argv", ["cost.py", "--checkpoint", str(tmp_path / "run"), "--threads", "0"])
    with pytest.raises(InputError, match="--threads 0: 1 or more"):
        eval.cost.main()
