"""What a ViT of timm computes on the way to its features, for losses that compare towers layer by layer.

Shapes: B images, L class token(s) + patches, C width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from longclip_teacher.trace import Trace

__all__ = ["trace_vit"]

Output = TypeVar("Output")


def trace_vit(
    trunk: VisionTransformer, images: Float[Tensor, "B 3 R R"], forward: Callable[[Tensor], Output] | None = None
) -> tuple[Output, Trace]:
    """The trunk's own output for `images` and what its attention blocks compute on the way.

    `forward` is what runs the trunk on the images, if not a plain call of it, such as an encoder around it that reads
    several heads; the output is then that. Nothing is computed twice.
    """
    blocks: Any = trunk.blocks
    patches, embedding, projected, hidden = (_Outputs() for _ in range(4))
    with ExitStack() as hooks:
        hooks.enter_context(trunk.patch_embed.register_forward_hook(patches))
        hooks.enter_context(trunk.norm_pre.register_forward_pre_hook(embedding.input))
        for block in blocks:
            hooks.enter_context(block.attn.qkv.register_forward_hook(projected))
            hooks.enter_context(block.register_forward_hook(hidden))
        output = (trunk if forward is None else forward)(images)
    trace = Trace(
        embedding.seen[0],
        torch.cat([*_prefix_tokens(trunk, len(images)), patches.seen[0]], dim=1),
        hidden.seen,
        query=[],
        key=[],
        value=[],
        valid=torch.ones(hidden.seen[0].shape[:2], dtype=torch.bool, device=images.device),
        causal=False,
        num_prefix_tokens=trunk.num_prefix_tokens,
    )
    for block, qkv in zip(blocks, projected.seen, strict=True):
        query, key, value = qkv.unflatten(2, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # B H L C/H each
        trace.query.append(block.attn.q_norm(query))
        trace.key.append(block.attn.k_norm(key))
        trace.value.append(value)
    return output, trace


def _prefix_tokens(trunk: VisionTransformer, batch: int) -> list[Float[Tensor, "B 1 C"]]:
    """Class token and, of DeiT's ViT, distillation token, as they stand before the patches."""
    names = ("cls_token", "reg_token", "dist_token")
    tokens = [token for name in names if (token := getattr(trunk, name, None)) is not None]
    return [token.expand(batch, -1, -1) for token in tokens]


class _Outputs:
    """A hook that keeps what modules put out, or what goes into them."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.seen.append(output)

    def input(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.seen.append(inputs[0])
