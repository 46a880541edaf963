"""What every part of RT-DETR is made of, with the state_dict keys of the published models."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from itertools import pairwise
from typing import Any, Literal, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rtmdet_fast.kernels.bn_silu import silu_add
from rtmdet_fast.models.fold import fold_batch_norm
from rtmdet_fast.models.fused import batch_norm, fused_bn_silu

Activation = Literal["relu", "silu"]
P = ParamSpec("P")
R = TypeVar("R")


def made_once(make: Callable[P, R]) -> Callable[P, R]:
    """`make`, which keeps the last 64 things that it made of constants: sizes of maps and a device.

    A graph that is being traced gets them anew, as operators.
    """
    cached = lru_cache(maxsize=64)(make)

    @wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return make(*args, **kwargs)
        with torch.inference_mode(False):  # or training could not use what prediction made
            return cached(*args, **kwargs)  # type: ignore[arg-type]

    return made


class FrozenBatchNorm2d(nn.Module):
    """A BatchNorm whose parameters and statistics are buffers, which training leaves as they were loaded."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.eps = 1e-5
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)  # files of backbones have it
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class ConvNorm(nn.Module):
    """Convolution (no bias) → BatchNorm, frozen or not → activation, if any.

    `names` are those of the two parts in the state_dict. `process_group` set to a torch.distributed group makes the
    batch statistics those of the whole group (SyncBN).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        *,
        groups: int = 1,
        activation: Activation | None = None,
        frozen: bool = False,
        names: tuple[str, str] = ("conv", "norm"),
    ):
        super().__init__()
        padding = (kernel_size - 1) // 2
        self.names, self.activation = names, activation
        self.add_module(
            names[0], nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
        )
        self.add_module(names[1], FrozenBatchNorm2d(out_channels) if frozen else nn.BatchNorm2d(out_channels))
        self.process_group: torch.distributed.ProcessGroup | None = None

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = (self._modules[name] for name in self.names)
        assert conv is not None and norm is not None
        x = conv(x)
        if not isinstance(norm, nn.BatchNorm2d):
            return activate(norm(x), self.activation)
        if self.activation == "silu":
            return fused_bn_silu(x, norm, process_group=self.process_group)
        return activate(batch_norm(x, norm, self.process_group), self.activation)

    def fused(self) -> nn.Conv2d:
        """Convolution and norm in eval mode as one convolution with a bias."""
        conv, norm = (self._modules[name] for name in self.names)
        assert conv is not None and norm is not None
        return fold_batch_norm(next(m for m in conv.modules() if isinstance(m, nn.Conv2d)), norm)

    def folded(self) -> FoldedConv:
        """The same in eval mode, as one convolution with a bias."""
        return FoldedConv(self.fused(), self.activation)


class FoldedConv(nn.Module):
    """Convolution with a bias → activation, if any."""

    def __init__(self, conv: nn.Conv2d, activation: Activation | None):
        super().__init__()
        self.conv, self.activation = conv, activation

    def forward(self, x: Tensor) -> Tensor:
        return activate(self.conv(x), self.activation)


def activate(x: Tensor, activation: Activation | None) -> Tensor:
    """The activation of `x`, which it may overwrite."""
    if activation == "relu":
        return F.relu(x, inplace=True)
    return silu_add(x, None) if activation == "silu" else x


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, *widths: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class SelfAttention(nn.Module):
    """Multi-head attention of tokens [B, N, C] among themselves; queries and keys see a position embedding.

    Parameters and initial weights are `nn.MultiheadAttention`'s.
    """

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, position: Tensor, blocked: Tensor | None = None) -> Tensor:
        """`blocked` [N, N] bool: which query (row) may not see which key (column)."""
        channels = x.shape[-1]
        weight, bias = self.in_proj_weight, self.in_proj_bias
        qk = F.linear(x + position, weight[: 2 * channels], bias[: 2 * channels])
        v = F.linear(x, weight[2 * channels :], bias[2 * channels :])
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (*qk.chunk(2, -1), v))
        attended = F.scaled_dot_product_attention(q, k, v, None if blocked is None else ~blocked)
        return self.out_proj(attended.transpose(1, 2).flatten(2))
