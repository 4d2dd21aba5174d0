from __future__ import annotations

import importlib.util
import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from open_clip import IMAGENET_CLASSNAMES
from PIL import Image
from timm.data import ImageNetInfo
from torch import nn

from eval.benchmarks.class_prompts import CIFAR_TEMPLATES, OPENAI_TEMPLATES, SIMPLE_TEMPLATES
from eval.benchmarks.labelled_images import find_labelled_images
from eval.measures.zeroshot import (
    _best_classes,
    classify,
    evaluate_zeroshot,
    zeroshot_classifier,
    zeroshot_figures,
)
from eval.towers.features import Encoding
from longclip_teacher.errors import InputError

NAMES = ["black", "red", "green", "blue", "yellow", "purple", "aqua", "white"]


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_templates_are_open_clips() -> None:
    assert len(OPENAI_TEMPLATES) == 80 and len(SIMPLE_TEMPLATES) == 7
    assert OPENAI_TEMPLATES[0] == "a bad photo of a {}." and SIMPLE_TEMPLATES[0] == "itap of a {}."


def test_cifar_templates_are_clips_eighteen() -> None:
    assert len(set(CIFAR_TEMPLATES)) == 18
    benchmark = importlib.util.find_spec("clip_benchmark")
    if benchmark is None or benchmark.origin is None:
        pytest.skip("clip-benchmark is not installed")
    lists = Path(benchmark.origin).parent / "datasets" / "en_zeroshot_classification_templates.json"
    theirs = json.loads(lists.read_text())
    for name in ("cifar10", "cifar100"):
        assert [template.replace("{c}", "{}") for template in theirs[name]] == list(CIFAR_TEMPLATES)


def test_a_class_is_the_normalised_mean_of_its_normalised_templates(colour_model: nn.Module) -> None:
    names = [f"{first} {second}" for first in NAMES for second in NAMES[1:]] + NAMES  # more than one block of classes
    templates = ["{}", "a red {} board", "blue {} with {}"]
    classifier = zeroshot_classifier(colour_model, names, templates, encoding=Encoding(batch_size=5))
    colour_model.eval()
    for name, got in zip(names, classifier, strict=True):
        total = torch.zeros(3)
        for template in templates:
            feature = colour_model.encode_text(colour_model.tokenizer(template.format(name, name))).detach()[0]
            total += feature / feature.norm().clamp(min=1e-12)
        expected = total / len(templates)
        torch.testing.assert_close(got, expected / expected.norm().clamp(min=1e-12))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_colours_are_classified_by_folder_names(
    num_workers: int, colour_model: nn.Module, colour_classes: Path
) -> None:
    colour_model.train()
    result = evaluate_zeroshot(
        colour_model, colour_classes, templates=["a {}."], encoding=Encoding(batch_size=5, num_workers=num_workers)
    )
    assert colour_model.training
    assert (result["num_images"], result["num_classes"], result["top1"], result["top5"]) == (24, 8, 100.0, 100.0)
    assert result["dataset"] == str(colour_classes) and result["num_unreadable"] == 0


def test_wrong_and_nearly_right_answers_are_counted(colour_model: nn.Module, colour_classes: Path) -> None:
    """By hand: cosines of colour-cube corners depend only on the number of channels that differ."""
    order = sorted(NAMES)  # the folders': aqua black blue green purple red white yellow
    names = [*order]
    names[order.index("red")], names[order.index("black")] = "black", "red"  # one channel apart: cosine 1/3
    names[order.index("aqua")], names[order.index("blue")] = "blue", "aqua"
    result = evaluate_zeroshot(colour_model, colour_classes, names, ["{}"])
    assert result["top1"] == 50.0  # four of the eight classes have the name of another
    assert result["top5"] == 100.0  # the right name is one of the three one channel away
    opposite = {"black": "white", "white": "black"}
    result = evaluate_zeroshot(colour_model, colour_classes, [opposite.get(name, name) for name in order], ["{}"])
    assert result["top1"] == 75.0 and result["top5"] == 75.0  # the opposite corner comes last


def test_top_five_ends_at_the_fifth() -> None:
    classifier = torch.tensor([[7.0], [6.0], [5.0], [4.0], [3.0], [2.0]])  # best to worst for a positive feature
    assert _best_classes(torch.ones(1, 1), classifier).tolist() == [[0, 1, 2, 3, 4]]
    assert _best_classes(-torch.ones(1, 1), classifier[:2]).tolist() == [[1, 0]]


