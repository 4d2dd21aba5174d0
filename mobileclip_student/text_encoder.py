"""MobileCLIP's text tower at any number of tokens; padding does not change a caption's feature.

Base towers are pre-norm transformers; the hybrid one (MobileCLIP-S0's) puts its attention layers between two RepMixer
blocks. Attention runs both ways unless the tower is causal.

Shapes: B captions, L tokens, C width, H heads, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from longclip_teacher.activation import Activation
from longclip_teacher.errors import InputError
from longclip_teacher.text import VOCAB_SIZE, caption_lengths, trim, truncate
from longclip_teacher.trace import Trace
from longclip_teacher.transfer import sent
from mobileclip_student.repmixer import RepMixerBlock, TokenGroup, take_tokens

__all__ = ["AttentionBlock", "TextConfig", "TextTransformer"]


def _quick_gelu(x: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quickgelu": _quick_gelu}
# These bound the memory that a configuration read from a file can ask for
_MAX_SIZE, _MAX_VOCAB_SIZE = 8192, 1 << 20


@dataclass(frozen=True)
class TextConfig:
    """Shape of a text tower."""

    width: int
    heads: int
    layers: int
    """attention layers"""
    hybrid: bool = False
    """a RepMixer block before and after the attention layers"""
    causal: bool = False
    """each token attends only to itself and to those before it"""
    kernel_size: int = 11
    """kernel width of a RepMixer block's convolutions in tokens (odd)"""
    activation: Activation = "gelu"
    """activation of the attention layers' FFNs; OpenAI and Long-CLIP use quickgelu, x * sigmoid(1.702 x)"""
    layer_scale: float = 1e-5
    """initial layer scale of the RepMixer blocks"""
    mlp_ratio: float = 4.0
    vocab_size: int = VOCAB_SIZE

    def __post_init__(self) -> None:
        sizes = (self.width, self.heads, self.layers, self.kernel_size, self.mlp_ratio)
        if not all(1 <= size <= _MAX_SIZE for size in sizes) or not 1 <= self.vocab_size <= _MAX_VOCAB_SIZE:
            raise InputError(f"a text tower cannot have the sizes {self}")
        if self.width % self.heads:
            raise InputError(
                f"text width {self.width} is not a multiple of its {self.heads} heads: choose heads that divide it"
            )
        if self.kernel_size % 2 == 0:
            raise InputError(
                f"kernel_size {self.kernel_size} is even: a convolution that keeps the length needs an odd one"
            )
        if self.activation not in _ACTIVATIONS:
            raise InputError(f"there is no activation {self.activation!r}: choose {', '.join(_ACTIVATIONS)}")


