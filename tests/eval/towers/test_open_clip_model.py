"""open_clip's models behind our interface: the same features, the same tokens, and nothing random or resampled."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from PIL import Image
from torch import nn

from eval.towers.features import encode_captions, encode_images
from eval.towers.models import load_model, weights_file
from eval.towers.open_clip_model import OpenClipModel, OpenClipTokenizer, load_open_clip
from longclip_teacher.errors import InputError
from longclip_teacher.text import CaptionTokenizer
from longclip_teacher.weights_file import write_weights

CAPTIONS = ["a red bus", "two dogs &amp; a cat on a sofa", "A large house. " * 30]
MODEL_CFG: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 40, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
PREPROCESS_CFG = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "interpolation": "bilinear"}


def write_folder(root: Path, changes: dict[str, Any] | None = None) -> Path:
    """A local-dir folder with a small random model, as open_clip itself builds it."""
    config = deepcopy(MODEL_CFG)
    for key, value in (changes or {}).items():
        config[key] = {**config[key], **value} if isinstance(value, dict) and key in config else value
    root.mkdir(parents=True, exist_ok=True)
    content = {"model_cfg": config, "preprocess_cfg": PREPROCESS_CFG}
    (root / "open_clip_config.json").write_text(json.dumps(content))
    torch.manual_seed(0)
    build = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
    model = build(**{key: value for key, value in config.items() if key != "custom_text"})
    with torch.no_grad():
        model.logit_scale.fill_(3.5)
    write_weights(root / "open_clip_model.safetensors", model.state_dict(), {})
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("open_clip") / "mine")


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "noise.png"
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("custom_text", [False, True])
def test_features_and_pictures_equal_those_of_open_clip(custom_text: bool, tmp_path: Path, picture: Path) -> None:
    root = write_folder(tmp_path, {"custom_text": custom_text})
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{root}")
    theirs.eval()
    ours = load_model(f"local-dir:{root}")
    assert isinstance(ours, OpenClipModel) and not ours.training
    assert (ours.embed_dim, ours.image_size, ours.context_length) == (32, 32, 40)
    assert ours.logit_scale.item() == 3.5
    image = transform(Image.open(picture).convert("RGB"))[None]
    assert torch.equal(ours.preprocess(Image.open(picture).convert("RGB"))[None], image)
    tokens = open_clip.get_tokenizer(f"local-dir:{root}")(CAPTIONS)
    assert torch.equal(ours.tokenizer(CAPTIONS), tokens)
    with torch.no_grad():
        for normalize in (False, True):
            assert torch.equal(
                ours.encode_image(image, normalize=normalize), theirs.encode_image(image, normalize=normalize)
            )
            assert torch.equal(
                ours.encode_text(tokens, normalize=normalize), theirs.encode_text(tokens, normalize=normalize)
            )
        features, num_truncated = encode_captions(ours, CAPTIONS)
        torch.testing.assert_close(features, theirs.encode_text(tokens, normalize=True))
        assert num_truncated == 1
        torch.testing.assert_close(encode_images(ours, [picture]).features, theirs.encode_image(image, normalize=True))


def test_a_folder_may_be_given_without_the_prefix(folder: Path) -> None:
    tokens = CaptionTokenizer(40)(CAPTIONS)
    with torch.no_grad():
        plain, named = (load_model(name).encode_text(tokens) for name in (folder, f"local-dir:{folder}"))
    assert torch.equal(plain, named)
    assert weights_file(folder) == weights_file(f"local-dir:{folder}") == folder / "open_clip_model.safetensors"


def test_an_architecture_and_a_weight_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small model under its own name, like open_clip's architectures."""
    (tmp_path / "Small-CLIP.json").write_text(json.dumps(MODEL_CFG))
    monkeypatch.setattr("open_clip.factory._MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    open_clip.add_model_config(tmp_path / "Small-CLIP.json")
    weights = folder / "open_clip_model.safetensors"
    state = open_clip.factory.load_state_dict(str(weights))
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "epoch_1.pt")
    tokens = CaptionTokenizer(40)(CAPTIONS)
    expected = load_open_clip(f"local-dir:{folder}").encode_text(tokens)
    for file in (weights, tmp_path / "epoch_1.pt"):
        name = f"open_clip:Small-CLIP/{file}"
        assert torch.equal(load_model(name).encode_text(tokens), expected)
        assert weights_file(name) == file
    torch.save({"x": nn.Linear(2, 2)}, tmp_path / "pickled.pt")
    with pytest.raises(InputError, match="holds pickled code"):
        load_model(f"open_clip:Small-CLIP/{tmp_path / 'pickled.pt'}")
    with pytest.raises(InputError, match="Small-CLIP has no published weights"):
        load_model("open_clip:Small-CLIP")
    del state["ln_final.weight"]
    write_weights(tmp_path / "lacking.safetensors", state, {})
    with pytest.raises(InputError, match=r"open_clip cannot load .* Missing key.*ln_final.weight"):
        load_model(f"open_clip:Small-CLIP/{tmp_path / 'lacking.safetensors'}")
    with pytest.raises(InputError, match=r"only|no weight file: .safetensors, .pt"):
        load_model(f"open_clip:Small-CLIP/{tmp_path / 'Small-CLIP.json'}")


