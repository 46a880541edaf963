"""data.html: what a data set holds, with charts and drawn images, the worst first."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from rtmdet_fast.data.inspection import SMALLEST, Finding, Inspection, Place, SplitFacts, aspect_ratios, counted
from rtmdet_fast.errors import UserError
from rtmdet_fast.geometry.rotated import boxes_to_quads
from rtmdet_fast.inference.drawing import draw_detections
from rtmdet_fast.pages.charts import LINE_COLORS, column_chart
from rtmdet_fast.pages.page import (
    PICTURE_SIDE,
    bars,
    grid,
    long_table,
    picture,
    pictures,
    resized,
    section,
    table,
    tiles,
    write_page,
)

NAMED = 8  # images, or classes, in a sentence
BARS = 20  # classes, and sizes of images, of which a chart can be read
LEAST_WINDOW = 96  # pixels of an image around an object that is pointed at
LEVEL_COLORS = {"error": "#e03131", "warning": "#b8860b", "note": "#3d7eff"}
SIDES = (4, SMALLEST, 16, 32, 64, 128, 256)
RATIOS = (1 / 8, 1 / 4, 1 / 2, 2 / 3, 3 / 2, 2, 4, 8)
RATIO_LABELS = ("<1:8", "1:8", "1:4", "1:2", "1:1", "3:2", "2:1", "4:1", ">8:1")
CROWDS = (1, 2, 3, 5, 9, 17, 33, 65, 129)


def write_data_page(path: str | Path, inspection: Inspection, *, title: str, samples: int = 12) -> Path:
    """Writes the page and returns its path.

    samples: images drawn of each split, evenly spaced, beside those of the findings
    """
    return write_page(
        path,
        title,
        [
            section("", _headline(inspection)),
            section("What to know before training", _list(inspection.findings)),
            section("Worst first", *(_shown(inspection, finding) for finding in inspection.findings)),
            section("Splits", _splits(inspection)),
            section("Classes", *_classes(inspection)),
            section("Sizes", grid(*_charts(inspection)), note=_input_note(inspection)),
            *(_samples(inspection, s, samples) for s in range(len(inspection.splits))),
        ],
    )


def _headline(inspection: Inspection) -> str:
    splits = inspection.splits
    objects = sum(len(split.labels) for split in splits)
    images = sum(len(split.sizes) for split in splits)
    small = sum(_below(split) for split in splits)
    figures = [
        (f"images: {', '.join(f'{len(split.sizes):,} {split.name}' for split in splits)}", f"{images:,}"),
        ("objects", f"{objects:,}"),
        ("classes", f"{len(inspection.class_names):,}"),
        ("objects per image", f"{objects / max(images, 1):.1f}"),
        (f"of the objects below {SMALLEST} px at {inspection.image_size} px", f"{small / max(objects, 1):.1%}"),
    ]
    levels = Counter(finding.level for finding in inspection.findings)
    figures += [(f"{level}s", str(levels[level])) for level in ("error", "warning") if levels[level]]
    return tiles(figures)


def _below(split: SplitFacts) -> int:
    return int((split.sides.min(1, initial=np.inf) < SMALLEST).sum())


def _list(findings: Sequence[Finding]) -> str:
    if not findings:
        return '<p class="note">Nothing that a training would suffer from was found.</p>'
    rows = []
    for finding in findings:
        names = ", ".join(finding.names[:NAMED]) + (", …" if len(finding.names) > NAMED else "")
        rows.append(
            f'<li><b style="background:{LEVEL_COLORS[finding.level]}">{finding.level}</b> {escape(finding.text)}'
            f'<p class="note">{escape(names)}</p></li>'
        )
    return f'<ul class="findings">{"".join(rows)}</ul>'


def _shown(inspection: Inspection, finding: Finding) -> str:
    """The images of a finding under its text."""
    drawn = [(place, _drawn(inspection, place)) for place in finding.places]
    names = [inspection.splits[place.split].file(place.index) for place in finding.places]
    if finding.paired:
        cells = [
            pictures(f"{first} = {second}", picture(a, left.told), picture(b, right.told))
            for (left, a), (right, b), first, second in zip(
                drawn[::2], drawn[1::2], names[::2], names[1::2], strict=True
            )
            if a is not None and b is not None
        ]
    else:
        cells = [
            pictures(name, picture(image, place.told))
            for (place, image), name in zip(drawn, names, strict=True)
            if image is not None
        ]
    return f"<h3>{escape(finding.text)}</h3>{grid(*cells)}" if cells else ""


def _splits(inspection: Inspection) -> str:
    splits = inspection.splits

    def span(values: np.ndarray) -> str:
        least, median, most = (int(f(values)) if len(values) else 0 for f in (np.min, np.median, np.max))
        return f"{least}" if least == most else f"{median} ({least} to {most})"

    rows = [
        ("images", [f"{len(split.sizes):,}" for split in splits]),
        ("of them without objects", [f"{int((split.counts == 0).sum()):,}" for split in splits]),
        ("objects", [f"{len(split.labels):,}" for split in splits]),
        ("objects in an image", [span(split.counts) for split in splits]),
        ("width in pixels", [span(split.sizes[:, 0]) for split in splits]),
        ("height in pixels", [span(split.sizes[:, 1]) for split in splits]),
    ]
    told = table(("", *(split.name for split in splits)), [(name, *cells) for name, cells in rows])
    return told + '<p class="note">Of several values the median, then the least and the greatest.</p>'


def _classes(inspection: Inspection) -> list[str]:
    per_class, splits = inspection.per_class(), inspection.splits
    totals = {name: sum(objects for objects, _ in counts.values()) for name, counts in per_class.items()}
    labels = np.concatenate([split.labels for split in splits])
    shorter = np.concatenate([split.sides.min(1, initial=np.inf) for split in splits])
    longer = np.concatenate([split.sides.max(1, initial=0) for split in splits])
    head = ["class"]
    for split in splits:
        head += [f"{split.name}: objects", "images"]
    head += [f"below {SMALLEST} px", "median side"]
    rows = []
    ranked = sorted(totals, key=lambda name: -totals[name])
    for name in ranked:
        counts, own = per_class[name], labels == inspection.class_names.index(name)
        cells = [f"{count:,}" for split in splits for count in counts[split.name]]
        below = side = "\N{EN DASH}"
        if own.any():
            below = f"{(shorter[own] < SMALLEST).mean():.0%}"
            side = f"{np.median(shorter[own]):.0f} x {np.median(longer[own]):.0f}"
        rows.append((name, *cells, below, side))
    most = max(totals.values(), default=0) or 1
    parts = [long_table(head, rows, [totals[name] / most for name in ranked])]
    if len(totals) > BARS:
        return parts
    chart = bars("Objects", [(name, float(totals[name]), f"{totals[name]:,}") for name in ranked])
    return [grid(chart), *parts]


def _charts(inspection: Inspection) -> list[str]:
    splits, side = inspection.splits, inspection.image_size

    def chart(title: str, labels: Sequence[str], edges: Sequence[float], values: list[np.ndarray], unit: str) -> str:
        columns = [
            (split.name, _shares(v, edges), color) for split, v, color in zip(splits, values, LINE_COLORS, strict=False)
        ]
        return column_chart(title, labels, columns, ylabel=f"% of {unit}")

    rotated = any(split.boxes.shape[1] == 5 for split in splits)
    side_labels = (f"<{SIDES[0]}", *map(str, SIDES[:-1]), f"≥{SIDES[-1]}")
    crowd_labels = ("0", *(str(a) if b == a + 1 else f"{a} to {b - 1}" for a, b in itertools.pairwise(CROWDS)))
    sizes = Counter(tuple(size) for split in splits for size in split.sizes.tolist() if size[0])
    common = [(f"{w}x{h}", float(count), f"{count:,}") for (w, h), count in sizes.most_common(BARS // 2)]
    rest = sum(sizes.values()) - sum(int(count) for _, count, _ in common)
    if rest:
        common.append((f"{len(sizes) - len(common):,} others", float(rest), f"{rest:,}"))
    return [
        chart(
            f"Shorter side of the objects in pixels at {side} px",
            side_labels,
            SIDES,
            [split.sides.min(1, initial=np.inf) for split in splits],
            "objects",
        ),
        chart(
            f"Longer side of the objects in pixels at {side} px",
            side_labels,
            SIDES,
            [split.sides.max(1, initial=0) for split in splits],
            "objects",
        ),
        chart(
            "Longer side by shorter side" if rotated else "Width by height of the objects",
            RATIO_LABELS[4:] if rotated else RATIO_LABELS,
            RATIOS[4:] if rotated else RATIOS,
            [aspect_ratios(split) for split in splits],
            "objects",
        ),
        chart(
            "Objects in an image",
            (*crowd_labels, f"≥{CROWDS[-1]}"),
            CROWDS,
            [split.counts.astype(np.float64) for split in splits],
            "images",
        ),
        bars("Sizes of the images", common),
    ]


def _shares(values: np.ndarray, edges: Sequence[float]) -> list[float]:
    """Per cent of the values below the first edge, from one to the next, and from the last on."""
    counts = np.bincount(np.searchsorted(np.asarray(edges, np.float64), values, side="right"), minlength=len(edges) + 1)
    return (100 * counts / max(len(values), 1)).tolist()


def _input_note(inspection: Inspection) -> str:
    return (
        f"Objects are measured where the network sees them: in images resized to fit {inspection.image_size} x "
        f"{inspection.image_size} px. A column goes from its number to the next one's."
    )


def _samples(inspection: Inspection, s: int, count: int) -> str:
    split = inspection.splits[s]
    readable = [i for i in range(len(split.sizes)) if i not in split.scan.faults]
    chosen = [readable[i] for i in np.linspace(0, len(readable) - 1, min(count, len(readable))).astype(int)]
    cells = []
    for i in chosen:
        image = _drawn(inspection, Place(s, i, ""))
        if image is not None:
            cells.append(pictures(split.file(i), picture(image, counted(int(split.counts[i]), "object"))))
    return section(f"Images of {split.name}", grid(*cells))


def _drawn(inspection: Inspection, place: Place) -> np.ndarray | None:
    """The image with its objects, or the part of it around some of them; None where it cannot be read any more."""
    split = inspection.splits[place.split]
    try:
        sample = split.dataset.load(place.index)
    except UserError:
        return None
    if Path(sample.path) != split.path(place.index):  # another, which serves in training for an unreadable one
        return None
    names = inspection.class_names
    image, x, y = sample.image, 0, 0
    if place.objects is None:
        boxes, masks = sample.boxes, sample.masks
        label_of = {name: i for i, name in enumerate(names)}
        labels = np.array([label_of[split.dataset.class_names[label]] for label in sample.labels.tolist()], np.int64)
    else:
        chosen = split.starts[place.index] + np.array(place.objects, np.int64)
        boxes, labels, masks = split.boxes[chosen], split.labels[chosen], None
        x, y, right, bottom = _window(boxes, image.shape[1], image.shape[0])
        image = image[y:bottom, x:right]
    scale = PICTURE_SIDE / max(image.shape[:2])
    image = resized(image, scale)
    boxes = np.array(boxes, np.float32)
    boxes[:, : 2 if boxes.shape[1] == 5 else 4] -= [x, y] * (1 if boxes.shape[1] == 5 else 2)
    boxes[:, :4] *= scale
    masks = masks and masks.resized((scale, scale)).seen_through((0, 0, image.shape[1], image.shape[0]))
    return draw_detections(image, boxes, labels, None, names, masks=masks)


def _window(boxes: np.ndarray, width: int, height: int) -> tuple[int, int, int, int]:
    """A part of the image, x0, y0, x1, y1, in which the smallest of the boxes can be seen."""
    if boxes.shape[1] == 5:
        corners = boxes_to_quads(boxes.astype(np.float64)).reshape(-1, 4, 2)
        boxes = np.concatenate([corners.min(1), corners.max(1)], 1)
    sides = boxes[:, 2:] - boxes[:, :2]
    smallest = int(sides.prod(1).argmin())
    side = int(max(6 * sides[smallest].max(), LEAST_WINDOW))
    x, y = (boxes[smallest, :2] + boxes[smallest, 2:]).tolist()
    left, top = (int(np.clip(at / 2 - side / 2, 0, max(most - side, 0))) for at, most in ((x, width), (y, height)))
    return left, top, min(left + side, width), min(top + side, height)
