"""rtmdet-fast predict."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from rtmdet_fast.class_names import find_classes
from rtmdet_fast.cli.output import Outcome, thresholds_told
from rtmdet_fast.errors import UserError
from rtmdet_fast.files import write_atomically, write_json, write_one_of_many

if TYPE_CHECKING:
    from rtmdet_fast.inference.results import Results
    from rtmdet_fast.inference.sources import Frame
    from rtmdet_fast.predictor.predictor import Predictor


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Detect objects in images or videos; write pictures with boxes and predictions.json (COCO results form)."""

    source: tyro.conf.Positional[tuple[str, ...]]
    """Images, videos, folders and quoted patterns such as "photos/*.jpg", as many as wanted; or a camera's number, or
    the address of an RTSP or HTTP stream."""
    weights: str
    """Weights file, a published name such as rtmdet-tiny, or an exported .onnx or .xml file."""
    out: Path = Path("runs/predict")
    """Folder for pictures and predictions.json."""
    score_threshold: float | None = None
    """Least score of a detection. Where not given, that of each class which the training found to be the best and kept
    with the weights; 0.3 where there is none, and with --track."""
    classes: tuple[str, ...] | None = None
    """Names of the classes to find; all where not given."""
    track: bool = False
    """Give the objects of a video ids, draw them and write tracks.csv (needs the extra track)."""
    save_txt: bool = False
    """Write labels/, a YOLO label file for each image or frame."""
    save_crops: bool = False
    """Write crops/, a picture of each detection in a folder for its class."""
    show: bool = False
    """Show each picture in a window, where there is a display; Q or escape ends."""
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
    format: Literal["coco", "dota", "jsonl", "parquet"] | None = None
    """coco, where not given; dota writes, beside predictions.json, the files of DOTA's Task 1 (rotated boxes). Of a
    shard: jsonl, where not given, or parquet (needs the extra parquet)."""
    shard: str | None = None
    """Look at one of n shards of the sources' images, as 0/8, 1/8, … 7/8; auto is the process's own of those that
    torchrun starts. Sources are then images, folders, patterns and tar archives, which may hold millions of images, and
    no pictures are written: `rtmdet-fast merge` joins what is found."""
    resume: bool = False
    """Of a shard: go on where it was stopped."""
    part_size: int = 1000
    """Of a shard: images in a file of results. So many at most are looked at again after a kill."""
    skip_bad: bool = False
    """Go on over unreadable files, and count them."""
    limit: int | None = None
    """Stop after so many frames (for a camera or stream)."""
    json: Path | None = None
    """Write a summary to this file."""


def run_predict(config: PredictConfig) -> Outcome:
    from rtmdet_fast.data.dota import write_task1
    from rtmdet_fast.export.engine import load_detector
    from rtmdet_fast.images import write_image
    from rtmdet_fast.inference.sources import VideoWriter, iter_sources
    from rtmdet_fast.inference.window import Window
    from rtmdet_fast.predictor.predictor import Predictor

    if config.limit is not None and config.limit < 1:
        raise UserError(f"--limit is {config.limit}; it must be at least 1")
    if config.shard is None and (config.resume or config.format in ("jsonl", "parquet")):
        what = "--resume" if config.resume else f"--format {config.format}"
        raise UserError(f"{what} is for shards: --shard 0/1 is all images in one")
    if config.shard is not None and (other := _not_of_shards(config)):
        raise UserError(f"{other} cannot be had with --shard, which writes no pictures, labels or tracks")
    window = Window("rtmdet-fast predict") if config.show else None
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
    if config.shard is not None:
        return _run_shard(config, predictor)
    names = predictor.class_names
    if config.format == "dota" and predictor.task != "rotated":
        raise UserError(f"--format dota needs a model of rotated boxes; {config.weights} is one of {predictor.task!r}")
    if config.format == "dota" and (wrong := [name for name in names if not _names_file(name)]):
        raise UserError(f"--format dota names a file after each class, which {wrong[0]!r} cannot be")
    if config.classes is not None:
        find_classes(config.classes, names)  # what is wrong with them is told before a source is opened
    source = iter_sources(config.source, skip_bad=config.skip_bad)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    found: list[tuple[str, Any, Any, Any]] = []
    inputs = {path.resolve() for path in source.paths}
    video: VideoWriter | None = None
    predictions = config.out / "predictions.json"
    txt_folder, crop_folder = config.out / "labels", config.out / "crops"
    for folder, wanted in ((txt_folder, config.save_txt), (crop_folder, config.save_crops)):
        if wanted and folder.exists() and not predictions.exists():  # a data set's own, for instance
            raise UserError(f"{folder} is there already, and no prediction wrote it: --out is for a folder of its own")
    config.out.mkdir(parents=True, exist_ok=True)
    tracks: list[list[Any]] = []

    def target(frame: Frame) -> Path:
        return config.out / (f"{frame.video}.mp4" if frame.is_video else frame.name)

    def frames() -> Iterator[Frame]:
        """Those whose answers have a place; they are read in a thread of their own."""
        stems: dict[str, str] = {}
        for frame in source:
            if target(frame).resolve() in inputs:
                raise UserError(f"{target(frame)} is one of the files to look at: --out is for a folder of its own")
            # DOTA's files name images without their folders
            stem = Path(frame.name).stem if config.format == "dota" else str(Path(frame.name).with_suffix(""))
            wanted = config.format == "dota" or config.save_txt or config.save_crops
            if wanted and (twin := stems.setdefault(stem, frame.name)) != frame.name:
                raise UserError(
                    f"{twin} and {frame.name} would both be {stem!r} in the files written; give one of them"
                )
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
        if config.track:
            tracks.extend(track_rows(frame, results))
        stem = Path(frame.name).with_suffix("")
        if config.save_txt:
            lines = "".join(f"{line}\n" for line in results.to_yolo())
            write_one_of_many(txt_folder / f"{stem}.txt", lines.encode())
        if config.save_crops:
            for i, (name, crop) in enumerate(zip(results.label_names, results.crop(), strict=True), start=1):
                write_image(crop_folder / folder_name(name) / f"{stem}_{i:03d}.jpg", crop)
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
        if config.track:
            write_csv(config.out / "tracks.csv", track_columns(predictor.task), tracks)

    started = time.perf_counter()
    stream = predictor.stream(
        frames(),
        classes=config.classes,
        track=config.track,
        write=keep,
        limit=config.limit,
        total=source.total,
        progress=True,
    )
    try:
        try:
            with window or nullcontext():
                for results in stream:
                    if window is not None and not window.show(results.plot()):
                        break
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
    if config.score_threshold is None and not config.track and predictor.detector.score_thresholds is not None:
        told = thresholds_told(names, predictor.detector.score_thresholds)
        lines.append(f"score thresholds of the weights: {told} (--score-threshold sets one for all)")
    objects = len({row[TRACK_ID] for row in tracks})
    if config.track:
        lines.append(f"{objects} objects in {config.out / 'tracks.csv'}")
    lines += [f"YOLO labels in {txt_folder}"] * config.save_txt + [f"crops in {crop_folder}"] * config.save_crops
    summary = {
        "images": len(images),
        "detections": len(annotations),
        **({"objects": objects} if config.track else {}),
        "unreadable": source.unreadable,
        "seconds": seconds,
        "out": str(config.out),
        "predictions": str(predictions),
    }
    return Outcome(summary, lines)


