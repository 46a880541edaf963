"""CSPNeXtPAFPN, the neck of RTMDet: top-down, then bottom-up, with CSPNeXt blocks (arXiv:2212.07784)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rtmdet_fast.models.rtmdet.layers import ConvModule, CSPLayer, conv3x3


class CSPNeXtPAFPN(nn.Module):
    """Features of strides 8, 16, 32 with `in_channels` → the same strides, each with `out_channels`."""

    def __init__(
        self, in_channels: tuple[int, int, int], out_channels: int, num_blocks: int, *, separable: bool = False
    ):
        super().__init__()
        low, mid, high = in_channels

        def csp(channels_in: int, channels_out: int) -> CSPLayer:
            return CSPLayer(channels_in, channels_out, num_blocks, identity=False, separable=separable)

        self.reduce_layers = nn.ModuleList((ConvModule(high, mid, 1), ConvModule(mid, low, 1)))
        self.top_down_blocks = nn.ModuleList((csp(2 * mid, mid), csp(2 * low, low)))
        self.downsamples = nn.ModuleList(conv3x3(c, c, 2, separable=separable) for c in (low, mid))
        self.bottom_up_blocks = nn.ModuleList((csp(2 * low, mid), csp(2 * mid, high)))
        self.out_convs = nn.ModuleList(conv3x3(c, out_channels, separable=separable) for c in in_channels)

    def forward(self, features: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        low, mid, high = features
        high = self.reduce_layers[0](high)
        mid = self.top_down_blocks[0](torch.cat((F.interpolate(high, scale_factor=2.0), mid), 1))
        mid = self.reduce_layers[1](mid)
        low = self.top_down_blocks[1](torch.cat((F.interpolate(mid, scale_factor=2.0), low), 1))
        mid = self.bottom_up_blocks[0](torch.cat((self.downsamples[0](low), mid), 1))
        high = self.bottom_up_blocks[1](torch.cat((self.downsamples[1](mid), high), 1))
        out_low, out_mid, out_high = self.out_convs
        return out_low(low), out_mid(mid), out_high(high)
