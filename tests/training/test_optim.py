"""AdamW: which parameters decay, how fast each learns, the schedules, and the fused kernel against the plain one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

from longclip_teacher import create_teacher
from longclip_teacher.config import TEACHERS
from longclip_teacher.errors import InputError
from mobileclip_student import VARIANTS, create_student
from mobileclip_student.model import TextTowerName, override, variant_config
from training.distill import Distiller
from training.optim import build_optimizer, learning_rate, load_moments
from training.settings.losses import LossOptions
from training.settings.needs import needs_of
from training.settings.options import OptimOptions


def test_fused_steps_equal_separate_operations() -> None:
    torch.manual_seed(0)
    model = create_student("tiny", context_length=40)
    other = deepcopy(model)
    before = deepcopy(model)
    options = OptimOptions(lr=1e-2)
    optimizers = [build_optimizer(model, options, fused=True), build_optimizer(other, options, fused=False)]
    assert [optimizer.defaults["fused"] for optimizer in optimizers] == [True, False]
    assert [optimizer.defaults["foreach"] for optimizer in optimizers] == [False, True]
    for _ in range(5):
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
            ours.grad = torch.randn_like(ours)
            theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for (name, ours), theirs, old in zip(
        model.named_parameters(), other.parameters(), before.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=name)
        assert not torch.equal(ours, old), name


def test_devices_without_a_fused_kernel_take_separate_operations() -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 3)
    assert build_optimizer(model, OptimOptions()).defaults["fused"] is False


# modules and the names of their own parameters, of which all decay or none does
DECAYED = {
    "Linear": "weight",
    "Conv2d": "weight",
    "TokenConv": "weight",
    "_Pointwise": "weight",
    "Embedding": "weight",
    "TextTransformer": "projection",
    "MultiheadAttention": "in_proj_weight",
    "NonDynamicallyQuantizableLinear": "weight",
    "CaptionTransformer": "text_projection",
    "ImageTransformer": "proj",
    "ParameterDict": "image text",  # the mixtures of AFD
}
STAYING = {
    "Linear": "bias",
    "Conv2d": "bias",
    "MultiheadAttention": "in_proj_bias",
    "NonDynamicallyQuantizableLinear": "bias",
    "BatchNorm2d": "weight bias",
    "BatchNormAct2d": "weight bias",
    "TokenBatchNorm": "weight bias",
    "GroupNorm": "weight bias",
    "LayerNorm": "weight bias",
    "LayerNorm2d": "weight bias",
    "LayerScale": "gamma",
    "LayerScale2d": "gamma",
    "TextTransformer": "positional_embedding",
    "CaptionTransformer": "positional_embedding",
    "ImageTransformer": "positional_embedding class_embedding",
    "VisionTransformer": "cls_token pos_embed",
    "VisionTransformerDistilled": "cls_token pos_embed dist_token",
    "MobileCLIP": "logit_scale",
    "LongCLIP": "logit_scale",
    "ParameterDict": "afd icl vrd",  # the scales of losses
}


def all_models() -> Iterator[nn.Module]:
    """Every student and every teacher, and all that losses learn."""
    for variant in VARIANTS:
        yield create_student(variant)
    yield create_with_distillation_token("vit_tiny")
    for tower in get_args(TextTowerName):
        yield create_student(override(variant_config("tiny"), text_tower=tower))
    for name in TEACHERS:
        yield create_teacher(name)
    weights = dict.fromkeys(LossOptions().weights, 0.0)
    weights |= dict.fromkeys(("clip_long", "afd_long", "icl_long", "vrd_long"), 1.0)
    needs = needs_of(LossOptions(**weights), with_teacher=True)
    yield Distiller(create_student("tiny"), needs, teacher_width=20)


def test_what_decays_in_every_model() -> None:
    found: dict[bool, dict[str, set[str]]] = {True: defaultdict(set), False: defaultdict(set)}
    with torch.device("meta"):
        for model in all_models():
            optimizer = build_optimizer(model, OptimOptions(weight_decay=0.3))
            decays = {id(p): group["weight_decay"] == 0.3 for group in optimizer.param_groups for p in group["params"]}
            assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.3}
            for module in model.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    found[decays[id(parameter)]][type(module).__name__].add(name)
    for decay, wanted in ((True, DECAYED), (False, STAYING)):
        assert found[decay] == {module: set(names.split()) for module, names in wanted.items()}


def test_frozen_parameters_do_not_move() -> None:
    model = create_student("tiny", context_length=40)
    model.text_encoder.token_embedding.weight.requires_grad_(False)
    optimizer = build_optimizer(model, OptimOptions())
    assert all((group["lr_share"], group["lr"]) == (1.0, optimizer.defaults["lr"]) for group in optimizer.param_groups)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    moved = {names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]}
    assert moved == set(names.values()) - {"text_encoder.token_embedding.weight"}


def test_learning_rate_rises_and_falls() -> None:
    options = OptimOptions(lr=2.0, warmup_steps=4, min_lr_share=0.1)
    rates = [learning_rate(step, 100, options) for step in range(100)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert max(rates) == 2.0 and rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(0.2, abs=1e-3)
    assert learning_rate(0, 20, options) == 1.0  # at most a tenth of the run


def test_constant_rate_stays_at_the_peak_until_it_cools_down() -> None:
    options = OptimOptions(lr=2.0, warmup_steps=4, schedule="constant", cooldown_share=0.2, min_lr_share=0.1)
    rates = [learning_rate(step, 100, options) for step in range(101)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4:81] == [2.0] * 77
    assert rates[80:] == pytest.approx([2.0 - 1.8 * i / 20 for i in range(21)])


@pytest.mark.parametrize(("share", "expected"), [(0.0, [1.0, 1.0, 1.0, 1.0]), (1.0, [1.0, 1.0, 2 / 3, 1 / 3])])
def test_cool_down_of_nothing_and_of_everything(share: float, expected: list[float]) -> None:
    options = OptimOptions(lr=1.0, warmup_steps=1, schedule="constant", cooldown_share=share)
    assert [learning_rate(step, 4, options) for step in range(4)] == pytest.approx(expected)


# parameters by the power of layer_decay in their rate: 1 in the last block, one more in each block before it
FASTVIT_TINY = {  # stages of 1, 1 and 2 blocks
    "image_encoder.trunk.stem.0.conv_kxk.0.conv.weight": 5,
    "image_encoder.trunk.stages.0.blocks.0.mlp.fc1.weight": 4,
    "image_encoder.trunk.stages.1.downsample.proj.0.large_conv.conv.weight": 3,
    "image_encoder.trunk.stages.1.blocks.0.layer_scale.gamma": 3,
    "image_encoder.trunk.stages.2.downsample.proj.1.identity.bias": 2,
    "image_encoder.trunk.stages.2.blocks.0.token_mixer.norm.identity.weight": 2,
    "image_encoder.trunk.stages.2.blocks.1.mlp.fc2.bias": 1,
    "image_encoder.trunk.final_conv.se.fc1.weight": 0,
    "image_encoder.trunk.head.fc.weight": 0,
}
HYBRID_TINY = {  # RepMixer, attention, RepMixer
    "text_encoder.token_embedding.weight": 4,
    "text_encoder.positional_embedding": 4,
    "text_encoder.blocks.0.token_mixer.conv.weight": 3,
    "text_encoder.blocks.1.query.weight": 2,
    "text_encoder.blocks.2.ffn_conv.norm.bias": 1,
    "text_encoder.ln_final.weight": 0,
    "text_encoder.projection": 0,
    "logit_scale": 0,
}
FASTVIT_S3 = {  # stages of 2, 12, 24, 4 and 2 blocks
    "image_encoder.trunk.stem.2.conv_kxk.0.conv.weight": 45,
    "image_encoder.trunk.stages.0.blocks.0.mlp.fc1.weight": 44,
    "image_encoder.trunk.stages.1.blocks.10.mlp.fc1.weight": 32,
    "image_encoder.trunk.stages.2.blocks.2.mlp.fc1.weight": 28,
    "image_encoder.trunk.stages.2.blocks.23.mlp.fc1.weight": 7,
    "image_encoder.trunk.stages.3.pos_emb.pos_enc.weight": 6,
    "image_encoder.trunk.stages.4.blocks.1.mlp.fc1.weight": 1,
}
VIT_B = {  # 12 blocks per tower
    "image_encoder.trunk.cls_token": 13,
    "image_encoder.trunk.pos_embed": 13,
    "image_encoder.trunk.patch_embed.backbone.2.conv.weight": 13,
    "image_encoder.trunk.blocks.0.attn.proj.weight": 12,
    "image_encoder.trunk.blocks.10.norm1.weight": 2,
    "image_encoder.trunk.blocks.11.mlp.fc2.weight": 1,
    "image_encoder.trunk.norm.weight": 0,
    "image_encoder.trunk.head.weight": 0,
    "text_encoder.token_embedding.weight": 13,
    "text_encoder.blocks.0.out.weight": 12,
    "text_encoder.blocks.11.ln_1.bias": 1,
    "text_encoder.projection": 0,
}
VIT_L14 = {  # 24 blocks with a norm before them
    "image_encoder.trunk.patch_embed.proj.weight": 25,
    "image_encoder.trunk.norm_pre.weight": 25,
    "image_encoder.trunk.blocks.23.attn.qkv.weight": 1,
}
VIT_TINY = {  # 3 blocks, a distillation token
    "image_encoder.trunk.patch_embed.proj.weight": 4,
    "image_encoder.trunk.cls_token": 4,
    "image_encoder.trunk.dist_token": 4,
    "image_encoder.trunk.blocks.0.attn.qkv.weight": 3,
    "image_encoder.trunk.blocks.2.norm1.weight": 1,
    "image_encoder.trunk.norm.weight": 0,
    "image_encoder.trunk.head.weight": 0,
    "image_encoder.trunk.head_dist.weight": 0,
}
LONG_CLIP_TINY = {  # 3 and 2 blocks
    "visual.conv1.project.weight": 4,
    "visual.class_embedding": 4,
    "visual.positional_embedding": 4,
    "visual.ln_pre.weight": 4,
    "visual.transformer.resblocks.0.attn.in_proj_weight": 3,
    "visual.transformer.resblocks.2.mlp.c_proj.bias": 1,
    "visual.ln_post.weight": 0,
    "visual.proj": 0,
    "text.token_embedding.weight": 3,
    "text.positional_embedding": 3,
    "text.transformer.resblocks.0.attn.out_proj.weight": 2,
    "text.transformer.resblocks.1.ln_2.weight": 1,
    "text.ln_final.bias": 0,
    "text.text_projection": 0,
    "logit_scale": 0,
}


def create_with_distillation_token(variant: str) -> nn.Module:
    return create_student(override(variant_config(variant), distillation_token=True))


@pytest.mark.parametrize(
    ("create", "variant", "depths", "all_depths"),
    [
        (create_student, "tiny", FASTVIT_TINY | HYBRID_TINY, range(6)),
        (create_student, "mobileclip2_s3", FASTVIT_S3, range(46)),
        (create_student, "b", VIT_B, range(14)),
        (create_student, "mobileclip2_l14", VIT_L14, range(26)),
        (create_with_distillation_token, "vit_tiny", VIT_TINY, range(5)),
        (create_teacher, "tiny", LONG_CLIP_TINY, range(5)),
    ],
)
def test_layer_decay_follows_the_depth(
    create: Callable[[str], nn.Module], variant: str, depths: dict[str, int], all_depths: range
) -> None:
    with torch.device("meta"):
        model = create(variant)
    shares = shares_of(model, OptimOptions(lr=0.5, layer_decay=0.5))
    assert {name: shares[name] for name in depths} == {name: 0.5**depth for name, depth in depths.items()}
    assert set(shares.values()) == {0.5**depth for depth in all_depths}


def shares_of(module: nn.Module, options: OptimOptions) -> dict[str, float]:
    """Return lr_share of each optimised parameter, once, with the decay that it has without shares."""
    optimizer = build_optimizer(module, options)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    plain = {id(p) for p in build_optimizer(module, OptimOptions(weight_decay=0.3)).param_groups[-1]["params"]}
    shares: dict[str, float] = {}
    for group in optimizer.param_groups:
        assert group["lr"] == options.lr * group["lr_share"]
        for parameter in group["params"]:
            assert names[id(parameter)] not in shares
            assert group["weight_decay"] == (0.0 if id(parameter) in plain else options.weight_decay)
            shares[names[id(parameter)]] = group["lr_share"]
    return shares


def test_towers_have_rates_of_their_own_and_frozen_ones_are_absent() -> None:
    distiller = nn.Module()
    distiller.model = create_student("tiny", context_length=20)
    distiller.project = nn.ModuleDict({"image": nn.Linear(4, 4), "text": nn.Linear(4, 4)})  # learned parts of losses
    distiller.layers = nn.ModuleDict({"text": nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(4, 4)])})})
    options = OptimOptions(image_lr_share=0.1, text_lr_share=3.0, layer_decay=0.5)
    shares = shares_of(distiller, options)
    wanted = {
        **{f"model.{name}": 0.1 * 0.5**depth for name, depth in FASTVIT_TINY.items()},
        **{f"model.{name}": 3.0 * 0.5**depth for name, depth in HYBRID_TINY.items()},
        "model.logit_scale": 1.0,
    }
    assert {name: shares[name] for name in wanted} == pytest.approx(wanted)
    ours = [share for name, share in shares.items() if not name.startswith("model.")]
    assert ours == [1.0] * 6

    distiller.model.image_encoder.requires_grad_(False)
    distiller.model.text_encoder.blocks[0].requires_grad_(False)  # the blocks after it keep their depth
    left = shares_of(distiller, options)
    absent = ("model.image_encoder.", "model.text_encoder.blocks.0.")
    assert left == {name: share for name, share in shares.items() if not name.startswith(absent)}


def stepped(options: OptimOptions, *, fused: bool) -> tuple[nn.Module, torch.optim.AdamW]:
    """A small module, and its optimiser after a step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = build_optimizer(model, options, fused=fused)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("fused", [True, False])
