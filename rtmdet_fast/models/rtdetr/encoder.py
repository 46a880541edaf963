"""The hybrid encoder of RT-DETR (arXiv:2304.08069, section 4.2): attention on stride 32, convolutions across scales.

Legend: B images, H × W of a map, C channels, T tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rtmdet_fast.models.rtdetr.layers import ConvNorm, FoldedConv, SelfAttention, activate, made_once


@made_once
def position_embedding(
    height: int, width: int, channels: int, device: torch.device, *, published: bool = False
) -> Tensor:
    """Sines and cosines [H·W, C] of the row, then of the column, of each token, row by row.

    The published code lays rows out as if the map were turned, which is the same for squares alone; `published` does
    likewise.
    """
    if published:
        token = torch.arange(height * width, device=device)
        places = token // height, token % height
    else:
        rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
        places = rows[:, None].expand(-1, width).flatten(), columns.expand(height, -1).flatten()
    omega = 10000.0 ** -(torch.arange(channels // 4, dtype=torch.float32, device=device) / (channels // 4))
    row, column = (place[:, None] * omega for place in places)
    return torch.cat((row.sin(), row.cos(), column.sin(), column.cos()), 1)


class EncoderLayer(nn.Module):
    """Self-attention, then two linear layers with GELU, each with a LayerNorm after its sum."""

    def __init__(self, channels: int, feedforward: int):
        super().__init__()
        self.self_attn = SelfAttention(channels, 8)
        self.linear1, self.linear2 = nn.Linear(channels, feedforward), nn.Linear(feedforward, channels)
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        x = self.norm1(x + self.self_attn(x, position))
        return self.norm2(x + self.linear2(F.gelu(self.linear1(x))))


class RepVGGBlock(nn.Module):
    """SiLU of the sum of a 3×3 and a 1×1 convolution, each with its BatchNorm."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1, self.conv2 = ConvNorm(channels, channels, 3), ConvNorm(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return activate(self.conv1(x) + self.conv2(x), "silu")

    def folded(self) -> FoldedConv:
        """The same in eval mode, as one 3×3 convolution with a bias."""
        conv, point = self.conv1.fused(), self.conv2.fused()
        conv.weight += F.pad(point.weight, (1, 1, 1, 1))
        assert conv.bias is not None and point.bias is not None
        conv.bias += point.bias
        return FoldedConv(conv, "silu")


class CSPRepLayer(nn.Module):
    """Three RepVGG blocks beside a 1×1 convolution, on `expansion` of the output's channels."""

    def __init__(self, in_channels: int, out_channels: int, expansion: float):
        super().__init__()
        width = int(out_channels * expansion)
        self.conv1, self.conv2 = (ConvNorm(in_channels, width, activation="silu") for _ in range(2))
        self.bottlenecks = nn.Sequential(*(RepVGGBlock(width) for _ in range(3)))
        self.conv3 = nn.Identity() if width == out_channels else ConvNorm(width, out_channels, activation="silu")

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(self.bottlenecks(self.conv1(x)) + self.conv2(x))


class HybridEncoder(nn.Module):
    """Features of strides 8, 16, 32 with `in_channels` → the same strides, each with `channels`.

    input_names: of the two parts of each input projection in the state_dict.
    published_position_embedding: see `position_embedding`.
    """

    def __init__(
        self,
        in_channels: tuple[int, int, int],
        channels: int,
        feedforward: int,
        expansion: float,
        num_layers: int,
        input_names: tuple[str, str],
        *,
        published_position_embedding: bool = False,
    ):
        super().__init__()
        self.published_position_embedding = published_position_embedding
        self.input_proj = nn.ModuleList(ConvNorm(c, channels, names=input_names) for c in in_channels)
        layers = nn.ModuleList(EncoderLayer(channels, feedforward) for _ in range(num_layers))
        self.encoder = nn.ModuleList([nn.ModuleDict({"layers": layers})])  # for the published names

        def csp() -> CSPRepLayer:
            return CSPRepLayer(2 * channels, channels, expansion)

        self.lateral_convs = nn.ModuleList(ConvNorm(channels, channels, activation="silu") for _ in range(2))
        self.fpn_blocks = nn.ModuleList(csp() for _ in range(2))
        self.downsample_convs = nn.ModuleList(ConvNorm(channels, channels, 3, 2, activation="silu") for _ in range(2))
        self.pan_blocks = nn.ModuleList(csp() for _ in range(2))

    def forward(self, features: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        low, mid, high = (project(x) for project, x in zip(self.input_proj, features, strict=True))
        high = self.lateral_convs[0](self._attend(high))
        mid = self.fpn_blocks[0](torch.cat((F.interpolate(high, scale_factor=2.0), mid), 1))
        mid = self.lateral_convs[1](mid)
        low = self.fpn_blocks[1](torch.cat((F.interpolate(mid, scale_factor=2.0), low), 1))
        mid = self.pan_blocks[0](torch.cat((self.downsample_convs[0](low), mid), 1))
        high = self.pan_blocks[1](torch.cat((self.downsample_convs[1](mid), high), 1))
        return low, mid, high

    def _attend(self, x: Tensor) -> Tensor:
        """Attention among the cells of a map [B, C, H, W]."""
        height, width = x.shape[2:]
        tokens = x.flatten(2).transpose(1, 2)
        published = self.published_position_embedding
        position = position_embedding(height, width, x.shape[1], x.device, published=published).to(x.dtype)
        for layer in self.encoder.get_submodule("0.layers").children():
            tokens = layer(tokens, position)
        return tokens.transpose(1, 2).unflatten(2, (height, width))
