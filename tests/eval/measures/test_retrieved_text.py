from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.measures import retrieved_text
from eval.measures.recall import recall_metrics
from eval.measures.retrieval_set import EncodedSet
from eval.measures.retrieved_text import nearest_captions, retrieved_text_quality

CAPTIONS = [
    "A red dog runs over the green lawn.",
    "The dog runs on a lawn of green.",
    "A blue car stands in the narrow street.",
    "Two old men play chess in a park.",
    "Men at play in the park, a board of chess between them.",
]
OWNER = [0, 0, 1, 2, 2]


def encoded(image_features: torch.Tensor, captions: list[str] = CAPTIONS, owner: list[int] = OWNER) -> EncodedSet:
    texts = torch.eye(len(captions))
    images = [Path(f"{row}.png") for row in range(len(image_features))]
    return EncodedSet(images, captions, image_features, texts, torch.tensor(owner), 0, [])


def test_own_captions_found_are_perfect() -> None:
    found = torch.eye(5)[[1, 2, 3]]  # the second caption of the first picture counts too
    result = retrieved_text_quality(encoded(found))
    assert result["precision_at_1"] == 100 and result["distinct_captions"] == 100
    assert result["bleu4"] == pytest.approx(100)


def test_one_caption_for_all_pictures() -> None:
    result = retrieved_text_quality(encoded(torch.eye(5)[[2, 2, 2]]))
    assert result["precision_at_1"] == pytest.approx(100 / 3)
    assert result["distinct_captions"] == pytest.approx(100 / 3)
    assert result["retrieved"] == {
        "distinct_1": pytest.approx(100 * 8 / 24),
        "distinct_2": pytest.approx(100 * 7 / 21),
        "vocabulary_size": 8,
    }
    # captions 0, 2 and 3: 24 words, with "a" three times, "the" and "in" twice; 21 different pairs
    assert result["references"] == {
        "distinct_1": pytest.approx(100 * 20 / 24),
        "distinct_2": 100,
        "vocabulary_size": 20,
    }
    assert 0 < result["bleu4"] < 50


def bleu4(found: list[str], references: list[list[str]]) -> float:
    """Compute BLEU as in Papineni et al. 2002 on separated words and marks: clipped precisions, nearest reference
    length."""
    matches, totals, found_length, reference_length = np.zeros(4), np.zeros(4), 0, 0
    for text, own in zip(found, references, strict=True):
        words, others = text.split(), [reference.split() for reference in own]
        found_length += len(words)
        reference_length += min((abs(len(other) - len(words)), len(other)) for other in others)[1]
        for n in range(1, 5):
            grams = [Counter(tuple(side[i : i + n]) for i in range(len(side) - n + 1)) for side in [words, *others]]
            most: Counter = Counter()
            for gram in grams[1:]:
                most |= gram
            matches[n - 1] += sum((grams[0] & most).values())
            totals[n - 1] += sum(grams[0].values())
    return float(100 * min(1, np.exp(1 - reference_length / found_length)) * np.exp(np.log(matches / totals).mean()))


def test_bleu_is_the_formula_with_varying_numbers_of_references() -> None:
    captions = [
        "a red dog runs over the green lawn",
        "the dog runs on a lawn of green",
        "a red dog runs over the blue street at night",
        "two old men play chess in a park",
        "two old men play chess in the park , a board between them",
    ]
    result = retrieved_text_quality(encoded(torch.eye(5)[[2, 0, 4]], captions))
    expected = bleu4([captions[2], captions[0], captions[4]], [captions[:2], [captions[2]], captions[3:]])
    assert 20 < expected < 95
    assert result["bleu4"] == pytest.approx(expected)


@pytest.mark.parametrize("block_elements", [1, 1 << 24])
def test_of_equal_captions_the_earlier_is_found_as_in_recall(
    block_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieved_text, "_BLOCK_ELEMENTS", block_elements)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(-1, 2, (40, 3), generator=generator).float()
    texts = torch.randint(-1, 2, (40, 3), generator=generator).float()  # integers, for many exact ties
    found = nearest_captions(images, texts)
    assert found.tolist() == [int(np.argmax(row)) for row in (images @ texts.T).numpy()]
    r1 = recall_metrics(images, texts, torch.arange(40))["i2t"]["r1"]
    assert r1 == pytest.approx(float((found == torch.arange(40)).double().mean() * 100))
