"""NMS, padded and list-style, axis-aligned and rotated: against a plain greedy loop in float64."""

from __future__ import annotations

import itertools
import math
import os

import lowering
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lowering import TARGETS, needs_lowering, record_launches
from polygons import exact_iou
from torch.library import opcheck

from rtmdet_fast import ops
from rtmdet_fast.kernels import _dispatch, greedy_nms
from rtmdet_fast.kernels import nms as m
from rtmdet_fast.ops import torchvision as own_torchvision

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNS_TRITON = DEVICE == "cuda" or INTERPRETED
needs_triton = pytest.mark.skipif(not RUNS_TRITON, reason="needs CUDA or TRITON_INTERPRET=1")
pytestmark = pytest.mark.usefixtures("poison")
has_triton = pytest.mark.skipif(not _dispatch.AVAILABLE, reason="needs Triton")
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="torch.compile cannot trace an interpreted kernel")
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]  # all decide exactly, on the rounded boxes


@pytest.fixture(params=["reference", pytest.param("triton", marks=needs_triton)])
def backend(request, monkeypatch):
    for module in (m, greedy_nms):
        monkeypatch.setattr(module, "use_triton", lambda x: request.param == "triton")
    if INTERPRETED:  # a step of the interpreter costs the same for 1 row as for 32
        monkeypatch.setitem(m.TUNING, "rotated", {"ROWS": 32, "SPLIT": 2, "num_warps": 1})
    return request.param


def axis_iou(a, b):
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(w, 0) * max(h, 0)
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def greedy(boxes, scores, labels, iou_threshold):
    """Indices kept of boxes [N, 4 or 5], in Python floats, which are float64."""
    boxes, scores, labels = boxes.tolist(), scores.tolist(), labels.tolist()
    kept: list[int] = []
    for i in sorted(range(len(scores)), key=lambda i: (-scores[i], i) if scores[i] == scores[i] else (math.inf, i)):
        box = boxes[i]
        w, h = box[2:4] if len(box) == 5 else (box[2] - box[0], box[3] - box[1])
        if not (math.isfinite(scores[i]) and all(map(math.isfinite, box)) and w > 0 and h > 0 and labels[i] >= 0):
            continue
        iou = exact_iou if len(box) == 5 else axis_iou
        if all(labels[i] != labels[k] or iou(boxes[k], box) <= iou_threshold for k in kept):
            kept.append(i)
    return kept


def problem(*shape, rotated=False, classes=3, seed=0, size=100.0, dtype=torch.float32):
    """Boxes, scores (with ties) and labels [*shape]."""
    generator = torch.Generator().manual_seed(seed)
    xy, wh = (torch.rand(*shape, 2, generator=generator) for _ in range(2))
    wh = wh * 40 + 5
    angle = torch.rand(*shape, 1, generator=generator) * 6 - 3
    boxes = torch.cat([xy * size, wh, angle] if rotated else [xy * size, xy * size + wh], -1)
    scores = (torch.rand(*shape, generator=generator) * 50).round() / 50
    labels = torch.randint(0, classes, shape, generator=generator)
    return boxes.to(dtype).to(DEVICE), scores.to(dtype).to(DEVICE), labels.to(DEVICE)


def check(boxes, scores, labels, iou_threshold, max_keep):
    keep, counts = m.batched_nms_padded(boxes, scores, labels, iou_threshold, max_keep)
    assert keep.shape == (len(boxes), max_keep) and keep.dtype == counts.dtype == torch.int64
    for b in range(len(boxes)):
        expected = greedy(boxes[b], scores[b], labels[b], iou_threshold)[:max_keep]
        assert counts[b] == len(expected)
        assert keep[b].tolist() == expected + [-1] * (max_keep - len(expected))
    return counts


