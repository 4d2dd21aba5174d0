"""Long-CLIP: open_clip's two transformers, reading captions of 248 tokens.

The towers compute only what a feature depends on: each distinct caption is encoded once, at its own length, and the
last block of each tower computes only the position that is pooled. The features stay the same to 1e-5.

Shapes: B batch, L tokens, T tokens of several captions end to end, N patches + class token, W tower width,
D embedding width.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from jaxtyping import Bool, Float, Int
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn import functional as F

from longclip_teacher.ancestry import NOT_RECORDED, Ancestry
from longclip_teacher.config import TEACHERS, ImageTowerConfig, TeacherConfig
from longclip_teacher.errors import InputError
from longclip_teacher.open_clip_parts import (
    PreprocessCfg,
    QuickGELU,
    ResidualAttentionBlock,
    TextTransformer,
    VisionTransformer,
    image_transform_v2,
)
from longclip_teacher.text import CaptionTokenizer, caption_lengths, length_buckets, trim, truncate
from longclip_teacher.trace import Trace
from longclip_teacher.transfer import sent

__all__ = ["LongCLIP", "create_teacher"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {"quickgelu": QuickGELU, "gelu": nn.GELU}
_PACKED_DEVICES = ("cpu",)  # elsewhere, attention over one length at a time needs too many small launches
_SMALLEST_BUCKET = 64  # captions; on an accelerator, launching a small batch costs more than its padding
_PACK_TOKENS = 1024  # on the CPU, where the activations of more tokens no longer fit in the caches


class LongCLIP(nn.Module):
    """An image tower and a causal text tower with one embedding space (CLIP, section 2; Long-CLIP, section 3)."""

    def __init__(self, config: TeacherConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = ImageTransformer(config)
        self.text = CaptionTransformer(config)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # log space
        self.trim_captions = True
        """False: `encode_text` passes the whole batch at once, each caption padded to the context length."""
        self.ancestry: Ancestry = NOT_RECORDED
        """Where its weights come from; saved with them."""

    def encode_image(self, images: Float[Tensor, "B 3 H W"], normalize: bool = False) -> Float[Tensor, "B D"]:
        """Features of images that `preprocess` (or `preprocess_cfg`'s mean and std) has normalised."""
        features = self.visual(images)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, tokens: Int[Tensor, "B L"], normalize: bool = False) -> Float[Tensor, "B D"]:
        """Features of token ids of any length L; captions beyond `context_length` are cut there, with EOT kept.

        Tokens may be on the host or on the model's device. A GPU is not waited for if they are on the host.
        Each distinct caption is encoded once, in groups of similar length. A causal tower never sees what follows EOT,
        so the unit-norm features equal those of the full padded pass to 1e-5.
        """
        tokens = truncate(tokens, self.context_length)
        if not len(tokens):
            features = self.text.text_projection.new_zeros(0, self.embed_dim)
        elif self.trim_captions:
            features = self._encode_trimmed(tokens)
        else:
            features = self.text(self._padded(tokens))
        return F.normalize(features, dim=-1) if normalize else features

    def _padded(self, tokens: Int[Tensor, "B L"]) -> Int[Tensor, "B K"]:
        """Tokens up to the context length, on the model's device."""
        padded = F.pad(tokens, (0, self.context_length - tokens.shape[1]))
        return sent(padded, self.text.text_projection.device)

    def _encode_trimmed(self, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B D"]:
        host, device = tokens.cpu(), self.text.text_projection.device
        captions = [row[:length] for row, length in zip(host.numpy(), caption_lengths(host).numpy(), strict=True)]
        first_rows: dict[bytes, int] = {}
        same_as = [first_rows.setdefault(caption.tobytes(), row) for row, caption in enumerate(captions)]
        rows = sorted(first_rows.values(), key=lambda row: -len(captions[row]))
        lengths = [len(captions[row]) for row in rows]
        distinct = sent(host[rows], device)
        if device.type in _PACKED_DEVICES:
            groups = [self.text.packed(distinct[pack], lengths[pack]) for pack in _packs(lengths)]
        else:
            buckets = length_buckets(lengths, smallest=_SMALLEST_BUCKET)  # consecutive: they are sorted
            groups = [self.text(distinct[bucket[0] : bucket[-1] + 1, : lengths[bucket[0]]]) for bucket in buckets]
        place = {row: index for index, row in enumerate(rows)}
        return torch.cat(groups)[sent(torch.tensor([place[row] for row in same_as]), device)]

    def trace_image(self, images: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B D"], Trace]:
        """The features of `encode_image`, equal to 1e-5, and the trace of its layers, the last block in full."""
        return self.visual.traced(images)

    def trace_text(self, tokens: Int[Tensor, "B L"]) -> tuple[Float[Tensor, "B D"], Trace]:
        """The features of `encode_text`, equal to 1e-5, and the trace of its layers.

        The trace has the length of the longest caption (of the context, if `trim_captions` is off), pads included.
        """
        tokens = truncate(tokens, self.context_length)
        if self.trim_captions:
            return self.text.traced(sent(trim(tokens), self.text.text_projection.device))
        return self.text.traced(self._padded(tokens))

    @property
    def linear_logit_scale(self) -> Float[Tensor, ""]:
        """The factor on cosine similarities."""
        return self.logit_scale.exp()

    @property
    def embed_dim(self) -> int:
        """Width D of the features."""
        return self.config.embed_dim

    @property
    def image_size(self) -> int:
        """Side of the square input picture in pixels."""
        return self.config.image.size

    @property
    def context_length(self) -> int:
        """Most tokens of a caption, SOT and EOT included."""
        return self.config.text.context_length

    @property
    def tokenizer(self) -> CaptionTokenizer:
        """Captions to token ids at this model's context length."""
        return CaptionTokenizer(self.context_length)

    @property
    def preprocess_cfg(self) -> PreprocessCfg:
        """Size, mean, std and interpolation of the input pictures."""
        config = self.config
        return PreprocessCfg(size=self.image_size, mean=config.mean, std=config.std, interpolation=config.interpolation)

    @property
    def preprocess(self) -> Callable[[Image], Tensor]:
        """The evaluation transform: a PIL picture to a normalised [3, H, W] tensor."""
        return image_transform_v2(self.preprocess_cfg, is_train=False)


class ImageTransformer(VisionTransformer):
    """open_clip's ViT, pooled at the class token; one convolution, or a stack of them, makes the patches."""

    def __init__(self, config: TeacherConfig) -> None:
        image = config.image
        super().__init__(
            image_size=image.size,
            patch_size=image.patch,
            width=image.width,
            layers=image.layers,
            heads=image.heads,
            mlp_ratio=4.0,
            output_dim=config.embed_dim,
            act_layer=_ACTIVATIONS[config.activation],
        )
        if image.stem == "conv":
            self.conv1 = _conv_stem(image)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """Image features, not normalised."""
        tokens = self._tokens(images)
        x = self.ln_pre(tokens + self.positional_embedding.to(tokens.dtype))
        for block in self.transformer.resblocks[:-1]:
            x = block(x)
        position = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
        x = _block_at(self.transformer.resblocks[-1], x, position, None)
        return self.ln_post(x) @ self.proj  # [B, W] -> [B, D]

    def traced(self, images: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B D"], Trace]:
        """The features of `forward` and what stands at all positions on the way."""
        tokens = self._tokens(images)
        embedding = tokens + self.positional_embedding.to(tokens.dtype)
        x, layers = _traced_blocks(self.transformer.resblocks, self.ln_pre(embedding), is_causal=False)
        valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        trace = Trace(embedding, tokens, *layers, valid, causal=False, num_prefix_tokens=1)
        return self.ln_post(x[:, 0]) @ self.proj, trace

    def _tokens(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B N W"]:
        patches = self.conv1(images).flatten(2).transpose(1, 2)  # [B, N-1, W]
        class_token = self.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        return torch.cat([class_token, patches], dim=1)


class CaptionTransformer(TextTransformer):
    """open_clip's causal text transformer for any length up to its context, with Long-CLIP's two position tables.

    The first rows are a buffer, which gradients and weight decay do not reach, and the others a parameter. The
    published code does the same with two full tables and two masks (Long-CLIP, section 3.2).
    """

    frozen_positional_embedding: Float[Tensor, "K W"]
    positional_embedding: nn.Parameter  # [context_length - K, W]

    def __init__(self, config: TeacherConfig) -> None:
        text = config.text
        super().__init__(
            context_length=text.context_length,
            vocab_size=text.vocab_size,
            width=text.width,
            heads=text.heads,
            layers=text.layers,
            output_dim=config.embed_dim,
            act_layer=_ACTIVATIONS[config.activation],
            no_causal_mask=True,  # no [L, L] buffer; `forward` makes the mask at the length it needs
        )
        frozen, trained = self.positional_embedding.detach().split(
            [config.num_frozen_positions, text.context_length - config.num_frozen_positions]
        )
        self.register_buffer("frozen_positional_embedding", frozen.clone())
        self.positional_embedding = nn.Parameter(trained.clone())

    @property
    def position_table(self) -> Float[Tensor, "L W"]:
        """All positions: the frozen rows, then the trained ones."""
        return torch.cat([self.frozen_positional_embedding, self.positional_embedding])

    def forward(self, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B D"]:
        """Text features at EOT, not normalised. L is at most the context length."""
        length = tokens.shape[1]
        x = self.token_embedding(tokens) + self.position_table[:length]  # [B, L, W]
        causal_mask = torch.full((length, length), -math.inf, dtype=x.dtype, device=x.device).triu(1)
        for block in self.transformer.resblocks[:-1]:
            x = block(x, attn_mask=causal_mask)
        eot = tokens.argmax(dim=1)
        after_eot = torch.arange(length, device=x.device) > eot[:, None]
        x = _block_at(self.transformer.resblocks[-1], x, eot, after_eot)
        return self.ln_final(x) @ self.text_projection  # [B, W] -> [B, D]

    def traced(self, tokens: Int[Tensor, "B L"]) -> tuple[Float[Tensor, "B D"], Trace]:
        """The features of `forward` and what stands at all positions on the way, pads included."""
        embedded = self.token_embedding(tokens)  # [B, L, W]
        embedding = embedded + self.position_table[: tokens.shape[1]]
        x, layers = _traced_blocks(self.transformer.resblocks, embedding, is_causal=True)
        lengths = caption_lengths(tokens)
        valid = torch.arange(tokens.shape[1], device=x.device) < lengths[:, None]
        pooled = x[torch.arange(x.shape[0], device=x.device), lengths - 1]  # [B, W]
        return self.ln_final(pooled) @ self.text_projection, Trace(embedding, embedded, *layers, valid, causal=True)

    def packed(self, tokens: Int[Tensor, "B L"], lengths: Sequence[int]) -> Float[Tensor, "B D"]:
        """Features of captions of these lengths, sorted, without computing a single pad.

        The captions lie end to end. Only attention mixes tokens, and it runs over the captions of one length at a
        time: sorted by length, they form a batch that needs no mask but the causal one.
        """
        is_real = torch.arange(tokens.shape[1]) < torch.tensor(lengths)[:, None]
        positions = torch.arange(tokens.shape[1]).expand_as(is_real)[is_real]  # [T]
        x = self.token_embedding(tokens[is_real]) + self.position_table[positions]  # [T, W]
        runs = [(len(list(run)), length) for length, run in groupby(lengths)]
        for block in self.transformer.resblocks[:-1]:
            x = x + _attend_packed(block.attn, block.ln_1(x), runs)
            x = x + block.mlp(block.ln_2(x))
        block, eot = self.transformer.resblocks[-1], torch.tensor(lengths).cumsum(0) - 1
        pooled = x[eot] + _attend_packed(block.attn, block.ln_1(x), runs, eot)  # [B, W]
        pooled = pooled + block.mlp(block.ln_2(pooled))
        return self.ln_final(pooled) @ self.text_projection  # [B, W] -> [B, D]


def create_teacher(name_or_config: str | TeacherConfig, context_length: int | None = None) -> LongCLIP:
    """A LongCLIP with random weights, ready to train: `tiny`, `small`, `b16`, `l14` or a configuration.

    `context_length` overrides the configuration's (248 for named ones). An unknown name raises InputError.
    """
    if isinstance(name_or_config, TeacherConfig):
        config = name_or_config
    elif name_or_config in TEACHERS:
        config = TEACHERS[name_or_config]
    else:
        raise InputError(f"there is no teacher {name_or_config!r}: choose one of {', '.join(TEACHERS)}")
    if context_length is not None:
        config = replace(config, text=replace(config.text, context_length=context_length))
    return LongCLIP(config)


def _block_at(
    block: ResidualAttentionBlock,
    x: Float[Tensor, "B N W"],
    position: Int[Tensor, " B"],
    hidden: Bool[Tensor, "B N"] | None,
) -> Float[Tensor, "B W"]:
    """The output of `block` at one position per row, without attending to `hidden` keys. The other positions only give
    keys and values."""
    rows = torch.arange(x.shape[0], device=x.device)  # len(x) would fix the batch of an exported graph
    keys = block.ln_1(x)
    query = keys[rows, position].unsqueeze(1)  # [B, 1, W]
    attended, _ = block.attn(query, keys, keys, key_padding_mask=hidden, need_weights=False)
    pooled = x[rows, position] + attended.squeeze(1)  # [B, W]
    return pooled + block.mlp(block.ln_2(pooled))


def _traced_blocks(
    blocks: Iterable[nn.Module], x: Float[Tensor, "B L W"], *, is_causal: bool
) -> tuple[Float[Tensor, "B L W"], tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]]:
    """The output of the last block, and the output, queries, keys and values of each block."""
    layers: tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]] = ([], [], [], [])
    for block in blocks:
        assert isinstance(block, ResidualAttentionBlock)
        attention = block.attn
        projected = F.linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)  # [B, L, 3 W]
        query, key, value = projected.unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)  # [B, H, L, W / H]
        x = x + attention.out_proj(mixed.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.ln_2(x))
        for values, new in zip(layers, (x, query, key, value), strict=True):
            values.append(new)
    return x, layers


