"""Layers of RTMDet-s and -l, beside mmcv's and mmdet's with the same weights, and those after `accelerate`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from benches.harness import Case, Contender, relative_error
from benches.models import plain
from rtmdet_fast import accelerate
from rtmdet_fast.kernels import _dispatch
from rtmdet_fast.models.rtmdet.layers import CSPLayer, DepthwiseSeparableConv, SPPBottleneck

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
NORM, ACT = dict(type="BN"), dict(type="SiLU", inplace=True)


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        s = partial(_case, device, "s", 64, 80)
        return [
            s("depth-wise separable 5x5", 1, "inference", torch.float32),
            s("CSPLayer", 1, "inference", torch.float32),
            _case(device, "s", 512, 20, "SPPBottleneck", 1, "inference", torch.float32),
            s("CSPLayer", 4, "training", torch.float32),
            _case(device, "s", 512, 20, "SPPBottleneck", 4, "training", torch.float32),
        ]
    found = []
    for size, width in (("s", 64), ("l", 128)):
        for kind, channels, side in (("CSPLayer", width, 160), ("CSPLayer", 4 * width, 40)):
            found.append(_case(device, size, channels, side, kind, 32, "inference", torch.float16))
            found.append(_case(device, size, channels, side, kind, 32, "training", torch.bfloat16))
    return [*found, _case(device, "s", 512, 20, "SPPBottleneck", 32, "inference", torch.float16)]


def _case(
    device: torch.device, size: str, channels: int, side: int, kind: str, batch: int, mode: str, dtype: torch.dtype
) -> Case:
    shape = (batch, channels, side, side)
    run = inference if mode == "inference" else training

    def ours() -> Callable[..., Any]:
        return run(copy.deepcopy(_ours(kind, channels)).to(device, dtype))

    def mmdet(accelerated: bool = False) -> Callable[..., Any]:
        module = _theirs(kind, channels)
        module.load_state_dict(_ours(kind, channels).state_dict())
        if accelerated:
            accelerate(module)
        return run(module.to(device, dtype))

    cuda = device.type == "cuda"
    contenders = [Contender(name="triton" if cuda else "reference", build=ours, graph=_dispatch.AVAILABLE)]
    if cuda:
        contenders.append(Contender(name="eager", build=lambda: plain(ours()), graph=True))
    contenders.append(Contender(name="mmdet", build=mmdet, graph=True))
    if cuda:  # on a CPU it computes what it did before
        contenders.append(Contender(name="mmdet, accelerated", build=lambda: mmdet(True), graph=True))
    return Case(
        op="layers",
        name=f"{kind}, {mode}, {str(dtype).removeprefix('torch.')}: RTMDet-{size} {list(shape)}",
        shapes={"x": list(shape)},
        inputs=partial(_inputs, shape, dtype, device),
        expected=lambda x, dy: run(copy.deepcopy(_ours(kind, channels)).to(device, torch.float64))(
            x.double(), dy.double()
        ),
        compare=lambda result, expected: relative_error(result, expected, TOLERANCE[dtype]),
        contenders=contenders,
        headline=not cuda or size == "s",
    )


def inference(module: nn.Module) -> Callable[..., Any]:
    module.eval()

    def run(x: Tensor, dy: Tensor) -> tuple[Tensor]:
        with torch.no_grad():
            return (module(x),)

    return run


def training(module: nn.Module) -> Callable[..., Any]:
    module.train()
    parameters = [p for _, p in sorted(module.named_parameters())]

    def run(x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        y = module(x)
        grads = torch.autograd.grad(y, [x, *parameters], dy)
        return y.detach(), grads[0], torch.cat([g.flatten() for g in grads[1:]])

    return run


@cache
def _ours(kind: str, channels: int) -> nn.Module:
    """With running statistics as of a trained module: those of its activations."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        module: nn.Module
        if kind == "CSPLayer":
            module = CSPLayer(channels, channels, 2, identity=True, attention=True)
        else:
            module = (
                SPPBottleneck(channels) if kind == "SPPBottleneck" else DepthwiseSeparableConv(channels, channels, 5)
            )
        norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        module.train()(torch.randn(2, channels, 16, 16))
        for norm in norms:
            norm.momentum = 0.1
    return module


def _theirs(kind: str, channels: int) -> Any:
    common: dict[str, Any] = dict(norm_cfg=NORM, act_cfg=ACT)
    if kind == "CSPLayer":
        from mmdet.models.layers import CSPLayer as Theirs  # type: ignore[import-not-found]

        return Theirs(channels, channels, num_blocks=2, use_cspnext_block=True, channel_attention=True, **common)
    if kind == "SPPBottleneck":
        from mmdet.models.backbones.csp_darknet import SPPBottleneck as Theirs  # type: ignore[import-not-found]

        return Theirs(channels, channels, **common)
    from mmcv.cnn import DepthwiseSeparableConvModule as Theirs  # type: ignore[import-not-found]

    return Theirs(channels, channels, 5, padding=2, **common)


def _inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator(device).manual_seed(seed)
    x, dy = (torch.randn(shape, generator=g, dtype=dtype, device=device) for _ in range(2))
    return x, dy
