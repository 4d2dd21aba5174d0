"""Fast towers give the features of the plain ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from longclip_teacher import create_teacher
from longclip_teacher.errors import InputError
from longclip_teacher.packages import ONNX, missing_packages
from mobileclip_student import MobileCLIP, create_student
from mobileclip_student import inference as inference_module
from mobileclip_student.inference import choose_backend, compile_towers, fast_image_encoder
from mobileclip_student.model import variant_config

needs_onnx = pytest.mark.skipif(bool(missing_packages(ONNX)), reason="the extra export is not installed")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")


def _distance(ours: Tensor, theirs: Tensor) -> float:
    return float(((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).max())


@pytest.fixture
def student(visible: Callable) -> MobileCLIP:
    torch.manual_seed(0)
    return visible(create_student("tiny", context_length=40))


@pytest.mark.parametrize("backend", ["eager", pytest.param("onnxruntime", marks=needs_onnx), "auto"])
def test_features_equal_those_of_the_train_form(student: MobileCLIP, backend: str) -> None:
    encode = fast_image_encoder(student, backend)
    assert student.training
    images = torch.rand(3, 3, student.image_size, student.image_size)
    with torch.no_grad():
        expected = student.eval().encode_image(images)
    for batch in (images, images[:1], images.contiguous(memory_format=torch.channels_last)):  # any size, any format
        features = encode(batch)
        assert features.dtype == torch.float32 and not features.requires_grad
        assert _distance(features, expected[: len(batch)]) < 1e-5
    assert _distance(encode(images.flip(0)), expected) > 1e-3


@pytest.fixture
def small_student(visible: Callable) -> MobileCLIP:
    """A student with one image block of a few channels, because compiling takes long."""
    torch.manual_seed(0)
    config = variant_config("tiny")
    image = replace(config.image, image_size=32, layers=(1,), embed_dims=(8,))
    return visible(create_student(replace(config, image=image, context_length=40)))


@needs_compiler
def test_compiled_features_equal_those_of_the_train_form(small_student: MobileCLIP) -> None:
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = small_student.eval().encode_image(images)
    assert _distance(fast_image_encoder(small_student, "compile")(images), expected) < 1e-5


def test_compiled_towers_learn_the_same(
    small_student: MobileCLIP, captions: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch.compile captures, forward and backward, is the towers' function at every length; its operations are
    run one by one here, without the minutes of C++."""
    compile_module = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, mode=None, **options: compile_module(self, backend="aot_eager", **options)
    )
    compiled = deepcopy(small_student)
    compile_towers(compiled)
    assert list(compiled.state_dict()) == list(small_student.state_dict())
    assert compiled.image_encoder.trunk._compiled_call_impl is not None
    assert all(block._compiled_call_impl is not None for block in compiled.text_encoder.blocks)
    images = torch.rand(3, 3, small_student.image_size, small_student.image_size)
    for long, short in (((9, 20, 12), (5, 4, 3)), ((40, 7, 9), (6, 9, 8))):
        results = []
        for model in (small_student, compiled):
            model.zero_grad()
            texts = model.encode_texts(captions(*long, width=max(long)), captions(*short, width=max(short)))
            features = torch.cat([model.encode_image_heads(images)[0], *texts])
            features.square().sum().backward()
            grads = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
            results.append((features.detach(), grads))
        (theirs, their_grads), (ours, our_grads) = results
        assert _distance(ours, theirs) < 1e-5
        assert our_grads.keys() == their_grads.keys()
        length = torch.stack([grad.norm() for grad in their_grads.values()]).norm()
        assert all((our_grads[name] - grad).norm() < 1e-5 * length for name, grad in their_grads.items())
    for name, value in small_student.named_buffers():  # BatchNorm's running statistics
        torch.testing.assert_close(compiled.get_buffer(name), value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("dropped", [None, "text", "visual"])
def test_a_teacher_is_compiled_too(dropped: str | None) -> None:
    teacher = create_teacher("tiny")
    if dropped is not None:
        delattr(teacher, dropped)
    names = list(teacher.state_dict())
    compile_towers(teacher)
    assert list(teacher.state_dict()) == names
    if dropped != "visual":
        assert teacher.visual._compiled_call_impl is not None
    if dropped != "text":
        assert all(block._compiled_call_impl is not None for block in teacher.text.transformer.resblocks[:-1])


def test_auto_is_onnxruntime_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference_module, "ONNX", ("torch",))
    assert choose_backend(torch.device("cpu")) == "onnxruntime"
    assert choose_backend(torch.device("cuda")) == "eager"
    monkeypatch.setattr(inference_module, "ONNX", ("torch", "no_such_package"))
    assert choose_backend(torch.device("cpu")) == "eager"


def test_backends_that_cannot_run_here_are_refused(student: MobileCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no backend 'tpu': choose auto"):
        fast_image_encoder(student, "tpu")
    monkeypatch.setattr(inference_module, "ONNX", ("no_such_package",))
    with pytest.raises(InputError, match=r"needs no_such_package: pip install 'compact-longclip\[export\]'"):
        fast_image_encoder(student, "onnxruntime")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="needs a C\\+\\+ compiler"):
        fast_image_encoder(student, "compile")
