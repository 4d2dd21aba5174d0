"""Fixtures and helpers for the tests of the ablation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ablation_grid import Grid, read_grid


@pytest.fixture
def grid_of(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Grid]:
    """Read a grid from its text, in a checkout that has the data."""
    monkeypatch.chdir(checkout)

    def read(text: str, *settings: str) -> Grid:
        path = tmp_path / "grid.toml"
        path.write_text(text)
        return read_grid(path, settings)

    return read
