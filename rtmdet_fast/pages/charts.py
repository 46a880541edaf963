"""Charts as inline SVG in the page's own text colour, of a size at which their letters stay readable on a phone."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any, NamedTuple

import numpy as np

from rtmdet_fast.class_names import class_name
from rtmdet_fast.pages.page import figure

# matplotlib is imported where it is used: the package imports without it.

# Lines that show on white and on black. Text and axes are drawn in INK, for which the page puts its own.
LINE_COLORS = (
    "#3d7eff", "#e8590c", "#2b9a66", "#c2418f", "#b8860b",
    "#0e9aa7", "#8b5cf6", "#e03131", "#6b8e23", "#a0694b",
)  # fmt: skip
INK = "#010203"
GREY = "#888888"


class Curve(NamedTuple):
    """A line of a chart: its name in the legend (text), or none; x [k], y [k], NaN where it has a gap."""

    label: str | None
    x: np.ndarray
    y: np.ndarray
    color: str
    width: float = 1.8
    dashed: bool = False


def line_chart(
    title: str,
    xlabel: str,
    curves: Sequence[Curve],
    *,
    ylabel: str = "",
    top: float | None = None,
    left: float | None = None,
    right: float | None = None,
    marks: Sequence[tuple[float, float, str]] = (),
    note: str = "",
) -> str:
    """A figure with lines from 0 to `top`, a legend beneath where there are several; nothing where there is none.

    Args:
        title, xlabel, ylabel, note: texts.
        curves: the lines.
        top: of the y axis; as the curves need it where not given.
        left, right: of the x axis; without them it begins at 0 and counts epochs or iterations.
        marks: points x, y and their colour.
    """
    if not curves:
        return ""
    from matplotlib.ticker import MaxNLocator

    with _axes(title) as (axes, svg):
        for curve in curves:
            dots = {"marker": "o", "ms": 3.5} if len(curve.x) < 20 else {}
            look: dict[str, Any] = {"color": curve.color, "lw": curve.width, "clip_on": False, **dots}
            axes.plot(curve.x, curve.y, ls="--" if curve.dashed else "-", **look)
        for x, y, color in marks:
            axes.plot([x], [y], marker="o", ms=6, color=color, clip_on=False)
        axes.set(xlabel=class_name(xlabel), ylabel=class_name(ylabel), ylim=(0, top), xlim=(left, right))
        if left is None:
            axes.set_xlim(0, 1.02 * max(float(curve.x.max()) for curve in curves) or 1)
            axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True))
    named = [(curve.label, curve.color) for curve in curves if curve.label is not None]
    return figure(title, svg() + (legend(named) if len(curves) > 1 else ""), note)


def column_chart(
    title: str,
    labels: Sequence[str],
    columns: Sequence[tuple[str, Sequence[float], str]],
    *,
    xlabel: str = "",
    ylabel: str = "",
    top: float | None = None,
    note: str = "",
) -> str:
    """A figure with upright columns, a group for each of `labels`; nothing where there are none.

    columns: of each kind its name (text), a value for each label (NaN for none), and its colour.
    """
    if not labels or not columns:
        return ""
    with _axes(title) as (axes, svg):
        width = 0.8 / len(columns)
        for i, (_, values, color) in enumerate(columns):
            axes.bar(np.arange(len(labels)) - 0.4 + (i + 0.5) * width, np.nan_to_num(values), width, color=color)
        # more labels than there is room for would lie on each other
        step = max(
            int(np.ceil(len(labels) / max(60 // max(len(line) for label in labels for line in label.split("\n")), 1))),
            1,
        )
        at = range(0, len(labels), step)
        axes.set_xticks(list(at), ["\n".join(map(class_name, labels[i].split("\n"))) for i in at])
        axes.set(xlabel=class_name(xlabel), ylabel=class_name(ylabel), ylim=(0, top))
    return figure(title, svg() + (legend([c[::2] for c in columns]) if len(columns) > 1 else ""), note)


def legend(named: Sequence[tuple[str, str]]) -> str:
    """Names (texts) with their colours, as HTML: it wraps, and has every letter that the reader has."""
    inks = ("currentColor" if color == INK else color for _, color in named)
    items = "".join(
        f'<li><i style="background:{ink}"></i>{escape(name)}</li>' for (name, _), ink in zip(named, inks, strict=True)
    )
    return f'<ul class="legend">{items}</ul>' if items else ""


def thinned(x: np.ndarray, y: np.ndarray, most: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Means of neighbours, so that a long run makes a page no larger than a short one."""
    group = -(-len(x) // most)
    starts = np.arange(0, len(x), group)
    sizes = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / sizes, np.add.reduceat(y, starts) / sizes


@contextmanager
def _axes(title: str) -> Iterator[tuple[Any, Any]]:
    """Axes to draw on, and what gives their SVG afterwards."""
    import matplotlib
    from matplotlib.figure import Figure

    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": class_name(title),
        "text.parse_math": False,
        "font.size": 10,
        **dict.fromkeys(inked, INK),
    }
    drawn = io.StringIO()

    def svg() -> str:
        text = drawn.getvalue()
        return text[text.index("<svg") :].replace(INK, "currentColor")

    with matplotlib.rc_context(style):
        canvas = Figure(figsize=(4.4, 2.9), layout="constrained")
        axes = canvas.add_subplot()
        yield axes, svg
        axes.grid(axis="both", alpha=0.25, lw=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        with warnings.catch_warnings():
            # matplotlib's font lacks letters; the browser, which gets them as text, has others
            warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
            canvas.savefig(drawn, format="svg", transparent=True, metadata=nothing)
