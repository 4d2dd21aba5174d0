"""The image tower, MobileCLIP's or a ViT: a timm model whose classifier projects into the joint space.

Shapes: B images, R image side in pixels, D embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.models.deit import VisionTransformerDistilled
from timm.models.fastvit import FastVit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from longclip_teacher.errors import InputError

__all__ = ["FIXED_SIZE_TOWERS", "PUBLISHED_TOWERS", "VIT", "ImageConfig", "ImageEncoder"]

# The towers of the published models and the pooling of each
_POOLING = {
    "fastvit_mci0": "avg",
    "fastvit_mci1": "avg",
    "fastvit_mci2": "avg",
    "fastvit_mci3": "avg",
    "fastvit_mci4": "avg",
    "vit_base_mci_224": "token",
    "vit_large_patch14_clip_224": "token",
}
_NARROW, VIT = "fastvit", "vit"
PUBLISHED_TOWERS = tuple(_POOLING)
FIXED_SIZE_TOWERS = ("vit_base_mci_224", "vit_large_patch14_clip_224")
_MAX_SIZE = 8192  # bounds the memory that a configuration read from a file can ask for


@dataclass(frozen=True)
class ImageConfig:
    """Shape of an image tower and the format of its pictures."""

    tower: str
    """a timm model of the MobileCLIP papers; `fastvit`: a FastViT of the given `layers` and `embed_dims`; `vit`: a ViT
    of the given `patch`, `width`, `depth` and `heads`"""
    image_size: int
    """side of the square input in pixels"""
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    interpolation: str = "bilinear"
    drop_path: float = 0.0
    """stochastic depth in training: share of residual branches dropped in the last block, rising from 0 in the first"""
    norm_eps: float | None = None
    """epsilon of a ViT's LayerNorms; None: timm's"""
    stem_padding: int | None = None
    """pixels of zeros around the picture in a ViT's convolutional stem; None: timm's (none)"""
    layers: tuple[int, ...] = ()
    """`fastvit` only: RepMixer blocks per stage"""
    embed_dims: tuple[int, ...] = ()
    """`fastvit` only: channels per stage, each a multiple of the one before"""
    mlp_ratio: float = 3.0
    """`fastvit` only: hidden channels of an FFN per channel"""
    layer_scale: float = 1e-5
    """`fastvit` only: initial layer scale; a small tower trained from scratch learns faster with 0.1"""
    patch: int = 0
    """`vit` only: side of a patch in pixels; must divide `image_size`"""
    width: int = 0
    """`vit` only: channels of a token"""
    depth: int = 0
    """`vit` only: transformer blocks"""
    heads: int = 0
    """`vit` only: attention heads; must divide `width`"""
    distillation_token: bool = False
    """`vit` only: a second class token with its own head, which learns the teacher's answer (DeiT, section 4)"""

    def __post_init__(self) -> None:
        if self.tower not in (*_POOLING, _NARROW, VIT):
            raise InputError(f"no image tower {self.tower!r}: choose {', '.join(_POOLING)}, {_NARROW} or {VIT}")
        if (self.tower == _NARROW) != bool(self.layers) or len(self.layers) != len(self.embed_dims):
            raise InputError(
                f"layers and embed_dims, one entry per stage, belong to the image tower {_NARROW!r} and to no other"
            )
        if (self.norm_eps, self.stem_padding) != (None, None) and self.tower != "vit_base_mci_224":
            raise InputError("norm_eps and stem_padding are for the image tower vit_base_mci_224 only")
        if len(self.mean) != 3 or len(self.std) != 3 or not 1 <= self.image_size <= _MAX_SIZE:
            raise InputError(f"an image tower needs 3 means, 3 deviations and an image_size in 1..{_MAX_SIZE}")
        if not all(1 <= number <= _MAX_SIZE for number in (*self.layers, *self.embed_dims)):
            raise InputError(f"layers {self.layers} and embed_dims {self.embed_dims} must lie in 1..{_MAX_SIZE}")
        if any(wide % narrow for narrow, wide in zip(self.embed_dims, self.embed_dims[1:], strict=False)):
            raise InputError(f"embed_dims {self.embed_dims}: each must be a multiple of the one before")
        if not 0 <= self.drop_path < 1:
            raise InputError(f"drop_path is a share, 0 or more and below 1, not {self.drop_path}")
        self._check_vit()

    def _check_vit(self) -> None:
        sizes = {"patch": self.patch, "width": self.width, "depth": self.depth, "heads": self.heads}
        if self.tower != VIT:
            if any(sizes.values()) or self.distillation_token:
                raise InputError(f"{', '.join(sizes)} and distillation_token are for the image tower {VIT!r} only")
            return
        for name, size in sizes.items():
            if type(size) is not int or not 1 <= size <= _MAX_SIZE:
                raise InputError(f"the image tower {VIT!r} needs a {name} in 1..{_MAX_SIZE}, not {size!r}")
        if self.image_size % self.patch:
            raise InputError(f"image_size {self.image_size} is not a multiple of the patch {self.patch}")
        if self.width % self.heads:
            raise InputError(
                f"image width {self.width} is not a multiple of its {self.heads} heads: choose heads that divide it"
            )


