"""How fast and how good a model is by every engine of this machine: PyTorch's forms of it, and exported files."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.data.shapes import draw_scene
from rtmdet_fast.devices import pick_device
from rtmdet_fast.errors import UserError
from rtmdet_fast.evaluation.evaluate import evaluate
from rtmdet_fast.export.engine import FORMATS, Dtype, load_engine
from rtmdet_fast.export.export import export
from rtmdet_fast.export.openvino import import_openvino
from rtmdet_fast.models.checkpoint import resolve_weights
from rtmdet_fast.models.detector import Detector, check_image_size
from rtmdet_fast.models.families import load_model
from rtmdet_fast.predictor.graphs import GraphDetector
from rtmdet_fast.predictor.predictor import Predictor

SCORE_THRESHOLD = 0.3
"""Of the detections while the clock runs, as `predict` has it; average precision is at the published settings."""
WARM_UPS = 3
"""Calls before the clock runs: the first ones choose algorithms and allocate."""
BATCHES = 8
"""So many, of the data set's images or drawn ones, are taken in turns."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What the engines of a model are built by."""

    folder: Path
    """For exported files."""
    weights: Path
    image_size: int
    batch_size: int
    threads: int | None
    device: torch.device
    calibrate: Path | None
    """Folder of images for int8."""


def eager(model: Detector, setup: Setup) -> tuple[Detector, Path]:
    return model.to(setup.device), setup.weights


def folded(model: Detector, setup: Setup) -> tuple[Detector, Path]:
    return model.fold().to(setup.device), setup.weights


def compiled(model: Detector, setup: Setup) -> tuple[Detector, Path]:
    fast = model.fold().to(setup.device)
    fast.compile()
    return fast, setup.weights


def graph(model: Detector, setup: Setup) -> tuple[Detector, Path]:
    if setup.device.type != "cuda":
        raise UserError("CUDA graphs need a GPU")
    predictor = Predictor(model.to(setup.device), batch_size=setup.batch_size, image_size=setup.image_size)
    return predictor.detector, setup.weights


def exported(
    model: Detector, setup: Setup, *, suffix: str, dtype: Dtype = "auto", int8: bool = False
) -> tuple[Detector, Path]:
    path = setup.folder / f"{'int8' if int8 else 'model'}{suffix}"
    if int8 and setup.calibrate is None:
        raise UserError("give images to calibrate with: --calibrate FOLDER, or --data FOLDER with a training split")
    if dtype == "bf16" and "BF16" not in import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise UserError("this processor does not compute in bfloat16")
    if not path.exists():
        export(
            model,
            path,
            image_size=setup.image_size,
            batch_size=setup.batch_size,
            int8=int8,
            calibrate=setup.calibrate if int8 else None,
        )
    return load_engine(path, setup.threads, dtype), path


def given(engine: Detector, setup: Setup) -> tuple[Detector, Path]:
    return engine, setup.weights


Build = Callable[[Detector, Setup], tuple[Detector, Path]]
"""A model → what detects as it does, and the file that holds it."""
ENGINES: dict[str, Build] = {
    "pytorch": eager,
    "folded": folded,
    "compiled": compiled,
    "cuda-graph": graph,
    "onnxruntime": partial(exported, suffix=".onnx"),
    "openvino": partial(exported, suffix=".xml"),
    "openvino-bf16": partial(exported, suffix=".xml", dtype="bf16"),
    "openvino-int8": partial(exported, suffix=".xml", int8=True),
    "pt2": partial(exported, suffix=".pt2"),
}


