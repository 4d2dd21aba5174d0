"""Captions to token ids: open_clip's ids on all kinds of text, truncation, trimming, buckets."""

from __future__ import annotations

import pickle
import random
import re
import unicodedata

import ftfy.badness
import ftfy.chardata
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from longclip_teacher import text as text_module
from longclip_teacher.errors import InputError
from longclip_teacher.text import (
    EOT,
    SOT,
    VOCAB_SIZE,
    CaptionTokenizer,
    caption_lengths,
    first_sentence,
    length_buckets,
    trim,
    truncate,
)

PLAIN = """A navy board in red frame. top-left shows; large (zero) on dark, man's WE'LL don't 1984 3.5% #1 _x_ "so" """
ODD = """
naïve café Ünïcödé ﬁne Ｆｕｌｌ “curly” it’s â€™ Ã© 日本語 привет مرحبا हिन्दी 👍🏽 👩‍👩‍👧 🇫🇷 é ½ ① Ⅷ … — ß İstanbul ſ K
&amp; &lt;b&gt; &#39; &quot; &amp;amp; &nbsp; &eacute; AT&T & &; <end_of_text> <START_OF_TEXT> <|endoftext|> </w> <br/>
"""
ODDITIES = [*ODD.split(), "\x00", "\x1b[31m", "\x7f", "\x85", "\u200b", "\u00ad", "\ufeff", "\ufffd", "\x08x"]
SEPARATORS = [" "] * 12 + ["", "\n", "\r\n", "\t", "  ", "\x0b", "\x0c", "\x1c", "\u00a0", "\u2003", "\u2028"]


def varied_captions(count: int, seed: int) -> list[str]:
    """Captions that alternate between plain ones and ones with something strange in them."""
    draw = random.Random(seed)
    captions = []
    for index in range(count):
        pool = PLAIN.split() + (ODDITIES if index % 2 else [])
        separators = SEPARATORS if index % 2 else [" ", " ", "\n", "\t"]
        captions.append("".join(draw.choice(pool) + draw.choice(separators) for _ in range(draw.randint(0, 40))))
    return captions


@pytest.fixture(scope="module")
def reference() -> SimpleTokenizer:
    return SimpleTokenizer()


def test_ids_match_open_clip_on_thousands_of_captions(reference: SimpleTokenizer) -> None:
    tokenizer = CaptionTokenizer()
    captions = varied_captions(3000, seed=0)
    assert sum(caption.isascii() for caption in captions) > 1000
    assert torch.equal(tokenizer(captions), reference(captions, 248))
    assert torch.equal(tokenizer(captions, 30), reference(captions, 30))
    counts = [tokenizer.count_tokens(caption) for caption in captions[:300]]
    assert counts == [len(reference.encode(caption)) + 2 for caption in captions[:300]]


def test_every_ascii_character_within_and_between_words(reference: SimpleTokenizer) -> None:
    texts = [f"Red{char}dog {char} The{char}{char}cat{char}" for char in map(chr, range(0xA2))]
    assert torch.equal(CaptionTokenizer()(texts), reference(texts, 248))


MOJIBAKE = "".join(ftfy.badness.MOJIBAKE_CATEGORIES.values()).replace("-", "") + "ÃÂœŒÐÎØÙà°√≈вЂβ‚Äā×\u00a0\u00ad"
ENTITIES = """& &; &# &amp &lt &nbsp &amp;lt; &amp;amp;lt; &amp;#39; &#39; &#x27; &#8217; &#128; &#0; &#10; &#13;
&#xD800; &#1114112; &EACUTE; &Atilde;&copy; &notit; ＆amp; &amp\u037e"""
NASTY = """e\u0301
a\u0327\u0301 \u0301 =\u0338 \u1112\u1161\u11ab ﾊﾟ ￣ \u212a \u212b \u037e \u1fef ΟΔΟΣ Σ Σ. aΣ' İ ſt ŉ <END_OF_TEXT>
\u200d 👩\u200d👩\u200d👧 \ufe0f \ufeff \ud83d \ude00 \ud83d\ude00 \x1b[0m <start_of_text> <b> we've 's 12"""
NASTY_PIECES = [*NASTY.split(), "\u2028", "\u3000", "\u2003", "w" * 300]


def nasty_caption(draw: random.Random) -> str:
    """A random join of pieces that the clean-up or the tokenizer treats specially."""
    pieces = []
    for _ in range(draw.randint(1, 11)):
        kind = draw.random()
        if kind < 0.35:
            piece = draw.choice(PLAIN.split())
        elif kind < 0.6:
            piece = "".join(draw.choices(MOJIBAKE, k=draw.choice([1, 1, 1, 2, 3])))
        elif kind < 0.75:
            piece = draw.choice(NASTY_PIECES)
        elif kind < 0.9:
            piece = draw.choice(ENTITIES.split() if draw.random() < 0.5 else list(ftfy.chardata.HTML_ENTITIES))
        else:
            piece = chr(draw.choice([draw.randrange(0x3000), draw.randrange(0xF900, 0x1FB00)]))
        pieces.append(piece + draw.choice([*[" "] * 8, "", "\n", "  ", "\t"]))
    return "".join(pieces)


def test_ids_match_open_clip_on_nasty_captions_on_both_paths(reference: SimpleTokenizer) -> None:
    draw = random.Random(0)
    captions = [nasty_caption(draw) for _ in range(4000)]
    by_chunks = [caption for caption in captions if text_module._encode_by_chunks(caption) is not None]
    assert 1000 < len(by_chunks) < 3500  # both paths are tried
    assert any(not unicodedata.is_normalized("NFC", caption) for caption in by_chunks)
    assert torch.equal(CaptionTokenizer()(captions), reference(captions, 248))


