"""From a JPEG to boxes by `predict`, on a CPU: what decoding, resizing, NMS and all else cost over the network alone.

`reference` is the network, on an image that is ready; how many times as long `predict` takes is the overhead. On a GPU
from frames in memory, and from a JPEG, by the predictor, beside a folded model that is no graph, eager PyTorch, and
torch.compile of the folded network.
"""

from __future__ import annotations

import atexit
import copy
import shutil
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benches import bench_rtdetr
from benches.bench_engines import inference
from benches.confident import confident
from benches.harness import Absent, Case, Contender, Parity, few_differ, relative_error
from benches.models import ours, plain
from rtmdet_fast import RTMDet
from rtmdet_fast.errors import UserError
from rtmdet_fast.export.agreement import EXACT, Found, matches
from rtmdet_fast.export.engine import open_file
from rtmdet_fast.export.graph import WithoutNMS
from rtmdet_fast.inference.results import Results
from rtmdet_fast.models.detector import Detector
from rtmdet_fast.models.rtmdet.detection_head import HeadOutput

SIDE, HEIGHT = 640, 480
SCORE_THRESHOLD = 0.85
"""Which of random scores leaves about as few candidates as the default leaves a trained model."""


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        return [_case(engine, size) for size in ("tiny", "s") for engine in ("torch", "openvino")]
    every = [("det", "tiny", 1), ("det", "tiny", 32), ("det", "s", 1), ("rtdetr", "r18", 1), ("rtdetr", "r50", 1)]
    more = [("det", size, 1) for size in ("m", "l", "x")]
    more += [("det", "l", 32), ("rtdetr", "r18", 32), ("rtdetr", "r50", 32)]
    sizes = ("tiny", "s", "m", "l", "x")
    return [
        *(_frames(device, *which) for which in every),
        *(_frames(device, *which, headline=False) for which in more),
        _frames(device, "det", "tiny", 1, files=True),
        *(_frames(device, "det", size, 1, mode=mode) for mode in ("reduce-overhead", "max-autotune") for size in sizes),
    ]


