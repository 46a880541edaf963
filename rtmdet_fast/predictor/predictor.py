"""A detector as it is deployed: folded, on a GPU as a CUDA graph, or by another runtime; the same results from each."""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rtmdet_fast.class_names import find_classes
from rtmdet_fast.devices import pick_device
from rtmdet_fast.errors import UserError
from rtmdet_fast.export.engine import RUNTIMES, Dtype, Engine, load_engine
from rtmdet_fast.inference.results import Results
from rtmdet_fast.inference.sources import Frame, Source, iter_sources
from rtmdet_fast.inference.tracking import LOW_SCORE, track_frames
from rtmdet_fast.models.detector import SCORE_THRESHOLD, Color, Detector
from rtmdet_fast.models.families import load_model
from rtmdet_fast.predictor.graphs import GraphDetector
from rtmdet_fast.predictor.stream import Stream

ENGINES = ("auto", "torch", *RUNTIMES.values())
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

log = logging.getLogger(__name__)


class Predictor:
    """`predict` of a model, made ready once: for many images, a stream, or the workers of a pool.

    It keeps the weights that a model has when it is made. It can be pickled: with these, or, where it was made from a
    file, with its path.

    Args:
        model: a model, or what `--weights` takes: a weights file, a published name, an exported file.
        batch_size: images, or windows, in a pass.
        image_size: side in pixels of the square network input; the model's own where not given.
        patch_size: as `predict` takes it.
        dtype: of the network: fp32, fp16 (GPUs) or bf16. auto is fp16 on a GPU and fp32 elsewhere.
        engine: torch, onnxruntime or openvino. auto is what an exported file is for, and torch for weights; of these
            the others make a temporary file first, which takes up to a minute.
        device: cpu, cuda, cuda:1, …; auto is where a model is, and for a file the first GPU where there is one.
        threads: of another runtime on a CPU; as many as it likes where not given (torch: torch.set_num_threads).
        score_threshold: least score of a detection; the model's own of each class, or 0.3, where not given.
        iou_threshold: of NMS; the published one of the task where not given.
        max_detections: of an image; the published number where not given.
        candidates: of an image, above the score threshold, for which a GPU keeps room; 1000 where not given. With more
            the same is found, but the host waits in between. Of another runtime those that NMS sees; 3000 there.
        color: of arrays [H, W, 3]: bgr, as OpenCV reads them, or rgb. Files and PIL images need none.
    """

    def __init__(
        self,
        model: Detector | str | Path,
        *,
        batch_size: int = 1,
        image_size: int | None = None,
        patch_size: int | None = None,
        dtype: Dtype = "auto",
        engine: str = "auto",
        device: str | torch.device = "auto",
        threads: int | None = None,
        score_threshold: float | None = None,
        iou_threshold: float | None = None,
        max_detections: int | None = None,
        candidates: int | None = None,
        color: Color = "bgr",
    ):
        self._settings: dict[str, Any] = dict(
            batch_size=batch_size,
            image_size=image_size,
            patch_size=patch_size,
            score_threshold=score_threshold,
            iou_threshold=iou_threshold,
            max_detections=max_detections,
            color=color,
        )
        self._dtype, self._engine, self._device, self._threads = dtype, engine, str(device), threads
        self._candidates = candidates
        if engine not in ENGINES:
            raise UserError(f"engine {engine!r} is unknown; choose one of {', '.join(ENGINES)}")
        if dtype not in ("auto", *DTYPES):
            raise UserError(f"dtype {dtype!r} is unknown; choose one of auto, {', '.join(DTYPES)}")
        if candidates is not None and candidates < 1:
            raise UserError(f"candidates is {candidates}; it must be at least 1")
        self._made_from: Detector | str
        if isinstance(model, Detector):
            self._made_from = str(model.path) if isinstance(model, Engine) else model.fold()
        else:
            self._made_from = str(model)
        self.detector = self._made_ready()
        # what is wrong with the settings is told now
        self.predict([])

    def _made_ready(self) -> Detector:
        model = self._made_from
        if isinstance(model, str) and (runtime := RUNTIMES.get(Path(model).suffix)):
            if self._engine not in ("auto", runtime):
                raise UserError(f"{model} is run by {runtime}, not by {self._engine}: leave the engine out")
            if self._candidates is not None:
                raise UserError(f"{model} has its candidates from its export: leave them out")
            return self._opened(Path(model))
        if isinstance(model, str):
            model = load_model(model).fold()
            place = torch.device("cpu") if self._engine in RUNTIMES.values() else pick_device(self._device)
        else:
            place = next(model.parameters()).device if self._device == "auto" else pick_device(self._device)
        if self._engine in RUNTIMES.values():
            return self._exported(model, self._engine)
        if place.type == "cpu" and self._dtype == "fp16":
            raise UserError("dtype 'fp16' is for GPUs: on a CPU take fp32 or bf16")
        if self._candidates is not None:
            model.max_candidates = self._candidates
        dtype = ("fp16" if place.type == "cuda" else "fp32") if self._dtype == "auto" else self._dtype
        model = model.to(place, DTYPES[dtype])
        if place.type == "cuda" and type(model).to_canvases is not Detector.to_canvases:
            return GraphDetector(model, self._settings["batch_size"])
        return model

    def _opened(self, path: Path) -> Engine:
        engine = load_engine(path, self._threads, self._dtype, device=self._device)
        most, batch_size = engine.metadata["batch_size"], self._settings["batch_size"]
        if most is not None and batch_size > most:
            raise UserError(f"{path} was exported for a batch_size of {most}: {batch_size} is more")
        return engine

    def _exported(self, model: Detector, runtime: str) -> Engine:
        from rtmdet_fast.export.export import export

        log.warning("exporting to a temporary file for %s: `rtmdet-fast export` makes one to keep", runtime)
        folder = tempfile.mkdtemp(prefix="rtmdet-fast-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        suffix = next(suffix for suffix, name in RUNTIMES.items() if name == runtime)
        path = Path(folder) / f"model{suffix}"
        names = ("batch_size", "image_size", "score_threshold", "iou_threshold", "max_detections")
        options = {name: self._settings[name] for name in names}
        if options["score_threshold"] is None:
            options["score_threshold"] = model.least_score
        if self._candidates is not None:
            options["candidates"] = self._candidates
        export(model, path, **options)
        return self._opened(path)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the labels 0, 1, …"""
        return self.detector.class_names

    @property
    def task(self) -> str:
        """What is found: det, ins or rotated."""
        return self.detector.task

    def predict(self, images: Any, *, color: Color | None = None) -> Any:
        """Results of one image, or a list of them of a list; an image is what `Detector.predict` takes.

        color: of these arrays, in place of the predictor's.
        """
        settings = self._settings if color is None else {**self._settings, "color": color}
        return self.detector.predict(images, **settings)

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """Columns in, columns out, as Ray Data, Spark and worker pools hand them around.

        Args:
            batch: "image", paths or arrays; what else there is, is handed on.

        Returns:
            boxes, scores, labels and, of a model with masks, rles (as COCO writes them): object arrays of an array
            [n, 4 or 5], [n], [n], or list for each image.
        """
        if not isinstance(batch, Mapping) or "image" not in batch:
            raise UserError('a batch is a mapping with a column "image"; `predict` takes images by themselves')
        found = self.predict(list(batch["image"]))
        columns: dict[str, Any] = {name: column for name, column in batch.items() if name != "image"}
        for name in ("boxes", "scores", "labels"):
            columns[name] = _column(getattr(results, name).numpy() for results in found)
        if self.detector.has_masks:
            columns["rles"] = _column(results.rles() for results in found)
        return columns

    def stream(
        self,
        source: str | Path | Sequence[str | Path] | Iterable[Frame],
        *,
        classes: Sequence[str] | None = None,
        track: bool = False,
        write: Callable[[Frame, Results], object] | None = None,
        skip_bad: bool = False,
        limit: int | None = None,
        total: int | None = None,
        progress: bool = False,
    ) -> Stream:
        """Results of every frame of a source, in order, while the next are read: `for results in p.stream("0"): …`.

        Args:
            source: images, videos, folders, patterns, a camera or an address, as `rtmdet-fast predict` takes them; or
                frames, whose images are of the predictor's color.
            classes: names of those to find, all where not given.
            track: gives results `track_ids` (see `rtmdet_fast.inference.tracking.Tracker`; its package is an extra).
            write: is called with each frame and its results, in order, while others are read and detected.
            skip_bad: goes on over unreadable files.
            limit: frames after which it ends.
            total: of frames, for the bar, where it is not known by itself.
            progress: shows a bar, with the frames a second and the share of the time that each stage waited.
        """
        frames: Any = source
        settings = dict(self._settings)
        names: list[Any] = list(source) if isinstance(source, (list, tuple)) else [source]
        if all(isinstance(name, (str, Path)) for name in names):
            frames = iter_sources(names, skip_bad=skip_bad)
            total = frames.total
        if isinstance(frames, Source):
            settings["color"] = "bgr"
        wanted = self.class_names if classes is None else classes
        find_classes(wanted, self.class_names)  # what is wrong with them is told now
        update = None
        if track:
            threshold = SCORE_THRESHOLD if settings["score_threshold"] is None else settings["score_threshold"]
            update, settings["score_threshold"] = track_frames(threshold), self._low_score(threshold)

        def finish(frame: Frame, results: Results) -> Results:
            found = results if classes is None else results.only(*wanted)
            return found if update is None else update(frame, found)

        return Stream(
            frames,
            lambda images: self.detector.predict(images, **settings),
            batch_size=settings["batch_size"],
            finish=finish,
            write=write,
            limit=limit,
            total=total,
            progress=progress,
        )

    def _low_score(self, score_threshold: float) -> float:
        """The least score of detections that may continue a track, which an exported file may not have."""
        low = min(score_threshold, LOW_SCORE)
        if isinstance(self.detector, Engine):
            low = max(low, self.detector.test_settings.score_threshold)
        return low

    def __reduce__(self) -> tuple[Any, ...]:
        options = dict(dtype=self._dtype, engine=self._engine, device=self._device, threads=self._threads)
        return _remade, (self._made_from, {**self._settings, **options, "candidates": self._candidates})


def _remade(model: Detector | str | Path, options: dict[str, Any]) -> Predictor:
    return Predictor(model, **options)


def _column(values: Iterable[Any]) -> np.ndarray:
    """An object array [n] of n values, whatever their shapes."""
    listed = list(values)
    column = np.empty(len(listed), object)
    for i, value in enumerate(listed):
        column[i] = value
    return column
