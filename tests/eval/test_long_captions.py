from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from eval import long_captions as module
from eval.benchmarks.protocols import RetrievalSet, load_retrieval_set
from eval.long_captions import EXACT_COSINE, long_caption_behaviour, padding_cosines
from eval.towers.features import Encoding
from eval.towers.open_clip_model import OpenClipModel, OpenClipTokenizer
from longclip_teacher import create_teacher, save_teacher
from longclip_teacher.errors import InputError, run_command
from longclip_teacher.text import CaptionTokenizer
from mobileclip_student import MobileCLIP, create_student, save_student
from mobileclip_student.repmixer import TokenBatchNorm

SHORT = ["a red board.", "two men at a table play chess in the park.", "a cat!", "Trees and a river below a grey sky."]
ENCODING = Encoding(batch_size=3)


def student(pad_mask: bool = True, context_length: int | None = None) -> MobileCLIP:
    """A student with drawn layer scales and BatchNorm entries: as initialised, RepMixer blocks do almost nothing."""
    torch.manual_seed(0)
    model = create_student("tiny", pad_mask=pad_mask, context_length=context_length).eval()
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, TokenBatchNorm):
                for tensor in (part.weight, part.bias, part.running_mean, part.running_var):
                    tensor.uniform_(0.5, 1.5)
        for name, parameter in model.named_parameters():
            if "layer_scale" in name:
                parameter.uniform_(0.5, 1.5)
    return model


class PadsRead(nn.Module):
    """A student that attends its padding, for captions of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = student(pad_mask=False)
        self.tokenizer, self.context_length = self.inner.tokenizer, self.inner.context_length

    def encode_text(self, tokens: Tensor) -> Tensor:
        self.inner.text_encoder.context_length = tokens.shape[1]
        return self.inner.encode_text(tokens)


def test_masked_pads_change_nothing() -> None:
    steps = padding_cosines(student(), SHORT, ENCODING)
    assert [step["num_tokens"] for step in steps] == [77, 128, 248]
    for step in steps:
        assert EXACT_COSINE <= step["min_cosine"] <= step["mean_cosine"] < 1 + 1e-9
    torch.manual_seed(0)
    for step in padding_cosines(create_teacher("tiny").eval(), SHORT, ENCODING):
        assert step["min_cosine"] >= EXACT_COSINE


def test_pads_that_are_read_fail() -> None:
    for step in padding_cosines(PadsRead(), SHORT, ENCODING):
        assert step["min_cosine"] < 0.999 and step["min_cosine"] <= step["mean_cosine"]


def test_a_mask_that_forgets_one_block_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches keep the padded length, although the model trims columns that all captions leave empty."""
    model = student()
    monkeypatch.setattr("mobileclip_student.repmixer._zero_pads", lambda x, valid: x)
    steps = padding_cosines(model, SHORT, ENCODING)
    assert min(step["min_cosine"] for step in steps) < EXACT_COSINE


def test_published_students_always_pad_and_so_never_differ() -> None:
    for step in padding_cosines(student(pad_mask=False, context_length=77), SHORT, ENCODING):
        assert step["num_tokens"] == 77 and step["min_cosine"] >= EXACT_COSINE


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
    pairs = load_retrieval_set("folder", colour_folder)
    captions = [caption + " word" * 40 for caption in pairs.captions]
    result = long_caption_behaviour(
        model, RetrievalSet("folder", pairs.images, captions, pairs.caption_image, ""), ENCODING
    )
    assert [step["num_tokens"] for step in result["cut"]] == [20, 77]
    assert [step["num_tokens"] for step in result["padding"]] == [77]
    assert result["padding"][0]["min_cosine"] >= EXACT_COSINE
    cut = torch.nn.functional.pad(CaptionTokenizer()(captions, 20), (0, 57))
    with torch.no_grad():
        expected = clip.encode_text(cut, normalize=True)
    torch.testing.assert_close(module._encode_at(model, captions, 20, ENCODING), expected, rtol=0, atol=1e-5)


def test_padding_where_there_is_none() -> None:
    assert padding_cosines(student(context_length=32), SHORT) == []
    with pytest.raises(InputError, match="no caption of at most 77 tokens"):
        padding_cosines(student(), ["word " * 90])


