"""Two towers of different models as one: each gives its own model's features, and eval treats the pair as a model."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from eval.base.images import open_image
from eval.benchmarks.protocols import load_retrieval_set
from eval.measures.costs import measure_cost, measure_full_cost
from eval.measures.recall import recall_metrics
from eval.measures.retrieval_set import encode_retrieval_set, evaluate_retrieval
from eval.towers.feature_cache import FeatureCache
from eval.towers.features import Encoding, encode_captions
from eval.towers.tower_pair import TowerPair
from longclip_teacher import LongCLIP, create_teacher
from longclip_teacher.errors import InputError
from mobileclip_student import MobileCLIP, create_student
from mobileclip_student.model import variant_config

CAPTIONS = ["a red board", "a blue board with a long story " + "that goes on " * 20]


@pytest.fixture(scope="module")
def teacher() -> LongCLIP:
    torch.manual_seed(0)
    return create_teacher("tiny").eval()


@pytest.fixture(scope="module")
def student(teacher: LongCLIP) -> MobileCLIP:
    """A student with the teacher's width but another picture size, context and normalisation."""
    config = variant_config("tiny")
    image = replace(config.image, image_size=32)
    torch.manual_seed(1)
    return create_student(replace(config, embed_dim=teacher.embed_dim, image=image), context_length=40).eval()


def pair_of(student: MobileCLIP, teacher: LongCLIP, stage: str) -> TowerPair:
    image, text = (student, teacher) if stage == "image" else (teacher, student)
    return TowerPair(image, text, teacher.logit_scale)


@pytest.mark.parametrize("stage", ["image", "text"])
def test_each_tower_gives_its_models_features(student: MobileCLIP, teacher: LongCLIP, stage: str) -> None:
    pair = pair_of(student, teacher, stage)
    image, text = (student, teacher) if stage == "image" else (teacher, student)
    picture = Image.new("RGB", (70, 50), (200, 30, 90))
    seen = pair.preprocess(picture)[None]
    assert seen.shape == (1, 3, pair.image_size, pair.image_size) and torch.equal(seen[0], image.preprocess(picture))
    tokens = pair.tokenizer(CAPTIONS, pair.context_length)
    assert torch.equal(tokens, text.tokenizer(CAPTIONS, text.context_length))
    with torch.no_grad():
        for unit in (False, True):
            assert torch.equal(pair.encode_image(seen, normalize=unit), image.encode_image(seen, normalize=unit))
            assert torch.equal(pair.encode_text(tokens, normalize=unit), text.encode_text(tokens, normalize=unit))
    assert (pair.image_size, pair.context_length) == ((32, 248) if stage == "image" else (48, 40))
    assert pair.preprocess_cfg == image.preprocess_cfg and pair.embed_dim == teacher.embed_dim == 128
    assert pair.logit_scale is teacher.logit_scale and pair.config == (image.config, text.config)


def num_values(*tensors: Tensor) -> int:
    return sum(tensor.numel() for tensor in tensors)


def test_the_pair_holds_only_the_two_towers(student: MobileCLIP, teacher: LongCLIP) -> None:
    pair = pair_of(student, teacher, "image")
    towers = [*student.image_encoder.parameters(), *teacher.text.parameters()]
    assert {id(p) for p in pair.parameters()} == {id(p) for p in (*towers, teacher.logit_scale)}
    full = measure_full_cost(pair, repeats=1)
    assert measure_cost(pair, repeats=1)["params"] == full["params"] == num_values(*towers) + 1
    assert full["params_image"] == num_values(*student.image_encoder.parameters())
    assert full["params_text"] == num_values(*teacher.text.parameters())


@pytest.mark.parametrize("stage", ["image", "text"])
def test_it_is_evaluated_as_one_model(student: MobileCLIP, teacher: LongCLIP, stage: str, colour_folder: Path) -> None:
    pair = pair_of(student, teacher, stage)
    image, text = (student, teacher) if stage == "image" else (teacher, student)
    found = load_retrieval_set("folder", colour_folder)
    pictures = torch.stack([image.preprocess(open_image(path)) for path in found.images])
    with torch.no_grad():
        images = normalize(image.encode_image(pictures), dim=1)
        texts = normalize(text.encode_text(text.tokenizer(found.captions)), dim=1)
    pair.train()  # as between two training steps
    try:
        encoded = encode_retrieval_set(pair, found)
        assert torch.allclose(encoded.image_features, images, atol=1e-5)
        assert torch.allclose(encoded.text_features, texts, atol=1e-5)
        expected = recall_metrics(images, texts, torch.arange(len(texts)))
        figures = evaluate_retrieval(pair, found)
        assert {name: figures[name] for name in expected} == expected
        assert pair.visual.training and pair.text.training
    finally:
        pair.eval()


def test_kept_features_follow_the_weights_of_both_towers(
    student: MobileCLIP, teacher: LongCLIP, tmp_path: Path
) -> None:
    pair, cache = pair_of(student, teacher, "image"), FeatureCache(tmp_path)
    before = cache.caption_key(pair, CAPTIONS, "fp32")
    assert before == cache.caption_key(pair_of(student, teacher, "image"), CAPTIONS, "fp32")
    assert before != cache.caption_key(pair_of(student, teacher, "text"), CAPTIONS, "fp32")
    encoding = Encoding(cache=cache)
    assert torch.equal(encode_captions(pair, CAPTIONS, encoding)[0], encode_captions(pair, CAPTIONS, encoding)[0])
    for name in ("visual", "text"):
        other = deepcopy(pair)
        with torch.no_grad():
            next(getattr(other, name).parameters()).add_(1)
        assert cache.caption_key(other, CAPTIONS, "fp32") != before


def test_towers_without_a_common_space_are_refused(teacher: LongCLIP) -> None:
    with pytest.raises(InputError, match=r"\Athe image tower gives 96 features and the text tower 128[^\n]*\Z"):
        TowerPair(create_student("tiny"), teacher, teacher.logit_scale)
