"""Processes: start-up from torchrun's environment, shared work, and the exchange of results.

Evaluation divides pictures and captions among the processes. Every process gets all features; rank 0 prints and writes.
The processes exchange safetensors bytes, not pickle.
"""

from __future__ import annotations

import io
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from eval.base.progress import Interrupted
from eval.base.tf32 import allow_tf32
from eval.base.workers import end_with_parent
from longclip_teacher.errors import InputError
from longclip_teacher.folder_lock import folder_lock

__all__ = [
    "Runtime",
    "agreed",
    "all_results",
    "bytes_of_main",
    "is_main_process",
    "job_lock",
    "leave_group",
    "leave_out_cudnn_attention",
    "my_share",
    "on_main",
    "process_device",
    "start",
]

_LAST_WORK = 0.1  # seconds; without them 12 of 20 short jobs hung with torch 2.6, with them none of 100
_TIMEOUT = timedelta(hours=4)  # training has a watchdog that ends it sooner
_JOINED_WITHIN = timedelta(minutes=10)  # torchrun starts its processes within seconds
_PART = 1 << 28  # bytes that are sent at a time
_ERROR, _INTERRUPTED = "__error__", "__interrupted__"
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Runtime:
    """The rank and the device of this process, and the number of processes."""

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

    def highest(self, value: int) -> int:
        """Return the highest `value` of all processes. It is exchanged between the CPUs: no GPU is waited for."""
        if self.world_size == 1:
            return value
        highest = torch.tensor(value)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        return int(highest.numpy())


@contextmanager
def start(device: str = "auto", tf32: bool = True) -> Iterator[Runtime]:
    """Join the process group that torchrun's environment describes (gloo for tensors on the CPU, nccl for those on
    GPUs), or run alone.

    `device`: see `process_device`. `tf32` lets a GPU round the inputs of its float32 products, as training does.
    Raise InputError if another process has not joined after ten minutes.
    """
    chosen = process_device(device)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        allow_tf32(tf32)
        leave_out_cudnn_attention()
    if world_size == 1:
        yield Runtime(0, 1, chosen)
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(signal.SIGTERM)  # torchrun starts each process in a session of its own: it would live on
    store, rank, world_size = _meet(world_size)
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=_TIMEOUT)
    try:
        yield Runtime(dist.get_rank(), world_size, chosen)
    finally:
        leave_group()


def _meet(world_size: int) -> tuple[dist.Store, int, int]:
    """Return the store that torchrun's environment names, this rank and the number of processes, once all are there.

    One that ends before, as for an option that it does not know, may be on another node, whose torchrun tells nobody.
    """
    missing = "not all"
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=_JOINED_WITHIN))
        store.set(f"joined {rank}", "")
        end = time.monotonic() + _JOINED_WITHIN.total_seconds()
        for other in range(world_size):
            missing = f"rank {other} is missing: not all"
            store.wait([f"joined {other}"], timedelta(seconds=max(1.0, end - time.monotonic())))
    except (dist.DistStoreError, dist.DistNetworkError):
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise InputError(
            f"{missing} of {world_size} processes have joined at {address} within {_JOINED_WITHIN.total_seconds():g} s"
            ": the error line of the one that ended says why, on its node; or it cannot reach that address"
        ) from None
    store.set_timeout(_TIMEOUT)
    return store, rank, world_size


def leave_group() -> None:
    """Leave the process group, after all its work.

    Before torch 2.8 the group joins its threads while Python is locked. A thread that has just ended a piece of work
    needs Python once more, and both would wait forever: it gets the time to end first.
    """
    time.sleep(_LAST_WORK)
    dist.destroy_process_group()


