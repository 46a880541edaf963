"""The command line: rtmdet-fast train | eval | predict | split | demo | info."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tqdm import tqdm

from rtmdet_fast import __version__
from rtmdet_fast.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluate weights on a COCO-format (rotated: or DOTA) data set with the published test settings."""

    weights: str
    """Weights file, or a published name such as rtmdet-tiny."""
    data: Path | None = None
    """Folder laid out like COCO (rotated: or DOTA), in place of --ann and --images."""
    ann: Path | None = None
    """Annotation file (COCO JSON; rotated: or a folder of DOTA text files)."""
    images: Path | None = None
    """Folder of the images."""
    image_size: int | None = None
    """Side of the network input in pixels; the model's own where not given."""
    batch_size: int = 8
    """Images per step."""
    num_workers: int = 0
    """Loader processes."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes the first GPU where there is one."""
    skip_bad: bool = False
    """Go on over unreadable images and invalid annotations, and count them."""
    detections: Path | None = None
    """Write the detections in COCO results form to this file."""
    json: Path | None = None
    """Write the figures to this file."""


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Detect objects in images or videos; write pictures with boxes and predictions.json (COCO results form)."""

    source: tyro.conf.Positional[str]
    """An image, a folder, a quoted pattern such as "photos/*.jpg", a video, or a camera's number."""
    weights: str
    """Weights file, or a published name such as rtmdet-tiny."""
    out: Path = Path("runs/predict")
    """Folder for pictures and predictions.json."""
    score_threshold: float = 0.3
    """Least score of a detection."""
    image_size: int | None = None
    """Side of the network input in pixels; the model's own where not given."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes the first GPU where there is one."""
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


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Cut large images with rotated boxes (DOTA text) into overlapping patches to train and evaluate on."""

    out: Path
    """Folder for the patches: images and labelTxt, or these in train, val, … with --data."""
    data: Path | None = None
    """Folder with train/images and train/labelTxt, likewise val and test, in place of --images and --labels."""
    images: Path | None = None
    """Folder of the images."""
    labels: Path | None = None
    """Folder of their label files; without it only images are cut."""
    size: int = 1024
    """Side of the patches in pixels."""
    overlap: int = 256
    """Pixels that neighbouring patches share; 500 is usual with several rates."""
    rates: tuple[float, ...] = (1.0,)
    """Scales to cut the images at, such as 0.5 1 1.5."""
    min_visible: float = 0.7
    """Share of a box's area that a patch must show; else the box is marked difficult there."""
    workers: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    """Processes, each of which holds an image; all cores by default."""
    skip_bad: bool = False
    """Go on over unreadable images and malformed lines, and count them."""
    overwrite: bool = False
    """Replace the patches of an earlier split in --out."""
    json: Path | None = None
    """Write the figures to this file."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Draw a data set of shapes, train on it, evaluate, and write report.html and pictures. Needs no download."""

    task: str = "det"
    """What to detect: det (boxes), ins (boxes and masks) or rotated (rotated boxes)."""
    out: Path = Path("runs/demo")
    """Where data, weights, report and pictures go."""
    epochs: int = 10
    """Passes over the drawn images."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes the first GPU where there is one."""
    seed: int = 0
    """Seed of weights, order and augmentation."""
    json: Path | None = None
    """Write the figures to this file."""


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """Say what is installed, which device and kernels run, and which published weights are known."""

    json: Path | None = None
    """Write it to this file too."""


