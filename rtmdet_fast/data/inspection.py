"""What a data set holds, before anything is trained on it: images and objects in figures, and what is wrong with them.

Every image is decoded in threads, and of its pixels a digest of 16 bytes is kept, whatever their number.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.errors import UserError, shown
from rtmdet_fast.geometry.rotated import boxes_to_quads
from rtmdet_fast.images import CUT, check_image, decode_image

THREADS = 8  # at most: decoding and hashing leave Python's lock
DIGEST = 16  # bytes

SMALLEST = 8  # pixels of the input: the stride of the finest level, below which an object has no cell of its own
TWICE = 0.95  # IoU from which on two boxes are taken for one object's
BEYOND = 1.0  # pixels by which a box may pass its image's border, as rounding makes it
FEW = 10  # objects to train a class on
COUNTED = 100  # detections of an image that COCO's figures count
PICTURED = 6  # images shown of one finding


class Scan(NamedTuple):
    """What the image files of one split are. n images."""

    sizes: np.ndarray
    """[n, 2] int64 width and height as decoded; 0 where that fails."""
    files: list[bytes]
    """[n] digests of the files; empty of those that cannot be decoded."""
    pixels: list[bytes]
    """[n] digests of sizes and pixels, likewise."""
    faults: dict[int, str]
    """Why images cannot be decoded, by index."""
    cut: list[int]
    """Those that can, although their end is missing."""


@dataclass(frozen=True)
class SplitFacts:
    """Images and objects of one split, as far as they can be read. n images, m objects."""

    name: str
    dataset: CocoDataset
    scan: Scan
    sizes: np.ndarray
    """[n, 2] int64 width and height as decoded, or else as annotated."""
    starts: np.ndarray
    """[n + 1]: the objects of image i are those from starts[i] to starts[i + 1]."""
    boxes: np.ndarray
    """[m, 4] float32 xyxy, not clipped, or [m, 5] rotated, in pixels of the image."""
    labels: np.ndarray
    """[m] int64, indices into the inspection's class_names."""
    sides: np.ndarray
    """[m, 2] float32 width and height at the network's input, as far as the image shows them; of rotated boxes the
    longer side and the shorter."""

    @property
    def counts(self) -> np.ndarray:
        """[n] objects of each image."""
        return np.diff(self.starts)

    @property
    def image_of(self) -> np.ndarray:
        """[m] the image of each object."""
        return np.repeat(np.arange(len(self.sizes)), self.counts)

    def path(self, index: int) -> Path:
        return self.dataset.image_dir / self.dataset.files[index]

    def file(self, index: int) -> str:
        """The image's name, to be shown."""
        return shown(self.dataset.files[index])


@dataclass(frozen=True)
class Place:
    """An image that a finding is about, what is to be told of it, and which of its objects (None: all)."""

    split: int
    index: int
    told: str
    objects: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Finding:
    """Something to know before training."""

    level: Literal["error", "warning", "note"]
    """error: figures or training would be wrong; warning: look at it; note: no defect."""
    text: str
    names: Sequence[str] = ()
    """All that it is about, worst first, as far as there is an order."""
    places: tuple[Place, ...] = ()
    """Some of the images that show it, worst first."""
    paired: bool = False
    """Whether each two of the places belong side by side."""


