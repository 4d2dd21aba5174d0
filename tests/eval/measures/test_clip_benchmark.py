"""Our models inside the evaluators of others, unchanged: CLIP_benchmark and open_clip reproduce our figures.

clip-benchmark is installed without its requirements (see the Makefile): the functions called here need none of them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from eval.benchmarks.protocols import RetrievalSet
from eval.measures.retrieval_set import evaluate_retrieval
from eval.measures.zeroshot import evaluate_zeroshot, zeroshot_classifier
from eval.towers.models import ClipModel
from longclip_teacher import create_teacher
from mobileclip_student import create_student

NUM_CLASSES, PER_CLASS = 6, 7
CLASSNAMES = ["bus", "dog", "old house", "red car", "tree", "boat"]
TEMPLATES = ["a photo of a {}.", "a large {} in the rain", "{}"]


@pytest.fixture(params=["student", "teacher"])
def model(request: pytest.FixtureRequest) -> ClipModel:
    torch.manual_seed(3)
    return (create_student if request.param == "student" else create_teacher)("tiny").eval()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write noise in class folders of uneven size, so that the mean over classes is not the mean over pictures."""
    root, random = tmp_path_factory.mktemp("classes"), np.random.default_rng(0)
    for label in range(NUM_CLASSES):
        (root / f"class{label}").mkdir()
        for number in range(PER_CLASS + label):
            cells = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(cells).resize((60, 50)).save(root / f"class{label}" / f"{number}.png")
    return root


class Pictures(Dataset):
    """(picture, target) for CLIP_benchmark's loaders, with the attribute that they read."""

    classes = CLASSNAMES

    def __init__(self, model: ClipModel, paths: list[Path], targets: list) -> None:
        self.model, self.paths, self.targets = model, paths, targets

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple:
        return self.model.preprocess(Image.open(self.paths[index]).convert("RGB")), self.targets[index]


def test_clip_benchmark_finds_our_recall(model: ClipModel, root: Path) -> None:
    """Return one to three captions per picture, of 10 to 300 tokens: some are cut."""
    random = np.random.default_rng(1)
    words = ["red", "blue", "large", "small", "house", "tree", "dog", "bus", "street", "water", "sky", "man", "woman"]
    paths = sorted(root.glob("*/*.png"))
    captions = [
        [" ".join(random.choice(words, size=random.integers(8, 300))) for _ in range(1 + index % 3)]
        for index in range(len(paths))
    ]
    retrieval_set = RetrievalSet(
        name="test",
        images=paths,
        captions=[caption for group in captions for caption in group],
        caption_image=[index for index, group in enumerate(captions) for _ in group],
        description="random captions",
    )
    ours = evaluate_retrieval(model, retrieval_set)
    assert 0 < ours["num_truncated"] < ours["num_texts"]
    loader = DataLoader(
        Pictures(model, paths, captions),
        batch_size=16,
        collate_fn=lambda items: (torch.stack([image for image, _ in items]), [texts for _, texts in items]),
    )
    theirs = zeroshot_retrieval.evaluate(model, loader, model.tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
    for k in (1, 5, 10):
        assert ours["i2t"][f"r{k}"] / 100 == pytest.approx(theirs[f"text_retrieval_recall@{k}"], abs=1e-6)
        assert ours["t2i"][f"r{k}"] / 100 == pytest.approx(theirs[f"image_retrieval_recall@{k}"], abs=1e-6)
    assert 0 < ours["i2t"]["r10"] < 100 and 0 < ours["t2i"]["r10"] < 100


def test_clip_benchmark_finds_our_accuracy(model: ClipModel, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # It calls float() on arrays of one element, which NumPy 2.4 refuses; it accepts arrays without dimensions
    numpy = torch.Tensor.numpy
    monkeypatch.setattr(torch.Tensor, "numpy", lambda tensor: numpy(tensor).squeeze())
    ours = evaluate_zeroshot(model, root, CLASSNAMES, TEMPLATES)
    paths = sorted(root.glob("*/*.png"))
    targets = [int(path.parent.name.removeprefix("class")) for path in paths]
    theirs = zeroshot_classification.evaluate(
        model,
        DataLoader(Pictures(model, paths, targets), batch_size=16),
        model.tokenizer,
        CLASSNAMES,
        [template.replace("{}", "{c}") for template in TEMPLATES],
        "cpu",
        amp=False,
    )
    assert ours["top1"] / 100 == pytest.approx(theirs["acc1"], abs=1e-6)
    assert ours["top5"] / 100 == pytest.approx(theirs["acc5"], abs=1e-6)
    assert ours["mean_per_class"] / 100 == pytest.approx(theirs["mean_per_class_recall"], abs=1e-6)
    assert 0 < ours["top1"] < ours["top5"] <= 100 and ours["top1"] != ours["mean_per_class"]


def test_open_clip_builds_our_classifier(model: ClipModel) -> None:
    theirs = open_clip.build_zero_shot_classifier(model, model.tokenizer, CLASSNAMES, TEMPLATES)  # [D, C]
    ours = zeroshot_classifier(model, CLASSNAMES, TEMPLATES)  # [C, D]
    torch.testing.assert_close(ours, theirs.T, rtol=0, atol=1e-6)
    assert (ours @ ours.T).fill_diagonal_(0).max() < 0.99999  # classes must differ, or anything would agree
