"""Polygons: points inside them, the least rectangle around points, overlaps of point sets and quadrilaterals; and how
far point sets are apart.

Polygons are computed in float64. A point set is 9 points there, and stands for their convex hull. Quadrilaterals are
meant to be convex.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from rtmdet_fast.compat.mmcv_ext._common import check, exact, fit, gradients
from rtmdet_fast.kernels.nms import in_rounds

_PAIRS_AT_ONCE = 2**16
_LEAST_AREA = 1e-14  # of quadrilaterals, as in mmcv: below, they overlap nothing


def points_in_polygons_forward(points: Tensor, polygons: Tensor, output: Tensor) -> None:
    """Points [B, 2], quadrilaterals [M, 8] -> 1 or 0 into output [B, M].

    Crossings of a ray to the right are counted, in float32 and in mmcv's order, which decides for points on an edge.
    """
    check(points, polygons=polygons)
    fit("points B 2, polygons M 8, output B M", points, polygons, output)
    px, py = points.float().t()[..., None]
    corner = polygons.float().view(-1, 4, 2)
    inside = torch.zeros(output.shape, dtype=torch.bool, device=points.device)
    done = torch.zeros_like(inside)
    for i, j in ((0, 3), (1, 0), (2, 1), (3, 2)):
        (sx, sy), (tx, ty) = corner[:, i].t(), corner[:, j].t()
        level = (py >= torch.minimum(sy, ty)) & (py <= torch.maximum(sy, ty))
        at_corner = ((sx == px) & (sy == py)) | ((tx == px) & (ty == py))
        crosses = level & ~at_corner & (((sy < py) & (ty >= py)) | ((sy >= py) & (ty < py)))
        x = sx + (py - sy) * (tx - sx) / (ty - sy)
        done |= (level & at_corner) | (crosses & (x == px))
        inside ^= crosses & (x > px) & ~done
    output.copy_(inside)


def min_area_polygons(pointsets: Tensor, polygons: Tensor) -> None:
    """Point sets [N, 18] -> corners of the rectangle of least area around each into polygons [N, 8].

    One of its sides lies along an edge of the hull. Of equal ones it is, as in mmcv, the first going round from the
    lowest point.
    """
    check(pointsets)
    fit("pointsets N 18, polygons N 8", pointsets, polygons)
    points = pointsets.double().view(-1, 9, 2)
    is_edge, end = _edges(points)
    x, y = (points.gather(1, end[..., None].expand_as(points)) - points).unbind(-1)
    turn = torch.atan2(y, x).remainder(2 * math.pi)
    cos, sin = turn.remainder(math.pi / 2).cos(), turn.remainder(math.pi / 2).sin()
    along = points[:, None, :, 0] * cos[..., None] + points[:, None, :, 1] * sin[..., None]  # [N, edge, 9]
    across = points[:, None, :, 1] * cos[..., None] - points[:, None, :, 0] * sin[..., None]
    bounds = torch.stack([along.amax(-1), along.amin(-1), across.amin(-1), across.amax(-1), cos, sin], -1)
    area = (bounds[..., 0] - bounds[..., 1]) * (bounds[..., 3] - bounds[..., 2])
    least = area.masked_fill(~is_edge, torch.inf).amin(1, keepdim=True)
    turn = turn.masked_fill(~is_edge | (area > least * (1 + 1e-6)), torch.inf)  # float32 holds such ones for equal
    best = turn.argmin(1)[:, None, None].expand(-1, 1, 6)
    right, left, top, bottom, cos, sin = bounds.gather(1, best)[:, 0].unbind(-1)
    along, across = torch.stack([right, left, left, right], -1), torch.stack([top, top, bottom, bottom], -1)
    cos, sin = cos[:, None], sin[:, None]
    corners = torch.stack([along * cos - across * sin, along * sin + across * cos], -1)
    polygons.copy_(corners.flatten(1))


def convex_iou(pointsets: Tensor, polygons: Tensor, ious: Tensor) -> None:
    """Point sets [N, 18], quadrilaterals [K, 8] -> IoU into ious [N, K]."""
    check(pointsets, polygons=polygons)
    fit("pointsets N 18, polygons K 8, ious N K", pointsets, polygons, ious)
    hull, quad = _hull(pointsets.double().view(-1, 9, 2)), _ordered(polygons.double().view(-1, 4, 2))
    ious.copy_(_pairwise(hull, quad, mode_flag=0))


def convex_giou(pointsets: Tensor, polygons: Tensor, output: Tensor) -> None:
    """Point sets [N, 18], quadrilaterals [N, 8] -> derivatives of GIoU by the points, and GIoU, into output [N, 19]."""
    check(pointsets, polygons=polygons)
    fit("pointsets N 18, polygons N 8, output N 19", pointsets, polygons, output)
    with torch.enable_grad():
        leaf = pointsets.detach().double().requires_grad_()
        points, quad = leaf.view(-1, 9, 2), _ordered(polygons.double().view(-1, 4, 2))
        hull = _hull(points)
        inter = _area(_clipped(hull, quad))
        union = _area(hull) + _area(quad) - inter
        around = _area(_hull(torch.cat([points, quad], 1)))
        giou = inter / union - 1 + union / around
        gradient = torch.autograd.grad(giou.sum(), leaf)[0]
    output.copy_(torch.cat([gradient, giou.detach()[:, None]], 1))


def chamfer_distance_forward(
    xyz1: Tensor, xyz2: Tensor, dist1: Tensor, dist2: Tensor, idx1: Tensor, idx2: Tensor
) -> None:
    """Point sets [B, N, 2] and [B, M, 2] -> the square of each point's distance from the nearest of the other set, and
    which one that is, the first of equal ones, into dist1, idx1 [B, N] and dist2, idx2 [B, M].

    Where one of two sets has points and the other none, RuntimeError.
    """
    check(xyz1, xyz2=xyz2)
    fit("xyz1 B N 2, xyz2 B M 2, dist1 B N, dist2 B M, idx1 B N, idx2 B M", xyz1, xyz2, dist1, dist2, idx1, idx2)
    squared = (exact(xyz1)[:, :, None] - exact(xyz2)[:, None]).square().sum(-1)
    if squared.numel() == 0 and dist1.numel() + dist2.numel() > 0:
        raise RuntimeError(f"there is no nearest point: point sets of {xyz1.shape[1]} and {xyz2.shape[1]} points")
    for dist, idx, dim in ((dist1, idx1, 2), (dist2, idx2, 1)) if squared.numel() else ():
        nearest = squared.argmin(dim, keepdim=True)
        dist.copy_(squared.gather(dim, nearest).squeeze(dim))
        idx.copy_(nearest.squeeze(dim))


def chamfer_distance_backward(
    xyz1: Tensor,
    xyz2: Tensor,
    idx1: Tensor,
    idx2: Tensor,
    grad_dist1: Tensor,
    grad_dist2: Tensor,
    grad_xyz1: Tensor,
    grad_xyz2: Tensor,
) -> None:
    """What `chamfer_distance_forward` took and found, gradients [B, N] and [B, M] of its distances -> added to
    grad_xyz1 [B, N, 2] and grad_xyz2 [B, M, 2]."""
    check(xyz1, xyz2=xyz2)
    check(grad_dist1, grad_dist2=grad_dist2)
    names = (
        "xyz1 B N 2, xyz2 B M 2, idx1 B N, idx2 B M, grad_dist1 B N, grad_dist2 B M, grad_xyz1 B N 2, grad_xyz2 B M 2"
    )
    fit(names, xyz1, xyz2, idx1, idx2, grad_dist1, grad_dist2, grad_xyz1, grad_xyz2)

    def distances(one: Tensor, two: Tensor) -> Tensor:
        nearest1, nearest2 = (idx.long()[..., None].expand(-1, -1, 2) for idx in (idx1, idx2))
        apart = [one - two.gather(1, nearest1), two - one.gather(1, nearest2)]
        return torch.cat(apart, 1).square().sum(-1)

    gradient = gradients(distances, [exact(xyz1), exact(xyz2)], torch.cat([grad_dist1, grad_dist2], 1))
    grad_xyz1 += gradient[0]
    grad_xyz2 += gradient[1]


def box_iou_quadri(bboxes1: Tensor, bboxes2: Tensor, ious: Tensor, mode_flag: int = 0, aligned: bool = False) -> None:
    """IoU of quadrilaterals [N, 8] with [M, 8] into ious [N * M], or [N] if aligned; `mode_flag` 1: per area of the
    first."""
    check(bboxes1, bboxes2=bboxes2)
    fit("bboxes1 N 8, bboxes2 N 8" if aligned else "bboxes1 N 8, bboxes2 M 8", bboxes1, bboxes2)
    fit("ious K", ious, K=len(bboxes1) * (1 if aligned else len(bboxes2)))
    quads1, quads2 = (_ordered(x.double().view(-1, 4, 2)) for x in (bboxes1, bboxes2))
    overlaps = _overlap if aligned else _pairwise
    ious.copy_(overlaps(quads1, quads2, mode_flag=mode_flag).view(ious.shape))


def nms_quadri(
    dets: Tensor, scores: Tensor, order: Tensor, dets_sorted: Tensor, iou_threshold: float, multi_label: bool
) -> Tensor:
    """Dets [N, 8, or 9 if `multi_label`], scores [N] -> indices [K] of the kept, by falling score.

    The column of labels is left out of account, as in mmcv; `order` and `dets_sorted` are not needed.
    """
    if dets.numel() == 0:
        return dets.new_zeros(0, dtype=torch.int64)
    check(dets)
    fit("dets N columns, scores N", dets, scores, columns=9 if multi_label else 8)
    order = scores.sort(descending=True).indices
    if iou_threshold < 0:
        return order[:1]
    quads = _ordered(dets[order, :8].double().view(-1, 4, 2)).flatten(1)
    # in_rounds pads with boxes of 5 numbers at most: the quadrilaterals go by their place
    place = torch.arange(len(quads), dtype=torch.float64, device=dets.device)[:, None]
    padded = torch.cat([quads, quads.new_full((1, 8), torch.nan)])

    def excess(a: Tensor, b: Tensor, threshold: float) -> Tensor:
        both = (padded[x[..., 0].clamp(max=len(quads)).long()].unflatten(2, (4, 2)) for x in (a, b))
        return torch.stack([_pairwise(p, q, mode_flag=0) for p, q in zip(*both, strict=True)]) - threshold

    rank = torch.arange(len(quads), device=dets.device)
    kept = in_rounds(rank, torch.zeros_like(rank), place, (1, len(quads)), iou_threshold, len(quads), excess)[0]
    return order[kept]


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _area(polygon: Tensor) -> Tensor:
    """Of polygons [..., V, 2], in which a corner may stand more than once."""
    polygon = polygon - polygon[..., :1, :].detach()
    return _cross(polygon, polygon.roll(-1, -2)).sum(-1).abs() / 2


def _ordered(quad: Tensor) -> Tensor:
    """Quadrilaterals [..., 4, 2] with their corners going from x towards y."""
    backwards = _cross(quad, quad.roll(-1, -2)).sum(-1) < 0
    return torch.where(backwards[..., None, None], quad.flip(-2), quad)


def _edges(points: Tensor) -> tuple[Tensor, Tensor]:
    """Whether an edge of the hull of points [N, P, 2], from x towards y, begins at each, and which ends it [N, P]."""
    way = points[:, None] - points[:, :, None]  # [N, from, to, 2]
    side = way[:, :, :, None, 0] * way[:, :, None, :, 1] - way[:, :, :, None, 1] * way[:, :, None, :, 0]
    length = way.norm(dim=-1)
    # an edge leaves every point on its left, or on it but for rounding; the longest one passes by those on it
    edge = (side >= -1e-12 * length[..., None] * length[:, :, None]).all(3) & (length > 0)
    return edge.any(2), torch.where(edge, length, 0).argmax(2)


def _hull(points: Tensor) -> Tensor:
    """Points [N, P, 2] -> the corners of their convex hull from x towards y [N, P, 2], the first again at the end."""
    with torch.no_grad():
        is_edge, end = _edges(points)
        corner = torch.zeros_like(points[..., 0]).scatter_reduce_(1, end, is_edge.to(points), "amax") > 0
        x, y = (points - points.mean(1, keepdim=True)).unbind(-1)
        angle = torch.atan2(y, x).masked_fill(~corner, torch.inf)
        order = angle.argsort(1)
        order = order.where(corner.gather(1, order), order[:, :1])
    return points.gather(1, order[..., None].expand(-1, -1, 2))


def _clipped(polygon: Tensor, quad: Tensor) -> Tensor:
    """Convex polygons [B, V, 2] inside convex quadrilaterals [B, 4, 2] -> [B, V + 8, 2] (Sutherland-Hodgman).

    Both go from x towards y. A line adds a corner, or two by rounding; what is empty is one point.
    """
    for i in range(4):
        start, end = quad[:, i, None], quad[:, (i + 1) % 4, None]
        side = _cross(end - start, polygon - start)  # [B, V]
        following, side_after = polygon.roll(-1, 1), side.roll(-1, 1)
        inside = side > 0
        crosses = side.sign() != side_after.sign()
        part = side / torch.where(crosses, side - side_after, 1)
        crossing = polygon + part[..., None] * (following - polygon)
        corners = torch.stack([polygon, crossing], 2).flatten(1, 2)
        there = torch.stack([inside, crosses], 2).flatten(1)
        first = (~there).long().argsort(dim=1, stable=True)[:, : polygon.shape[1] + 2]
        there = there.gather(1, first)
        first = first.where(there, first[:, :1])  # the rest repeats the first
        polygon = corners.gather(1, first[..., None].expand(-1, -1, 2))
        polygon = torch.where(there.any(1)[:, None, None], polygon, quad[:, :1].expand(polygon.shape))
    return polygon


def _overlap(polygons1: Tensor, polygons2: Tensor, mode_flag: int) -> Tensor:
    """Of convex polygons [B, V, 2] with quadrilaterals [B, 4, 2] -> [B]."""
    area1, area2 = _area(polygons1), _area(polygons2)
    inter = _area(_clipped(polygons1, polygons2))
    base = area1 if mode_flag else area1 + area2 - inter
    usable = (area1 >= _LEAST_AREA) & (area2 >= _LEAST_AREA)
    return torch.where(usable, inter / torch.where(usable, base, 1), 0)


def _pairwise(polygons1: Tensor, polygons2: Tensor, mode_flag: int) -> Tensor:
    """Of convex polygons [N, V, 2] with quadrilaterals [M, 4, 2] -> [N, M]; clips those whose bounds meet."""
    low1, high1, low2, high2 = *polygons1.aminmax(dim=1), *polygons2.aminmax(dim=1)
    meet = ((low1[:, None] < high2) & (low2 < high1[:, None])).all(2)
    i, j = meet.nonzero(as_tuple=True)
    overlap = partial(_overlap, mode_flag=mode_flag)
    parts = zip(i.split(_PAIRS_AT_ONCE), j.split(_PAIRS_AT_ONCE), strict=True)
    found = [overlap(polygons1[a], polygons2[b]) for a, b in parts]
    ious = polygons1.new_zeros(meet.shape)
    ious[i, j] = torch.cat([polygons1.new_zeros(0), *found])
    return ious
