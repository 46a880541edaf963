"""Rotated detection datasets: DOTA text files or COCO-style JSON, and DOTA's Task 1 submission files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rtmdet_fast.class_names import DOTA_CLASSES, class_name
from rtmdet_fast.data.annotation_file import FARTHEST, LEVELS, is_numbers, read_flag, read_json
from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.errors import UserError, shown
from rtmdet_fast.geometry.rotated import boxes_to_quads, edges_cross, min_area_boxes, quads_to_boxes, regularize
from rtmdet_fast.images import IMAGE_SUFFIXES, read_size

Report = Callable[[str, str, object], None]  # what, the reason it is bad, detail


class Label(NamedTuple):
    """A line of a DOTA text file."""

    line: int
    quad: list[float]
    """x1 y1 … x4 y4, pixels."""
    name: str
    difficult: int


class GroundTruth(NamedTuple):
    boxes: np.ndarray
    """[m, 5] float32, see rotated.py."""
    labels: np.ndarray
    """[m] int64."""
    difficult: np.ndarray
    """[m] bool: neither to be found nor wrong to find."""


class DotaDataset(CocoDataset):
    """The images of a folder of DOTA text files in order of their names, or of a COCO-style JSON file in its order.

    As CocoDataset, with boxes [n, 5] of the form le90 (see rotated.py), which are not clipped at the image's edges.
    Difficult boxes (`difficult` above 0 in the text; `difficult`, `ignore` or `iscrowd` in JSON) are no part of the
    samples; `ground_truth` has them. In training, as in the published recipe, difficult 1 is no difference; what a
    split cut off (2), `ignore` and `iscrowd` are left out.

    Attributes:
        class_names: where not given, those of the text files in the order of DOTA-v1.0 if they are all among its 15
            classes, else by name; or the JSON's categories in its order
        image_names: the names of the images by index, without folder and suffix, as submissions and patches have them
        crossing_count: quadrilaterals whose edges cross; the smallest rectangle around the corners stands for these too
    """

    box_dim = 5

    def __init__(
        self,
        annotations: str | Path,
        image_dir: str | Path,
        *,
        skip_bad: bool = False,
        training: bool = False,
        keep_empty: bool = False,
        min_size: int = 8,
        class_names: Sequence[str] | None = None,
        match_by_position: bool = False,
    ) -> None:
        """Reads and checks the annotations; images are decoded by `load`.

        Args:
            annotations: a folder of text files, one for each image and named after it, with lines
                `x1 y1 x2 y2 x3 y3 x4 y4 class difficult`; the header lines (imagesource, gsd) and the last field may
                be missing. Or a JSON file, whose annotations have one of `rbox` (cx, cy, w, h, radians), `bbox` of
                the same 5 or of 8 numbers (corners), or a polygon as `segmentation`, looked for in this order.
            image_dir: the folder of the images (png, jpg, bmp, tif, webp, ppm, pgm).
            skip_bad: leave out, and count in `skipped`, what is otherwise an error, malformed lines for instance.
            training: keep only images with at least one box, whose sides are `min_size` pixels or more.
            keep_empty: in training, keep those without a box too.
            class_names: the classes and their order, of a model for instance; others of the files are left out.
            match_by_position: of the classes of a JSON file, as in CocoDataset.

        Raises UserError, which names the file and line, or entry, at fault.
        """
        self.crossing_count = 0
        self._wanted = [class_name(name) for name in class_names or ()]
        super().__init__(
            annotations,
            image_dir,
            skip_bad=skip_bad,
            training=training,
            keep_empty=keep_empty,
            min_size=min_size,
            class_names=class_names,
            match_by_position=match_by_position,
        )
        self.image_names = tuple(Path(name).stem for name in self.files)

    def ground_truth(self, index: int) -> GroundTruth:
        """All boxes of an image with area, for evaluation; not of a training=True dataset."""
        return self._truth[index]

    @cached_property
    def _truth(self) -> list[GroundTruth]:
        if self._content is None:
            raise RuntimeError("made with training=True: make one without it to evaluate")
        label_of = {category: label for label, category in enumerate(self.category_ids) if category >= 0}
        rows: dict[int, list[tuple[list[float], int, bool]]] = {ident: [] for ident in self.image_ids}
        for a in self._content["annotations"]:
            if a["category_id"] in label_of and _has_area(a["rbox"]):
                rows[a["image_id"]].append((a["rbox"], label_of[a["category_id"]], a["ignore"]))
        return [
            GroundTruth(
                np.array([box for box, _, _ in found], np.float32).reshape(-1, 5),
                np.array([label for _, label, _ in found], np.int64),
                np.array([difficult for _, _, difficult in found], bool),
            )
            for found in rows.values()
        ]

    def _read_content(self) -> dict[str, Any]:
        if not self.annotation_path.is_dir():
            return read_json(self.annotation_path)
        label_files = sorted(self.annotation_path.glob("*.txt"))
        if not label_files:
            raise UserError(f"{self.annotation_path}: holds no label files (*.txt)")
        files = find_images(self.image_dir)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for path in label_files:
            found = files.pop(path.stem, [])
            if len(found) > 1:
                self._bad(path.name, "several images of this name", ", ".join(f.name for f in found))
                continue
            try:
                labels = read_labels(path, self._bad)
            except UserError as error:
                if not self.skip_bad:
                    raise
                self._bad(path.name, "unreadable label file", str(error))
                continue
            name = found[0].name if found else f"{path.stem}.png"  # which is then reported as missing
            width, height = read_size(found[0]) if found else (0, 0)
            ident = len(images) + 1
            images.append({"id": ident, "file_name": name, "width": width, "height": height})
            annotations += [
                {
                    "id": f"{path.name}:{label.line}",
                    "image_id": ident,
                    "category_id": label.name,
                    "bbox": label.quad,
                    "difficult": min(label.difficult, 2),
                }
                for label in labels
            ]
        for rest in files.values():
            self._skip(rest[0].name, "image without a label file")
        names = {a["category_id"] for a in annotations}
        if self._wanted and (not names or names & set(self._wanted)):
            # a small part of a data set may lack some classes: their ids are the same in all parts
            order = [*self._wanted, *sorted(names - set(self._wanted))]
        elif names <= set(DOTA_CLASSES):
            order = [name for name in DOTA_CLASSES if name in names]
        else:
            order = sorted(names)
        ids = {name: i for i, name in enumerate(order, start=1)}
        for a in annotations:
            a["category_id"] = ids[a["category_id"]]
        return {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": i, "name": name} for name, i in ids.items()],
        }

    def _box_fault(self, entry: dict[str, Any]) -> tuple[str, object] | None:
        numbers = _shape_of(entry)
        if numbers is None:
            detail = {key: entry.get(key) for key in ("rbox", "bbox", "segmentation")}
            return "neither rbox, a bbox of 5 or 8 finite numbers nor a polygon", detail
        if max(map(abs, numbers)) > FARTHEST:
            return "coordinates beyond 10,000,000 pixels", numbers
        if len(numbers) == 5 and min(numbers[2:4]) < 0:
            return "box with a negative side", numbers
        if len(numbers) == 5 and abs(numbers[4]) > 2 * math.pi:
            return "angle beyond a full turn, where radians are expected", numbers
        return None

    def _flags(self, entry: dict[str, Any]) -> dict[str, int]:
        """`difficulty` 0, 1, or 2 where it is no object to train on, and `iscrowd`. Raises ValueError, as there."""
        flags = super()._flags(entry)
        level = read_flag(entry, "difficult", LEVELS)
        return {"iscrowd": flags["iscrowd"], "difficulty": 2 if any(flags.values()) else level}

    def _read_annotations(self, entries: list[Any], images: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
        annotations = super()._read_annotations(entries, images)
        shapes = [_shape_of(a) or [] for a in annotations]
        boxes = np.zeros((len(shapes), 5))
        of_length = {n: [i for i, s in enumerate(shapes) if len(s) == n] for n in (5, 8)}
        if five := of_length[5]:
            boxes[five] = regularize(np.array([shapes[i] for i in five], np.float64))
        if eight := of_length[8]:
            quads = np.array([shapes[i] for i in eight], np.float64)
            boxes[eight] = quads_to_boxes(quads)
            self.crossing_count = int(edges_cross(quads).sum())
        for i, shape in enumerate(shapes):
            if len(shape) not in (5, 8):
                boxes[i] = _polygon_box(shape)
        quads = boxes_to_quads(boxes)
        low, high = quads.reshape(-1, 4, 2).min(1), quads.reshape(-1, 4, 2).max(1)
        around = np.concatenate([low, high - low], 1)
        made = []
        for a, box, bbox, quad in zip(annotations, boxes.tolist(), around.tolist(), quads.tolist(), strict=True):
            difficult = a.pop("difficulty") > (1 if self.training else 0)
            a = {**a, "rbox": box, "ignore": difficult, "bbox": bbox}
            if self.training:
                if difficult:
                    self._skip(f"annotation {a.get('id')}", "box cut by a split, or to be ignored")
            else:  # as to_coco needs them
                a |= {"iscrowd": int(difficult), "segmentation": [quad], "area": box[2] * box[3]}
            made.append(a)
        return made

    def _box(self, entry: dict[str, Any], size: tuple[int, int]) -> tuple[float, ...] | str:
        box = entry["rbox"]
        if not _has_area(box):
            return "box without area"
        if box[3] < 1:
            return "box below one pixel"
        x, y, w, h = entry["bbox"]  # around the rotated box
        width, height = size
        if x + w <= 0 or y + h <= 0 or (width and (x >= width or y >= height)):
            return "box outside the image"
        return tuple(box)

    def _within(self, boxes: np.ndarray, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
        return boxes.copy(), np.ones(len(boxes), bool)


def find_images(folder: Path) -> dict[str, list[Path]]:
    """The image files of a folder by name without suffix, sorted."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of images")
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            found.setdefault(path.stem, []).append(path)
    return found