@pytest.mark.parametrize(
    "odd",
    [
        "“quoted”",
        "it’s",
        "café",
        "—",
        "🎉",
        "👩\u200d👩\u200d👧",
        "&",
        "AT&T",
        "&amp;",
        "&#39;s",
        "日本語",
        "ΟΔΟΣ",
        "x\u00a0y",
    ],
)
def test_common_captions_take_the_fast_path(odd: str, reference: SimpleTokenizer) -> None:
    text = f"The dog {odd} of a {odd}, and\n{odd}"
    assert text_module._encode_by_chunks(text) is not None
    assert torch.equal(CaptionTokenizer()(text), reference(text, 248))


@pytest.mark.parametrize(
    "text",
    [
        *(
            "schÃ¶n",
            "the Ã cafe",
            "a Â b",
            "dog.\nÂ b",
            "a\x00b",
            "\ud83d x",
            "&amp;lt;b",
            "&eacute; <b>",
            "вЂ x",
            "œ \u00a0",
            "ÇŒ\nb",
        ),
        *("a Ã&nbsp;", "é&cent;", "x &Atilde; y", "&Acirc;&nbsp;x", "a A\u0301€"),
    ],
)
def test_possible_mojibake_goes_to_open_clip_whole(text: str, reference: SimpleTokenizer) -> None:
    assert text_module._encode_by_chunks(text) is None
    assert torch.equal(CaptionTokenizer()(text), reference(text, 248))


def test_ftfys_search_for_mojibake_sees_no_further_than_the_tokenizer_assumes() -> None:
    pattern = ftfy.badness.BADNESS_RE
    parser = pytest.importorskip("re._parser" if hasattr(re, "_parser") else "sre_parse")
    assert parser.parse(pattern.pattern, pattern.flags).getwidth()[1] <= text_module._CONTEXT + 1
    assert not re.search(r"\(\?[=!<]|\$|\\b", pattern.pattern)  # nor does anything hang on what is not there


def test_the_slow_path_matches_open_clip_on_every_caption(
    monkeypatch: pytest.MonkeyPatch, reference: SimpleTokenizer
) -> None:
    captions = varied_captions(200, seed=1)
    slow = CaptionTokenizer(fast=False)
    monkeypatch.setattr(text_module, "_encode_by_chunks", None)  # not called
    assert torch.equal(slow(captions), reference(captions, 248))
    assert slow.count_tokens("a red dog") == 5


def test_memos_are_bounded_in_entries_and_entry_length() -> None:
    memo = text_module._Memo(str.upper, 3)
    assert [memo[key] for key in ("a", "b", "a", "c", "d", "a")] == ["A", "B", "A", "C", "D", "A"]
    assert len(memo) <= 3
    assert memo["x" * 1000] == "X" * 1000 and max(map(len, memo)) == 1


def test_rows_are_start_caption_end_padding() -> None:
    tokenizer = CaptionTokenizer()
    row = tokenizer("a cat")[0]
    assert row.dtype == torch.int64
    assert (row[0], row[3], row[4:].sum()) == (SOT, EOT, 0)
    assert tokenizer([]).shape == (0, 248)
    assert tokenizer(["", "a"], context_length=77).shape == (2, 77)
    assert VOCAB_SIZE == EOT + 1 == SimpleTokenizer().vocab_size


def test_truncation_keeps_the_end_token() -> None:
    tokenizer = CaptionTokenizer(10)
    long_caption = "red " * 50
    tokens = tokenizer(long_caption)
    assert tokens.shape == (1, 10)
    assert tokens[0, -1] == EOT
    assert (tokens == EOT).sum() == 1
    assert tokenizer.count_tokens(long_caption) == 52
    with pytest.raises(InputError, match="context_length 1 leaves no room"):
        tokenizer("a", context_length=1)


def test_a_pickled_tokenizer_is_small_and_the_same() -> None:
    tokenizer = CaptionTokenizer(100, fast=False)
    tokenizer("fill the memo")
    data = pickle.dumps(tokenizer)
    copy = pickle.loads(data)  # noqa: S301
    assert len(data) < 200 and copy.fast is False
    assert torch.equal(copy("a cat"), tokenizer("a cat"))


def test_trim_and_lengths_find_the_end_even_where_zero_is_a_word() -> None:
    tokens = CaptionTokenizer()(["! ! ! !", "a cat", ""])
    assert caption_lengths(tokens).tolist() == [6, 4, 2]
    assert torch.equal(trim(tokens), tokens[:, :6])


def test_truncate_equals_tokenising_at_the_shorter_context() -> None:
    texts = ["red " * 50, "red " * 8, "red " * 7, "red", ""]
    tokenizer = CaptionTokenizer()
    full = tokenizer(texts)
    before = full.clone()
    assert torch.equal(truncate(full, 10), tokenizer(texts, 10))
    assert torch.equal(truncate(full, 248), full)
    assert torch.equal(full, before)


def test_first_sentence() -> None:
    assert first_sentence("A dog. It runs. Fast.") == "A dog"
    assert first_sentence("3.5 dogs") == "3.5 dogs"


def test_length_buckets_hold_every_row_once_and_waste_little() -> None:
    draw = random.Random(0)
    lengths = [draw.randint(2, 248) for _ in range(500)]
    buckets = length_buckets(lengths)
    assert sorted(row for rows in buckets for row in rows) == list(range(500))
    padded = sum(len(rows) * max(lengths[row] for row in rows) for rows in buckets)
    assert padded < 1.2 * sum(lengths)
    assert all(len(rows) >= 8 for rows in buckets[:-1])
    assert all(lengths[rows[0]] == max(lengths[row] for row in rows) for rows in buckets)
    assert length_buckets([100] * 20) == [list(range(20))]
    assert length_buckets([]) == []
