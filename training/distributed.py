"""Processes: start-up from torchrun's environment, the feature gather, output on rank 0.

Every rank computes the same loss on the same gathered features. The gradient of that one loss with respect to a
rank's own rows is therefore known locally, and multiplying it by the number of ranks undoes DDP's mean: the result is
the gradient of one process on the whole batch, without communication in the backward pass.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from longclip_teacher.errors import InputError

__all__ = ["Runtime", "gather", "start"]

_TIMEOUT = timedelta(hours=4)  # rank 0 evaluates, or draws the embedded data, while the others wait


@dataclass(frozen=True)
class Runtime:
    """Where this process stands: its rank, how many there are, its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one process that prints and writes."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every process."""
        if self.world_size > 1:
            dist.barrier()


@contextmanager
def start(device: str = "auto") -> Iterator[Runtime]:
    """Join the process group that torchrun's environment describes (gloo on the CPU, nccl on GPUs), or run alone.

    `device`: "auto" (a GPU if there is one), "cpu", "cuda" (the local rank's GPU) or "cuda:N". Raises InputError for
    a GPU that is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = _device(device)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    if world_size == 1:
        yield Runtime(0, 1, chosen)
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=_TIMEOUT)
    try:
        yield Runtime(dist.get_rank(), world_size, chosen)
    finally:
        dist.destroy_process_group()


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--run.device {name}: give auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError(f"--run.device {name}: torch sees no GPU here; use cpu")
        index = device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", "0"))
        if index >= torch.cuda.device_count():
            raise InputError(
                f"this process wants GPU {index}, but there are {torch.cuda.device_count()}: lower --nproc_per_node"
            )
        return torch.device("cuda", index)
    return device


def gather(local: Shaped[Tensor, "B ..."]) -> Shaped[Tensor, "G ..."]:
    """Rows of every rank in rank order. Every rank must bring the same shape.

    The backward pass gives each rank `world_size` times the gradient of its own rows: right if, and only if, every rank
    computes the same loss from the gathered rows and parameter gradients are then averaged over ranks, as DDP does.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return local
    if local.requires_grad:
        return _Gather.apply(local)
    return _all_gather(local)


def _all_gather(local: Tensor) -> Tensor:
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, local.contiguous())
    return torch.cat(parts)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, local: Tensor) -> Tensor:
        ctx.rows = local.shape[0]  # type: ignore[attr-defined]
        return _all_gather(local)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        rows: int = ctx.rows  # type: ignore[attr-defined]
        first = dist.get_rank() * rows
        return grad[first : first + rows] * dist.get_world_size()
