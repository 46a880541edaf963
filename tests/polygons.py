"""Rotated boxes as polygons in float64: the oracle of what is computed of them."""

import math

import numpy as np


def corners(box):
    x, y, w, h, a = (float(v) for v in box)
    c, s = math.cos(a), math.sin(a)
    return [
        (x + c * u - s * v, y + s * u + c * v)
        for u, v in ((-w / 2, -h / 2), (w / 2, -h / 2), (w / 2, h / 2), (-w / 2, h / 2))
    ]


def exact_iou(box1, box2):
    """Sutherland-Hodgman in Python floats, relative to the first centre."""
    box1, box2 = np.array(box1, np.float64), np.array(box2, np.float64)
    box2[:2] -= box1[:2]
    box1[:2] = 0
    polygon, clip = corners(box1), corners(box2)
    for (px, py), (qx, qy) in zip(clip, clip[1:] + clip[:1], strict=True):

        def side(point, px=px, py=py, qx=qx, qy=qy):
            return (qx - px) * (point[1] - py) - (qy - py) * (point[0] - px)

        out = []
        for a, b in zip(polygon, polygon[1:] + polygon[:1], strict=True):
            sa, sb = side(a), side(b)
            if sa >= 0:
                out.append(a)
            if sa * sb < 0:
                t = sa / (sa - sb)
                out.append((a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1])))
        polygon = out
    area = sum(a[0] * b[1] - a[1] * b[0] for a, b in zip(polygon, polygon[1:] + polygon[:1], strict=True)) / 2
    union = box1[2] * box1[3] + box2[2] * box2[3] - area
    return area / union if union > 0 else 0.0