def run_eval(config: EvalConfig) -> dict[str, Any]:
    from rtmdet_fast.data.tasks import find_task_split, open_dataset
    from rtmdet_fast.evaluate import evaluate
    from rtmdet_fast.model import RTMDet
    from rtmdet_fast.train import pick_device

    annotations, images = config.ann, config.images
    if config.data is not None:
        if annotations or images:
            raise UserError("--data stands in place of --ann and --images")
    elif annotations is None or images is None:
        raise UserError("give --ann FILE and --images FOLDER, or --data FOLDER")
    model = RTMDet.from_pretrained(config.weights).to(pick_device(config.device))
    if config.data is not None:
        annotations, images = find_task_split(model.task, config.data, "val")
    assert annotations and images
    # text files hold no list of classes: a part of a data set may lack some
    names = model.class_names if model.task == "rotated" else None
    dataset = open_dataset(model.task, annotations, images, skip_bad=config.skip_bad, class_names=names)
    started = time.perf_counter()
    evaluation = evaluate(
        model, dataset, image_size=config.image_size, batch_size=config.batch_size, num_workers=config.num_workers
    )
    seconds = time.perf_counter() - started
    for name, value in evaluation.metrics.items():
        print(f"{name:10} {value:6.3f}")
    width = max(len(name) for name in evaluation.per_class)
    columns = next(iter(evaluation.per_class.values()))
    print(f"\n{'class':{width}} " + " ".join(f"{column:>9}" for column in columns))
    for name, figures in evaluation.per_class.items():
        print(f"{name:{width}} " + " ".join(f"{value:9.3f}" for value in figures.values()))
    print()
    print_skipped({reason: len(what) for reason, what in dataset.skipped.items()})
    unreadable = f", {evaluation.skipped} of them unreadable and skipped" if evaluation.skipped else ""
    print(f"{len(dataset)} images in {seconds:.1f} s{unreadable}")
    if config.detections is not None:
        write_json(config.detections, evaluation.detections)
    return {
        **evaluation.metrics,
        "per_class": evaluation.per_class,
        "images": len(dataset),
        "skipped": evaluation.skipped,
        "seconds": seconds,
    }


def run_predict(config: PredictConfig) -> dict[str, Any]:
    from rtmdet_fast.data.dota import write_task1
    from rtmdet_fast.model import RTMDet
    from rtmdet_fast.sources import VideoWriter, iter_sources
    from rtmdet_fast.train import pick_device

    model = RTMDet.from_pretrained(config.weights).to(pick_device(config.device))
    if config.format == "dota" and model.task != "rotated":
        raise UserError(f"--format dota needs a model of rotated boxes; {config.weights} is one of task {model.task!r}")
    if config.format == "dota" and (wrong := [name for name in model.class_names if "/" in name]):
        raise UserError(f"--format dota names a file after each class, which {wrong[0]!r} cannot be")
    source = iter_sources(config.source, skip_bad=config.skip_bad)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    found: list[tuple[str, Any, Any, Any]] = []
    stems: dict[str, str] = {}
    inputs = {path.resolve() for path in source.paths}
    video: VideoWriter | None = None
    video_path: str | None = None
    config.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    try:
        for frame in tqdm(source, total=source.total, desc="predict", unit="img"):
            if config.limit is not None and len(images) >= config.limit:
                break
            results = model.predict(
                frame.image,
                score_threshold=config.score_threshold,
                image_size=config.image_size,
                patch_size=config.patch_size,
            )
            if config.format == "dota":
                fields = (results.boxes, results.scores, results.labels)
                stem = Path(frame.name).stem
                if (twin := stems.setdefault(stem, frame.name)) != frame.name:
                    raise UserError(f"{twin} and {frame.name} would both be {stem!r} in DOTA's files; give one of them")
                found.append((stem, *(field.numpy() for field in fields)))
            image_id = len(images) + 1
            height, width = results.shape
            images.append({"id": image_id, "file_name": frame.name, "width": width, "height": height})
            for entry in results.to_coco(image_id, range(1, len(model.class_names) + 1)):
                annotations.append({"id": len(annotations) + 1, **entry, "area": area_of(entry), "iscrowd": 0})
            # the frames of a video are named after it and numbered
            target = config.out / (f"{frame.name.rsplit('_', 1)[0]}.mp4" if frame.is_video else frame.name)
            if target.resolve() in inputs:
                raise UserError(f"{target} is one of the files to look at: --out is for a folder of its own")
            if not frame.is_video:
                results.save(target)
                continue
            if video is None or frame.path != video_path:
                if video is not None:
                    video.close()
                video, video_path = VideoWriter(target, frame.fps), frame.path
            video.write(results.plot())
    finally:
        if video is not None:
            video.close()
    seconds = time.perf_counter() - started
    categories = [{"id": i, "name": name} for i, name in enumerate(model.class_names, start=1)]
    predictions = config.out / "predictions.json"
    write_json(predictions, {"images": images, "annotations": annotations, "categories": categories})
    if config.format == "dota":
        write_task1(config.out / "Task1", model.class_names, found)
    skipped = f", {len(source.unreadable)} unreadable files skipped" if source.unreadable else ""
    print(f"{len(annotations)} detections in {len(images)} images, {seconds:.1f} s{skipped}")
    print(f"pictures in {config.out}, boxes in {predictions}")
    return {
        "images": len(images),
        "detections": len(annotations),
        "unreadable": source.unreadable,
        "seconds": seconds,
        "out": str(config.out),
        "predictions": str(predictions),
    }


