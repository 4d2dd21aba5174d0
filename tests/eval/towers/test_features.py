from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from eval.towers.features import Encoding, encode_captions, encode_images, evaluation_mode
from longclip_teacher.errors import InputError


def pictures(folder: Path, count: int) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        Image.new("RGB", (8, 8), (number, 255 - number, 40)).save(path)
    return paths


def test_every_module_returns_to_its_own_mode(colour_model: nn.Module) -> None:
    colour_model.train()
    colour_model.words.eval()  # a frozen part inside a model in training
    with evaluation_mode(colour_model, "fp32"):
        assert not any(module.training for module in colour_model.modules())
        assert not torch.is_grad_enabled()
    assert colour_model.training and colour_model.dropout.training and not colour_model.words.training
    assert torch.is_grad_enabled()


def test_evaluation_does_not_change_the_random_state(colour_model: nn.Module, tmp_path: Path) -> None:
    colour_model.train()
    before = torch.get_rng_state()
    encode_images(colour_model, pictures(tmp_path / "p", 3), Encoding(num_workers=1))
    encode_captions(colour_model, ["a red board"])
    assert torch.equal(torch.get_rng_state(), before)


def test_captions_keep_their_order_and_equal_ones_are_encoded_once(colour_model: nn.Module) -> None:
    captions = ["red", "a white and a white and a green board", "blue board", "red", "red red blue"]
    encoded: list[int] = []
    encode_text = colour_model.encode_text

    def counted(tokens: torch.Tensor) -> torch.Tensor:
        encoded.append(len(tokens))
        return encode_text(tokens)

    colour_model.encode_text = counted
    features, num_truncated = encode_captions(colour_model, captions, Encoding(batch_size=3))
    assert sum(encoded) == 4 and num_truncated == 0
    colour_model.eval()
    for caption, feature in zip(captions, features, strict=True):
        alone = encode_text(colour_model.tokenizer(caption)).detach()
        torch.testing.assert_close(feature, F.normalize(alone, dim=-1)[0])


def test_truncated_captions_are_counted(colour_model: nn.Module) -> None:
    fits = " ".join(["red"] * 14)  # 16 tokens with SOT and EOT: the model's context
    _, num_truncated = encode_captions(colour_model, [fits, fits + " red", fits + " red", "red"])
    assert num_truncated == 2


def test_workers_give_the_features_of_the_main_process(colour_model: nn.Module, tmp_path: Path) -> None:
    paths = pictures(tmp_path / "p", 7)
    alone = encode_images(colour_model, paths, Encoding(batch_size=3))
    workers = encode_images(colour_model, paths, Encoding(batch_size=3, num_workers=2))
    assert torch.equal(alone.features, workers.features) and torch.equal(alone.rows, torch.arange(7))


def test_few_unreadable_pictures_are_left_out_and_named(colour_model: nn.Module, tmp_path: Path) -> None:
    paths = pictures(tmp_path / "p", 100)
    paths[5].write_text("no picture")
    result = encode_images(colour_model, paths, Encoding(batch_size=32, num_workers=1))
    assert result.rows.tolist() == [row for row in range(100) if row != 5]
    assert [lost.name for lost in result.unreadable] == [str(paths[5])]


def test_more_than_one_percent_unreadable_is_refused(colour_model: nn.Module, tmp_path: Path) -> None:
    paths = pictures(tmp_path / "p", 100)
    paths[5].write_text("no picture")
    paths[70].unlink()
    with pytest.raises(InputError, match=r"2 by now of 100, where 1% is allowed; the first: .*5\.png: not a picture"):
        encode_images(colour_model, paths, Encoding(batch_size=32))


def test_features_that_are_not_finite_name_the_sample(colour_model: nn.Module, tmp_path: Path) -> None:
    (red,) = colour_model.tokenizer("red")[0, 1:2]
    colour_model.words.weight.data[red] = torch.nan
    with pytest.raises(InputError, match="1 of 2 samples, first in caption 'a red board'"):
        encode_captions(colour_model, ["a blue board", "a red board"])
    colour_model.encode_image = lambda images: images.mean(dim=(2, 3)) / (images.mean(dim=(1, 2, 3)) - 1)[:, None]
    paths = pictures(tmp_path / "p", 3)
    Image.new("RGB", (8, 8), "white").save(paths[1])
    with pytest.raises(InputError, match=r"first in picture .*1\.png"):
        encode_images(colour_model, paths)