@pytest.mark.parametrize("rotated", [False, True], ids=["xyxy", "rotated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B, N, classes", [(1, 0, 1), (0, 4, 1), (2, 1, 1), (3, 63, 2), (1, 123, 1), (2, 130, 90)])
def test_parity(backend, rotated, dtype, B, N, classes):
    boxes, scores, labels = problem(B, N, rotated=rotated, classes=classes, dtype=dtype)
    counts = check(boxes, scores, labels, 0.3, N + 3)
    assert N < 63 or classes > 2 or (counts < N).all()
    check(boxes, scores, labels, 0.3, min(N, 7))


@pytest.mark.parametrize("iou_threshold", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("rotated", [False, True], ids=["xyxy", "rotated"])
def test_thresholds(backend, rotated, iou_threshold):
    check(*problem(1, 40, rotated=rotated, classes=2, size=40), iou_threshold, 40)


@pytest.mark.parametrize("classes", [1, 5, 40])
def test_reference_over_many_rounds(classes, monkeypatch):
    monkeypatch.setattr(m, "use_triton", lambda x: False)
    problems = problem(2, 900, classes=classes, size=250)
    for max_keep in (900, 100, 0):
        check(*problems, 0.5, max_keep)


def test_reference_stops_early_but_not_too_early():
    boxes, scores, labels = problem(1, 600, classes=1, size=250)
    expected = greedy(boxes[0], scores[0], labels[0], 0.5)
    for max_keep in range(len(expected) + 2):
        keep, _ = m.batched_nms_padded_reference(boxes, scores, labels, 0.5, max_keep)
        assert keep[0].tolist() == [*expected, -1, -1][:max_keep]


def test_columns_in_blocks(backend, monkeypatch):
    monkeypatch.setitem(m.TUNING, "words", 1)  # one tile of columns at a time; classes straddle the blocks
    check(*problem(2, 200, classes=2), 0.3, 200)


@pytest.mark.parametrize("size", [70, 300])
def test_adversarial(backend, size):
    one = torch.tensor([10.0, 10, 20, 20])
    falling = torch.linspace(1, 0.1, size)
    chain = one + torch.arange(size)[:, None] * torch.tensor([3.0, 0, 3, 0])  # each suppresses only the next
    identical = one.expand(size, 4)
    nested = torch.stack([one + torch.tensor([0.0, 0, i, i]) * 0.01 for i in range(size)])
    boxes = torch.stack([chain, identical, nested, chain.flip(0)]).to(DEVICE)
    scores = torch.stack([falling, torch.full((size,), 0.5), falling, falling.flip(0)]).to(DEVICE)
    counts = check(boxes, scores, torch.zeros(4, size, dtype=torch.int64, device=DEVICE), 0.5, size)
    assert counts.tolist()[:2] == [(size + 1) // 2, 1]


@pytest.mark.parametrize("rotated", [False, True], ids=["xyxy", "rotated"])
def test_at_the_threshold_a_box_stays(backend, rotated):
    """IoU exactly 1/3 and 1/2; float32 alone rounds 1/3 up, and would suppress."""
    boxes = [[1.0, 0.5, 2, 1, 0], [2.0, 0.5, 2, 1, 0]] if rotated else [[0.0, 0, 2, 1], [1.0, 0, 3, 1]]
    boxes = torch.tensor([boxes], device=DEVICE)
    args = torch.tensor([[0.9, 0.8]], device=DEVICE), torch.zeros(1, 2, dtype=torch.int64, device=DEVICE)
    assert m.batched_nms_padded(boxes, *args, 1 / 3, 2)[1].item() == 2
    assert m.batched_nms_padded(boxes, *args, math.nextafter(1 / 3, 0), 2)[1].item() == 1


inf, nan = math.inf, math.nan
BAD = [  # box, score, label
    *(
        (box, 0.9, 0)
        for box in (
            [0, 0, 0, 9],
            [0, 0, 9, 0],
            [9, 0, 0, 9],
            [9, 9, 0, 0],
            [nan, 0, 9, 9],
            [0, 0, inf, 9],
            [-inf, 0, 9, 9],
            [0, 0, 1e30, 1e30],
            [0, 0, 1e-25, 1e-25],
            [0, 0, 1e-19, 1e-20],
        )
    ),
    *(([0, 0, 9, 9], score, 0) for score in (nan, inf, -inf)),
    ([0, 0, 9, 9], 0.9, -1),
]


@pytest.mark.parametrize("rotated", [False, True], ids=["xyxy", "rotated"])
def test_unusable_rows_are_dropped_and_harm_nobody(backend, rotated):
    rows = [*BAD, *(([0, 0, 9, 9], score, 0) for score in (0.5, 0.4))]
    if rotated:
        rows = [
            ([*(0 if math.isfinite(v) else v for v in box[:2]), box[2] - box[0], box[3] - box[1], 0.5], s, c)
            for box, s, c in rows
        ] + [([0, 0, 9, 9, nan], 0.9, 0), ([0, 0, 9, 9, inf], 0.9, 0)]
    boxes, scores, labels = (torch.tensor(x, device=DEVICE)[None] for x in zip(*rows, strict=True))
    keep, counts = m.batched_nms_padded(boxes.float(), scores, labels, 0.5, 4)
    assert keep.tolist() == [[len(BAD), -1, -1, -1]] and counts.tolist() == [1]
    only_bad = (x[:, : len(BAD)] for x in (boxes.float(), scores, labels))
    keep, counts = m.batched_nms_padded(*only_bad, 0.5, 4)
    assert keep.tolist() == [[-1] * 4] and counts.tolist() == [0]


number = st.one_of(st.integers(0, 6).map(float), st.sampled_from([nan, inf, -inf, 1e-3, 1e6]))
a_box = st.tuples(number, number, number, number)
a_row = st.tuples(a_box, st.sampled_from([0.1, 0.5, 0.5, nan, inf]), st.integers(-1, 2))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(a_row, max_size=40), st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 0.65, 1.0]))
def test_any_rows(rows, iou_threshold):
    """Small integers: many identical boxes, and IoUs at the threshold."""
    boxes = torch.tensor([row[0] for row in rows]).view(-1, 4)
    scores, labels = torch.tensor([row[1] for row in rows]), torch.tensor([row[2] for row in rows], dtype=torch.int64)
    keep, counts = m.batched_nms_padded_reference(boxes[None], scores[None], labels[None], iou_threshold, len(rows))
    assert keep[0, : counts[0]].tolist() == greedy(boxes, scores, labels, iou_threshold)


