"""Drawing detections so that they can be read: one colour per class, labels that keep clear of each other."""

from __future__ import annotations

import colorsys
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from rtmdet_fast.class_names import class_name
from rtmdet_fast.geometry.masks import Region
from rtmdet_fast.geometry.rotated import boxes_to_quads

Array = np.ndarray | Tensor
MASK_OPACITY = 0.45
MAX_LETTERS = 60


class Masks(Protocol):
    """What is drawn for each detection, one at a time."""

    def region(self, i: int) -> Region: ...


# cv2 and the font are imported where they are used: the package imports without OpenCV.


@lru_cache(maxsize=4096)
def class_color(label: int) -> tuple[int, int, int]:
    """The BGR colour of a class: hues by the golden ratio, so that neighbours differ, in three tones."""
    saturation, value = ((0.85, 1.0), (0.55, 1.0), (0.9, 0.72))[label // 7 % 3]
    r, g, b = colorsys.hsv_to_rgb((0.02 + label * 0.618034) % 1.0, saturation, value)
    return round(255 * b), round(255 * g), round(255 * r)


def draw_detections(
    image: np.ndarray,
    boxes: Array,
    labels: Array,
    scores: Array | None,
    names: Sequence[str],
    line_width: int | None = None,
    masks: Masks | None = None,
    colors: Sequence[tuple[int, int, int]] | None = None,
    track_ids: Array | None = None,
) -> np.ndarray:
    """A copy of `image` with its masks, boxes, names and scores.

    image: [H, W, 3] uint8 BGR; boxes: [n, 4] xyxy pixels or [n, 5] rotated (cx, cy, w, h, radians); labels: [n];
    scores: [n], or None for ground truth
    line_width: in pixels, by default by the size of the image
    masks: in pixels of `image`; each is filled so that the image shows through, within a solid contour
    colors: BGR of each box; those of the classes where not given
    track_ids: [n], behind the name where they are not negative
    Boxes that are not finite are left out. A name with letters that the font lacks is drawn as "#" and its label, of
    which a warning tells.
    Lines and letters grow with the image and shrink where there are many boxes. Where labels would lie upon
    each other, the better score keeps its label and the other box goes without; so do the last boxes of a picture so
    small, or so crowded, that labels would cover more than a quarter of it.
    """
    import cv2

    canvas = np.ascontiguousarray(image).copy()
    boxes_np = _array(boxes, np.float32)
    labels_np = _array(labels, np.int64)
    scores_np = None if scores is None else _array(scores, np.float32)
    ids = np.full(len(labels_np), -1) if track_ids is None else _array(track_ids, np.int64)
    finite = np.flatnonzero(np.isfinite(boxes_np).all(-1))
    boxes_np, labels_np = boxes_np[finite], labels_np[finite]
    inks = (
        [class_color(label) for label in labels_np.tolist()] if colors is None else [colors[i] for i in finite.tolist()]
    )
    scores_np = None if scores_np is None else scores_np[finite]
    ids = ids[finite]
    if not len(boxes_np):
        return canvas
    height, width = canvas.shape[:2]
    crowd = max(len(boxes_np) / 30, 1.0) ** 0.25
    side = (height * width) ** 0.5
    line = line_width or max(round(side / 240 / crowd), 1)
    font_size = max(round(side / 42 / crowd), 10)

    order = np.arange(len(boxes_np)) if scores_np is None else np.argsort(-scores_np, kind="stable")
    if masks is not None:
        for i in order[::-1]:
            _put_mask(canvas, masks.region(int(finite[i])), inks[i], line)
    rotated = boxes_np.shape[1] == 5
    if rotated:
        quads = boxes_to_quads(boxes_np).reshape(-1, 4, 2).clip(-1e5, 1e5)
        top, bottom = (quads[np.arange(len(quads)), pick(quads[:, :, 1], 1)] for pick in (np.argmin, np.argmax))
        # labels stand at the uppermost corner, or under the lowest
        boxes_np = np.stack([top[:, 0], top[:, 1], top[:, 0], bottom[:, 1]], 1)
    corners = np.rint(boxes_np).clip(-10 * line, [width + 10 * line, height + 10 * line] * 2).astype(int)
    for i in order[::-1]:  # the best on top
        color = inks[i]
        if rotated:  # in sixteenths of a pixel: rounded corners would turn small boxes
            cv2.polylines(canvas, [np.rint(quads[i] * 16).astype(np.int32)], True, color, line, cv2.LINE_AA, shift=4)
        else:
            x1, y1, x2, y2 = corners[i].tolist()
            cv2.rectangle(canvas, (x1, y1), (x2, y2), color, line, cv2.LINE_AA)

    taken = np.zeros((height, width), bool)
    left = height * width / 4
    for i in order:
        text = drawable_name(str(names[labels_np[i]]), int(labels_np[i]))
        if ids[i] >= 0:
            text += f" #{ids[i]}"
        if scores_np is not None:
            text += f" {scores_np[i]:.2f}"
        glyphs = _text(text, font_size)
        place = _free_place(corners[i].tolist(), glyphs.shape, line, taken)
        if place is not None and (left >= glyphs.size or not taken.any()):
            left -= glyphs.size
            _put_label(canvas, glyphs, *place, inks[i])
            taken[place[1] : place[1] + glyphs.shape[0], place[0] : place[0] + glyphs.shape[1]] = True
    return canvas


def _array(values: Array, dtype: type) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().double().cpu().numpy()  # numpy has no bfloat16
    return np.asarray(values, dtype=dtype)


def _put_mask(canvas: np.ndarray, region: Region, color: tuple[int, int, int], line: int) -> None:
    import cv2

    x, y, pixels = region
    if not pixels.any():
        return
    patch = canvas[y : y + pixels.shape[0], x : x + pixels.shape[1]]
    patch[pixels] = (1 - MASK_OPACITY) * patch[pixels] + MASK_OPACITY * np.array(color, np.float32)
    contours, _ = cv2.findContours(pixels.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(canvas, contours, -1, color, line, cv2.LINE_AA, offset=(x, y))


def _free_place(box: list[int], shape: tuple[int, int], line: int, taken: np.ndarray) -> tuple[int, int] | None:
    """The top left corner of a label, inside the image and on no other label; None where there is no room."""
    height, width = taken.shape
    h, w = shape
    x1, y1, x2, y2 = box
    out = line // 2
    left, right = x1 - out, x2 + out + 1 - w
    # Above the box, inside its upper edge, below it, inside its lower edge; to the left first.
    for x, y in (
        (left, y1 - out - h),
        (left, y1 - out),
        (right, y1 - out - h),
        (left, y2 + out),
        (right, y1 - out),
        (left, y2 + out - h),
        (right, y2 + out),
        (right, y2 + out - h),
    ):
        if y < 0 or y + h > height:
            continue
        x = min(max(x, 0), max(width - w, 0))
        if not taken[y : y + h, x : x + w].any():
            return x, y
    return None


def _put_label(canvas: np.ndarray, glyphs: np.ndarray, x: int, y: int, color: tuple[int, int, int]) -> None:
    """Blends the letters, black or white by the luma of `color`, onto a rectangle of that colour."""
    patch = canvas[y : y + glyphs.shape[0], x : x + glyphs.shape[1]]
    alpha = glyphs[: patch.shape[0], : patch.shape[1], None].astype(np.float32) / 255
    b, g, r = color
    ink = 0.0 if 0.114 * b + 0.587 * g + 0.299 * r > 110 else 255.0
    patch[:] = np.array(color, dtype=np.float32) * (1 - alpha) + ink * alpha


@lru_cache(maxsize=4096)
def drawable_name(name: str, label: int) -> str:
    """What stands for a class on a picture: its name, cut where it is very long, or "#" and the label, told once."""
    name = class_name(name)
    if not all(_charmap().get_char_index(ord(c)) for c in name):
        warnings.warn(f"on pictures #{label} stands for the class {name!r}, as their font lacks letters", stacklevel=2)
        return f"#{label}"
    return name if len(name) <= MAX_LETTERS else f"{name[: MAX_LETTERS - 1]}…"


@lru_cache(maxsize=4096)
def _text(text: str, size: int) -> np.ndarray:
    """Opacity of the letters with a small margin, [h, w] uint8."""
    from PIL import Image, ImageDraw

    font = _font(size)
    pad = max(size // 5, 2)
    ascent, descent = font.getmetrics()
    width = round(font.getlength(text)) + 2 * pad
    picture = Image.new("L", (width, ascent + descent + pad))
    ImageDraw.Draw(picture).text((pad, pad // 2), text, fill=255, font=font)
    return np.asarray(picture)


@lru_cache(maxsize=64)
def _font(size: int):  # type: ignore[no-untyped-def]  # PIL's type, and PIL is imported here
    from PIL import ImageFont

    return ImageFont.truetype(_font_file(), size)


@lru_cache(maxsize=1)
def _charmap():  # type: ignore[no-untyped-def]  # matplotlib's type; Pillow does not tell what a font lacks
    from matplotlib.ft2font import FT2Font

    return FT2Font(_font_file())


def _font_file() -> str:
    """DejaVu Sans, which comes with matplotlib: cv2's own letters are ASCII only and coarse when small."""
    import matplotlib

    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
