"""report.html: one self-contained page that tells how a run went, without scripts or outside resources."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rtmdet_fast.class_names import class_name
from rtmdet_fast.evaluation.analysis import Analysis
from rtmdet_fast.evaluation.findings import (
    confusion_section,
    error_section,
    histogram,
    parts_section,
    score_section,
)
from rtmdet_fast.evaluation.pictures import ReportSample
from rtmdet_fast.pages.charts import INK, LINE_COLORS, Curve, line_chart, thinned
from rtmdet_fast.pages.page import (
    figure,
    grid,
    long_table,
    picture,
    resized,
    section,
    settings_table,
    side_by_side,
    table,
    tiles,
    versions,
    write_page,
)

Row = Mapping[str, Any]
PRCurves = Mapping[str, tuple[np.ndarray, np.ndarray]]

# Of more classes than this, only the best and the worst have a named precision-recall curve.
MAX_NAMED_CURVES = 10
FEW_CLASSES = 12
"""Whose table stands beside the curves."""

BATCH_SIDE = 900
"""Pixels of a picture of a training batch."""
WORST_NOTE = (
    "Those with the most errors above the best thresholds: left the truth, right what was found; green is found and "
    "right, red missed or wrong, grey does not count."
)
SAMPLES_NOTE = "Left the truth, right what was found above the best thresholds."
BATCHES_NOTE = "What the network saw: augmented images, of both stages where there are two."

FIGURES = {
    "AP": "AP, IoU .50 to .95",
    "AP50": "AP50, IoU .50",
    "AP75": "AP75, IoU .75",
    "APs": "AP small, below 32² px",
    "APm": "AP medium",
    "APl": "AP large, above 96² px",
    "segm_AP": "mask AP, IoU .50 to .95",
    "segm_AP50": "mask AP50",
    "segm_AP75": "mask AP75",
}


def write_report(
    path: str | Path,
    *,
    title: str,
    evaluation: Row,
    pr_curves: PRCurves,
    settings: Row,
    class_names: Sequence[str] = (),
    history: Sequence[Row] = (),
    analysis: Analysis | None = None,
    worst: Sequence[ReportSample] = (),
    samples: Sequence[ReportSample] = (),
    batches: Sequence[tuple[str, np.ndarray]] = (),
    train_objects: np.ndarray | None = None,
    parameters: int | None = None,
    seconds: float | None = None,
) -> Path:
    """Writes the page and returns its path.

    Args:
        path: of the file.
        title: text.
        evaluation: AP, AP50, ... and per_class: {name: {"AP": ..., "AP50": ...}}; -1 or NaN without ground truth.
        pr_curves: by class name, recall [k] and precision [k] at IoU .50.
        settings: of the run, mappings and dataclasses may be nested.
        class_names: of the K labels of `samples` and `train_objects`.
        history: rows of metrics.csv (epoch, iteration, loss, loss_cls, loss_bbox, lr, images_per_second, data_wait as
            a share of the time, and AP, AP50 where validated); any may be missing, and numbers may be text.
        analysis: of the evaluation.
        worst: images with the most errors, the worst first.
        samples: other images.
        batches: of the training, each drawn as one picture [H, W, 3] uint8 BGR, and what it is.
        train_objects: [K], how many of each class there are to train on.
        parameters: of the model.
        seconds: the run took.

    The page stays below 10 MB, whatever is evaluated, with the pictures that `report_samples` picks and two batches.
    """
    found = [] if analysis is None else [score_section(analysis), error_section(analysis), confusion_section(analysis)]
    parts = [] if analysis is None else [parts_section(analysis)]
    return write_page(
        path,
        title,
        [
            _headline(history, evaluation, parameters, seconds),
            _training(history),
            _classes(evaluation, pr_curves, analysis),
            *found,
            section("The worst images", grid(*(sample.html(class_names) for sample in worst)), note=WORST_NOTE),
            *parts,
            section("Images", grid(*(sample.html(class_names) for sample in samples)), note=SAMPLES_NOTE),
            _histograms(class_names, analysis, train_objects),
            section("Training batches", grid(*(_batch(*batch) for batch in batches)), note=BATCHES_NOTE),
            _settings(settings),
        ],
    )


def _batch(title: str, image: np.ndarray) -> str:
    scale = min(BATCH_SIDE / max(image.shape[:2]), 1.0)
    return figure(title, picture(resized(image, scale) if scale < 1 else image, "", quality=80))


def _histograms(class_names: Sequence[str], analysis: Analysis | None, train_objects: np.ndarray | None) -> str:
    charts = []
    if train_objects is not None:
        charts.append(histogram("Objects of training", class_names, train_objects))
    if analysis is not None:
        charts.append(histogram("Objects of validation", analysis.class_names, analysis.curves.objects))
    return section("How often each class occurs", grid(*charts))


def _number(value: Any) -> float:
    """A float; NaN for what is missing, empty or no number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _ap(value: Any) -> float:
    """An average precision; pycocotools says -1 where there is no ground truth."""
    number = _number(value)
    return number if number >= 0 else math.nan


