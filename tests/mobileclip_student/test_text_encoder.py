"""The text tower: pads never matter, or matter as published; it reads any number of tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from longclip_teacher.errors import InputError
from longclip_teacher.text import EOT
from mobileclip_student.repmixer import TokenGroup
from mobileclip_student.text_encoder import AttentionBlock, LayerNorm, TextConfig, TextTransformer

KINDS = {
    "base": TextConfig(width=32, heads=4, layers=2),
    "causal": TextConfig(width=32, heads=4, layers=2, causal=True),
    "longclip": TextConfig(width=32, heads=4, layers=2, causal=True, activation="quickgelu"),
    "hybrid": TextConfig(width=32, heads=4, layers=2, hybrid=True, layer_scale=0.5),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tower(kind: str, visible: Callable) -> TextTransformer:
    return _tower(kind, visible)


def _tower(kind: str, visible: Callable, *, pad_mask: bool = True, context_length: int = 40) -> TextTransformer:
    torch.manual_seed(0)
    return visible(TextTransformer(KINDS[kind], 16, context_length=context_length, pad_mask=pad_mask)).eval()


@torch.no_grad()
def test_a_caption_does_not_depend_on_padding_or_neighbours(tower: TextTransformer, captions: Callable) -> None:
    tokens = captions(9, 40, 2, 25, 30, width=40)
    together = tower(tokens)[0]
    for row, length in enumerate((9, 40, 2, 25, 30)):
        for width in {length, min(length + 1, 40), 40}:
            alone = tower(tokens[row : row + 1, :width])[0]
            torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-5)
    assert together.norm(dim=1).min() > 0.1  # 1e-5 is a small part of it


@torch.no_grad()
def test_ids_in_the_pads_are_not_read(tower: TextTransformer, captions: Callable) -> None:
    tokens = captions(9, 20, width=40)
    dirty = tokens.clone()
    dirty[0, 9:] = torch.arange(31) + 5  # ids below EOT
    torch.testing.assert_close(tower(dirty)[0], tower(tokens)[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_every_real_token_is_read(tower: TextTransformer, captions: Callable) -> None:
    tokens = captions(12, width=40)
    for position in range(1, 11):
        changed = tokens.clone()
        changed[0, position] = 1 + (tokens[0, position] + 7) % 40000
        assert (tower(changed)[0] - tower(tokens)[0]).norm() > 1e-3


def test_training_step_does_not_depend_on_the_padded_length(kind: str, visible: Callable, captions: Callable) -> None:
    tokens = captions(9, 20, 15, width=40)
    gradients, buffers = [], []
    for width in (20, 40):
        tower = _tower(kind, visible).train()
        tower(tokens[:, :width])[0].square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in tower.named_parameters()})
        buffers.append(dict(tower.named_buffers()))
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(buffers[0], buffers[1])
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients[0].values())


@torch.no_grad()
def test_features_do_not_depend_on_trimming(tower: TextTransformer, captions: Callable) -> None:
    batches = captions(9, 20, 15, width=40), captions(5, 3, 30, width=30, seed=1)
    trimmed = tower(*batches)
    tower.trim_captions = False
    torch.testing.assert_close(tower(*batches), trimmed, rtol=0, atol=1e-5)


def test_training_step_does_not_depend_on_trimming(kind: str, visible: Callable, captions: Callable) -> None:
    batches = captions(9, 20, 15, width=40), captions(5, 3, 8, width=8, seed=1)
    features, gradients, buffers, widths = [], [], [], []
    for trim_captions in (True, False):
        tower = _tower(kind, visible).train()
        tower.trim_captions = trim_captions
        tower.token_embedding.register_forward_hook(lambda module, inputs, output: widths.append(output.shape[1]))
        features.append(torch.cat(tower(*batches)))
        features[-1].square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in tower.named_parameters()})
        buffers.append(dict(tower.named_buffers()))
    assert widths == [20, 8, 40, 40]
    torch.testing.assert_close(features[0], features[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(buffers[0], buffers[1])
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients[0].values())


@torch.no_grad()
def test_long_captions_are_cut_with_eot_kept(tower: TextTransformer, captions: Callable) -> None:
    tokens = captions(70, 30, width=77)
    cut = tokens[:, :40].clone()
    cut[0, 39] = EOT
    torch.testing.assert_close(tower(tokens)[0], tower(cut)[0])


@torch.no_grad()
def test_without_pad_mask_every_position_takes_part(kind: str, visible: Callable, captions: Callable) -> None:
    masked, published = _tower(kind, visible), _tower(kind, visible, pad_mask=False)
    full, short = captions(40, 40, width=40), captions(9, 20, width=40)
    torch.testing.assert_close(published(full)[0], masked(full)[0])  # nothing to mask
    torch.testing.assert_close(published(short[:, :20])[0], published(short)[0])  # padded up to the context length
    difference = (published(short)[0] - masked(short)[0]).norm()
    assert difference < 1e-5 if KINDS[kind].causal else difference > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("pad_mask", [True, False])
def test_a_shift_reads_another_part_of_the_position_table(
    kind: str, visible: Callable, captions: Callable, pad_mask: bool
) -> None:
    tower = _tower(kind, visible, pad_mask=pad_mask)
    torch.nn.init.normal_(tower.positional_embedding)
    tokens, shift = captions(9, 20, 25, 9, width=40), torch.tensor([31, 4, 0, 12])
    shifted = tower(tokens, tokens, shifts=[shift, None])
    torch.testing.assert_close(shifted[1], tower(tokens)[0])
    torch.testing.assert_close(tower(tokens[:, :25], shifts=[shift])[0], shifted[0], rtol=0, atol=1e-6)
    for row, moved in enumerate(shift.tolist()):
        other = _tower(kind, visible, pad_mask=pad_mask)
        other.load_state_dict(tower.state_dict())
        places = (torch.arange(40) + moved).clamp(max=39)
        places[0] = 0
        other.positional_embedding.copy_(tower.positional_embedding[places])
        torch.testing.assert_close(shifted[0][row], other(tokens[row : row + 1])[0][0], rtol=0, atol=1e-6)
        assert moved == 0 or (shifted[0][row] - shifted[1][row]).norm() > 1e-2


def test_a_shift_trains_the_positions_that_it_reaches(tower: TextTransformer, captions: Callable) -> None:
    tower(captions(9, width=12), shifts=[torch.tensor([20])])[0].square().sum().backward()
    assert tower.positional_embedding.grad is not None
    reached = tower.positional_embedding.grad.abs().amax(dim=1) > 0
    assert reached.nonzero().flatten().tolist() == [0, *range(21, 29)]


@torch.no_grad()
def test_computing_only_eot_in_the_last_block_is_exact(tower: TextTransformer, captions: Callable) -> None:
    lengths = torch.tensor([9, 20, 15])
    x, valid = torch.randn(3, 20, 32), torch.arange(20) < lengths[:, None]
    for block in (tower.blocks[-1], *[block for block in tower.blocks if isinstance(block, AttentionBlock)]):
        for mask in (valid, None):
            everywhere = block([TokenGroup(x, mask)])[0][torch.arange(3), lengths - 1]
            torch.testing.assert_close(block([TokenGroup(x, mask)], [lengths - 1])[0], everywhere, rtol=0, atol=1e-5)


def test_layer_norm_computes_in_fp32() -> None:
    norm = LayerNorm(8)
    x = (300 + torch.randn(5, 8)).half()
    expected = torch.nn.functional.layer_norm(x.float(), (8,)).half()
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm.half()(x), expected)


def test_bf16_autocast_stays_close_and_trains(tower: TextTransformer, captions: Callable) -> None:
    tokens = captions(9, 20, width=40)
    exact = tower(tokens)[0]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = tower(tokens)[0].float()
        tower.train()(tokens)[0].float().square().sum().backward()
    assert torch.nn.functional.cosine_similarity(exact, rounded).min() > 0.999
    assert all(parameter.grad.isfinite().all() for parameter in tower.parameters())


@pytest.mark.parametrize(
    "change", [{"heads": 5}, {"layers": 0}, {"kernel_size": 4}, {"width": 10**7}, {"vocab_size": 10**9}]
)
def test_impossible_shapes_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(InputError):
        TextConfig(**{"width": 32, "heads": 4, "layers": 2, **change})


def test_empty_batch(tower: TextTransformer) -> None:
    features: Tensor = tower(torch.zeros(0, 40, dtype=torch.int64))[0]
    assert features.shape == (0, 16)
