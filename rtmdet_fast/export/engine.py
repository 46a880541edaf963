"""Exported files as detectors: predict and evaluation of what will be deployed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rtmdet_fast.devices import pick_device
from rtmdet_fast.errors import UserError
from rtmdet_fast.export.agreement import Run
from rtmdet_fast.inference.detections import Detections, DetectSettings
from rtmdet_fast.inference.masks import PredictedMasks
from rtmdet_fast.models.checkpoint import EXPORTED
from rtmdet_fast.models.detector import Detector
from rtmdet_fast.models.families import FAMILIES, load_model

RUNTIMES = dict(zip(EXPORTED, ("onnxruntime", "openvino", "aotinductor"), strict=True))
"""What runs an exported file, by its suffix."""
FORMATS = {"onnx": ".onnx", "openvino": ".xml", "pt2": ".pt2"}
"""Of exported files, by the names that a user gives, and what these end in."""
Dtype = Literal["auto", "fp32", "bf16", "fp16"]


class Engine(Detector):
    """An exported model: `predict`, `detect` and `evaluate` take it as they take the model it was made from.

    Score threshold, IoU threshold and detections are bounded by what the file was exported with.
    """

    def __init__(self, path: Path, metadata: dict[str, Any], run: Run):
        super().__init__()
        if not metadata["nms"]:
            raise UserError(f"{path} was exported without NMS, for other clients: it gives no detections")
        self.path, self.metadata, self.run = path, metadata, run
        self.size, self.task = metadata["size"], metadata["task"]
        self.class_names = tuple(metadata["class_names"])
        self.image_size, self.patch_size = metadata["image_size"], metadata["patch_size"]
        self.has_masks = metadata["has_masks"]
        self.test_settings = DetectSettings(**metadata["settings"])
        thresholds = metadata.get("score_thresholds")
        self.score_thresholds = None if thresholds is None else tuple(map(float, thresholds))
        family = FAMILIES[metadata["family"]]
        # what a family does to pixels takes no weights
        self.to_canvas = family.to_canvas  # type: ignore[method-assign]
        self.normalize = family.normalize  # type: ignore[method-assign]
        self.to_image = family.to_image  # type: ignore[method-assign]

    @property
    def title(self) -> str:
        return self.metadata["title"]

    @torch.no_grad()
    def detect(
        self,
        canvases: Tensor,
        scales: Sequence[tuple[float, float]],
        shapes: Sequence[tuple[int, int]],
        *,
        settings: DetectSettings | None = None,
        clip_to_image: bool = False,
    ) -> list[Detections]:
        settings = settings or self.test_settings
        self._check(settings, canvases.shape[2])
        images = self.normalize(canvases.contiguous()).contiguous().numpy()  # bytes are moved, not floats
        step = self.metadata["batch_size"] or len(images)
        found: list[Detections] = []
        for start in range(0, len(images), step):
            part = images[start : start + step]
            missing = np.zeros((step - len(part), *part.shape[1:]), part.dtype)
            outputs = self.run(np.concatenate([part, missing]) if len(missing) else part)
            found += [self._detections(outputs, i, settings) for i in range(len(part))]
        return [
            self.to_image(detections, scale, shape, clip=clip_to_image)
            for detections, scale, shape in zip(found, scales, shapes, strict=True)
        ]

    def _detections(self, outputs: dict[str, np.ndarray], i: int, settings: DetectSettings) -> Detections:
        """Those of image i that pass the settings, in pixels of the network's input."""
        dets = torch.from_numpy(outputs["dets"][i].astype(np.float32))
        labels = torch.from_numpy(outputs["labels"][i].astype(np.int64))
        # they fall by score, so that what passes comes first
        count = int(((labels >= 0) & (dets[:, -1] > settings.score_threshold)).sum())
        count = min(count, settings.max_detections)
        masks = None
        if self.has_masks:
            logits = torch.from_numpy(outputs["mask_logits"][i, :count].astype(np.float32))
            masks = PredictedMasks(logits, (1.0, 1.0), (0, 0))
        return Detections(dets[:count, :-1], dets[:count, -1], labels[:count], torch.full((count,), -1), masks)

    def _check(self, settings: DetectSettings, side: int) -> None:
        made = self.test_settings
        if settings.iou_threshold != made.iou_threshold:
            raise UserError(
                f"{self.path} was exported with an iou_threshold of {made.iou_threshold}, and {settings.iou_threshold} "
                "is asked for: leave it out, or export anew"
            )
        if settings.score_threshold < made.score_threshold:
            raise UserError(
                f"{self.path} was exported with a score_threshold of {made.score_threshold}: "
                f"{settings.score_threshold} is below"
            )
        if settings.max_detections > made.max_detections:
            raise UserError(
                f"{self.path} was exported with max_detections of {made.max_detections}: {settings.max_detections} "
                "is above"
            )
        if not self.metadata["dynamic"] and side != self.image_size:
            raise UserError(f"{self.path} takes images of {self.image_size} pixels, not {side}: export anew")

    def save(self, path: str | Path, **extra: Any) -> None:
        raise UserError(f"{self.path} is an exported file: save the model that it was made from")


