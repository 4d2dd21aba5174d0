"""The RepMixer block over tokens: the convolutional part of MobileCLIP's hybrid text tower, exact under padding.

A depthwise convolution mixes neighbouring tokens, a convolutional FFN mixes channels (MobileCLIP, section 4.2; FastViT,
section 3.1). Padding could leak in two ways: through the kernel, so pads are zeroed before each convolution, and
through the BatchNorm statistics, so these are taken over real tokens only.

Shapes: B captions, L tokens, C channels, K kernel width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

__all__ = [
    "LayerScale",
    "RepMixer",
    "RepMixerBlock",
    "TokenBatchNorm",
    "TokenConv",
    "TokenGroup",
    "TokenStatistics",
    "take_tokens",
]


class TokenGroup(NamedTuple):
    """Captions padded to one length. The groups of a forward pass share their BatchNorm statistics."""

    x: Float[Tensor, "B L C"]
    valid: Bool[Tensor, "B L"] | None
    """Which tokens are real; None: all of them."""


class TokenStatistics(NamedTuple):
    """Moments of each channel over a batch's real tokens, in fp32 or better."""

    mean: Float[Tensor, " C"]
    variance: Float[Tensor, " C"]  # biased
    num_tokens: Float[Tensor, ""]  # real ones


def token_statistics(groups: Sequence[TokenGroup]) -> TokenStatistics:
    """Mean and biased variance over the real tokens of all groups together, differentiable."""
    parts = [_group_statistics(x, valid) for x, valid in groups]
    if len(parts) == 1:
        return parts[0]
    counts = torch.stack([part.num_tokens for part in parts])
    shares = (counts / counts.sum())[:, None]
    means, variances = (torch.stack(values) for values in ([p.mean for p in parts], [p.variance for p in parts]))
    mean = (shares * means).sum(dim=0)
    return TokenStatistics(mean, (shares * (variances + (means - mean).square())).sum(dim=0), counts.sum())


def _group_statistics(x: Float[Tensor, "B L C"], valid: Bool[Tensor, "B L"] | None) -> TokenStatistics:
    tokens = x.flatten(0, 1)
    tokens = tokens.float() if tokens.dtype in (torch.float16, torch.bfloat16) else tokens
    weights = tokens.new_ones(len(tokens)) if valid is None else valid.flatten().to(tokens)
    count = weights.sum()
    weights = weights / count
    with torch.autocast(x.device.type, enabled=False):  # autocast would round the sums, which are matrix products
        mean = weights @ tokens
        variance = weights @ (tokens - mean).square()
    return TokenStatistics(mean, variance, count)


class TokenBatchNorm(nn.Module):
    """BatchNorm over real tokens, given as the affine map of each channel: y = scale * x + shift.

    In evaluation, and in training without pads, this is `nn.BatchNorm1d` over the tokens. It is not a subclass, so
    `convert_sync_batchnorm` leaves it alone and each process keeps the statistics of its own captions.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_features: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def affine(self, statistics: TokenStatistics | None = None) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"]]:
        """(scale, shift) that normalise with `statistics` and update the running ones; None normalises with the running
        ones."""
        if statistics is None:
            mean, variance = self.running_mean, self.running_var
        else:
            mean, variance = statistics.mean, statistics.variance
            self._track(statistics)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return scale, self.bias - mean * scale

    @torch.no_grad()
    def _track(self, statistics: TokenStatistics) -> None:
        count = statistics.num_tokens
        unbiased = statistics.variance * (count / (count - 1).clamp(min=1))
        self.running_mean.lerp_(statistics.mean.to(self.running_mean), self.momentum)
        self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)
        self.num_batches_tracked += 1


class TokenConv(nn.Conv2d):
    """Depthwise convolution over tokens that keeps their number. Pads must be zero in the input.

    A 1 x K Conv2d on a channels-last view: [B, L, C] goes in and out without a copy (a Conv1d makes two).
    """

    def __init__(self, channels: int, kernel_size: int, *, bias: bool) -> None:
        super().__init__(
            channels, channels, (1, kernel_size), padding=(0, kernel_size // 2), groups=channels, bias=bias
        )

    def forward(self, x: Float[Tensor, "B L C"]) -> Float[Tensor, "B L C"]:
        return super().forward(x.transpose(1, 2).unsqueeze(2)).squeeze(2).transpose(1, 2)

    def mix(self, groups: Sequence[TokenGroup]) -> list[Float[Tensor, "B L C"]]:
        """The fused form of a RepMixer or a NormalizedConv."""
        return [self(group.x) for group in groups]

    @classmethod
    def from_weights(cls, weight: Float[Tensor, "C 1 1 K"], bias: Float[Tensor, " C"]) -> TokenConv:
        conv = cls(weight.shape[0], weight.shape[3], bias=True).to(weight)
        conv.load_state_dict({"weight": weight, "bias": bias})
        return conv


class NormalizedConv(nn.Module):
    """A token convolution and its BatchNorm."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = TokenConv(channels, kernel_size, bias=False)
        self.norm = TokenBatchNorm(channels)

    def mix(self, groups: Sequence[TokenGroup]) -> list[Float[Tensor, "B L C"]]:
        """Convolve and normalise each group; in training, with the statistics of all groups."""
        mixed = [self.conv(group.x) for group in groups]
        scale, shift = self.norm.affine(_statistics(mixed, groups) if self.training else None)
        return [torch.addcmul(shift, y, scale) for y in mixed]

    @torch.no_grad()
    def fused(self) -> TokenConv:
        """The same map, with the running statistics, as one convolution."""
        scale, shift = self.norm.affine()
        return TokenConv.from_weights(self.conv.weight * scale[:, None, None, None], shift)


