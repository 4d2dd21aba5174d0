"""The exported tokenizer gives our ids, but for the exceptions listed here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from longclip_teacher.packages import missing_packages
from longclip_teacher.text import EOT, CaptionTokenizer

if missing_packages(["tokenizers"]):
    pytest.skip("the extra export is not installed", allow_module_level=True)

from tokenizers import Tokenizer

from caption_strings import caption_strings
from exporting.tokenizer_file import clip_tokenizer

PLAIN = "a photo of the Dog's red car, it isn't blue. 42 3.5 (two) -- !!! ... ??? \"quoted\" I'll WE'RE # @ 100% a/b"
UNICODE = (
    "naïve café São 日本語 Привет Ελλάς ΣΑΣ ΜΕΛΟΣ İstanbul ﬁne ｆｕｌｌ ＷＩＤＴＨ １２ ﾊﾝｶｸ don’t “quote” — … 👍🏽 "
    "👨\u200d👩\u200d👧 🇫🇷 ß ẞ ǅ ½ ² ① ℃ ﷺ हिन्दी ไทย עברית العربية 한국어 e\u0301 \ufeff \x07 \x1b[31m x\u00a0y "
    "\u2028 &amp; &lt; &gt; &quot; &#39; &nbsp; &eacute; &amp;amp; &amp;quot; <start_of_text> <b>"
)
# What normalisers cannot say: mojibake, and entities that few captions hold
EXCEPTIONS = ["cafÃ©", "donâ€™t", "&zwj;&thorn;"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_str(clip_tokenizer(248).to_str())


def ids_of(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [found.ids[: found.ids.index(EOT) + 1] for found in tokenizer.encode_batch(texts)]


def our_ids(texts: Sequence[str]) -> list[list[int]]:
    return [row[: row.index(EOT) + 1] for row in CaptionTokenizer()(texts).tolist()]


def different(tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
    pairs = zip(texts, ids_of(tokenizer, texts), our_ids(texts), strict=True)
    return [text for text, theirs, ours in pairs if theirs != ours]


def test_token_ids_of_20000_strings_are_ours_but_the_documented_exceptions(tokenizer: Tokenizer) -> None:
    """docs/deployment.md lists the exceptions; `make loaders` counts them, for JavaScript too."""
    pairs = list(caption_strings())
    assert len(pairs) == 20000
    for kind, share in {"plain": 0, "emoji": 0, "unicode": 0.001, "entities": 0.06, "any character": 0.03}.items():
        texts = [text for found, text in pairs if found == kind]
        assert len(different(tokenizer, texts)) <= share * len(texts), kind


@pytest.mark.parametrize("words", [PLAIN, f"{PLAIN} {UNICODE}"], ids=["plain", "unicode"])
def test_token_ids_are_ours(tokenizer: Tokenizer, words: str) -> None:
    random, choice = np.random.default_rng(0), words.split(" ")
    texts = [" ".join(random.choice(choice, random.integers(0, 40))) for _ in range(3000)]
    texts += ["".join(random.choice(choice, random.integers(1, 6))) for _ in range(2000 if words is PLAIN else 0)]
    assert different(tokenizer, texts) == []


def test_letters_are_ours_but_a_few(tokenizer: Tokenizer) -> None:
    """A third of the characters of the basic plane, each between two plain letters. C1 controls are mojibake and left
    out. Letters that are newer than the Unicode of one of the libraries differ."""
    texts = [f"a{chr(code)}b" for code in (*range(0xA0, 0xD800, 3), *range(0xE000, 0xFF00, 3), *range(0xFF00, 0xFFFE))]
    found = different(tokenizer, texts)
    assert len(found) < len(texts) / 1000, found


def test_exceptions_are_exceptions(tokenizer: Tokenizer) -> None:
    assert different(tokenizer, EXCEPTIONS) == EXCEPTIONS


def test_a_long_caption_keeps_its_end_and_a_batch_is_padded_with_it(tokenizer: Tokenizer) -> None:
    long, short = (found.ids for found in tokenizer.encode_batch(["dog " * 300, "!!!"]))
    assert long == CaptionTokenizer()("dog " * 300)[0].tolist()
    assert short[:3] == our_ids(["!!!"])[0] and set(short[3:]) == {EOT} and len(short) == len(long)
