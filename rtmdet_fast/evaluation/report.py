"""report.html: one self-contained page that tells how a run went, without scripts or outside resources."""

from __future__ import annotations

import base64
import io
import math
import platform
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from html import escape
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from rtmdet_fast.class_names import class_name
from rtmdet_fast.data.masks import Outlines
from rtmdet_fast.files import write_atomically
from rtmdet_fast.inference.drawing import draw_detections
from rtmdet_fast.inference.results import Results

Row = Mapping[str, Any]
PRCurves = Mapping[str, tuple[Sequence[float], Sequence[float]]]

# Of more classes than this, only the best and the worst have a named precision-recall curve.
MAX_NAMED_CURVES = 10

# The long side of a picture: small ones grow before letters are drawn on them, large ones shrink.
PICTURE_SIDE = 380

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

# Lines that show on white and on black. Text and axes are drawn in INK, for which the page puts its own.
LINE_COLORS = (
    "#3d7eff", "#e8590c", "#2b9a66", "#c2418f", "#b8860b",
    "#0e9aa7", "#8b5cf6", "#e03131", "#6b8e23", "#a0694b",
)  # fmt: skip
INK = "#010203"


class ReportSample(NamedTuple):
    """A validation image: `result` with its image kept, and its truth.

    gt_boxes [m, 4] xyxy or [m, 5] rotated, gt_labels [m], gt_masks where the task has them.
    """

    result: Results
    gt_boxes: np.ndarray
    gt_labels: np.ndarray
    gt_masks: Outlines | None = None


class _Curve(NamedTuple):
    label: str | None
    x: np.ndarray
    y: np.ndarray
    color: str
    width: float = 1.8


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
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>"
        f'<h1>{escape(title)}</h1><p class="note">written {time.strftime("%Y-%m-%d %H:%M")}</p>\n'
        + "\n".join(sections)
        + "\n</body></html>\n"
    )
    path = Path(path)
    with write_atomically(path) as file:
        file.write(page.encode(errors="replace"))
    return path


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
    tiles = [(label, _figure(evaluation[key])) for key, label in FIGURES.items() if key in evaluation]
    # the best epoch of a model with masks is that of the best masks
    criterion = "segm_AP" if "segm_AP" in evaluation else "AP"
    epoch, ap = _column(history, "epoch"), np.array([_ap(row.get(criterion)) for row in history])
    known = np.isfinite(ap) & np.isfinite(epoch)
    if known.any():
        best = epoch[known][ap[known].argmax()]
        tiles.append(("best epoch", f"{best:.0f} <small>of {np.nanmax(epoch):.0f}</small>"))
    if seconds is not None:
        tiles.append(("time", _duration(seconds)))
    rate = _column(history, "images_per_second")
    if np.isfinite(rate).any():
        tiles.append(("images per second in training", f"{np.nanmedian(rate):.0f}"))
    wait = _column(history, "data_wait")
    if np.isfinite(wait).any():
        tiles.append(("of training spent waiting for data", f"{np.nanmean(wait):.1%}"))
    if parameters is not None:
        tiles.append(("parameters", f"{parameters / 1e6:.2f} <small>M</small>"))
    cells = "".join(f"<div><b>{value}</b><span>{escape(label)}</span></div>" for label, value in tiles)
    note = ""
    if math.isnan(_ap(evaluation.get("AP"))):
        reason = "the validation images hold no ground truth or were not evaluated"
        note = f'<p class="note">There is no average precision: {reason}.</p>'
    return f'<section><div class="tiles">{cells}</div>{note}</section>'


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

    def curves(keys: Mapping[str, str], at: np.ndarray) -> list[_Curve]:
        columns = ((label, _column(history, key)) for key, label in keys.items())
        return [
            _Curve(label, *_thinned(at[ok], y[ok]), color)
            for (label, y), color in zip(columns, LINE_COLORS, strict=False)
            if (ok := np.isfinite(at) & np.isfinite(y)).any()
        ]

    ap_curves = [
        _Curve(key, epoch[measured], values[measured], color)
        for key, color in zip(("AP", "AP50", "segm_AP", "segm_AP50"), LINE_COLORS, strict=False)
        if (measured := np.isfinite(values := np.array([_ap(row.get(key)) for row in history]))).any()
    ]
    losses = {"loss": "total", "loss_cls": "classification", "loss_bbox": "box", "loss_mask": "mask"}
    losses |= {"loss_vfl": "classification", "loss_giou": "overlap"}
    charts = (
        _chart("Training loss", unit, curves(losses, x)),
        _chart("Average precision on the validation images", "epoch", ap_curves, top=1),
        _chart("Learning rate", unit, curves({"lr": "learning rate"}, x)),
        _chart("Images per second", unit, curves({"images_per_second": "images per second"}, x)),
    )
    if not any(charts):
        return ""
    return f'<section><h2>Training</h2><div class="charts">{"".join(charts)}</div></section>'


