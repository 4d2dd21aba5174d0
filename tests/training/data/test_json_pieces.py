"""JSON in pieces against json.loads of the whole: values, places, damage, memory."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest

from training.data.json_pieces import object_members

_LEAVES = ["", "a", 'quote " } ] , {"shards": [', "caf\udce9", "é中🙂", 0, -12345, 1.5e-300, 10**20, True, None, [], {}]


def drawn(draws: random.Random, depth: int = 3) -> Any:
    kind = draws.random()
    if depth == 0 or kind < 0.4:
        return draws.choice(_LEAVES)
    values = [drawn(draws, depth - 1) for _ in range(draws.randrange(4))]
    return values if kind < 0.7 else {draws.choice("abc") * number: value for number, value in enumerate(values)}


def pieces(content: bytes, draws: random.Random) -> Iterator[bytes]:
    while content:
        size = draws.choice([1, 3, 50, 1000])
        yield content[:size]
        content = content[size:]


def written(value: Any, draws: random.Random) -> bytes:
    text = json.dumps(value, ensure_ascii=draws.random() < 0.3, indent=draws.choice([None, None, 1]))
    return text.encode("utf-8", "backslashreplace")


def test_members_and_their_places_are_those_of_the_whole() -> None:
    draws = random.Random(0)
    for _ in range(200):
        whole = {"format": drawn(draws), "é": drawn(draws), "shards": [drawn(draws) for _ in range(draws.randrange(5))]}
        whole = dict(draws.sample(sorted(whole.items(), key=lambda pair: pair[0]), len(whole)))
        content = written(whole, draws)
        found = list(object_members(pieces(content, draws), "shards"))
        assert [member.value for member in found if member.name == "shards"] == whole["shards"]
        others = {member.name: member.value for member in found if member.name != "shards"}
        assert others == {name: value for name, value in whole.items() if name != "shards"}
        for member in found:
            assert json.loads(content[member.offset : member.offset + member.num_bytes]) == member.value


@pytest.mark.parametrize("number", [12, -345, 1.5, 12.25e-300, -1e30])
def test_a_number_is_whole_however_it_is_cut(number: float) -> None:
    content = json.dumps({"a": number, "shards": [number, number], "b": number}).encode()
    for size in range(1, 12):
        cut = [content[start : start + size] for start in range(0, len(content), size)]
        assert [member.value for member in object_members(cut, "shards")] == [number] * 4


def test_no_part_of_an_object_passes_for_one() -> None:
    draws = random.Random(0)
    content = written({"format": "é", "shards": [{"a": [1, 2], "b": "x"}, 12]}, draws).rstrip()
    for stop in range(len(content)):
        with pytest.raises(ValueError):
            list(object_members(pieces(content[:stop], draws), "shards"))
    for bad in (
        b"[]",
        b"12",
        b"{} {}",
        b"{,}",
        b'{"a" 1}',
        b'{"a":1,}',
        b'{"shards": {}}',
        b'{"shards":[1 2]}',
        b"\xff",
    ):
        with pytest.raises(ValueError):
            list(object_members([bad], "shards"))


@pytest.mark.parametrize("has_end", [True, False])
def test_the_whole_is_never_held(has_end: bool) -> None:
    item = json.dumps({"key": ["x" * 1000] * 10}).encode()

    def manifest() -> Iterator[bytes]:
        yield b'{"shards": ['
        for _ in range(2000):  # 20 MB
            yield item + b", " if has_end else item.replace(b"]", b"")
        yield item + b"]}"

    tracemalloc.start()
    try:
        if has_end:
            assert sum(1 for _ in object_members(manifest(), "shards")) == 2001
        else:  # damage is told at once, and not after a look at all that follows
            with pytest.raises(ValueError):
                list(object_members(manifest(), "shards"))
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()
