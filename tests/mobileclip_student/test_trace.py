"""Traces of the student's towers: the features of the plain pass, and attention written out."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from longclip_teacher.trace import Trace
from mobileclip_student.text_encoder import AttentionBlock, TextConfig, TextTransformer
from mobileclip_student.vit_trace import trace_vit

KINDS = {
    "base": TextConfig(width=32, heads=4, layers=3),
    "longclip": TextConfig(width=32, heads=4, layers=3, causal=True, activation="quickgelu"),
    "hybrid": TextConfig(width=32, heads=4, layers=3, hybrid=True, layer_scale=0.5),
}
LENGTHS = [9, 2, 25, 17]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def make_tower(kind: str, visible: Callable, *, pad_mask: bool) -> TextTransformer:
    torch.manual_seed(0)
    tower = visible(TextTransformer(KINDS[kind], 16, context_length=40, pad_mask=pad_mask))
    for name, parameter in tower.named_parameters():
        if parameter.ndim == 2 and not name.startswith("positional"):
            torch.nn.init.normal_(parameter, std=0.3)
    return tower


@pytest.mark.parametrize("pad_mask", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_text_features_gradients_and_statistics_equal_the_plain_pass(
    kind: str, visible: Callable, captions: Callable[..., Tensor], pad_mask: bool, training: bool
) -> None:
    long, short = captions(*LENGTHS, width=40), captions(5, 3, 2, 4, width=8, seed=1)
    results = []
    for traced in (False, True):
        tower = make_tower(kind, visible, pad_mask=pad_mask).train(training)
        features = tower.traced(long, short)[0] if traced else tower(long, short)
        torch.cat(features).sin().sum().backward()
        gradients = {name: parameter.grad for name, parameter in tower.named_parameters()}
        results.append((features, gradients, dict(tower.named_buffers())))
    assert torch.cat(results[0][0]).std() > 0.1
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(results[1][1], results[0][1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(results[1][2], results[0][2])


@torch.no_grad()
def test_text_trace_is_the_attention_written_out(kind: str, visible: Callable, captions: Callable[..., Tensor]) -> None:
    tower = make_tower(kind, visible, pad_mask=True).eval()
    tokens = captions(*LENGTHS, width=40)
    features, traces = tower.traced(tokens[:2], tokens[2:])
    assert [trace.valid.shape for trace in traces] == [(2, 9), (2, 25)]
    blocks = [block for block in tower.blocks if isinstance(block, AttentionBlock)]
    for trace in traces:
        assert trace.causal == KINDS[kind].causal and trace.num_prefix_tokens == 0
        length = trace.valid.shape[1]
        positions = tower.positional_embedding[:length].expand(2, -1, -1)
        torch.testing.assert_close(trace.embedding - trace.tokens, positions, atol=1e-6, rtol=0)
        assert len(trace.hidden) == len(trace.query) == len(trace.key) == len(trace.value) == len(blocks) == 3
        seen = trace.valid[:, None, None, :].expand(-1, 1, length, -1)
        seen = seen.tril() if trace.causal else seen
        for number, (before, after) in enumerate(pairwise(trace.hidden), start=1):
            query, key, value = trace.query[number], trace.key[number], trace.value[number]
            scores = (query @ key.transpose(2, 3) / 8**0.5).masked_fill(~seen, -torch.inf)
            x = before + blocks[number].out((scores.softmax(dim=3) @ value).transpose(1, 2).flatten(2))
            inner = blocks[number].fc1(blocks[number].ln_2(x))
            inner = inner * torch.sigmoid(1.702 * inner) if kind == "longclip" else F.gelu(inner)
            expected = x + blocks[number].fc2(inner)
            torch.testing.assert_close(after[trace.valid], expected[trace.valid], atol=1e-4, rtol=1e-4)
    assert [trace.valid.sum(dim=1).tolist() for trace in traces] == [[9, 2], [25, 17]]
    if kind != "hybrid":  # the attention blocks are first and last
        pooled = traces[0].hidden[-1][[0, 1], [8, 1]]
        torch.testing.assert_close(tower.ln_final(pooled) @ tower.projection, features[0], atol=1e-5, rtol=1e-5)


def test_only_real_tokens_are_valid_without_pad_mask(visible: Callable, captions: Callable[..., Tensor]) -> None:
    tower = make_tower("base", visible, pad_mask=False).eval()
    trace = tower.traced(captions(*LENGTHS, width=30))[1][0]
    assert trace.valid.shape == (4, 40) and trace.valid.sum(dim=1).tolist() == LENGTHS


VITS = {"class token": VisionTransformer, "distillation token": VisionTransformerDistilled}


def make_vit(kind: str, drop_path: float = 0.0) -> VisionTransformer:
    torch.manual_seed(0)
    trunk = VITS[kind](
        img_size=24, patch_size=8, num_classes=10, embed_dim=32, depth=3, num_heads=4, drop_path_rate=drop_path
    )
    for parameter in trunk.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return trunk


@torch.no_grad()
@pytest.mark.parametrize("kind", VITS)
def test_vit_trace(kind: str) -> None:
    trunk, images = make_vit(kind).eval(), torch.randn(4, 3, 24, 24)
    expected = trunk(images)
    output, trace = trace_vit(trunk, images)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    num_prefix = 2 if kind == "distillation token" else 1
    assert trace.num_prefix_tokens == num_prefix and not trace.causal
    assert trace.valid.shape == (4, 9 + num_prefix) and trace.valid.all()
    torch.testing.assert_close(trace.embedding - trace.tokens, trunk.pos_embed.expand(4, -1, -1), atol=1e-5, rtol=0)
    patches = trunk.patch_embed.proj(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(trace.tokens[:, num_prefix:], patches)
    for number, block in enumerate(trunk.blocks):
        before = [trace.embedding, *trace.hidden][number]
        torch.testing.assert_close(trace.hidden[number], block(before), atol=1e-4, rtol=1e-4)
        scores = trace.query[number] @ trace.key[number].transpose(2, 3) / 8**0.5
        mixed = block.attn.proj((scores.softmax(dim=3) @ trace.value[number]).transpose(1, 2).flatten(2))
        torch.testing.assert_close(mixed, block.attn(block.norm1(before)), atol=1e-4, rtol=1e-4)
    assert len(trace.hidden) == len(trace.query) == len(trace.key) == len(trace.value) == 3


def test_vit_trace_in_training_and_through_another_forward() -> None:
    trunk, images = make_vit("distillation token", drop_path=0.5).train(), torch.randn(4, 3, 24, 24)

    def heads(images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = trunk.forward_features(images)
        return trunk.head(tokens[:, 0]), trunk.head_dist(tokens[:, 1])

    results: list[tuple[tuple[Tensor, Tensor], dict[str, Tensor | None]]] = []
    for traced in (False, True):
        trunk.zero_grad()
        torch.manual_seed(1)  # drop path
        output, trace = trace_vit(trunk, images, heads) if traced else (heads(images), None)
        torch.cat(output).square().sum().backward()
        results.append((output, {name: parameter.grad.clone() for name, parameter in trunk.named_parameters()}))
    torch.testing.assert_close(results[1], results[0])
    assert isinstance(trace, Trace) and len(trace.hidden) == 3
    hooks = [hook for module in trunk.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]
    assert hooks == []
