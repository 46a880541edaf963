"""What a prediction returns: the detections of one image, in pixels of that image."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rtmdet_fast.class_names import find_classes
from rtmdet_fast.errors import UserError
from rtmdet_fast.geometry.rotated import boxes_to_quads
from rtmdet_fast.inference.masks import PredictedMasks


@dataclass(eq=False, repr=False)
class Results:
    """The detections of one image, best score first.

    Attributes:
        image: [H, W, 3] uint8 BGR, or None where it was not kept
        boxes: [n, 4] float32 xyxy in pixels of the original image, or rotated [n, 5] (cx, cy, w, h, angle): w >= h, and
            the angle in radians in [-pi/2, pi/2), turning x towards y (clockwise on a screen)
        scores: [n] float32
        labels: [n] int64, indices into `names`
        names: the class names of the model (those of the detections are `label_names`)
        path: the file the image came from, or None
        shape: (height, width) of the original image
        predicted_masks: of a model with masks; `masks`, `rles` and `polygons` work them out
        track_ids: [n] int64 where a video was tracked: which object each is, -1 while that is not known
    """

    image: np.ndarray | None
    boxes: Tensor
    scores: Tensor
    labels: Tensor
    names: tuple[str, ...]
    path: str | None = None
    shape: tuple[int, int] = (0, 0)
    predicted_masks: PredictedMasks | None = None
    track_ids: Tensor | None = None

    def __post_init__(self) -> None:
        self.names = tuple(self.names)
        if self.image is not None:
            self.shape = (self.image.shape[0], self.image.shape[1])

    @property
    def label_names(self) -> list[str]:
        """The class name of each detection."""
        return [self.names[label] for label in self.labels.tolist()]

    @property
    def masks(self) -> Tensor:
        """[n, H, W] bool in pixels of the original image; made anew by every call."""
        return self._with_masks().to_bool()

    def rles(self) -> list[dict[str, Any]]:
        """The masks as COCO's compressed RLE: size [H, W] and counts, a str."""
        return self._with_masks().rles()

    def polygons(self) -> list[list[list[float]]]:
        """The masks as COCO polygons, [x, y, x, y, …] each; several where a mask has parts or holes."""
        return self._with_masks().polygons()

    def _with_masks(self) -> PredictedMasks:
        if self.predicted_masks is None:
            raise UserError("these results hold no masks: their model detects boxes only")
        return self.predicted_masks

    def corners(self) -> np.ndarray:
        """The corners of the boxes, [n, 4, 2] float64 pixels, clockwise on a screen."""
        boxes = self.boxes.double().numpy()
        if boxes.shape[1] == 5:
            return boxes_to_quads(boxes).reshape(-1, 4, 2)
        return boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2)

    def xyxy(self) -> np.ndarray:
        """[n, 4] float64 pixels: the boxes, of rotated ones the upright boxes around them."""
        corners = self.corners()
        return np.concatenate([corners.min(1), corners.max(1)], 1)

    def only(self, *classes: str) -> Results:
        """The detections of the classes named; UserError, with the nearest name, for one that the model lacks."""
        wanted = torch.tensor(find_classes(classes, self.names), dtype=torch.int64)
        return self[torch.isin(self.labels, wanted)]

    def crop(self) -> list[np.ndarray]:
        """What the image shows in each box, [h, w, 3] uint8 BGR; of rotated boxes turned so that they lie upright.

        Upright boxes are widened to whole pixels and cut to the image, rotated ones black where they leave it.
        """
        image = self._with_image()
        if self.boxes.shape[1] == 5:
            return [_upright(image, corners) for corners in self.corners()]
        height, width = self.shape
        crops = []
        for x1, y1, x2, y2 in self.xyxy():
            left, top = int(min(max(x1, 0), width - 1)), int(min(max(y1, 0), height - 1))
            right, bottom = (min(int(np.ceil(max(end, 0))), side) for end, side in ((x2, width), (y2, height)))
            crops.append(image[top : max(bottom, top + 1), left : max(right, left + 1)].copy())
        return crops

    def plot(self, line_width: int | None = None) -> np.ndarray:
        """A copy of the image, [H, W, 3] uint8 BGR, with masks, boxes, names, scores and track ids drawn."""
        from rtmdet_fast.inference.drawing import draw_detections

        return draw_detections(
            self._with_image(),
            self.boxes,
            self.labels,
            self.scores,
            self.names,
            line_width,
            self.predicted_masks,
            track_ids=self.track_ids,
        )

    def show(self) -> None:
        """The drawn picture in the notebook, or in a window until a key is pressed or it is closed.

        UserError where there is no display.
        """
        from rtmdet_fast.inference.window import Window, in_notebook

        if in_notebook():
            from IPython.display import display

            display(self)
            return
        with Window(Path(self.path).name if self.path else "rtmdet_fast") as window:
            window.show(self.plot(), wait=True)

    def _repr_png_(self) -> bytes | None:
        """What a notebook shows; the text where no image was kept."""
        import cv2

        return None if self.image is None else cv2.imencode(".png", self.plot())[1].tobytes()

    def _with_image(self) -> np.ndarray:
        if self.image is None:
            raise UserError("these results hold no image")
        return self.image

    def save(self, path: str | Path) -> Path:
        """Draws the detections and writes the picture; its folder is made where it is missing."""
        from rtmdet_fast.images import write_image

        return write_image(path, self.plot())

    def to_coco(self, image_id: int = 0, category_ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """COCO result entries with plain numbers; `bbox` is [x, y, width, height], `segmentation` an RLE.

        Of rotated boxes that is the upright box around them; they themselves are `rbox`, and their corners the
        `segmentation`. What was tracked has its `track_id`.

        Args:
            image_id: of each entry.
            category_ids: the data set's category id of each class index; the index itself where it is not given.
        """
        low, high = np.split(self.xyxy(), 2, 1)
        boxes = np.concatenate([low, high - low], 1).tolist()
        entries: list[dict[str, Any]] = [
            {
                "image_id": image_id,
                "category_id": int(category_ids[label]) if category_ids is not None else label,
                "bbox": box,
                "score": score,
            }
            for box, score, label in zip(boxes, self.scores.tolist(), self.labels.tolist(), strict=True)
        ]
        if self.predicted_masks is not None:
            for entry, rle in zip(entries, self.rles(), strict=True):
                entry["segmentation"] = rle
        if self.boxes.shape[1] == 5:
            for entry, rbox, quad in zip(entries, self.boxes.tolist(), self.corners(), strict=True):
                entry |= {"rbox": rbox, "segmentation": [quad.ravel().tolist()], "area": rbox[2] * rbox[3]}
        if self.track_ids is not None:
            for entry, track_id in zip(entries, self.track_ids.tolist(), strict=True):
                if track_id >= 0:
                    entry["track_id"] = track_id
        return entries

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and text: path, width, height, and for each detection its name, label, score and `box`.

        `box` is [x1, y1, x2, y2]. Rotated boxes have `rbox` [cx, cy, w, h, radians] and `corners` [4][x, y] too, masks
        `mask`, an RLE as COCO writes it, and what was tracked `track_id`, None while that is not known.
        """
        rows: list[dict[str, Any]] = [
            {"name": name, "label": label, "score": score, "box": box}
            for name, label, score, box in zip(
                self.label_names, self.labels.tolist(), self.scores.tolist(), self.xyxy().tolist(), strict=True
            )
        ]
        if self.boxes.shape[1] == 5:
            for row, rbox, corners in zip(rows, self.boxes.tolist(), self.corners().tolist(), strict=True):
                row |= {"rbox": rbox, "corners": corners}
        if self.predicted_masks is not None:
            for row, rle in zip(rows, self.rles(), strict=True):
                row["mask"] = rle
        if self.track_ids is not None:
            for row, track_id in zip(rows, self.track_ids.tolist(), strict=True):
                row["track_id"] = track_id if track_id >= 0 else None
        height, width = self.shape
        return {"path": self.path, "width": width, "height": height, "detections": rows}

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict())

    def to_yolo(self) -> list[str]:
        """A line of YOLO's label files for each detection, in shares of the image: its label, then the box's centre,
        width and height; of rotated boxes the four corners; of masks their outline.

        The parts of a mask, or of one with holes, are joined by seams without width. An empty mask has its box.
        """
        height, width = self.shape
        if self.predicted_masks is not None:
            boxes = self.corners()
            shapes = [
                _joined(parts) if parts else box for parts, box in zip(self.polygons(), boxes, strict=True)
            ]  # of different lengths
            places = [(shape / (width, height)).ravel() for shape in shapes]
        elif self.boxes.shape[1] == 5:
            places = list((self.corners() / (width, height)).reshape(len(self), 8))
        else:
            low, high = np.split(self.xyxy() / (width, height, width, height), 2, 1)
            places = list(np.concatenate([(low + high) / 2, high - low], 1))
        return [
            " ".join([str(label), *(f"{value:.6f}" for value in place)])
            for label, place in zip(self.labels.tolist(), places, strict=True)
        ]

    def to_pandas(self) -> Any:
        """A DataFrame with a row for each detection: name, label, score, x1, y1, x2, y2 in pixels.

        Rotated boxes have cx, cy, w, h, angle (radians) too, and what was tracked track_id, -1 while that is not known.
        UserError where pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise UserError("to_pandas needs pandas: pip install pandas") from None
        columns: dict[str, Any] = {
            "name": self.label_names,
            "label": self.labels.numpy(),
            "score": self.scores.numpy(),
            **dict(zip(("x1", "y1", "x2", "y2"), self.xyxy().T, strict=True)),
        }
        if self.boxes.shape[1] == 5:
            columns |= dict(zip(("cx", "cy", "w", "h", "angle"), self.boxes.numpy().T, strict=True))
        if self.track_ids is not None:
            columns["track_id"] = self.track_ids.numpy()
        return pandas.DataFrame(columns)

    def to_supervision(self) -> Any:
        """`supervision.Detections`, with masks [n, H, W] bool and, of rotated boxes, their corners.

        UserError where supervision is not installed.
        """
        try:
            import supervision
        except ImportError:
            raise UserError("to_supervision needs supervision: pip install supervision") from None
        data: dict[str, Any] = {"class_name": np.array(self.label_names, str)}
        if self.boxes.shape[1] == 5:
            data["xyxyxyxy"] = self.corners().astype(np.float32)  # the name that its annotators look for
        return supervision.Detections(
            xyxy=self.xyxy().astype(np.float32),
            mask=None if self.predicted_masks is None else self.masks.numpy(),
            confidence=self.scores.numpy(),
            class_id=self.labels.numpy(),
            tracker_id=None if self.track_ids is None else self.track_ids.numpy(),
            data=data,
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[Results]:
        """Each detection, as results of one."""
        return (self[i] for i in range(len(self)))

    def __getitem__(self, which: int | slice | Sequence[int] | np.ndarray | Tensor) -> Results:
        """The detections at an index, a slice, indices [k], or where a mask [n] bool holds; of the same image."""
        if isinstance(which, slice):
            which = range(len(self))[which]
        elif np.ndim(which) == 0:
            which = [range(len(self))[which]]  # type: ignore[index]
        at = torch.as_tensor(which, dtype=None if len(which) else torch.int64)  # type: ignore[arg-type]
        masks = None if self.predicted_masks is None else self.predicted_masks[at]
        boxes, scores, labels = self.boxes[at], self.scores[at], self.labels[at]
        ids = None if self.track_ids is None else self.track_ids[at]
        return replace(self, boxes=boxes, scores=scores, labels=labels, predicted_masks=masks, track_ids=ids)

    def __repr__(self) -> str:
        name = Path(self.path).name if self.path else f"{self.shape[1]}x{self.shape[0]} image"
        counts = ", ".join(f"{n} {label}" for label, n in Counter(self.label_names).most_common())
        return f"Results({name}: {counts or 'nothing found'})"


def _upright(image: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """What a box shows, turned so that its first corner [4, 2] is at the top left."""
    import cv2

    width, height = (max(round(float(np.linalg.norm(corners[i] - corners[i - 1]))), 1) for i in (1, 2))
    # warpAffine counts from the centres of pixels
    target = np.array([[0, 0], [width, 0], [width, height]], np.float32) - 0.5
    turn = cv2.getAffineTransform(corners[:3].astype(np.float32) - 0.5, target)
    return cv2.warpAffine(image, turn, (width, height), flags=cv2.INTER_LINEAR)


def _joined(parts: list[list[float]]) -> np.ndarray:
    """One outline [k, 2] of several: from the first to each other one, around it, and the same way back."""
    first, *others = (np.array(part).reshape(-1, 2) for part in parts)
    ways = [point for other in others for point in (other, other[:1], first[:1])]
    return np.concatenate([first, first[:1], *ways]) if others else first