def _figure(value: Any) -> str:
    number = _ap(value)
    return "\N{EN DASH}" if math.isnan(number) else f"{number:.3f}"


def _column(history: Sequence[Row], key: str) -> np.ndarray:
    return np.array([_number(row.get(key)) for row in history])


def _headline(history: Sequence[Row], evaluation: Row, parameters: int | None, seconds: float | None) -> str:
    figures = [(label, _figure(evaluation[key])) for key, label in FIGURES.items() if key in evaluation]
    # the best epoch of a model with masks is that of the best masks
    criterion = "segm_AP" if "segm_AP" in evaluation else "AP"
    epoch, ap = _column(history, "epoch"), np.array([_ap(row.get(criterion)) for row in history])
    known = np.isfinite(ap) & np.isfinite(epoch)
    if known.any():
        best = epoch[known][ap[known].argmax()]
        figures.append(("best epoch", f"{best:.0f} <small>of {np.nanmax(epoch):.0f}</small>"))
    if seconds is not None:
        figures.append(("time", _duration(seconds)))
    rate = _column(history, "images_per_second")
    if np.isfinite(rate).any():
        figures.append(("images per second in training", f"{np.nanmedian(rate):.0f}"))
    wait = _column(history, "data_wait")
    if np.isfinite(wait).any():
        figures.append(("of training spent waiting for data", f"{np.nanmean(wait):.1%}"))
    if parameters is not None:
        figures.append(("parameters", f"{parameters / 1e6:.2f} <small>M</small>"))
    note = ""
    if math.isnan(_ap(evaluation.get("AP"))):
        reason = "the validation images hold no ground truth or were not evaluated"
        note = f"There is no average precision: {reason}."
    return section("", tiles(figures), note=note)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} <small>h</small> {minutes:02d} <small>min</small>"
    if minutes:
        return f"{minutes} <small>min</small> {rest:02d} <small>s</small>"
    return f"{rest} <small>s</small>"


