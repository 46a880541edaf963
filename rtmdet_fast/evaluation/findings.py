"""The report's sections on what an analysis found: thresholds, errors, confusions, and the objects they are of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np

from rtmdet_fast.class_names import class_name
from rtmdet_fast.evaluation.analysis import Analysis, Part
from rtmdet_fast.evaluation.errors import KINDS
from rtmdet_fast.evaluation.thresholds import GRID
from rtmdet_fast.pages.charts import GREY, INK, LINE_COLORS, Curve, column_chart, line_chart
from rtmdet_fast.pages.page import bars, figure, grid, section, table

MAX_MATRIX = 16
"""Classes of a confusion matrix that can be read; of more, those that are confused most."""
MAX_CONFUSIONS = 15
MAX_CURVES = 8
"""Of F1 by threshold, with names."""
MAX_BARS = 20
"""Classes of a histogram; of more, the most frequent and the rarest."""
DASH = "\N{EN DASH}"
KIND_TOLD = {
    "class": "right place, other class",
    "location": "right class, badly placed",
    "both": "other class, badly placed",
    "duplicate": "found already",
    "background": "nothing is there",
    "missed": "not found at all",
}


def score_section(analysis: Analysis) -> str:
    """F1 by score threshold, and the best threshold of each class."""
    curves, f1 = analysis.curves, analysis.curves.f1
    measured = np.flatnonzero(curves.objects)
    best_f1 = np.array([f1[k, curves.best[k]] for k in range(len(curves.best))])
    by_objects = measured[np.argsort(-curves.objects[measured], kind="stable")]
    named = by_objects[:MAX_CURVES]
    lines = [Curve(None, GRID, f1[k], f"{GREY}55", 0.8) for k in by_objects[MAX_CURVES:]]
    marks = []
    for k, color in zip(named, LINE_COLORS, strict=False):
        name = class_name(analysis.class_names[k])
        lines.append(Curve(f"{name}: {best_f1[k]:.2f} at {analysis.thresholds[k]:.2f}", GRID, f1[k], color, 1.4))
        marks.append((float(analysis.thresholds[k]), float(best_f1[k]), color))
    if len(measured) > 1:
        of_all, at = curves.f1_of_all, curves.best_of_all
        lines.append(Curve(f"all together: {of_all[at]:.2f} at {GRID[at]:.2f}", GRID, of_all, INK, 2.4))
    title = "F1 by score threshold, at IoU .50"
    if len(named) < len(measured):
        title += f": the {len(named)} most frequent classes"
    chart = line_chart(title, "score threshold", lines, top=1.02, left=0, right=1, ylabel="F1", marks=marks)
    note = (
        "The best threshold of each class, on these images, is kept with the weights of a run, and predict takes it "
        "where no other is given. It is where most objects are found with the fewest wrong detections; take a higher "
        "one where a wrong detection costs more than a missed object, and a lower one where it is the other way."
    )
    return section(
        "Which score to ask for", grid(chart, figure("Precision and recall", _precision_by_score(analysis))), note=note
    )


def _precision_by_score(analysis: Analysis) -> str:
    """Of all classes together, at some thresholds."""
    true, false = analysis.curves.true.sum(0), analysis.curves.false.sum(0)
    objects = analysis.curves.objects.sum()
    rows = []
    for at in range(10, 100, 10):
        found = int(true[at] + false[at])
        precision = f"{true[at] / found:.3f}" if found else DASH
        rows.append(
            [
                f"{GRID[at]:.1f}",
                precision,
                f"{true[at] / objects:.3f}",
                f"{analysis.curves.f1_of_all[at]:.3f}",
                f"{found}",
            ]
        )
    return table(["threshold", "precision", "recall", "F1", "detections"], rows)


def error_section(analysis: Analysis) -> str:
    """What fixing each kind of error would gain, and how many there are."""
    gains, counts, kept = analysis.gains, analysis.errors.counts(), analysis.kept_errors.counts()
    rows = [(kind, gains.by_kind[kind], f"+{gains.by_kind[kind]:.3f}") for kind in KINDS]
    chart = bars(f"What fixing each kind would gain in AP50, now {gains.ap50:.3f}", rows)
    numbers = table(
        ["error", "above the thresholds", "of all detections"],
        [[f"{kind}: {KIND_TOLD[kind]}", str(kept[kind]), str(counts[kind])] for kind in KINDS],
    )
    special = table(
        ["", "gain in AP50"],
        [
            ["all wrong detections last", f"+{gains.false_positives:.3f}"],
            ["nothing missed", f"+{gains.false_negatives:.3f}"],
        ],
    )
    note = (
        "Kinds of errors, and what fixing one alone would gain, as TIDE counts them (arXiv:2008.08115), at IoU .50; a "
        " detection is badly placed from IoU .10 on. AP is COCO's. The gains do not add up."
    )
    return section("What goes wrong", grid(chart, figure("How many", numbers + special)), note=note)


def confusion_section(analysis: Analysis) -> str:
    """The confusion matrix, of the classes that are confused most, and the most frequent confusions."""
    matrix, names = analysis.confusion, [class_name(name) for name in analysis.class_names]
    classes = len(names)
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    shown = np.flatnonzero(matrix[:, :].sum(0)[:-1] + matrix.sum(1)[:-1])
    if len(shown) > MAX_MATRIX:
        between = wrong[:classes, :classes]
        order = np.lexsort((-(matrix[:classes].sum(1)), -(between.sum(0) + between.sum(1))))
        shown = np.sort(order[:MAX_MATRIX])
    objects = matrix.sum(1)
    ranked = np.argsort(-wrong[:classes, :classes], axis=None, kind="stable")[:MAX_CONFUSIONS]
    rows, shares = [], []
    for at in ranked.tolist():
        truth, taken = divmod(at, classes)
        if wrong[truth, taken]:
            share = wrong[truth, taken] / objects[truth]
            rows.append([f"{names[truth]} taken for {names[taken]}", str(wrong[truth, taken]), f"{share:.1%}"])
            shares.append(float(share))
    several = f": the {len(shown)} classes that are confused most" if len(shown) < classes else ""
    matrix_html = f'<div class="broad">{figure(f"Confusion matrix{several}", _matrix(matrix, shown, names))}</div>'
    confusions = figure("Most frequent confusions", table(["", "objects", "of the class"], rows, shares))
    note = (
        "Above the best thresholds, at IoU .50: a row is what there is, a column what it was taken for. In the last "
        "column are objects that were missed, in the last row detections where there is nothing."
    )
    return section("What is taken for what", grid(matrix_html, confusions), note=note)


def _matrix(matrix: np.ndarray, shown: np.ndarray, names: Sequence[str]) -> str:
    """Rows in shares of their objects, as colours; the numbers as they are."""
    at = [*shown.tolist(), len(names)]
    titles = [*(names[k] for k in shown), "background"]
    head = "".join(f'<th scope="col"><span>{escape(title)}</span></th>' for title in titles)
    rows = []
    of_row = np.maximum(matrix.sum(1), 1)
    for i, title in zip(at, titles, strict=True):
        cells = []
        for j in at:
            number, share = int(matrix[i, j]), matrix[i, j] / of_row[i]
            if i == j == len(names):
                cells.append("<td></td>")
                continue
            kind = "" if i == j else ' class="wrong"'
            cells.append(f'<td{kind} style="--share:{0.85 * share:.2f}">{number or ""}</td>')
        rows.append(f'<tr><th scope="row">{escape(title)}</th>{"".join(cells)}</tr>')
    return (
        f'<div class="wide"><table class="matrix"><thead><tr><th></th>{head}</tr></thead>{"".join(rows)}</table></div>'
    )


def parts_section(analysis: Analysis) -> str:
    """AP by size and by crowding."""
    found, ap, ap50 = (("found", LINE_COLORS[2]), ("AP", LINE_COLORS[0]), ("AP50", LINE_COLORS[1]))

    def chart(title: str, xlabel: str, parts: Sequence[Part], kinds: Sequence[tuple[str, str]]) -> str:
        labels = [f"{part.name}\n{part.objects}" for part in parts]
        columns = [(name, [_nan(getattr(part, name.lower())) for part in parts], color) for name, color in kinds]
        return column_chart(title, labels, columns, xlabel=xlabel, top=1)

    charts = (
        chart("By size of the object", "√area in px, and objects", analysis.by_size, (ap, ap50, found)),
        chart("By objects in the image", "objects in the image, and of all", analysis.by_crowd, (ap, ap50, found)),
        chart("By overlap with another object", "greatest IoU, and objects", analysis.by_neighbour, (found,)),
    )
    note = (
        "Which objects are found. AP of a size leaves out the objects of other sizes, as COCO does; found is the share "
        "that is found at IoU .50 above the best thresholds. Few objects make a figure uncertain."
    )
    return section("Which objects are found", grid(*charts), note=note)


def _nan(value: float) -> float:
    return value if value >= 0 else math.nan


def histogram(title: str, names: Sequence[str], counts: np.ndarray) -> str:
    """Bars of the objects of each class, the most frequent first; of many classes both ends."""
    order = np.argsort(-counts, kind="stable")
    total = max(int(counts.sum()), 1)
    half = MAX_BARS // 2
    some = list(order) if len(order) <= MAX_BARS else [*order[:half], *order[-half:]]
    if len(some) < len(order):
        title += f": the {half} most frequent classes and the {half} rarest"
    rows = [(class_name(names[k]), float(counts[k]), f"{counts[k]} ({counts[k] / total:.1%})") for k in some]
    return bars(title, rows)