def read_labels(path: Path, bad: Report | None = None) -> list[Label]:
    """The lines of a DOTA text file.

    Malformed lines go to `bad`, which may raise; without it they raise UserError, as a file does that is no text.
    """
    name = shown(str(path))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{name}: cannot read this label file: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{name}: this label file is not UTF-8 text") from None
    labels = []
    for number, line in enumerate(text.split("\n"), start=1):
        fields = line.split()
        if not fields or fields[0].lower().startswith(("imagesource:", "gsd:")):
            continue
        fault = None
        if len(fields) not in (9, 10):
            fault = f"{len(fields)} fields, not x1 y1 x2 y2 x3 y3 x4 y4 class difficult"
        else:
            try:
                quad = [float(field) for field in fields[:8]]
                difficult = int(fields[9]) if len(fields) == 10 else 0
            except ValueError as error:
                fault = str(error)
            else:
                if not all(abs(value) <= FARTHEST for value in quad) or difficult < 0:
                    fault = "a coordinate that is not finite or beyond 10,000,000 pixels, or difficult below 0"
                elif class_name(fields[8]) != fields[8]:
                    fault = "a control character in the name of the class"
        if fault is None:
            labels.append(Label(number, quad, fields[8], difficult))
            continue
        detail = f"{fault}: {line.strip()[:80]!r}"
        if bad is None:
            raise UserError(f"{name}, line {number}: malformed line ({detail})")
        bad(f"{path.name}, line {number}", "malformed line", detail)
    return labels