def _not_of_shards(config: PredictConfig) -> str | None:
    """An option that makes no sense with --shard."""
    given = {
        "--track": config.track,
        "--save-txt": config.save_txt,
        "--save-crops": config.save_crops,
        "--show": config.show,
        "--limit": config.limit is not None,
        f"--format {config.format}": config.format in ("coco", "dota"),
    }
    return next((option for option, wanted in given.items() if wanted), None)


def _run_shard(config: PredictConfig, predictor: Predictor) -> Outcome:
    from rtmdet_fast.inference.shards import Shard
    from rtmdet_fast.predictor.shards import predict_shard

    assert config.shard is not None
    started = time.perf_counter()
    fields = ("score_threshold", "image_size", "patch_size", "dtype", "engine", "decoder_layers")
    shard = Shard.parsed(config.shard, dict(os.environ))
    found = predict_shard(
        predictor,
        config.source,
        config.out,
        shard,
        resume=config.resume,
        file_format="parquet" if config.format == "parquet" else "jsonl",
        part_size=config.part_size,
        classes=config.classes,
        skip_bad=config.skip_bad,
        made_with={"weights": _digest(config.weights), **{name: getattr(config, name) for name in fields}},
        progress=os.environ.get("RANK", "0") == "0",  # one bar of all processes of torchrun
    )
    seconds = time.perf_counter() - started
    before = f" ({found.before} of them before)" if found.before else ""
    unreadable = f", {found.unreadable} unreadable files" if found.unreadable else ""
    lines = [
        f"shard {shard}: {found.detections} detections in {found.images} images{before}{unreadable}, {seconds:.1f} s",
        f"results in {found.folder}; `rtmdet-fast merge {config.out}` joins all shards",
    ]
    summary = {**found._asdict(), "folder": str(found.folder), "shard": str(shard), "seconds": seconds}
    return Outcome(summary, lines)


def _digest(weights: str) -> str:
    """Of a file of weights; a published name itself."""
    files = [path for path in (Path(weights), Path(weights).with_suffix(".bin")) if path.is_file()]
    if not files:
        return weights
    made = hashlib.sha256()
    for path in files if Path(weights).suffix == ".xml" else files[:1]:
        with open(path, "rb") as file:
            while content := file.read(1 << 20):
                made.update(content)
    return made.hexdigest()


TRACK_ID = 2
"""The column of tracks.csv."""


def track_columns(task: str) -> list[str]:
    """The head of tracks.csv."""
    rotated = ["cx", "cy", "w", "h", "angle"] if task == "rotated" else []
    return ["file_name", "frame", "track_id", "class", "score", "x1", "y1", "x2", "y2", *rotated]


def track_rows(frame: Frame, results: Results) -> Iterator[list[Any]]:
    """Those of a frame, in pixels and radians, of the objects whose id is known."""
    assert results.track_ids is not None
    columns = results.track_ids.tolist(), results.label_names, results.scores.tolist(), results.xyxy().tolist()
    for track_id, name, score, box, own in zip(*columns, results.boxes.tolist(), strict=True):
        if track_id >= 0:
            numbers = [*box, *(own if len(own) == 5 else ())]
            yield [frame.name, frame.index, track_id, name, f"{score:.4f}", *(f"{value:.4f}" for value in numbers)]


def write_csv(path: Path, head: list[str], rows: list[list[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    with write_atomically(path) as file:
        file.write(text.getvalue().encode(errors="surrogateescape"))


def folder_name(name: str) -> str:
    """A class's name as that of a folder, on any system."""
    plain = "".join("_" if c in '/\\:*?"<>|' or not c.isprintable() else c for c in name).strip(". ")
    return plain[:60] or "_"


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
