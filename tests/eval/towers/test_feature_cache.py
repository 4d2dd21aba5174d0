from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from eval.towers.feature_cache import FeatureCache
from eval.towers.features import Encoding, encode_captions, encode_images

CAPTIONS = ["a red board", "a blue board and a red board", "a red board", " ".join(["green"] * 20)]


class CallCounter:
    """A model whose encode methods count how often they are called."""

    def __init__(self, model: nn.Module) -> None:
        self.images = self.texts = 0
        encode_image, encode_text = model.encode_image, model.encode_text

        def image(images: torch.Tensor) -> torch.Tensor:
            self.images += 1
            return encode_image(images)

        def text(tokens: torch.Tensor) -> torch.Tensor:
            self.texts += 1
            return encode_text(tokens)

        model.encode_image, model.encode_text = image, text


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(5):
        pixels = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8)
        found.append(tmp_path / f"{number}.png")
        Image.fromarray(pixels.numpy()).save(found[-1])
    return found


@pytest.fixture
def encoding(tmp_path: Path) -> Encoding:
    return Encoding(batch_size=2, cache=FeatureCache(tmp_path / "cache"))


def encode(model: nn.Module, paths: list[Path], captions: list[str], encoding: Encoding) -> tuple[int, int]:
    """Encode both and return how many calls of the towers it took."""
    counter = CallCounter(model)
    encode_images(model, paths, encoding)
    encode_captions(model, captions, encoding)
    del model.encode_image, model.encode_text  # the class's own again
    return counter.images, counter.texts


def test_the_second_time_the_same_features_come_without_the_model(
    colour_model: nn.Module, paths: list[Path], encoding: Encoding
) -> None:
    plain = Encoding(batch_size=2)
    images, (texts, num_truncated) = (
        encode_images(colour_model, paths, plain),
        encode_captions(colour_model, CAPTIONS, plain),
    )
    assert num_truncated == 1
    assert encode(colour_model, paths, CAPTIONS, encoding) == (3, 2)
    assert encode(colour_model, paths, CAPTIONS, encoding) == (0, 0)
    kept = encode_images(colour_model, paths, encoding)
    assert torch.equal(kept.features, images.features) and torch.equal(kept.rows, images.rows)
    kept_texts, kept_truncated = encode_captions(colour_model, CAPTIONS, encoding)
    assert torch.equal(kept_texts, texts) and kept_truncated == 1


def test_names_and_times_of_files_do_not_matter(
    colour_model: nn.Module, paths: list[Path], encoding: Encoding, tmp_path: Path
) -> None:
    encode(colour_model, paths, CAPTIONS, encoding)
    copies = [Path(shutil.copy(path, tmp_path / f"copy_{path.name}")) for path in paths]
    assert encode(colour_model, copies, CAPTIONS, encoding) == (0, 0)


def test_what_changes_the_features_misses(colour_model: nn.Module, paths: list[Path], encoding: Encoding) -> None:
    both, hit = (3, 2), (0, 0)
    assert encode(colour_model, paths, CAPTIONS, encoding) == both
    (red,) = colour_model.tokenizer("red")[0, 1:2]
    colour_model.words.weight.data[red, 0] += 1e-3  # one weight, behind autograd's back
    assert encode(colour_model, paths, CAPTIONS, encoding) == both
    colour_model.dropout.p = 0.5  # a setting
    assert encode(colour_model, paths, CAPTIONS, encoding) == both
    colour_model.context_length = 9
    assert encode(colour_model, paths, CAPTIONS, encoding) == both
    colour_model.preprocess.transforms.reverse()
    colour_model.preprocess.transforms.reverse()
    assert encode(colour_model, paths, CAPTIONS, encoding) == hit
    changed = Encoding(batch_size=2, cache=encoding.cache, precision="bf16")
    assert encode(colour_model, paths, CAPTIONS, changed) == both
    assert encode(colour_model, paths, [*CAPTIONS[:3], "a green board"], encoding) == (0, 2)
    assert encode(colour_model, paths[::-1], CAPTIONS, encoding) == (3, 0)
    Image.new("RGB", (8, 8), "red").save(paths[4])
    assert encode(colour_model, paths, CAPTIONS, encoding) == (3, 0)
    paths[4].unlink()
    assert encode(colour_model, paths[:4], CAPTIONS, encoding) == (2, 0)


def test_captions_do_not_run_together(colour_model: nn.Module, encoding: Encoding) -> None:
    assert encoding.cache is not None
    one = encoding.cache.caption_key(colour_model, ["a red", "board"], "fp32")
    assert one != encoding.cache.caption_key(colour_model, ["a redboard"], "fp32")
    assert one != encoding.cache.caption_key(colour_model, ["a re", "dboard"], "fp32")


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied"])
def test_a_damaged_file_is_computed_again(
    damage: str, colour_model: nn.Module, encoding: Encoding, capsys: pytest.CaptureFixture[str]
) -> None:
    features, _ = encode_captions(colour_model, CAPTIONS, encoding)
    assert encoding.cache is not None
    (file,) = encoding.cache.folder.iterdir()
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[-3] ^= 1
    file.write_bytes({"cut": content[:-4], "flipped": content, "emptied": b""}[damage])
    again, _ = encode_captions(colour_model, CAPTIONS, encoding)
    assert torch.equal(again, features)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"warning: {file} is damaged (")
    assert lines[0].endswith("): the features are computed again")
    encode_captions(colour_model, CAPTIONS, encoding)
    assert capsys.readouterr().err == ""


def test_a_cache_that_cannot_be_written_costs_a_warning(
    colour_model: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    encoding = Encoding(cache=FeatureCache(tmp_path / "file"))
    features, _ = encode_captions(colour_model, CAPTIONS, encoding)
    assert torch.equal(features, encode_captions(colour_model, CAPTIONS)[0])
    assert "features are not kept" in capsys.readouterr().err


def test_unreadable_pictures_are_named_from_the_cache_too(
    colour_model: nn.Module, paths: list[Path], encoding: Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eval.towers.features.MAX_UNREADABLE_SHARE", 0.5)
    paths[1].write_text("no picture")
    computed = encode_images(colour_model, paths, encoding)
    kept = encode_images(colour_model, paths, encoding)
    assert [lost.name for lost in computed.unreadable] == [str(paths[1])] and computed.rows.tolist() == [0, 2, 3, 4]
    assert kept.unreadable == computed.unreadable and torch.equal(kept.features, computed.features)


def test_a_cache_hit_is_one_line(colour_model: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoding = Encoding(cache=FeatureCache(tmp_path / "cache"), show_progress=True)
    encode_captions(colour_model, CAPTIONS, encoding)
    assert capsys.readouterr().err == ""
    encode_captions(colour_model, CAPTIONS, encoding)
    assert capsys.readouterr().err == "captions: features from the cache\n"
    assert not list((tmp_path / "cache").glob(".*")), "no half-written files left"
