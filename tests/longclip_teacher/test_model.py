"""LongCLIP as a module: exact shortcuts, frozen positions, training from scratch, named shapes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from open_clip.transformer import TextTransformer, VisionTransformer
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from longclip_teacher import LongCLIP, TeacherConfig, create_teacher
from longclip_teacher import model as teacher_model
from longclip_teacher.config import TEACHERS, ImageTowerConfig, TextTowerConfig
from longclip_teacher.errors import InputError

MakeTokens = Callable[..., Tensor]
LENGTHS = [248, 5, 100, 101, 99, 2, 60, 61, 30, 12, 200, 90, 91, 8, 7, 6, 150, 151, 20, 21, 22]


def teacher_with_all_weights_drawn(stem: str = "conv", num_frozen_positions: int = 0) -> LongCLIP:
    config = TeacherConfig(
        embed_dim=24,
        image=ImageTowerConfig(size=32, patch=8, width=32, layers=2, heads=2, stem=stem),  # type: ignore[arg-type]
        text=TextTowerConfig(width=32, heads=2, layers=2, vocab_size=1000),
        activation="gelu",
        num_frozen_positions=num_frozen_positions,
    )
    torch.manual_seed(0)
    model = create_teacher(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
        model.text.positional_embedding.normal_(std=0.5)
        model.text.token_embedding.weight.normal_(std=0.5)
    return model.eval()


def full_text_pass(model: LongCLIP, tokens: Tensor) -> Tensor:
    """open_clip's own text tower on all 248 positions of every caption."""
    config = model.config
    tower = TextTransformer(248, config.text.vocab_size, config.text.width, config.text.heads, config.text.layers)
    tower.text_projection = torch.nn.Parameter(torch.empty_like(model.text.text_projection))
    weights = model.text.state_dict()
    weights["positional_embedding"] = torch.cat(
        [weights.pop("frozen_positional_embedding"), weights["positional_embedding"]]
    )
    tower.load_state_dict(weights)
    return tower.eval()(tokens)


