"""From a JPEG to boxes by `predict`, on a CPU: what decoding, resizing, NMS and all else cost over the network alone.

`reference` is the network, on an image that is ready; how many times as long `predict` takes is the overhead.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benches.bench_engines import CLASSES, CPU, SIDE, exported, inference
from benches.harness import Absent, Case, Contender, few_differ, relative_error
from benches.models import ours, pictures
from rtmdet_fast.errors import UserError
from rtmdet_fast.export.agreement import EXACT, Found, matches
from rtmdet_fast.export.engine import open_file
from rtmdet_fast.export.graph import WithoutNMS
from rtmdet_fast.inference.results import Results
from rtmdet_fast.models.rtmdet.detection_head import HeadOutput

HEIGHT = 480
SCORE_THRESHOLD = 0.6
"""Which of random scores leaves some hundred candidates, as a trained model has at its default."""


def cases(device: torch.device) -> list[Case]:
    return [_case(engine) for engine in ("torch", "openvino")]  # on the CPU, whatever the device


def _case(engine: str) -> Case:
    def network() -> Callable[..., Any]:
        if engine == "torch":
            run = inference(ours("tiny", CLASSES, CPU).eval().fold())
            return lambda path, images: run(images)
        try:
            _, run_file = open_file(exported("tiny", ".xml", False), torch.get_num_threads(), "fp32")
        except UserError as error:
            raise Absent(str(error)) from error
        return lambda path, images: run_file(images.numpy())

    def predict() -> Callable[..., Any]:
        model = ours("tiny", CLASSES, CPU)
        options = dict(engine=engine, threads=torch.get_num_threads(), score_threshold=SCORE_THRESHOLD)
        try:
            predictor = model.predictor(**options)
        except UserError as error:
            raise Absent(str(error)) from error
        return lambda path, images: predictor.predict(path)

    def outputs(found: Any) -> list[Tensor]:
        """Boxes and scores of every place."""
        if isinstance(found, dict):
            return [torch.from_numpy(found[name]) for name in ("boxes", "scores")]
        return list(ours("tiny", CLASSES, CPU).boxes_and_scores(HeadOutput(*found), (SIDE, SIDE)))

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
    model = ours("tiny", CLASSES, CPU, torch.float64).eval()
    return list(WithoutNMS(model)(images.double())), model.predict(path, score_threshold=SCORE_THRESHOLD)


def _compare(result: list[Tensor] | Results, expected: tuple[list[Tensor], Results]) -> str:
    if not isinstance(result, Results):
        return relative_error(result, expected[0], 1e-3)
    one, other = (
        Found(torch.cat((found.boxes, found.scores[:, None]), 1), found.labels, None) for found in (result, expected[1])
    )
    alone = sum(int((~matches(*pair, EXACT)[0]).sum()) for pair in ((one, other), (other, one)))
    return few_differ(alone, len(one.dets) + len(other.dets), "detections", 0.02)


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _inputs(seed: int) -> tuple[str, Tensor]:
    """A file, and the network's input that is made of it."""
    import cv2

    path = _folder() / f"{seed}.jpg"
    image = pictures(1, SIDE, CPU, seed)[0, :, :HEIGHT].permute(1, 2, 0).contiguous().numpy()
    if not cv2.imwrite(str(path), image):
        raise Absent(f"{path} cannot be written")
    model = ours("tiny", CLASSES, CPU)
    canvas, _ = model.to_canvas(cv2.imread(str(path)), SIDE)
    return str(path), model.normalize(torch.from_numpy(canvas).permute(2, 0, 1)[None]).contiguous()
