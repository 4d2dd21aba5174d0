"""Every layout from which a teacher is read, and one clear line for every file that does not fit."""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import huggingface_hub
import open_clip
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from safetensors.torch import save_file
from torch import Tensor

from longclip_teacher import create_teacher, export_official, load_teacher, save_teacher, stretch_positions
from longclip_teacher.checkpoint import _config_from_weights
from longclip_teacher.config import TEACHERS
from longclip_teacher.errors import InputError
from longclip_teacher.key_layouts import to_our_keys
from longclip_teacher.model import LongCLIP

Weights = dict[str, Tensor]
MakeWeights = Callable[..., Weights]
MakeTokens = Callable[..., Tensor]


def openai_weights(make: MakeWeights) -> Weights:
    """A CLIP of 77 positions, with the three numbers that OpenAI's files carry."""
    numbers = {"input_resolution": 32, "context_length": 77, "vocab_size": 1000}
    clip = make(num_positions=77, two_tables=False)
    return {**clip, **{name: torch.tensor(number) for name, number in numbers.items()}}


def transformers_weights(clip: Weights) -> Weights:
    """The same CLIP under the names of transformers' CLIPModel."""
    names = {
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
        "visual.transformer.resblocks": "vision_model.encoder.layers",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "transformer.resblocks": "text_model.encoder.layers",
        "ln_final": "text_model.final_layer_norm",
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn": "self_attn",
        "c_fc": "fc1",
        "c_proj": "fc2",
    }
    theirs = {
        "logit_scale": clip["logit_scale"],
        "text_projection.weight": clip["text_projection"].T.contiguous(),
        "visual_projection.weight": clip["visual.proj"].T.contiguous(),
        "text_model.embeddings.position_ids": torch.arange(77)[None],
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
    }
    for key, value in clip.items():
        if key in ("logit_scale", "text_projection", "visual.proj"):
            continue
        if "in_proj" not in key:
            for ours in sorted(names, key=len, reverse=True):
                key = key.replace(ours, names[ours]) if key.startswith(ours) or f".{ours}." in key else key
            theirs[key] = value
            continue
        tower = "vision_model" if key.startswith("visual.") else "text_model"
        layer, kind = key.split("resblocks.")[1].split(".")[0], key.rsplit("_", 1)[1]
        for name, part in zip("qkv", value.chunk(3), strict=True):
            theirs[f"{tower}.encoder.layers.{layer}.self_attn.{name}_proj.{kind}"] = part.contiguous()
    return theirs


@torch.no_grad()
def features(model: LongCLIP, tokens: Tensor) -> Tensor:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    return torch.cat([model.encode_image(images), model.encode_text(tokens)])


