"""HGNetv2: blocks that concatenate the outputs of all their layers, with depth-wise ones in the deep stages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rtmdet_fast.models.rtdetr.layers import Activation, ConvNorm

LAYERS = 6
"""Of a block."""


@dataclass(frozen=True)
class Stage:
    """Channels in, within a block and out; blocks; whether layers are light ones."""

    in_channels: int
    width: int
    out_channels: int
    blocks: int
    light: bool = False


def _conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int = 1,
    *,
    groups: int = 1,
    activation: Activation | None = "relu",
) -> ConvNorm:
    return ConvNorm(
        in_channels,
        out_channels,
        kernel_size,
        stride,
        groups=groups,
        activation=activation,
        frozen=True,
        names=("conv", "bn"),
    )


class HGStem(nn.Module):
    """Image → stride 4."""

    def __init__(self, width: int, out_channels: int):
        super().__init__()
        self.stem1 = _conv(3, width, 3, 2)
        self.stem2a = _conv(width, width // 2, 2)
        self.stem2b = _conv(width // 2, width, 2)
        for layer in (self.stem2a, self.stem2b):  # published keys count the padding as a layer of its own
            layer.conv = nn.Sequential(nn.Identity(), layer.get_submodule("conv"))
        self.stem3 = _conv(2 * width, width, 3, 2)
        self.stem4 = _conv(width, out_channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = F.pad(self.stem1(images), (0, 1, 0, 1))
        branch = self.stem2b(F.pad(self.stem2a(x), (0, 1, 0, 1)))
        return self.stem4(self.stem3(torch.cat((F.max_pool2d(x, 2, 1), branch), 1)))


class LightConv(nn.Module):
    """Point-wise without activation, then depth-wise."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        self.conv1 = _conv(in_channels, out_channels, 1, activation=None)
        self.conv2 = _conv(out_channels, out_channels, kernel_size, groups=out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))


class HGBlock(nn.Module):
    """`LAYERS` convolutions in a row; their outputs and the input side by side are squeezed, then excited."""

    def __init__(self, in_channels: int, width: int, out_channels: int, *, light: bool, identity: bool):
        super().__init__()
        self.layers = nn.ModuleList(
            LightConv(width if i else in_channels, width, 5) if light else _conv(width if i else in_channels, width, 3)
            for i in range(LAYERS)
        )
        self.aggregation_squeeze_conv = _conv(in_channels + LAYERS * width, out_channels // 2, 1)
        self.aggregation_excitation_conv = _conv(out_channels // 2, out_channels, 1)
        self.identity = identity

    def forward(self, x: Tensor) -> Tensor:
        outputs = [x]
        for layer in self.layers:
            outputs.append(layer(outputs[-1]))
        y = self.aggregation_excitation_conv(self.aggregation_squeeze_conv(torch.cat(outputs, 1)))
        return y + x if self.identity else y


class HGNetv2(nn.Module):
    """Image [B, 3, H, W] → features of strides 8, 16, 32 with `out_channels`.

    As published, every BatchNorm keeps what was loaded, and the convolutions of the stem are not trained.
    """

    def __init__(self, stem: tuple[int, int], stages: tuple[Stage, Stage, Stage, Stage]):
        """stem: channels within it and out."""
        super().__init__()
        self.stem = HGStem(*stem)
        self.stages = nn.ModuleList()
        for i, stage in enumerate(stages):
            parts = nn.ModuleDict()
            if i:
                parts["downsample"] = _conv(
                    stage.in_channels, stage.in_channels, 3, 2, groups=stage.in_channels, activation=None
                )
            parts["blocks"] = nn.Sequential(
                *(
                    HGBlock(
                        stage.out_channels if j else stage.in_channels,
                        stage.width,
                        stage.out_channels,
                        light=stage.light,
                        identity=j > 0,
                    )
                    for j in range(stage.blocks)
                )
            )
            self.stages.append(parts)
        self.out_channels = stages[1].out_channels, stages[2].out_channels, stages[3].out_channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        self.stem.requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(images)
        features = []
        for stage in self.stages:
            for part in stage.children():
                x = part(x)
            features.append(x)
        return tuple(features[1:])
