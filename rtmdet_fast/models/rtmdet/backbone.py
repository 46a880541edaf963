"""CSPNeXt, the backbone of RTMDet (arXiv:2212.07784, section 3.2)."""

from __future__ import annotations

from torch import Tensor, nn

from rtmdet_fast.models.rtmdet.layers import ConvModule, CSPLayer, SPPBottleneck, conv3x3


class CSPNeXt(nn.Module):
    """Image [B, 3, H, W] → features of strides 8, 16, 32: [B, 256w, H/8, W/8], 512w, 1024w (w = `widen`)."""

    def __init__(self, deepen: float, widen: float, *, separable: bool = False):
        super().__init__()
        stem, *widths = (int(width * widen) for width in (64, 128, 256, 512, 1024))
        half = int(64 * widen // 2)

        def stage(in_channels: int, width: int, blocks: int, *, last: bool = False) -> nn.Sequential:
            down = conv3x3(in_channels, width, 2, separable=separable)
            pyramid = [SPPBottleneck(width)] if last else []
            blocks = max(round(blocks * deepen), 1)
            csp = CSPLayer(width, width, blocks, identity=not last, attention=True, separable=separable)
            return nn.Sequential(down, *pyramid, csp)

        self.stem = nn.Sequential(
            ConvModule(3, half, 3, stride=2), ConvModule(half, half, 3), ConvModule(half, stem, 3)
        )
        self.stage1 = stage(stem, widths[0], 3)
        self.stage2 = stage(widths[0], widths[1], 6)
        self.stage3 = stage(widths[1], widths[2], 6)
        self.stage4 = stage(widths[2], widths[3], 3, last=True)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.stage1(self.stem(images))
        stride8 = self.stage2(x)
        stride16 = self.stage3(stride8)
        return stride8, stride16, self.stage4(stride16)