def write_task1(
    folder: Path,
    class_names: Sequence[str],
    detections: Iterable[tuple[str, np.ndarray, np.ndarray, np.ndarray]],
) -> list[Path]:
    """Writes DOTA's Task 1 submission, Task1_<class>.txt with lines `image score x1 y1 … x4 y4`, also empty ones.

    detections: for each image its name (without suffix), boxes [n, 5], scores [n] and labels [n].
    """
    lines: list[list[str]] = [[] for _ in class_names]
    for name, boxes, scores, labels in detections:
        quads = boxes_to_quads(boxes).tolist()
        for quad, score, label in zip(quads, scores.tolist(), labels.tolist(), strict=True):
            lines[label].append(f"{name} {score:.6f} {' '.join(f'{v:.2f}' for v in quad)}\n")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"Task1_{name}.txt" for name in class_names]
    for path, content in zip(paths, lines, strict=True):
        path.write_text("".join(content), encoding="utf-8", errors="surrogateescape")  # as files may be named
    return paths


def _shape_of(entry: dict[str, Any]) -> list[float] | None:
    """Five numbers of a rotated box or 2 k of a polygon; None where the entry has neither."""
    if "rbox" in entry:
        return entry["rbox"] if is_numbers(entry["rbox"], 5) else None
    bbox, parts = entry.get("bbox"), entry.get("segmentation")
    if is_numbers(bbox, 5) or is_numbers(bbox, 8):
        return bbox
    if not isinstance(parts, list) or not parts:
        return None
    if all(isinstance(p, list) and len(p) % 2 == 0 and len(p) >= 6 and is_numbers(p, len(p)) for p in parts):
        return [value for part in parts for value in part]
    return None


def _polygon_box(polygon: list[float]) -> np.ndarray:
    """The smallest rotated box [5] around a polygon of any length."""
    import cv2

    points = np.array(polygon, np.float64).reshape(-1, 2)
    if (points == points[0]).all():
        return min_area_boxes(points[None])[0]
    hull = cv2.convexHull((points - points.mean(0)).astype(np.float32), returnPoints=False)
    return min_area_boxes(points[hull[:, 0]][None])[0]


def _has_area(box: Sequence[float]) -> bool:
    # rounding leaves this much between points on a line
    return box[3] > 1e-6 * max(1.0, box[2])