@torch.no_grad()
@pytest.mark.parametrize("num_frozen_positions", [0, 20])
def test_text_shortcuts_equal_the_full_248_pass(caption_tokens: MakeTokens, num_frozen_positions: int) -> None:
    model = teacher_with_all_weights_drawn(num_frozen_positions=num_frozen_positions)
    tokens = caption_tokens(LENGTHS)
    expected = full_text_pass(model, tokens)
    assert expected.std(0).mean() > 0.1
    torch.testing.assert_close(model.encode_text(tokens), expected, atol=1e-5, rtol=0)
    alone = torch.cat([model.encode_text(row[None, :length]) for row, length in zip(tokens, LENGTHS, strict=True)])
    torch.testing.assert_close(alone, expected, atol=1e-5, rtol=0)
    wider = F.pad(tokens[1:], (0, 52))  # 300 columns
    torch.testing.assert_close(model.encode_text(wider), expected[1:], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("pack_tokens", [1, 100, 10_000])
def test_trimming_off_equals_on_with_repeated_captions(
    caption_tokens: MakeTokens, monkeypatch: pytest.MonkeyPatch, pack_tokens: int
) -> None:
    monkeypatch.setattr(teacher_model, "_PACK_TOKENS", pack_tokens)
    model = teacher_with_all_weights_drawn(num_frozen_positions=20)
    tokens = caption_tokens([*LENGTHS, 12, 12, 30])
    tokens = torch.cat([tokens, tokens[3:9], tokens[:1]])
    trimmed = model.encode_text(tokens, normalize=True)
    narrow = model.encode_text(tokens[1:2, :30], normalize=True)
    model.trim_captions = False
    torch.testing.assert_close(trimmed, model.encode_text(tokens, normalize=True), atol=1e-5, rtol=0)
    torch.testing.assert_close(narrow, model.encode_text(tokens[1:2, :30], normalize=True), atol=1e-5, rtol=0)
    assert model.encode_text(tokens[:0]).shape == (0, 24)


@torch.no_grad()
def test_trimming_computes_no_pad_and_no_caption_twice(caption_tokens: MakeTokens) -> None:
    model = teacher_with_all_weights_drawn()
    computed: list[int] = []
    model.text.transformer.resblocks[0].ln_1.register_forward_hook(
        lambda module, inputs, output: computed.append(output.numel() // output.shape[-1])
    )
    tokens = caption_tokens(LENGTHS)
    model.encode_text(torch.cat([tokens, tokens]))
    assert sum(computed) == sum(LENGTHS)
    computed.clear()
    model.trim_captions = False
    model.encode_text(tokens)
    assert computed == [248 * len(LENGTHS)]


@torch.no_grad()
def test_padded_buckets_of_an_accelerator_equal_packs(
    caption_tokens: MakeTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = teacher_with_all_weights_drawn(), caption_tokens(LENGTHS * 4)[torch.randperm(4 * len(LENGTHS))]
    packed = model.encode_text(tokens)
    monkeypatch.setattr(teacher_model, "_PACKED_DEVICES", ())
    monkeypatch.setattr(teacher_model, "_SMALLEST_BUCKET", 4)
    torch.testing.assert_close(model.encode_text(tokens), packed, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_caption_beyond_the_context_is_cut_with_its_end_kept(caption_tokens: MakeTokens) -> None:
    model = teacher_with_all_weights_drawn()
    tokens = caption_tokens([300], context_length=300)
    cut = tokens[:, :248].clone()
    cut[0, 247] = 999
    torch.testing.assert_close(model.encode_text(tokens), full_text_pass(model, cut), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_image_shortcut_equals_open_clips_forward(stem: str) -> None:
    model = teacher_with_all_weights_drawn(stem)
    images = torch.randn(3, 3, 32, 32)
    expected = VisionTransformer.forward(model.visual, images)
    assert expected.std(0).mean() > 0.01
    torch.testing.assert_close(model.encode_image(images), expected, atol=1e-5, rtol=0)


def test_gradients_equal_the_full_pass_and_reach_every_parameter(caption_tokens: MakeTokens) -> None:
    model = teacher_with_all_weights_drawn(num_frozen_positions=20).train()
    tokens, images = caption_tokens(LENGTHS), torch.randn(4, 3, 32, 32)
    model.encode_text(tokens).square().mean().backward()
    (model.encode_image(images).square().mean() + model.linear_logit_scale).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    model.zero_grad()
    model.visual(images).square().mean().backward()
    short = {name: parameter.grad.clone() for name, parameter in model.visual.named_parameters()}
    model.zero_grad()
    VisionTransformer.forward(model.visual, images).square().mean().backward()
    for name, parameter in model.visual.named_parameters():
        torch.testing.assert_close(short[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_text_gradients_do_not_depend_on_trimming(caption_tokens: MakeTokens) -> None:
    model, gradients = teacher_with_all_weights_drawn(num_frozen_positions=20).train(), []
    tokens = caption_tokens([*LENGTHS, 12, 12])
    tokens = torch.cat([tokens, tokens[:3]])
    for model.trim_captions in (True, False):
        model.zero_grad()
        model.encode_text(tokens).square().mean().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.text.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)


def test_frozen_positions_are_not_parameters(caption_tokens: MakeTokens) -> None:
    model = teacher_with_all_weights_drawn(num_frozen_positions=20).train()
    before = model.text.position_table.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model.encode_text(caption_tokens([248, 30])).square().mean().backward()
    optimizer.step()
    after = model.text.position_table.detach()
    assert torch.equal(after[:20], before[:20])
    assert (after[20:] - before[20:]).abs().min() > 0
    assert model.text.positional_embedding.shape == (228, 32)
    assert create_teacher("tiny").text.positional_embedding.shape == (248, 96)


def test_tiny_learns_from_scratch() -> None:
    torch.manual_seed(0)
    model = create_teacher("tiny").train()
    images = torch.randn(8, 3, 1, 1).expand(-1, -1, 48, 48)  # eight colours
    colours = ("red", "blue", "green", "teal", "pink", "grey", "navy", "tan")
    tokens = model.tokenizer([f"{'a dog and ' * 9} a {colour} board" for colour in colours])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        logits = model.linear_logit_scale * model.encode_image(images, True) @ model.encode_text(tokens, True).T
        loss = F.cross_entropy(logits, torch.arange(8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.5
    assert losses[-1] < 0.5 * losses[0]


def test_half_precision_under_autocast_stays_close(caption_tokens: MakeTokens) -> None:
    model, tokens, images = teacher_with_all_weights_drawn(), caption_tokens(LENGTHS), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        exact = model.encode_image(images, True), model.encode_text(tokens, True)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model.encode_image(images, True), model.encode_text(tokens, True)
    for ours, theirs in zip(exact, rounded, strict=True):
        assert F.cosine_similarity(ours, theirs.float()).min() > 0.999


@pytest.mark.parametrize(
    ("name", "embed_dim", "image_size", "num_parameters"),
    [("b16", 512, 224, 149_620_737), ("l14", 768, 224, 427_616_513)],  # as published for CLIP
)
def test_named_shapes_have_clips_parameter_count(
    name: str, embed_dim: int, image_size: int, num_parameters: int
) -> None:
    with torch.device("meta"):
        model = create_teacher(name, context_length=77)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters
    assert (model.embed_dim, model.image_size, model.context_length) == (embed_dim, image_size, 77)


@pytest.mark.parametrize(("name", "image_size"), [("tiny", 48), ("small", 96)])
def test_small_shapes_read_a_picture_and_a_caption(name: str, image_size: int) -> None:
    model = create_teacher(name).eval()
    picture = Image.new("RGB", (200, 100), (255, 0, 0))
    image = model.preprocess(picture)
    assert image.shape == (3, image_size, image_size)
    red = (1 - model.preprocess_cfg.mean[0]) / model.preprocess_cfg.std[0]
    assert image[0].mean().item() == pytest.approx(red, rel=1e-5)
    with torch.no_grad():
        assert model.encode_image(image[None], normalize=True).norm().item() == pytest.approx(1, abs=1e-5)
        assert model.encode_text(model.tokenizer("a red board")).shape == (1, model.embed_dim)
    assert model.tokenizer.context_length == model.context_length == 248


@pytest.mark.parametrize("name", TEACHERS)
def test_a_configuration_survives_json(name: str) -> None:
    config = replace(TEACHERS[name], mean=(0.1, 0.2, 0.3))
    assert TeacherConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"activation": "relu"}, "relu"),
        ({"embed_dim": 0}, "embed_dim"),
        ({"embed_dim": "64"}, "embed_dim"),
        ({"num_frozen_positions": 249}, "num_frozen_positions"),
        ({"num_frozen_positions": None}, "does not fit"),
        ({"mean": [0.5]}, "mean"),
        ({"interpolation": "magic"}, "magic"),
        ({"colour": 1}, "colour"),
        ({"text": {"width": 64, "heads": 3, "layers": 2}}, "heads"),
        ({"text": {"width": 64, "heads": 2, "layers": 10**9}}, "layers"),
        ({"image": {"size": 50, "patch": 8, "width": 64, "layers": 1, "heads": 1}}, "patch"),
        ({"image": {"size": 36, "patch": 6, "width": 64, "layers": 1, "heads": 1, "stem": "conv"}}, "power of 2"),
        ({"image": {"size": 36, "patch": 6, "width": 64, "layers": 1, "heads": 1, "stem": "fir"}}, "fir"),
    ],
)
def test_an_impossible_configuration_is_one_line(change: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match=named) as caught:
        TeacherConfig.from_dict({**TEACHERS["tiny"].to_dict(), **change})
    assert "\n" not in str(caught.value)


def test_a_missing_entry_and_an_unknown_name_are_one_line() -> None:
    values = TEACHERS["tiny"].to_dict()
    del values["image"]
    with pytest.raises(InputError, match="image"):
        TeacherConfig.from_dict(values)
    with pytest.raises(InputError, match="choose one of tiny, small, b16, l14"):
        create_teacher("huge")
