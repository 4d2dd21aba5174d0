"""What a model reads of long captions, from the command to the page, on models whose answers are known."""

from __future__ import annotations

import html
import json
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from torch import nn

from eval import long_captions as module
from eval.benchmarks.protocols import RetrievalSet, load_retrieval_set
from eval.measures.behaviour import measure_behaviour
from eval.measures.retrieval_set import encode_retrieval_set
from eval.towers.features import Encoding, encode_captions
from eval.towers.open_clip_model import OpenClipModel, OpenClipTokenizer
from longclip_teacher import create_teacher, save_teacher
from longclip_teacher.errors import run_command
from longclip_teacher.text import CaptionTokenizer
from mobileclip_student import create_student, save_student
from ranks import ends_of_ranks

ROOT = Path(__file__).parents[2]
ENCODING = Encoding(batch_size=3)


def behaviour_of(model: nn.Module, retrieval_set: RetrievalSet) -> dict[str, Any]:
    """The figures of a model on a set."""
    return measure_behaviour(model, encode_retrieval_set(model, retrieval_set, ENCODING), ENCODING)["figures"]


def edited(folder: Path, captions: list[str]) -> RetrievalSet:
    """The colour folder with these captions."""
    pairs = load_retrieval_set("folder", folder)
    return RetrievalSet("folder", pairs.images, captions, pairs.caption_image, "")


