"""Batch normalisation and SiLU after a dense convolution, at shapes of RTMDet-s and -l at 640 px.

The reference is what eager PyTorch and mmcv's `ConvModule` run: batch_norm, then silu.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benches.bench_dwconv_bn_silu import TOLERANCE, inference, tensors, training
from benches.harness import Case, Contender, compiled, own, relative_error
from rtmdet_fast.kernels.bn_silu import bn_silu, bn_silu_reference


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        return [
            _case(device, 1, "s", 64, 160, "inference", torch.float32),
            _case(device, 4, "s", 128, 80, "training", torch.float32),
            # of few channels, as those of the first layers: `narrow_batch_norm`
            *(
                _case(device, 8, "tiny", *shape, "training", torch.float32, True, 5e-5)
                for shape in ((12, 128), (24, 64))
            ),
        ]
    # the last are tiny's and m's, which no power of two divides
    shapes = [("s", 64, 160), ("l", 128, 160), ("s", 128, 80), ("l", 256, 40), ("s", 256, 20)]
    shapes += [("tiny", 24, 320), ("tiny", 48, 160), ("m", 96, 160)]
    modes = [("training", torch.bfloat16, shapes), ("inference", torch.float16, shapes[:2])]
    # on either side of TUNING["least_training"], so that another value takes one of them the other way
    small = [("s", 256, 16), ("s", 128, 20)]
    return [
        *(
            _case(device, 32, *shape, mode, dtype, last)
            for last in (True, False)  # the models' layout first
            for mode, dtype, some in modes
            for shape in some
        ),
        *(_case(device, 1, *shape, "training, few pixels", torch.bfloat16, True) for shape in small),
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
    tolerance: float | None = None,
) -> Case:
    """`tolerance`: where PyTorch's own loses more digits than elsewhere; tests hold ours to a fifth of it."""
    shape = (batch, channels, side, side)
    wrap, passes = (inference, 2) if mode == "inference" else (training, 8)  # as the kernel's docstring counts them
    layout = "channels_last" if channels_last else "contiguous"
    kind = f"{mode}, {str(dtype).removeprefix('torch.')}, {layout}"
    return Case(
        op="bn_silu",
        name=f"{kind}: RTMDet-{size} {list(shape)}",
        group=kind,
        shapes={"x": list(shape)},
        inputs=partial(_inputs, shape, dtype, channels_last, device),
        expected=lambda *inputs: wrap(bn_silu_reference)(*(x.double() for x in inputs)),
        compare=lambda result, expected: relative_error(result, expected, tolerance or TOLERANCE[dtype]),
        contenders=[
            *own(device, wrap(bn_silu), wrap(bn_silu_reference), graph_reference=True),
            Contender(name="torch.compile", build=lambda: wrap(compiled(device, bn_silu_reference)()), graph=True),
            Contender(name="eager", build=lambda: wrap(eager), graph=True),
        ],
        bytes=passes * batch * channels * side * side * dtype.itemsize,
        headline=channels_last,
    )


def eager(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, training: bool = False
) -> Tensor:
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training)
    return F.silu(y, inplace=not training)


def _inputs(
    shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, device: torch.device, seed: int
) -> tuple[Tensor, ...]:
    x, _, *rest = tensors(shape, dtype, channels_last, device, seed)
    return x, *rest
