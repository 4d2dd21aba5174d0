"""Published weights in, published features out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import open_clip
import pytest
import timm
import torch
from torch import Tensor, nn

from eval.towers.models import load_model
from longclip_teacher.ancestry import RESEARCH_ONLY
from longclip_teacher.errors import InputError
from longclip_teacher.positions import stretch_positions
from longclip_teacher.weights_file import file_sha256, load_strictly
from mobileclip_student import VARIANTS, MobileCLIP, create_student, load_student
from mobileclip_student.layouts import fits, rename_keys
from mobileclip_student.model import StudentConfig, variant_config
from mobileclip_student.text_encoder import TextConfig

POSITIONS = "text_encoder.positional_embedding.pos_embed.pos_embed"
SMALL_TEXTS = {
    "base": TextConfig(width=32, heads=4, layers=2),
    "causal": TextConfig(width=32, heads=4, layers=2, causal=True),
    "hybrid": TextConfig(width=32, heads=4, layers=2, hybrid=True),
}
OPEN_CLIP_NAMES = {
    "MobileCLIP-S1": {"s1"},
    "MobileCLIP-S2": {"s2", "mobileclip2_s2"},
    "MobileCLIP-B": {"b", "mobileclip2_b"},
    "MobileCLIP2-S0": {"mobileclip2_s0"},
    "MobileCLIP2-S3": {"mobileclip2_s3"},
    "MobileCLIP2-S4": {"mobileclip2_s4"},
    "MobileCLIP2-L-14": {"mobileclip2_l14"},
}


def _distance(ours: Tensor, theirs: Tensor) -> float:
    return float(((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).max())


def _loaded(state: dict[str, Tensor], config: StudentConfig) -> MobileCLIP:
    student = create_student(config)
    load_strictly(student, rename_keys(state, config), "a published state dict")
    return student.eval()


@pytest.fixture(scope="module")
def s0_state(published: ModuleType) -> dict[str, Tensor]:
    """Random weights with the layout and sizes of `mobileclip_s0.pt`."""
    torch.manual_seed(0)
    trunk = timm.create_model("fastvit_mci0", num_classes=512, global_pool="avg")
    for module in trunk.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
    state = {
        name: tensor.uniform_(0.5, 1.5) if "gamma" in name else tensor for name, tensor in trunk.state_dict().items()
    }
    return {
        **published.apple_image_keys(state),
        **published.apple_text_state(width=512, layers=4, embed_dim=512, hybrid=True),
        "logit_scale": torch.tensor(4.6),
    }


@pytest.fixture(scope="module")
def s0_path(s0_state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "mobileclip_s0.pt"
    torch.save(s0_state, path)
    return path


@torch.no_grad()
def test_s0_at_full_size(s0_path: Path, s0_state: dict[str, Tensor], published: ModuleType, captions: Callable) -> None:
    student = load_student(s0_path)  # the variant is in the name
    assert (student.config.variant, student.context_length, student.pad_mask) == ("s0", 77, False)
    (ancestor,) = student.ancestry
    assert (ancestor.source, ancestor.terms) == ("MobileCLIP s0 in its published layout", RESEARCH_ONLY)
    assert ancestor.sha256 == file_sha256(s0_path)
    assert not student.training and student.logit_scale.item() == pytest.approx(4.6)

    tokens = captions(12, 77, width=77)
    expected = published.text_features(s0_state, tokens, heads=8, causal=False)
    assert _distance(student.encode_text(tokens), expected) < 1e-5

    theirs = timm.create_model("fastvit_mci0", num_classes=512, global_pool="avg").eval()
    theirs.load_state_dict(timm.models.fastvit.checkpoint_filter_fn(dict(s0_state), theirs))
    images = torch.rand(1, 3, 256, 256)
    assert _distance(student.encode_image(images), theirs(images)) < 1e-5

    for index in range(6):  # no block is invisible
        block = student.text_encoder.blocks[index]
        del student.text_encoder.blocks[index]
        assert _distance(student.encode_text(tokens), expected) > 1e-2
        student.text_encoder.blocks.insert(index, block)


@torch.no_grad()
def test_s0_stretched_to_248_keeps_the_first_20(s0_path: Path, s0_state: dict[str, Tensor], captions: Callable) -> None:
    student = load_student(s0_path, variant="s0", context_length=248)
    assert (student.context_length, student.pad_mask) == (248, True)
    table = student.text_encoder.positional_embedding
    torch.testing.assert_close(table, stretch_positions(s0_state[POSITIONS][0, 0], 248))
    short = captions(20, width=248)
    at_77 = load_student(s0_path, pad_mask=True)
    torch.testing.assert_close(student.encode_text(short), at_77.encode_text(short[:, :77]), rtol=0, atol=1e-5)
    assert student.encode_text(captions(248, width=248)).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("kind", SMALL_TEXTS)
def test_ml_mobileclip_layout(kind: str, published: ModuleType, captions: Callable) -> None:
    config = replace(variant_config("tiny"), text=SMALL_TEXTS[kind], context_length=77, pad_mask=False)
    torch.manual_seed(0)
    trunk = create_student(config).eval().image_encoder.trunk
    nn.init.zeros_(trunk.head.fc.bias)  # the published projection has none
    text = published.apple_text_state(width=32, layers=2, embed_dim=96, hybrid=kind == "hybrid")
    state = {**published.apple_image_keys(trunk.state_dict()), **text, "logit_scale": torch.tensor(4.0)}
    student = _loaded(state, config)

    tokens, images = captions(12, 77, 2, width=77), torch.rand(2, 3, 48, 48)
    expected = published.text_features(text, tokens, heads=4, causal=kind == "causal")
    assert _distance(student.encode_text(tokens), expected) < 1e-5
    assert _distance(student.encode_image(images), trunk(images)) < 1e-5
    wrong = published.text_features(text, tokens, heads=4, causal=kind != "causal")
    assert _distance(wrong, expected) > 1e-2  # the mask is visible


@torch.no_grad()
@pytest.mark.parametrize("kind", ["base", "causal"])
def test_open_clip_layout(kind: str, published: ModuleType, captions: Callable) -> None:
    config = replace(variant_config("tiny"), text=SMALL_TEXTS[kind], context_length=77, pad_mask=False)
    torch.manual_seed(0)
    trunk = create_student(config).eval().image_encoder.trunk
    apple = published.apple_text_state(width=32, layers=2, embed_dim=96, hybrid=False)
    text = published.open_clip_text_state(apple)
    image = {f"visual.trunk.{key}": value for key, value in trunk.state_dict().items()}
    student = _loaded({**image, **text, "logit_scale": torch.tensor(4.0)}, config)

    tokens, images = captions(12, 77, 2, width=77), torch.rand(2, 3, 48, 48)
    expected = published.text_features(apple, tokens, heads=4, causal=kind == "causal")
    assert _distance(student.encode_text(tokens), expected) < 1e-5
    assert _distance(student.encode_image(images), trunk(images)) < 1e-5

    theirs = open_clip.transformer.TextTransformer(
        width=32, heads=4, layers=2, output_dim=96, no_causal_mask=kind == "base"
    ).eval()
    theirs.load_state_dict({key.removeprefix("text."): value for key, value in text.items()})
    assert _distance(student.encode_text(tokens), theirs(tokens)) < 1e-5


@pytest.mark.parametrize("name", OPEN_CLIP_NAMES)
def test_open_clip_models_fit_their_variants_only(name: str) -> None:
    with torch.device("meta"):
        config = open_clip.get_model_config(name)
        state = open_clip.CustomTextCLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"]).state_dict()
    candidates = [variant for variant in VARIANTS if variant not in ("tiny", "small")]
    candidates = [v for v in candidates if variant_config(v).text.width == config["text_cfg"]["width"]]
    assert {variant for variant in candidates if fits(state, variant_config(variant))} == OPEN_CLIP_NAMES[name]


@pytest.mark.parametrize(
    ("variant", "tower"), [("s1", "fastvit_mci1"), ("s2", "fastvit_mci2"), ("b", "vit_base_mci_224")]
)
def test_ml_mobileclip_models_fit_their_variants_only(variant: str, tower: str, published: ModuleType) -> None:
    with torch.device("meta"):
        trunk = timm.create_model(tower, num_classes=512).state_dict()
    rename = published.apple_b_image_keys if variant == "b" else published.apple_image_keys
    text = published.apple_text_state(width=512, layers=12, embed_dim=512, hybrid=False, device="meta")
    state = {**rename(trunk), **text, "logit_scale": torch.zeros((), device="meta")}
    assert [name for name in ("s0", "s1", "s2", "b") if fits(state, variant_config(name))] == [variant]


def test_variant_is_read_off_the_weights(s0_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "weights.pt"
    path.symlink_to(s0_path)
    with caplog.at_level(logging.INFO, "longclip_teacher.recognised"):
        assert load_student(path).config.variant == "s0"
        load_student(path, context_length=248)
    student = f"{path}: MobileCLIP student s0"
    assert caplog.messages == [
        f"{student}, 77 tokens, pads attended (official layout)",
        f"{student}, 248 tokens, pads masked (official layout, stretched from 77 tokens)",
    ]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda state: state.pop("text_encoder.transformer.5.layer_scale"), r"missing keys.*blocks\.5\.layer_scale"),
        (lambda state: state.update({"text_encoder.extra": torch.zeros(1)}), r"unexpected keys.*text_encoder\.extra"),
        (lambda state: state.update({"image_encoder.model.extra": torch.zeros(1)}), r"unexpected keys.*extra"),
        (lambda state: state.update({"other": torch.zeros(1)}), r"unexpected keys.*other"),
        (lambda state: state.update({POSITIONS: torch.zeros(())}), r"positional_embedding is \(\)"),
        (
            lambda state: state.update({"text_encoder.transformer.1.pre_norm_mha.1.qkv_proj.weight": torch.zeros(())}),
            r"missing keys.*query\.weight",
        ),
    ],
)
def test_a_key_too_few_or_too_many_is_named(
    change: Callable[[dict], object], complaint: str, s0_state: dict[str, Tensor]
) -> None:
    state = dict(s0_state)
    change(state)
    config = replace(variant_config("s0"), context_length=77)
    with torch.device("meta"):
        student = create_student(config)
    with pytest.raises(InputError, match=complaint) as error:
        load_strictly(student, rename_keys(state, config), "mobileclip_s0.pt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("variant", ["s1", "b", "mobileclip2_l14"])
def test_the_wrong_variant_is_one_line(variant: str, s0_path: Path) -> None:
    with pytest.raises(InputError, match=r"mobileclip_s0\.pt does not fit|is not that of variant") as error:
        load_student(s0_path, variant=variant)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("wrap", "remark"),
    [
        (lambda state: {"model": {f"module._orig_mod.{key}": value for key, value in state.items()}}, "model"),
        (lambda state: {"model_state_dict": state, "epoch": 1}, "model_state_dict"),
        (
            lambda state: {"state_dict": {}, "model_ema": {f"_orig_mod.{key}": value for key, value in state.items()}},
            "model_ema (an averaged copy, preferred to state_dict)",
        ),
    ],
)
def test_a_wrapped_official_file_is_the_same_student(
    wrap: Callable[[dict], dict], remark: str, s0_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "trained.pt"
    torch.save(wrap(torch.load(s0_path, weights_only=True)), path)
    with caplog.at_level(logging.INFO, "longclip_teacher.recognised"):
        student = load_model(path)
    assert isinstance(student, MobileCLIP)
    for found, wanted in zip(student.parameters(), load_student(s0_path).parameters(), strict=True):
        assert torch.equal(found, wanted)
    assert any(message.endswith(f"(official layout), weights from {remark}") for message in caplog.messages)
