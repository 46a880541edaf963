"""The network's forward pass in inference at 640 px: normalised images to logits and distances."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benches.harness import Case, Contender, relative_error
from benches.models import mmdet_model, ours, plain
from rtmdet_fast import accelerate
from rtmdet_fast.kernels import _dispatch

CLASSES, SIDE = 80, 640
TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2}


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        return [_case(device, size, 1, torch.float32) for size in ("tiny", "s")]
    every = [(size, batch) for size in ("tiny", "s", "l", "m", "x") for batch in (32, 1)]
    return [
        *(_case(device, *which, torch.float16, headline=which[0] not in "mx") for which in every),
        *(
            _case(device, "tiny", batch, torch.float16, mode=mode)
            for mode in ("default", "max-autotune")
            for batch in (32, 1)
        ),
    ]


def _case(
    device: torch.device, size: str, batch: int, dtype: torch.dtype, headline: bool = True, mode: str | None = None
) -> Case:
    """`mode`: of torch.compile, beside which ours and eager run; on a GPU it takes minutes, and a case of its own."""
    cuda = device.type == "cuda"

    def own(fold: bool = False) -> Callable[..., Any]:
        if fold:  # in float32, as the predictor does
            return inference(ours(size, CLASSES, device).eval().fold().to(dtype))
        return inference(ours(size, CLASSES, device, dtype))

    def contiguous() -> Callable[..., Any]:
        run = plain(inference(ours(size, CLASSES, device, dtype), layout=torch.contiguous_format))
        return lambda images: run(images.contiguous())

    def mmdet(accelerated: bool = False) -> Callable[..., Any]:
        model, _ = mmdet_model(size, CLASSES, device)
        if accelerated:
            accelerate(model)
        model.to(dtype)
        return inference(model, forward=model._forward)  # type: ignore[operator]

    def compiled() -> Callable[..., Any]:
        torch.compiler.reset()
        model = ours(size, CLASSES, device, dtype)
        return plain(inference(model, forward=torch.compile(model, dynamic=False, mode=mode)))

    contenders = [Contender(name="triton" if cuda else "reference", build=own, graph=_dispatch.AVAILABLE)]
    if cuda:
        folded = partial(own, fold=True)
        contenders += [
            Contender(name="triton, folded", build=folded, graph=_dispatch.AVAILABLE),
            Contender(name="eager, channels_last", build=lambda: plain(own()), graph=True),
        ]
    if mode is not None or not cuda:
        # max-autotune makes CUDA graphs of its own, which cannot be part of another
        name = "torch.compile" if mode in (None, "default") else f"torch.compile, {mode}"
        contenders.append(Contender(name=name, build=compiled, graph=mode != "max-autotune", warm_up=3 * cuda))
    if mode is None:
        if cuda:
            contenders.append(Contender(name="eager", build=contiguous, graph=True))
        contenders.append(Contender(name="mmdet", build=mmdet, graph=True))
        if cuda:  # on a CPU it computes what it did before
            contenders.append(Contender(name="mmdet, accelerated", build=lambda: mmdet(True), graph=True))
    return Case(
        op="forward",
        name=f"RTMDet-{size}, {str(dtype).removeprefix('torch.')}, {batch} x 3 x {SIDE} x {SIDE}"
        + ("" if mode is None else f", beside torch.compile, {mode}"),
        shapes={"images": [batch, 3, SIDE, SIDE]},
        inputs=partial(_inputs, batch, dtype, device),
        expected=lambda images: inference(ours(size, CLASSES, device, torch.float64))(images.double()),
        compare=lambda result, expected: relative_error(result, expected, TOLERANCE[dtype]),
        contenders=contenders,
        headline=headline and mode is None,
        late=mode is not None,
        images=batch,
    )


def inference(
    model: nn.Module, forward: Callable[..., Any] | None = None, layout: torch.memory_format = torch.channels_last
) -> Callable[..., Any]:
    model.eval().to(memory_format=layout)  # type: ignore[call-overload]
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