def test_far_boxes_and_labels_lose_no_precision(backend):
    """With coordinate offsets, label 10,000 would move these boxes to where float32 has steps of 8 px."""
    boxes, scores, _ = problem(1, 60, classes=1)
    labels = torch.full((1, 60), 10_000, device=DEVICE)
    check(boxes + 20_000, scores, labels, 0.5, 60)


def test_non_contiguous(backend):
    boxes, scores, labels = problem(2, 50)
    expected = m.batched_nms_padded(boxes, scores, labels, 0.3, 50)
    strided = boxes.permute(2, 1, 0).contiguous().permute(2, 1, 0), scores.T.contiguous().T, labels.T.contiguous().T
    assert not any(x.is_contiguous() for x in strided)
    for a, b in zip(m.batched_nms_padded(*strided, 0.3, 50), expected, strict=True):
        assert torch.equal(a, b)


def test_needs_no_gradient(backend):
    boxes, scores, labels = problem(1, 20)
    keep, _ = m.batched_nms_padded(boxes.requires_grad_(), scores.requires_grad_(), labels, 0.3, 20)
    assert not keep.requires_grad


def test_mmcv_forms(backend):
    boxes, scores, labels = (x[0] for x in problem(1, 60))
    scores = scores + torch.arange(60, device=DEVICE) * 1e-4  # of equal scores either may come first
    everything = torch.zeros_like(labels)
    dets, keep = ops.nms(boxes, scores, 0.3)
    assert keep.tolist() == greedy(boxes, scores, everything, 0.3)
    assert torch.equal(dets, torch.cat([boxes[keep], scores[keep, None]], 1))
    assert ops.nms(boxes, scores, 0.3, max_num=5)[1].tolist() == keep.tolist()[:5]
    above = scores.masked_fill(scores <= 0.5, -math.inf)
    assert ops.nms(boxes, scores, 0.3, score_threshold=0.5)[1].tolist() == greedy(boxes, above, everything, 0.3)
    inclusive = boxes + torch.tensor([0, 0, 1, 1], device=DEVICE)
    assert ops.nms(boxes, scores, 0.3, offset=1)[1].tolist() == greedy(inclusive, scores, everything, 0.3)
    dets, keep = ops.nms(boxes.cpu().numpy(), scores.cpu().numpy(), 0.3)
    assert keep.tolist() == ops.nms(boxes, scores, 0.3)[1].tolist() and dets.shape == (len(keep), 5)

    cfg = {"type": "nms", "iou_threshold": 0.3}
    dets, keep = ops.batched_nms(boxes, scores, labels - 5, cfg)
    assert keep.tolist() == greedy(boxes, scores, labels, 0.3) and dets.shape == (len(keep), 5)
    assert ops.batched_nms(boxes, scores, labels, cfg | {"max_num": 4})[1].tolist() == keep.tolist()[:4]
    agnostic = greedy(boxes, scores, everything, 0.3)
    assert ops.batched_nms(boxes, scores, labels, cfg, class_agnostic=True)[1].tolist() == agnostic
    assert ops.batched_nms(boxes, scores, labels, cfg | {"class_agnostic": True})[1].tolist() == agnostic
    dets, keep = ops.batched_nms(boxes, scores, labels, None)
    assert torch.equal(dets[:, 4], scores.sort(descending=True).values) and len(keep) == 60

    boxes = problem(1, 60, rotated=True)[0][0]
    dets, keep = ops.nms_rotated(boxes, scores, 0.3)
    assert keep.tolist() == greedy(boxes, scores, everything, 0.3) and dets.shape == (len(keep), 6)
    assert ops.nms_rotated(boxes, scores, 0.3, labels.float())[1].tolist() == greedy(boxes, scores, labels, 0.3)
    flip = torch.tensor([1.0, 1, 1, 1, -1], device=DEVICE)
    dets, keep = ops.nms_rotated(boxes, scores, 0.3, clockwise=False)
    assert keep.tolist() == greedy(boxes * flip, scores, everything, 0.3) and torch.equal(dets[:, :5], boxes[keep])
    cfg = {"type": "nms_rotated", "iou_threshold": 0.3}
    assert ops.batched_nms(boxes, scores, labels, cfg)[1].tolist() == greedy(boxes, scores, labels, 0.3)


