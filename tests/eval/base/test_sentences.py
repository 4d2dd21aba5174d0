"""Sentences are found by rule: what ends one, what only looks like an end."""

from __future__ import annotations

import pytest

from eval.base.sentences import split_sentences

SPACED = [  # joined with spaces
    ["A red board.", "It hangs on a wall!", "Is it wet?"],
    ["A board 3.5 m wide costs $.25 or 1.00 each.", "It is red."],
    ["Dr. Smith meets Mrs. Jones on St. James St. near Mt. Hope.", "They talk."],
    ["Mr. Brown sits beside Ms. Green and Prof. White.", "All smile."],
    ["Many fruits, e.g. apples vs. pears, lie here.", "One is cut."],
    ["Tools, i.e. hammers, cf. the next picture, hang there.", "They shine."],
    ["The hall is approx. 30 m long, ca. 10 m wide.", "It is empty."],
    ["As fig. 3 shows, it leans.", "Nobody cares."],
    ["A statue of John F. Kennedy by J. R. Smith.", "It is of bronze."],
    ["J. Smith stands there.", "He waves."],
    ["There is the letter U.", "You can see a skull."],
    ["At 4 p.m. in summer, cups, plates, etc. stand around.", "They are blue."],
    ["The shop opens at 9 a.m.", "A man waits."],
    ["A van of Acme Inc. stands before Miller Ltd. in the rain.", "Its lights are on."],
    ["Martin Luther King Jr. speaks.", "People listen."],
    ["A poster from the U.S. in a frame.", "The glass is broken."],
    ["It is bus No. 5 to town.", "The sign says no.", "Nobody waits."],
    ["See vol. 2, pp. 30 to 40.", "The page is torn."],
    ["1. A dog.", "2. A cat."],
    ["1) A dog.", "2) A cat."],
    ['A sign says "Stop."', "A car (a red one.)", "It waits..."],
    ["The label reads “Fresh.”", "Below is a price."],
    ["‘No entry.’", "The door is shut."],
    ['"Why?" asks a sign.', "Nobody answers."],
    ["“Who is it?” says the speech bubble.", "A bird sits on it."],
    ['The banner asks "Ready?"', "A crowd stands below."],
    ["It fades…", "Then nothing?!", "No."],
    ["The path leads on... and on.", "It ends at a lake."],
    ["The text trails off… then stops.", "The rest is blank."],
    ["a navy board in a red frame.", "top left shows a zero.", "centre is empty."],
    ["is it a dog?", "it is a cat."],
    ["wow!", "what a view."],
    ["A man, 6 ft. tall, holds a rod of 50 in. length.", "He smiles."],
    ["The bag weighs 5 kg. in all.", "It is full."],
    ["The rope is 3 m.", "It is frayed."],
    ["They come in.", "The door shuts."],
    ["Version 2.0 is out.", "Get it at www.example.com now."],
    ["A file named photo.final.jpg is open.", "The window is small."],
    ["Prices: $1.50, €2.75, £.99.", "All are crossed out."],
    ["The clock shows 10:30.", "The hands are gold."],
    ["A dog!!!", "It barks???", "Yes."],
    ["[The text is cut.]", "The rest follows."],
    ["A thing; another thing: a third.", "The end."],
    ["Ein Hund läuft.", "Er ist groß.", "Über ihm fliegt ein Vogel."],
    ["Un chien court !", "Il est « grand ».", "Où va-t-il ?"],
    ["एक कुत्ता दौड़ता है।", "वह बड़ा है।"],
    ["هل هذا كلب؟", "نعم هو كلب."],
    ["no end at all"],
    ["A single sentence."],
    ["A title without a stop, then a comma"],
    ["3.5"],
    ["..."],
    ["!"],
]
UNSPACED = [  # no space between them
    ["一只狗在跑。", "它是棕色的。", "天空很蓝！"],
    ["这是什么？", "是一只猫。"],
    ["他说：“停。”", "车停了。"],
    ["「止まれ。」", "犬が走る。", "空は青い｡", "終わり"],
    ["一只狗"],
    ["价格是3.5元。", "很便宜。"],
]
LINES = [  # one per line
    ["A title without a stop", "A dog runs.", "It barks"],
    ["- a red dog", "- a blue cat", "- two birds"],
    ["• A table", "• A chair."],
    ["1. A dog", "2. A cat, e.g. a tabby"],
    ["A caption", "another caption", "a third caption"],
    ["Mr. Smith", "Dr."],
]


@pytest.mark.parametrize("sentences", SPACED)
def test_sentences_with_spaces(sentences: list[str]) -> None:
    assert split_sentences(" ".join(sentences)) == sentences
    assert split_sentences("  " + "  \t".join(sentences) + " ") == sentences


@pytest.mark.parametrize("sentences", UNSPACED)
def test_sentences_without_spaces(sentences: list[str]) -> None:
    assert split_sentences("".join(sentences)) == sentences
    assert split_sentences(" ".join(sentences)) == sentences


@pytest.mark.parametrize("sentences", LINES)
def test_line_breaks_end_sentences(sentences: list[str]) -> None:
    assert split_sentences("\n".join(sentences)) == sentences
    assert split_sentences("\r\n\r\n".join(sentences) + "\n") == sentences


def test_blanks_hold_none() -> None:
    assert split_sentences(" \n ") == split_sentences("") == []
