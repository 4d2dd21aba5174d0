"""Shards from a server that is slow, breaks off, answers wrongly or changes what it serves."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from faults.trials import Row
from faulty_server import HURRIED, http_trial

__all__ = ["ROWS"]


def trial(draws: random.Random, folder: Path, material: Path) -> str | None:
    return http_trial(draws, HURRIED)


def _try_once(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(trial.__globals__, "HURRIED", replace(HURRIED, tries=1))


ROWS = [
    Row(
        "http faults",
        "random shards from a server with one to four random faults: no sample is lost or doubled, or the shard and "
        "the cause are named in one line",
        trial,
        full=200,
        few=6,
        off="a transfer is tried once",
        switch_off=_try_once,
        num_off=8,
        per_process=10,
    ),
]
