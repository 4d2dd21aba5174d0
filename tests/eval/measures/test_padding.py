from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from eval.measures.padding import EXACT_COSINE, padding_cosines
from eval.towers.features import Encoding
from longclip_teacher import create_teacher
from longclip_teacher.errors import InputError
from mobileclip_student import MobileCLIP, create_student
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


def test_padding_where_there_is_none() -> None:
    assert padding_cosines(student(context_length=32), SHORT) == []
    with pytest.raises(InputError, match="no caption of at most 77 tokens"):
        padding_cosines(student(), ["word " * 90])
