"""Gather features over processes, with gradients, and send BatchNorm statistics from rank 0 to the others.

eval/base/processes.py starts the processes.

Every rank computes the same loss on the same gathered features. The gradient of that one loss with respect to a
rank's own rows is therefore known locally, and multiplying it by the number of ranks undoes DDP's mean: the result is
the gradient of one process on the complete batch, without communication in the backward pass.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor, nn

__all__ = ["gather", "send_statistics"]


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


@torch.no_grad()
def send_statistics(module: nn.Module) -> None:
    """Give every rank rank 0's BatchNorm statistics. Between two steps they differ; a step under DDP begins with the
    same, and ends with rank 0's in the checkpoint."""
    if not dist.is_initialized():
        return
    norms = [found for found in module.modules() if isinstance(found, nn.modules.batchnorm._BatchNorm)]
    buffers = [buffer for norm in norms for buffer in norm.buffers()]
    if not buffers:
        return
    sent = torch.cat([buffer.flatten().double() for buffer in buffers])  # counters too, exactly
    dist.broadcast(sent, src=0)
    for buffer, part in zip(buffers, sent.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(part.view_as(buffer))
