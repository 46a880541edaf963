"""Building blocks of CSPNeXt and RTMDet (arXiv:2212.07784), with the state_dict keys of the published models.

Shapes: x is [B, C, H, W]. Every convolution is followed by BatchNorm and SiLU, which run in one fused kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rtmdet_fast.models.fold import fold_batch_norm
from rtmdet_fast.models.fused import fused_bn_silu


class ConvModule(nn.Module):
    """Convolution (no bias) → BatchNorm → SiLU, plus an optional residual added last.

    `groups == in_channels == out_channels` takes the fused depth-wise kernel. `process_group` set to a
    torch.distributed group makes the batch statistics those of the whole group (SyncBN).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(out_channels)
        self.process_group: torch.distributed.ProcessGroup | None = None
        self.depthwise = groups == in_channels == out_channels and kernel_size in (3, 5, 7) and groups > 1

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.depthwise:
            return fused_bn_silu(x, self.bn, self.conv, residual=residual, process_group=self.process_group)
        return fused_bn_silu(self.conv(x), self.bn, residual=residual, process_group=self.process_group)

    def folded(self) -> FoldedConvModule:
        """The same in eval mode, as one convolution with a bias."""
        return FoldedConvModule(fold_batch_norm(self.conv, self.bn))


class FoldedConvModule(nn.Module):
    """Convolution with a bias → SiLU, plus an optional residual added last."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = F.silu(self.conv(x), inplace=True)
        return x if residual is None else x + residual


class DepthwiseSeparableConv(nn.Module):
    """Depth-wise k×k ConvModule, then point-wise 1×1 ConvModule."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1):
        super().__init__()
        self.depthwise_conv = ConvModule(in_channels, in_channels, kernel_size, stride, groups=in_channels)
        self.pointwise_conv = ConvModule(in_channels, out_channels, 1)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.pointwise_conv(self.depthwise_conv(x), residual)


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, *, separable: bool = False) -> nn.Module:
    """A dense 3×3 ConvModule, or the depth-wise separable one that the nano model has in its place."""
    if separable:
        return DepthwiseSeparableConv(in_channels, out_channels, 3, stride)
    return ConvModule(in_channels, out_channels, 3, stride)


class CSPNeXtBlock(nn.Module):
    """3×3 → depth-wise 5×5 → 1×1, with an identity around it in the backbone (figure 3b of the paper)."""

    def __init__(self, channels: int, *, identity: bool, separable: bool = False):
        super().__init__()
        self.conv1 = conv3x3(channels, channels, separable=separable)
        self.conv2 = DepthwiseSeparableConv(channels, channels, 5)
        self.identity = identity

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x), x if self.identity else None)


class ChannelAttention(nn.Module):
    """Scale each channel by the hard sigmoid of a 1×1 convolution of the global mean."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.fc(x.mean((2, 3), keepdim=True)))


class CSPLayer(nn.Module):
    """Cross-stage-partial layer: half the channels pass through `num_blocks` CSPNeXt blocks, half pass by."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        *,
        identity: bool,
        attention: bool = False,
        separable: bool = False,
    ):
        super().__init__()
        channels = out_channels // 2
        self.main_conv = ConvModule(in_channels, channels, 1)
        self.short_conv = ConvModule(in_channels, channels, 1)
        self.final_conv = ConvModule(2 * channels, out_channels, 1)
        self.blocks = nn.Sequential(
            *(CSPNeXtBlock(channels, identity=identity, separable=separable) for _ in range(num_blocks))
        )
        self.attention = ChannelAttention(2 * channels) if attention else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((self.blocks(self.main_conv(x)), self.short_conv(x)), 1)
        return self.final_conv(self.attention(x))


class SPPBottleneck(nn.Module):
    """Spatial pyramid pooling: max pools of 5, 9 and 13 pixels of the same half-width input, side by side."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = ConvModule(channels, channels // 2, 1)
        self.conv2 = ConvModule(channels // 2 * 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        # Max pools compose: 9 is 5 after 5, 13 is 5 after 9. Three pools of 5 read 75 values and not 275.
        pool5 = F.max_pool2d(x, 5, 1, 2)
        pool9 = F.max_pool2d(pool5, 5, 1, 2)
        return self.conv2(torch.cat((x, pool5, pool9, F.max_pool2d(pool9, 5, 1, 2)), 1))
