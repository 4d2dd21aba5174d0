"""Damage to the files of a run folder, by seed: what is broken, and what a reader must then say and return."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from longclip_teacher.atomic_files import json_text, keep_previous, previous_generation
from longclip_teacher.weights_file import read_weights, run_weights, torch_load, write_weights
from training.generations import verified_file, verified_text, write_generation, write_text_generation

KINDS = ("flip", "zero", "cut")
_ENDS = 600  # bytes at each end: headers of safetensors, the directory of a zip


def damaged(content: bytes, seed: int) -> tuple[str, bytes]:
    """Return `content` with one bit flipped, up to 64 bytes zeroed, or its end cut off, and what was done.

    A third of the places is near the start, a third near the end, a third anywhere.
    """
    draw = random.Random(seed)
    kind = KINDS[seed % 3]
    while True:
        first = max(0, len(content) - _ENDS)
        spans = [(0, min(_ENDS, len(content))), (first, len(content)), (0, len(content))]
        place = draw.randrange(*spans[draw.randrange(3)])
        if kind == "flip":
            broken = content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1 :]
        elif kind == "zero":
            count = min(draw.choice((1, 8, 64)), len(content) - place)
            broken = content[:place] + bytes(count) + content[place + count :]
        else:
            broken = content[:place]
        if broken != content:  # zeros over zeros are no damage
            return f"{kind} at {place} of {len(content)}", broken


def make_run(folder: Path) -> Path:
    """Write two generations of every file that a command reads from a run folder, through the code that runs use."""
    for number in (1, 2):
        generator = torch.Generator().manual_seed(number)
        tensors = {f"layer{i}.weight": torch.randn(5, i + 2, generator=generator) for i in range(8)}
        for name in ("best.safetensors", "last.safetensors"):
            keep_previous(folder / name)
            config = {"name": f"naïve {number}", "widths": [number, 2]}
            write_weights(folder / name, tensors, {"format": "ours", "kind": "student", "config": json.dumps(config)})
        state = {"weights": tensors, "step": number, "config": config}
        for name in ("last.pt", "best.pt"):
            write_generation(folder / "checkpoints" / name, _saving(state))
        for name in ("config.toml", "environment.json", "results.json"):
            write_text_generation(folder / name, json_text({"run": f"{number}", "x": [1]}))
    return folder


def _saving(state: dict[str, Any]) -> Callable[[Path], None]:
    return lambda temporary: torch.save(state, temporary)


READERS: dict[str, Callable[[Path], Any]] = {
    "best.safetensors": lambda path: _plain(read_weights(run_weights(path.parent))),
    "last.safetensors": lambda path: _plain(read_weights(path)),
    "checkpoints/last.pt": lambda path: torch_load(verified_file(path)),
    "checkpoints/best.pt": lambda path: torch_load(verified_file(path)),
    "config.toml": verified_text,
    "environment.json": verified_text,
    "results.json": verified_text,
}
"""How each file of `make_run` is read."""


def _plain(weights: Any) -> tuple[dict[str, Any], dict[str, str]]:
    return weights.tensors, weights.metadata


def same(one: Any, other: Any) -> bool:
    """Return whether two results of READERS are equal, tensors to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, tuple):
        return all(map(same, one, other))
    return one == other


def damage_trial(folder: Path, seed: int) -> str | None:
    """Damage a file of `make_run(folder)`, read it, and put it back. Return what went wrong; None if the damage was
    named in one line and the older file was read."""
    name = sorted(READERS)[seed // len(KINDS) % len(READERS)]
    path = folder / name
    whole = path.read_bytes()
    older = READERS["last.safetensors" if path.suffix == ".safetensors" else name](previous_generation(path))
    what, broken = damaged(whole, seed)
    path.write_bytes(broken)
    try:
        found, lines = _heard(lambda: READERS[name](path))
    except Exception as error:  # any error of a reader is a failure of the trial
        return f"{name}, {what}: {type(error).__name__}: {error}"
    finally:
        path.write_bytes(whole)
    if len(lines) != 1 or str(path) not in lines[0] or "\n" in lines[0]:
        return f"{name}, {what}: said {lines}"
    return None if same(found, older) else f"{name}, {what}: another content than the older file's"


def clean_trial(folder: Path, seed: int) -> str | None:
    """Read a whole file of `make_run(folder)`. Return what went wrong; None if the newest was read without a word."""
    name = sorted(READERS)[seed % len(READERS)]
    found, lines = _heard(lambda: READERS[name](folder / name))
    older = READERS["last.safetensors" if name.endswith("tensors") else name](previous_generation(folder / name))
    return None if not lines and not same(found, older) else f"{name}: said {lines}"


def _heard(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """Return the result of `call`, and its warnings."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        return call(), lines
    finally:
        logging.getLogger().removeHandler(handler)
