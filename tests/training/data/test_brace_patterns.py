"""Braces in shard patterns: braceexpand's names, and a bound that is found without making them."""

from __future__ import annotations

import time

import pytest
from braceexpand import braceexpand

from longclip_teacher.errors import InputError
from training.data import brace_patterns
from training.data.brace_patterns import expand_braces


@pytest.mark.parametrize(
    "pattern",
    [
        "", "a.tar", "{a,b}.tar", "{000..012}.tar", "{9..-3..4}{a..e..2}", "{cc3m/{00..03},cc12m/{0..9}}-{x,}.tar",
        "{a,b{c,d{0..3}}}", "{a}", r"\{a,b\}{c,d}", r"{a\,b,c}", "{{0..1},{2..3}}{5..5}", "{e..a}{Z..a}", "{0..9..0}",
    ],
)  # fmt: skip
def test_the_number_of_names_is_braceexpands(pattern: str) -> None:
    names = list(braceexpand(pattern))
    assert expand_braces(pattern) == names
    counted = brace_patterns._num_names(pattern, 0)
    assert counted == len(names) or (counted > len(names) and ("..2}" in pattern or "Z..a" in pattern))


@pytest.mark.parametrize(
    "pattern",
    [
        "{000000..999999999}.tar", "{0..1000000}", "{1..1001}{1..1000}", "{a,{b,{0..9999999}}}", "{a..z}" * 5,
        "{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}{x,y}", "{0..99999999999999999999}", "{a,b}" * 20,
    ],
)  # fmt: skip
def test_too_many_names_are_refused_at_once(pattern: str) -> None:
    start = time.monotonic()
    with pytest.raises(InputError, match=r"more than 1,000,000 names: narrow them") as caught:
        expand_braces(pattern)
    assert time.monotonic() - start < 1 and "\n" not in str(caught.value)


def test_as_many_names_as_allowed_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(brace_patterns, "MAX_NAMES", 12)
    assert len(expand_braces("{0..3}{a,b,c}")) == 12
    with pytest.raises(InputError, match="more than 12 names"):
        expand_braces("{0..3}{a,b,c,d}")


@pytest.mark.parametrize(
    ("pattern", "cause"),
    [
        ("{a,b", "Unbalanced braces"),
        ("{" * 50 + "a,b" + "}" * 50, "nested more than 20 deep"),
        ("{a," * 3000, "more than 4096 characters"),
        ("{" * 3000, "Unbalanced braces"),
    ],
)
def test_what_cannot_be_expanded_is_refused_in_one_line(pattern: str, cause: str) -> None:
    with pytest.raises(InputError, match=cause) as caught:
        expand_braces(pattern)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)
