"""Runs side by side: their figures, curves, and the settings in which they differ."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rtmdet_fast.class_names import class_name
from rtmdet_fast.errors import UserError
from rtmdet_fast.evaluation.errors import KINDS
from rtmdet_fast.evaluation.report import FIGURES
from rtmdet_fast.pages.charts import LINE_COLORS, Curve, legend, line_chart, thinned
from rtmdet_fast.pages.page import figure, flat, grid, long_table, section, table, write_page

DASH = "\N{EN DASH}"
CURVES = {
    "loss": "Training loss",
    "AP": "Average precision on the validation images",
    "AP50": "AP50",
    "segm_AP": "Mask AP",
    "lr": "Learning rate",
}
NOT_SETTINGS = ("out", "resume", "overwrite", "progress", "report")
"""Of a run's settings, those that do not tell what came out."""


@dataclass(frozen=True)
class Run:
    """What a run's folder holds: its name, settings, rows of metrics.csv, and figures of its best weights."""

    name: str
    settings: dict[str, Any]
    history: list[dict[str, str]]
    figures: dict[str, Any]


def read_run(folder: Path, history: list[dict[str, str]], name: str) -> Run:
    """UserError where the folder holds no run."""
    files = {}
    for file in ("config.json", "metrics.json"):
        path = folder / file
        try:
            files[file] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} cannot be read as JSON ({error})") from error
        if not isinstance(files[file], dict):
            raise UserError(f"{path} is damaged: it holds no {file.removesuffix('.json')} of a run")
    if not history and not any(files.values()):
        raise UserError(f"{folder} holds no run: neither config.json, metrics.csv nor metrics.json")
    return Run(name, flat(files["config.json"]), history, files["metrics.json"])


def run_names(folders: Sequence[Path]) -> list[str]:
    """As short as they can be and still differ: the folder's name, with those above it where several are alike."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{folders[0]} is given twice: give runs of different folders")


def compared(runs: Sequence[Run]) -> dict[str, Any]:
    """The figures of each run, and the settings in which they differ, for JSON."""
    return {
        "figures": {run.name: _figures(run) for run in runs},
        "per_class": {run.name: run.figures.get("per_class", {}) for run in runs},
        "dAP": {run.name: _gains(run) for run in runs},
        "settings": {
            key: dict(zip([run.name for run in runs], values, strict=True)) for key, values in _differing(runs)
        },
    }


def _figures(run: Run) -> dict[str, float]:
    figures = {key: _number(run.figures[key]) for key in FIGURES if key in run.figures}
    if run.figures.get("best_epoch") is not None:
        figures["best epoch"] = _number(run.figures["best_epoch"])
    rate = [value for row in run.history if math.isfinite(value := _number(row.get("images_per_second")))]
    if rate:
        figures["images per second in training"] = float(np.median(rate))
    return {key: value for key, value in figures.items() if math.isfinite(value) and value >= 0}


def _gains(run: Run) -> dict[str, float]:
    analysis = run.figures.get("analysis")
    gains = analysis.get("dAP") if isinstance(analysis, dict) else None
    return {kind: _number(gains.get(kind)) for kind in KINDS} if isinstance(gains, dict) else {}


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _differing(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """Settings by name, and the value of each run, where not all are the same."""
    names = dict.fromkeys(key for run in runs for key in run.settings if key not in NOT_SETTINGS)
    rows = [(name, [run.settings.get(name) for run in runs]) for name in names]
    return [(name, values) for name, values in rows if any(value != values[0] for value in values)]


def write_comparison(path: str | Path, runs: Sequence[Run]) -> Path:
    """Writes the page and returns its path."""
    colors = [LINE_COLORS[i % len(LINE_COLORS)] for i in range(len(runs))]
    names = [class_name(run.name) for run in runs]
    figures = [_figures(run) for run in runs]
    known = dict.fromkeys(key for found in figures for key in found)
    rows = [[FIGURES.get(key, key), *(_told(found.get(key)) for found in figures)] for key in known]
    gains = [_gains(run) for run in runs]
    gain_rows = [[kind, *(_told(found.get(kind)) for found in gains)] for kind in KINDS] if any(gains) else []
    differing = [
        [name, *(DASH if value is None else str(value) for value in values)] for name, values in _differing(runs)
    ]
    same = "The settings are the same." if len(runs) > 1 and not differing else ""
    return write_page(
        path,
        f"{' and '.join(names[:2])}{f' and {len(names) - 2} more' if len(names) > 2 else ''}",
        [
            section("", legend(list(zip(names, colors, strict=True)))),
            section("Figures of the best weights", table(["", *names], rows)),
            section("Settings that differ", table(["", *names], differing) or figure(same, " ")),
            section("Curves", grid(*(_chart(runs, colors, key, title) for key, title in CURVES.items()))),
            section("AP of each class", _per_class(runs, names)),
            section(
                "What fixing each kind of error would gain in AP50",
                table(["", *names], gain_rows),
                note="As TIDE counts errors (arXiv:2008.08115); the run's report tells what the kinds are.",
            ),
        ],
    )


def _told(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return DASH
    return f"{value:.3f}" if value < 1 or value % 1 else f"{value:.0f}"


def _chart(runs: Sequence[Run], colors: Sequence[str], key: str, title: str) -> str:
    curves = []
    for run, color in zip(runs, colors, strict=True):
        x, y = (np.array([_number(row.get(name)) for row in run.history]) for name in ("iteration", key))
        epoch = np.array([_number(row.get("epoch")) for row in run.history])
        known = np.isfinite(x) & np.isfinite(y) & np.isfinite(epoch) & (y >= 0)
        if known.any():
            # a row within an epoch stands where in it the iteration lies
            steps = np.nanmax(x) / np.nanmax(epoch)
            curves.append(Curve(class_name(run.name), *thinned(x[known] / steps, y[known]), color))
    return line_chart(title, "epoch", curves, top=1 if "AP" in key else None)


def _per_class(runs: Sequence[Run], names: Sequence[str]) -> str:
    """AP of the boxes, or masks where there are any, and of two runs the difference, the greatest first."""
    of_runs = [run.figures.get("per_class") or {} for run in runs]
    key = "segm_AP" if any("segm_AP" in row for found in of_runs for row in found.values()) else "AP"
    classes = list(dict.fromkeys(name for found in of_runs for name in found))
    values = [[_ap(found.get(name, {}).get(key)) for found in of_runs] for name in classes]
    order = list(range(len(classes)))
    if len(runs) == 2:
        order.sort(key=lambda i: -abs(_difference(values[i])))
    rows = []
    for i in order:
        row = [class_name(classes[i]), *(_told(value) for value in values[i])]
        rows.append([*row, f"{values[i][1] - values[i][0]:+.3f}"] if len(runs) == 2 else row)
    return long_table(["class", *names, *(["difference"] if len(runs) == 2 else [])], rows)


def _ap(value: Any) -> float:
    number = _number(value)
    return number if number >= 0 else math.nan


def _difference(values: Sequence[float]) -> float:
    difference = values[1] - values[0]
    return difference if math.isfinite(difference) else 0.0
