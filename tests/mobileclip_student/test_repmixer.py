"""BatchNorm and RepMixer over tokens, against PyTorch's own modules on only the real tokens."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mobileclip_student.repmixer import RepMixerBlock, TokenBatchNorm, TokenConv, TokenGroup, token_statistics

CHANNELS = 6


def _norms(seed: int = 0) -> tuple[TokenBatchNorm, nn.BatchNorm1d]:
    torch.manual_seed(seed)
    theirs = nn.BatchNorm1d(CHANNELS).double()
    for tensor in (theirs.weight, theirs.bias, theirs.running_mean, theirs.running_var):
        nn.init.uniform_(tensor, 0.5, 1.5)
    ours = TokenBatchNorm(CHANNELS).double()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("masked", [False, True])
def test_batch_norm_equals_pytorch_on_the_real_tokens(masked: bool) -> None:
    ours, theirs = _norms()
    x = torch.randn(4, 9, CHANNELS, dtype=torch.float64)
    valid = torch.arange(9) < torch.tensor([9, 3, 1, 6])[:, None] if masked else torch.ones(4, 9, dtype=torch.bool)
    upstream = torch.randn(int(valid.sum()), CHANNELS, dtype=torch.float64)
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()

    scale, shift = ours.affine(token_statistics([TokenGroup(x_ours, valid if masked else None)]))
    y_ours = (x_ours * scale + shift)[valid]
    y_theirs = theirs(x_theirs[valid])
    y_ours.backward(upstream)
    y_theirs.backward(upstream)

    torch.testing.assert_close(y_ours, y_theirs)
    torch.testing.assert_close(x_ours.grad, x_theirs.grad)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(dict(ours.named_buffers())[name], buffer)


def test_batch_norm_in_evaluation_equals_pytorch() -> None:
    ours, theirs = _norms()
    x = torch.randn(20, CHANNELS, dtype=torch.float64)
    scale, shift = ours.affine()
    torch.testing.assert_close(x * scale + shift, theirs.eval()(x))


def test_statistics_stay_in_fp32_under_autocast() -> None:
    x = 100 + torch.randn(64, 16, CHANNELS)  # bf16 could not even hold the deviations
    with torch.autocast("cpu", torch.bfloat16):
        statistics = token_statistics([TokenGroup(x, None)])
    torch.testing.assert_close(statistics.variance, x.flatten(0, 1).var(0, correction=0), rtol=1e-3, atol=0)


def test_sync_conversion_leaves_the_block_working() -> None:
    block = nn.SyncBatchNorm.convert_sync_batchnorm(_block())
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in block.modules())


def test_convolution_over_tokens_is_conv1d() -> None:
    conv = TokenConv(CHANNELS, 5, bias=True)
    for batch, tokens in ((3, 7), (1, 7), (3, 1), (2, 2)):
        x = torch.randn(batch, tokens, CHANNELS)
        plain = nn.functional.conv1d(x.mT, conv.weight[:, :, 0], conv.bias, padding=2, groups=CHANNELS).mT
        torch.testing.assert_close(conv(x), plain)


def test_gradient_in_training_equals_finite_differences() -> None:
    block = _block().double().train()
    x = torch.randn(2, 5, CHANNELS, dtype=torch.float64, requires_grad=True)
    valid = torch.arange(5) < torch.tensor([5, 3])[:, None]
    assert torch.autograd.gradcheck(lambda x: block([TokenGroup(x, valid)])[0][valid], x)
    assert torch.autograd.gradcheck(lambda x: block([TokenGroup(x, valid)], [torch.tensor([4, 2])])[0], x)


def test_pads_get_no_gradient_and_change_nothing_in_training() -> None:
    x = torch.randn(3, 8, CHANNELS)
    lengths = torch.tensor([5, 2, 4])
    padded = x.clone().requires_grad_()
    wide, tight = _block().train(), _block().train()

    valid = torch.arange(8) < lengths[:, None]
    wide_out = wide([TokenGroup(padded, valid)])[0][valid]
    wide_out.square().sum().backward()
    tight_out = tight([TokenGroup(x[:, :5], valid[:, :5])])[0][valid[:, :5]]

    torch.testing.assert_close(wide_out, tight_out)
    assert padded.grad[~valid].abs().max() == 0 and padded.grad[valid].abs().min() > 0
    for (name, ours), theirs in zip(wide.named_buffers(), tight.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_groups_of_different_lengths_are_one_batch_in_training() -> None:
    """Two groups together give what their captions give padded to one length: outputs and running statistics."""
    x = torch.randn(5, 8, CHANNELS)
    valid = torch.arange(8) < torch.tensor([8, 6, 2, 3, 1])[:, None]
    grouped, joined = _block().train(), _block().train()
    long, short = grouped([TokenGroup(x[:2], valid[:2]), TokenGroup(x[2:, :3], valid[2:, :3])])
    whole = joined([TokenGroup(x, valid)])[0]
    torch.testing.assert_close(long[valid[:2]], whole[:2][valid[:2]])
    torch.testing.assert_close(short[valid[2:, :3]], whole[2:][valid[2:]])
    for (name, ours), theirs in zip(grouped.named_buffers(), joined.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


def _block() -> RepMixerBlock:
    torch.manual_seed(0)
    return RepMixerBlock(CHANNELS, kernel_size=3, mlp_ratio=2, layer_scale=0.7)
