"""One picture per group of ops: how many times faster ours is than each peer, on a logarithmic scale."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

AHEAD, BEHIND, EVEN = "#2a9d6f", "#c8553d", "#9a9a9a"


def bars(cases: dict[str, dict[str, Any]], titles: dict[str, str]) -> list[tuple[str, tuple[float, float, float]]]:
    """(label, (ratio, low, high)) of each peer in each case; the cases of a group are one bar, their geometric mean
    with the lowest and the highest quartile."""
    found: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
    for key in sorted(cases, key=lambda key: list(titles).index(cases[key]["op"])):
        case = cases[key]
        for name, ratio in case["ratios"].items():
            label = key.split(": ", 1)[1] if case["group"] is None else case["group"]
            found.setdefault((case["op"], label, name, ratio["clock"]), []).append(ratio)
    rows = []
    for (op, label, name, clock), ratios in found.items():
        mean = math.exp(sum(math.log(ratio["time"]) for ratio in ratios) / len(ratios))
        spread = min(ratio["q1"] for ratio in ratios), max(ratio["q3"] for ratio in ratios)
        many = f" ({len(ratios)} cases)" if len(ratios) > 1 else ""
        rows.append((f"{titles[op]}: {label}{many}\nagainst {name} ({clock})", (mean, *spread)))
    return rows


def draw(path: Path, title: str, rows: list[tuple[str, tuple[float, float, float]]]) -> None:
    """Writes `path`. Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 0.9 + 0.34 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for y, (_, (ratio, q1, q3)) in enumerate(rows):
        color = AHEAD if q1 > 1 else BEHIND if q3 < 1 else EVEN
        axes.barh(y, math.log2(ratio), color=color, height=0.62)
        low, high = math.log2(q1), math.log2(q3)
        axes.plot([low, high], [y, y], color="black", linewidth=1.2, marker="|", markersize=5)
        right = ratio >= 1
        axes.annotate(
            f"{ratio:.3g}x",
            (max(high, 0) if right else min(low, 0), y),
            xytext=(5 if right else -5, 0),
            textcoords="offset points",
            va="center",
            ha="left" if right else "right",
            fontsize=7.5,
        )
    edges = [math.log2(quartile) for _, (_, *quartiles) in rows for quartile in quartiles]
    low, high = min(*edges, 0), max(*edges, 0)
    room = 0.09 * max(high - low, 1)
    axes.set_xlim(min(low - room, -0.3), max(high + room, 0.3))
    first, last = (math.floor(v) for v in axes.get_xlim())
    step = max(1, round((last - first) / 8))
    ticks = [t for t in range(first, last + 1) if t % step == 0 and axes.get_xlim()[0] <= t]
    axes.set_xticks(ticks, [f"{2.0**t:g}x" for t in ticks], fontsize=8)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=6.5)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.axvline(0, color="black", linewidth=1)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("times as fast as the peer; lines: quartiles; right of 1x we are ahead", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, metadata={"Software": None})