class LayerNorm(nn.LayerNorm):
    """LayerNorm computed in fp32, also under autocast; the output has the input's type."""

    def forward(self, x: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        if x.dtype not in (torch.float16, torch.bfloat16):
            return super().forward(x)
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class AttentionBlock(nn.Module):
    """Pre-norm self-attention, then a pre-norm FFN with GELU or QuickGELU."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.heads, self.causal, self.activation = config.heads, config.causal, config.activation
        self.ln_1 = LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.ln_2 = LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, groups: Sequence[TokenGroup], pooled: Sequence[Int[Tensor, " B"]] | None = None) -> list[Tensor]:
        """[B, L, C] of each group; with `pooled`, only each caption's token at that index, [B, C] of each group."""
        if pooled is None:
            return [self.traced(group)[0] for group in groups]
        return [self._pooled(x, valid, at) for (x, valid), at in zip(groups, pooled, strict=True)]

    def traced(self, group: TokenGroup) -> tuple[Float[Tensor, "B L C"], tuple[Tensor, Tensor, Tensor]]:
        """[B, L, C] of a group, and the queries, keys and values [B, H, L, C/H] of its tokens."""
        x, valid = group
        tokens = self.ln_1(x)
        heads = self._heads(tokens, tokens)
        return self._rest(x, self._attend(heads, valid, is_causal=self.causal)), heads

    def _pooled(
        self, x: Float[Tensor, "B L C"], valid: Bool[Tensor, "B L"] | None, pooled: Int[Tensor, " B"]
    ) -> Float[Tensor, "B C"]:
        keys = self.ln_1(x)
        queries = take_tokens(keys, pooled).unsqueeze(1)  # B 1 C
        if self.causal:
            valid = torch.arange(keys.shape[1], device=x.device) <= pooled[:, None]
        mixed = self._attend(self._heads(queries, keys), valid, is_causal=False)
        return self._rest(take_tokens(x, pooled), mixed.squeeze(1))

    def _heads(
        self, queries: Float[Tensor, "B Q C"], keys: Float[Tensor, "B L C"]
    ) -> tuple[Float[Tensor, "B H Q C/H"], Float[Tensor, "B H L C/H"], Float[Tensor, "B H L C/H"]]:
        query = self.query(queries).unflatten(2, (self.heads, -1)).transpose(1, 2)
        key, value = self.key_value(keys).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return query, key, value

    def _attend(
        self, heads: tuple[Tensor, Tensor, Tensor], valid: Bool[Tensor, "B L"] | None, *, is_causal: bool
    ) -> Float[Tensor, "B Q C"]:
        # a causal query never reaches the pads, which stand after EOT
        mask = None if valid is None or is_causal else valid[:, None, None, :]
        mixed = F.scaled_dot_product_attention(*heads, attn_mask=mask, is_causal=is_causal)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _rest(self, x: Float[Tensor, "... C"], mixed: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        x = x + mixed
        return x + self.fc2(_ACTIVATIONS[self.activation](self.fc1(self.ln_2(x))))


class TextTransformer(nn.Module):
    """Text features of token ids, pooled at EOT.

    With `pad_mask`, a caption's feature depends neither on its padding nor on the captions beside it: pads are not
    attended, are zeroed before each convolution and stay out of the BatchNorm statistics. Without it, the tower behaves
    as published: captions are padded to `context_length` and every position takes part.
    """

    def __init__(self, config: TextConfig, embed_dim: int, *, context_length: int, pad_mask: bool) -> None:
        super().__init__()
        self.context_length, self.pad_mask, self.causal = context_length, pad_mask, config.causal
        self.trim_captions = True
        """False: masked pads are still computed, up to the context length."""
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, config.width))
        blocks: list[nn.Module] = [AttentionBlock(config) for _ in range(config.layers)]
        if config.hybrid:
            blocks = [_repmixer_block(config), *blocks, _repmixer_block(config)]
        self.blocks = nn.ModuleList(blocks)
        self.ln_final = LayerNorm(config.width)
        self.projection = nn.Parameter(torch.empty(config.width, embed_dim))
        self._init_parameters(config)

    def forward(
        self, *batches: Int[Tensor, "B L"], shifts: Sequence[Int[Tensor, " B"] | None] | None = None
    ) -> list[Float[Tensor, "B D"]]:
        """Features of each batch of captions, not normalised. L is any length: longer captions are cut, with EOT kept.
        Tokens may be on the host or on the tower's device. A GPU is not waited for if they are on the host.

        `shifts` (one per batch, for training) moves the tokens of each caption after SOT to later positions; see
        `_positions`.

        Trimming a batch to its longest caption changes features and gradients by at most 1e-5, in training too.

        Batches given together are each computed at their own length but share the BatchNorm statistics in training: the
        statistics of long and short captions differ, and inference has one set for both.
        """
        groups, _, lengths = self._embed(batches, shifts)
        return self._features(groups, lengths)

    def by_shape(self, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B D"]:
        """The features of `forward`, by operations that depend on the shape of `tokens` and not on their values, as an
        exported graph needs. L is at most the context length; what follows a caption's first EOT does not matter.
        """
        if not self.pad_mask:  # these towers attend to zeros up to the context length
            positions = torch.arange(tokens.shape[1], device=tokens.device)
            tokens = tokens * (positions < caption_lengths(tokens)[:, None])
            tokens = F.pad(tokens, (0, self.context_length - tokens.shape[1]))
        group, _, lengths = self._embed_whole(tokens)
        return self._features([group], [lengths])[0]

    def _features(
        self, groups: Sequence[TokenGroup], lengths: Sequence[Int[Tensor, " B"]]
    ) -> list[Float[Tensor, "B D"]]:
        for block in self.blocks[:-1]:
            groups = _next_groups(groups, block(groups))
        pooled = self.blocks[-1](groups, [length - 1 for length in lengths])  # B C: only EOT is read from here on
        return [self.ln_final(x) @ self.projection for x in pooled]

    def traced(
        self, *batches: Int[Tensor, "B L"], shifts: Sequence[Int[Tensor, " B"] | None] | None = None
    ) -> tuple[list[Float[Tensor, "B D"]], list[Trace]]:
        """The features of `forward`, and the trace of each batch through the attention blocks.

        RepMixer blocks run but leave no entry. Only real tokens are valid, also with `pad_mask` off.
        """
        groups, tokens, lengths = self._embed(batches, shifts)
        traces = [
            Trace(x, embedded, [], [], [], [], torch.arange(x.shape[1], device=x.device) < length[:, None], self.causal)
            for (x, _), embedded, length in zip(groups, tokens, lengths, strict=True)
        ]
        for block in self.blocks:
            if not isinstance(block, AttentionBlock):
                groups = _next_groups(groups, block(groups))
                continue
            outputs = [block.traced(group) for group in groups]
            groups = _next_groups(groups, [x for x, _ in outputs])
            for trace, (x, (query, key, value)) in zip(traces, outputs, strict=True):
                trace.hidden.append(x)
                trace.query.append(query)
                trace.key.append(key)
                trace.value.append(value)
        pooled = [take_tokens(x, length - 1) for (x, _), length in zip(groups, lengths, strict=True)]
        return [self.ln_final(x) @ self.projection for x in pooled], traces

    def _embed(
        self, batches: Sequence[Int[Tensor, "B L"]], shifts: Sequence[Int[Tensor, " B"] | None] | None
    ) -> tuple[list[TokenGroup], list[Float[Tensor, "B L C"]], list[Int[Tensor, " B"]]]:
        """For each batch: tokens with positions, tokens without, and lengths of the captions."""
        groups, embedded, lengths = [], [], []
        for tokens, shift in zip(batches, shifts or [None] * len(batches), strict=True):
            tokens = truncate(tokens, self.context_length)
            if self.pad_mask and self.trim_captions:
                tokens = trim(tokens)
            else:
                tokens = F.pad(tokens, (0, self.context_length - tokens.shape[1]))
            group, alone, length = self._embed_whole(sent(tokens, self.projection.device), shift)
            groups.append(group)
            embedded.append(alone)
            lengths.append(length)
        return groups, embedded, lengths

    def _embed_whole(
        self, tokens: Int[Tensor, "B L"], shift: Int[Tensor, " B"] | None = None
    ) -> tuple[TokenGroup, Float[Tensor, "B L C"], Int[Tensor, " B"]]:
        """The same for one batch, with all its columns."""
        lengths = caption_lengths(tokens)
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        valid = positions < lengths[:, None] if self.pad_mask else None
        embedded = self.token_embedding(tokens)  # B L C
        return TokenGroup(embedded + self._positions(tokens.shape[1], shift), valid), embedded, lengths

    def _positions(self, length: int, shift: Int[Tensor, " B"] | None) -> Float[Tensor, "L C"] | Float[Tensor, "B L C"]:
        """Rows of the position table for `length` tokens, or for captions shifted by `shift` each.

        SOT keeps position 0, and token i > 0 has position i + shift. Nothing else changes: neither the neighbours of a
        token nor the number of tokens. Pads beyond the table have its last row.
        """
        if shift is None:
            return self.positional_embedding[:length]
        positions = torch.arange(length, device=shift.device)
        rows = positions + shift[:, None] * (positions > 0)
        return F.embedding(rows.clamp(max=self.context_length - 1), self.positional_embedding)

    @torch.no_grad()
    def _init_parameters(self, config: TextConfig) -> None:
        """Initialise the transformer as CLIP does, RepMixer FFNs as FastViT does; convolutions keep PyTorch's."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.projection, std=config.width**-0.5)
        residual_std = config.width**-0.5 * (2 * config.layers) ** -0.5
        for block in self.blocks:
            if isinstance(block, AttentionBlock):
                for linear, std in (
                    (block.query, config.width**-0.5),
                    (block.key_value, config.width**-0.5),
                    (block.out, residual_std),
                    (block.fc1, (2 * config.width) ** -0.5),
                    (block.fc2, residual_std),
                ):
                    nn.init.normal_(linear.weight, std=std)
                    nn.init.zeros_(linear.bias)
            elif isinstance(block, RepMixerBlock):
                for linear in (block.fc1, block.fc2):
                    nn.init.trunc_normal_(linear.weight, std=0.02)
                    nn.init.zeros_(linear.bias)


def _next_groups(groups: Sequence[TokenGroup], xs: Sequence[Float[Tensor, "B L C"]]) -> list[TokenGroup]:
    return [TokenGroup(x, group.valid) for x, group in zip(xs, groups, strict=True)]


def _repmixer_block(config: TextConfig) -> RepMixerBlock:
    return RepMixerBlock(
        config.width, kernel_size=config.kernel_size, mlp_ratio=config.mlp_ratio, layer_scale=config.layer_scale
    )
