"""report.html: one self-contained page that tells how a run went, without scripts or outside resources."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from rtmdet_fast.class_names import class_name
from rtmdet_fast.data.masks import Outlines
from rtmdet_fast.inference.drawing import draw_detections
from rtmdet_fast.inference.results import Results
from rtmdet_fast.pages.charts import INK, LINE_COLORS, Curve, line_chart, thinned
from rtmdet_fast.pages.page import (
    PICTURE_SIDE,
    grid,
    long_table,
    picture,
    pictures,
    resized,
    section,
    settings_table,
    side_by_side,
    tiles,
    versions,
    write_page,
)

Row = Mapping[str, Any]
PRCurves = Mapping[str, tuple[Sequence[float], Sequence[float]]]

# Of more classes than this, only the best and the worst have a named precision-recall curve.
MAX_NAMED_CURVES = 10

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


class ReportSample(NamedTuple):
    """A validation image: `result` with its image kept, and its truth.

    gt_boxes [m, 4] xyxy or [m, 5] rotated, gt_labels [m], gt_masks where the task has them.
    """

    result: Results
    gt_boxes: np.ndarray
    gt_labels: np.ndarray
    gt_masks: Outlines | None = None


def write_report(
    path: str | Path,
    *,
    title: str,
    history: Sequence[Row],
    evaluation: Row,
    pr_curves: PRCurves,
    samples: Sequence[ReportSample],
    settings: Row,
    parameters: int | None = None,
    seconds: float | None = None,
    score_threshold: float = 0.3,
) -> Path:
    """Writes the page and returns its path.

    history: rows of metrics.csv (epoch, iteration, loss, loss_cls, loss_bbox, lr, images_per_second, data_wait as
        a share of the time, and AP, AP50 where validated); any may be missing, and numbers may be text
    evaluation: AP, AP50, ... and per_class: {name: {"AP": ..., "AP50": ...}}; -1 or NaN without ground truth
    pr_curves: by class name, recall [k] and precision [k] at IoU .50
    samples: validation images; their detections from `score_threshold` on are drawn
    settings: of the run, mappings and dataclasses may be nested
    parameters: of the model; seconds: the run took
    """
    sections = (
        _headline(history, evaluation, parameters, seconds),
        _training(history),
        _classes(evaluation, pr_curves),
        _pictures(samples, score_threshold),
        _settings(settings),
    )
    return write_page(path, title, sections)


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


def _classes(evaluation: Row, pr_curves: PRCurves) -> str:
    per_class: Mapping[str, Row] = evaluation.get("per_class") or {}
    chart = _precision_recall(per_class, pr_curves)
    if not per_class and not chart:
        return ""
    keys = [key for key in FIGURES if any(key in row for row in per_class.values())]
    rows = [[name, *(_figure(row.get(key)) for key in keys)] for name, row in per_class.items()]
    shares = [np.nan_to_num(_ap(row.get("AP"))) for row in per_class.values()]
    return section("Classes", grid(chart), long_table(["class", *keys], rows, shares))


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


def _pictures(samples: Sequence[ReportSample], score_threshold: float) -> str:
    if not samples:
        return ""
    cells = []
    for number, sample in enumerate(samples, 1):
        result = sample.result
        if result.image is None:
            continue
        kept = result.scores >= score_threshold
        scale = PICTURE_SIDE / max(result.shape)
        image = resized(result.image, scale)
        size = image.shape[0], image.shape[1]
        gt_masks = sample.gt_masks and sample.gt_masks.resized((scale, scale)).seen_through((0, 0, size[1], size[0]))
        truth = draw_detections(
            image, _scaled(sample.gt_boxes, scale), sample.gt_labels, None, result.names, masks=gt_masks
        )
        masks = result.predicted_masks
        found = draw_detections(
            image,
            _scaled(result.boxes[kept].numpy(), scale),
            result.labels[kept],
            result.scores[kept],
            result.names,
            masks=masks and masks[kept].resized(scale, size),
        )
        name = Path(result.path).name if result.path else f"image {number}"
        truth_told, found_told = f"truth: {len(sample.gt_labels)}", f"prediction: {int(kept.sum())}"
        cells.append(pictures(name, picture(truth, truth_told), picture(found, found_told)))
    note = f"Left the truth, right the detections that score {score_threshold:g} or more."
    return section("Validation images", grid(*cells), note=note)


def _scaled(boxes: np.ndarray, scale: float) -> np.ndarray:
    """Boxes [n, 4], or rotated ones [n, 5], in a picture resized by `scale`."""
    scaled = np.array(boxes, np.float32)
    scaled[..., :4] *= scale
    return scaled


def _settings(settings: Row) -> str:
    device = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"}
    told = versions("rtmdet-fast", "torch", "triton", "numpy", "opencv-python", "pycocotools") | device
    return section("Settings and versions", side_by_side(settings_table(settings), settings_table(told)))