@dataclass(kw_only=True)
class Contender:
    """An engine ready to run, and the seconds of its timed calls."""

    detector: Detector
    image_size: int
    bytes: int
    """Of its files."""
    dataset: CocoDataset | None
    seconds: list[float] = field(default_factory=list)

    def call(self, images: Sequence[np.ndarray]) -> None:
        """Detect in decoded images, to the end."""
        made = self.detector.test_settings
        settings = replace(made, score_threshold=max(SCORE_THRESHOLD, made.score_threshold))
        self.detector.detect_images(images, self.image_size, 0, settings=settings, batch_size=len(images))
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def benchmark(
    weights: Sequence[str],
    folder: Path,
    *,
    engines: Sequence[str] = (),
    open_dataset: Callable[[Detector], CocoDataset] | None = None,
    image_size: int | None = None,
    batch_size: int = 1,
    threads: int | None = None,
    rounds: int = 50,
    device: str = "auto",
    calibrate: Path | None = None,
    progress: bool = True,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Milliseconds of a call, images a second, bytes and, with a data set, average precision of every engine.

    A call takes `batch_size` decoded images and gives their detections: letterbox, network and NMS. The engines take
    turns, there and back, so that what else the machine does falls on all of them.

    Args:
        weights: weights files, published names, and exported files, each of which is an engine by itself.
        folder: for what is exported on the way.
        engines: names of ENGINES; all of them where none is given.
        open_dataset: a model's data set to evaluate on.
        image_size: side of the network input in pixels; the model's own where not given.
        threads: of every engine; as many as it likes where not given.
        rounds: timed calls of each engine.
        device: of PyTorch's forms.
        calibrate: folder of images, of which int8 takes the ranges of what it computes.

    Returns the engines' figures, and by name why an engine does not run here. Raises UserError where none does.
    """
    for name in engines:
        if name not in ENGINES:
            raise UserError(f"--engines {name!r} is unknown; choose of {', '.join(ENGINES)}")
    for name, value in (("batch-size", batch_size), ("rounds", rounds), ("threads", threads)):
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1")
    where = pick_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    jobs: list[tuple[str, Build, Detector, CocoDataset | None, Setup]] = []
    for i, name in enumerate(weights):
        model: Detector
        builds: dict[str, Build]
        if Path(name).suffix in FORMATS.values():
            model, path, builds = load_engine(name, threads), Path(name), {Path(name).name: given}
        else:
            model, path, builds = load_model(name), resolve_weights(name), {x: ENGINES[x] for x in engines or ENGINES}
        setup = Setup(
            folder=folder / str(i),
            weights=path,
            image_size=check_image_size(model.image_size if image_size is None else image_size),
            batch_size=batch_size,
            threads=threads,
            device=where,
            calibrate=calibrate,
        )
        dataset = None if open_dataset is None else open_dataset(model)
        several = f"{path.name} " if len(weights) > 1 and builds.keys() <= ENGINES.keys() else ""
        jobs += [(several + engine, build, model, dataset, setup) for engine, build in builds.items()]

    images = sample_images(jobs[0][3], jobs[0][4].image_size, BATCHES * batch_size)
    batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    contenders: dict[str, Contender] = {}
    absent: dict[str, str] = {}
    for name, build, model, dataset, setup in (bar := tqdm(jobs, unit="engine", disable=not progress, leave=False)):
        bar.set_description(f"prepare {name}")
        try:
            detector, path = build(model, setup)
            files = (path, path.with_suffix(".bin")) if path.suffix == ".xml" else (path,)
            size = sum(file.stat().st_size for file in files)
            contender = Contender(detector=detector, image_size=setup.image_size, bytes=size, dataset=dataset)
            for batch in (batches * WARM_UPS)[:WARM_UPS]:
                contender.call(batch)
        except Exception as error:  # a runtime that is not installed, lacks an operator, fails in its own way
            absent[name] = next(iter(str(error).strip().splitlines()), type(error).__name__)
        else:
            contenders[name] = contender
    if not contenders:
        raise UserError(f"no engine can be run here: {'; '.join(f'{name}: {why}' for name, why in absent.items())}")

    for turn in tqdm(range(rounds), desc="measure", unit="round", disable=not progress, leave=False):
        in_turn = list(contenders.values())
        for contender in in_turn if turn % 2 == 0 else reversed(in_turn):
            start = time.perf_counter()
            contender.call(batches[turn % len(batches)])
            contender.seconds.append(time.perf_counter() - start)
    return [{"engine": name, **figures(x, batch_size, progress)} for name, x in contenders.items()], absent


def figures(contender: Contender, batch_size: int, progress: bool) -> dict[str, Any]:
    """What was measured, and what an evaluation finds."""
    seconds = contender.seconds
    found: dict[str, Any] = {
        "median_ms": 1e3 * statistics.median(seconds),
        "p95_ms": 1e3 * float(np.quantile(seconds, 0.95)),
        "images_per_second": batch_size * len(seconds) / sum(seconds),
        "rounds": len(seconds),
        "bytes": contender.bytes,
    }
    if contender.dataset is not None:
        detector = contender.detector
        if isinstance(detector, GraphDetector):  # which takes frames, where an evaluation letterboxes them as training
            detector = detector.model
        evaluation = evaluate(
            detector, contender.dataset, image_size=contender.image_size, batch_size=batch_size, progress=progress
        )
        found["metrics"] = evaluation.metrics
    return found


def sample_images(dataset: CocoDataset | None, side: int, count: int) -> list[np.ndarray]:
    """`count` BGR images [H, W, 3] uint8: the first of a data set, over again where it has fewer, or drawn scenes."""
    if dataset is None:
        return [draw_scene(np.random.default_rng(i), side)[0] for i in range(count)]
    found: list[np.ndarray] = []
    for i in range(len(dataset)):
        if len(found) == count:
            break
        try:
            found.append(dataset.load(i).image)
        except UserError:
            if not dataset.skip_bad:
                raise
    if not found:
        raise UserError(f"{dataset.annotation_path}: has no image that can be read")
    return [found[i % len(found)] for i in range(count)]
