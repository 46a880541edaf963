"""Polygons, overlaps and focal losses of the stand-in, against shapely, and loops in float64."""

import itertools
import math

import numpy as np
import pytest
import torch
from shapely.geometry import MultiPoint, Polygon

import rtmdet_fast.compat.mmcv_ext as ext

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).to(DEVICE)


def quadrilaterals(n: int, seed: int = 0) -> torch.Tensor:
    """Convex ones [n, 8], going either way, and a square twice."""
    g = np.random.default_rng(seed)
    found = [[0, 0, 8, 0, 8, 8, 0, 8], [0, 0, 8, 0, 8, 8, 0, 8]]
    while len(found) < n:
        angle = np.sort(g.uniform(0, 2 * math.pi, 4))[:: g.choice([1, -1])]
        around = np.stack([np.cos(angle), np.sin(angle)], 1) * g.uniform(2, 9, 2) + g.uniform(-6, 6, 2)
        found.append(around.flatten().tolist())
    return torch.tensor(found, device=DEVICE)


def area_of_overlap(one, two) -> float:
    return one.intersection(two).area


def shapes(corners: torch.Tensor) -> list:
    return [Polygon(np.asarray(c).reshape(-1, 2)) for c in corners.cpu().tolist()]


@pytest.mark.parametrize("mode", [0, 1])
def test_box_iou_quadri(mode):
    one, two = quadrilaterals(14), quadrilaterals(11, seed=1)
    expected = torch.tensor(
        [[area_of_overlap(p, q) / (p.area if mode else p.union(q).area) for q in shapes(two)] for p in shapes(one)],
        device=DEVICE,
    )
    ious = one.new_full((14 * 11,), torch.nan)
    ext.box_iou_quadri(one, two, ious, mode_flag=mode, aligned=False)
    torch.testing.assert_close(ious.view(14, 11), expected, atol=1e-5, rtol=0)
    assert 0.05 < (expected > 0.1).float().mean() < 0.95
    pairs = one.new_full((11,), torch.nan)
    ext.box_iou_quadri(one[:11], two, pairs, mode_flag=mode, aligned=True)
    torch.testing.assert_close(pairs, expected.diagonal(), atol=1e-5, rtol=0)
    point = torch.ones(1, 8, device=DEVICE)
    ext.box_iou_quadri(point, two, pairs, mode_flag=mode, aligned=False)
    assert (pairs == 0).all()


@pytest.mark.parametrize("labels", [False, True])
def test_nms_quadri(labels):
    n, threshold = 120, 0.3
    quads = quadrilaterals(n)
    scores = torch.randperm(n, generator=torch.Generator().manual_seed(0)).to(quads) / n
    ious = quads.new_zeros(n * n)
    ext.box_iou_quadri(quads, quads, ious)
    kept: list[int] = []
    for i in scores.argsort(descending=True).tolist():
        if all(ious.view(n, n)[i, j] <= threshold for j in kept):
            kept.append(i)
    dets = torch.cat([quads, torch.arange(n, device=DEVICE)[:, None] % 3], 1) if labels else quads
    assert ext.nms_quadri(dets, scores, None, None, threshold, labels).tolist() == kept
    assert 5 < len(kept) < 100
    assert ext.nms_quadri(dets, scores, None, None, -1.0, labels).tolist() == kept[:1]
    assert ext.nms_quadri(dets[:0], scores[:0], None, None, threshold, labels).shape == (0,)


def test_points_in_polygons():
    quads, points = quadrilaterals(9), random(200, 2) * 5
    out = torch.full((200, 9), torch.nan, device=DEVICE)
    ext.points_in_polygons_forward(points, quads, out)
    inside = [[q.contains(MultiPoint([p]).geoms[0]) for q in shapes(quads)] for p in points.tolist()]
    assert out.tolist() == torch.tensor(inside).float().tolist() and 0.1 < out.mean() < 0.9
    corners_and_edges = torch.tensor([[0.0, 0], [8, 8], [8, 4], [4, 0], [4, 8], [0, 4]], device=DEVICE)
    out = torch.zeros(6, 1, device=DEVICE)
    ext.points_in_polygons_forward(corners_and_edges, quads[:1], out)
    assert out[:, 0].tolist() == [0, 0, 0, 0, 1, 0]  # where the loop of mmcv ends


def test_min_area_polygons():
    sets = random(30, 18) * 4
    sets[0] = torch.tensor([0.0, 0, 4, 0, 4, 2, 0, 2, 1, 1, 2, 1, 3, 1, 1, 0, 0, 1])  # an upright rectangle
    sets[1] = 3.0  # one point
    sets[2] = torch.arange(9.0)[:, None].expand(9, 2).flatten()  # a line
    polygons = torch.full((30, 8), torch.nan, device=DEVICE)
    ext.min_area_polygons(sets, polygons)
    for points, corners in zip(
        sets.cpu().numpy().reshape(-1, 9, 2), polygons.cpu().numpy().reshape(-1, 4, 2), strict=True
    ):
        hull = MultiPoint(points).convex_hull
        found = Polygon(corners)
        least = hull.minimum_rotated_rectangle.area if hull.area else 0.0
        assert found.area == pytest.approx(least, rel=1e-4, abs=1e-5)
        assert all(found.buffer(1e-3).contains(MultiPoint([p])) for p in points)
    assert sorted(map(tuple, polygons[0].view(4, 2).round(decimals=4).tolist())) == [(0, 0), (0, 2), (4, 0), (4, 2)]


