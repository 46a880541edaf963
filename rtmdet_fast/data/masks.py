"""Ground truth masks: kept as outlines through every augmentation, and filled at the very end.

A mask is a set of closed outlines; a pixel belongs to it where its centre lies inside one of them (even-odd rule).
Resizing, cropping and flipping move the outlines' few points. Pixels are made once, and of the pixels of the
training image only every fourth in both directions, which is all that the loss looks at.

Legend: n instances, p parts (one outline each), e edges, s spans.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from rtmdet_fast.geometry.masks import Region
from rtmdet_fast.images import OPENCV_MAX_PIXELS, OPENCV_MAX_SIDE

MASK_STRIDE = 4
"""The loss compares masks at the pixels [2::4, 2::4]."""


FARTHEST = 1_000_000
"""Coordinates that COCO's own rasteriser, which evaluates, takes without gigabytes of memory."""


class Rendered(NamedTuple):
    """What training needs of masks.

    areas: [n] int64 pixels of the full-size image; centers: [n, 2] float32 mean column and row of these pixels
    extents: [n, 4] float32 xyxy, the box around these pixels; 0 for empty masks
    masks: [n, H / 4, W / 4] uint8, the full-size masks at [2::4, 2::4]
    """

    areas: np.ndarray
    centers: np.ndarray
    extents: np.ndarray
    masks: np.ndarray


