"""Rotated detection datasets, from any format, and DOTA's Task 1 submission files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rtmdet_fast.data.annotation_file import FARTHEST, is_numbers
from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.data.source import Source
from rtmdet_fast.geometry.rotated import boxes_to_quads, edges_cross, min_area_boxes, quads_to_boxes, regularize


class GroundTruth(NamedTuple):
    boxes: np.ndarray
    """[m, 5] float32, see rotated.py."""
    labels: np.ndarray
    """[m] int64."""
    difficult: np.ndarray
    """[m] bool: neither to be found nor wrong to find."""


class DotaDataset(CocoDataset):
    """The images of a folder of DOTA text files in order of their names, of a COCO-style JSON file in its order, or of
    sources of any format one after the other.

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
        annotations: str | Path | Sequence[Source],
        image_dir: str | Path | None = None,
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
                the same 5 or of 8 numbers (corners), or a polygon as `segmentation`, looked for in this order. Or
                sources of any format (`find_sources`), whose classes are merged by name.
            image_dir: of a folder or file the folder of the images (png, jpg, bmp, tif, webp, ppm, pgm).
            skip_bad: leave out, and count in `skipped`, what is otherwise an error, malformed lines for instance.
            training: keep only images with at least one box, whose sides are `min_size` pixels or more.
            keep_empty: in training, keep those without a box too.
            class_names: the classes and their order, of a model for instance; others of the files are left out.
            match_by_position: of the classes of a JSON file, as in CocoDataset.

        Raises UserError, which names the file and line, or entry, at fault.
        """
        self.crossing_count = 0
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

    def _take(self, indices: Sequence[int]) -> None:
        self.__dict__.pop("_truth", None)
        super()._take(indices)
        self.image_names = tuple(Path(name).stem for name in self.files)

    def ground_truth(self, index: int) -> GroundTruth:
        """All boxes of an image with area, for evaluation; not of a training=True dataset."""
        return self._truth[index]

    @cached_property
    def _truth(self) -> list[GroundTruth]:
        label_of = {category: label for label, category in enumerate(self.category_ids) if category >= 0}
        rows: dict[int, list[tuple[list[float], int, bool]]] = {ident: [] for ident in self.image_ids}
        for a in self.content["annotations"]:
            if a["category_id"] in label_of and _has_area(a["rbox"]):
                rows[a["image_id"]].append((a["rbox"], label_of[a["category_id"]], self._is_apart(a)))
        return [
            GroundTruth(
                np.array([box for box, _, _ in found], np.float32).reshape(-1, 5),
                np.array([label for _, label, _ in found], np.int64),
                np.array([difficult for _, _, difficult in found], bool),
            )
            for found in rows.values()
        ]

    def _source(self, annotations: Path, image_dir: Path) -> Source:
        text = annotations.is_dir()
        return Source(format="dota" if text else "coco", annotations=annotations, images=image_dir)

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
            self.crossing_count += int(edges_cross(quads).sum())
        for i, shape in enumerate(shapes):
            if len(shape) not in (5, 8):
                boxes[i] = polygon_box(shape)
        quads = boxes_to_quads(boxes)
        low, high = quads.reshape(-1, 4, 2).min(1), quads.reshape(-1, 4, 2).max(1)
        around = np.concatenate([low, high - low], 1)
        made = []
        for a, shape, box, bbox, quad in zip(
            annotations, shapes, boxes.tolist(), around.tolist(), quads.tolist(), strict=True
        ):
            difficult = self._is_apart(a)
            a = {**a, "rbox": box, "bbox": bbox}
            if self.training:
                if difficult:
                    self._skip(f"annotation {a.get('id')}", "box cut by a split, or to be ignored")
            else:  # as to_coco needs them
                crowd = int(a["iscrowd"] or a["ignore"])
                a |= {"iscrowd": crowd, "given": shape, "segmentation": [quad], "area": box[2] * box[3]}
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


def polygon_box(polygon: list[float]) -> np.ndarray:
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
