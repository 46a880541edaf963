"""Export of a model: the file is written, seen to detect what the model does, and only then put in its place."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rtmdet_fast import __version__
from rtmdet_fast.devices import pick_device
from rtmdet_fast.errors import UserError
from rtmdet_fast.export.agreement import EXACT, INT8, Agreement, compare
from rtmdet_fast.export.engine import FORMATS, open_file
from rtmdet_fast.export.graph import EndToEnd, Graph, WithoutNMS
from rtmdet_fast.export.int8 import CALIBRATION_IMAGES, calibration_canvases, network_inputs, quantize
from rtmdet_fast.export.onnx import export_onnx
from rtmdet_fast.export.openvino import convert_to_openvino, import_openvino
from rtmdet_fast.export.pt2 import export_pt2
from rtmdet_fast.files import folder_beside
from rtmdet_fast.images import read_image
from rtmdet_fast.inference.detections import DetectSettings
from rtmdet_fast.models.detector import Detector, check_image_size
from rtmdet_fast.models.families import FAMILIES

CHECKED_IMAGES = 8
"""At most, of those given."""


def export(
    model: Detector,
    path: str | Path,
    *,
    format: str | None = None,
    image_size: int | None = None,
    dynamic: bool = False,
    batch_size: int | None = None,
    score_threshold: float | None = None,
    iou_threshold: float | None = None,
    max_detections: int | None = None,
    candidates: int = 3000,
    nms: bool = True,
    int8: bool = False,
    calibrate: str | Path | None = None,
    calibration_images: int = CALIBRATION_IMAGES,
    images: Sequence[str | Path | np.ndarray] = (),
) -> Agreement:
    """Write `model` with its post-processing to a file for another runtime, and see that it detects what `model` does.

    Args:
        path: .onnx, .xml (OpenVINO, with a .bin beside it) or .pt2 (compiled for the device and kind of processor
            of this machine).
        format: onnx, openvino or pt2, where the suffix of the path is not to decide.
        image_size: side in pixels of the square input, the model's own where not given.
        dynamic: any sides that are multiples of 32.
        batch_size: images of a call; any number where not given.
        score_threshold, iou_threshold, max_detections: the published test settings of the task where not given.
        candidates: the best candidates of an image, which alone NMS sees.
        nms: False for boxes and scores as they are before it, for other clients.
        int8: of OpenVINO, in the ranges that the images of the folder `calibrate` show, `calibration_images` of them.
        images: that the two are compared on; those of `calibrate`, or noise, where not given.

    Raises UserError where weights are not finite, or the file does not detect what the model does; what lay at `path`
    before stays then.
    """
    path = Path(path)
    check_format(path, format)
    openvino = path.suffix == ".xml"
    if dynamic and image_size is not None:
        raise UserError("image_size and dynamic exclude each other")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be at least 1")
    if int8 and not openvino:
        raise UserError(f"{path} cannot hold int8, which is for OpenVINO: give a path that ends in .xml")
    if int8 and calibrate is None:
        raise UserError("int8 takes images to calibrate with: give a folder of them, of the training split")
    if calibrate is not None and not int8:
        raise UserError("calibrate is for int8 alone")
    if calibration_images < 1:
        raise UserError(f"calibration_images is {calibration_images}; it must be at least 1")
    if not nms and model.has_masks:
        raise UserError("a model with masks is exported with its NMS only, which tells whose masks are wanted")
    if openvino:
        import_openvino()  # which is missed at once, and not after a minute
    settings = _settings(model, score_threshold, iou_threshold, max_detections, candidates)
    side = check_image_size(model.image_size if image_size is None else image_size)
    canvases = []
    if calibrate is not None:
        canvases = calibration_canvases(model, Path(calibrate), side, calibration_images)
    device = pick_device("auto") if path.suffix == ".pt2" else torch.device("cpu")
    folded = model.fold().float().to(device)
    if odd := [name for name, tensor in folded.state_dict().items() if not tensor.isfinite().all()]:
        raise UserError(f"the weights are not finite, so the model detects nothing: {', '.join(odd[:3])}")
    graph: Graph
    if nms:  # pixels of masks are for other clients than ours
        graph = EndToEnd(folded, settings, candidates, full_masks=path.suffix != ".pt2").eval()
    else:
        graph = WithoutNMS(folded).eval()
    metadata = {
        "version": __version__,
        "family": next(name for name, family in FAMILIES.items() if isinstance(model, family)),
        "title": model.title,
        "size": model.size,
        "task": model.task,
        "has_masks": model.has_masks,
        "class_names": list(model.class_names),
        "image_size": side,
        "dynamic": dynamic,
        "batch_size": batch_size,
        "patch_size": model.patch_size,
        "settings": asdict(settings),
        "score_thresholds": model.score_thresholds,
        "input": model.input_description,
        "nms": nms,
        "int8": int8,
        "outputs": graph.output_names,
    }
    shown = [*map(_pixels, images[:CHECKED_IMAGES])]
    with folder_beside(path) as folder:
        written = folder / path.name
        shape = None if dynamic else side, batch_size
        if path.suffix == ".onnx":
            export_onnx(graph, written, metadata, *shape)
        elif openvino:
            export_onnx(graph, folder / "model.onnx", metadata, *shape)
            prepare = (lambda network: quantize(network, model, canvases, batch_size or 1)) if int8 else (lambda n: n)
            convert_to_openvino(folder / "model.onnx", written, metadata, prepare)
        else:
            export_pt2(graph, written, metadata, *shape)
        _, run = open_file(written)
        inputs = [model.to_canvas(image, side)[0] for image in shown] or canvases[:CHECKED_IMAGES]
        tolerance = INT8 if int8 else EXACT
        agreement = compare(graph, run, _batches(model, inputs, side, batch_size or 2), tolerance)
        if not agreement.is_within(tolerance):
            raise UserError(f"{path} would not detect what the model does, and is not written: {agreement}")
        path.unlink(missing_ok=True)  # never one's .xml beside another's .bin
        for part in (written.with_suffix(".bin"), written) if openvino else (written,):
            os.replace(part, path.with_suffix(part.suffix))
    return agreement


def check_format(path: Path, format: str | None) -> None:
    """Raises UserError where the suffix is none that a model is exported to, or not that of the format."""
    if format is not None and format not in FORMATS:
        raise UserError(f"format {format!r} is unknown; choose one of {', '.join(FORMATS)}")
    if format is not None and path.suffix != FORMATS[format]:
        raise UserError(f"{path} should end in {FORMATS[format]}, as files of format {format} do")
    if path.suffix not in FORMATS.values():
        raise UserError(f"{path} should end in .onnx, .xml (OpenVINO) or .pt2 (compiled by PyTorch)")


def _settings(
    model: Detector,
    score_threshold: float | None,
    iou_threshold: float | None,
    max_detections: int | None,
    candidates: int,
) -> DetectSettings:
    published = model.test_settings
    settings = replace(
        published,
        score_threshold=published.score_threshold if score_threshold is None else score_threshold,
        iou_threshold=published.iou_threshold if iou_threshold is None else iou_threshold,
        max_detections=published.max_detections if max_detections is None else max_detections,
        nms_pre=max(published.nms_pre, candidates),
    )
    for name in ("score_threshold", "iou_threshold"):
        if not 0 <= getattr(settings, name) <= 1:
            raise UserError(f"{name} is {getattr(settings, name)}; it must lie in [0, 1]")
    if settings.max_detections < 1 or candidates < 1:
        raise UserError(f"max_detections {settings.max_detections} and candidates {candidates} must be at least 1")
    return settings


def _pixels(image: str | Path | np.ndarray) -> np.ndarray:
    return image if isinstance(image, np.ndarray) else read_image(image)


def _batches(model: Detector, canvases: Sequence[np.ndarray], side: int, batch_size: int) -> Iterator[Tensor]:
    """Normalised images [batch_size, 3, S, S]: those given, round and round to the last batch, or noise."""
    if not canvases:
        yield noise(batch_size, side)
    for start in range(0, len(canvases), batch_size):
        batch = [canvases[(start + i) % len(canvases)] for i in range(batch_size)]
        yield torch.from_numpy(network_inputs(model, batch))


def noise(batch_size: int, side: int) -> Tensor:
    """[batch_size, 3, S, S], in blocks of several sizes."""
    generator = torch.Generator().manual_seed(0)
    blocks = [torch.randn(batch_size, 3, side // n, side // n, generator=generator) for n in (1, 4, 16)]
    return torch.stack([torch.nn.functional.interpolate(block, size=(side, side)) for block in blocks]).sum(0)
