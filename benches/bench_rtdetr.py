"""RT-DETR's forward pass in inference at 640 px: images to logits and boxes, folded, beside Hugging Face's; and with
fewer of its decoder's layers (`--decoder-layers`)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from benches.harness import Absent, Case, Contender, relative_error
from benches.models import plain
from rtmdet_fast import RTDETR
from rtmdet_fast.kernels import _dispatch

SIDE, LAYERS = 640, 3
TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2}


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        return [_case(device, 1, torch.float32), _by_layers(device, torch.float32)]
    every = [(size, batch) for size in ("r18", "r50") for batch in (32, 1)]
    return [
        *(_case(device, batch, torch.float16, size) for size, batch in every),
        _by_layers(device, torch.float16),
        *(_case(device, 32, torch.float16, "r18", mode) for mode in ("default", "max-autotune")),
    ]


@cache
def saved() -> Any:
    """A temporary folder with a seeded RT-DETR-r18 as Hugging Face saves it, whose layers all change what they see."""
    try:
        from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig
    except ImportError as error:
        raise Absent("transformers is not installed") from error
    backbone = RTDetrResNetConfig(
        depths=[2, 2, 2, 2],
        layer_type="basic",
        hidden_sizes=[64, 128, 256, 512],
        out_features=["stage2", "stage3", "stage4"],
    )
    config = RTDetrConfig(
        backbone_config=backbone,
        encoder_in_channels=[128, 256, 512],
        hidden_expansion=0.5,
        decoder_layers=LAYERS,
        num_labels=80,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = RTDetrForObjectDetection(config)
        _shake(model)
    folder = tempfile.TemporaryDirectory()
    model.save_pretrained(folder.name)
    return folder


def _shake(model: nn.Module) -> None:
    for key, tensor in model.state_dict().items():
        if tensor.ndim > 1:
            tensor.normal_(std=tensor[0].numel() ** -0.5)
        elif tensor.is_floating_point():
            tensor.uniform_(*((0.8, 1.2) if key.endswith(("weight", "running_var")) else (-0.2, 0.2)))


def ours(device: torch.device, dtype: torch.dtype, decoder_layers: int | None = None, size: str = "r18") -> RTDETR:
    """With `saved`'s weights, r18 alone; where transformers is not installed, and r50, with such of our own."""
    try:
        if size != "r18":
            raise Absent("only r18 is saved")
        model = RTDETR.from_pretrained(saved().name, decoder_layers=decoder_layers)
    except Absent:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = RTDETR(size, decoder_layers=decoder_layers)
            _shake(model)
    return model.to(device, dtype).eval()


def _case(device: torch.device, batch: int, dtype: torch.dtype, size: str = "r18", mode: str | None = None) -> Case:
    """`mode`: of torch.compile, beside which ours and eager run."""
    cuda = device.type == "cuda"

    def folded() -> Callable[..., Any]:
        return _inference(ours(device, torch.float32, size=size).fold().to(dtype))

    def unfolded(layout: torch.memory_format = torch.channels_last) -> Callable[..., Any]:
        model = ours(device, dtype, size=size).to(memory_format=layout)  # type: ignore[call-overload]
        run = _inference(model)
        return lambda images: run(images.contiguous(memory_format=layout))

    def compiled() -> Callable[..., Any]:
        torch.compiler.reset()
        model = ours(device, dtype, size=size).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return plain(_inference(torch.compile(model, dynamic=False, mode=mode)))  # type: ignore[arg-type]

    def hugging_face() -> Callable[..., Any]:
        from transformers import RTDetrForObjectDetection

        model = RTDetrForObjectDetection.from_pretrained(saved().name)
        return _inference(model.to(device, dtype).eval(), "pred_boxes")

    contenders = [Contender(name="triton" if cuda else "reference", build=folded, graph=_dispatch.AVAILABLE)]
    if cuda:
        contenders.append(Contender(name="eager, channels_last", build=lambda: plain(unfolded())))
    if mode is not None:
        contenders.append(Contender(name=f"torch.compile, {mode}", build=compiled, warm_up=3))
    else:
        contenders.append(Contender(name="not folded", build=unfolded))
        if cuda:
            contenders.append(Contender(name="eager", build=lambda: plain(unfolded(torch.contiguous_format))))
        if size == "r18":
            contenders.append(Contender(name="transformers", build=hugging_face))
    return Case(
        op="rtdetr",
        name=f"RT-DETR-{size}, {str(dtype).removeprefix('torch.')}, {batch} x 3 x {SIDE} x {SIDE}"
        + ("" if mode is None else f", beside torch.compile, {mode}"),
        shapes={"images": [batch, 3, SIDE, SIDE]},
        inputs=partial(_inputs, batch, dtype, device),
        expected=lambda images: _inference(ours(device, torch.float64, size=size))(images.double()),
        compare=lambda result, expected: relative_error(_sorted(result), _sorted(expected), TOLERANCE[dtype]),
        contenders=contenders,
        late=mode is not None,
        headline=mode is None,
        images=batch,
    )


def _by_layers(device: torch.device, dtype: torch.dtype) -> Case:
    first = "triton" if device.type == "cuda" else "reference"
    names = {LAYERS: first} | {number: f"{number} of {LAYERS} layers" for number in range(LAYERS - 1, 0, -1)}

    def expected(images: Tensor) -> dict[int, list[Tensor]]:
        return {number: _inference(ours(device, torch.float64, number))(images.double()) for number in names}

    def compare(result: tuple[int, list[Tensor]], expected: dict[int, list[Tensor]]) -> str:
        number, found = result
        return relative_error(_sorted(found), _sorted(expected[number]), TOLERANCE[dtype])

    def contender(number: int, name: str) -> Contender:
        return Contender(
            name=name,
            build=lambda: _inference(ours(device, dtype, number).fold()),
            result=lambda output: (number, output),
            graph=_dispatch.AVAILABLE,
        )

    return Case(
        op="rtdetr",
        name=f"RT-DETR-r18 by layers of its decoder, {str(dtype).removeprefix('torch.')}, 1 x 3 x {SIDE} x {SIDE}",
        shapes={"images": [1, 3, SIDE, SIDE]},
        inputs=partial(_inputs, 1, dtype, device),
        expected=expected,
        compare=compare,
        contenders=[contender(number, name) for number, name in names.items()],
    )


def _inference(model: nn.Module, boxes: str = "boxes") -> Callable[[Tensor], list[Tensor]]:
    """Images → logits and what is called `boxes` in the model's output."""

    def run(images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            output = model(images)
        return [output.logits, getattr(output, boxes)]

    return run


def _sorted(outputs: list[Tensor]) -> list[Tensor]:
    """Each number's values over the queries, whose order rounding decides."""
    return [output.sort(1).values for output in outputs]


def _inputs(batch: int, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor]:
    g = torch.Generator(device).manual_seed(seed)
    images = torch.rand(batch, 3, SIDE, SIDE, generator=g, dtype=dtype, device=device)
    return (images.to(memory_format=torch.channels_last),)