def test_what_mmcv_takes(backend):
    """Each as the compiled mmcv 2.1.0 answers it."""
    boxes, scores, labels = (x[0] for x in problem(1, 49, seed=3))
    scores = torch.randperm(49, device=DEVICE) / 49
    cfg = {"type": "nms", "iou_threshold": 0.3}
    expected = ops.batched_nms(boxes, scores, labels, cfg)[1].tolist()
    for idxs in (labels.float(), labels.half(), labels.int()):
        assert ops.batched_nms(boxes, scores, idxs, cfg)[1].tolist() == expected
    two = greedy(boxes, scores, (labels > 0).long(), 0.3)
    assert ops.batched_nms(boxes, scores, labels > 0, cfg)[1].tolist() == two
    split = cfg | {"split_thr": 49, "class_agnostic": True}  # class by class, though told not to
    assert ops.batched_nms(boxes, scores, labels, split)[1].tolist() == expected
    split |= {"max_num": 5, "score_threshold": 0.2}
    assert ops.batched_nms(boxes, scores, labels, split)[1].tolist() == expected[:5]
    with pytest.warns(DeprecationWarning, match="iou_thr"):
        assert ops.nms(boxes, scores, iou_thr=0.3)[1].tolist() == ops.nms(boxes, scores, 0.3)[1].tolist()
    with pytest.warns(DeprecationWarning, match="iou_thr"):
        assert ops.batched_nms(boxes, scores, labels, {"iou_thr": 0.3})[1].tolist() == expected
    by_score = scores.argsort(descending=True).tolist()
    for threshold in (1.5, math.inf, nan):
        assert ops.nms(boxes, scores, threshold)[1].tolist() == by_score
        assert ops.nms_rotated(torch.cat([boxes, boxes[:, :1]], 1), scores, threshold)[1].tolist() == by_score
    assert ops.nms(boxes, scores, -0.1)[1].tolist() == by_score[:1]
    rotated = torch.cat([boxes[:, :2], boxes[:, :2] * 0 + 5, boxes[:, :1]], 1)
    assert ops.nms_rotated(rotated, scores, -0.1)[1].tolist() == by_score[:1]
    for none in (torch.zeros(0, 5), torch.zeros(0)):
        dets, keep = ops.nms_rotated(none, none[:0], 0.5)
        assert dets is none and keep is None
    assert ops.nms(boxes[:0], scores[:0], 0.5)[0].shape == (0, 5)
    assert ops.batched_nms(boxes[:0], scores[:0], labels[:0], cfg)[0].shape == (0, 5)