def load_engine(path: str | Path, threads: int | None = None, dtype: Dtype = "auto", *, device: str = "auto") -> Engine:
    """An exported .onnx (run by ONNX Runtime), .xml (by OpenVINO) or .pt2 file (by PyTorch) as a detector.

    Task, classes and sizes come from the file. A .pt2 file holds machine code: load those alone that you trust.

    Args:
        path: the file.
        threads: of ONNX Runtime and OpenVINO; as many as they like where not given.
        dtype: bf16 or fp16, in which OpenVINO computes where the processor can; fp32 where not given. What the file has
            as int8 stays so.
        device: auto takes what the runtime prefers; cuda is for an ONNX Runtime that was built for it.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    if path.suffix not in RUNTIMES:
        raise UserError(f"{path} is no exported model: {', '.join(RUNTIMES)} are")
    try:
        return Engine(path, *open_file(path, threads, dtype, device))
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} was not exported by rtmdet_fast, or its metadata is damaged") from error


def open_file(
    path: Path, threads: int | None = None, dtype: Dtype = "auto", device: str = "auto"
) -> tuple[dict[str, Any], Run]:
    """The metadata of an exported file, and what runs it; see `load_engine`.

    ValueError, TypeError or KeyError where the metadata is not what `export` writes.
    """
    if path.suffix == ".xml":
        from rtmdet_fast.export.openvino import open_openvino

        if device not in ("auto", "cpu"):
            raise UserError(f"--device {device!r} cannot be used: {path} is run by OpenVINO, on the CPU")
        text, run = open_openvino(path, threads, dtype)
        return json.loads(text), run
    if dtype in ("bf16", "fp16"):
        raise UserError(f"{path} cannot run in {dtype}: files of OpenVINO (.xml) can")
    if path.suffix == ".pt2":
        from rtmdet_fast.export.pt2 import open_pt2

        metadata, run = open_pt2(path)
        if device != "auto" and device.partition(":")[0] != metadata["device"]:
            raise UserError(f"--device {device!r} cannot be used: {path} was compiled for {metadata['device']}")
        return metadata, run
    text, run = open_onnx(path, threads, device)
    return json.loads(text), run


def open_onnx(path: Path, threads: int | None, device: str = "auto") -> tuple[str, Run]:
    """The metadata of an ONNX file, and what runs it."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError("onnxruntime is not installed: pip install 'rtmdet-fast[export]'") from error
    providers: list[Any] = onnxruntime.get_available_providers()
    if device == "cpu":
        providers = ["CPUExecutionProvider"]
    elif device != "auto":
        kind, _, number = device.partition(":")
        if kind != "cuda" or "CUDAExecutionProvider" not in providers:
            raise UserError(
                f"--device {device!r} cannot be used: {path} is run by ONNX Runtime, which is installed here for "
                f"{', '.join(name.removesuffix('ExecutionProvider') for name in providers)}"
            )
        providers = [("CUDAExecutionProvider", {"device_id": number or "0"}), "CPUExecutionProvider"]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # its exceptions have no common base but this one
        raise UserError(f"{path} cannot be read by ONNX Runtime: {str(error).splitlines()[0]}") from error
    names = [output.name for output in session.get_outputs() if output.name != "masks"]
    run_options = onnxruntime.RunOptions()
    run_options.only_execute_path_to_fetches = True  # `masks` are for other clients, and take long
    metadata = session.get_modelmeta().custom_metadata_map.get("rtmdet_fast", "")

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(names, session.run(names, {"input": images}, run_options), strict=True))

    return metadata, run


def load_detector(weights: str, device: str = "auto", dtype: Dtype = "auto", **options: Any) -> Detector:
    """A detector in eval mode from a weights file or published name, or from an exported file, on `device`.

    options: of the model's family, which an exported file has none of.
    """
    if Path(weights).suffix in RUNTIMES:
        if options:
            raise UserError(
                f"{weights} is an exported file, which takes no {next(iter(options))}: export it anew with it"
            )
        return load_engine(weights, dtype=dtype, device=device)
    if dtype in ("bf16", "fp16"):
        raise UserError(f"{weights} cannot run in {dtype}: files of OpenVINO (.xml) can")
    return load_model(weights, **options).to(pick_device(device))
