"""Rows of conversations: whose turn is the caption, and which file begins with a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval.benchmarks import conversations
from eval.benchmarks.conversations import SHAREGPT4V_JSON, ConversationRow, conversation_rows, held_out_rows

HUMAN, SYSTEM = {"from": "human", "value": "Describe it."}, {"from": "system", "value": "You help."}
GPT = {"from": "gpt", "value": "A red\nhouse."}


def read(path: Path, rows: list[Any]) -> list[ConversationRow]:
    path.write_text(json.dumps(rows))
    return list(conversation_rows(path))


@pytest.mark.parametrize(
    "turns",
    [
        [HUMAN, GPT],
        [GPT],
        [SYSTEM, HUMAN, GPT, HUMAN, {"from": "gpt", "value": "More."}],
        [{"role": "user", "content": "?"}, {"role": "assistant", "content": "A red house."}],
        [{"role": "assistant", "content": [{"type": "image"}, {"type": "text", "text": "A red house."}]}],
        [{"from": "GPT", "value": "A red house."}],
        [{"value": "?"}, {"value": "A red house."}],  # nobody says who speaks
        ["noise", HUMAN, GPT],
    ],
)
def test_the_first_answer_is_the_caption(turns: list[Any], tmp_path: Path) -> None:
    assert read(tmp_path / "a.json", [{"image": "0.jpg", "conversations": turns}]) == [(0, "0.jpg", "A red house.")]


@pytest.mark.parametrize(
    "row",
    [
        {}, 7, None, "text", {"conversations": None}, {"conversations": []}, {"conversations": [HUMAN]},
        {"conversations": [HUMAN, SYSTEM]}, {"conversations": [HUMAN, {"from": "gpt", "value": None}]},
        {"conversations": [HUMAN, {"from": "gpt"}]}, {"conversations": [HUMAN, {"from": "gpt", "value": 7}, GPT]},
        {"image": [], "conversations": "text"},
    ],
)  # fmt: skip
def test_a_row_may_lack_everything(row: object, tmp_path: Path) -> None:
    rows = read(tmp_path / "a.json", [row, {"image": ["1.jpg"], "conversations": [GPT]}])
    assert rows == [(0, None, None), (1, "1.jpg", "A red house.")]


def test_what_is_empty_is_not_what_is_absent(tmp_path: Path) -> None:
    row = {"image": "", "conversations": [{"from": "gpt", "value": " \n"}]}
    assert read(tmp_path / "a.json", [row]) == [(0, "", "")]


def test_only_sharegpt4vs_own_file_begins_with_a_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"image": f"{number}.jpg", "conversations": [GPT]} for number in range(20)]
    for name, expected in ((SHAREGPT4V_JSON, 1000), ("own.json", 0)):
        read(tmp_path / name, rows)
        assert held_out_rows(tmp_path / name) == expected
    for most, expected in ((19, 1000), (20, 0)):
        monkeypatch.setattr(conversations, "_MANY_ROWS", most)
        monkeypatch.setattr(conversations, "_LEAST_ROW_BYTES", 1)
        assert held_out_rows(tmp_path / "own.json") == expected
    assert held_out_rows(tmp_path / "gone.json") == 0