def test_a_resumed_optimiser_takes_moments_from_the_checkpoint_and_settings_from_the_options(fused: bool) -> None:
    _, saved = stepped(OptimOptions(), fused=not fused)
    _, other = stepped(OptimOptions(), fused=not fused)
    options = OptimOptions(lr=0.5, weight_decay=0.7, betas=(0.5, 0.6), eps=1e-3, text_lr_share=0.5)
    model, ours = stepped(options, fused=fused)
    ours.param_groups[0]["maximize"] = saved.param_groups[0]["capturable"] = True  # none of them is the checkpoint's
    before = [{name: value for name, value in group.items() if name != "params"} for group in ours.param_groups]
    assert before[0]["fused"] == fused and before[0]["foreach"] != fused and before[0]["weight_decay"] == 0.7
    load_moments(ours, saved.state_dict(), Path("last.pt"))
    assert [{name: value for name, value in group.items() if name != "params"} for group in ours.param_groups] == before
    for (number, moments), theirs in zip(saved.state_dict()["state"].items(), other.state.values(), strict=True):
        for name, value in moments.items():
            assert torch.equal(ours.state_dict()["state"][number][name], value), (number, name)
            assert torch.equal(value, theirs[name]), "the checkpoint is only read"
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    ours.step()
    assert all(moments["step"] == 2 for moments in ours.state.values())


def test_moments_of_other_parameters_are_refused() -> None:
    _, ours = stepped(OptimOptions(), fused=True)
    for layers in ([nn.Linear(3, 4)], [nn.Linear(3, 5), nn.Linear(5, 2)], [nn.Linear(3, 4), nn.LayerNorm(4)]):
        other = nn.Sequential(*layers)
        optimizer = build_optimizer(other, OptimOptions())
        for parameter in other.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        with pytest.raises(
            InputError, match=r"last\.pt is of a version in which other parameters decayed: finish the run"
        ):
            load_moments(ours, optimizer.state_dict(), Path("last.pt"))
