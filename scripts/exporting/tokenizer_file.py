"""CLIP's tokenizer as a tokenizer.json, which reads as `CaptionTokenizer` does in Python, Rust and JavaScript.

The clean-up of captions (ftfy's fixes, HTML entities) becomes a row of normalisers as far as they can say it. What they
cannot: mojibake, rare entities and C1 control characters.
"""

from __future__ import annotations

import html
from html.entities import name2codepoint
from typing import TYPE_CHECKING, Any
from unicodedata import normalize

from longclip_teacher.open_clip_parts import SimpleTokenizer
from longclip_teacher.text import EOT, SOT

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["SPECIAL_TOKENS", "clip_tokenizer", "tokenizer_settings"]

SPECIAL_TOKENS = {"bos_token": "<start_of_text>", "eos_token": "<end_of_text>", "pad_token": "<end_of_text>"}
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # SimpleTokenizer's, after lower case
# Entities that captions hold, besides those that escape markup and those of Latin-1
_ENTITIES = (
    "apos #39 #x27 #160 trade hellip mdash ndash lsquo rsquo ldquo rdquo #8211 #8212 #8216 #8217 #8220 #8221 "
    "#8230 bull euro"
)
# Also without the semicolon. &amp; comes first and twice, because captions are often escaped twice
_ESCAPES = (("&(?:amp|#38);?", "&"), ("&(?:amp|#38);?", "&"), ("&lt;?", "<"), ("&gt;?", ">"), ("&(?:quot|#34);?", '"'))
_LIGATURES = {
    "Ĳ": "IJ", "ĳ": "ij", "ŉ": "ʼn", "Ǳ": "DZ", "ǲ": "Dz", "ǳ": "dz", "Ǆ": "DŽ", "ǅ": "Dž", "ǆ": "dž", "Ǉ": "LJ",
    "ǈ": "Lj", "ǉ": "lj", "Ǌ": "NJ", "ǋ": "Nj", "ǌ": "nj", "ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl",
    "ﬅ": "ſt", "ﬆ": "st",
}  # fmt: skip
_CONTROLS = r"[\x00-\x08\x0b\x0e-\x1f\x7f\x{206a}-\x{206f}\x{feff}\x{fff9}-\x{fffc}]"
_TERMINAL_ESCAPES = r"\x1b\[((?:\d|;)*)([a-zA-Z])"


def clip_tokenizer(context_length: int) -> Tokenizer:
    """The tokenizer: it cuts captions at `context_length` tokens with EOT kept and pads a batch with EOT.

    EOT as the pad token changes no feature, since a caption ends at its first EOT; "!", the id 0 of our padding, is a
    word, and as a pad token would split "!!!" into others.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    simple = SimpleTokenizer()
    merges = sorted(simple.bpe_ranks, key=simple.bpe_ranks.__getitem__)
    tokenizer = Tokenizer(models.BPE(vocab=simple.encoder, merges=merges, end_of_word_suffix="</w>", fuse_unk=False))
    latin = [name for name, code in name2codepoint.items() if 0xA0 <= code <= 0xFF]
    replaced = [(f"&{name};", html.unescape(f"&{name};")) for name in (*_ENTITIES.split(), *latin)]
    replaced += [(f"&#{code};", chr(code)) for code in range(0xA1, 0x100)]
    replaced += [*_LIGATURES.items(), ("\u3000", " ")]
    replaced += [(form, normalize("NFKC", form)) for form in map(chr, range(0xFF01, 0xFFF0))]  # of other widths
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(_TERMINAL_ESCAPES), ""),
            *(normalizers.Replace(Regex(found), instead) for found, instead in _ESCAPES),
            *(normalizers.Replace(found, instead) for found, instead in replaced),
            normalizers.Replace(Regex("[\u02bc\u2018-\u201b]"), "'"),
            normalizers.Replace(Regex("[\u201c-\u201f]"), '"'),
            normalizers.Replace(Regex(_CONTROLS), ""),
            normalizers.NFC(),
            normalizers.Replace(Regex(r"(?<=\p{L})Σ(?!\p{L})"), "ς"),  # as str.lower() does at the end of a word
            normalizers.Lowercase(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    start, end = (SPECIAL_TOKENS["bos_token"], SOT), (SPECIAL_TOKENS["eos_token"], EOT)
    tokenizer.add_special_tokens([AddedToken(token, normalized=True, special=True) for token, _ in (start, end)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start[0]} $A {end[0]}", special_tokens=[start, end]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    tokenizer.enable_truncation(context_length)
    tokenizer.enable_padding(pad_id=EOT, pad_token=SPECIAL_TOKENS["pad_token"])
    return tokenizer


def tokenizer_settings(context_length: int) -> dict[str, Any]:
    """The tokenizer_config.json: a generic fast tokenizer, since transformers' CLIPTokenizer ignores normalisers."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        **SPECIAL_TOKENS,
    }
