"""rtmdet-fast benchmark."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rtmdet_fast.cli.output import Outcome

if TYPE_CHECKING:
    from rtmdet_fast.data.coco import CocoDataset
    from rtmdet_fast.models.detector import Detector


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Measure latency, images a second, file size and AP of a model by every engine that this machine has."""

    weights: tuple[str, ...]
    """Weights files or published names such as rtmdet-tiny, and exported files, as many as wanted."""
    data: tuple[Path, ...] = ()
    """Folder of a data set, of whatever format, or a data.yaml, on whose validation images the AP is measured too."""
    engines: tuple[str, ...] = ()
    """pytorch, folded, compiled, cuda-graph, onnxruntime, openvino, openvino-bf16, openvino-int8, pt2; all where not
    given."""
    calibrate: Path | None = None
    """Images for int8: a folder of them, or a data set, whose training images are taken; those of --data where not
    given."""
    image_size: int | None = None
    """Side of the network input in pixels; the model's own where not given."""
    batch_size: int = 1
    """Images of a call."""
    threads: int | None = None
    """Threads of each engine; as many as it likes where not given."""
    rounds: int = 50
    """Timed calls of each engine."""
    device: str = "auto"
    """Of PyTorch: cpu, cuda, cuda:1, …; auto takes the first GPU where there is one."""
    match_by_position: bool = False
    """Where none of the data set's class names is the model's, take them for the same classes in the same order."""
    skip_bad: bool = False
    """Go on over unreadable images and invalid annotations."""
    json: Path | None = None
    """Write the figures to this file."""


def run_benchmark(config: BenchmarkConfig) -> Outcome:
    from rtmdet_fast.data.layout import find_sources, training_images
    from rtmdet_fast.evaluation.benchmark import benchmark
    from rtmdet_fast.tasks import TASKS

    def open_dataset(model: Detector) -> CocoDataset:
        return TASKS[model.task].open_dataset(
            find_sources(config.data, "val"),
            skip_bad=config.skip_bad,
            class_names=model.class_names,
            match_by_position=config.match_by_position,
        )

    calibrate = config.calibrate
    if calibrate is not None:
        calibrate = training_images(calibrate) or calibrate
    elif config.data:
        calibrate = training_images(config.data)
    with tempfile.TemporaryDirectory() as folder:
        engines, absent = benchmark(
            config.weights,
            Path(folder),
            engines=config.engines,
            open_dataset=open_dataset if config.data else None,
            image_size=config.image_size,
            batch_size=config.batch_size,
            threads=config.threads,
            rounds=config.rounds,
            device=config.device,
            calibrate=calibrate,
        )
    columns = [name for name in ("AP", "segm_AP") if name in engines[0].get("metrics", {})]
    width = max(len(name) for name in ("engine", *(engine["engine"] for engine in engines), *absent))
    lines = [f"{'engine':{width}} {'median ms':>10} {'p95 ms':>10} {'images/s':>10} {'MB':>8}"]
    lines[0] += "".join(f" {name:>8}" for name in columns)
    for engine in engines:
        lines.append(
            f"{engine['engine']:{width}} {engine['median_ms']:10.2f} {engine['p95_ms']:10.2f} "
            f"{engine['images_per_second']:10.1f} {engine['bytes'] / 1e6:8.1f}"
        )
        lines[-1] += "".join(f" {engine['metrics'][name]:8.4f}" for name in columns)
    lines += [f"{name:{width}} does not run here: {why}" for name, why in absent.items()]
    return Outcome({"engines": engines, "absent": absent, "batch_size": config.batch_size}, lines)
