"""rtmdet-fast predict."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from rtmdet_fast.cli.output import Outcome, thresholds_told
from rtmdet_fast.errors import UserError
from rtmdet_fast.files import write_json


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Detect objects in images or videos; write pictures with boxes and predictions.json (COCO results form)."""

    source: tyro.conf.Positional[tuple[str, ...]]
    """Images, videos, folders and quoted patterns such as "photos/*.jpg", as many as wanted; or a camera's number."""
    weights: str
    """Weights file, a published name such as rtmdet-tiny, or an exported .onnx or .xml file."""
    out: Path = Path("runs/predict")
    """Folder for pictures and predictions.json."""
    score_threshold: float | None = None
    """Least score of a detection. Where not given, that of each class which the training found to be the best and kept
    with the weights; 0.3 where there is none."""
    image_size: int | None = None
    """Side of the network input in pixels; the model's own where not given."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes the first GPU where there is one."""
    batch_size: int = 1
    """Images, or windows, in a pass."""
    engine: Literal["auto", "torch", "onnxruntime", "openvino"] = "auto"
    """What runs the network. auto is what an exported file is for, and torch for weights; of these onnxruntime and
    openvino export a temporary file first."""
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Of the network; auto is fp16 on a GPU and fp32 elsewhere."""
    decoder_layers: int | None = None
    """Of rtdetr: run so many layers of its decoder, with fewer faster and less exact; as published where not given."""
    patch_size: int | None = None
    """Cut images with a longer side in pixels into overlapping windows of it, and merge what is found; 0 for never. The
    side of the training images where not given (rotated only)."""
    format: Literal["coco", "dota"] = "coco"
    """dota writes, beside predictions.json, the files of DOTA's Task 1 (rotated boxes)."""
    skip_bad: bool = False
    """Go on over unreadable files, and count them."""
    limit: int | None = None
    """Stop after so many frames (for a camera)."""
    json: Path | None = None
    """Write a summary to this file."""


def run_predict(config: PredictConfig) -> Outcome:
    from rtmdet_fast.data.dota import write_task1
    from rtmdet_fast.export.engine import load_detector
    from rtmdet_fast.inference.results import Results
    from rtmdet_fast.inference.sources import Frame, VideoWriter, iter_sources
    from rtmdet_fast.predictor.predictor import Predictor

    if config.limit is not None and config.limit < 1:
        raise UserError(f"--limit is {config.limit}; it must be at least 1")
    weights: Any = config.weights
    if config.decoder_layers is not None:
        weights = load_detector(config.weights, config.device, decoder_layers=config.decoder_layers)
    predictor = Predictor(
        weights,
        batch_size=config.batch_size,
        image_size=config.image_size,
        patch_size=config.patch_size,
        dtype=config.dtype,
        engine=config.engine,
        device=config.device,
        score_threshold=config.score_threshold,
    )
    names = predictor.class_names
    if config.format == "dota" and predictor.task != "rotated":
        raise UserError(f"--format dota needs a model of rotated boxes; {config.weights} is one of {predictor.task!r}")
    if config.format == "dota" and (wrong := [name for name in names if not _names_file(name)]):
        raise UserError(f"--format dota names a file after each class, which {wrong[0]!r} cannot be")
    source = iter_sources(config.source, skip_bad=config.skip_bad)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    found: list[tuple[str, Any, Any, Any]] = []
    inputs = {path.resolve() for path in source.paths}
    video: VideoWriter | None = None
    config.out.mkdir(parents=True, exist_ok=True)
    predictions = config.out / "predictions.json"

    def target(frame: Frame) -> Path:
        # the frames of a video are named after it and numbered
        return config.out / (f"{frame.name.rsplit('_', 1)[0]}.mp4" if frame.is_video else frame.name)

    def frames() -> Iterator[Frame]:
        """Those whose answers have a place; they are read in a thread of their own."""
        stems: dict[str, str] = {}
        for frame in source:
            if target(frame).resolve() in inputs:
                raise UserError(f"{target(frame)} is one of the files to look at: --out is for a folder of its own")
            stem = Path(frame.name).stem
            if config.format == "dota" and (twin := stems.setdefault(stem, frame.name)) != frame.name:
                raise UserError(f"{twin} and {frame.name} would both be {stem!r} in DOTA's files; give one of them")
            yield frame

    def keep(frame: Frame, results: Results) -> None:
        """In a thread of its own too."""
        nonlocal video
        if config.format == "dota":
            boxes, scores, labels = results.boxes, results.scores, results.labels
            found.append((Path(frame.name).stem, boxes.numpy(), scores.numpy(), labels.numpy()))
        image_id = len(images) + 1
        height, width = results.shape
        images.append({"id": image_id, "file_name": frame.name, "width": width, "height": height})
        for entry in results.to_coco(image_id, range(1, len(names) + 1)):
            annotations.append({"id": len(annotations) + 1, **entry, "area": area_of(entry), "iscrowd": 0})
        if not frame.is_video:
            results.save(target(frame))
            return
        if video is None or target(frame) != video.path:
            if video is not None:
                video.close()
            video = VideoWriter(target(frame), frame.fps)
        video.write(results.plot())

    def write_found() -> None:
        categories = [{"id": i, "name": name} for i, name in enumerate(names, start=1)]
        write_json(predictions, {"images": images, "annotations": annotations, "categories": categories})
        if config.format == "dota":
            write_task1(config.out / "Task1", names, found)

    started = time.perf_counter()
    stream = predictor.stream(frames(), write=keep, limit=config.limit, total=source.total, progress=True)
    try:
        try:
            for _ in stream:
                pass
        finally:
            if video is not None:
                video.close()
    except BaseException as error:  # an unreadable file, or Ctrl-C before a camera
        if images:
            write_found()
            if isinstance(error, UserError):
                raise UserError(f"{error}; what was found before that is in {predictions}") from error
        raise
    write_found()
    seconds = time.perf_counter() - started
    skipped = f", {len(source.unreadable)} unreadable files skipped" if source.unreadable else ""
    lines = [
        f"{len(annotations)} detections in {len(images)} images, {seconds:.1f} s{skipped}",
        f"pictures in {config.out}, boxes in {predictions}",
    ]
    if config.score_threshold is None and predictor.detector.score_thresholds is not None:
        told = thresholds_told(names, predictor.detector.score_thresholds)
        lines.append(f"score thresholds of the weights: {told} (--score-threshold sets one for all)")
    summary = {
        "images": len(images),
        "detections": len(annotations),
        "unreadable": source.unreadable,
        "seconds": seconds,
        "out": str(config.out),
        "predictions": str(predictions),
    }
    return Outcome(summary, lines)


def _names_file(name: str) -> bool:
    return not {*"/\0"} & {*name} and name.encode(errors="replace").decode() == name


def area_of(entry: dict[str, Any]) -> float:
    """Pixels of a detection's rotated box, of its mask, or of its box where it has neither."""
    if "area" in entry:
        return entry["area"]
    if "segmentation" in entry:
        from pycocotools.mask import area

        return int(area(entry["segmentation"]))
    _, _, width, height = entry["bbox"]
    return width * height
