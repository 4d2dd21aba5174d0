"""Our step against open_clip's own training code on the same work: MobileCLIP-S1 learns from ViT-B/16 online."""

from __future__ import annotations

import torch

from benches.measure import medians
from benches.open_clip_step import TOKENS, OpenClipSide, captions_of, our_side, same_weights
from benches.step import random_batch
from eval.base.processes import leave_out_cudnn_attention
from gpu_parts.findings import Finding, Findings, Setting
from gpu_parts.numerics import tf32
from gpu_parts.speed import rate

__all__ = ["open_clip_part"]

_STEPS, _ROUNDS = 5, 3
_CASES = {  # whether pads are masked, and features stored
    "same function, online": (False, False),
    "pads masked, online": (True, False),
    "pads masked, stored": (True, True),
}


def open_clip_part(setting: Setting) -> Findings:
    """Samples per second of both, and ours from stored features."""
    batch_size, side = (2, 64) if setting.small else (256, 224)
    precision = "fp32" if setting.small else "bf16"
    batch = captions_of(random_batch(batch_size, side, side), 12)
    yield None
    batch = batch.to(setting.torch_device)
    models = same_weights(side, setting.torch_device)
    ours = {name: our_side(models, batch, precision, pad_mask=pm, stored=st) for name, (pm, st) in _CASES.items()}
    with tf32(True):
        torch.backends.cuda.enable_cudnn_sdp(True)  # torch's default, with which open_clip runs
        theirs = _rate(OpenClipSide(models, batch, precision), setting)
        leave_out_cudnn_attention()
        name = f"MobileCLIP-S1 from ViT-B/16, {TOKENS} tokens, {precision}, batch {batch_size}"
        yield Finding(f"{name}: open_clip, online", theirs, "samples/s")
        for case, found in ((case, rate(trained, setting)) for case, trained in ours.items()):
            yield Finding(f"{name}: ours, {case}", found, "samples/s", note=f"{found / theirs:.2f} times open_clip")


def _rate(side: OpenClipSide, setting: Setting) -> float:
    """Samples per second of open_clip's epochs of a few steps, after steps that warm up."""
    steps, rounds, warm_up = (1, 1, 1) if setting.small else (_STEPS, _ROUNDS, 2)
    side.steps(warm_up)
    return steps * len(side.batch.keys) / medians([lambda: side.steps(steps)], rounds, setting.torch_device)[0]