def test_figures_of_unequal_classes_by_hand(colour_model: nn.Module, tmp_path: Path) -> None:
    """Write six red pictures, all found, and two green ones in blue's folder: 75% of pictures, 50% of classes."""
    for folder, colour, number in (("blue", "lime", 2), ("green", "lime", 0), ("red", "red", 6)):
        (tmp_path / folder).mkdir()
        for index in range(number):
            (tmp_path / folder / f"{index}.png").write_bytes(png(colour))
    (tmp_path / "green" / "0.png").write_bytes(png("lime"))
    result = evaluate_zeroshot(colour_model, tmp_path, templates=["{}"])
    assert result["top1"] == pytest.approx(700 / 9) and result["top5"] == 100.0
    assert result["mean_per_class"] == pytest.approx(200 / 3)
    assert result["per_class"] == [
        {"class": "blue", "num_images": 2, "accuracy": 0.0},
        {"class": "green", "num_images": 1, "accuracy": 100.0},
        {"class": "red", "num_images": 6, "accuracy": 100.0},
    ]
    assert result["confusion"] == [["blue", "green", 2]] and result["source"] == str(tmp_path)


def test_files_and_shards_give_the_same_figures(colour_model: nn.Module, colour_classes: Path, tmp_path: Path) -> None:
    members = []
    for number, folder in enumerate(sorted(colour_classes.iterdir())):
        for picture in sorted(folder.iterdir()):
            name = f"{folder.name}_{picture.stem}"
            members += [(f"{name}.png", picture.read_bytes()), (f"{name}.cls", str(number).encode())]
    write_tar(tmp_path / "0.tar", members)
    names = ["red", "black", *(path.name.replace("_", " ") for path in sorted(colour_classes.iterdir())[2:])]
    both = [evaluate_zeroshot(colour_model, source, names, ["{}"]) for source in (colour_classes, tmp_path / "*.tar")]
    for result in both:
        del result["dataset"], result["source"]
    assert both[0] == both[1] and both[0]["top1"] < 100


def test_cifar_as_a_whole(colour_model: nn.Module, tmp_path: Path) -> None:
    """Write two records of the binary version, of red and of blue pixels, in classes of these names."""
    (tmp_path / "batches.meta.txt").write_text("red\nblue\ngreen\nblack\nwhite\naqua\npurple\nyellow\ncat\ndog\n\n")
    red, blue = bytes([0]) + b"\xff" * 1024 + bytes(2048), bytes([1]) + bytes(2048) + b"\xff" * 1024
    (tmp_path / "test_batch.bin").write_bytes(red + blue + blue)
    answers = classify(colour_model, find_labelled_images(tmp_path, dataset="cifar10"))
    result = zeroshot_figures(answers)
    assert (result["dataset"], result["num_images"], result["num_templates"]) == ("cifar10", 3, 18)
    assert result["top1"] == 100.0 and result["count_mismatch"].startswith("CIFAR-10's test split has 10000 pictures")


def test_synset_folders_have_imagenets_class_numbers(tmp_path: Path) -> None:
    synsets = ImageNetInfo().label_names()
    assert synsets == sorted(synsets) and len(synsets) == 1000
    for synset in ("n02123045", "n01440764"):
        (tmp_path / synset).mkdir()
        (tmp_path / synset / "ILSVRC2012_val_1.JPEG").write_bytes(png("red"))
    labelled = find_labelled_images(tmp_path)
    assert [IMAGENET_CLASSNAMES[number] for _, number in labelled.files] == ["tench", "tabby cat"]
    assert len(labelled.classnames) == 1000 and labelled.name.startswith("imagenet (2 of 1000")
    named = find_labelled_images(tmp_path, ["fish", "cat"])
    assert [number for _, number in named.files] == [0, 1] and named.classnames == ["fish", "cat"]