def _thinned(x: np.ndarray, y: np.ndarray, most: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Means of neighbours, so that a long run makes a page no larger than a short one."""
    group = math.ceil(len(x) / most)
    starts = np.arange(0, len(x), group)
    sizes = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / sizes, np.add.reduceat(y, starts) / sizes


def _classes(evaluation: Row, pr_curves: PRCurves) -> str:
    per_class: Mapping[str, Row] = evaluation.get("per_class") or {}
    chart = _precision_recall(per_class, pr_curves)
    if not per_class and not chart:
        return ""
    keys = [key for key in FIGURES if any(key in row for row in per_class.values())]
    head = "<tr><th>class</th>" + "".join(f"<th>{key}</th>" for key in keys) + "</tr>"
    rows = []
    for name, row in per_class.items():
        cells = "".join(f"<td>{_figure(row.get(key))}</td>" for key in keys)
        share = f"--share:{100 * np.nan_to_num(_ap(row.get('AP'))):.1f}%"
        rows.append(f'<tr><td class="bar" style="{share}">{escape(name)}</td>{cells}</tr>')
    # A long table goes on beside itself.
    step = max(math.ceil(len(rows) / 4), 12)
    tables = "".join(f"<table>{head}{''.join(rows[i : i + step])}</table>" for i in range(0, len(rows), step))
    tables = f'<div class="tables">{tables}</div>' if rows else ""
    if len(rows) <= step:
        chart, tables = chart + tables, ""
    return f'<section><h2>Classes</h2><div class="charts">{chart}</div>{tables}</section>'


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
    lines = [_Curve(None, *curves[name], "#88888866", 0.8) for name in ranked if name not in named]
    colors = dict(zip(named, LINE_COLORS, strict=False))
    lines += [_Curve(f"{ap50(name):.3f} {class_name(name)}", *curves[name], colors[name], 1.4) for name in named]
    grids = [recall for recall, _ in curves.values()]
    if len(curves) > 1 and all(np.array_equal(grids[0], grid) for grid in grids):
        mean = np.nanmean([p for _, p in curves.values()], axis=0)
        lines.append(_Curve(f"mean of {len(curves)}", grids[0], mean, INK, 2.4))
    title = "Precision by recall at IoU .50, and AP50"
    if len(named) < len(ranked):
        title += f": best {half - 1} and worst {half} classes"
    return _chart(title, "recall", lines, top=1.02, left=0, right=1, ylabel="precision")


def _chart(
    title: str,
    xlabel: str,
    curves: Sequence[_Curve],
    *,
    ylabel: str = "",
    top: float | None = None,
    left: float | None = None,
    right: float | None = None,
) -> str:
    """Inline SVG in the page's own text colour; nothing where there is no curve."""
    if not curves:
        return ""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,
        "text.parse_math": False,
        "font.size": 10,
        **dict.fromkeys(inked, INK),
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(6.2, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for curve in curves:
            dots = {"marker": "o", "ms": 3.5} if len(curve.x) < 20 else {}
            look: dict[str, Any] = {"color": curve.color, "lw": curve.width, "clip_on": False, **dots}
            axes.plot(curve.x, curve.y, label=curve.label, **look)
        axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, top), xlim=(left, right))
        if left is None:  # epochs or iterations
            axes.set_xlim(0, 1.02 * max(float(curve.x.max()) for curve in curves) or 1)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25, lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if len(curves) > 1:
            beside: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
            axes.legend(frameon=False, fontsize=9, **(beside if len(curves) > 4 else {}))
        out = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        with warnings.catch_warnings():
            # matplotlib's font lacks letters; the browser, which gets them as text, has others
            warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
            figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>"


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
        image = _resized(result.image, scale)
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
        cells.append(
            f'<figure class="pair"><figcaption>{escape(name)}</figcaption>'
            f"<div>{_picture(truth, f'truth: {len(sample.gt_labels)}')}"
            f"{_picture(found, f'prediction: {int(kept.sum())}')}</div></figure>"
        )
    return (
        "<section><h2>Validation images</h2>"
        f'<p class="note">Left the truth, right the detections that score {score_threshold:g} or more.</p>'
        f'<div class="pairs">{"".join(cells)}</div></section>'
    )