ODD = [
    [0, 0, 0, 9],
    [0, 0, 9, 0],
    [9, 9, 0, 0],
    [nan, 0, 9, 9],
    [0, 0, inf, 9],
    [0, 0, 9, 9],
    [0, 0, 9, 8],
    [0, 0, 9, 9.0],
]


def test_boxes_and_scores_that_our_own_op_drops_are_kept(backend):
    boxes, scores = torch.tensor(ODD, device=DEVICE), torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, inf, 0.3, -inf])
    scores = scores.to(DEVICE)
    assert ops.nms(boxes, scores, 0.5)[1].tolist() == [5, 0, 1, 2, 3, 4]
    assert own_torchvision.nms(boxes, scores, 0.5).tolist() == [5, 0, 1, 2, 3, 4]
    assert ops.nms(boxes[5:], torch.tensor([-inf, nan, 0.1], device=DEVICE), 0.9)[1].tolist() == [1, 2]
    assert ops.batched_nms(boxes, scores, torch.zeros(8, device=DEVICE), {"iou_threshold": 0.5})[1].tolist() == (
        [5, 0, 1, 2, 3, 4, 6, 7]  # moved by 0 x NaN: none of them is anywhere
    )
    rotated = torch.tensor([[5, 5, 0, 4, 0], [5, 5, 4, 4, nan], [5, 5, -4, -4, 0], [5, 5, 4, 4, 0], [5, 5, -4, 4, 0.0]])
    rotated = rotated.to(DEVICE)
    assert ops.nms_rotated(rotated, scores[:5], 0.5)[1].tolist() == [0, 1, 2, 4]


@pytest.mark.skipif(RUNS_TRITON, reason="on a GPU the originals' rounding is the compiler's")
def test_at_the_threshold_the_originals_round():
    """IoU of 3/5 in float32 is above 0.6 in float64, and is 0.6 in float32."""
    boxes, scores = torch.tensor([[0.0, 0, 4, 1], [1.0, 0, 5, 1]]), torch.tensor([0.9, 0.8])
    assert len(ops.nms(boxes, scores, 0.6)[1]) == 2 and len(own_torchvision.nms(boxes, scores, 0.6)) == 1
    assert len(own_torchvision.nms(boxes.double(), scores.double(), 0.6)) == 2


