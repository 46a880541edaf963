"""Learning rate, weight decay, weight averaging and image sizes of the published recipes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

WARMUP_START = 1e-5
FINAL_FRACTION = 0.05


def learning_rate_factor(iteration: int, total: int, warmup: int = 1000) -> float:
    """Factor on the base rate: linear warm-up from 1e-5, flat to half, then a cosine per iteration to 5 %."""
    factor = 1.0
    if iteration < warmup - 1:
        factor = WARMUP_START + (1 - WARMUP_START) * iteration / (warmup - 1)
    begin = total // 2
    if iteration > begin:
        cosine = (1 + math.cos(math.pi * min((iteration - begin) / (total - begin), 1.0))) / 2
        factor *= FINAL_FRACTION + (1 - FINAL_FRACTION) * cosine
    return factor


def warmup_factor(iteration: int, total: int, warmup: int) -> float:
    """Factor on the base rate: linear warm-up from 1 / warmup, then 1."""
    return min(1.0, (iteration + 1) / max(warmup, 1))


def random_side(sides: Sequence[int], seed: int, iteration: int, part: int) -> int:
    """That of a batch, the `part`-th of a step: the same in every process, which would wait for each other."""
    return sides[int(np.random.default_rng((seed, 2, iteration, part)).integers(len(sides)))]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on convolution weights only: BatchNorm and biases (one-dimensional) have none."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay, "lr_factor": 1.0},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "lr_factor": 1.0},
    ]


def ema_share(step: int, momentum: float, warmup: float = 2000) -> float:
    """Share of the new weights at a step counted from 0: (1 - m) exp(-(1 + t) / w) + m."""
    return (1 - momentum) * math.exp(-(1 + step) / warmup) + momentum


Model = TypeVar("Model", bound=nn.Module)


class ModelEMA(Generic[Model]):
    """Exponential moving average of all parameters and floating-point buffers of `source`; other buffers are copied.

    `share` gives the share of the new weights at a step counted from 0. A tensor that the head shares between levels is
    averaged once. Tensors are looked for once, not at every step: neither model may be given others afterwards.
    """

    def __init__(self, source: Model, share: Callable[[int], float]):
        self.model: Model = copy.deepcopy(source).eval().requires_grad_(False)
        self.share = share
        self.step = 0
        averaged, current = ([*model.parameters(), *model.buffers()] for model in (self.model, source))
        pairs = list(zip(averaged, current, strict=True))
        self._floating, self._others = (
            tuple([pair[i] for pair in pairs if pair[0].is_floating_point() == floating] for i in range(2))
            for floating in (True, False)
        )

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the source as it is now."""
        self.move(self.share(self.step))
        self.step += 1

    @torch.no_grad()
    def move(self, share: float | Tensor) -> None:
        """Moves it by that share of the way; a tensor stays where it is, so that a CUDA graph has another each time."""
        if isinstance(share, Tensor):
            averaged, current = self._floating
            way = torch._foreach_sub(current, averaged)
            torch._foreach_mul_(way, share)
            torch._foreach_add_(averaged, way)
        else:
            torch._foreach_lerp_(*self._floating, share)
        if self._others[0]:
            torch._foreach_copy_(*self._others)
