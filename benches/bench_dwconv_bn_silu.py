"""Depth-wise 5 x 5 convolution, batch normalisation and SiLU at all such shapes of RTMDet-s and -l at 640 px.

"eager" is conv2d, batch_norm and silu one after another, which is also what mmcv's `ConvModule` runs. "reference" folds
the affine into the convolution in inference; "torch.compile" compiles it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benches.harness import Case, Contender, compiled, own, relative_error
from rtmdet_fast.kernels.dwconv_bn_silu import dwconv_bn_silu, dwconv_bn_silu_reference

# channels and side: stage 1 first
SHAPES = {"s": [(32, 160), (64, 80), (128, 40), (256, 20)], "l": [(64, 160), (128, 80), (256, 40), (512, 20)]}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
PASSES = {"inference": 2, "training": 10}  # of x-sized data, as the kernel's docstring counts them


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        return [_case(device, 1, "s", *shape, "inference", torch.float32) for shape in SHAPES["s"][:2]] + [
            _case(device, 4, "s", *shape, "training", torch.float32) for shape in SHAPES["s"][1:2]
        ]
    every = [(size, *shape) for place in range(4) for size in "sl" for shape in [SHAPES[size][place]]]
    modes = ("inference", torch.float16), ("training", torch.bfloat16)
    wide = partial(_case, device, 32)
    return [  # the models' layout first
        *(wide(*shape, *mode, channels_last=True) for mode in modes for shape in every),
        *(wide(*shape, *mode, headline=False) for mode in modes for shape in every),
    ]


def _case(
    device: torch.device,
    batch: int,
    size: str,
    channels: int,
    side: int,
    mode: str,
    dtype: torch.dtype,
    channels_last: bool = False,
    headline: bool = True,
) -> Case:
    shape = (batch, channels, side, side)
    wrap = inference if mode == "inference" else training
    layout = "channels_last" if channels_last else "contiguous"
    kind = f"{mode}, {str(dtype).removeprefix('torch.')}, {layout}"
    return Case(
        op="dwconv_bn_silu",
        name=f"{kind}: RTMDet-{size} {list(shape)}",
        group=kind,
        shapes={"x": list(shape), "conv_weight": [channels, 1, 5, 5]},
        inputs=partial(tensors, shape, dtype, channels_last, device),
        expected=lambda *inputs: wrap(dwconv_bn_silu_reference)(*(x.double() for x in inputs)),
        compare=lambda result, expected: relative_error(result, expected, TOLERANCE[dtype]),
        contenders=[
            *own(device, wrap(dwconv_bn_silu), wrap(dwconv_bn_silu_reference), graph_reference=True),
            Contender(
                name="torch.compile", build=lambda: wrap(compiled(device, dwconv_bn_silu_reference)()), graph=True
            ),
            Contender(name="eager", build=lambda: wrap(eager), graph=True),
        ],
        bytes=PASSES[mode] * batch * channels * side * side * dtype.itemsize,
        headline=headline,
    )


def tensors(
    shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, device: torch.device, seed: int
) -> tuple[Tensor, ...]:
    """x, conv_weight, bn_weight, bn_bias, running_mean, running_var and the gradient of the result."""
    g = torch.Generator(device).manual_seed(seed)
    randn = partial(torch.randn, generator=g, device=device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    channels = shape[1]
    x, dy = (randn(shape, dtype=dtype).to(memory_format=layout) for _ in range(2))
    weight = randn(channels, 1, 5, 5).div(5).to(dtype)
    running = [randn(channels) / 4, randn(channels).square() + 0.5]
    return x, weight, 1 + randn(channels) / 4, randn(channels) / 4, *running, dy


def inference(op: Callable[..., Tensor]) -> Callable[..., Any]:
    def run(*inputs: Tensor) -> tuple[Tensor]:
        with torch.no_grad():
            return (op(*inputs[:-1]),)

    return run


def training(op: Callable[..., Tensor]) -> Callable[..., Any]:
    """Forward and backward; the two tensors before the last are the running statistics."""

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs[:-3]]
        y = op(*leaves, *inputs[-3:-1], training=True)
        return (y.detach(), *torch.autograd.grad(y, leaves, inputs[-1]))

    return run


def eager(
    x: Tensor,
    conv_weight: Tensor,
    bn_weight: Tensor,
    bn_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool = False,
) -> Tensor:
    z = F.conv2d(x, conv_weight, None, 1, 2, groups=x.shape[1])
    return F.silu(F.batch_norm(z, running_mean, running_var, bn_weight, bn_bias, training), inplace=not training)
