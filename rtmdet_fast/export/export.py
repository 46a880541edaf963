"""Export of a model, and the check that what was written detects what the model does."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rtmdet_fast import __version__
from rtmdet_fast.errors import UserError
from rtmdet_fast.export.engine import load_engine
from rtmdet_fast.export.graph import EndToEnd
from rtmdet_fast.export.onnx import export_onnx
from rtmdet_fast.export.openvino import convert_to_openvino, import_openvino
from rtmdet_fast.models.detector import Detector, check_image_size
from rtmdet_fast.models.families import FAMILIES

BOX_TOLERANCE, SCORE_TOLERANCE = 0.05, 1e-4
"""Pixels of the network's input, and score, by which a detection may differ from the model's."""
UNMATCHED = 0.01
"""Share of the detections that may be others: of two scores that differ by rounding, or an IoU at the threshold."""


class Agreement(NamedTuple):
    """How far an exported file agrees with its model: detections compared, greatest differences, those unmatched."""

    detections: int
    box_error: float
    score_error: float
    unmatched: int


def export(
    model: Detector,
    path: str | Path,
    *,
    image_size: int | None = None,
    dynamic: bool = False,
    batch_size: int | None = None,
    score_threshold: float | None = None,
    iou_threshold: float | None = None,
    max_detections: int | None = None,
    candidates: int = 3000,
) -> Agreement:
    """Write `model` with its post-processing to a file for another runtime, and compare the two on noise.

    path: .onnx, or .xml (OpenVINO, with a .bin beside it).
    image_size: side in pixels of the square input, the model's own where not given; dynamic: any multiples of 32.
    batch_size: images of a call; any number where not given.
    score_threshold, iou_threshold, max_detections: the published test settings of the task where not given.
    candidates: the best candidates of an image, which alone NMS sees.

    Raises UserError where the file does not detect what the model does; it is deleted then.
    """
    path = Path(path)
    if path.suffix not in (".onnx", ".xml"):
        raise UserError(f"{path} should end in .onnx or .xml (OpenVINO)")
    if dynamic and image_size is not None:
        raise UserError("image_size and dynamic exclude each other")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be at least 1")
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
    side = check_image_size(model.image_size if image_size is None else image_size)
    metadata = {
        "version": __version__,
        "family": next(name for name, family in FAMILIES.items() if isinstance(model, family)),
        "size": model.size,
        "task": model.task,
        "has_masks": model.has_masks,
        "class_names": list(model.class_names),
        "image_size": side,
        "dynamic": dynamic,
        "batch_size": batch_size,
        "patch_size": model.patch_size,
        "settings": asdict(settings),
        "input": model.input_description,
    }
    graph = EndToEnd(model.fold().cpu().float(), settings, candidates).eval()
    written_side = None if dynamic else side
    if path.suffix == ".onnx":
        export_onnx(graph, path, metadata, written_side, batch_size)
    else:
        import_openvino()  # which is missed at once, and not after a minute
        with tempfile.TemporaryDirectory() as folder:
            onnx_path = Path(folder) / "model.onnx"
            export_onnx(graph, onnx_path, metadata, written_side, batch_size)
            convert_to_openvino(onnx_path, path, metadata)
    agreement = compare(graph, path, side, batch_size or 2)
    if (
        agreement.box_error > BOX_TOLERANCE
        or agreement.score_error > SCORE_TOLERANCE
        or agreement.unmatched > max(UNMATCHED * agreement.detections, 1)
    ):
        for written in (path, path.with_suffix(".bin")) if path.suffix == ".xml" else (path,):
            written.unlink()
        raise UserError(f"{path} does not detect what the model does, and is deleted: {agreement}")
    return agreement


@torch.no_grad()
def compare(graph: EndToEnd, path: Path, side: int, batch_size: int) -> Agreement:
    """The file's detections beside the graph's, on images of noise in blocks of several sizes."""
    engine = load_engine(path)
    generator = torch.Generator().manual_seed(0)
    blocks = [torch.randn(batch_size, 3, side // n, side // n, generator=generator) for n in (1, 4, 16)]
    images = torch.stack([torch.nn.functional.interpolate(block, size=(side, side)) for block in blocks]).sum(0)
    expected, found = graph(images), engine.run(images.numpy())
    total = unmatched = 0
    box_error = score_error = 0.0
    for dets, labels, other_dets, other_labels in zip(
        *expected[:2], *(torch.from_numpy(found[name]) for name in ("dets", "labels")), strict=True
    ):
        ours, theirs = dets[labels >= 0], other_dets[other_labels >= 0]
        pairs = match(ours, labels[labels >= 0], theirs, other_labels[other_labels >= 0])
        total += len(ours)
        unmatched += max(len(ours), len(theirs)) - len(pairs)
        if len(pairs):
            difference = (ours[pairs[:, 0]] - theirs[pairs[:, 1]]).abs()
            box_error = max(box_error, float(difference[:, :4].max()))
            score_error = max(score_error, float(difference[:, -1].max()))
    return Agreement(total, box_error, score_error, unmatched)


def match(ours: Tensor, labels: Tensor, theirs: Tensor, other_labels: Tensor) -> Tensor:
    """Pairs [P, 2] of detections [D, 5 or 6] and [E, 5 or 6] of one label that lie within a pixel and 0.01 of score."""
    if not len(ours) or not len(theirs):
        return torch.zeros(0, 2, dtype=torch.int64)
    away = (ours[:, None, :4] - theirs[None, :, :4]).abs().amax(2)
    near = (away < 1) & ((ours[:, None, -1] - theirs[None, :, -1]).abs() < 0.01)
    near &= labels[:, None] == other_labels[None]
    away = away.masked_fill(~near, torch.inf)
    nearest = away.argmin(1)
    mutual = (away.argmin(0)[nearest] == torch.arange(len(ours))) & near.any(1)
    return torch.stack([torch.arange(len(ours))[mutual], nearest[mutual]], 1)
