"""From a JPEG to boxes by `predict`, on a CPU: what decoding, resizing, NMS and all else cost over the network alone.

`reference` is the network, on an image that is ready; how many times as long `predict` takes is the overhead.
"""

from __future__ import annotations

import atexit
import copy
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benches.bench_engines import inference
from benches.confident import confident
from benches.harness import Absent, Case, Contender, Parity, few_differ, relative_error
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
    return [_case(engine) for engine in ("torch", "openvino")]  # on the CPU, whatever the device


def _case(engine: str) -> Case:
    def network() -> Callable[..., Any]:
        if engine == "torch":
            run = inference(_model().fold())
            return lambda path, images: run(images)
        try:
            path = _folder() / "network.xml"
            _model().export(path, nms=False, batch_size=1)
            _, run_file = open_file(path, torch.get_num_threads(), "fp32")
        except UserError as error:
            raise Absent(str(error)) from error
        return lambda path, images: run_file(images.numpy())

    def predict() -> Callable[..., Any]:
        options: dict[str, Any] = dict(engine=engine, threads=torch.get_num_threads(), score_threshold=SCORE_THRESHOLD)
        try:
            predictor = _model().predictor(**options)
        except UserError as error:
            raise Absent(str(error)) from error
        return lambda path, images: predictor.predict(path)

    def outputs(found: Any) -> list[Tensor]:
        """Boxes and scores of every place."""
        if isinstance(found, dict):
            return [torch.from_numpy(found[name]) for name in ("boxes", "scores")]
        return list(_model().boxes_and_scores(HeadOutput(*found), (SIDE, SIDE)))

    return Case(
        op="predict",
        name=f"RTMDet-tiny by {engine}, a JPEG of {SIDE} x {HEIGHT} at {SIDE} px",
        shapes={"image": [HEIGHT, SIDE, 3]},
        inputs=_inputs,
        expected=_expected,
        compare=_compare,
        contenders=[
            Contender(name="reference", build=network, result=outputs),
            Contender(name="predict", build=predict),
        ],
    )


def _expected(path: str, images: Tensor) -> tuple[list[Tensor], Results]:
    model = copy.deepcopy(_model()).double()
    return list(WithoutNMS(model)(images.double())), model.predict(path, score_threshold=SCORE_THRESHOLD)


def _compare(result: list[Tensor] | Results, expected: tuple[list[Tensor], Results]) -> str:
    if not isinstance(result, Results):
        return relative_error(result, expected[0], 1e-3)
    one, other = (
        Found(torch.cat((found.boxes, found.scores[:, None]), 1), found.labels, None) for found in (result, expected[1])
    )
    alone = sum(int((~matches(*pair, EXACT)[0]).sum()) for pair in ((one, other), (other, one)))
    if len(other.dets) < 10:
        raise Parity(f"{len(other.dets)} detections are too few to compare")
    return few_differ(alone, len(one.dets) + len(other.dets), "detections", 0.02)


@cache
def _model() -> Detector:
    return confident("det", "tiny", SIDE)


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _inputs(seed: int) -> tuple[str, Tensor]:
    """A file, and the network's input that is made of it."""
    import cv2

    path = _folder() / f"{seed}.jpg"
    noise = np.random.default_rng(seed).normal(114, 57, (HEIGHT, SIDE, 3)).clip(0, 255).astype(np.uint8)
    cv2.imwrite(str(path), noise, [cv2.IMWRITE_JPEG_QUALITY, 50])  # as large as a photo's
    canvas, _ = _model().to_canvas(cv2.imread(str(path)), SIDE)
    return str(path), _model().normalize(torch.from_numpy(canvas).permute(2, 0, 1)[None]).contiguous()
