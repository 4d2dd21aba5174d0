from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import eval.recall
from eval.features import Encoding
from eval.protocols import load_retrieval_set
from eval.recall import recall_metrics
from eval.retrieval import evaluate_retrieval
from longclip_teacher.errors import InputError


def brute_force(queries: np.ndarray, candidates: np.ndarray, matches: list[set[int]]) -> dict[str, float]:
    """The definition, one query and one candidate at a time."""
    ranks = []
    for query, own in zip(queries, matches, strict=True):
        scores = [float(sum(a * b for a, b in zip(query, candidate, strict=True))) for candidate in candidates]
        order = sorted(range(len(scores)), key=lambda index: -scores[index])  # stable: of equals the earlier first
        ranks.append(1 + min(order.index(match) for match in own))
    recall = {f"r{k}": 100 * sum(rank <= k for rank in ranks) / len(ranks) for k in (1, 5, 10)}
    return {**recall, "mean_rank": float(np.mean(ranks)), "median_rank": float(np.median(ranks))}


@pytest.mark.parametrize("block_elements", [1, 70, 1 << 24])
def test_recall_is_the_definition_with_ties_and_many_captions(
    block_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eval.recall, "_BLOCK_ELEMENTS", block_elements)
    rng = np.random.default_rng(0)
    images, texts = rng.integers(-2, 3, (24, 4)), rng.integers(-2, 3, (70, 4))  # whole numbers: many exact ties
    owner = np.concatenate([np.arange(24), rng.integers(0, 24, 46)])
    rng.shuffle(owner)
    result = recall_metrics(torch.tensor(images), torch.tensor(texts), torch.tensor(owner))
    of_image = [set(np.flatnonzero(owner == image).tolist()) for image in range(24)]
    expected = {
        "i2t": brute_force(images, texts, of_image),
        "t2i": brute_force(texts, images, [{int(i)} for i in owner]),
    }
    for way in ("i2t", "t2i"):
        assert result[way].pop("tied") > 0
        assert result[way] == pytest.approx(expected[way])
        assert 0 < expected[way]["r5"] < expected[way]["r10"] < 100


def test_a_collapsed_model_shows_in_the_ties() -> None:
    result = recall_metrics(torch.ones(6, 2), torch.ones(12, 2), torch.arange(12) // 2)
    for way in ("i2t", "t2i"):
        assert result[way]["r1"] == pytest.approx(100 / 6) and result[way]["tied"] == 100
    separate = recall_metrics(torch.eye(6), torch.eye(6).repeat_interleave(2, dim=0), torch.arange(12) // 2)
    assert separate["i2t"]["tied"] == separate["t2i"]["tied"] == 0  # two captions of one picture are no tie


def test_of_captions_that_look_the_same_one_is_found() -> None:
    """Families of four captions that a model cannot tell apart: 25% both ways, however well it tells families apart."""
    families = torch.eye(5).repeat_interleave(4, dim=0)  # [20,5]
    own = families + 0.1 * torch.nn.functional.pad(torch.eye(4).repeat(5, 1), (0, 1))
    result = recall_metrics(own, families, torch.arange(20))
    assert result["i2t"]["r1"] <= 25 and result["t2i"]["r1"] <= 25


def test_every_picture_needs_a_caption() -> None:
    with pytest.raises(InputError, match="every one of the 3 pictures needs a caption"):
        recall_metrics(torch.eye(3), torch.eye(3), torch.tensor([0, 1, 1]))
    with pytest.raises(InputError, match="every caption one of them"):
        recall_metrics(torch.eye(3), torch.eye(3), torch.tensor([0, 1, 3]))


def test_a_model_that_knows_colours_finds_every_board(colour_model: nn.Module, colour_folder: Path) -> None:
    colour_model.train()
    result = evaluate_retrieval(
        colour_model, load_retrieval_set("folder", colour_folder), Encoding(batch_size=3, num_workers=1)
    )
    assert colour_model.training
    assert (result["protocol"], result["num_images"], result["num_texts"]) == ("folder", 8, 8)
    assert (result["num_truncated"], result["num_unreadable"], result["count_mismatch"]) == (0, 0, None)
    for way in ("i2t", "t2i"):
        assert result[way] == {
            "r1": 100.0,
            "r5": 100.0,
            "r10": 100.0,
            "mean_rank": 1.0,
            "median_rank": 1.0,
            "tied": 0.0,
        }


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_finds_them_too(precision: str, colour_model: nn.Module, colour_folder: Path) -> None:
    result = evaluate_retrieval(
        colour_model, load_retrieval_set("folder", colour_folder), Encoding(precision=precision)
    )
    assert result["i2t"]["r1"] == result["t2i"]["r1"] == 100


def test_captions_of_an_unreadable_picture_leave_with_it(
    colour_model: nn.Module, colour_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eval.features.MAX_UNREADABLE_SHARE", 0.2)
    (colour_folder / "image" / "3.png").write_text("text in a picture's place")
    result = evaluate_retrieval(colour_model, load_retrieval_set("folder", colour_folder))
    assert (result["num_images"], result["num_texts"], result["num_unreadable"]) == (7, 7, 1)
    assert result["unreadable"] == [str(colour_folder / "image" / "3.png")]
    assert result["i2t"]["r1"] == result["t2i"]["r1"] == 100