@dataclass(frozen=True)
class Inspection:
    """What was found."""

    class_names: tuple[str, ...]
    """Those of all splits, in the order of the first."""
    image_size: int
    splits: tuple[SplitFacts, ...]
    duplicates: tuple[tuple[tuple[int, int], ...], ...]
    """Groups of images of the same pixels, each (split, index)."""
    findings: tuple[Finding, ...] = field(default=())
    """Worst first."""

    def per_class(self) -> dict[str, dict[str, tuple[int, int]]]:
        """By class and split: objects, and images that hold one."""
        found: dict[str, dict[str, tuple[int, int]]] = {name: {} for name in self.class_names}
        for split in self.splits:
            counts = class_counts(split.starts, split.labels, len(self.class_names))
            for name, objects, images in zip(self.class_names, *counts, strict=True):
                found[name][split.name] = objects, images
        return found

    def as_json(self) -> dict[str, Any]:
        """All of it in types of JSON, every name of every finding included."""
        per_class = self.per_class()
        splits = {}
        for split in self.splits:
            shorter, longer = split.sides.min(1, initial=np.inf), split.sides.max(1, initial=0)
            small = shorter < SMALLEST
            splits[split.name] = {
                "annotations": str(split.dataset.annotation_path),
                "images": len(split.sizes),
                "images_without_objects": int((split.counts == 0).sum()),
                "unreadable_images": len(split.scan.faults),
                "objects": len(split.labels),
                "objects_per_image": _quantiles(split.counts),
                "width": _quantiles(split.sizes[:, 0]),
                "height": _quantiles(split.sizes[:, 1]),
                "shorter_side_at_input": _quantiles(shorter),
                "longer_side_at_input": _quantiles(longer),
                "aspect_ratio": _quantiles(aspect_ratios(split)),
                f"objects_below_{SMALLEST}_px": int(small.sum()),
                "per_class": {
                    name: {
                        "objects": counts[split.name][0],
                        "images": counts[split.name][1],
                        f"objects_below_{SMALLEST}_px": int((small & (split.labels == label)).sum()),
                    }
                    for label, (name, counts) in enumerate(per_class.items())
                },
                "left_out": {reason: list(what) for reason, what in split.dataset.skipped.items()},
                "noticed": {reason: list(what) for reason, what in split.dataset.noticed.items()},
            }
        return {
            "image_size": self.image_size,
            "classes": list(self.class_names),
            "splits": splits,
            "duplicates": [
                [{"split": self.splits[s].name, "image": self.splits[s].file(i)} for s, i in group]
                for group in self.duplicates
            ],
            "findings": [{"level": f.level, "text": f.text, "names": list(f.names)} for f in self.findings],
        }


def inspect(
    datasets: Mapping[str, CocoDataset], image_size: int, *, nms_iou: float, progress: bool = False
) -> Inspection:
    """Reads every image of the data sets, by split, and looks for what a training would suffer from.

    Args:
        datasets: made with skip_bad=True and without training=True; "train" is what others are held against.
        image_size: side of the network's input in pixels, which images are resized to fit.
        nms_iou: above which NMS takes two boxes of a class for one object.
    """
    scans = scan_images(list(datasets.values()), progress=progress)
    names = tuple(dict.fromkeys(name for dataset in datasets.values() for name in dataset.class_names))
    splits = tuple(
        _facts(name, dataset, scan, names, image_size)
        for (name, dataset), scan in zip(datasets.items(), scans, strict=True)
    )
    duplicates = tuple(find_duplicates(scans))
    inspection = Inspection(names, image_size, splits, duplicates)
    findings = [
        *_unreadable(splits),
        *_leaks(inspection),
        *_unknown_classes(inspection),
        *_told(splits),
        *_other_sizes(splits),
        *_duplicates(inspection),
        *_cut(splits),
        *_rare_classes(inspection),
        *_object_findings(inspection, nms_iou, progress),
        *_empty(splits),
        *_no_validation(splits),
    ]
    order = ("error", "warning", "note")
    findings.sort(key=lambda finding: order.index(finding.level))
    return Inspection(names, image_size, splits, duplicates, tuple(findings))


def scan_images(datasets: Sequence[CocoDataset], *, progress: bool = False) -> list[Scan]:
    """Reads and decodes every image once; see Scan."""
    import cv2  # noqa: F401
    from PIL import Image

    Image.init()  # all imports here, before the threads
    waiting = ((d, i) for d, dataset in enumerate(datasets) for i in range(len(dataset)))
    scans = [Scan(np.zeros((n, 2), np.int64), [b""] * n, [b""] * n, {}, []) for n in map(len, datasets)]
    total, done, lock, stop = sum(map(len, datasets)), 0, threading.Lock(), threading.Event()

    def work() -> None:
        nonlocal done
        while not stop.is_set():
            with lock:
                d, i = next(waiting, (-1, 0))
            if d < 0:
                return
            scan, path = scans[d], datasets[d].image_dir / datasets[d].files[i]
            try:
                odd = check_image(path)
                content = path.read_bytes()
                image = decode_image(content, path, datasets[d].annotated_size(i))
                scan.files[i] = _digest(content)
            except (UserError, OSError) as error:
                scan.faults[i] = str(error)
            else:
                scan.sizes[i] = image.shape[1::-1]
                scan.pixels[i] = _digest(repr(image.shape).encode(), image)
                if CUT in odd:
                    scan.cut.append(i)
                with lock:
                    for oddity in odd:
                        if oddity != CUT:
                            datasets[d].noticed.setdefault(oddity, []).append(shown(datasets[d].files[i]))
            with lock:
                done += 1

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(THREADS, os.cpu_count() or 1, total))]
    for thread in threads:
        thread.start()
    try:
        with tqdm(total=total, desc="read images", unit="img", delay=1, disable=not progress, leave=False) as bar:
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.1)
                    bar.update(done - bar.n)
    finally:
        stop.set()
    if done < total:  # its traceback was printed
        raise RuntimeError("a thread that reads images has failed")
    return scans


