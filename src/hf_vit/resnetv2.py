"""The ResNet stem of the hybrid models: weight-standardised convolutions and group normalisation.

The reference calls it ResNetV2, but its unit is the bottleneck of ResNet v1.5: activation after the sum, stride on the
3x3 convolution. Shapes: B images, C channels, H and W pixels.

Source: vit_jax/models_resnet.py (c6de1e5).
"""

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init


class StdConv2d(nn.Conv2d):
    """A convolution without bias whose kernel is standardised over (input channels, height, width), padded as XLA.

    Args:
        eps: Added to the standard deviation, or to the variance where `eps_in_root`.

    Source: models_resnet.py, StdConv and weight_standardize.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        eps: float = 1e-5,
        eps_in_root: bool = False,
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, bias=False)
        self.eps = eps
        self.eps_in_root = eps_in_root

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        input = pad_same(input, self.kernel_size[0], self.stride[0])
        return F.conv2d(input, self.standardized_weight(), stride=self.stride)  # (B, C', ceil(H / s), ceil(W / s))

    def standardized_weight(self) -> torch.Tensor:
        """Return the kernel with mean 0 and standard deviation 1 for each output channel."""
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        scale = (variance + self.eps).sqrt() if self.eps_in_root else variance.sqrt() + self.eps
        return (self.weight - mean) / scale


class Bottleneck(nn.Module):
    """One residual unit: 1x1, 3x3 (with the stride) and 1x1 convolutions, each with its GroupNorm.

    Source: models_resnet.py, ResidualUnit.
    """

    def __init__(self, in_channels: int, channels: int, *, stride: int, norm_eps: float, **conv):
        super().__init__()
        out_channels = 4 * channels
        self.conv1 = StdConv2d(in_channels, channels, 1, **conv)
        self.gn1 = nn.GroupNorm(32, channels, eps=norm_eps)
        self.conv2 = StdConv2d(channels, channels, 3, stride=stride, **conv)
        self.gn2 = nn.GroupNorm(32, channels, eps=norm_eps)
        self.conv3 = StdConv2d(channels, out_channels, 1, **conv)
        self.gn3 = nn.GroupNorm(32, out_channels, eps=norm_eps)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = StdConv2d(in_channels, out_channels, 1, stride=stride, **conv)
            self.gn_proj = nn.GroupNorm(32, out_channels, eps=norm_eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = x if self.downsample is None else self.gn_proj(self.downsample(x))
        x = F.relu(self.gn1(self.conv1(x)))
        x = F.relu(self.gn2(self.conv2(x)))
        return F.relu(residual + self.gn3(self.conv3(x)))  # (B, 4C, ceil(H / s), ceil(W / s))


class Root(nn.Module):
    """The first convolution (7x7, stride 2) and the max pooling (3x3, stride 2): a quarter of the size."""

    def __init__(self, in_channels: int, channels: int, *, norm_eps: float, **conv):
        super().__init__()
        self.conv = StdConv2d(in_channels, channels, 7, stride=2, **conv)
        self.gn = nn.GroupNorm(32, channels, eps=norm_eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.gn(self.conv(x)))
        return F.max_pool2d(pad_same(x, 3, 2), 3, stride=2)  # zeros pad as -inf would: nothing is below 0


class ResNetV2(nn.Module):
    """The stem: a root, then the stages of bottlenecks, each but the first halving the size.

    Args:
        layers: Units in each stage; empty for the root alone.
        width: Channels of the root (64 times the reference's width factor).
        norm_eps: Epsilon of every GroupNorm (32 groups).
        conv: `eps` and `eps_in_root` of every `StdConv2d`.

    Source: models_resnet.py, ResNetStage; models_vit.py, VisionTransformer.__call__.
    """

    def __init__(self, in_channels: int, layers: list[int] | tuple[int, ...], width: int, *, norm_eps: float, **conv):
        super().__init__()
        self.root = Root(in_channels, width, norm_eps=norm_eps, **conv)
        stages, channels = OrderedDict(), width
        for i, num_units in enumerate(layers):
            units = OrderedDict()
            for j in range(num_units):
                stride = 2 if i > 0 and j == 0 else 1
                units[f"unit{j + 1}"] = Bottleneck(channels, width * 2**i, stride=stride, norm_eps=norm_eps, **conv)
                channels = 4 * width * 2**i
            stages[f"block{i + 1}"] = nn.Sequential(units)
        self.body = nn.Sequential(stages)
        self.out_channels = channels

    @classmethod
    def from_config(cls, config: Any) -> "ResNetV2":
        """Return the stem that an `HfViTConfig` describes."""
        return cls(
            config.num_channels,
            config.resnet_layers,
            int(64 * config.resnet_width_factor),
            norm_eps=config.resnet_norm_eps,
            eps=config.resnet_conv_eps,
            eps_in_root=config.resnet_conv_eps_in_root,
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.body(self.root(pixel_values))  # (B, C, ceil(H / stride), ceil(W / stride))


def initialize_stem(stem: ResNetV2) -> None:
    """Initialise the kernels of a stem; the last norm of each unit starts at zero.

    Source: models_resnet.py, ResidualUnit.
    """
    for module in stem.modules():
        if isinstance(module, StdConv2d):
            lecun_normal_(module.weight)
        elif isinstance(module, Bottleneck):
            init.zeros_(module.gn3.weight)


def lecun_normal_(weight: torch.Tensor) -> None:
    """Fill as flax's lecun_normal: variance 1 / fan_in, cut at two standard deviations (transformers' is not cut)."""
    std = weight[0].numel() ** -0.5 / 0.87962566103423978
    init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def pad_same(x: torch.Tensor, kernel_size: int, stride: int) -> torch.Tensor:
    """Pad (B, C, H, W) with zeros so that a window of `kernel_size` gives ceil(H / stride) rows, as XLA's SAME does.

    The odd pixel goes below and to the right: 7x7 with stride 2 pads an even side by 2 and 3.
    """
    if kernel_size == 1:
        return x
    height, width = ((-(-n // stride) - 1) * stride + kernel_size - n for n in x.shape[-2:])
    if kernel_size < stride:  # never here; elsewhere max() would only hinder exporters of any image size
        height, width = max(height, 0), max(width, 0)
    return F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))


__all__ = ["ResNetV2", "StdConv2d", "initialize_stem", "lecun_normal_", "pad_same"]