def greedy_in_float32(boxes, scores, labels, threshold):
    """As the originals' loops."""
    order, kept = scores.sort(descending=True, stable=True).indices.tolist(), []
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    inter = torch.minimum(boxes[:, None, 2:], boxes[:, 2:]) - torch.maximum(boxes[:, None, :2], boxes[:, :2])
    inter = inter.clamp(min=0).prod(2)
    above = (inter / (area[:, None] + area - inter) > threshold) & (labels[:, None] == labels)
    for i in order:
        if not above[kept, i].any():
            kept.append(i)
    return kept


@pytest.mark.skipif(RUNS_TRITON, reason="on a GPU the originals' rounding is the compiler's")
@pytest.mark.parametrize("few", [1, 10**6], ids=["rounds", "NumPy"])
@pytest.mark.parametrize("classes", [1, 40])
def test_lists_long_and_short(few, classes, monkeypatch):
    for name in ("numpy", "numpy_grouped"):
        monkeypatch.setitem(greedy_nms.TUNING, name, few)
    boxes, _, labels = (x[0] for x in problem(1, 1500, classes=classes, size=300))
    boxes[:700] = boxes[:700].round() - 20  # IoUs at the threshold; boxes that reach into the class before
    boxes[-1], boxes[-2, 2:] = nan, boxes[-2, :2]
    scores = torch.randperm(1500) / 1500
    for threshold in (0.5, 0.3):
        kept = greedy_in_float32(boxes, scores, labels, threshold)
        assert greedy_nms.greedy_nms(boxes, scores, threshold, labels).tolist() == kept
        moved, groups = greedy_nms.move_apart(boxes[:-1], labels[:-1], threshold)
        kept = greedy_in_float32(moved, scores[:-1], torch.zeros(1499), threshold)
        assert greedy_nms.greedy_nms(moved, scores[:-1], threshold, groups).tolist() == kept
        assert few > 1 or classes == 1 or groups.unique().numel() > 10


@pytest.mark.parametrize("rotated", [False, True], ids=["xyxy", "rotated"])
def test_classes_that_may_meet_are_one_group(rotated):
    boxes, _, labels = (x[0] for x in problem(1, 2000, classes=30, size=60, rotated=rotated))
    boxes[:, :2] -= 25
    moved, groups = greedy_nms.move_apart(boxes, labels.float(), 0.5)
    assert (groups[labels.argsort()].diff() >= 0).all() and groups.unique().numel() < 30
    low, high = (moved[:, :2], moved[:, 2:4])
    if rotated:
        radius = moved[:, 2:4].norm(dim=1, keepdim=True) / 2
        low, high = moved[:, :2] - radius, moved[:, :2] + radius
    meet = (torch.minimum(high[:, None], high) > torch.maximum(low[:, None], low)).all(2)
    assert (meet & (labels[:, None] != labels)).any()
    assert not (meet & (groups[:, None] != groups)).any()
    assert greedy_nms.move_apart(boxes, labels * 0.3, 0.5)[1] is None  # classes so near meet beyond their neighbours
    assert greedy_nms.move_apart(boxes, labels, -0.5)[1] is None


def test_soft_nms_lowers_scores():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0.0, 0, 10, 5], [20.0, 0, 30, 10], [0, 0, 10, 10]])
    scores = torch.tensor([0.5, 0.8, 0.6, 0.1])
    for method, first, second in (("naive", 0, 0), ("linear", 0.25, 0.0), ("gaussian", 0.5 * math.exp(-0.5), 0.1)):
        dets, keep = ops.soft_nms(boxes, scores, 0.3, 0.5, 0.02, method)
        lowered = dict(zip(keep.tolist(), dets[:, 4].tolist(), strict=True))
        assert lowered[1] == pytest.approx(0.8) and lowered[2] == pytest.approx(0.6)
        assert lowered.get(0, 0) == pytest.approx(first) and torch.equal(dets[:, :4], boxes[keep])
        assert (lowered.get(3, 0) > 0) == (second < 0)
    dets, keep = ops.soft_nms(boxes.numpy(), scores.numpy())
    assert keep.tolist() == [1, 2, 0, 3][: len(keep)] and dets.dtype == np.float32
    cfg = {"type": "soft_nms", "iou_threshold": 0.3, "min_score": 0.02}
    labels = torch.tensor([0, 1, 0, 0])
    dets, keep = ops.batched_nms(boxes, scores, labels, cfg)
    assert keep.tolist() == [1, 2, 0] and torch.equal(dets[:, 4], scores[keep])
    assert ops.batched_nms(boxes, scores, labels, cfg | {"split_thr": 2})[1].tolist() == [1, 2, 0]


