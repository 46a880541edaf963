"""The network's forward pass in inference at 640 px: normalised images to logits and distances."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benches.harness import Absent, Case, Contender, relative_error
from benches.models import mmdet_model, ours, plain
from rtmdet_fast import accelerate
from rtmdet_fast.kernels import _dispatch

CLASSES, SIDE = 80, 640
TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2}


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        return [_case(device, size, 1, torch.float32) for size in ("tiny", "s")]
    return [
        _case(device, size, batch, torch.float16, headline=size != "l")
        for batch in (32, 1)
        for size in ("tiny", "s", "l")
    ]


def _case(device: torch.device, size: str, batch: int, dtype: torch.dtype, headline: bool = True) -> Case:
    cuda = device.type == "cuda"

    def own() -> Callable[..., Any]:
        return inference(ours(size, CLASSES, device, dtype))

    def mmdet(accelerated: bool = False) -> Callable[..., Any]:
        model, _ = mmdet_model(size, CLASSES, device)
        if accelerated:
            accelerate(model)
        model.to(dtype)
        return inference(model, forward=model._forward)  # type: ignore[operator]

    def compiled() -> Callable[..., Any]:
        if cuda and (size, batch) != ("s", 32):
            raise Absent("measured in one case only: compiling takes its time")
        torch.compiler.reset()
        model = ours(size, CLASSES, device, dtype)
        return plain(inference(model, forward=torch.compile(model, dynamic=False)))

    contenders = [Contender(name="triton" if cuda else "reference", build=own, graph=_dispatch.AVAILABLE)]
    if cuda:
        contenders.append(Contender(name="eager", build=lambda: plain(own()), graph=True))
    contenders += [
        Contender(name="torch.compile", build=compiled, graph=True),
        Contender(name="mmdet", build=mmdet, graph=True),
    ]
    if cuda:  # on a CPU it computes what it did before
        contenders.append(Contender(name="mmdet, accelerated", build=lambda: mmdet(True), graph=True))
    return Case(
        op="forward",
        name=f"RTMDet-{size}, {str(dtype).removeprefix('torch.')}, {batch} x 3 x {SIDE} x {SIDE}",
        shapes={"images": [batch, 3, SIDE, SIDE]},
        inputs=partial(_inputs, batch, dtype, device),
        expected=lambda images: inference(ours(size, CLASSES, device, torch.float64))(images.double()),
        compare=lambda result, expected: relative_error(result, expected, TOLERANCE[dtype]),
        contenders=contenders,
        headline=headline,
    )


def inference(model: nn.Module, forward: Callable[..., Any] | None = None) -> Callable[..., Any]:
    model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    forward = model if forward is None else forward

    def run(images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            logits, distances = forward(images)[:2]
        return [*logits, *distances]

    return run


def _inputs(batch: int, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor]:
    g = torch.Generator(device).manual_seed(seed)
    images = torch.randn(batch, 3, SIDE, SIDE, generator=g, dtype=dtype, device=device)
    return (images.to(memory_format=torch.channels_last),)
