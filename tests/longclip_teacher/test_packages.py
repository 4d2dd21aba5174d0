"""Missing and outdated packages are named as they would be installed."""

from __future__ import annotations

import pytest

from longclip_teacher import packages
from longclip_teacher.packages import missing_packages


@pytest.mark.parametrize(
    ("installed", "missing"),
    [("2.6.0+cu124", True), ("2.7.0+cpu", False), ("2.10.1", False), ("3.0", False), ("1.13.1", True)],
)
def test_versions_are_compared_as_numbers(monkeypatch: pytest.MonkeyPatch, installed: str, missing: bool) -> None:
    monkeypatch.setattr(packages.importlib.metadata, "version", lambda name: installed)
    assert missing_packages(["torch>=2.7", "numpy", "no_such_package"]) == [
        *(["torch>=2.7"] if missing else []),
        "no_such_package",
    ]