def _digest(*parts: Any) -> bytes:
    made = hashlib.blake2b(digest_size=DIGEST)
    for part in parts:
        made.update(part)
    return made.digest()


def same_pixels(scans: Sequence[Scan]) -> np.ndarray:
    """[images of all scans] int64: of images of the same pixels the number of the first; unreadable ones are alone."""
    first: dict[bytes, int] = {}
    digests = (digest for scan in scans for digest in scan.pixels)
    return np.array([first.setdefault(digest, i) if digest else i for i, digest in enumerate(digests)], np.int64)


def find_duplicates(scans: Sequence[Scan]) -> list[tuple[tuple[int, int], ...]]:
    """Groups of images of the same pixels, each (scan, index), in order of their first."""
    places = [(s, i) for s, scan in enumerate(scans) for i in range(len(scan.pixels))]
    groups: dict[int, list[tuple[int, int]]] = {}
    numbers = same_pixels(scans)
    repeated = np.bincount(numbers, minlength=1) > 1
    for i in np.flatnonzero(repeated[numbers]).tolist():
        groups.setdefault(int(numbers[i]), []).append(places[i])
    return [tuple(group) for group in groups.values()]


def aspect_ratios(split: SplitFacts) -> np.ndarray:
    """[m] width by height at the input; of rotated boxes the longer side by the shorter."""
    return np.asarray(split.sides[:, 0] / np.maximum(split.sides[:, 1], 1e-6))


def class_counts(starts: np.ndarray, labels: np.ndarray, classes: int) -> tuple[list[int], list[int]]:
    """Of each class its objects, and the images that hold one; starts and labels as `CocoDataset.objects` has them."""
    images = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    holding = np.unique(images * classes + labels) % max(classes, 1)
    return np.bincount(labels, minlength=classes).tolist(), np.bincount(holding, minlength=classes).tolist()


