"""Freed memory is kept under glibc, and nothing happens elsewhere."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from eval.base import freed_memory

ROOT = Path(__file__).parents[3]

CHILD = """
import resource, threading
from eval.base.freed_memory import keep_freed_memory
agreed = keep_freed_memory()
def allocate():
    block = bytearray(100_000_000)
    assert block[-1] == 0
    del block
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    allocate()
before = faults()
for _ in range(5):
    allocate()
after = faults()
for _ in range(2):  # other threads allocate from their own heaps
    thread = threading.Thread(target=allocate)
    thread.start()
    thread.join()
print(agreed, after - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_a_large_block_is_reused_without_page_faults() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    agreed, faults = done.stdout.split()
    assert agreed == "True"
    assert int(faults) < 5000  # 5 x 24,400 if each block is its own mapping


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_elsewhere_it_says_no(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(freed_memory.ctypes, "CDLL", None)  # not called
    assert freed_memory.keep_freed_memory() is False


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1.2"))
    monkeypatch.setattr(freed_memory.ctypes, "CDLL", None)
    assert freed_memory.keep_freed_memory() is False