def test_positions_are_never_resampled_silently(folder: Path, tmp_path: Path) -> None:
    for way, change in (("text", {"context_length": 60}), ("vision", {"image_size": 48})):
        root = tmp_path / way
        write_folder(root, {f"{way}_cfg": change})
        (root / "open_clip_model.safetensors").write_bytes((folder / "open_clip_model.safetensors").read_bytes())
        with pytest.raises(InputError, match=r"positional_embedding is \(\d+, 64\) in .*, not \(\d+, 64\)"):
            load_model(root)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_cfg": {"tokenizer_kwargs": {"trust_remote_code": True}}}, "sets trust_remote_code for the tokenizer"),
        ({"text_cfg": {"width": 1 << 24}}, "asks for width = 16777216"),
        ({"vision_cfg": {"layers": 10**6}}, "asks for layers = 1000000"),
        ({"vision_cfg": {"layers": 900}}, "holds far fewer weights"),
        ({"text_cfg": None}, "lacks embed_dim, vision_cfg or text_cfg"),
        ({"vision_cfg": {"no_such_option": 1}}, "cannot load .*no_such_option"),
    ],
)
def test_a_configuration_is_untrusted(changes: dict[str, Any], message: str, folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "open_clip_config.json").read_text())
    for key, value in changes.items():
        content["model_cfg"][key] = value and {**content["model_cfg"][key], **value}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    (tmp_path / "open_clip_model.safetensors").write_bytes((folder / "open_clip_model.safetensors").read_bytes())
    with pytest.raises(InputError, match=message) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_unloadable_models_are_one_line(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "open_clip_config.json").write_text((folder / "open_clip_config.json").read_text())
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "open_clip_config.json").write_text("{")
    (tmp_path / "broken" / "open_clip_model.safetensors").write_bytes(b"x")
    for name, message in (
        ("open_clip:ViT-B-32", r"names no weights.*ViT-B-32 has the weights .*openai"),
        ("open_clip:ViT-B-32/none.pt", r"none.pt is neither a file nor a tag of ViT-B-32.*openai"),
        ("open_clip:ViT-Q-32/openai", "open_clip has no architecture 'ViT-Q-32'"),
        (f"local-dir:{tmp_path / 'bare'}", r"the folder has no weights: put open_clip_model.safetensors"),
        (f"local-dir:{tmp_path / 'absent'}", "the folder has no open_clip_config.json"),
        (f"local-dir:{tmp_path / 'broken'}", "open_clip cannot load"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            load_model(name)
        assert "\n" not in str(caught.value)
    assert not caplog.records


@pytest.mark.parametrize("name", ["open_clip:ViT-B-32/openai", "hf-hub:timm/ViT-B-16-SigLIP"])
def test_without_a_network_one_line_says_so(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(InputError, match="open_clip cannot load") as caught:
        load_model(name)
    assert "\n" not in str(caught.value)
    assert not caplog.records


@pytest.mark.parametrize(
    "options", [{"variant": "s0"}, {"pad_mask": False}, {"context_length": 248}, {"activation": "gelu"}]
)
def test_options_of_our_models_are_refused(options: dict[str, Any], folder: Path) -> None:
    with pytest.raises(InputError, match=r"is an open_clip model.*leave --variant, --context-length"):
        load_model(folder, **options)


def test_published_weights_get_the_activation_they_were_trained_with(folder: Path, monkeypatch: Any) -> None:
    """`ViT-B-32` is a GELU architecture in open_clip 3, but OpenAI's weights need QuickGELU."""
    asked: list[bool] = []

    def create_model(architecture: str, *, force_quick_gelu: bool, **options: Any) -> nn.Module:
        asked.append(force_quick_gelu)
        assert options["require_pretrained"] and options["weights_only"]
        return open_clip.factory.create_model(f"local-dir:{folder}")

    monkeypatch.setattr("eval.towers.open_clip_model.open_clip.create_model", create_model)
    for tag in ("openai", "laion2b_s34b_b79k"):
        load_model(f"open_clip:ViT-B-32/{tag}")
    assert asked == [True, False]


def test_tokens_are_counted_as_the_tokenizer_makes_them() -> None:
    plain = OpenClipTokenizer(SimpleTokenizer(context_length=400), is_plain_clip=True)
    canonical = OpenClipTokenizer(SimpleTokenizer(context_length=400, clean="canonicalize"), is_plain_clip=False)
    for tokenizer in (plain, canonical):
        for caption in CAPTIONS:
            assert tokenizer.count_tokens(caption) == int(tokenizer(caption).argmax()) + 1  # up to the end token
    assert plain.count_tokens(CAPTIONS[2]) > canonical.count_tokens(CAPTIONS[2])  # canonical drops full stops
    assert torch.equal(plain(CAPTIONS, 20), SimpleTokenizer()(CAPTIONS, 20))


@pytest.mark.parametrize(("mode", "expected"), [("", 6), ("clips", 8)])
def test_tokens_of_a_sentencepiece_tokenizer(mode: str, expected: int) -> None:
    """A stand-in for transformers' tokenizer, which is not a requirement: words are tokens, and one ends them."""

    class Words:
        pad_token_id, cls_token_id, bos_token_id, eos_token_id = 1, 101, 102, 103

        def __call__(
            self, texts: Any, *, max_length: int | None = None, padding: Any = False, truncation: bool = False,
            add_special_tokens: bool = True, return_tensors: str | None = None, verbose: bool = True,
        ) -> Any:  # fmt: skip
            rows = [
                [len(word) + 10 for word in text.split()] for text in ([texts] if isinstance(texts, str) else texts)
            ]
            if add_special_tokens:
                rows = [[*row, self.eos_token_id] for row in rows]
            if truncation:
                rows = [(row[: max_length - 1] + row[-1:] if len(row) > max_length else row) for row in rows]
            if padding:
                rows = [row + [self.pad_token_id] * (max_length - len(row)) for row in rows]
            ids: Any = rows[0] if isinstance(texts, str) else rows
            ids = torch.tensor(ids) if return_tensors == "pt" else ids
            return SimpleNamespace(input_ids=ids) if add_special_tokens else Ids(input_ids=ids)

        batch_encode_plus = __call__  # open_clip 3.2's name for it

    class Ids(dict):
        __getattr__ = dict.__getitem__

    theirs = HFTokenizer.__new__(HFTokenizer)
    theirs.tokenizer_mode, theirs.context_length, theirs.strip_sep_token = mode, 20, False
    theirs.clean_fn, theirs.tokenizer = (lambda text: " ".join(text.split())), Words()
    tokenizer = OpenClipTokenizer(theirs, is_plain_clip=False)
    caption = "five words  make  this caption"
    assert tokenizer.count_tokens(caption) == expected
    row = tokenizer(caption)[0]
    assert row.shape == (20,)
    assert int(((row != 0) & (row != 1)).sum()) == expected
    assert tokenizer.count_tokens("word " * 50) > tokenizer.context_length
