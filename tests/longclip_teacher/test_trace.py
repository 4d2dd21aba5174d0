"""Traces of the teacher: its own features, and what open_clip's blocks compute."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn
from torch.nn import functional as F

from longclip_teacher import LongCLIP, TeacherConfig, create_teacher
from longclip_teacher.config import ImageTowerConfig, TextTowerConfig
from longclip_teacher.trace import Trace

LENGTHS = [9, 40, 2, 25]
HEADS = 4


@pytest.fixture(params=[("patch", "quickgelu"), ("conv", "gelu")], ids=lambda param: param[0])
def teacher(request: pytest.FixtureRequest) -> LongCLIP:
    stem, activation = request.param
    torch.manual_seed(0)
    model = create_teacher(
        TeacherConfig(
            embed_dim=24,
            image=ImageTowerConfig(size=32, patch=8, width=32, layers=3, heads=HEADS, stem=stem),
            text=TextTowerConfig(width=32, heads=HEADS, layers=3, vocab_size=1000, context_length=60),
            activation=activation,
            num_frozen_positions=20,
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.uniform_(0.5, 1.5) if is_norm else parameter.normal_(std=0.3)
    return model.eval()


@torch.no_grad()
def assert_blocks_agree(blocks: nn.ModuleList, first: Tensor, trace: Trace, mask: Tensor | None, real: Tensor) -> None:
    """The trace of a tower whose first block reads `first` is that of open_clip's own blocks; `real` tokens alone."""
    assert len(trace.hidden) == len(trace.query) == len(trace.key) == len(trace.value) == len(blocks) == 3
    for number, (block, (before, after)) in enumerate(zip(blocks, pairwise([first, *trace.hidden]), strict=True)):
        assert isinstance(block, ResidualAttentionBlock)
        torch.testing.assert_close(after[real], block(before, attn_mask=mask)[real], atol=1e-5, rtol=1e-5)
        x = block.ln_1(before)
        mixed, weights = block.attn(x, x, x, attn_mask=mask, average_attn_weights=False)
        query, key, value = trace.query[number], trace.key[number], trace.value[number]
        assert query.shape == (len(x), HEADS, x.shape[1], x.shape[2] // HEADS)
        scores = query @ key.transpose(2, 3) / query.shape[3] ** 0.5
        ours = (scores if mask is None else scores + mask).softmax(dim=3)
        torch.testing.assert_close(ours.transpose(1, 2)[real], weights.transpose(1, 2)[real], atol=1e-5, rtol=0)
        together = block.attn.out_proj((ours @ value).transpose(1, 2).flatten(2))
        torch.testing.assert_close(together[real], mixed[real], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("trim", [True, False])
def test_text(teacher: LongCLIP, caption_tokens: Callable[..., Tensor], trim: bool) -> None:
    tokens = caption_tokens(LENGTHS, context_length=70)  # wider than the context
    expected = teacher.encode_text(tokens)
    teacher.trim_captions = trim
    features, trace = teacher.trace_text(tokens)
    assert expected.std(dim=0).mean() > 0.1
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)
    length = 40 if trim else 60
    assert trace.causal and trace.num_prefix_tokens == 0 and trace.valid.shape == (4, length)
    assert trace.valid.sum(dim=1).tolist() == LENGTHS and trace.valid[:, 0].all() and not trace.valid[0, 9:].any()
    positions = teacher.text.position_table[:length].expand(4, -1, -1)
    torch.testing.assert_close(trace.embedding - trace.tokens, positions, atol=1e-6, rtol=0)
    torch.testing.assert_close(trace.tokens, teacher.text.token_embedding(tokens[:, :length]))
    mask = torch.full((length, length), -torch.inf).triu(1)
    assert_blocks_agree(teacher.text.transformer.resblocks, trace.embedding, trace, mask, trace.valid)


@torch.no_grad()
def test_a_caption_longer_than_the_context(teacher: LongCLIP, caption_tokens: Callable[..., Tensor]) -> None:
    tokens = caption_tokens([65, 7], context_length=70)
    features, trace = teacher.trace_text(tokens)
    torch.testing.assert_close(features, teacher.encode_text(tokens), atol=1e-5, rtol=0)
    assert trace.valid.sum(dim=1).tolist() == [60, 7]


@torch.no_grad()
def test_image(teacher: LongCLIP) -> None:
    images = torch.randn(5, 3, 32, 32) + torch.randn(5, 3, 1, 1)
    features, trace = teacher.trace_image(images)
    expected = teacher.encode_image(images)
    assert expected.std(dim=0).mean() > 0.1
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)
    assert not trace.causal and trace.num_prefix_tokens == 1
    assert trace.valid.shape == (5, 17) and trace.valid.all()
    positions = teacher.visual.positional_embedding.expand(5, -1, -1)
    torch.testing.assert_close(trace.embedding - trace.tokens, positions, atol=1e-6, rtol=0)
    first = teacher.visual.ln_pre(trace.embedding)
    assert_blocks_agree(teacher.visual.transformer.resblocks, first, trace, None, trace.valid)
    pooled = teacher.visual.ln_post(trace.hidden[-1][:, 0]) @ teacher.visual.proj
    torch.testing.assert_close(F.normalize(pooled, dim=1), F.normalize(features, dim=1))
