"""From the train form to the inference form: fold branches, BatchNorms and layer scales into single convolutions.

MobileOne blocks and RepMixers (FastViT, section 3.2) add several linear maps of the same input; with fixed BatchNorm
statistics the sum is one convolution. timm folds the image tower's, `RepMixerBlock.fuse` the text tower's.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from timm.models.fastvit import AttentionBlock, MobileOneBlock, RepMixerBlock
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mobileclip_student.model import MobileCLIP
from mobileclip_student.repmixer import RepMixerBlock as TextRepMixerBlock

__all__ = ["reparameterize"]


@torch.no_grad()
def reparameterize(student: MobileCLIP) -> MobileCLIP:
    """A fused, frozen copy in eval mode, whose outputs differ only by rounding; `student` itself does not change.

    Towers without such blocks (ViT image towers, base text towers) are copied as they are.
    """
    fused = deepcopy(student).eval().requires_grad_(False)
    if student.config.reparameterized:
        return fused
    fused.config = replace(student.config, reparameterized=True)
    trunk = reparameterize_model(fused.image_encoder.trunk, inplace=True)
    for block in list(trunk.modules()):
        if isinstance(block, (RepMixerBlock, AttentionBlock)):
            _fold_image_block(block)
        if isinstance(block, MobileOneBlock) and hasattr(block, "id_tensor"):
            del block.id_tensor  # timm's temporary tensor, dense and as large as the block
    for block in fused.text_encoder.blocks:
        if isinstance(block, TextRepMixerBlock):
            block.fuse()
    return fused.requires_grad_(False)


def _fold_image_block(block: Any) -> None:
    """Fold what timm leaves: the BatchNorm in the convolutional FFN, and the layer scales, which follow linear maps."""
    ffn = block.mlp
    ffn.conv.conv = fuse_conv_bn_eval(ffn.conv.conv, ffn.conv.bn)
    ffn.conv.bn = nn.Identity()
    if isinstance(block, AttentionBlock):
        scaled = {"layer_scale_1": block.token_mixer.proj, "layer_scale_2": ffn.fc2}
    else:
        scaled = {"layer_scale": ffn.fc2}
    for name, linear in scaled.items():
        gamma = getattr(block, name).gamma.flatten()
        linear.weight.mul_(gamma.view(-1, *[1] * (linear.weight.dim() - 1)))
        linear.bias.mul_(gamma)
        setattr(block, name, nn.Identity())
