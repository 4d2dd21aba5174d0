"""AdamW's parameter groups and the learning-rate schedule."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longclip_teacher.errors import InputError
from training.settings.options import OptimOptions

__all__ = ["build_optimizer", "learning_rate", "load_moments"]

_FUSED_DEVICES = {"cpu", "cuda"}
_TOWER = re.compile(r"(?:model\.)?(?:(?P<image>image_encoder|visual)|(?:text_encoder|text))\.(?:trunk\.)?(?P<rest>.+)")
_STAGE, _BLOCK = re.compile(r"stages\.(\d+)\."), re.compile(r"blocks\.(\d+)\.")  # Long-CLIP's are called resblocks
# what follows the last block of a tower, by the names of timm, open_clip and ours; what else is no block precedes it
_HEAD = re.compile(r"(norm|fc_norm|final_conv|head|head_dist|ln_final|ln_post|proj|projection|text_projection)(\.|$)")


def build_optimizer(module: nn.Module, options: OptimOptions, fused: bool = True) -> torch.optim.AdamW:
    """Build AdamW over the trainable parameters. Matrices, token embeddings and convolutions decay; nothing else does.

    Each group has an `lr_share`, the factor of its learning rate. It is the share of the tower (`image_lr_share`,
    `text_lr_share`) times `layer_decay` for each block between the parameter and the head of its tower (BEiT, Bao et
    al. 2022, appendix). The last block has that factor once; the embeddings or the stem have it once more than the
    first block. Heads, and parameters outside the towers such as the logit scale, do not have it.

    `fused` updates each parameter in one pass over memory if the device has a kernel for it. Otherwise each operation
    runs over all parameters in turn. The weights differ by rounding.
    """
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    shares = _lr_shares((name for name, _ in module.named_parameters()), options)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        # biases, norms and scales have fewer dimensions; layer scales, class tokens and timm's positions have three
        decays = parameter.ndim in (2, 4) and not name.endswith("positional_embedding")
        groups.setdefault((shares[name], decays), []).append(parameter)
    fused = fused and {parameter.device.type for parameter in trained.values()} <= _FUSED_DEVICES
    return torch.optim.AdamW(
        [
            {
                "params": groups[share, decays],
                "weight_decay": options.weight_decay if decays else 0.0,
                "lr": options.lr * share,
                "lr_share": share,
            }
            for share, decays in sorted(groups, reverse=True)
        ],
        betas=options.betas,
        eps=options.eps,
        fused=fused,
        foreach=not fused,
    )


def load_moments(optimizer: torch.optim.AdamW, saved: Mapping[str, Any], path: Path) -> None:
    """Take the moments and the step counts from `saved`, the optimiser's state_dict in the checkpoint `path`.

    Rates, decay, `fused` and all else that a group holds stay as the run's options have set them. Raises InputError if
    `saved` is of other parameters.
    """
    ours = optimizer.state_dict()["param_groups"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = [(parameters[number], held) for number, held in saved["state"].items() if number < len(parameters)]
    if (
        [group["params"] for group in saved["param_groups"]] != [group["params"] for group in ours]
        or len(moments) != len(saved["state"])
        or any(held["exp_avg"].shape != parameter.shape for parameter, held in moments)
    ):
        raise InputError(
            f"{path} is of a version in which other parameters decayed: finish the run with that version, or start a "
            f"new one with --student.init {path.parent.parent / 'last.safetensors'}"
        )
    optimizer.load_state_dict({"state": saved["state"], "param_groups": ours})


def learning_rate(step: int, total_steps: int, options: OptimOptions) -> float:
    """Learning rate of step `step` (from 0) for groups with a share of 1. It warms up linearly, then falls to
    `min_lr_share` of the peak: along a cosine, or linearly over the last `cooldown_share` of the run."""
    warmup = min(options.warmup_steps, max(1, total_steps // 10))
    if step < warmup:
        return options.lr * (step + 1) / warmup
    if options.schedule == "constant":
        start = max(warmup, total_steps * (1 - options.cooldown_share))
        height = 1.0 if step < start else (total_steps - step) / (total_steps - start)
    else:
        progress = (step - warmup) / max(1, total_steps - warmup)
        height = 0.5 * (1 + math.cos(math.pi * progress))
    floor = options.lr * options.min_lr_share
    return floor + (options.lr - floor) * height


def _lr_shares(names: Iterable[str], options: OptimOptions) -> dict[str, float]:
    """Factor of the learning rate of each parameter. `names` must hold all parameters, which give the depth."""
    towers: dict[bool, dict[str, str]] = {True: {}, False: {}}  # image, text: name in the tower by full name
    shares = {}
    for name in names:
        if found := _TOWER.fullmatch(name):
            towers[found["image"] is not None][name] = found["rest"]
        else:
            shares[name] = 1.0
    for is_image, tower in towers.items():
        tower_share = options.image_lr_share if is_image else options.text_lr_share
        blocks = sorted({block for name in tower.values() if (block := _block_of(name)) is not None})
        distances = {block: len(blocks) - depth for depth, block in enumerate(blocks)}
        for name, rest in tower.items():
            block = _block_of(rest)
            if block is not None:
                distance = distances[block]
            else:
                distance = 0 if _HEAD.match(rest) else len(blocks) + 1
            shares[name] = tower_share * options.layer_decay**distance
    return shares


def _block_of(name: str) -> tuple[int, int] | None:
    """The (stage, block) of a tower's parameter; stage 0 if there are no stages, None outside the blocks.

    Downsampling and positions before the blocks of a FastViT stage count as its first block.
    """
    stage, block = _STAGE.search(name), _BLOCK.search(name)
    if stage is None and block is None:
        return None
    return int(stage[1]) if stage else 0, int(block[1]) if block else 0