def _frames(
    device: torch.device, task: str, size: str, batch: int, *, side: int = SIDE, files: bool = False,
    headline: bool = True, score_threshold: float | None = None, mode: str | None = None,
) -> Case:  # fmt: skip
    """On a GPU in fp16, where what is found is judged by the same way in float32: rounding decides on scores.

    `mode`: of torch.compile, beside which the predictor runs alone.
    """
    cuda = device.type == "cuda"
    options: dict[str, Any] = dict(score_threshold=score_threshold or (0.9 if task == "rtdetr" else 0.05))

    def model(dtype: torch.dtype) -> Detector:
        if task == "rtdetr":
            made: Detector = bench_rtdetr.ours(device, dtype, size=size)
        else:
            made = ours(size, 80, device, dtype).eval()
        made.image_size = side
        return made

    def predictor(dtype: torch.dtype) -> Callable[..., Any]:
        name = "fp16" if dtype == torch.float16 else "fp32"
        return model(torch.float32).predictor(batch_size=batch, dtype=name, **options).predict

    def folded(dtype: torch.dtype) -> Callable[..., Any]:
        return partial(model(torch.float32).fold().to(dtype).predict, batch_size=batch, **options)

    def eager(layout: torch.memory_format, dtype: torch.dtype) -> Callable[..., Any]:
        made = model(dtype).to(memory_format=layout)  # type: ignore[call-overload]
        return plain(lambda images: made.predict(images, batch_size=batch, **options))

    def compiled(dtype: torch.dtype) -> Callable[..., Any]:
        """The folded network; what comes before and after it stays eager, and in float32 all is."""
        torch.compiler.reset()
        made = model(torch.float32).fold().to(dtype)
        if dtype != torch.float32:
            made.compile(dynamic=False, mode=mode)
        return plain(lambda images: made.predict(images, batch_size=batch, **options))

    def built(make: Callable[[torch.dtype], Callable[..., Any]]) -> Callable[..., Any]:
        exact = None
        if cuda:
            with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
                exact = make(torch.float32)(*inputs(0))
        run = make(torch.float16 if cuda else torch.float32)
        return lambda images: (run(images), exact)

    def inputs(seed: int) -> tuple[list[Any]]:
        if files:
            return ([_inputs(seed)[0]] * batch,)
        return ([_noise(seed + i, HEIGHT * side // SIDE, side) for i in range(batch)],)

    def compare(results: list[Results], expected: list[Results]) -> str:
        pairs = [tuple(map(_found, pair)) for pair in zip(results, expected, strict=True)]
        # a frame that is resized on a GPU may differ by a grey level
        tolerance = EXACT._replace(pixels=1, score=5e-3) if cuda else EXACT
        alone = sum(int((~matches(*way, tolerance)[0]).sum()) for pair in pairs for way in (pair, pair[::-1]))
        total = sum(len(found.dets) for pair in pairs for found in pair)
        if total < 10 * batch:
            raise Parity(f"{total} detections of {batch} images are too few to compare")
        return few_differ(alone, total, "detections", 0.1)  # of random weights many scores are alike

    ways: dict[str, Callable[[torch.dtype], Callable[..., Any]]] = {
        "predictor": predictor,
        "triton, folded" if cuda else "folded": folded,
        "eager, channels_last": partial(eager, torch.channels_last),
        "eager": partial(eager, torch.contiguous_format),
    }
    if mode is not None:
        ways = {"predictor": predictor, f"torch.compile, {mode}": compiled}
    what = "a JPEG" if files else f"{batch} frame{'s' * (batch > 1)} in memory"
    return Case(
        op="predict",
        name=f"{'RT-DETR' if task == 'rtdetr' else 'RTMDet'}-{size}, {what} of {side} x {HEIGHT * side // SIDE} at "
        f"{side} px" + ("" if mode is None else f", beside torch.compile, {mode}"),
        shapes={"images": [batch, HEIGHT * side // SIDE, side, 3]},
        inputs=inputs,
        expected=lambda images: model(torch.float64).predict(images, **options),
        compare=compare,
        contenders=[
            Contender(
                name=name,
                build=partial(built, make),
                result=lambda out: out[1] or out[0],
                warm_up=3 if make is compiled else 0,
            )
            for name, make in ways.items()
        ],
        headline=headline and mode is None,
        late=mode is not None,
        images=batch,
    )


def _case(engine: str, size: str) -> Case:
    def network() -> Callable[..., Any]:
        if engine == "torch":
            run = inference(_model(size).fold())
            return lambda path, images: run(images)
        try:
            path = _folder() / f"{size}.xml"
            _model(size).export(path, nms=False, batch_size=1)
            _, run_file = open_file(path, torch.get_num_threads(), "fp32")
        except UserError as error:
            raise Absent(str(error)) from error
        return lambda path, images: run_file(images.numpy())

    def predict() -> Callable[..., Any]:
        options: dict[str, Any] = dict(engine=engine, threads=torch.get_num_threads(), score_threshold=SCORE_THRESHOLD)
        try:
            predictor = _model(size).predictor(**options)
        except UserError as error:
            raise Absent(str(error)) from error
        return lambda path, images: predictor.predict(path)

    def outputs(found: Any) -> list[Tensor]:
        """Boxes and scores of every place."""
        if isinstance(found, dict):
            return [torch.from_numpy(found[name]) for name in ("boxes", "scores")]
        return list(_model(size).boxes_and_scores(HeadOutput(*found), (SIDE, SIDE)))

    return Case(
        op="predict",
        name=f"RTMDet-{size} by {engine}, a JPEG of {SIDE} x {HEIGHT} at {SIDE} px",
        shapes={"image": [HEIGHT, SIDE, 3]},
        inputs=_inputs,
        expected=partial(_expected, size),
        compare=_compare,
        contenders=[
            Contender(name="reference", build=network, result=outputs),
            Contender(name="predict", build=predict),
        ],
    )


def _expected(size: str, path: str, images: Tensor) -> tuple[list[Tensor], Results]:
    model = copy.deepcopy(_model(size)).double()
    return list(WithoutNMS(model)(images.double())), model.predict(path, score_threshold=SCORE_THRESHOLD)


def _compare(result: list[Tensor] | Results, expected: tuple[list[Tensor], Results]) -> str:
    if not isinstance(result, Results):
        return relative_error(result, expected[0], 1e-3)
    one, other = map(_found, (result, expected[1]))
    alone = sum(int((~matches(*pair, EXACT)[0]).sum()) for pair in ((one, other), (other, one)))
    if len(other.dets) < 10:
        raise Parity(f"{len(other.dets)} detections are too few to compare")
    return few_differ(alone, len(one.dets) + len(other.dets), "detections", 0.02)


def _found(result: Results) -> Found:
    return Found(torch.cat((result.boxes, result.scores[:, None]), 1), result.labels, None)


@cache
def _model(size: str) -> Detector:
    return confident("det", size, SIDE)


def _noise(seed: int, height: int, width: int) -> np.ndarray:
    """A frame [H, W, 3] uint8."""
    return np.random.default_rng(seed).normal(114, 57, (height, width, 3)).clip(0, 255).astype(np.uint8)


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _inputs(seed: int) -> tuple[str, Tensor]:
    """A file, and the network's input that is made of it."""
    import cv2

    path = _folder() / f"{seed}.jpg"
    cv2.imwrite(str(path), _noise(seed, HEIGHT, SIDE), [cv2.IMWRITE_JPEG_QUALITY, 50])  # as large as a photo's
    canvas, _ = RTMDet.to_canvas(cv2.imread(str(path)), SIDE)
    return str(path), RTMDet.normalize(torch.from_numpy(canvas).permute(2, 0, 1)[None]).contiguous()