def overlapping(boxes: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pairs of boxes [n, 4] xyxy, or rotated [n, 5], of an IoU above `least`: first, second and IoU, [k] each."""
    rotated = boxes.shape[1] == 5
    around = boxes.astype(np.float64)
    if rotated:
        corners = boxes_to_quads(around).reshape(-1, 4, 2)
        around = np.concatenate([corners.min(1), corners.max(1)], 1)
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    areas = (around[:, 2:] - around[:, :2]).prod(1)
    for start in range(0, len(boxes), 512):  # rows: a crowd of thousands would take gigabytes
        rows = around[start : start + 512, None]
        sides = np.minimum(rows[..., 2:], around[None, :, 2:]) - np.maximum(rows[..., :2], around[None, :, :2])
        shared = sides.clip(0).prod(2)
        iou = shared / np.maximum(areas[start : start + 512, None] + areas - shared, 1e-12)
        first, second = np.nonzero((shared > 0) if rotated else (iou > least))
        later = second > first + start
        found.append((first[later] + start, second[later], iou[first[later], second[later]]))
    first, second, iou = (np.concatenate(parts) for parts in zip(*found, strict=True))
    if rotated and len(first):
        import torch

        from rtmdet_fast.ops import box_iou_rotated

        exact = torch.from_numpy(boxes.astype(np.float64))
        iou = box_iou_rotated(exact[first], exact[second], aligned=True).numpy()
        kept = iou > least
        first, second, iou = first[kept], second[kept], iou[kept]
    return first, second, iou


def _facts(name: str, dataset: CocoDataset, scan: Scan, class_names: Sequence[str], image_size: int) -> SplitFacts:
    annotated = [dataset.annotated_size(i) or (0, 0) for i in range(len(dataset))]
    sizes = np.where(scan.sizes > 0, scan.sizes, np.array(annotated, np.int64).reshape(-1, 2))
    starts, boxes, labels = dataset.objects()
    numbers = {name: i for i, name in enumerate(class_names)}
    labels = np.array([numbers[name] for name in dataset.class_names], np.int64)[labels]
    image_of = np.repeat(np.arange(len(sizes)), np.diff(starts))
    if boxes.shape[1] == 4:
        ends = np.tile(np.where(sizes > 0, sizes, np.inf), 2)[image_of]
        seen = np.clip(boxes, 0, ends)
        sides = seen[:, 2:] - seen[:, :2]
    else:
        sides = boxes[:, 2:4]
    scale = image_size / np.maximum(sizes.max(1, initial=1), 1)
    return SplitFacts(
        name, dataset, scan, sizes, starts, boxes, labels, (sides * scale[image_of, None]).astype(np.float32)
    )


def _quantiles(values: np.ndarray) -> dict[str, float]:
    shares = {"least": 0, "p5": 5, "median": 50, "p95": 95, "most": 100}
    return {name: round(float(np.percentile(values, at)), 3) for name, at in shares.items()} if len(values) else {}


def counted(count: int, what: str) -> str:
    """A number and what it is of, as one or as several: 1 image, 2 boxes."""
    return f"{count:,} {what}{'' if count == 1 else 'es' if what[-1] in 'sx' else 's'}"


def _worst(scores: np.ndarray) -> list[int]:
    """The indices of what is above 0, the greatest first."""
    order = np.argsort(-scores, kind="stable")
    return order[scores[order] > 0].tolist()


def _unreadable(splits: Sequence[SplitFacts]) -> list[Finding]:
    return [
        Finding(
            "error",
            f"{counted(len(split.scan.faults), 'image')} of {split.name} cannot be read",
            [f"{split.file(i)} ({fault.rpartition(': ')[2]})" for i, fault in sorted(split.scan.faults.items())],
        )
        for split in splits
        if split.scan.faults
    ]


def _leaks(inspection: Inspection) -> list[Finding]:
    """Images that several splits have."""
    splits, found = inspection.splits, []
    for s in range(1, len(splits)):
        for other in range(s):
            groups = [
                ([p for p in group if p[0] == other], [p for p in group if p[0] == s])
                for group in inspection.duplicates
            ]
            groups = [group for group in groups if all(group)]
            if not groups:
                continue
            count = sum(len(ours) for _, ours in groups)
            pairs = [(ours[0], theirs[0]) for theirs, ours in groups]
            text = (
                f"{counted(count, 'image')} of {splits[s].name} ({count / len(splits[s].sizes):.1%}) "
                f"{'is' if count == 1 else 'are'} in {splits[other].name} too, pixel by pixel"
            )
            found.append(_pairs_of(inspection, "error", text, pairs))
    return found


def _duplicates(inspection: Inspection) -> list[Finding]:
    """Images that one split has several times, and copies with other objects."""
    splits, found = inspection.splits, []
    for s, split in enumerate(splits):
        groups = [[p for p in group if p[0] == s] for group in inspection.duplicates]
        groups = [group for group in groups if len(group) > 1]
        if groups:
            files = sum(split.scan.files[i] == split.scan.files[group[0][1]] for group in groups for _, i in group[1:])
            pairs = [(group[0], copy) for group in groups for copy in group[1:]]
            text = (
                f"{counted(len(pairs), 'image')} of {split.name} {'is a copy' if len(pairs) == 1 else 'are copies'} of "
                f"others, pixel by pixel ({files} of them as files too)"
            )
            found.append(_pairs_of(inspection, "warning", text, pairs))
    pairs = [
        (group[0], copy)
        for group in inspection.duplicates
        for copy in group[1:]
        if _objects_of(splits, group[0]) != _objects_of(splits, copy)
    ]
    if pairs:
        text = f"{counted(len(pairs), 'image')} with other objects than an image of the same pixels has"
        found.append(_pairs_of(inspection, "warning", text, pairs))
    return found


def _objects_of(splits: Sequence[SplitFacts], place: tuple[int, int]) -> list[tuple[float, ...]]:
    """Labels and boxes to the pixel, sorted."""
    split, i = splits[place[0]], place[1]
    part = slice(split.starts[i], split.starts[i + 1])
    boxes = np.rint(split.boxes[part]).tolist()
    return sorted((label, *box) for label, box in zip(split.labels[part].tolist(), boxes, strict=True))


def _pairs_of(
    inspection: Inspection, level: Literal["error", "warning"], text: str, pairs: Sequence[tuple[Any, Any]]
) -> Finding:
    splits = inspection.splits

    def name(place: tuple[int, int]) -> str:
        return f"{splits[place[0]].name}: {splits[place[0]].file(place[1])}"

    shown_pairs = pairs[: PICTURED // 2]
    return Finding(
        level,
        text,
        [f"{name(a)} = {name(b)}" for a, b in pairs],
        tuple(
            Place(s, i, f"{splits[s].name}, {counted(int(splits[s].counts[i]), 'object')}")
            for pair in shown_pairs
            for s, i in pair
        ),
        paired=True,
    )


def _unknown_classes(inspection: Inspection) -> list[Finding]:
    names = [split.name for split in inspection.splits]
    if "train" not in names:
        return []
    found, per_class = [], inspection.per_class()
    for other in names:
        unknown = {
            name: counts[other][0] for name, counts in per_class.items() if counts[other][0] and not counts["train"][0]
        }
        if unknown:
            text = f"{counted(len(unknown), 'class')} of {other} without an object in train"
            found.append(
                Finding("error", text, [f"{name} ({counted(count, 'object')})" for name, count in unknown.items()])
            )
    return found


def _rare_classes(inspection: Inspection) -> list[Finding]:
    per_class, splits = inspection.per_class(), inspection.splits
    found: list[Finding] = []

    def tell(level: Literal["warning", "note"], classes: dict[str, int], what: str) -> None:
        if classes:
            text = f"{counted(len(classes), 'class')} {what}"
            ordered = sorted(classes.items(), key=lambda item: item[1])
            found.append(Finding(level, text, [f"{name} ({count})" if count else name for name, count in ordered]))

    first = splits[0].name
    totals = {name: sum(count for count, _ in counts.values()) for name, counts in per_class.items()}
    rare = {name: counts[first][0] for name, counts in per_class.items() if 0 < counts[first][0] < FEW}
    tell("warning", rare, f"of {first} with fewer than {FEW} objects")
    tell("note", {name: 0 for name, total in totals.items() if not total}, "without any object")
    for split in splits[1:]:
        missing = {name: 0 for name, counts in per_class.items() if counts[first][0] and not counts[split.name][0]}
        tell(
            "note",
            missing,
            f"without an object in {split.name}: nothing is measured of {'it' if len(missing) == 1 else 'them'}",
        )
    return found


def _told(splits: Sequence[SplitFacts]) -> list[Finding]:
    """What the readers left out and noticed."""
    found = []
    for split in splits:
        for reason, what in split.dataset.skipped.items():
            found.append(Finding("warning", f"left out of {split.name}: {len(what):,} x {reason}", what))
        for oddity, what in split.dataset.noticed.items():
            found.append(Finding("note", f"in {split.name}: {len(what):,} x {oddity}", what))
        if apart := split.dataset.apart_count:
            text = f"{counted(apart, 'object')} of {split.name} to be ignored (crowds, and by their flags)"
            found.append(Finding("note", f"{text}: counted nowhere here"))
    return found


def _other_sizes(splits: Sequence[SplitFacts]) -> list[Finding]:
    found = []
    for s, split in enumerate(splits):
        names: list[str] = []
        places: list[Place] = []
        for i, size in enumerate(split.scan.sizes.tolist()):
            annotated = split.dataset.annotated_size(i)
            if size[0] and annotated and tuple(size) != annotated:
                told = f"{size[0]}x{size[1]}, annotated {annotated[0]}x{annotated[1]}"
                names.append(f"{split.file(i)} ({told})")
                if len(places) < PICTURED:
                    places.append(Place(s, i, told))
        if names:
            text = f"{counted(len(names), 'image')} of {split.name} of another size than annotated: boxes may be off"
            found.append(Finding("warning", text, names, tuple(places)))
    return found


def _cut(splits: Sequence[SplitFacts]) -> list[Finding]:
    return [
        Finding(
            "warning",
            f"{counted(len(split.scan.cut), 'image file')} of {split.name} without an end: the lower part may be grey",
            [split.file(i) for i in sorted(split.scan.cut)],
            tuple(Place(s, i, "as it is read") for i in sorted(split.scan.cut)[:PICTURED]),
        )
        for s, split in enumerate(splits)
        if split.scan.cut
    ]


def _object_findings(inspection: Inspection, nms_iou: float, progress: bool) -> list[Finding]:
    """What boxes are to their image, to the input and to one another."""
    side = inspection.image_size
    kinds: dict[str, tuple[Literal["warning", "note"], str]] = {
        "twice": ("warning", f"lying on one of the same class (IoU above {TWICE}), as if annotated twice"),
        "classes": ("warning", f"lying on one of another class (IoU above {TWICE})"),
        "beyond": ("warning", "reaching beyond the image, where they are cut"),
        "small": ("note", f"with a side below {SMALLEST} px at {side} px"),
        "hidden": (
            "note",
            f"overlapping one of the same class by an IoU above {nms_iou:g}, of which NMS keeps one",
        ),
    }
    total = sum(len(split.sizes) for split in inspection.splits)
    found: list[Finding] = []
    with tqdm(total=total, desc="compare boxes", unit="img", delay=1, disable=not progress, leave=False) as bar:
        for s, split in enumerate(inspection.splits):
            counts = {kind: np.zeros(len(split.sizes), np.int64) for kind in kinds}
            for i in range(len(split.sizes)):
                for kind, (number, _) in _offenders(split, i, nms_iou).items():
                    counts[kind][i] = number
                bar.update()
            for kind, (level, what) in kinds.items():
                if not (number := int(counts[kind].sum())):
                    continue
                worst = _worst(counts[kind])
                names = [f"{split.file(i)} ({counts[kind][i]})" for i in worst]
                places = tuple(
                    Place(
                        s,
                        i,
                        f"{counts[kind][i]} of {counted(int(split.counts[i]), 'object')}",
                        tuple(_offenders(split, i, nms_iou)[kind][1].tolist()),
                    )
                    for i in worst[:PICTURED]
                )
                share = f"{number / len(split.labels):.1%}"
                found.append(
                    Finding(level, f"{counted(number, 'object')} of {split.name} ({share}) {what}", names, places)
                )
            crowded = _worst(np.where(split.counts > COUNTED, split.counts, 0))
            if crowded:
                names = [f"{split.file(i)} ({split.counts[i]})" for i in crowded]
                what = f"with more than {COUNTED} objects, as many detections as COCO's figures count"
                text = f"{counted(len(crowded), 'image')} of {split.name} {what}"
                places = tuple(Place(s, i, counted(int(split.counts[i]), "object")) for i in crowded[:PICTURED])
                found.append(Finding("note", text, names, places))
    return found


def _offenders(split: SplitFacts, i: int, nms_iou: float) -> dict[str, tuple[int, np.ndarray]]:
    """How many objects of an image are of each kind, and which ones, counted from its first, show it."""
    part = slice(split.starts[i], split.starts[i + 1])
    boxes, labels, sides = split.boxes[part], split.labels[part], split.sides[part]
    kinds = {"small": sides.min(1, initial=np.inf) < SMALLEST}
    width, height = split.sizes[i].tolist()
    if boxes.shape[1] == 4 and width:
        kinds["beyond"] = ((boxes[:, :2] < -BEYOND) | (boxes[:, 2:] > np.array([width, height]) + BEYOND)).any(1)
    found = {kind: (int(chosen.sum()), np.flatnonzero(chosen)) for kind, chosen in kinds.items()}
    if len(boxes) > 1:
        first, second, iou = overlapping(boxes, min(nms_iou, TWICE))
        same = labels[first] == labels[second]
        pairs = {"twice": same & (iou > TWICE), "classes": ~same & (iou > TWICE), "hidden": same & (iou > nms_iou)}
        for kind, chosen in pairs.items():
            both = np.unique(np.concatenate([first[chosen], second[chosen]]))
            found[kind] = len(np.unique(second[chosen])), both
    return found


def _empty(splits: Sequence[SplitFacts]) -> list[Finding]:
    found = []
    for s, split in enumerate(splits):
        empty = np.flatnonzero(split.counts == 0).tolist()
        if empty:
            text = f"{counted(len(empty), 'image')} of {split.name} without objects"
            text += ": RT-DETR trains on them, RTMDet does not" if split.name in ("train", "all") else ""
            places = tuple(Place(s, i, "0 objects") for i in empty if i not in split.scan.faults)[:PICTURED]
            found.append(Finding("note", text, [split.file(i) for i in empty], places))
    return found


def _no_validation(splits: Sequence[SplitFacts]) -> list[Finding]:
    names = [split.name for split in splits]
    if "val" in names:
        return []
    return [
        Finding("note", f"there are no validation images ({', '.join(names)}): --split 0.8 --out FOLDER makes some")
    ]
