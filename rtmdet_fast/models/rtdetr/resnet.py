"""PResNet, variant d: ResNet with a stem of three 3×3 convolutions and shortcuts that average before they project."""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from rtmdet_fast.models.rtdetr.layers import ConvNorm


def _shortcut(in_channels: int, out_channels: int, stride: int, *, frozen: bool) -> nn.Module:
    conv = ConvNorm(in_channels, out_channels, frozen=frozen)
    if stride == 1:
        return conv
    return nn.Sequential(OrderedDict(pool=nn.AvgPool2d(2, 2, ceil_mode=True), conv=conv))


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, *, project: bool, frozen: bool):
        super().__init__()
        self.short = _shortcut(in_channels, width, stride, frozen=frozen) if project else nn.Identity()
        self.branch2a = ConvNorm(in_channels, width, 3, stride, activation="relu", frozen=frozen)
        self.branch2b = ConvNorm(width, width, 3, frozen=frozen)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch2b(self.branch2a(x)) + self.short(x), inplace=True)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, *, project: bool, frozen: bool):
        super().__init__()
        self.branch2a = ConvNorm(in_channels, width, activation="relu", frozen=frozen)
        self.branch2b = ConvNorm(width, width, 3, stride, activation="relu", frozen=frozen)
        self.branch2c = ConvNorm(width, 4 * width, frozen=frozen)
        self.short = _shortcut(in_channels, 4 * width, stride, frozen=frozen) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch2c(self.branch2b(self.branch2a(x))) + self.short(x), inplace=True)


class PResNet(nn.Module):
    """Image [B, 3, H, W] → features of strides 8, 16, 32 with `out_channels`.

    `frozen`, as published for bottlenecks: every BatchNorm keeps what was loaded, and the stem is not trained.
    """

    def __init__(self, depths: tuple[int, int, int, int], *, bottleneck: bool, frozen: bool):
        super().__init__()
        block = Bottleneck if bottleneck else BasicBlock
        self.conv1 = nn.Sequential(
            OrderedDict(
                conv1_1=ConvNorm(3, 32, 3, 2, activation="relu", frozen=frozen),
                conv1_2=ConvNorm(32, 32, 3, activation="relu", frozen=frozen),
                conv1_3=ConvNorm(32, 64, 3, activation="relu", frozen=frozen),
            )
        )
        self.res_layers = nn.ModuleList()
        channels = 64
        for stage, depth in enumerate(depths):
            width = 64 << stage
            blocks = nn.Sequential()
            for i in range(depth):
                stride = 2 if stage and not i else 1
                blocks.append(block(channels, width, stride, project=not i, frozen=frozen))
                channels = width * block.expansion
            self.res_layers.append(nn.ModuleDict({"blocks": blocks}))  # for the published names
        self.out_channels = channels // 4, channels // 2, channels
        self.conv1.requires_grad_(not frozen)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        x = F.max_pool2d(self.conv1(images), 3, 2, 1)
        features = []
        for stage in self.res_layers:
            x = stage.get_submodule("blocks")(x)
            features.append(x)
        return tuple(features[1:])