def _training(history: Sequence[Row]) -> str:
    epoch, iteration = _column(history, "epoch"), _column(history, "iteration")
    if np.isfinite(epoch).all() and len(np.unique(epoch)) == len(epoch):
        x, unit = epoch, "epoch"
    elif np.isfinite(iteration).all():
        x, unit = iteration, "iteration"
    else:
        x, unit = np.arange(1.0, len(history) + 1), "row"

    def curves(keys: Mapping[str, str], at: np.ndarray) -> list[Curve]:
        columns = ((label, _column(history, key)) for key, label in keys.items())
        return [
            Curve(label, *thinned(at[ok], y[ok]), color)
            for (label, y), color in zip(columns, LINE_COLORS, strict=False)
            if (ok := np.isfinite(at) & np.isfinite(y)).any()
        ]

    ap_curves = [
        Curve(key, epoch[measured], values[measured], color)
        for key, color in zip(("AP", "AP50", "segm_AP", "segm_AP50"), LINE_COLORS, strict=False)
        if (measured := np.isfinite(values := np.array([_ap(row.get(key)) for row in history]))).any()
    ]
    losses = {"loss": "total", "loss_cls": "classification", "loss_bbox": "box", "loss_mask": "mask"}
    losses |= {"loss_vfl": "classification", "loss_giou": "overlap"}
    charts = (
        line_chart("Training loss", unit, curves(losses, x)),
        line_chart("Average precision on the validation images", "epoch", ap_curves, top=1),
        line_chart("Learning rate", unit, curves({"lr": "learning rate"}, x)),
        line_chart("Images per second", unit, curves({"images_per_second": "images per second"}, x)),
    )
    return section("Training", grid(*charts))


def _classes(evaluation: Row, pr_curves: PRCurves, analysis: Analysis | None) -> str:
    per_class: Mapping[str, Row] = evaluation.get("per_class") or {}
    chart = _precision_recall(per_class, pr_curves)
    keys = [key for key in FIGURES if any(key in row for row in per_class.values())]
    head = ["class", *keys]
    rows = [[name, *(_figure(row.get(key)) for key in keys)] for name, row in per_class.items()]
    if analysis is not None:
        head += ["best F1", "at score", "objects"]
        number = {name: k for k, name in enumerate(analysis.class_names)}
        f1, best = analysis.curves.f1, analysis.curves.best
        for row in rows:
            k = number[row[0]]
            row += [_figure(f1[k, best[k]]), f"{analysis.thresholds[k]:.2f}", str(analysis.curves.objects[k])]
    shares = [float(np.nan_to_num(_ap(row.get("AP")))) for row in per_class.values()]
    if len(rows) <= FEW_CLASSES:
        return section("Classes", grid(chart, figure("Figures of each class", table(head, rows, shares))))
    return section("Classes", grid(chart), long_table(head, rows, shares))


def _precision_recall(per_class: Mapping[str, Row], pr_curves: PRCurves) -> str:
    curves: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, (recall, precision) in pr_curves.items():
        p = np.array([_ap(value) for value in precision])
        if np.isfinite(p).any():
            curves[name] = np.asarray(recall, dtype=np.float64), p
    if not curves:
        return ""

    def ap50(name: str) -> float:
        value = _ap(per_class.get(name, {}).get("AP50"))
        return float(np.nanmean(curves[name][1])) if math.isnan(value) else value

    ranked = sorted(curves, key=ap50, reverse=True)
    half = MAX_NAMED_CURVES // 2
    named = ranked if len(ranked) <= MAX_NAMED_CURVES else ranked[: half - 1] + ranked[-half:]
    lines = [Curve(None, *curves[name], "#88888866", 0.8) for name in ranked if name not in named]
    colors = dict(zip(named, LINE_COLORS, strict=False))
    lines += [Curve(f"{ap50(name):.3f} {class_name(name)}", *curves[name], colors[name], 1.4) for name in named]
    grids = [recall for recall, _ in curves.values()]
    if len(curves) > 1 and all(np.array_equal(grids[0], grid) for grid in grids):
        mean = np.nanmean([p for _, p in curves.values()], axis=0)
        lines.append(Curve(f"mean of {len(curves)}", grids[0], mean, INK, 2.4))
    title = "Precision by recall at IoU .50, and AP50"
    if len(named) < len(ranked):
        title += f": best {half - 1} and worst {half} classes"
    return line_chart(title, "recall", lines, top=1.02, left=0, right=1, ylabel="precision")


def _settings(settings: Row) -> str:
    device = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"}
    told = versions("rtmdet-fast", "torch", "triton", "numpy", "opencv-python", "pycocotools") | device
    return section("Settings and versions", side_by_side(settings_table(settings), settings_table(told)))