class RepMixer(nn.Module):
    """Token mixer x + g * (BN(conv(x)) + BN_skip(x) - BN_norm(x)), with g the layer scale (FastViT, equation 2)."""

    def __init__(self, channels: int, kernel_size: int, layer_scale: float) -> None:
        super().__init__()
        self.conv = TokenConv(channels, kernel_size, bias=False)
        self.conv_norm = TokenBatchNorm(channels)
        self.skip_norm = TokenBatchNorm(channels)
        self.norm = TokenBatchNorm(channels)
        self.layer_scale = LayerScale(channels, layer_scale)

    def mix(self, groups: Sequence[TokenGroup]) -> list[Float[Tensor, "B L C"]]:
        """Mix neighbouring tokens of each group; in training, with the statistics of all groups."""
        mixed = [self.conv(group.x) for group in groups]
        of_x = token_statistics(groups) if self.training else None  # both BatchNorms of x see the same tokens
        of_mixed = _statistics(mixed, groups) if self.training else None
        x_scale, mixed_scale, shift = self._affine(of_x, of_mixed)
        return [
            torch.addcmul(torch.addcmul(shift, group.x, x_scale), y, mixed_scale)
            for group, y in zip(groups, mixed, strict=True)
        ]

    @torch.no_grad()
    def fused(self) -> TokenConv:
        """The same map, with the running statistics, as one convolution."""
        x_scale, mixed_scale, shift = self._affine(None, None)
        weight = self.conv.weight * mixed_scale[:, None, None, None]
        weight[:, 0, 0, weight.shape[3] // 2] += x_scale  # the centre tap reads x itself
        return TokenConv.from_weights(weight, shift)

    def _affine(
        self, of_x: TokenStatistics | None, of_mixed: TokenStatistics | None
    ) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"], Float[Tensor, " C"]]:
        """The block as y = x_scale * x + mixed_scale * conv(x) + shift."""
        mixed_scale, mixed_shift = self.conv_norm.affine(of_mixed)
        skip_scale, skip_shift = self.skip_norm.affine(of_x)
        norm_scale, norm_shift = self.norm.affine(of_x)
        gamma = self.layer_scale.gamma
        x_scale = 1 + gamma * (skip_scale - norm_scale)
        return x_scale, gamma * mixed_scale, gamma * (mixed_shift + skip_shift - norm_shift)


class LayerScale(nn.Module):
    """A learned factor per channel."""

    def __init__(self, channels: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), init))

    def forward(self, x: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        return x * self.gamma


class RepMixerBlock(nn.Module):
    """RepMixer, then a convolutional FFN: x + g * fc2(GELU(fc1(BN(conv(x)))))."""

    def __init__(self, channels: int, *, kernel_size: int, mlp_ratio: float, layer_scale: float) -> None:
        super().__init__()
        hidden = int(channels * mlp_ratio)
        self.token_mixer: RepMixer | TokenConv = RepMixer(channels, kernel_size, layer_scale)
        self.ffn_conv: NormalizedConv | TokenConv = NormalizedConv(channels, kernel_size)
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)
        self.layer_scale: LayerScale | nn.Identity = LayerScale(channels, layer_scale)

    def forward(self, groups: Sequence[TokenGroup], pooled: Sequence[Int[Tensor, " B"]] | None = None) -> list[Tensor]:
        """[B, L, C] of each group; with `pooled`, only each caption's token at that index, [B, C] of each group."""
        valids = [group.valid for group in groups]
        clean = [TokenGroup(_zero_pads(x, valid), valid) for x, valid in groups]
        xs = [_zero_pads(x, valid) for x, valid in zip(self.token_mixer.mix(clean), valids, strict=True)]
        mixed = self.ffn_conv.mix([TokenGroup(x, valid) for x, valid in zip(xs, valids, strict=True)])
        if pooled is not None:  # the FFN works token by token
            xs, mixed = ([take_tokens(t, at) for t, at in zip(ts, pooled, strict=True)] for ts in (xs, mixed))
        return [x + self.layer_scale(self.fc2(F.gelu(self.fc1(y)))) for x, y in zip(xs, mixed, strict=True)]

    @torch.no_grad()
    def fuse(self) -> None:
        """Fold branches, BatchNorms and layer scales into two convolutions and `fc2`, in place, for inference."""
        assert isinstance(self.token_mixer, RepMixer) and isinstance(self.ffn_conv, NormalizedConv)
        assert isinstance(self.layer_scale, LayerScale)
        self.token_mixer = self.token_mixer.fused()
        self.ffn_conv = self.ffn_conv.fused()
        self.fc2.weight.mul_(self.layer_scale.gamma[:, None])
        self.fc2.bias.mul_(self.layer_scale.gamma)
        self.layer_scale = nn.Identity()


def take_tokens(x: Float[Tensor, "B L C"], index: Int[Tensor, " B"]) -> Float[Tensor, "B C"]:
    """The token at each caption's index."""
    return x[torch.arange(x.shape[0], device=x.device), index]  # len(x) would fix the batch of an exported graph


def _statistics(mixed: Sequence[Tensor], groups: Sequence[TokenGroup]) -> TokenStatistics:
    """Statistics of `mixed` over the tokens that are real in `groups`."""
    return token_statistics([TokenGroup(y, group.valid) for y, group in zip(mixed, groups, strict=True)])


def _zero_pads(x: Float[Tensor, "B L C"], valid: Bool[Tensor, "B L"] | None) -> Float[Tensor, "B L C"]:
    return x if valid is None else x * valid.unsqueeze(2)
