"""Random weights in the published key layout, so that a loader can be tested with no download."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

SOT, EOT = 998, 999  # of the small vocabulary


class Draws:
    """Random tensors of a transformer's layers, from one generator."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=self._generator) * std

    def norm(self, name: str, width: int) -> dict[str, Tensor]:
        weight = torch.rand(width, generator=self._generator) + 0.5
        return {f"{name}.weight": weight, f"{name}.bias": self.normal(width, std=0.3)}

    def linear(self, weight: str, bias: str, outputs: int, inputs: int) -> dict[str, Tensor]:
        return {weight: self.normal(outputs, inputs, std=inputs**-0.5), bias: self.normal(outputs, std=0.3)}

    def block(self, width: int) -> dict[str, Tensor]:
        return {
            **self.norm("ln_1", width),
            **self.linear("attn.in_proj_weight", "attn.in_proj_bias", 3 * width, width),
            **self.linear("attn.out_proj.weight", "attn.out_proj.bias", width, width),
            **self.norm("ln_2", width),
            **self.linear("mlp.c_fc.weight", "mlp.c_fc.bias", 4 * width, width),
            **self.linear("mlp.c_proj.weight", "mlp.c_proj.bias", width, 4 * width),
        }

    def blocks(self, prefix: str, width: int, layers: int, *, shared: bool) -> dict[str, Tensor]:
        made = [self.block(width)] * layers if shared else [self.block(width) for _ in range(layers)]
        return {f"{prefix}.{layer}.{name}": value for layer in range(layers) for name, value in made[layer].items()}


def make_official_weights(
    *,
    image_width: int = 128,
    image_layers: int = 3,
    patch: int = 8,
    image_size: int = 32,
    text_width: int = 192,
    text_layers: int = 2,
    vocab_size: int = 1000,
    embed_dim: int = 64,
    num_positions: int = 248,
    two_tables: bool = True,
    shared_layers: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Long-CLIP's state dict (with `two_tables`) or CLIP's. No weight is left at a neutral value such as 0 or 1.

    `shared_layers` gives all blocks of a tower the same tensors, which keeps a file of real shapes small.
    """
    draw = Draws(seed)
    num_patches = (image_size // patch) ** 2
    weights = {
        "visual.class_embedding": draw.normal(image_width, std=0.5),
        "visual.positional_embedding": draw.normal(num_patches + 1, image_width, std=0.5),
        "visual.proj": draw.normal(image_width, embed_dim, std=image_width**-0.5),
        "visual.conv1.weight": draw.normal(image_width, 3, patch, patch, std=(3 * patch * patch) ** -0.5),
        **draw.norm("visual.ln_pre", image_width),
        **draw.blocks("visual.transformer.resblocks", image_width, image_layers, shared=shared_layers),
        **draw.norm("visual.ln_post", image_width),
        "positional_embedding": draw.normal(num_positions, text_width, std=0.5),
        "text_projection": draw.normal(text_width, embed_dim, std=text_width**-0.5),
        "logit_scale": torch.tensor(3.7),
        **draw.blocks("transformer.resblocks", text_width, text_layers, shared=shared_layers),
        "token_embedding.weight": draw.normal(vocab_size, text_width, std=0.5),
        **draw.norm("ln_final", text_width),
    }
    if two_tables:
        weights["positional_embedding_res"] = draw.normal(num_positions, text_width, std=0.5)
    return weights


def make_tokens(lengths: list[int], context_length: int = 248, sot: int = SOT, eot: int = EOT) -> Tensor:
    """Random captions of the given lengths, SOT and EOT included, zero padded."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.zeros(len(lengths), context_length, dtype=torch.long)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = torch.randint(0, sot, (length,), generator=generator)  # 0 is also a word
        row[0], row[length - 1] = sot, eot
    return tokens


@pytest.fixture
def official_weights() -> Callable[..., dict[str, Tensor]]:
    return make_official_weights


@pytest.fixture
def caption_tokens() -> Callable[..., Tensor]:
    return make_tokens
