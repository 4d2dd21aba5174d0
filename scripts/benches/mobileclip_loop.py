"""The child process of the bench `mobileclip`: steps of MobileCLIP's published training loop, from the user's checkout.

The checkout's open_clip must come first on PYTHONPATH, so nothing that reads ours may be imported here. A line on stdin
holds a number of steps; the answer is a line of JSON with the last loss and the peak memory so far.

Usage: mobileclip_loop.py MODEL SIZE DEVICE PRECISION THREADS BATCH.safetensors STUDENT.safetensors
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eval.base.peak_memory import peak_memory_gb

_BATCH = ("images", "texts", "image_features", "text_features", "synthetic_texts", "synthetic_features")
_PRECISIONS = {"fp32": "fp32", "bf16": "amp_bf16", "fp16": "amp"}
_PUBLISHED = """
--dataset-reinforcement --distill-loss-weights 0.0 1.0 --distill-logit-scale 100 100 --distill-teacher-dimension 768 768
--distill-average-after-softmax --lr 1.e-3 --beta2 0.95 --wd 0.2 --grad-clip-norm 1.0 --skip-scheduler
--log-every-n-steps 1000000000
"""
"""Of run_datacompdr12m.sh. One scale per teacher: with the single one of that file, the loss reads past its end."""


def main() -> None:
    """Write the student's random weights, then make steps until stdin ends."""
    model_name, size, device_name, precision, threads, batch_file, weights_file = sys.argv[1:]
    torch.set_num_threads(int(threads))
    device = torch.device(device_name)
    answers, sys.stdout = sys.stdout, sys.stderr  # what the checkout prints is no answer
    from open_clip import create_loss, create_model
    from open_clip_train.params import parse_args
    from open_clip_train.train import train_one_epoch

    torch.manual_seed(0)
    model = create_model(model_name, device=device, force_image_size=int(size), output_dict=True)
    save_file({name: value.contiguous().clone() for name, value in model.state_dict().items()}, weights_file)
    samples = load_file(batch_file, device_name)
    batch = tuple(samples[name] for name in _BATCH)
    options = ["--model", model_name, "--precision", _PRECISIONS[precision], "--batch-size", str(len(batch[0]))]
    arguments = parse_args([*options, *_PUBLISHED.split()])
    arguments.device, arguments.distill, arguments.world_size = device_name, False, 1
    arguments.rank = 1  # rank 0 would log the first and the last step, and wait for the device
    arguments.wandb = False
    loss, last = create_loss(arguments), dict[str, Tensor]()
    loss.register_forward_hook(lambda _module, _inputs, losses: last.update(losses))
    optimizer = _optimizer(model, arguments)
    scaler = torch.amp.GradScaler(device.type) if precision == "fp16" else None
    if device.type == "cuda":  # as open_clip_train.main
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = True

    for line in sys.stdin:
        data = {"train": _Feed([batch] * int(line))}
        train_one_epoch(model, data, loss, 0, optimizer, scaler, None, None, arguments)
        value = sum(float(part.detach()) for name, part in last.items() if name != "loss")
        print(json.dumps({"loss": value, "peak_gb": peak_memory_gb(device)}), file=answers, flush=True)


def _optimizer(model: nn.Module, arguments: Any) -> torch.optim.Optimizer:
    """AdamW as open_clip_train.main builds it."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return torch.optim.AdamW(
        [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": arguments.wd}],
        lr=arguments.lr, betas=(arguments.beta1, arguments.beta2), eps=arguments.eps,
    )  # fmt: skip


class _Feed:
    """What the loop asks of its data: batches, their number, and that of the samples."""

    def __init__(self, batches: list[tuple[Tensor, ...]]) -> None:
        self.batches, self.dataloader = batches, self
        self.num_batches, self.num_samples = len(batches), sum(len(batch[0]) for batch in batches)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return iter(self.batches)

    def set_epoch(self, epoch: int) -> None:
        """Batches are the same in every epoch."""


if __name__ == "__main__":
    main()