def run_train(config: Any) -> dict[str, Any]:
    from rtmdet_fast.train import train

    result = train(config)
    if os.environ.get("RANK", "0") == "0":  # of the processes that torchrun starts one speaks
        for name, value in result.metrics.items():
            print(f"{name:10} {value:6.3f}")
        print_skipped(result.skipped)
        print(f"{result.seconds:.0f} s, {result.seconds_per_iteration:.3f} s an iteration")
        report = f", report {result.report}" if result.report else ""
        print(f"best weights {result.best}, last {result.last}{report}")
    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(result).items()}


def run_split(config: SplitConfig) -> dict[str, Any]:
    from rtmdet_fast.data.layout import find_dota_splits
    from rtmdet_fast.data.split import SplitSettings, split_images

    if (config.data is None) == (config.images is None) or (config.data is not None and config.labels is not None):
        raise UserError("give --images FOLDER and --labels FOLDER, or --data FOLDER")
    settings = SplitSettings(
        size=config.size, overlap=config.overlap, rates=config.rates, min_visible=config.min_visible
    )
    if config.images is not None:
        sources = {"": (config.labels, config.images)}
    else:
        assert config.data is not None
        sources = find_dota_splits(config.data)
    found: dict[str, Any] = {}
    for name, (labels, images) in sources.items():
        out = config.out / name
        summary = split_images(
            images,
            labels,
            out,
            settings,
            workers=config.workers,
            skip_bad=config.skip_bad,
            overwrite=config.overwrite,
        )
        before = f" ({summary.patches - summary.written} there before)" if summary.written < summary.patches else ""
        print(f"{out}: {summary.patches} patches{before} of {summary.images} images, {summary.boxes} boxes, ", end="")
        print(f"{summary.cut} of them marked difficult for being cut off")
        skipped = {reason: len(what) for reason, what in summary.skipped.items()}
        print_skipped(skipped | ({"box without area": summary.no_area} if summary.no_area else {}))
        found[name or "patches"] = asdict(summary)
    return {**found, "out": str(config.out)}


