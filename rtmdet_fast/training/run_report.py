"""The report at the end of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.distributed import gather, process_count
from rtmdet_fast.evaluation.analysis import analyse
from rtmdet_fast.evaluation.evaluate import evaluate
from rtmdet_fast.evaluation.pictures import ReportSample, report_samples
from rtmdet_fast.evaluation.report import write_report
from rtmdet_fast.files import write_json
from rtmdet_fast.models.families import load_model
from rtmdet_fast.training.config import Settings
from rtmdet_fast.training.preview import draw_batches
from rtmdet_fast.training.run_log import read_metrics


def report_run(
    settings: Settings,
    dataset: CocoDataset,
    val_dataset: CocoDataset | None,
    best_epoch: int | None,
    seconds: float,
    pace: float,
    rank: int,
) -> Path | None:
    """Evaluate the best weights once more, for curves and pictures; the first process writes report.html."""
    best = settings.out / "best.pth"
    together = all(gather(best.is_file(), process_count()))  # not on nodes that have no disk in common
    if rank > 0 and not (together and val_dataset is not None):
        return None
    model = load_model(best).to(settings.device)
    metrics: dict[str, Any] = {}
    curves: dict[str, Any] = {}
    analysis = None
    worst: list[ReportSample] = []
    samples: list[ReportSample] = []
    if val_dataset is not None:
        evaluation = evaluate(
            model, val_dataset, batch_size=settings.batch_size, progress=settings.progress, together=together
        )
        if rank > 0:
            return None
        analysis = analyse(evaluation, val_dataset.class_names)
        metrics = {**evaluation.metrics, "per_class": evaluation.per_class, "best_epoch": best_epoch}
        if analysis is not None:
            metrics["analysis"] = analysis.as_json()
        curves = evaluation.pr_curves
        write_json(settings.out / "metrics.json", metrics)
        write_json(settings.out / "detections.json", evaluation.detections, indent=None)
        worst, samples = report_samples(val_dataset, evaluation, analysis)
    return write_report(
        settings.out / "report.html",
        title=f"{model.title} on {dataset.annotation_path.name}",
        evaluation=metrics,
        pr_curves=curves,
        settings={**settings.as_json(), "training images": len(dataset), "seconds per iteration": round(pace, 4)},
        class_names=dataset.class_names,
        history=read_metrics(settings.out / "metrics.csv"),
        analysis=analysis,
        worst=worst,
        samples=samples,
        batches=[(drawn.told, drawn.picture) for drawn in draw_batches(settings, dataset, 1)],
        train_objects=np.bincount(dataset.objects()[2], minlength=len(dataset.class_names)),
        parameters=sum(p.numel() for p in model.parameters()),
        seconds=seconds,
    )