def mosaic(tmp_path: Path) -> RetrievalSet:
    """Pictures of one colour. The first sentence says nothing, the second names the colour, some have a third."""
    names = {"black": (0, 0, 0), "red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255,) * 3}
    images = []
    for name, colour in names.items():
        images.append(tmp_path / f"{name}.png")
        Image.new("RGB", (12, 12), colour).save(images[-1])
    captions = [f"A board. It is {name}." + " A photo." * (name in ("red", "blue")) for name in names]
    return RetrievalSet("folder", images, captions, list(range(5)), "")


def r1(found: dict[str, Any], way: str = "t2i") -> float:
    return found[way]["r1"]


def test_a_model_that_reads_colours(colour_model: nn.Module, tmp_path: Path) -> None:
    colour_model.train()
    figures = behaviour_of(colour_model, mosaic(tmp_path))
    assert colour_model.training
    assert figures["mean_sentences"] == pytest.approx(2.4) and figures["num_of_one_sentence"] == 0
    for name in ("first_removed", "shuffled"):  # order means nothing to a bag of words
        assert r1(figures["edits"][name], "i2t") == r1(figures["edits"][name]) == 100
        assert figures["edits"][name]["loss"]["t2i"] == {"value": 0, "low": 0, "high": 0}
    assert [r1(figures["edits"][f"first_{k}"]) for k in (1, 2, 3)] == [20, 100, 100]
    alone = figures["only_sentence"]
    assert list(alone) == ["only_1", "only_2", "only_3"]
    assert [(step["num_texts"], step["num_images"]) for step in alone.values()] == [(5, 5), (5, 5), (2, 2)]
    # "A photo." fits the first picture as well as any
    assert [r1(step) for step in alone.values()] == [r1(step, "i2t") for step in alone.values()] == [20, 100, 0]
    assert list(figures["cuts"]) == ["cut_8"] and figures["padding"] == []  # it reads 16 tokens
    assert figures["details"]["colour"] == {"num_texts": 5, "prefers_true": 100}


def test_removing_the_first_sentence_loses_its_content(colour_model: nn.Module, colour_folder: Path) -> None:
    pairs = load_retrieval_set("folder", colour_folder)  # "a red board second line"
    captions = [caption.replace(" second", ". Second") for caption in pairs.captions]
    figures = behaviour_of(colour_model, edited(colour_folder, captions))
    assert r1(figures["intact"]) == 100
    removed = figures["edits"]["first_removed"]
    assert r1(removed) == 12.5 and removed["loss"]["t2i"]["value"] == 87.5
    # so does text in front, of which a model of 16 tokens sees nothing else
    assert r1(figures["edits"]["filler_25"]) == 12.5 and figures["edits"]["filler_25"]["num_truncated"] == 8


def test_cuts_keep_what_a_tokenizer_of_that_length_keeps(colour_folder: Path) -> None:
    torch.manual_seed(0)
    model = create_student("tiny").eval()
    pairs = load_retrieval_set("folder", colour_folder)
    captions = [f"{'word ' * number * 12}end. {caption}" for number, caption in enumerate(pairs.captions)]
    found, num_cut = encode_captions(model, captions, ENCODING, num_tokens=20)
    with torch.no_grad():
        expected = model.encode_text(model.tokenizer(captions, 20), normalize=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert num_cut == 7
    figures = behaviour_of(model, edited(colour_folder, captions))
    assert list(figures["cuts"]) == ["cut_8", "cut_16", "cut_20", *(f"cut_{n}" for n in range(24, 77, 8)), "cut_77",
                                     *(f"cut_{n}" for n in range(80, 93, 8))]  # fmt: skip


def test_models_of_open_clip_get_their_whole_context(colour_folder: Path) -> None:
    """Cut or not, a caption has as many tokens as the model was built for, with its own padding."""
    torch.manual_seed(0)
    towers = {"layers": 1, "width": 32}
    clip = open_clip.CLIP(
        16,
        {**towers, "patch_size": 8, "image_size": 16, "head_width": 16},
        {**towers, "context_length": 77, "vocab_size": 49408, "heads": 2},
    )
    clip.visual.preprocess_cfg = {"size": 16}
    tokenizer = OpenClipTokenizer(open_clip.SimpleTokenizer(context_length=77), is_plain_clip=True)
    model = OpenClipModel(clip, tokenizer, 16).eval()
    captions = [caption + " word" * 40 for caption in load_retrieval_set("folder", colour_folder).captions]
    figures = behaviour_of(model, edited(colour_folder, captions))
    assert list(figures["cuts"])[-1] == "cut_40" and [step["num_tokens"] for step in figures["padding"]] == [77]
    cut = torch.nn.functional.pad(CaptionTokenizer()(captions, 20), (0, 57))
    with torch.no_grad():
        expected = clip.encode_text(cut, normalize=True)
    found, _ = encode_captions(model, captions, ENCODING, num_tokens=20)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_only_sentence_with_many_captions(colour_model: nn.Module, tmp_path: Path) -> None:
    """A picture is a query if all its captions have the sentence."""
    one = mosaic(tmp_path)
    captions = [*one.captions, "Boards. A red one.", "Blue boards."]
    retrieval_set = RetrievalSet("folder", one.images, captions, [*one.caption_image, 1, 3], "")
    step = behaviour_of(colour_model, retrieval_set)["only_sentence"]["only_2"]
    assert (step["num_texts"], step["num_images"]) == (6, 4)
    assert r1(step) == 100


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    save_student(create_student("tiny", context_length=40), folder / "student.safetensors")
    save_teacher(create_teacher("tiny", context_length=19), folder / "teacher.safetensors")  # nothing to pad
    return folder


def called(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    """The exit code of the command."""
    monkeypatch.setattr(
        sys, "argv", ["long_captions.py", *map(str, arguments), "--num-workers", "0", "--device", "cpu"]
    )
    try:
        run_command(module.main)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_command_writes_the_page_and_prints_what_it_leads_with(
    tmp_path: Path, weights: Path, colour_folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "new" / "out"
    original, encoded = module.encode_retrieval_set, list[str]()

    def counted(model: nn.Module, *rest: Any) -> Any:
        encoded.append(type(model).__name__)
        return original(model, *rest)

    monkeypatch.setattr(module, "encode_retrieval_set", counted)
    arguments = ("--checkpoint", weights / "student.safetensors", "--root", colour_folder,
                 "--against", f"other={weights / 'teacher.safetensors'}", "--out-dir", out)  # fmt: skip
    assert called(monkeypatch, *arguments, "--json", tmp_path / "a.json") == 0, capsys.readouterr().err
    assert encoded == ["MobileCLIP", "LongCLIP"]  # the pictures once per model
    results = json.loads((out / "results.json").read_text())
    assert results == json.loads((tmp_path / "a.json").read_text())
    assert list(results["models"]) == list(results["words"]) == ["student.safetensors", "other"]
    assert [results["models"][name][0]["context_length"] for name in results["models"]] == [40, 19]
    assert set(results["beside_first"]["filler_25"]["t2i"]) == {"student.safetensors", "other"}
    shown, page = capsys.readouterr().out, (out / "report.html").read_text()
    for words in (words for of_model in results["words"].values() for words in of_model):
        assert words in shown and page.index(html.escape(words)) < page.index("<table>")
    assert page.count("<svg") >= 8 and page.count("<figcaption>R@1") >= 6
    assert "captions cut" in page and "edited captions, beside student.safetensors" in page


def test_files_are_written_before_anything_is_printed(
    tmp_path: Path, weights: Path, colour_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(module, "print_behaviour", refuse)
    with pytest.raises(BrokenPipeError):
        monkeypatch.setattr(
            sys, "argv", ["x", "--checkpoint", str(weights / "teacher.safetensors"), "--root", str(colour_folder),
                          "--out-dir", str(tmp_path / "out"), "--num-workers", "0"],
        )  # fmt: skip
        module.main()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "report.html"}


def test_bad_input_ends_in_one_line(
    tmp_path: Path, weights: Path, colour_folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    student = weights / "student.safetensors"
    cases = [
        (["--checkpoint", student, "--root", colour_folder, "--out-dir", student], "is a file"),
        (["--root", colour_folder], "pass --checkpoint"),
        (["--checkpoint", student], "pass --root"),
        (["--checkpoint", student, "--root", colour_folder, "--against", student], "two models are called"),
        (["--checkpoint", student, "--root", colour_folder, "--against", "a=gone.pt"], "gone.pt"),
    ]
    for arguments, message in cases:
        assert called(monkeypatch, *arguments) == 2, arguments
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("error: ") and message in line


def test_two_processes_find_what_one_finds(
    tmp_path: Path, weights: Path, colour_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--checkpoint", weights / "student.safetensors", "--root", colour_folder, "--batch-size", "2"]
    assert called(monkeypatch, *arguments, "--json", tmp_path / "one.json") == 0
    command = [str(ROOT / "eval/long_captions.py"), *map(str, arguments), "--num-workers", "0", "--device", "cpu"]
    ends = ends_of_ranks([*command, "--json", str(tmp_path / "two.json")], 2, cwd=ROOT, timeout=200)
    assert [end.returncode for end in ends] == [0, 0], ends[0].stderr + ends[1].stderr
    assert ends[1].stdout == "" and "student.safetensors" in ends[0].stdout
    assert json.loads((tmp_path / "two.json").read_text()) == json.loads((tmp_path / "one.json").read_text())
