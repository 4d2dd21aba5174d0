"""Exported towers: any batch, any length, any padding; the features are those of the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from longclip_teacher import create_teacher
from longclip_teacher import towers as teacher_towers
from longclip_teacher.config import TEACHERS
from longclip_teacher.model import LongCLIP
from longclip_teacher.packages import ONNX, missing_packages
from longclip_teacher.text import EOT
from mobileclip_student import MobileCLIP, create_student, override, reparameterize
from mobileclip_student import towers as student_towers
from mobileclip_student.model import variant_config

CONTEXT = 40
MODELS = ("hybrid", "base", "causal", "longclip", "published", "two class tokens", "teacher", "teacher with conv stem")
needs_onnx = pytest.mark.skipif(bool(missing_packages(ONNX)), reason="the extra export is not installed")


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, visible: Callable) -> MobileCLIP | LongCLIP:
    """A small model of each kind of tower."""
    torch.manual_seed(0)
    if request.param.startswith("teacher"):
        config = TEACHERS["tiny"]
        stem = "conv" if "conv" in request.param else "patch"
        return create_teacher(replace(config, image=replace(config.image, stem=stem)), CONTEXT).eval()
    if request.param == "published":
        return visible(create_student("tiny", CONTEXT, pad_mask=False)).eval()
    if request.param == "two class tokens":
        config = override(variant_config("vit_tiny"), distillation_token=True, text_layers=1)
    else:
        config = override(variant_config("tiny"), text_tower=request.param)
        config = replace(config, image=replace(config.image, image_size=32, layers=(1,), embed_dims=(8,)))
    return reparameterize(visible(create_student(config, CONTEXT)))


def towers(model: MobileCLIP | LongCLIP) -> tuple[nn.Module, nn.Module]:
    """Image tower and text tower."""
    kinds = teacher_towers if isinstance(model, LongCLIP) else student_towers
    return kinds.ImageTower(model).eval(), kinds.TextTower(model).eval()


def padded(tokens: Tensor, width: int, pad: int) -> Tensor:
    """The captions in `width` columns, with `pad` after EOT."""
    after_eot = torch.arange(width) > tokens.argmax(dim=1)[:, None]
    return torch.where(after_eot, pad, nn.functional.pad(tokens, (0, width - tokens.shape[1])))


@torch.no_grad()
def check_texts(model: MobileCLIP | LongCLIP, encode: Callable[[Tensor], Tensor], captions: Callable) -> None:
    for lengths in ((CONTEXT,), (2, 9), (3, 17, 5, 8, 12)):
        tokens = captions(*lengths, width=max(lengths))
        expected = model.encode_text(tokens, normalize=True)
        for other in (tokens, padded(tokens, CONTEXT, 0), padded(tokens, CONTEXT, EOT), padded(tokens, CONTEXT, 7)):
            torch.testing.assert_close(encode(other), expected, rtol=0, atol=2e-6)
        longest = int(tokens.argmax(dim=1).argmax())
        cut = tokens[longest : longest + 1].clone()
        cut[0, -1] = 320  # where EOT was
        torch.testing.assert_close(encode(cut), expected[longest : longest + 1], rtol=0, atol=2e-6)


@torch.no_grad()
def check_images(model: MobileCLIP | LongCLIP, encode: Callable[[Tensor], Tensor]) -> None:
    for batch in (1, 2, 5):
        images = torch.rand(batch, 3, model.image_size, model.image_size)
        torch.testing.assert_close(encode(images), model.encode_image(images, normalize=True), rtol=0, atol=2e-6)


def test_towers_give_the_features_of_the_model(model: MobileCLIP | LongCLIP, captions: Callable) -> None:
    image_tower, text_tower = towers(model)
    check_images(model, image_tower)
    check_texts(model, text_tower, captions)


@needs_onnx
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("model", ["hybrid", "published", "teacher"], indirect=True)  # an export takes seconds
def test_graphs_take_any_batch_and_length(model: MobileCLIP | LongCLIP, captions: Callable) -> None:
    import onnxruntime

    from mobileclip_student.onnx_graphs import image_graph, text_graph

    image_tower, text_tower = towers(model)
    graphs = image_graph(image_tower, model.image_size), text_graph(text_tower, CONTEXT)
    encoders = []
    for graph in graphs:
        contents = graph.SerializeToString()
        for trace in (b".py", b"/home", b"site-packages", b"torch.ops", b"stack", b"forward("):
            assert trace not in contents
        session = onnxruntime.InferenceSession(contents)
        name = session.get_inputs()[0].name
        encoders.append(lambda x, s=session, n=name: torch.from_numpy(np.asarray(s.run(None, {n: x.numpy()})[0])))
    assert [graph.graph.input[0].name for graph in graphs] == ["pixel_values", "input_ids"]
    assert [graph.graph.output[0].name for graph in graphs] == ["image_embeds", "text_embeds"]
    sizes = [[size.dim_param or size.dim_value for size in g.graph.input[0].type.tensor_type.shape.dim] for g in graphs]
    assert sizes == [["batch", 3, model.image_size, model.image_size], ["batch", "tokens"]]
    check_images(model, encoders[0])
    check_texts(model, encoders[1], captions)


class _Frozen(nn.Module):
    """A tower that asks for the length of its batch, as torch code often does."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[torch.arange(len(x))]


@needs_onnx
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_graph_of_one_batch_size_is_refused() -> None:
    from mobileclip_student.onnx_graphs import image_graph

    with pytest.raises(RuntimeError, match="_Frozen fixes batch"):
        image_graph(_Frozen(), 8)