def test_openai_clip_is_stretched_on_load(
    official_weights: MakeWeights, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "clip.pt"
    weights = openai_weights(official_weights)
    torch.save(weights, path)
    with caplog.at_level(logging.INFO):
        model = load_teacher(path)
    assert sha256(path.read_bytes()).hexdigest() in caplog.text
    told = f"{path}: CLIP teacher with ViT 128 wide and patch 8, 248 tokens, quickgelu (stretched from 77)"
    assert ("longclip_teacher.recognised", logging.INFO, told) in caplog.record_tuples
    assert torch.equal(model.text.position_table, stretch_positions(weights["positional_embedding"]))
    assert (model.context_length, model.config.num_frozen_positions, model.config.activation) == (248, 20, "quickgelu")
    assert (model.config.image.heads, model.config.text.heads) == (2, 3)  # width / 64
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert load_teacher(path, context_length=77).text.position_table.shape == (77, 192)
    assert load_teacher(path, context_length=10).text.position_table.shape == (10, 192)


def test_transformers_layout_is_the_same_model(
    official_weights: MakeWeights, caption_tokens: MakeTokens, tmp_path: Path
) -> None:
    clip = official_weights(num_positions=77, two_tables=False)
    torch.save(openai_weights(official_weights), tmp_path / "clip.pt")
    save_file(transformers_weights(clip), tmp_path / "model.safetensors")
    tokens = caption_tokens([248, 30, 77, 5])
    model = load_teacher(tmp_path / "model.safetensors", activation="quickgelu")
    assert torch.equal(features(model, tokens), features(load_teacher(tmp_path / "clip.pt"), tokens))
    assert any("vision_model.encoder.layers.2.mlp.fc2" in key for key in transformers_weights(clip))


@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "quickgelu"])
@torch.no_grad()
def test_open_clip_layout_gives_the_features_of_open_clip(
    caption_tokens: MakeTokens, tmp_path: Path, custom_text: bool, activation: str
) -> None:
    torch.manual_seed(0)
    clip = (CustomTextCLIP if custom_text else CLIP)(
        embed_dim=32,
        vision_cfg=CLIPVisionCfg(layers=2, width=128, head_width=64, patch_size=8, image_size=32),
        text_cfg=CLIPTextCfg(context_length=77, vocab_size=1000, width=128, heads=2, layers=2),
        quick_gelu=activation == "quickgelu",
    ).eval()
    for parameter in clip.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    save_file({key: value.contiguous() for key, value in clip.state_dict().items()}, tmp_path / "clip.safetensors")
    tokens, images = caption_tokens([77, 20, 5], context_length=77), torch.randn(2, 3, 32, 32)
    model = load_teacher(tmp_path / "clip.safetensors", context_length=77, activation=activation)  # type: ignore[arg-type]
    torch.testing.assert_close(model.encode_text(tokens), clip.encode_text(tokens), atol=1e-5, rtol=0)
    torch.testing.assert_close(model.encode_image(images), clip.encode_image(images), atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="give activation='quickgelu'"):
        load_teacher(tmp_path / "clip.safetensors")


@pytest.mark.parametrize("name", ["b16", "l14"])
def test_tower_shapes_are_read_from_the_weights(name: str) -> None:
    with torch.device("meta"):
        official = export_official(create_teacher(name))
    assert official["positional_embedding_res"].shape == official["positional_embedding"].shape
    tensors, is_quickgelu = to_our_keys(official, Path("longclip.pt"))
    config = _config_from_weights(tensors, "quickgelu" if is_quickgelu else None, Path("longclip.pt"))
    assert (config.image, config.text, config.embed_dim) == (
        TEACHERS[name].image,
        TEACHERS[name].text,
        TEACHERS[name].embed_dim,
    )
    assert config.num_frozen_positions == 20


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_our_own_file_round_trips(caption_tokens: MakeTokens, tmp_path: Path, name: str) -> None:
    model = create_teacher(name).eval().requires_grad_(False)  # torch's attention picks its kernel by that
    path = tmp_path / "deep" / "teacher.safetensors"
    save_teacher(model, path)
    loaded = load_teacher(path)
    assert loaded.config == model.config
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    tokens = caption_tokens([60, 5], sot=49406, eot=49407)
    assert torch.equal(loaded.encode_text(tokens), model.encode_text(tokens))
    assert load_teacher(path, context_length=77).context_length == 77


def test_our_own_file_keeps_what_was_frozen(
    official_weights: MakeWeights, caption_tokens: MakeTokens, tmp_path: Path
) -> None:
    torch.save(official_weights(), tmp_path / "longclip.pt")
    model = load_teacher(tmp_path / "longclip.pt")
    save_teacher(model, tmp_path / "own.safetensors")
    own = load_teacher(tmp_path / "own.safetensors")
    assert own.config.num_frozen_positions == 20
    tokens = caption_tokens([248, 9])
    assert torch.equal(features(own, tokens), features(model, tokens))