def _scaled(boxes: np.ndarray, scale: float) -> np.ndarray:
    """Boxes [n, 4], or rotated ones [n, 5], in a picture resized by `scale`."""
    scaled = np.array(boxes, np.float32)
    scaled[..., :4] *= scale
    return scaled


def _resized(image: np.ndarray, scale: float) -> np.ndarray:
    import cv2

    size = (max(round(image.shape[1] * scale), 1), max(round(image.shape[0] * scale), 1))
    return cv2.resize(image, size, interpolation=cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA)


def _picture(image: np.ndarray, caption: str) -> str:
    import cv2

    jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 85])[1]
    address = "data:image/jpeg;base64," + base64.b64encode(jpeg.tobytes()).decode()
    return f'<div><img alt="{escape(caption)}" src="{address}"><span>{escape(caption)}</span></div>'


def _settings(settings: Row) -> str:
    import cv2

    versions = {"python": platform.python_version(), "opencv": cv2.__version__}
    for package in ("rtmdet-fast", "torch", "triton", "numpy", "pycocotools"):
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    versions["system"] = f"{platform.system()} {platform.machine()}"
    versions["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return (
        '<section><h2>Settings and versions</h2><div class="tables">'
        f"{_table(_flat(settings))}{_table(versions)}</div></section>"
    )


def _flat(settings: Row, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if is_dataclass(value) and not isinstance(value, type):
            value = asdict(value)
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _table(rows: Mapping[str, Any]) -> str:
    cells = "".join(
        f'<tr><th scope="row">{escape(key)}</th><td>{escape(str(value))}</td></tr>' for key, value in rows.items()
    )
    return f'<table class="settings">{cells}</table>' if cells else ""


STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --page: #fff; --soft: #6b7280;
        --line: #e3e5e8; --tile: #f5f6f8; --bar: #3d7eff2e }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e7e9; --page: #15171a; --soft: #9aa0a8;
          --line: #2c3036; --tile: #1e2126; --bar: #3d7eff59 } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--page);
       max-width: 1280px; margin: 0 auto; padding: 1.5rem }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .8rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem }
.note { color: var(--soft); margin: .3rem 0 .8rem }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); gap: .7rem;
         margin-top: 1.2rem }
.tiles div { background: var(--tile); border-radius: .5rem; padding: .6rem .9rem }
.tiles b { display: block; font-size: 1.55rem; font-weight: 600; white-space: nowrap }
.tiles span, figcaption, .pair span { color: var(--soft); font-size: .85rem }
small { font-size: .6em; font-weight: 400 }
figure { margin: 0; min-width: 0 }
.charts, .pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(28rem, 100%), 1fr));
                  gap: 1.4rem }
svg { width: 100%; height: auto; display: block }
svg text { font-family: inherit !important }
.charts + .tables { margin-top: 1rem }
.tables { display: flex; flex-wrap: wrap; gap: 1rem 2rem; align-items: flex-start }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
td, th { padding: .2rem .7rem .2rem .4rem; border-bottom: 1px solid var(--line);
         text-align: right; font-weight: 400 }
th { color: var(--soft) }
td:first-child, th:first-child, .settings td { text-align: left; overflow-wrap: anywhere }
.bar { background: linear-gradient(to right, var(--bar) var(--share), transparent var(--share));
       min-width: 9rem }
.pair > div { display: flex; gap: .4rem }
.pair > div > div { flex: 1; min-width: 0 }
img { width: 100%; height: auto; display: block; border-radius: .25rem }
"""