def test_convex_iou():
    sets, quads = random(12, 18) * 4, quadrilaterals(7)
    sets[0] = torch.cat([quads[0], quads[0], quads[0, :2]])  # its hull is a quadrilateral, corners twice
    ious = torch.full((12, 7), torch.nan, device=DEVICE)
    ext.convex_iou(sets, quads, ious)
    hulls = [MultiPoint(points).convex_hull for points in sets.cpu().numpy().reshape(-1, 9, 2)]
    expected = [[area_of_overlap(h, q) / h.union(q).area for q in shapes(quads)] for h in hulls]
    torch.testing.assert_close(ious, torch.tensor(expected, device=DEVICE), atol=1e-5, rtol=0)


def test_convex_giou_and_its_derivative():
    quads = quadrilaterals(9).double()
    sets = random(9, 18, dtype=torch.float64) * 3
    sets[3] += 40  # apart

    def giou(sets):
        out = torch.full((9, 19), torch.nan, dtype=torch.float64, device=DEVICE)
        ext.convex_giou(sets, quads, out)
        return out

    expected = []
    for points, quad in zip(sets.cpu().numpy().reshape(-1, 9, 2), shapes(quads), strict=True):
        hull = MultiPoint(points).convex_hull
        union, around = hull.union(quad).area, MultiPoint([*points, *quad.exterior.coords]).convex_hull.area
        expected.append(area_of_overlap(hull, quad) / union - (around - union) / around)
    out = giou(sets)
    torch.testing.assert_close(out[:, 18], torch.tensor(expected, device=DEVICE, dtype=torch.float64))
    for seed in range(4):
        step = random(9, 18, seed=seed, dtype=torch.float64) * 1e-6
        change = (giou(sets + step) - giou(sets - step))[:, 18] / 2
        torch.testing.assert_close((out[:, :18] * step).sum(1), change, atol=1e-11, rtol=1e-4)


def chamfer(one: torch.Tensor, two: torch.Tensor) -> list[torch.Tensor]:
    """Distances and indices as mmcv's Python part takes them, which makes float32 of all."""
    (batch, n, _), m = one.shape, two.shape[1]
    found = [one.new_full((batch, size), torch.nan, dtype=torch.float32) for size in (n, m)]
    found += [torch.full((batch, size), -1, dtype=torch.int32, device=DEVICE) for size in (n, m)]
    ext.chamfer_distance_forward(one, two, *found)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_chamfer_distance_and_its_gradient(dtype):
    one, two = random(3, 9, 2).to(dtype), random(3, 7, 2, seed=1).to(dtype)
    one[0, 4], two[1, 5] = one[0, 2], two[1, 3]  # twice: of equal ones the first is the nearest
    *dist, idx1, idx2 = chamfer(one, two)
    leaves = [x.double().requires_grad_() for x in (one, two)]
    expected = [one.new_zeros(3, n, dtype=torch.float64) for n in (9, 7)]
    for b, (p, q) in enumerate(zip(*leaves, strict=True)):
        for here, (there, near, into) in ((p, (q, idx1, expected[0])), (q, (p, idx2, expected[1]))):
            for i, point in enumerate(here):
                squares = torch.stack([((point - other) ** 2).sum() for other in there])
                first = min(range(len(there)), key=squares.tolist().__getitem__)
                assert near[b, i] == first
                into[b, i] = squares[first]
    tolerance = dict(rtol=1e-5, atol=1e-6)
    for found, right in zip(dist, expected, strict=True):
        torch.testing.assert_close(found.double(), right.detach(), **tolerance)
    grads = [random(3, n, seed=n) for n in (9, 7)]
    right = torch.autograd.grad(expected, leaves, [grad.double() for grad in grads])
    into = [torch.zeros(x.shape, device=DEVICE) for x in (one, two)]
    ext.chamfer_distance_backward(one, two, idx1, idx2, *grads, *into)
    for found, exact in zip(into, right, strict=True):
        torch.testing.assert_close(found.double(), exact, **tolerance)
        assert exact.abs().amin(-1).max() > 0.1


def test_chamfer_distance_of_sets_without_points():
    some, none = random(2, 3, 2), random(2, 0, 2)
    assert [x.numel() for x in chamfer(none, none)] == [x.numel() for x in chamfer(some[:0], none[:0])] == [0] * 4
    for pair in ((some, none), (none, some)):
        with pytest.raises(RuntimeError, match=r"no nearest point: point sets of \d and \d points"):
            chamfer(*pair)


