"""rtmdet-fast export."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rtmdet_fast.cli.output import Outcome, figure
from rtmdet_fast.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a model with its post-processing for another runtime; predict and eval take the file as weights too."""

    weights: str
    """Weights file, or a published name such as rtmdet-tiny."""
    out: Path
    """The file to write: .onnx, .xml (OpenVINO, with a .bin beside it) or .pt2 (compiled for this machine)."""
    format: Literal["onnx", "openvino", "pt2"] | None = None
    """What the suffix of --out says already."""
    image_size: int | None = None
    """Side of the network input in pixels; the model's own where not given."""
    dynamic: bool = False
    """Leave the sides of the input open: any multiples of 32."""
    batch_size: int | None = None
    """Images of a call; any number where not given."""
    decoder_layers: int | None = None
    """Of rtdetr: run so many layers of its decoder, with fewer faster and less exact; as published where not given."""
    score_threshold: float | None = None
    """Least score of a detection; the published test setting of the task where not given."""
    iou_threshold: float | None = None
    """IoU of NMS; the published test setting of the task where not given."""
    max_detections: int | None = None
    """Detections of an image; the published test setting of the task where not given."""
    candidates: int = 3000
    """The best candidates of an image, which alone NMS sees."""
    nms: bool = True
    """Without it the file gives boxes and scores as they are before NMS, for other clients."""
    int8: bool = False
    """Compute in 8 bits (OpenVINO), in the ranges that the images of --calibrate show."""
    calibrate: Path | None = None
    """Images for --int8: a folder of them, of the training split, not of the one to evaluate on; or a data set, whose
    training images are taken."""
    calibration_images: int = 128
    """How many of them are taken."""
    data: tuple[Path, ...] = ()
    """Folder of a data set, of whatever format, or a data.yaml: compare on its validation images, and tell AP before
    and after."""
    json: Path | None = None
    """Write what was exported, and how well it agrees, to this file."""


def run_export(config: ExportConfig) -> Outcome:
    from rtmdet_fast.data.layout import find_sources, training_images
    from rtmdet_fast.evaluation.evaluate import evaluate
    from rtmdet_fast.export.engine import load_engine
    from rtmdet_fast.export.export import check_format, export
    from rtmdet_fast.models.families import load_model
    from rtmdet_fast.tasks import TASKS

    check_format(config.out, config.format)  # before AP, which takes long
    if config.data and not config.nms:
        raise UserError("--data needs detections, which a file without NMS does not give: leave one of them out")
    options = {} if config.decoder_layers is None else {"decoder_layers": config.decoder_layers}
    model = load_model(config.weights, **options)
    metrics: list[dict[str, float]] = []
    images: list[Path] = []
    if config.data:
        sources = find_sources(config.data, "val")
        dataset = TASKS[model.task].open_dataset(sources, class_names=model.class_names)
        images = [dataset.image_dir / file for file in dataset.files]
        metrics.append(evaluate(model, dataset, image_size=config.image_size).metrics)
    agreement = export(
        model,
        config.out,
        format=config.format,
        image_size=config.image_size,
        dynamic=config.dynamic,
        batch_size=config.batch_size,
        score_threshold=config.score_threshold,
        iou_threshold=config.iou_threshold,
        max_detections=config.max_detections,
        candidates=config.candidates,
        nms=config.nms,
        int8=config.int8,
        calibrate=config.calibrate and (training_images(config.calibrate) or config.calibrate),
        calibration_images=config.calibration_images,
        images=images,
    )
    on = "real images" if images or config.int8 else "noise"
    line = (
        f"{config.out}: {model.title}, task {model.task}; of {agreement.detections} "
        f"{'detections' if config.nms else 'boxes'} on {on} {agreement.unmatched} differ from the model's, the others "
        f"by {agreement.box_error:.1e} pixels and {agreement.score_error:.1e} of score at most"
    )
    lines = [line]
    if config.data:
        engine = load_engine(config.out)
        metrics.append(evaluate(engine, dataset).metrics)
        lines += [f"{name:10} {figure(before)} -> {figure(metrics[1][name])}" for name, before in metrics[0].items()]
        if engine.test_settings != replace(model.test_settings, nms_pre=engine.test_settings.nms_pre):
            lines.append("before: by the published test settings; after: by those of the file")
    found = {"out": str(config.out), **agreement._asdict()}
    if metrics:
        found |= {"before": metrics[0], "after": metrics[1]}
    return Outcome(found, lines)
