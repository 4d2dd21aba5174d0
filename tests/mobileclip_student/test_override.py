"""A variant with towers of another shape."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from longclip_teacher.errors import InputError
from mobileclip_student import VARIANTS, create_student, override
from mobileclip_student.model import variant_config


@pytest.mark.parametrize("variant", VARIANTS)
def test_none_leaves_everything(variant: str) -> None:
    assert override(variant_config(variant)) == variant_config(variant)


def test_each_value_lands_in_its_place() -> None:
    config = variant_config("vit_tiny")
    changed = override(
        config,
        embed_dim=40,
        image_size=60,
        image_patch=12,
        image_width=20,
        image_layers=2,
        image_heads=4,
        distillation_token=True,
        drop_path=0.1,
        text_tower="longclip",
        text_width=30,
        text_layers=1,
        text_heads=5,
    )
    image = replace(
        config.image, image_size=60, patch=12, width=20, depth=2, heads=4, distillation_token=True, drop_path=0.1
    )
    text = replace(config.text, width=30, layers=1, heads=5, causal=True, activation="quickgelu")
    assert changed == replace(config, embed_dim=40, image=image, text=text)

    student = create_student(changed)
    trunk, encoder = student.image_encoder.trunk, student.text_encoder
    assert (len(trunk.blocks), trunk.embed_dim, trunk.blocks[0].attn.num_heads) == (2, 20, 4)
    assert trunk.pos_embed.shape == (1, 5 * 5 + 2, 20)
    assert (len(encoder.blocks), encoder.blocks[0].heads, encoder.positional_embedding.shape) == (1, 5, (248, 30))
    assert student.encode_image(torch.rand(2, 3, 60, 60)).shape == (2, 40)
    assert student.encode_text(student.tokenizer(["a board"])).shape == (1, 40)
    assert student.preprocess_cfg.size == 60


@pytest.mark.parametrize(
    ("tower", "kind"),
    [
        ("hybrid", (True, False, "gelu")),
        ("base", (False, False, "gelu")),
        ("causal", (False, True, "gelu")),
        ("longclip", (False, True, "quickgelu")),
    ],
)
@pytest.mark.parametrize("variant", ["s0", "b"])
def test_text_towers_change_kind_from_any_other(variant: str, tower: Any, kind: tuple[object, ...]) -> None:
    text = override(variant_config(variant), text_tower=tower).text
    assert (text.hybrid, text.causal, text.activation) == kind
    assert (text.width, text.layers) == (variant_config(variant).text.width, variant_config(variant).text.layers)


@pytest.mark.parametrize("variant", ["tiny", "s0"])
def test_a_fastvit_takes_another_picture_size_and_stochastic_depth(variant: str) -> None:
    config = override(variant_config(variant), image_size=64, drop_path=0.2, embed_dim=24)
    assert (config.image.image_size, config.image.drop_path, config.embed_dim) == (64, 0.2, 24)
    if variant == "tiny":
        assert create_student(config).encode_image(torch.rand(2, 3, 64, 64)).shape == (2, 24)
    assert override(config, distillation_token=False) == config


@pytest.mark.parametrize(
    ("variant", "change", "complaint"),
    [
        ("s0", {"image_width": 96}, r"fastvit_mci0 of student s0 has no image_width.*vit_b, vit_s, vit_tiny"),
        ("tiny", {"image_patch": 8, "image_heads": 2}, "no image_patch, no image_heads"),
        ("b", {"distillation_token": True}, "no distillation_token"),
        ("b", {"image_size": 192}, "pictures of 224 pixels.*FastViT or a ViT"),
        (
            "vit_tiny",
            {"image_width": 100},
            "image width 100 is not a multiple of its 3 heads: choose heads that divide it",
        ),
        ("vit_tiny", {"text_width": 50}, "text width 50 is not a multiple of its 4 heads: choose heads that divide it"),
        ("vit_tiny", {"image_size": 50}, "image_size 50 is not a multiple of the patch 8"),
        ("vit_tiny", {"drop_path": -0.1}, "drop_path"),
        ("vit_tiny", {"text_layers": 0}, "text tower"),
        ("vit_tiny", {"text_tower": "rnn"}, "no text tower 'rnn': choose hybrid, base, causal, longclip"),
        ("vit_tiny", {"embed_dim": 0}, "embed_dim"),
    ],
)
def test_combinations_that_do_not_fit_are_one_line(variant: str, change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint) as error:
        override(variant_config(variant), **change)
    assert "\n" not in str(error.value)