def test_torchvision_forms(backend):
    boxes, scores, labels = (x[0] for x in problem(1, 60))
    everything = torch.zeros_like(labels)
    assert own_torchvision.nms(boxes, scores, 0.3).tolist() == greedy(boxes, scores, everything, 0.3)
    expected = greedy(boxes, scores, labels, 0.3)
    for idxs in (labels, labels.float(), labels - 7):
        assert own_torchvision.batched_nms(boxes, scores, idxs, 0.3).tolist() == expected
    boxes, scores, labels = (x[0] for x in problem(1, 1100, size=500))  # class by class
    scores = torch.randperm(1100, device=DEVICE) / 1100
    if not INTERPRETED:
        assert own_torchvision.batched_nms(boxes, scores, labels, 0.3).tolist() == greedy(boxes, scores, labels, 0.3)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")  # deprecated in torch 2.13
def test_what_torchvision_takes_and_refuses():
    none = torch.empty(0, dtype=torch.int64)
    assert torch.equal(own_torchvision.batched_nms(none, None, None, None), none)
    boxes, scores = (torch.rand(5, 4).cumsum(1) * 20).round(), torch.arange(5) / 5
    quantized = [torch.quantize_per_tensor(x, 0.2, 0, torch.quint8) for x in (boxes, scores)]
    expected = own_torchvision.nms(*(x.dequantize() for x in quantized), 0.5)
    assert torch.equal(own_torchvision.nms(*quantized, 0.5), expected)
    for wrong in (
        (torch.rand(4), scores[:1]),
        (torch.rand(0), torch.rand(0)),
        (torch.rand(5, 5), scores),
        (boxes, torch.rand(5, 2)),
        (boxes, scores[:4]),
        (boxes, scores.double()),
        (boxes.long(), scores.long()),
    ):
        with pytest.raises(RuntimeError, match=r"boxes (have|are)|scores have"):
            own_torchvision.nms(*wrong, 0.5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"boxes": torch.zeros(4, 4)}, "boxes have shape"),
        ({"boxes": torch.zeros(1, 4, 6)}, "boxes have shape"),
        ({"scores": torch.zeros(1, 3)}, "scores have shape"),
        ({"labels": torch.zeros(1, 5, dtype=torch.int64)}, "labels have shape"),
        ({"labels": torch.zeros(1, 4)}, "labels are torch.float32"),
        ({"boxes": torch.zeros(1, 4, 4).long()}, "boxes are torch.int64"),
        ({"scores": torch.zeros(1, 4).long()}, "scores are torch.int64"),
        ({"scores": torch.zeros(1, 4, device="meta")}, "scores are on meta"),
        ({"iou_threshold": 1.5}, "iou_threshold="),
        ({"iou_threshold": nan}, "iou_threshold="),
        ({"max_keep": -1}, "max_keep="),
    ],
)
def test_bad_input_names_the_argument(change, message):
    args = {
        "boxes": torch.zeros(1, 4, 4),
        "scores": torch.zeros(1, 4),
        "labels": torch.zeros(1, 4, dtype=torch.int64),
        "iou_threshold": 0.5,
        "max_keep": 4,
    } | change
    with pytest.raises((ValueError, TypeError), match=message):
        m.batched_nms_padded(**args)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda b, s: ops.nms(b, s, 0.5, offset=2), "offset="),
        (lambda b, s: ops.nms(b[:, :3], s, 0.5), "boxes have shape"),
        (lambda b, s: ops.nms(b, s[:2], 0.5), "4 boxes, 2 scores"),
        (lambda b, s: ops.nms(b.tolist(), s, 0.5), "boxes are list"),
        (lambda b, s: ops.nms(b, s, iou_thr=0.5, iou_threshold=0.5), "give one of them"),
        (lambda b, s: ops.soft_nms(b, s, method="cubic"), "method="),
        (lambda b, s: ops.batched_nms(b, s, s, {"type": "nms_quadri", "iou_threshold": 0.5}), "nms_cfg has type"),
        (lambda b, s: ops.batched_nms(b, s, s, {"type": "nms"}), "iou_threshold"),
        (lambda b, s: ops.batched_nms(b, s, s, {"iou_threshold": 0.5, "nms_pre": 9}), "nms_pre"),
    ],
)
def test_bad_lists_name_the_argument(call, message):
    """With mmcv's types of error."""
    with pytest.raises((AssertionError, NotImplementedError, TypeError), match=message):
        call(torch.zeros(4, 4), torch.zeros(4))