def mosaic(tmp_path: Path) -> RetrievalSet:
    """Pictures of one colour. The first sentence says nothing, the second names the colour, some have a third."""
    names = {"black": (0, 0, 0), "red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255,) * 3}
    images = []
    for name, colour in names.items():
        images.append(tmp_path / f"{name}.png")
        Image.new("RGB", (12, 12), colour).save(images[-1])
    captions = [f"A board. It is {name}." + " A photo." * (name in ("red", "blue")) for name in names]
    return RetrievalSet("folder", images, captions, list(range(5)), "")


def test_a_model_that_reads_colours(colour_model: nn.Module, tmp_path: Path) -> None:
    colour_model.train()
    result = long_caption_behaviour(colour_model, mosaic(tmp_path), ENCODING)
    assert colour_model.training
    assert result["mean_sentences"] == pytest.approx(2.4) and result["num_of_one_sentence"] == 0
    for name in ("original", "first_dropped", "shuffled"):  # order means nothing to a bag of words
        assert result[name]["i2t"]["r1"] == result[name]["t2i"]["r1"] == 100
    assert result["relative_change"] == {name: {"i2t": 0, "t2i": 0} for name in ("first_dropped", "shuffled")}
    assert [step["k"] for step in result["first_sentences"]] == [1, 2, 3]
    assert [step["t2i"]["r1"] for step in result["first_sentences"]] == [20, 100, 100]
    alone = result["only_sentence"]
    assert [(step["num_texts"], step["num_images"]) for step in alone] == [(5, 5), (5, 5), (2, 2)]
    assert [step["t2i"]["r1"] for step in alone] == [20, 100, 0]  # "A photo." fits the first picture as well as any
    assert [step["i2t"]["r1"] for step in alone] == [20, 100, 0]
    assert result["cut"] == result["padding"] == []  # it reads 16 tokens


def test_dropping_the_first_sentence_loses_its_content(colour_model: nn.Module, colour_folder: Path) -> None:
    retrieval_set = load_retrieval_set("folder", colour_folder)  # "a red board second line"
    captions = [caption.replace(" second", ". Second") for caption in retrieval_set.captions]
    result = long_caption_behaviour(
        colour_model, RetrievalSet("folder", retrieval_set.images, captions, retrieval_set.caption_image, "")
    )
    assert result["original"]["t2i"]["r1"] == 100
    assert result["first_dropped"]["t2i"]["r1"] == 12.5
    assert result["relative_change"]["first_dropped"] == {"i2t": -87.5, "t2i": -87.5}


def test_cut_at_tokens(colour_folder: Path) -> None:
    """The cut keeps what a tokenizer of that length keeps; a cut beyond every caption gives the original figures."""
    model = student()
    pairs = load_retrieval_set("folder", colour_folder)
    captions = [f"{'word ' * number * 12}end. {caption}" for number, caption in enumerate(pairs.captions)]
    result = long_caption_behaviour(
        model, RetrievalSet("folder", pairs.images, captions, pairs.caption_image, ""), ENCODING
    )
    assert [(step["num_tokens"], step["num_cut"]) for step in result["cut"]] == [(20, 7), (77, 2), (128, 0), (248, 0)]
    for way in ("i2t", "t2i"):
        assert result["cut"][3][way] == result["original"][way]
    with torch.no_grad():
        expected = model.encode_text(model.tokenizer(captions, 20), normalize=True)
    found = module._encode_at(model, captions, 20, ENCODING)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_only_sentence_with_many_captions(colour_model: nn.Module, tmp_path: Path) -> None:
    """A picture is a query if all its captions have the sentence."""
    one = mosaic(tmp_path)
    captions = [*one.captions, "Boards. A red one.", "Blue boards."]
    retrieval_set = RetrievalSet("folder", one.images, captions, [*one.caption_image, 1, 3], "")
    step = long_caption_behaviour(colour_model, retrieval_set)["only_sentence"][1]
    assert (step["num_texts"], step["num_images"]) == (6, 4)
    assert step["t2i"]["r1"] == 100


def test_the_command_draws_and_writes(
    tmp_path: Path, colour_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_student(student(), tmp_path / "student.safetensors")
    torch.manual_seed(0)
    save_teacher(create_teacher("tiny", context_length=19), tmp_path / "teacher.safetensors")  # nothing to cut or pad

    def called(*more: Any) -> int:
        arguments = ["--root", colour_folder, "--num-workers", 0, *more]
        monkeypatch.setattr(sys, "argv", ["long_captions.py", *map(str, arguments)])
        try:
            run_command(module.main)
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    for name in ("student", "teacher"):
        out = tmp_path / name / "plots"
        file = tmp_path / f"{name}.safetensors"
        assert called("--checkpoint", file, "--json", tmp_path / f"{name}.json", "--out-dir", out) == 0
        with Image.open(out / "long_captions.png") as plot:
            assert plot.format == "PNG" and min(plot.size) > 500
            assert len(plot.convert("RGB").getcolors(1 << 24)) > 50  # something is drawn
        result = json.loads((tmp_path / f"{name}.json").read_text())
        assert result["num_images"] == 8
    shown = capsys.readouterr().out
    assert "first dropped" in shown and "padded to 248 tokens: cosine" in shown and "as without padding" in shown
    for arguments, message in (
        (["--checkpoint", tmp_path / "student.safetensors", "--out-dir", tmp_path / "student.json"], "is a file"),
        ([], "pass --checkpoint"),
    ):
        assert called(*arguments) == 2
        assert message in capsys.readouterr().err