def leave_out_cudnn_attention() -> None:
    """Have torch choose among its other attention kernels on a GPU.

    On Hopper and later GPUs torch prefers cuDNN's for half precision. That one builds an execution plan for each new
    shape, and captions, which run in groups of equal length, come in hundreds of shapes.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def process_device(name: str) -> torch.device:
    """Return the device called `name`: "auto" (a GPU if there is one), "cpu", "cuda" (the local rank's GPU) or
    "cuda:N".

    Raise InputError for a GPU that does not exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device {name}: give auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError(f"device {name}: torch sees no GPU here; use cpu")
        index = device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", "0"))
        if index >= torch.cuda.device_count():
            raise InputError(
                f"this process wants GPU {index}, but there are {torch.cuda.device_count()}: lower --nproc_per_node"
            )
        return torch.device("cuda", index)
    return device


def is_main_process() -> bool:
    """Return True on rank 0, and if there is only one process."""
    return not dist.is_initialized() or dist.get_rank() == 0


def my_share(batches: Sequence[Item]) -> Sequence[Item]:
    """Return this process's part of a list of batches, dealt out one by one. Batches stay the same for any number of
    processes."""
    if not dist.is_initialized():
        return batches
    return batches[dist.get_rank() :: dist.get_world_size()]


def all_results(compute: Callable[[], dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Return what `compute` returns on each process, in rank order; the same list everywhere, on the CPU if several.

    An InputError on one process is raised on all of them, because the others would wait for it forever. So is
    Interrupted.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [compute()]
    try:
        mine = compute()
    except InputError as error:
        mine = {_ERROR: _to_bytes(str(error).encode("utf-8", "surrogatepass"))}
    except Interrupted:
        mine = {_INTERRUPTED: torch.ones(1)}
    results = [load(part) for part in _all_gather_bytes(save({name: value.cpu() for name, value in mine.items()}))]
    for rank, result in enumerate(results):
        if _ERROR in result:
            text = bytes(result[_ERROR].tolist()).decode("utf-8", "surrogatepass")
            raise InputError(f"rank {rank}: {text}" if rank else text)
    if any(_INTERRUPTED in result for result in results):
        raise Interrupted
    return results


@contextmanager
def job_lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for this job, which may have several processes, while the block runs: `folder_lock` on rank 0.

    Raises InputError on every process if another job holds the folder, or if it cannot be written.
    """
    with ExitStack() as held:
        on_main(lambda: held.enter_context(folder_lock(folder)))
        yield


def agreed(compute: Callable[[], Result]) -> Result:
    """Return what `compute` returns in this process, once it has ended in all of them. All must call this.

    It is for what any process may fail in, such as reading files: an InputError on one is raised on all of them.
    """
    found = list[Result]()

    def attempt() -> dict[str, Tensor]:
        found.append(compute())
        return {}

    all_results(attempt)
    return found[0]


def on_main(compute: Callable[[], dict[str, Tensor] | None]) -> dict[str, Tensor]:
    """Return what `compute` returns on rank 0, where alone it is called, on every process. All must call this.

    An InputError is raised on all of them. The others wait: leave long work to all (`my_share`).
    """
    return all_results(lambda: (compute() if is_main_process() else None) or {})[0]


def bytes_of_main(path: Path) -> io.BytesIO:
    """Return the content of rank 0's file `path` on every process; their own disks are not looked at. All must call
    this."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return io.BytesIO(path.read_bytes())
    size = int(on_main(lambda: {"size": torch.tensor(path.stat().st_size)})["size"])
    content = torch.empty(size, dtype=torch.uint8)
    if is_main_process():
        content = torch.from_numpy(np.fromfile(path, dtype=np.uint8))
    for part in content.split(_PART):
        dist.broadcast(part, src=0)
    return io.BytesIO(content.numpy().tobytes())


def _all_gather_bytes(content: bytes) -> list[bytes]:
    """Return every rank's bytes. gloo needs one size, so shorter ones are padded."""
    local = _to_bytes(content)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(local)]))
    longest = max(int(size) for size in sizes)
    parts = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(parts, torch.nn.functional.pad(local, (0, longest - len(local))))
    return [part[: int(size)].numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]


def _to_bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