class ImageEncoder(nn.Module):
    """Features of normalised images.

    `channels_last` runs a FastViT in that memory format, which changes features and gradients only by rounding. On a
    CPU, S0 then trains 1.3 times as fast and a narrow tower 1.6 times. Parameters keep their layout.
    """

    channels_last: bool = True

    def __init__(self, config: ImageConfig, embed_dim: int) -> None:
        super().__init__()
        self.trunk: Any = _trunk(config, embed_dim)
        if isinstance(self.trunk, FastVit):
            for name, module in list(self.trunk.named_modules()):
                if isinstance(module, nn.Conv2d) and module.in_channels == 3 and module.kernel_size == (1, 1):
                    self.trunk.set_submodule(name, _pointwise(module))

    def forward(self, images: Float[Tensor, "B 3 R R"]) -> Float[Tensor, "B D"]:
        class_features, distillation_features = self.heads(images)
        return class_features if distillation_features is None else (class_features + distillation_features) / 2

    def heads(self, images: Float[Tensor, "B 3 R R"]) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D"] | None]:
        """Features of the class token and of the distillation token; None if the tower has no distillation token."""
        images = self._in_format(images)
        if not isinstance(self.trunk, VisionTransformerDistilled):
            return self.trunk(images), None
        tokens = self.trunk.forward_features(images)  # B N+2 C
        return self.trunk.head(tokens[:, 0]), self.trunk.head_dist(tokens[:, 1])

    def _in_format(self, images: Float[Tensor, "B 3 R R"]) -> Float[Tensor, "B 3 R R"]:
        if self.channels_last and isinstance(self.trunk, FastVit):
            return images.contiguous(memory_format=torch.channels_last)
        return images


class _Pointwise(nn.Conv2d):
    """A 1 x 1 convolution of pictures, computed as a matrix product when it trains on a CPU.

    oneDNN's backward of a 1 x 1 convolution of 3 channels-last channels with stride 2 corrupts memory (torch 2.15).
    """

    def forward(self, input: Float[Tensor, "B 3 R R"]) -> Float[Tensor, "B C R R"]:
        if input.device.type != "cpu" or not torch.is_grad_enabled():
            return super().forward(input)
        down, right = self.stride
        y = F.linear(input[:, :, ::down, ::right].movedim(1, 3), self.weight.flatten(1), self.bias).movedim(3, 1)
        return y.contiguous() if input.is_contiguous() else y


def _pointwise(conv: nn.Conv2d) -> _Pointwise:
    """`conv` as a `_Pointwise` with its parameters."""
    assert conv.kernel_size == (1, 1) and conv.padding == (0, 0) and conv.groups == 1
    copy = _Pointwise(conv.in_channels, conv.out_channels, 1, bias=conv.bias is not None)
    copy.stride, copy.weight, copy.bias = conv.stride, conv.weight, conv.bias
    return copy


def _trunk(config: ImageConfig, embed_dim: int) -> nn.Module:
    if config.tower == _NARROW:
        return _narrow_fastvit(config, embed_dim)
    return _vit(config, embed_dim) if config.tower == VIT else _named_tower(config, embed_dim)


def _named_tower(config: ImageConfig, embed_dim: int) -> nn.Module:
    """timm's model. MobileCLIP-B's published code differs in `norm_eps` and `stem_padding`: 1% of a feature."""
    norm: dict[str, Any] = {} if config.norm_eps is None else {"norm_layer": partial(nn.LayerNorm, eps=config.norm_eps)}
    tower: Any = timm.create_model(
        config.tower,
        num_classes=embed_dim,
        global_pool=_POOLING[config.tower],
        drop_path_rate=config.drop_path,
        **norm,
    )
    if config.stem_padding is not None:
        tower.patch_embed.backbone[0].conv.padding = (config.stem_padding, config.stem_padding)
    return tower


def _narrow_fastvit(config: ImageConfig, embed_dim: int) -> FastVit:
    """MCi's recipe (RepMixer stages, 7 x 7 downsampling with activation) at the configured width and depth."""
    stages = len(config.layers)
    return FastVit(
        layers=config.layers,
        embed_dims=config.embed_dims,
        token_mixers=("repmixer",) * stages,
        mlp_ratios=(config.mlp_ratio,) * stages,
        downsamples=(False,) + (True,) * (stages - 1),
        se_downsamples=(False,) * stages,
        pos_embs=(None,) * stages,
        num_classes=embed_dim,
        drop_path_rate=config.drop_path,
        layer_scale_init_value=config.layer_scale,
        lkc_use_act=True,
    )


def _vit(config: ImageConfig, embed_dim: int) -> VisionTransformer:
    """A pre-norm ViT with GELU, pooled at its class token after a final LayerNorm, or DeiT's with two such tokens."""
    kind = VisionTransformerDistilled if config.distillation_token else VisionTransformer
    return kind(
        img_size=config.image_size,
        patch_size=config.patch,
        num_classes=embed_dim,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        drop_path_rate=config.drop_path,
    )
