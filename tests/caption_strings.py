"""20,000 strings that a tokenizer may meet, by kind, the same on every machine."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

__all__ = ["KINDS", "caption_strings"]

KINDS = {"plain": 10000, "unicode": 4000, "emoji": 2000, "entities": 2000, "mojibake": 500, "any character": 1500}
# Words by kind; a space within a word is written as ␣
_WORDS = {
    "plain": """
        a A the The photo Photo of in on with and dog Dogs cat's it isn't don't I'll we've THEY'RE she'd I'm red Blue 42
        3.5 1,000 10:30 100% @home e-mail half-way and/or (two) [three] {four} <b> "quoted" 'single' -- !!! ... ??? ; :
        , . _under_score ~ ^ * + = \\ | $5 left-hand side; standing near, HTTP://example.org/a?b=c&d x^2 C++ '''
        antidisestablishmentarianism qwzxv aaaaaaa bread␣&␣butter
    """,
    "unicode": """
        naïve café São Zürich smörgåsbord Ångström Żółć 日本語 写真 漢字かな Привет мир
        Ελλάς ΣΑΣ ΜΕΛΟΣ Ὀδυσσεύς İstanbul ﬁne ｆｕｌｌ ＷＩＤＴＨ １２ ﾊﾝｶｸ don’t “quote” — … « » ß ẞ ǅ ½ ² ① ℃ ﷺ
        हिन्दी ไทย עברית العربية 한국어
        Ⅷ ŉ Ĳ ﬅ ı ΐ ᾳ ა Ⴀ ꭰ 𝒜 𐐀 ‘single’ ‚low‚ „Low‟ ＂ ＇
    """,
    "emoji": "👍🏽 👨\u200d👩\u200d👧 🇫🇷 😀 ❤️ ❤ ☺️ 🏳️\u200d🌈 1️⃣ ✈ ✈️ 🦄 🫠 ©️ ™ ⭐ 🎉🎉🎉 🐶🐱",
    "entities": """
        &amp; &lt; &gt; &quot; &#39; &#x27; &nbsp; &eacute; &amp;amp; &amp;quot; &copy; &hellip; &mdash; &lsquo; &rsquo;
        &euro; &frac12; AT&amp;T &lt;b&gt; & &; &amp &#233; &Uuml; &thorn; R&D
    """,
    "mojibake": "cafÃ© donâ€™t â€œquoteâ€ Ã¼ber naÃ¯ve â€¦ Ð¿Ñ€Ð¸Ð²ÐµÑ‚ æ—¥æœ¬",
}
_INVISIBLE = ["e\u0301", "\ufeff", "\u200b", "\u00ad", "x\u00a0y", "\u2028", "\u3000", "\u0130"]


def caption_strings() -> Iterator[tuple[str, str]]:
    """Pairs of kind and string: `KINDS` says how many of each. All but the plain ones also hold plain words."""
    random = np.random.default_rng(0)
    words = {kind: [word.replace("␣", " ") for word in found.split()] for kind, found in _WORDS.items()}
    words["unicode"] += _INVISIBLE
    for kind, count in KINDS.items():
        for _ in range(count):
            if kind == "any character":
                yield kind, "a" + "".join(map(_character, random.integers(32, 0x1FB00, random.integers(1, 4)))) + "b"
                continue
            chosen = list(random.choice(words["plain"], random.integers(0, 30)))
            if kind != "plain":
                for word in random.choice(words[kind], random.integers(1, 5)):
                    chosen.insert(int(random.integers(0, len(chosen) + 1)), word)
            yield kind, random.choice([" ", " ", " ", "", "  ", "\n"]).join(chosen)


def _character(code: int) -> str:
    return "?" if 0xD800 <= code < 0xE000 else chr(code)
