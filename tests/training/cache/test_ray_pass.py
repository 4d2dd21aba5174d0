"""The teacher pass on Ray: the bytes of a plain pass, also if an actor is killed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from cache_teacher import Options, cache
from eval.base.processes import Runtime
from longclip_teacher import create_teacher, save_teacher
from longclip_teacher.errors import InputError
from shard_files import write_folder
from training.cache import ray_pass

CPU = Runtime(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_folder(folder / "shards", range(24), 4)
    torch.manual_seed(0)
    save_teacher(create_teacher("tiny"), folder / "teacher.safetensors")
    return folder


@pytest.fixture
def ray() -> Iterator[ModuleType]:
    """A small Ray on this machine."""
    ray = pytest.importorskip("ray", reason="needs the extra [ray]")
    ray.init(num_cpus=2, object_store_memory=80_000_000, include_dashboard=False, logging_level="error")
    yield ray
    ray.shutdown()


def options(inputs: Path, out: Path, **more: object) -> Options:
    return Options(
        shards=(str(inputs / "shards"),), teacher=str(inputs / "teacher.safetensors"), out=out, num_workers=0,
        batch_size=4, device="cpu", **more,  # type: ignore[arg-type]
    )  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_actors_write_what_one_process_writes_and_one_that_dies_comes_back(
    inputs: Path, tmp_path: Path, ray: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache(options(inputs, tmp_path / "plain"), CPU)
    once = tmp_path / "killed"

    class Dies(ray_pass._Encoder):
        def make(self, place: int, identity: object) -> object:
            if place == 2 and not once.exists():
                once.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().make(place, identity)  # type: ignore[arg-type]

    monkeypatch.setattr(ray_pass, "_Encoder", Dies)
    cache(options(inputs, tmp_path / "ray", engine="ray"), CPU)
    assert once.exists() and contents(tmp_path / "ray") == contents(tmp_path / "plain")
    assert f"{tmp_path}/ray: 24 samples in 6 sidecars (0 kept)" in capsys.readouterr().out
    (tmp_path / "ray" / "s-004.safetensors").unlink()
    (tmp_path / "ray" / "s-004.safetensors").mkdir()
    with pytest.raises(InputError, match=r"\Acannot write .*s-004\.safetensors[^\n]*\Z"):
        cache(options(inputs, tmp_path / "ray", engine="ray"), CPU)


def test_without_ray_and_below_torchrun_one_line_says_what_to_do(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"\A--engine ray needs Ray: pip install 'compact-longclip\[ray\]'\Z"):
        cache(options(inputs, tmp_path / "out", engine="ray"), CPU)
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="start the command without torchrun"):
        options(inputs, tmp_path / "out", engine="ray").check()