def test_shards_are_classified_as_folders_are(colour_model: nn.Module, tmp_path: Path) -> None:
    for shard in range(2):
        members = []
        for number, name in list(enumerate(NAMES))[shard::2]:
            sample = [("png", png(name)), ("cls", f"{number}\n".encode()), ("json", b"{}")]
            members += [(f"folder.x/{name}.{suffix}", content) for suffix, content in sample]
        write_tar(tmp_path / f"{shard}.tar", members)
    for source in (tmp_path, str(tmp_path / "*.tar")):
        result = evaluate_zeroshot(colour_model, source, NAMES, ["{}"], encoding=Encoding(batch_size=3, num_workers=2))
        assert (result["num_images"], result["top1"]) == (8, 100.0)
    swapped = ["red", "black", *NAMES[2:]]
    assert evaluate_zeroshot(colour_model, tmp_path, swapped, ["{}"])["top1"] == 75.0
    assert len(find_labelled_images(tmp_path).classnames) == 1000


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", png("red"))], "0.tar:a: no .cls member"),
        ([("a.png", png("red")), ("a.cls", b"8")], "class '8' is not a number below 8"),
        ([("a.png", png("red")), ("a.cls", b"cat")], "class 'cat' is not a number below 8"),
        ([("a.png", b"text"), ("a.cls", b"1")], "not a picture"),
        ([("a.cls", b"1")], "0 pictures in one sample"),
        ([("a.pyd", b"cposix\nsystem\n."), ("a.cls", b"1")], "0 pictures in one sample"),
        ([], "no pictures with classes"),
    ],
)
def test_broken_samples_are_named(members: list, message: str, colour_model: nn.Module, tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", members)
    with pytest.raises(InputError, match=message) as caught:
        evaluate_zeroshot(colour_model, tmp_path, NAMES, ["{}"], encoding=Encoding(num_workers=1))
    assert "\n" not in str(caught.value)


def test_a_broken_shard_is_named(colour_model: nn.Module, tmp_path: Path) -> None:
    write_tar(
        tmp_path / "0.tar",
        [("a.png", png("red")), ("a.cls", b"1"), ("b.png", png("red") + bytes(5000)), ("b.cls", b"1")],
    )
    content = (tmp_path / "0.tar").read_bytes()
    for broken in (content[:2500], content[:2048], content[:4000], b"no tar file at all " * 100, b""):
        (tmp_path / "0.tar").write_bytes(broken)
        with pytest.raises(InputError, match=r"0\.tar is not a complete tar file"):
            evaluate_zeroshot(colour_model, tmp_path, NAMES, ["{}"], encoding=Encoding(num_workers=1))


def test_few_unreadable_pictures_are_left_out(colour_model: nn.Module, tmp_path: Path) -> None:
    for name in ("red", "blue"):
        (tmp_path / name).mkdir()
        for number in range(60):
            (tmp_path / name / f"{number}.png").write_bytes(png(name))
    (tmp_path / "red" / "7.png").write_bytes(png("red")[:30])
    result = evaluate_zeroshot(colour_model, tmp_path, templates=["{}"])
    assert (result["num_images"], result["num_unreadable"], result["top1"]) == (119, 1, 100.0)
    (tmp_path / "blue" / "9.png").write_text("text")
    with pytest.raises(InputError, match="2 by now of 120"):
        evaluate_zeroshot(colour_model, tmp_path, templates=["{}"])


def test_folders_that_do_not_fit_say_why(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no class folders and no \.tar shards"):
        find_labelled_images(tmp_path / "absent")
    with pytest.raises(InputError, match=r"no class folders and no \.tar shards"):
        find_labelled_images(tmp_path)
    (tmp_path / "1.JPEG").write_bytes(png("red"))
    with pytest.raises(InputError, match="pictures but no class folders"):
        find_labelled_images(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(InputError, match=r"class folder .*cat holds no picture"):
        find_labelled_images(tmp_path)
    with pytest.raises(InputError, match="2 class names for the 1 class folders"):
        find_labelled_images(tmp_path, ["cat", "dog"])


def test_templates_need_a_place_for_the_name(colour_model: nn.Module) -> None:
    for templates in ([], ["a photo"]):
        with pytest.raises(InputError, match=r"give one or more templates, each with \{\} in place"):
            zeroshot_classifier(colour_model, NAMES, templates)


def test_one_class_alone_is_refused(colour_model: nn.Module, colour_classes: Path) -> None:
    """A folder above the class folders looks like one class, and every answer is then right."""
    with pytest.raises(InputError, match="there is only one class, 'classes'"):
        evaluate_zeroshot(colour_model, colour_classes.parent, templates=["{}"])