@dataclass(slots=True)
class Outlines:
    """The masks of n instances.

    edges: [e, 4] float32 x, y, x, y of each edge of the outlines in pixels (the corner of the image is 0, 0)
    parts: [e] int32, the outline that each edge belongs to
    owners: [p] int32, the instance that each outline belongs to
    windows: [n, 4] int32 xyxy pixels, beyond which nothing of the instance is seen
    """

    edges: np.ndarray
    parts: np.ndarray
    owners: np.ndarray
    windows: np.ndarray

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def nbytes(self) -> int:
        return self.edges.nbytes + self.parts.nbytes + self.owners.nbytes + self.windows.nbytes

    def take(self, kept: np.ndarray) -> Outlines:
        """The instances of which `kept` [n] bool is True."""
        parts_kept = kept[self.owners]
        edges_kept = parts_kept[self.parts]
        part_number, owner_number = (np.cumsum(k, dtype=np.int32) - 1 for k in (parts_kept, kept))
        return Outlines(
            self.edges[edges_kept],
            part_number[self.parts[edges_kept]],
            owner_number[self.owners[parts_kept]],
            self.windows[kept],
        )

    def resized(self, scale: tuple[float, float], shift: tuple[float, float] = (0.0, 0.0)) -> Outlines:
        """Every point (x, y) at (x, y) · scale + shift; the windows are left as they are."""
        edges = self.edges * np.array(scale * 2, np.float32) + np.array(shift * 2, np.float32)
        return Outlines(edges, self.parts, self.owners, self.windows)

    def seen_through(self, window: tuple[int, int, int, int]) -> Outlines:
        """Cut by a window (x0, y0, x1, y1) in place of the one before."""
        return Outlines(self.edges, self.parts, self.owners, np.tile(np.array(window, np.int32), (len(self), 1)))

    def flipped(self, width: int) -> Outlines:
        """Mirrored in an image of this width."""
        windows = self.windows.copy()
        windows[:, [0, 2]] = width - windows[:, [2, 0]]
        flipped = self.resized((-1.0, 1.0), (float(width), 0.0))
        return Outlines(flipped.edges, self.parts, self.owners, windows)

    def render(self, height: int, width: int, *, pixels: bool = True) -> Rendered:
        """The masks in an image of this size; without `pixels` only their measures, of which `masks` [n, 0, 0]."""
        instance, row, start, stop = self._spans()
        length = stop - start
        n = len(self)
        areas = np.bincount(instance, length, n).astype(np.int64)
        # the columns of a span add up to its length times its middle
        sums = (np.bincount(instance, weights, n) for weights in (length * (start + stop - 1) / 2, length * row))
        centers = (np.stack(list(sums), 1) / np.maximum(areas, 1)[:, None]).astype(np.float32)
        extents = np.zeros((n, 4), np.float32)
        first = np.flatnonzero(np.diff(instance, prepend=-1))  # spans are sorted by instance
        if len(first):
            sides = (f.reduceat(v, first) for f, v in zip(_LEAST_AND_MOST, (start, row, stop, row + 1), strict=True))
            extents[instance[first]] = np.stack(list(sides), 1)
        h, w = (height // MASK_STRIDE, width // MASK_STRIDE) if pixels else (0, 0)
        masks = np.zeros((n, h, w + 1), np.int8)
        if pixels:
            offset = MASK_STRIDE // 2
            sampled = (row % MASK_STRIDE == offset) & (row < h * MASK_STRIDE)
            line = (instance[sampled] * h + row[sampled] // MASK_STRIDE) * (w + 1)
            for value, column in ((1, start), (-1, stop)):
                sample = np.minimum((column[sampled] - offset + MASK_STRIDE - 1) // MASK_STRIDE, w)
                np.add.at(masks.reshape(-1), line + sample, np.int8(value))
            np.cumsum(masks, 2, dtype=np.int8, out=masks)
        return Rendered(areas, centers, extents, np.ascontiguousarray(masks[:, :, :w]).view(np.uint8))

    def region(self, i: int) -> Region:
        """The pixels of one mask at full size."""
        only = np.zeros(len(self), bool)
        only[i] = True
        _, rows, starts, stops = self.take(only)._spans()
        if not len(rows):
            return Region(0, 0, np.zeros((0, 0), bool))
        x, y = int(starts.min()), int(rows[0])
        pixels = np.zeros((int(rows[-1]) + 1 - y, int(stops.max()) - x), bool)
        for row, start, stop in zip(rows - y, starts - x, stops - x, strict=True):
            pixels[row, start:stop] = True
        return Region(x, y, pixels)

    def _spans(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Instance, row, first column and column behind the last of each run of pixels, disjoint, sorted; int64."""
        x0, y0, x1, y1 = self.edges.astype(np.float64).T
        left, upper, right, lower = self.windows[self.owners[self.parts]].astype(np.int64).T
        # Rows whose centre lies in [least y, greatest y): a row crosses a closed outline an even number of times.
        first = np.ceil(np.minimum(y0, y1) - 0.5).clip(upper, lower).astype(np.int64)
        count = np.ceil(np.maximum(y0, y1) - 0.5).clip(upper, lower).astype(np.int64) - first
        edge = np.repeat(np.arange(len(count)), count)
        row = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count - first, count)
        x = x0[edge] + (row + 0.5 - y0[edge]) * ((x1 - x0)[edge] / (y1 - y0)[edge])
        column = np.ceil(x - 0.5).clip(left[edge], right[edge]).astype(np.int64)

        width, height = (int(side) + 1 for side in (self.windows[:, 2:].max(0) if len(self) else (0, 0)))
        crossings = np.sort((self.parts[edge] * height + row) * width + column)
        line, start = np.divmod(crossings[0::2], width)
        stop = crossings[1::2] - line * width
        part, row = np.divmod(line, height)
        # Parts of an instance may overlap: what an earlier span covers is none of a later one.
        line = (self.owners[part] * height + row) * width
        order = np.argsort(line + start, kind="stable")
        line, start, stop = line[order], start[order], stop[order]
        covered = np.maximum.accumulate(line + stop) if len(line) else line
        start[1:] = np.maximum(start[1:], covered[:-1] - line[1:])
        kept = stop > start
        instance, row = np.divmod(line[kept] // width, height)
        return instance, row, start[kept], stop[kept]


_LEAST_AND_MOST = (np.minimum, np.minimum, np.maximum, np.maximum)


def concatenate(outlines: list[Outlines]) -> Outlines:
    """The instances of all, in order."""
    first_part = first_instance = 0
    none = np.zeros(0, np.int32)
    joined = [Outlines(np.zeros((0, 4), np.float32), none, none, np.zeros((0, 4), np.int32))]
    for o in outlines:
        joined.append(Outlines(o.edges, o.parts + np.int32(first_part), o.owners + np.int32(first_instance), o.windows))
        first_part, first_instance = first_part + len(o.owners), first_instance + len(o)
    return Outlines(*(np.concatenate([getattr(o, f.name) for o in joined]) for f in fields(Outlines)))


class Segmentation(NamedTuple):
    """A checked `segmentation`: rings [k, 2] float32 of polygons, or the runs of an RLE of `height` rows."""

    rings: list[np.ndarray]
    runs: np.ndarray | None = None
    height: int = 0
    crossing: bool = False  # see MaskStore.self_crossing

    def is_empty(self) -> bool:
        return not self.rings and (self.runs is None or not self.runs[1::2].any())


def read_segmentation(value: Any, width: int, height: int) -> tuple[Segmentation, list[str]]:
    """A COCO segmentation (polygons, or RLE compressed or not), and what was left out of its polygons, by reason.

    width, height: of the image, or 0 where unknown. Raises ValueError, saying what is wrong, where it is malformed.
    """
    if isinstance(value, dict):
        return _read_rle(value, width, height), []
    if not isinstance(value, list):
        raise ValueError("is neither a list of polygons nor an RLE")
    rings, left_out = [], []
    for polygon in value:
        try:
            ring = np.array(polygon)
        except (ValueError, OverflowError):
            raise ValueError("holds a polygon that is not a list of numbers") from None
        if ring.size and ring.dtype.kind not in "if":
            raise ValueError("holds a polygon that is not a list of numbers")
        if ring.ndim != 1 or len(ring) % 2 or not np.isfinite(ring).all():
            raise ValueError("holds a polygon that is not x, y, x, y, … in finite numbers")
        if (abs(ring) > FARTHEST).any():
            raise ValueError(f"holds a polygon that reaches beyond {FARTHEST:,} pixels")
        ring = ring.reshape(-1, 2)
        if len(ring) < 3:
            left_out.append("polygon of fewer than 3 points")
        elif (ring.max(0) <= 0).any() or (width and (ring.min(0) >= (width, height)).any()):
            left_out.append("polygon outside the image")
        else:
            rings.append(ring.astype(np.float32))
    return Segmentation(rings), left_out


def _read_rle(value: dict[str, Any], width: int, height: int) -> Segmentation:
    size, counts = value.get("size"), value.get("counts")
    if not (isinstance(size, list) and len(size) == 2 and all(type(s) is int and s > 0 for s in size)):
        raise ValueError("is an RLE without a size [height, width]")
    if max(size) > OPENCV_MAX_SIDE or size[0] * size[1] > OPENCV_MAX_PIXELS:
        raise ValueError("is an RLE larger than any image that can be read")
    if width and size != [height, width]:
        raise ValueError(f"is an RLE of {size[1]}x{size[0]} pixels in an image of {width}x{height}")
    try:
        runs = _decompressed(counts) if isinstance(counts, (str, bytes)) else np.array(counts)
        if runs.size and runs.dtype.kind != "i":
            raise ValueError
    except (ValueError, OverflowError):
        raise ValueError("is an RLE whose counts cannot be read") from None
    if runs.ndim != 1 or (runs < 0).any() or sum(runs.tolist()) != size[0] * size[1]:
        raise ValueError(f"is an RLE whose counts do not add up to {size[1]}x{size[0]} pixels")
    return Segmentation([], runs.astype(np.int32), size[0])


def _decompressed(counts: str | bytes) -> np.ndarray:
    """The runs of COCO's compressed RLE: five bits a character, and differences to the run before the last."""
    data = np.frombuffer(counts.encode("ascii") if isinstance(counts, str) else counts, np.uint8).astype(np.int64) - 48
    if not len(data):
        return data
    if data.min() < 0 or data.max() > 63 or data[-1] & 32:
        raise ValueError
    first = np.flatnonzero(np.concatenate([[0], data[:-1]]) & 32 == 0)
    digit = np.arange(len(data)) - np.repeat(first, np.diff(first, append=len(data)))
    if digit.max() > 6:
        raise ValueError
    runs = np.add.reduceat((data & 31) << 5 * digit, first)
    last = np.append(first[1:], len(data)) - 1
    runs -= np.where(data[last] & 16, 1 << 5 * (digit[last] + 1), 0)
    for k in (1, 2):
        runs[k::2] = np.cumsum(runs[k::2])
    return runs


class MaskStore:
    """The masks of a data set's annotations, in a few arrays that forked loader workers share without copying."""

    def __init__(self, segmentations: list[Segmentation]):
        rings = [ring for s in segmentations for ring in s.rings]
        runs = [s.runs if s.runs is not None else np.zeros(0, np.int32) for s in segmentations]
        self._points = np.concatenate([np.zeros((0, 2), np.float32), *rings])
        self._ring_starts = np.cumsum([0, *map(len, rings)])
        self._rings_of = np.cumsum([0, *(len(s.rings) for s in segmentations)])
        self._runs = np.concatenate([np.zeros(0, np.int32), *runs])
        self._runs_of = np.cumsum([0, *map(len, runs)])
        self._heights = np.array([s.height for s in segmentations], np.int32)

    def load(self, start: int, stop: int, width: int, height: int) -> Outlines:
        """The masks of the annotations from `start` to `stop`, in an image of this size."""
        r0, r1 = self._rings_of[[start, stop]]
        edges = [self._edges(r0, r1)]
        parts = [np.repeat(np.arange(r1 - r0, dtype=np.int32), np.diff(self._ring_starts[r0 : r1 + 1]))]
        owners = np.repeat(np.arange(stop - start, dtype=np.int32), np.diff(self._rings_of[start : stop + 1])).tolist()
        for i in range(start, stop):
            runs = self._runs[self._runs_of[i] : self._runs_of[i + 1]]
            if len(runs):
                edges.append(_edges_of_runs(runs, int(self._heights[i])))
                parts.append(np.full(len(edges[-1]), len(owners), np.int32))
                owners.append(i - start)
        windows = np.tile(np.array([0, 0, width, height], np.int32), (stop - start, 1))
        return Outlines(np.concatenate(edges), np.concatenate(parts), np.array(owners, np.int32), windows)

    def without_pixels(self, sizes: np.ndarray, crossing: np.ndarray) -> np.ndarray:
        """[annotations] bool: those whose polygons hold no pixel's centre, in images of sizes [annotations, 2].

        crossing: what `self_crossing` tells, whose areas say nothing.
        """
        owner = np.repeat(np.arange(len(sizes)), np.diff(self._rings_of))
        starts = self._ring_starts[:-1]
        if not len(starts):
            return np.zeros(len(sizes), bool)
        x0, y0, x1, y1 = self._edges(0, len(starts)).astype(np.float64).T
        area = abs(np.add.reduceat(x0 * y1 - x1 * y0, starts)) / 2
        length = np.add.reduceat(np.hypot(x1 - x0, y1 - y0), starts)
        least = np.minimum.reduceat(self._points, starts)
        greatest = np.maximum.reduceat(self._points, starts)
        # Outlines hold a disk of radius area / length (Bonnesen), and any disk of radius 0.71 a pixel's centre.
        sure = (area > 0.75 * length) & (least >= 0).all(1) & (greatest <= sizes[owner]).all(1)
        doubtful = np.bincount(owner, minlength=len(sizes)) > 0
        doubtful[owner[sure]] = False
        doubtful |= crossing
        empty = np.zeros(len(sizes), bool)
        for i in doubtful.nonzero()[0].tolist():
            width, height = sizes[i].tolist()
            empty[i] = self.load(i, i + 1, width, height).render(height, width, pixels=False).areas[0] == 0
        return empty

    def self_crossing(self) -> np.ndarray:
        """[annotations] bool: those with a polygon that crosses itself (edges that only touch do not count)."""
        lengths = np.diff(self._ring_starts)
        crossing = np.zeros(len(lengths), bool)
        for rings in _portions(lengths):
            edges = self._edges(rings[0], rings[-1] + 1).astype(np.float64)
            crossing[np.unique(_crossing(edges, np.repeat(rings, lengths[rings])))] = True
        owner = np.repeat(np.arange(len(self._heights)), np.diff(self._rings_of))
        return np.bincount(owner[crossing], minlength=len(self._heights)) > 0

    def _edges(self, start: int, stop: int) -> np.ndarray:
        """[e, 4] of the rings from `start` to `stop`."""
        starts = self._ring_starts[start : stop + 1] - self._ring_starts[start]
        points = self._points[self._ring_starts[start] : self._ring_starts[stop]]
        after = np.arange(1, len(points) + 1)
        after[starts[1:] - 1] = starts[:-1]
        return np.concatenate([points, points[after]], 1)


def _portions(costs: np.ndarray, most: int = 2**18) -> list[np.ndarray]:
    """0, 1, … in runs of which the costs add up to about `most`."""
    cuts = np.flatnonzero(np.diff(np.cumsum(costs) // most)) + 1
    return np.split(np.arange(len(costs)), cuts) if len(costs) else []


def _crossing(edges: np.ndarray, ring: np.ndarray) -> np.ndarray:
    """The rings, with repetitions, of which two of the edges [e, 4] cross."""
    # Sorted by ring and least y, an edge has the edges that it may meet right behind it.
    least, greatest = np.sort(edges[:, 1::2], 1).T
    apart = ring * (np.ptp(edges[:, 1::2]) + 1)
    order = np.argsort(apart + least)
    edges, ring = edges[order], ring[order]
    first = np.arange(1, len(edges) + 1)
    count = np.searchsorted((apart + least)[order], (apart + greatest)[order], "right") - first
    found = []
    for part in _portions(count):
        a = np.repeat(part, count[part])
        b = np.arange(len(a)) + np.repeat(first[part] - (np.cumsum(count[part]) - count[part]), count[part])
        found.append(ring[a[_cross(edges[a], edges[b])]])
    return np.concatenate(found)


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[k] bool of edges [k, 4]: whether they cross at a point inside both."""

    def parts(line: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Whether the ends of `other` lie on different sides of `line`."""
        x, y, dx, dy = line[:, 0], line[:, 1], line[:, 2] - line[:, 0], line[:, 3] - line[:, 1]
        sides = (np.sign(dx * (other[:, k + 1] - y) - dy * (other[:, k] - x)) for k in (0, 2))
        return np.multiply(*sides) < 0

    return parts(a, b) & parts(b, a)


def _edges_of_runs(runs: np.ndarray, height: int) -> np.ndarray:
    """The vertical edges [e, 4] around the pixels of an RLE (its horizontal ones no row of pixels crosses)."""
    ends = np.cumsum(runs, dtype=np.int64)
    start, stop = ends[0 : len(ends) // 2 * 2 : 2], ends[1::2]
    start, stop = start[stop > start], stop[stop > start]
    # each run column by column
    column, count = start // height, (stop - 1) // height - start // height + 1
    run = np.repeat(np.arange(len(count)), count)
    column = np.arange(len(run)) - np.repeat(np.cumsum(count) - count - column, count)
    upper = np.maximum(start[run] - column * height, 0)
    lower = np.minimum(stop[run] - column * height, height)
    # A column of pixels has an edge on its left and on its right. Where two columns meet both cancel: of the ends of
    # edges at one x, sorted, those that occur twice go, and the others bound edges by pairs.
    at, times = np.unique(
        np.concatenate([(column + dx) * (height + 1) + y for dx in (0, 1) for y in (upper, lower)]), return_counts=True
    )
    x, y = np.divmod(at[times % 2 == 1], height + 1)
    return np.stack([x[0::2], y[0::2], x[1::2], y[1::2]], 1).astype(np.float32)
