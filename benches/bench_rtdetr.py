"""RT-DETR's forward pass in inference at 640 px: images to logits and boxes, folded, beside the published code's and
Hugging Face's, and on a CPU by OpenVINO; and with fewer of its decoder's layers (`--decoder-layers`).

The published code is no package: `RTDETR_PUBLISHED=FOLDER` is the folder rtdetr_pytorch of a clone of
github.com/lyuwenyu/RT-DETR (Apache-2.0).
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benches.bench_engines import opened
from benches.harness import Absent, Case, Contender, relative_error
from benches.models import plain
from rtmdet_fast import RTDETR
from rtmdet_fast.export.engine import Dtype
from rtmdet_fast.export.graph import Graph
from rtmdet_fast.export.onnx import export_onnx
from rtmdet_fast.export.openvino import convert_to_openvino
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


def published(root: Path) -> nn.Module:
    """The published RT-DETR-r18, in eval mode, by the modules of its network alone.

    root: of its code, whose packages would also import data sets and evaluation, and what these take.
    """
    if not (root / "src/zoo/rtdetr/rtdetr.py").is_file():
        raise Absent(f"{root} is no folder rtdetr_pytorch of a clone of lyuwenyu/RT-DETR")
    packages = {name: ModuleType(name) for name in ("src", "src.core", "src.nn.backbone", "src.zoo.rtdetr")}
    for name, package in packages.items():
        package.__path__ = [str(root.joinpath(*name.split(".")))]
    packages["src.core"].register = lambda made: made  # type: ignore[attr-defined]
    unused = ModuleType("src.zoo.rtdetr.denoising")  # of training
    unused.get_contrastive_denoising_training_group = None  # type: ignore[attr-defined]
    with mock.patch.dict(sys.modules, {**packages, unused.__name__: unused}):
        presnet = importlib.import_module("src.nn.backbone.presnet")
        encoder, decoder, whole = (
            importlib.import_module(f"src.zoo.rtdetr.{name}") for name in ("hybrid_encoder", "rtdetr_decoder", "rtdetr")
        )
    # its configs/rtdetr/rtdetr_r18vd_6x_coco.yml
    model: nn.Module = whole.RTDETR(
        presnet.PResNet(18, return_idx=[1, 2, 3], freeze_norm=False),
        encoder.HybridEncoder([128, 256, 512], expansion=0.5, eval_spatial_size=[SIDE, SIDE]),
        decoder.RTDETRTransformer(
            feat_channels=[256] * 3, num_decoder_layers=LAYERS, num_denoising=100, eval_spatial_size=[SIDE, SIDE]
        ),
    )
    return model.eval()


class Raw(Graph):
    """Logits and boxes, as the network gives them."""

    output_names = ["logits", "boxes"]  # noqa: RUF012 - which nothing changes

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        output = self.model(input)
        return output.logits, output.boxes


@cache
def _openvino_file() -> tuple[Any, Path]:
    """A temporary folder, and r18 in it."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "model.xml"
    graph = Raw(ours(torch.device("cpu"), torch.float32).fold()).eval()
    export_onnx(graph, path.with_suffix(".onnx"), {}, SIDE, 1)
    convert_to_openvino(path.with_suffix(".onnx"), path, {})
    return folder, path


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

    def as_published() -> Callable[..., Any]:
        if "RTDETR_PUBLISHED" not in os.environ:
            raise Absent("RTDETR_PUBLISHED names no folder of the published code")
        model = published(Path(os.environ["RTDETR_PUBLISHED"]))
        model.load_state_dict(ours(device, torch.float32).state_dict())
        model.to(device, dtype)

        def run(images: Tensor) -> list[Tensor]:
            with torch.no_grad():
                output = model(images)
            return [output["pred_logits"], output["pred_boxes"]]

        return run

    def openvino(precision: Dtype) -> Callable[..., Any]:
        run = opened(lambda: _openvino_file()[1], precision)

        def call(images: Tensor) -> list[Tensor]:
            found = run(images.contiguous().numpy())
            return [torch.from_numpy(found[name]) for name in Raw.output_names]

        return call

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
            contenders.append(Contender(name="published", build=as_published))
            contenders.append(Contender(name="transformers", build=hugging_face))
        if not cuda:
            contenders.append(Contender(name="OpenVINO", build=partial(openvino, "fp32")))
            rough = Contender(name="OpenVINO, bf16", build=partial(openvino, "bf16"), result=lambda out: (out, 0.1))
            contenders.append(rough)

    def compare(result: Any, expected: list[Tensor]) -> str:
        values, tolerance = result if isinstance(result, tuple) else (result, TOLERANCE[dtype])
        return relative_error(_sorted(values), _sorted(expected), tolerance)

    return Case(
        op="rtdetr",
        name=f"RT-DETR-{size}, {str(dtype).removeprefix('torch.')}, {batch} x 3 x {SIDE} x {SIDE}"
        + ("" if mode is None else f", beside torch.compile, {mode}"),
        shapes={"images": [batch, 3, SIDE, SIDE]},
        inputs=partial(_inputs, batch, dtype, device),
        expected=lambda images: _inference(ours(device, torch.float64, size=size))(images.double()),
        compare=compare,
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
