"""Rotated boxes and quadrilaterals.

Rotated boxes are [n, 5] (cx, cy, w, h, angle): pixels and radians, the angle turning x towards y (clockwise on a
screen, y down), and in the form le90: w >= h, angle in [-pi/2, pi/2). Quadrilaterals are [n, 8], x1 y1 … x4 y4.
"""

from __future__ import annotations

import math

import numpy as np

CHUNK = 1 << 14  # point sets at a time: some 2 kB each


def regularize(boxes: np.ndarray) -> np.ndarray:
    """The same boxes [n, 5] in the form le90."""
    cx, cy, w, h, angle = np.moveaxis(boxes, -1, 0)
    angle = np.where(w < h, angle + math.pi / 2, angle)
    angle = (angle + math.pi / 2) % math.pi - math.pi / 2
    angle = np.where(angle < math.pi / 2, angle, -math.pi / 2)  # rounded up
    return np.stack([cx, cy, np.maximum(w, h), np.minimum(w, h), angle], -1)


def min_area_boxes(points: np.ndarray) -> np.ndarray:
    """The smallest rotated boxes [n, 5] float64 around sets of k points, [n, k, 2]; degenerate ones have h = 0.

    One side of such a box lies along an edge of the convex hull (Freeman and Shapira 1975). Hull or not, every line
    through two points is tried: boxes along the others hold all points too, and are not smaller.
    """
    points = np.asarray(points, np.float64)
    n, k, _ = points.shape
    if n > CHUNK:
        return np.concatenate([min_area_boxes(points[start : start + CHUNK]) for start in range(0, n, CHUNK)])
    middle = points.mean(1, keepdims=True)
    relative = points - middle  # far from the origin digits would be lost
    i, j = np.triu_indices(k, 1)
    lines = relative[:, j] - relative[:, i]
    lengths = np.hypot(lines[..., 0], lines[..., 1])
    # a point twice gives no direction: along x then, which matters only where all points are one
    lines = np.where(lengths[..., None] > 0, lines / np.maximum(lengths, 1e-300)[..., None], [1.0, 0.0])
    across = np.stack([-lines[..., 1], lines[..., 0]], -1)
    u, v = lines @ relative.transpose(0, 2, 1), across @ relative.transpose(0, 2, 1)  # [n, lines, k]
    w, h = np.ptp(u, axis=2), np.ptp(v, axis=2)
    # near ties, as between the sides of a rectangle, go to the first line
    area = w * h
    best = (area <= area.min(1, keepdims=True) * (1 + 1e-9)).argmax(1)[:, None]
    rows = np.arange(n)[:, None]
    u, v, lines, across = (x[rows, best][:, 0] for x in (u, v, lines, across))
    low_u, high_u, low_v, high_v = u.min(1), u.max(1), v.min(1), v.max(1)
    centre = middle[:, 0] + lines * ((low_u + high_u) / 2)[:, None] + across * ((low_v + high_v) / 2)[:, None]
    angle = np.arctan2(lines[:, 1], lines[:, 0])
    return regularize(np.column_stack([centre, high_u - low_u, high_v - low_v, angle]))


def quads_to_boxes(quads: np.ndarray) -> np.ndarray:
    """The smallest rotated boxes [n, 5] float64 around quadrilaterals [n, 8], in whatever order their corners come."""
    return min_area_boxes(np.asarray(quads).reshape(-1, 4, 2))


def boxes_to_quads(boxes: np.ndarray) -> np.ndarray:
    """The corners [n, 8] of rotated boxes [n, 5]; they go round clockwise on a screen."""
    boxes = np.asarray(boxes, np.float64).reshape(-1, 5)
    cos, sin = np.cos(boxes[:, 4:]), np.sin(boxes[:, 4:])
    along = np.concatenate([cos, sin], 1) * boxes[:, 2:3] / 2
    across = np.concatenate([-sin, cos], 1) * boxes[:, 3:4] / 2
    centre = boxes[:, :2]
    corners = (centre - along - across, centre + along - across, centre + along + across, centre - along + across)
    return np.concatenate(corners, 1)


def edges_cross(quads: np.ndarray) -> np.ndarray:
    """[n] bool: whether opposite edges of a quadrilateral [n, 8] cross, as where two corners are exchanged."""
    p = np.asarray(quads, np.float64).reshape(-1, 4, 2)

    def side(a: int, b: int, c: int) -> np.ndarray:
        """Of the line from a to b, on which c lies."""
        u, v = p[:, b] - p[:, a], p[:, c] - p[:, a]
        return np.sign(u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0])

    def cross(a: int, b: int, c: int, d: int) -> np.ndarray:
        return (side(a, b, c) * side(a, b, d) < 0) & (side(c, d, a) * side(c, d, b) < 0)

    return cross(0, 1, 2, 3) | cross(1, 2, 3, 0)