def test_a_run_folder_stands_for_its_weights(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is a folder without best\.safetensors or last\.safetensors: give a"):
        load_teacher(tmp_path)
    model = create_teacher("tiny", context_length=32)
    save_teacher(model, tmp_path / "last.safetensors")
    assert torch.equal(load_teacher(tmp_path).logit_scale, model.logit_scale)
    model.logit_scale.data.fill_(1.5)
    save_teacher(model, tmp_path / "best.safetensors")
    assert load_teacher(str(tmp_path)).logit_scale.item() == 1.5


def test_hub_names_fetch_the_published_file(
    official_weights: MakeWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(official_weights(), tmp_path / "longclip-B.pt")
    clip = official_weights(num_positions=77, two_tables=False)
    torch.save(transformers_weights(clip), tmp_path / "pytorch_model.bin")
    asked = []

    def download(repository: str, filename: str) -> str:
        asked.append((repository, filename))
        if filename == "model.safetensors":
            raise EntryNotFoundError("404: no such entry")
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    longclip = load_teacher("longclip-b")
    assert longclip.embed_dim == 64
    assert {(one.source, one.terms, len(one.sha256)) for one in longclip.ancestry} == {
        ("BeichenZhang/LongCLIP-B", "apache-2.0", 64),
        ("openai/clip-vit-base-patch16", "mit", 0),
    }
    clip_teacher = load_teacher("openai/clip-vit-base-patch16")
    assert (clip_teacher.config.activation, clip_teacher.context_length) == ("quickgelu", 248)
    assert [one.source for one in clip_teacher.ancestry] == ["openai/clip-vit-base-patch16"]
    assert asked == [
        ("BeichenZhang/LongCLIP-B", "longclip-B.pt"),
        ("openai/clip-vit-base-patch16", "model.safetensors"),
        ("openai/clip-vit-base-patch16", "pytorch_model.bin"),
    ]


def test_no_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repository: str, filename: str) -> str:
        raise ConnectionError("Cannot resolve the host. Check your proxy.\nMax retries exceeded")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(
        InputError, match=r"longclip-L.pt of .* \(Cannot resolve the host\): fetch it elsewhere"
    ) as caught:
        load_teacher("longclip-l")
    assert "\n" not in str(caught.value)


def bad_torch_file(change: Callable[[Weights], object]) -> Callable[[Path, MakeWeights], Path]:
    def write(folder: Path, make: MakeWeights) -> Path:
        torch.save(change(make()), folder / "bad.pt")
        return folder / "bad.pt"

    return write


def bad_own_file(metadata: dict[str, str], drop: str = "") -> Callable[[Path, MakeWeights], Path]:
    def write(folder: Path, make: MakeWeights) -> Path:
        tensors = create_teacher("tiny").state_dict()
        tensors.pop(drop, None)
        config = json.dumps(TEACHERS["tiny"].to_dict())
        kept = {"format": "compact-longclip", "kind": "teacher", "config": config, **metadata}
        save_file(tensors, folder / "bad.safetensors", kept)
        return folder / "bad.safetensors"

    return write


def truncated(suffix: str) -> Callable[[Path, MakeWeights], Path]:
    def write(folder: Path, make: MakeWeights) -> Path:
        path = folder / f"cut{suffix}"
        save_file(make(), path) if suffix == ".safetensors" else torch.save(make(), path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return path

    return write


def torchscript(folder: Path, make: MakeWeights) -> Path:
    with zipfile.ZipFile(folder / "ViT-B-16.pt", "w") as archive:
        archive.writestr("ViT-B-16/constants.pkl", b"")
        archive.writestr("ViT-B-16/code/__torch__.py", b"import os")
    return folder / "ViT-B-16.pt"


def hostile_config(values: dict[str, object]) -> dict[str, str]:
    return {"config": json.dumps({**TEACHERS["tiny"].to_dict(), **values})}


def without(weights: Weights, key: str) -> Weights:
    return {name: value for name, value in weights.items() if name != key}


BAD_FILES = {
    "missing file": (lambda folder, make: folder / "none.pt", "no weight file or run folder at .*longclip-b"),
    "missing key": (bad_torch_file(lambda w: without(w, "visual.ln_pre.bias")), "missing.*visual.ln_pre.bias"),
    "missing key that gives a shape": (
        bad_torch_file(lambda w: without(w, "visual.conv1.weight")),
        "visual.conv1.weight",
    ),
    "missing first table": (
        bad_torch_file(lambda w: without(w, "positional_embedding")),
        "positional_embedding is None",
    ),
    "missing block": (
        bad_torch_file(lambda w: {k: v for k, v in w.items() if ".resblocks.1." not in k or "visual" not in k}),
        r"missing keys \(visual.transformer.resblocks.1",
    ),
    "unexpected key": (bad_torch_file(lambda w: {**w, "visual.extra": torch.ones(2)}), "unexpected.*visual.extra"),
    "wrong shape": (bad_torch_file(lambda w: {**w, "visual.proj": torch.ones(128, 65)}), r"visual.proj is \(128, 65\)"),
    "wrong dimensions": (bad_torch_file(lambda w: {**w, "visual.conv1.weight": torch.ones(2)}), "4 dimensions"),
    "odd width": (bad_torch_file(lambda w: {**w, "visual.conv1.weight": torch.ones(100, 3, 8, 8)}), "100 wide"),
    "two tables that differ": (
        bad_torch_file(lambda w: {**w, "positional_embedding_res": torch.ones(247, 192)}),
        "positional_embedding_res",
    ),
    "resnet": (bad_torch_file(lambda w: {"visual.layer1.0.conv1.weight": torch.ones(1)}), "ResNet"),
    "something else": (bad_torch_file(lambda w: {"fc.weight": torch.ones(1)}), "no CLIP ViT: it lacks"),
    "no tensors": (bad_torch_file(lambda w: {"epoch": 3}), "no state dict"),
    "pickled code": (bad_torch_file(lambda w: {**w, "x": Path("y")}), "pickled code"),
    "pickled module": (bad_torch_file(lambda w: torch.nn.Linear(2, 2)), "pickled code"),
    "truncated torch file": (truncated(".pt"), "not a whole torch weight file"),
    "truncated safetensors": (truncated(".safetensors"), "not a whole safetensors file"),
    "torchscript": (torchscript, "TorchScript"),
    "student": (bad_own_file({"kind": "student"}), "holds a student, not a teacher: load it with load_student"),
    "no configuration": (bad_own_file({"config": ""}), "no readable configuration"),
    "configuration that is a list": (bad_own_file({"config": "[]"}), "no readable configuration"),
    "unknown setting": (bad_own_file(hostile_config({"colour": 1})), "colour"),
    "too few positions": (
        bad_own_file(hostile_config({"text": {"width": 96, "heads": 3, "layers": 2, "context_length": 77}})),
        "248 text positions",
    ),
    "own file lacks positions": (bad_own_file({}, drop="text.positional_embedding"), "text.positional_embedding"),
    "own file lacks a weight": (bad_own_file({}, drop="visual.conv1.conv0.weight"), "visual.conv1.conv0.weight"),
    "configuration far beyond the weights": (bad_own_file(hostile_config({"embed_dim": 2**20})), "far fewer weights"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_one_clear_line(case: str, official_weights: MakeWeights, tmp_path: Path) -> None:
    write, named = BAD_FILES[case]
    path = write(tmp_path, official_weights)
    with pytest.raises(InputError, match=named) as caught:
        load_teacher(path)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))


def test_an_activation_that_contradicts_the_file_is_refused(official_weights: MakeWeights, tmp_path: Path) -> None:
    torch.save(official_weights(), tmp_path / "longclip.pt")
    with pytest.raises(InputError, match="quickgelu model"):
        load_teacher(tmp_path / "longclip.pt", activation="gelu")
    with pytest.raises(InputError, match="stretch to at most"):
        load_teacher(tmp_path / "longclip.pt", context_length=2000)


def test_refused_saves_and_exports_say_why(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"teacher\.safetensors"):
        save_teacher(create_teacher("tiny"), tmp_path / "teacher.pt")
    with pytest.raises(InputError, match="save_teacher"):
        export_official(create_teacher("tiny"))


def test_preprocessing_matches_open_clip() -> None:
    with torch.device("meta"):
        model = create_teacher("b16")
    assert model.preprocess_cfg.mean == open_clip.OPENAI_DATASET_MEAN
    assert model.preprocess_cfg.std == open_clip.OPENAI_DATASET_STD
    assert (model.preprocess_cfg.size, model.preprocess_cfg.interpolation) == (224, "bicubic")
