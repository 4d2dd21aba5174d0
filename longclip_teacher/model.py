"""Long-CLIP: open_clip's two transformers, reading captions of 248 tokens.

Only what a feature depends on is computed: captions are encoded at their own length, and the last block of each tower
works on the one position that is pooled. Both are exact.

Shapes: B batch, L tokens, N patches + class token, W tower width, D embedding width.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, TextTransformer, VisionTransformer
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn import functional as F

from longclip_teacher.config import TEACHERS, ImageTowerConfig, TeacherConfig
from longclip_teacher.errors import InputError
from longclip_teacher.text import CaptionTokenizer, caption_lengths, length_buckets, truncate

__all__ = ["LongCLIP", "create_teacher"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {"quickgelu": QuickGELU, "gelu": nn.GELU}
_SMALLEST_BUCKET = {"cpu": 8}  # captions; on an accelerator launching a small batch costs more than its padding
_SMALLEST_BUCKET_ELSEWHERE = 64


class LongCLIP(nn.Module):
    """An image tower and a causal text tower with one embedding space (CLIP, section 2; Long-CLIP, section 3)."""

    def __init__(self, config: TeacherConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = ImageTransformer(config)
        self.text = CaptionTransformer(config)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # log space

    def encode_image(self, images: Float[Tensor, "B 3 H W"], normalize: bool = False) -> Float[Tensor, "B D"]:
        """Features of images that `preprocess` (or `preprocess_cfg`'s mean and std) has normalised."""
        features = self.visual(images)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, tokens: Int[Tensor, "B L"], normalize: bool = False) -> Float[Tensor, "B D"]:
        """Features of token ids of any length L; captions beyond `context_length` are cut there with EOT kept.

        Captions are encoded in groups of like length. A causal tower never sees what follows EOT, so this equals the
        full padded pass.
        """
        tokens = truncate(tokens, self.context_length)
        lengths = caption_lengths(tokens).tolist()
        smallest = _SMALLEST_BUCKET.get(tokens.device.type, _SMALLEST_BUCKET_ELSEWHERE)
        buckets = length_buckets(lengths, smallest=smallest)
        encoded = torch.cat([self.text(tokens[rows, : lengths[rows[0]]]) for rows in buckets])
        order = torch.tensor([row for rows in buckets for row in rows], device=tokens.device)
        features = encoded[order.argsort()]
        return F.normalize(features, dim=-1) if normalize else features

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
    """open_clip's ViT, pooled at the class token; the patches come from one convolution or from a stack of them."""

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
        patches = self.conv1(images).flatten(2).transpose(1, 2)  # [B, N-1, W]
        class_token = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        x = torch.cat([class_token, patches], dim=1) + self.positional_embedding.to(patches.dtype)  # [B, N, W]
        x = self.ln_pre(x)
        for block in self.transformer.resblocks[:-1]:
            x = block(x)
        position = torch.zeros(len(x), dtype=torch.long, device=x.device)
        x = _block_at(self.transformer.resblocks[-1], x, position, None)
        return self.ln_post(x) @ self.proj  # [B, W] -> [B, D]


class CaptionTransformer(TextTransformer):
    """open_clip's causal text transformer for any length up to its context, with Long-CLIP's two position tables.

    The first rows are a buffer, out of reach of gradients and weight decay, the others a parameter: what the published
    code does with two full tables and two masks (Long-CLIP, section 3.2).
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


def create_teacher(name_or_config: str | TeacherConfig, context_length: int | None = None) -> LongCLIP:
    """A LongCLIP with random weights, ready to train: `tiny`, `small`, `b16`, `l14` or a configuration.

    `context_length` overrides the configuration's (248 for the names). An unknown name raises InputError.
    """
    if isinstance(name_or_config, TeacherConfig):
        config = name_or_config
    elif name_or_config in TEACHERS:
        config = TEACHERS[name_or_config]
    else:
        raise InputError(f"no teacher is called {name_or_config!r}: choose one of {', '.join(TEACHERS)}")
    if context_length is not None:
        config = replace(config, text=replace(config.text, context_length=context_length))
    return LongCLIP(config)


def _block_at(
    block: ResidualAttentionBlock,
    x: Float[Tensor, "B N W"],
    position: Int[Tensor, " B"],
    hidden: Bool[Tensor, "B N"] | None,
) -> Float[Tensor, "B W"]:
    """What `block` makes of one position a row; `hidden` keys are not attended. The other positions cost only keys."""
    rows = torch.arange(len(x), device=x.device)
    keys = block.ln_1(x)
    query = keys[rows, position].unsqueeze(1)  # [B, 1, W]
    attended, _ = block.attn(query, keys, keys, key_padding_mask=hidden, need_weights=False)
    pooled = x[rows, position] + attended.squeeze(1)  # [B, W]
    return pooled + block.mlp(block.ln_2(pooled))


def _conv_stem(image: ImageTowerConfig) -> nn.Sequential:
    """Stride-2 3x3 convolutions to one position a patch (Early Convolutions Help Transformers See Better, sec. 4)."""
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