def _attend_packed(
    attention: nn.MultiheadAttention,
    x: Float[Tensor, "T W"],
    runs: Sequence[tuple[int, int]],
    eot: Int[Tensor, " B"] | None = None,
) -> Float[Tensor, "T W"] | Float[Tensor, "B W"]:
    """Causal self-attention within each caption of `runs` (number of captions, their length); with `eot`, for these
    tokens alone."""
    width, heads = attention.embed_dim, attention.num_heads
    assert attention.in_proj_weight is not None and attention.in_proj_bias is not None
    weights, biases = (
        attention.in_proj_weight.split([width, 2 * width]),
        attention.in_proj_bias.split([width, 2 * width]),
    )
    queries = F.linear(x if eot is None else x[eot], weights[0], biases[0])
    keys_values = F.linear(x, weights[1], biases[1])  # [T, 2 W]
    attended = []
    sizes = [count * length for count, length in runs]
    parts = queries.split(sizes if eot is None else [count for count, _ in runs])
    for (count, _), query, key_value in zip(runs, parts, keys_values.split(sizes), strict=True):
        query = query.view(count, -1, heads, width // heads).transpose(1, 2)  # [n, H, L or 1, W / H]
        key, value = key_value.view(count, -1, 2, heads, width // heads).permute(2, 0, 3, 1, 4)  # [n, H, L, W / H] each
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=eot is None)
        attended.append(mixed.transpose(1, 2).flatten(0, 1).flatten(1))
    return attention.out_proj(torch.cat(attended))


def _packs(lengths: Sequence[int]) -> list[slice]:
    """Cut captions of these lengths into groups of about `_PACK_TOKENS` tokens."""
    cuts, num_tokens = [0], 0
    for index, length in enumerate(lengths):
        if num_tokens >= _PACK_TOKENS:
            cuts.append(index)
            num_tokens = 0
        num_tokens += length
    return [slice(start, stop) for start, stop in zip(cuts, [*cuts[1:], len(lengths)], strict=True)]


def _conv_stem(image: ImageTowerConfig) -> nn.Sequential:
    """Stride-2 3x3 convolutions to one position per patch (Early Convolutions Help Transformers See Better, sec. 4)."""
    layers: list[tuple[str, nn.Module]] = []
    num_convs = image.patch.bit_length() - 1
    channels = 3
    for index in range(num_convs):
        out_channels = image.width // 2 ** (num_convs - 1 - index)
        layers.append((f"conv{index}", nn.Conv2d(channels, out_channels, 3, stride=2, padding=1, bias=False)))
        layers.append((f"norm{index}", nn.GroupNorm(1, out_channels)))
        layers.append((f"act{index}", nn.GELU()))
        channels = out_channels
    layers.append(("project", nn.Conv2d(channels, image.width, 1)))
    return nn.Sequential(OrderedDict(layers))
