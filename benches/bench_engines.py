"""The network of RTMDet-tiny and -s in inference by every engine of a CPU, at 640 px, beside mmdet's in PyTorch.

PyTorch's contenders, of which `reference` is the folded model, take normalised images to logits and distances. The
other engines go on to boxes and scores before NMS, which is what all are compared by.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benches.harness import Absent, Case, Contender, relative_error
from benches.models import mmdet_model, ours
from rtmdet_fast.errors import UserError
from rtmdet_fast.export.agreement import Run
from rtmdet_fast.export.engine import Dtype, open_file
from rtmdet_fast.export.graph import WithoutNMS
from rtmdet_fast.export.int8 import quantize
from rtmdet_fast.export.onnx import export_onnx
from rtmdet_fast.export.openvino import convert_to_openvino, import_openvino
from rtmdet_fast.models.rtmdet.detection_head import HeadOutput

CLASSES, SIDE, CALIBRATION_IMAGES = 80, 640, 16
CPU = torch.device("cpu")


def cases(device: torch.device) -> list[Case]:
    return [_case(size) for size in ("tiny", "s")]  # on the CPU, whatever the device


def _case(size: str) -> Case:
    def forward(folded: bool) -> Callable[..., Any]:
        model = ours(size, CLASSES, CPU).eval()
        return inference(model.fold() if folded else model)

    def compiled() -> Callable[..., Any]:
        torch.compiler.reset()
        return inference(torch.compile(ours(size, CLASSES, CPU).fold(), dynamic=False))

    def mmdet() -> Callable[..., Any]:
        model, _ = mmdet_model(size, CLASSES, CPU)
        return inference(model.eval(), model._forward)  # type: ignore[operator]

    def engine(suffix: str, dtype: Dtype = "fp32", int8: bool = False) -> Callable[..., Any]:
        run = opened(lambda: _exported(size, suffix, int8), dtype)

        def call(images: Tensor) -> list[np.ndarray]:
            found = run(images.numpy())
            return [found["boxes"], found["scores"]]

        return call

    def decoded(output: list[list[Tensor]]) -> tuple[list[Tensor], float]:
        model = ours(size, CLASSES, CPU)
        return list(model.boxes_and_scores(HeadOutput(*output), (SIDE, SIDE))), 1e-3

    def read(tolerance: float) -> Callable[[list[np.ndarray]], tuple[list[Tensor], float]]:
        return lambda output: ([torch.from_numpy(values) for values in output], tolerance)

    return Case(
        op="engines",
        name=f"RTMDet-{size}, 1 x 3 x {SIDE} x {SIDE}",
        shapes={"images": [1, 3, SIDE, SIDE]},
        inputs=_inputs,
        expected=lambda images: WithoutNMS(ours(size, CLASSES, CPU, torch.float64).eval())(images.double()),
        compare=_compare,
        contenders=[
            Contender(name="reference", build=partial(forward, True), result=decoded),
            Contender(name="not folded", build=partial(forward, False), result=decoded),
            Contender(name="torch.compile", build=compiled, result=decoded),
            Contender(name="ONNX Runtime", build=partial(engine, ".onnx"), result=read(1e-3)),
            Contender(name="OpenVINO", build=partial(engine, ".xml"), result=read(1e-3)),
            Contender(name="OpenVINO, bf16", build=partial(engine, ".xml", "bf16"), result=read(0.3)),
            Contender(name="OpenVINO, int8", build=partial(engine, ".xml", int8=True), result=read(0.7)),
            Contender(name="mmdet", build=mmdet, result=decoded),
        ],
    )


def opened(exported: Callable[[], Path], dtype: Dtype) -> Run:
    """What runs an exported file. Absent where its runtime is, or the processor does not compute in the dtype."""
    try:
        if dtype == "bf16" and "BF16" not in import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise Absent("this processor does not compute in bfloat16")
        return open_file(exported(), torch.get_num_threads(), dtype)[1]
    except UserError as error:
        raise Absent(str(error)) from error


def inference(model: nn.Module, forward: Callable[..., Any] | None = None) -> Callable[..., Any]:
    @torch.no_grad()
    def run(images: Tensor) -> list[list[Tensor]]:
        return [list(levels) for levels in (forward or model)(images)[:2]]

    return run


def _compare(result: tuple[list[Tensor], float], expected: tuple[Tensor, Tensor]) -> str:
    """Boxes and scores. Random weights multiply what bfloat16 and int8 round, and scores of another network are off
    by 1: whether these find what the model finds is for AP to tell, of trained weights (`rtmdet-fast benchmark`)."""
    values, tolerance = result
    return relative_error(values, expected, tolerance)


def _canvas(seed: int) -> np.ndarray:
    """Noise [S, S, 3] uint8, which normalised is about what `weights` has its statistics of."""
    noise = np.random.default_rng(seed).normal(114, 57, (SIDE, SIDE, 3))
    return noise.clip(0, 255).astype(np.uint8)


def _inputs(seed: int) -> tuple[Tensor]:
    canvas = torch.from_numpy(_canvas(seed)).permute(2, 0, 1)[None]
    return (ours("tiny", CLASSES, CPU).normalize(canvas).contiguous(),)


@cache
def _exported(size: str, suffix: str, int8: bool) -> Path:
    """A file of boxes and scores before NMS; unchecked, as each contender is checked before it is timed."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    model, path = ours(size, CLASSES, CPU).eval(), folder / f"model{suffix}"
    graph = WithoutNMS(model.fold()).eval()
    export_onnx(graph, folder / "model.onnx", {}, SIDE, 1)
    if suffix == ".xml":
        canvases = [_canvas(100 + i) for i in range(CALIBRATION_IMAGES)]
        prepare = (lambda network: quantize(network, model, canvases, 1)) if int8 else (lambda network: network)
        convert_to_openvino(folder / "model.onnx", path, {}, prepare)
    return path
