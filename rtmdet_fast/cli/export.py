"""rtmdet-fast export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rtmdet_fast.cli.output import Outcome


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a model with its post-processing as ONNX or OpenVINO file, which predict and eval take as weights too."""

    weights: str
    """Weights file, or a published name such as rtmdet-tiny."""
    out: Path
    """The file to write: .onnx, or .xml (OpenVINO, with a .bin beside it)."""
    image_size: int | None = None
    """Side of the network input in pixels; the model's own where not given."""
    dynamic: bool = False
    """Leave the sides of the input open: any multiples of 32."""
    batch_size: int | None = None
    """Images of a call; any number where not given."""
    score_threshold: float | None = None
    """Least score of a detection; the published test setting of the task where not given."""
    iou_threshold: float | None = None
    """IoU of NMS; the published test setting of the task where not given."""
    max_detections: int | None = None
    """Detections of an image; the published test setting of the task where not given."""
    candidates: int = 3000
    """The best candidates of an image, which alone NMS sees."""
    json: Path | None = None
    """Write what was exported, and how well it agrees, to this file."""


def run_export(config: ExportConfig) -> Outcome:
    from rtmdet_fast.export.export import export
    from rtmdet_fast.models.families import load_model

    model = load_model(config.weights)
    agreement = export(
        model,
        config.out,
        image_size=config.image_size,
        dynamic=config.dynamic,
        batch_size=config.batch_size,
        score_threshold=config.score_threshold,
        iou_threshold=config.iou_threshold,
        max_detections=config.max_detections,
        candidates=config.candidates,
    )
    line = (
        f"{config.out}: {model.title}, task {model.task}; on noise its {agreement.detections} detections are the "
        f"model's to {agreement.box_error:.1e} pixels and {agreement.score_error:.1e} of score"
    )
    return Outcome({"out": str(config.out), **agreement._asdict()}, [line])