def run_demo(config: DemoConfig) -> dict[str, Any]:
    from rtmdet_fast.data.shapes import make_shapes
    from rtmdet_fast.train import TrainConfig, train

    shapes = make_shapes(config.out / "data", num_train=1500, num_val=120, image_size=128, seed=config.seed)
    print(
        f"drew {shapes.train_images} and {shapes.val_images}; training RTMDet-tiny for {config.epochs} epochs",
        flush=True,
    )
    result = train(
        TrainConfig(
            train=shapes.train_ann,
            train_images=shapes.train_images,
            val=shapes.val_ann,
            val_images=shapes.val_images,
            out=config.out / "run",
            size="tiny",
            task=config.task,
            epochs=config.epochs,
            # More than the 20 of 300 epochs of a full run: mosaics of small scenes are hard.
            stage2_epochs=config.epochs // 3,
            batch_size=8,
            image_size=128,
            # at 2e-3 the angles get worse again after the third epoch
            lr=1e-3 if config.task == "rotated" else 2e-3,
            num_workers=0,
            val_interval=max(config.epochs // 3, 1),
            device=config.device,
            seed=config.seed,
            overwrite=True,
        )
    )
    summary = run_predict(
        PredictConfig(
            source=str(shapes.val_images),
            weights=str(result.best),
            out=config.out / "pictures",
            device=config.device,
            limit=24,
        )
    )
    print(f"\nAP50 {result.metrics['AP50']:.3f}, AP {result.metrics['AP']:.3f} on {shapes.val_ann}")
    if "segm_AP" in result.metrics:
        print(f"of masks: AP50 {result.metrics['segm_AP50']:.3f}, AP {result.metrics['segm_AP']:.3f}")
    print(f"look at   {result.report}\n          {summary['out']}/*.jpg")
    return {
        **result.metrics,
        "seconds": result.seconds,
        "seconds_per_iteration": result.seconds_per_iteration,
        "weights": str(result.best),
        "report": str(result.report),
        "pictures": summary["out"],
    }


def run_info(config: InfoConfig) -> dict[str, Any]:
    import torch

    from rtmdet_fast.checkpoint import PRETRAINED
    from rtmdet_fast.kernels._dispatch import AVAILABLE, BACKEND

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    packages = ("rtmdet-fast", "torch", "triton", "numpy", "opencv-python", "pycocotools", "mmdet")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    triton_runs = BACKEND == "triton" or (BACKEND == "auto" and AVAILABLE and torch.cuda.is_available())
    found = {
        "python": platform.python_version(),
        **{name: installed(name) for name in packages},
        "device": device,
        "kernels": "triton" if triton_runs else "torch",
        "weights": sorted(PRETRAINED),
    }
    for name, value in found.items():
        print(f"{name:14} {', '.join(value) if isinstance(value, list) else value or 'not installed'}")
    return found


def area_of(entry: dict[str, Any]) -> float:
    """Pixels of a detection's rotated box, of its mask, or of its box where it has neither."""
    if "area" in entry:
        return entry["area"]
    if "segmentation" in entry:
        from pycocotools.mask import area

        return int(area(entry["segmentation"]))
    _, _, width, height = entry["bbox"]
    return width * height


def print_skipped(skipped: dict[str, int]) -> None:
    for reason, count in skipped.items():
        print(f"{'noticed' if '(kept' in reason else 'left out'}: {count} x {reason}")


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1))


def main(arguments: list[str] | None = None) -> int:
    """Run a command; exit code 2 and one sentence on stderr where the user's input is at fault."""
    if (sys.argv[1:] if arguments is None else arguments) == ["--version"]:
        print(f"rtmdet-fast {__version__}")
        return 0

    import torch

    from rtmdet_fast.train import TrainConfig

    @dataclass(frozen=True, kw_only=True)
    class TrainCommand(TrainConfig):
        json: Path | None = None
        """Write the result to this file."""

    TrainCommand.__doc__ = TrainConfig.__doc__
    commands: dict[type, Callable[[Any], dict[str, Any]]] = {
        TrainCommand: run_train,
        EvalConfig: run_eval,
        PredictConfig: run_predict,
        SplitConfig: run_split,
        DemoConfig: run_demo,
        InfoConfig: run_info,
    }
    subcommand = tyro.conf.subcommand
    config = tyro.cli(
        Annotated[TrainCommand, subcommand("train")]
        | Annotated[EvalConfig, subcommand("eval")]
        | Annotated[PredictConfig, subcommand("predict")]
        | Annotated[SplitConfig, subcommand("split")]
        | Annotated[DemoConfig, subcommand("demo")]
        | Annotated[InfoConfig, subcommand("info")],
        prog="rtmdet-fast",
        description="RTMDet: train, evaluate and predict. --version tells the version.",
        args=arguments,
    )
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        found = commands[type(config)](config)
        if config.json is not None:
            write_json(config.json, found)
    except UserError as error:
        # A loader process wraps the sentence in its traceback, whose last line it is.
        sentence = str(error).strip().splitlines()[-1].removeprefix("rtmdet_fast.errors.UserError: ")
        print(f"error: {sentence}", file=sys.stderr)
        return 2
    except OSError as error:  # a disk that is full, a folder that cannot be written
        print(f"error: {error.strerror or error}: {error.filename or ''}".rstrip(": "), file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        hint = "a smaller --batch-size or --image-size needs less"
        print(f"error: out of memory ({str(error).splitlines()[0]}); {hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; a training goes on with --resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
