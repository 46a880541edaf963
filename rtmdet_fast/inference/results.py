"""What a prediction returns: the detections of one image, in pixels of that image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
    """

    image: np.ndarray | None
    boxes: Tensor
    scores: Tensor
    labels: Tensor
    names: tuple[str, ...]
    path: str | None = None
    shape: tuple[int, int] = (0, 0)
    predicted_masks: PredictedMasks | None = None

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

    def plot(self, line_width: int | None = None) -> np.ndarray:
        """A copy of the image, [H, W, 3] uint8 BGR, with masks, boxes, names and scores drawn."""
        from rtmdet_fast.inference.drawing import draw_detections

        if self.image is None:
            raise UserError("these results hold no image to draw on")
        masks = self.predicted_masks
        return draw_detections(self.image, self.boxes, self.labels, self.scores, self.names, line_width, masks)

    def save(self, path: str | Path) -> Path:
        """Draws the detections and writes the picture; its folder is made where it is missing."""
        from rtmdet_fast.images import write_image

        return write_image(path, self.plot())

    def to_coco(self, image_id: int = 0, category_ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """COCO result entries with plain numbers; `bbox` is [x, y, width, height], `segmentation` an RLE.

        Of rotated boxes that is the upright box around them; they themselves are `rbox`, and their corners the
        `segmentation`.

        Args:
            image_id: of each entry.
            category_ids: the data set's category id of each class index; the index itself where it is not given.
        """
        corners = self.corners()
        low, high = corners.min(1), corners.max(1)
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
            for entry, rbox, quad in zip(entries, self.boxes.tolist(), corners, strict=True):
                entry |= {"rbox": rbox, "segmentation": [quad.ravel().tolist()], "area": rbox[2] * rbox[3]}
        return entries

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, which: int | slice | Sequence[int] | np.ndarray | Tensor) -> Results:
        """The detections at an index, a slice, indices [k], or where a mask [n] bool holds; of the same image."""
        if isinstance(which, slice):
            which = range(len(self))[which]
        elif np.ndim(which) == 0:
            which = [range(len(self))[which]]  # type: ignore[index]
        at = torch.as_tensor(which, dtype=None if len(which) else torch.int64)  # type: ignore[arg-type]
        masks = None if self.predicted_masks is None else self.predicted_masks[at]
        boxes, scores, labels = self.boxes[at], self.scores[at], self.labels[at]
        return replace(self, boxes=boxes, scores=scores, labels=labels, predicted_masks=masks)

    def __repr__(self) -> str:
        name = Path(self.path).name if self.path else f"{self.shape[1]}x{self.shape[0]} image"
        counts = ", ".join(f"{n} {label}" for label, n in Counter(self.label_names).most_common())
        return f"Results({name}: {counts or 'nothing found'})"
