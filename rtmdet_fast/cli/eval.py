"""rtmdet-fast eval."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rtmdet_fast.cli.output import Outcome, figure, skipped_lines
from rtmdet_fast.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluate weights on a data set (COCO, YOLO, Pascal VOC or DOTA) with the published test settings."""

    weights: str
    """Weights file, a published name such as rtmdet-tiny, or an exported .onnx, .xml or .pt2 file."""
    data: tuple[Path, ...] = ()
    """Folder of a data set, of whatever format, or a data.yaml, whose validation images are taken; or several."""
    ann: Path | None = None
    """In place of --data: COCO JSON, or a folder of YOLO, VOC or DOTA label files."""
    images: Path | None = None
    """Folder of the images of --ann."""
    image_size: int | None = None
    """Side of the network input in pixels; the model's own where not given."""
    batch_size: int = 8
    """Images per step."""
    num_workers: int = 0
    """Loader processes."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes the first GPU where there is one."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """In which an exported .xml file (OpenVINO) is computed; auto is fp32."""
    decoder_layers: int | None = None
    """Of rtdetr: run so many layers of its decoder, with fewer faster and less exact; as published where not given."""
    match_by_position: bool = False
    """Where none of the data set's class names is the model's, take them for the same classes in the same order."""
    skip_bad: bool = False
    """Go on over unreadable images and invalid annotations, and count them."""
    detections: Path | None = None
    """Write the detections in COCO results form to this file."""
    report: Path | None = None
    """Write a page with curves, errors, thresholds and the worst images to this file."""
    json: Path | None = None
    """Write the figures to this file."""


def run_eval(config: EvalConfig) -> Outcome:
    from rtmdet_fast.data.check import CHECK_SECONDS, ImageCheck
    from rtmdet_fast.data.layout import find_sources, source_of
    from rtmdet_fast.devices import pick_device
    from rtmdet_fast.distributed import join_processes, once_per_node
    from rtmdet_fast.evaluation.analysis import analyse
    from rtmdet_fast.evaluation.evaluate import evaluate
    from rtmdet_fast.evaluation.pictures import report_samples
    from rtmdet_fast.evaluation.report import write_report
    from rtmdet_fast.export.engine import load_detector
    from rtmdet_fast.tasks import TASKS
    from rtmdet_fast.training.config import check_bounds

    check_bounds(config)
    if config.data:
        if config.ann or config.images:
            raise UserError("--data stands in place of --ann and --images")
        sources = find_sources(config.data, "val")
    elif config.ann is None or config.images is None:
        raise UserError("give --ann FILE and --images FOLDER, or --data FOLDER")
    else:
        sources = (source_of(config.ann, config.images),)
    options = {} if config.decoder_layers is None else {"decoder_layers": config.decoder_layers}
    model = load_detector(config.weights, config.device, config.dtype, **options)
    rank, world_size = join_processes(pick_device(config.device))
    dataset = once_per_node(
        lambda: TASKS[model.task].open_dataset(
            sources,
            skip_bad=config.skip_bad,
            class_names=model.class_names,
            match_by_position=config.match_by_position,
        )
    )
    if rank == 0:
        ImageCheck(dataset).report(wait=CHECK_SECONDS, progress=True)
    started = time.perf_counter()
    evaluation = evaluate(
        model,
        dataset,
        image_size=config.image_size,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        progress=rank == 0,
        together=world_size > 1,
    )
    if rank > 0:  # the first process has it all, and tells it
        return Outcome({}, [])
    seconds = time.perf_counter() - started
    lines = [f"{name:10} {figure(value)}" for name, value in evaluation.metrics.items()]
    width = max(len(name) for name in evaluation.per_class)
    columns = next(iter(evaluation.per_class.values()))
    lines += ["", f"{'class':{width}} " + " ".join(f"{column:>9}" for column in columns)]
    for name, figures in evaluation.per_class.items():
        lines.append(f"{name:{width}} " + " ".join(f"{figure(value):>9}" for value in figures.values()))
    counts = ({reason: len(what) for reason, what in told.items()} for told in (dataset.skipped, dataset.noticed))
    lines += ["", *skipped_lines(*counts)]
    unreadable = f", {evaluation.skipped} of them unreadable and skipped" if evaluation.skipped else ""
    lines.append(f"{len(dataset)} images in {seconds:.1f} s{unreadable}")
    found = {
        **evaluation.metrics,
        "per_class": evaluation.per_class,
        "images": len(dataset),
        "skipped": evaluation.skipped,
        "seconds": seconds,
    }
    if config.report is not None:
        analysis = analyse(evaluation, dataset.class_names)
        if analysis is not None:
            found["analysis"] = analysis.as_json()
        worst, samples = report_samples(dataset, evaluation, analysis)
        write_report(
            config.report,
            title=f"{model.title}: {Path(config.weights).name} on {dataset.annotation_path.name}",
            evaluation=found,
            pr_curves=evaluation.pr_curves,
            settings={
                **vars(config),
                "data": " ".join(map(str, config.data)),
                "seconds of evaluation": round(seconds, 1),
            },
            class_names=dataset.class_names,
            analysis=analysis,
            worst=worst,
            samples=samples,
            parameters=sum(p.numel() for p in model.parameters()) or None,
        )
        lines.append(f"report {config.report}")
    return Outcome(found, lines, {} if config.detections is None else {config.detections: evaluation.detections})