@pytest.mark.parametrize("aligned", [False, True])
def test_bbox_overlaps(aligned):
    boxes = random(8, 4).abs() * 5
    boxes[:, 2:] += boxes[:, :2]
    other = boxes.flip(0) + 0.5
    for mode, offset in itertools.product((0, 1), (0, 1)):
        ious = boxes.new_full((8,) if aligned else (8, 8), torch.nan)
        ext.bbox_overlaps(boxes, other, ious, mode=mode, aligned=aligned, offset=offset)
        for i, j in itertools.product(range(8), range(8)):
            (a1, b1, c1, d1), (a2, b2, c2, d2) = boxes[i].tolist(), other[j].tolist()
            inter = max(min(c1, c2) - max(a1, a2) + offset, 0) * max(min(d1, d2) - max(b1, b2) + offset, 0)
            area = [(c - a + offset) * (d - b + offset) for a, b, c, d in ((a1, b1, c1, d1), (a2, b2, c2, d2))]
            expected = inter / (area[0] if mode else sum(area) - inter)
            if i == j or not aligned:
                assert float(ious[i] if aligned else ious[i, j]) == pytest.approx(expected, abs=1e-6)


def test_nms_match():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 0, 30, 10], [0, 0, 10, 5], [20, 0, 30, 11]])
    dets = torch.cat([boxes, torch.tensor([[0.5], [0.9], [0.3], [0.8], [0.7]])], 1).to(DEVICE)
    assert ext.nms_match(dets, 0.6) == [[1, 0], [3], [4, 2]]  # best first
    assert ext.nms_match(dets, 0.5) == [[1, 3, 0], [4, 2]]  # what is suppressed, too
    assert ext.nms_match(dets[:0], 0.5) == []


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
def test_focal_losses(gamma, weighted):
    logits = random(6, 4, dtype=torch.float64) * 3
    target = torch.tensor([0, 3, 2, 1, 1, 0], device=DEVICE)
    weight = torch.tensor([1.0, 0.5, 2, 3], dtype=torch.float64, device=DEVICE)[: 4 if weighted else 0]
    row = weight[target] if weighted else torch.ones(6, dtype=torch.float64, device=DEVICE)
    alpha = 0.3
    sigmoid, softmax = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    p, hot = sigmoid.sigmoid(), torch.nn.functional.one_hot(target, 4)
    losses = -(hot * alpha * (1 - p) ** gamma * p.log() + (1 - hot) * (1 - alpha) * p**gamma * (1 - p).log())
    losses = losses * row[:, None]
    out, gradient = torch.full_like(losses, torch.nan), torch.full_like(logits, torch.nan)
    ext.sigmoid_focal_loss_forward(logits, target, weight, out, gamma=gamma, alpha=alpha)
    ext.sigmoid_focal_loss_backward(logits, target, weight, gradient, gamma=gamma, alpha=alpha)
    torch.testing.assert_close(out, losses.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(losses.sum(), sigmoid)[0])

    probabilities = softmax.softmax(1)
    p = probabilities[torch.arange(6), target]
    losses = -alpha * (1 - p) ** gamma * p.log() * row
    out, gradient, buffer = torch.full_like(p, torch.nan), torch.full_like(logits, torch.nan), torch.zeros_like(p)
    ext.softmax_focal_loss_forward(probabilities.detach(), target, weight, out, gamma=gamma, alpha=alpha)
    ext.softmax_focal_loss_backward(probabilities.detach(), target, weight, buffer, gradient, gamma=gamma, alpha=alpha)
    torch.testing.assert_close(out, losses.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(losses.sum(), softmax)[0])


def test_focal_losses_of_what_is_certain_or_of_no_class():
    logits = torch.tensor([[400.0, -400, 0], [-400, 400, 0]], device=DEVICE)
    none, gradient, out = (
        torch.zeros(0, device=DEVICE),
        torch.zeros(2, 3, device=DEVICE),
        torch.zeros(2, 3, device=DEVICE),
    )
    ext.sigmoid_focal_loss_forward(logits, torch.tensor([0, 3], device=DEVICE), none, out, gamma=2.0, alpha=0.25)
    ext.sigmoid_focal_loss_backward(logits, torch.tensor([0, -1], device=DEVICE), none, gradient, gamma=2.0, alpha=0.25)
    assert out.isfinite().all() and gradient.isfinite().all()
    assert out[0, 0] == 0 and out[1, 1] > 60  # ln of the least positive number, in place of ln 0
    losses = torch.full((2,), torch.nan, device=DEVICE)
    ext.softmax_focal_loss_forward(logits.softmax(1), torch.tensor([0, -1], device=DEVICE), none, losses, 2.0, 0.25)
    assert losses.tolist() == [0, 0]
    with pytest.raises((IndexError, RuntimeError)):
        ext.sigmoid_focal_loss_forward(logits, torch.tensor([0, 3]), torch.ones(3), out, gamma=2.0, alpha=0.25)
