"""Random changes of bytes, as a fuzzer makes them."""

from __future__ import annotations

import random

from damages import damaged

__all__ = ["mutated"]

_INTERESTING = (
    b"\0",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\0\0\0\0",
    b"\xff\xff\xff\xff",
    b"{",
    b"}",
    b"[",
    b'"',
    b"-1",
    b"1e999",
)


def mutated(whole: bytes, draws: random.Random) -> bytes:
    """Change bytes in one to eight places: damage, insertions, repeats, borders of number ranges."""
    for _ in range(draws.randint(1, 8)):
        if not whole:
            break
        place = draws.randrange(len(whole))
        size = draws.choice([1, 4, 64, 512])
        part = draws.choice(_INTERESTING)
        kind = draws.choice(["damage", "insert", "overwrite", "remove", "repeat", "random"])
        if kind == "damage":
            whole = damaged(whole, draws.randrange(1 << 32))[1]
        elif kind == "insert":
            whole = whole[:place] + part + whole[place:]
        elif kind == "overwrite":
            whole = whole[:place] + part + whole[place + len(part) :]
        elif kind == "remove":
            whole = whole[:place] + whole[place + size :]
        elif kind == "repeat":
            whole = whole[: place + size] + whole[place : place + size] + whole[place + size :]
        else:
            whole = whole[:place] + draws.randbytes(size) + whole[place + size :]
    return whole
