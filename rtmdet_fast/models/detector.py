"""What every detector shares."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Targets(NamedTuple):
    """Ground truth of a batch, padded: boxes [B, M, 4] xyxy pixels, labels [B, M] int64, counts [B] int64.

    For masks also centers [B, M, 2], their centres of mass (x, y) in pixels, and masks [B, M, H/4, W/4] uint8, the
    full-size masks sampled at [2::4, 2::4].
    """

    boxes: Tensor
    labels: Tensor
    counts: Tensor
    centers: Tensor | None = None
    masks: Tensor | None = None
