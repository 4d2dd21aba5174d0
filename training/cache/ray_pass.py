"""The teacher pass on Ray: actors hold the teacher, and each gets one shard at a time.

Ray starts the actors, here or on the machines of a cluster, and starts one anew that dies. It keeps no state of the
pass: that is the cache's folder alone (teacher_pass.py).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from eval.base.processes import process_device
from eval.towers.models import load_model
from longclip_teacher import LongCLIP
from longclip_teacher.activation import Activation
from longclip_teacher.errors import InputError
from training.cache.manifest import ShardIdentity, SidecarRecord
from training.cache.teacher_pass import Records, make_sidecars
from training.cache.writer import SidecarWriter

__all__ = ["make_on_ray", "refuse_without_ray"]

_MOST_RETRIES = 20  # of one shard whose actor dies; then the shard is the likely cause


def refuse_without_ray() -> None:
    """Raise InputError if Ray is not installed."""
    try:
        import ray  # noqa: F401
    except ImportError:
        raise InputError("--engine ray needs Ray: pip install 'compact-longclip[ray]'") from None


class _Encoder:
    """What an actor does."""

    def __init__(self, load: Callable[[], SidecarWriter], known: Records) -> None:
        self._load, self._known = load, known
        self._writer: SidecarWriter | None = None

    def load(self) -> InputError | None:
        """Load the teacher. Like the other method, it returns the error of an input, which Ray would wrap."""
        try:
            self._writer = self._load()
        except InputError as error:
            return error
        return None

    def make(self, place: int, identity: ShardIdentity) -> list[SidecarRecord] | InputError:
        """Return the record of a shard's sidecar if this actor made it."""
        if self._writer is None and (error := self.load()):  # an actor that was started anew
            return error
        assert self._writer is not None
        try:
            return list(make_sidecars(self._writer, [(place, identity)], self._known))
        except InputError as error:
            return error


def _writer(
    teacher: str, activation: Activation | None, device: str, writer_of: Callable[[LongCLIP], SidecarWriter]
) -> SidecarWriter:
    model = load_model(teacher, activation=activation, device=str(process_device(device)))
    assert isinstance(model, LongCLIP)  # as the caller found
    return writer_of(model)


def make_on_ray(
    writer: SidecarWriter,
    shards: Sequence[tuple[int, ShardIdentity]],
    known: Records,
    progress: Callable[[int], None],
    *,
    teacher: str,
    activation: Activation | None,
    device: str,
) -> Iterator[SidecarRecord]:
    """Do what `make_sidecars` does in actors of Ray, one per GPU, or per `writer.num_workers` CPUs if there is none.

    They belong to the cluster that the environment variable RAY_ADDRESS names, or one is started on this machine. Each
    loads `teacher`; `writer`'s own model is not sent. All paths must be absolute, and the same on all machines.

    Raise InputError as `make_sidecars`, and for a shard whose actor dies again and again.
    """
    import ray

    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to Ray's makers
        ray.init(logging_level="warning")
    writer_of = partial(
        SidecarWriter, settings=writer.settings, index=writer.index, folder=writer.folder,
        batch_size=writer.batch_size, num_workers=writer.num_workers,
    )  # fmt: skip
    actor_class, count = _actors(ray, writer.num_workers, device)
    shared = ray.put(partial(_writer, teacher, activation, device, writer_of)), ray.put(dict(known))
    actors = [actor_class.remote(*shared) for _ in range(min(count, len(shards)))]
    left = deque(shards)
    running: dict[Any, tuple[Any, tuple[int, ShardIdentity] | None]]  # of each call its actor and its shard
    running = {actor.load.remote(): (actor, None) for actor in actors}
    try:
        while left or any(shard for _, shard in running.values()):
            (call,), _ = ray.wait(list(running), num_returns=1)
            actor, shard = running.pop(call)
            try:
                result = ray.get(call)
            except ray.exceptions.RayActorError as error:
                where = writer.index.path(shard[0]) if shard else teacher
                raise InputError(f"{where}: its processes die again and again ({str(error).splitlines()[0]})") from None
            if isinstance(result, InputError):
                raise InputError(str(result))
            if shard:
                progress(shard[1].num_samples)
                yield from result
            if left:
                following = left.popleft()
                running[actor.make.remote(*following)] = actor, following
    finally:
        for actor in actors:
            ray.kill(actor)


def _actors(ray: Any, num_workers: int, device: str) -> tuple[Any, int]:
    """Return the class of the actors with what each needs, and how many the cluster has room for."""
    cluster = ray.cluster_resources()
    num_cpus, num_gpus = int(cluster.get("CPU", 1)), 0 if device == "cpu" else int(cluster.get("GPU", 0))
    most = max(int(node["Resources"].get("CPU", 1)) for node in ray.nodes() if node["Alive"])
    own_cpus = max(1, min(num_workers, most if not num_gpus else num_cpus // num_gpus))
    options = {"num_cpus": own_cpus, "num_gpus": 1 if num_gpus else 0}
    actor_class = ray.remote(max_restarts=-1, max_task_retries=_MOST_RETRIES, **options)(_Encoder)
    return actor_class, num_gpus or max(1, num_cpus // own_cpus)
