"""The activations inside one of timm's ViTs, for losses that compare towers layer by layer.

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
    """The trunk's output for `images` and the trace of its attention blocks.

    `forward` runs the trunk on the images if a plain call does not, such as an encoder around it that reads several
    heads; its output is then returned. Nothing is computed twice.
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
    """The class token and, in DeiT's ViT, the distillation token, which stand before the patches."""
    names = ("cls_token", "reg_token", "dist_token")
    tokens = [token for name in names if (token := getattr(trunk, name, None)) is not None]
    return [token.expand(batch, -1, -1) for token in tokens]


class _Outputs:
    """A hook that keeps the outputs, or the inputs, of modules."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.seen.append(output)

    def input(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.seen.append(inputs[0])