@needs_triton
def test_opcheck():
    tests = ["test_schema", "test_autograd_registration"] + ["test_faketensor"] * (not INTERPRETED)
    opcheck(m._batched_nms.library_op, (*problem(2, 9), 0.3, 5), test_utils=tests)


def test_opcheck_of_the_reference():
    opcheck(m.batched_nms_padded_reference, (*problem(2, 9), 0.3, 5))


@not_interpreted
@pytest.mark.parametrize("triton", [False, pytest.param(True, marks=has_triton)], ids=["reference", "triton"])
def test_compiles_and_exports_without_graph_break(triton, monkeypatch):
    monkeypatch.setattr(m, "use_triton", lambda x: triton)

    class Nms(torch.nn.Module):
        def forward(self, boxes, scores, labels):
            return m.batched_nms_padded(boxes * 2, scores, labels, 0.3, 20)

    args = problem(2, 50)
    exported = torch.export.export(Nms(), args)
    assert ("rtmdet_fast.batched_nms.default" in str(exported)) == triton
    if triton and DEVICE != "cuda":
        return
    expected = Nms()(*args)
    compiler = "inductor" if DEVICE == "cuda" else "aot_eager"  # the C++ compiler takes its time
    compiled = torch.compile(Nms(), fullgraph=True, backend=compiler)(*args)
    for a, b, c in zip(expected, compiled, exported.module()(*args), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs CUDA")
@pytest.mark.parametrize("rotated", [False, True], ids=["xyxy", "rotated"])
@pytest.mark.parametrize("B, N, classes", [(32, 1000, 80), (8, 5000, 80), (1, 30_000, 80), (2, 5000, 1)])
def test_real_shapes_equal_the_reference_twice_and_in_a_cuda_graph(rotated, B, N, classes):
    args = problem(B, N, rotated=rotated, classes=classes, size=640)
    run = lambda: m._batched_nms(*args, 0.65, 300)  # noqa: E731 - captured below
    expected = m.batched_nms_padded_reference(*args, 0.65, 300)
    for _ in range(2):
        assert all(map(torch.equal, run(), expected))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    assert all(map(torch.equal, captured, expected))


@needs_lowering
@pytest.mark.parametrize("target", TARGETS)
def test_lowering(target, monkeypatch):
    monkeypatch.setitem(lowering._TYPES, torch.float64, "fp64")
    launches = record_launches(monkeypatch, m)
    for dtype, rotated in itertools.product((torch.float32, torch.float64), (False, True)):
        m._batched_nms(*problem(2, 96, rotated=rotated, dtype=dtype), 0.5, 96)
    used = {launch: launch.lower(target) for launch in dict.fromkeys(launches)}
    assert len(used) == 5  # the scan has no variants
    for launch, resources in used.items():
        assert resources.spills == 0
        assert resources.registers <= (64 if launch.kernel is m._scan_kernel else 144)
