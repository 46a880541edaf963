from __future__ import annotations

import itertools
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lowering import TARGETS, lower, needs_lowering
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rtmdet_fast.kernels import assign as m
from rtmdet_fast.kernels import assign_torch, assign_triton
from rtmdet_fast.kernels._dispatch import at_once, use_triton
from rtmdet_fast.kernels.rotated_iou import box_iou_rotated_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON = use_triton(torch.empty(0, device=DEVICE))
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="too slow, or not possible, under Triton's interpreter")

# of the IoU; the inputs are rounded before both sides see them
TOL = {torch.float32: 2e-6, torch.float16: 2e-6, torch.bfloat16: 2e-6, torch.float64: 1e-12}
ASSIGN: dict[str, Any] = {
    "soft_label": m.dynamic_soft_label_assign,
    "simota": m.simota_assign,
    "task_aligned": m.task_aligned_assign,
    "atss": lambda boxes, scores, *problem, **options: m.atss_assign(boxes, *problem, strides=(8, 16, 32), **options),
}


# --- the oracle: one image, float64, a cost of [N, M, C], plain loops


def naive(
    cost_name: str,
    boxes: Tensor,
    scores: Tensor,
    priors: Tensor,
    gt: Tensor,
    labels: Tensor,
    centers: Tensor | None = None,
    noise: float = 0.0,
) -> tuple[Tensor, Tensor, float]:
    """Assigned ground truth [N] or -1, IoU [N], and the least relative margin by which anything was decided."""
    if cost_name == "atss":
        return naive_atss(boxes, priors, gt, noise=noise)
    boxes, scores, priors, gt = boxes.double(), scores.double(), priors.double(), gt.double()
    (N, C), M = scores.shape, len(gt)
    assigned, assigned_iou, margin = torch.full((N,), -1), torch.zeros(N, dtype=torch.float64), math.inf
    if M == 0:
        return assigned, assigned_iou, margin
    point, stride = priors[:, None, :2], priors[:, None, 2]
    if gt.shape[1] == 5:
        center, (dx, dy), angle = gt[:, :2], (point - gt[:, :2]).unbind(-1), gt[:, 4]
        along = torch.stack([dx * angle.cos() + dy * angle.sin(), dy * angle.cos() - dx * angle.sin()], -1)
        depth = (gt[:, 2:4] / 2 - along.abs()).amin(-1)
        clamped = torch.cat([gt[:, :2], gt[:, 2:4].clamp(min=1e-3), gt[:, 4:]], 1)
        iou = box_iou_rotated_reference(boxes, clamped)
    else:
        center = (gt[:, :2] + gt[:, 2:]) / 2
        depth = torch.cat([point - gt[:, :2], gt[:, 2:] - point], -1).amin(-1)
        iou = upright_iou(boxes, gt)
    iou = iou + noise * torch.rand(iou.shape, dtype=iou.dtype, generator=torch.Generator().manual_seed(0))
    center = center if centers is None else centers.double()
    one_hot = F.one_hot(labels, C).double()[None]
    x = scores[:, None].expand(N, M, C)
    if cost_name == "soft_label":
        inside, topk = (depth > (0.01 if gt.shape[1] == 5 else 0)).any(1), 13
        target = one_hot * iou[..., None]
        cost = F.binary_cross_entropy_with_logits(x, target, reduction="none") * (target - x.sigmoid()) ** 2
        cost = cost.sum(-1) - 3 * (iou + 1e-7).log() + 10 ** ((point - center).norm(dim=-1) / stride - 3)
    elif cost_name == "simota":
        in_square = (point - center).abs().amax(-1) < 2.5 * stride
        inside, topk = ((depth > 0) | in_square).any(1), 10
        cost = F.binary_cross_entropy(x, one_hot.expand_as(x), reduction="none").sum(-1)
        cost += -3 * (iou + 1e-7).log() + 1e5 * ~((depth > 0) & in_square)
    else:
        inside, topk = torch.ones(N, dtype=torch.bool), 13
        cost = -scores[:, labels] * iou**6
    candidates = inside.nonzero()[:, 0].tolist()
    winners: dict[int, list[int]] = {i: [] for i in candidates}
    for j in range(M):
        order = sorted(candidates, key=lambda i: cost[i, j].item())
        total = iou[candidates, j].sort(descending=True).values[:topk].sum().item()
        k = topk if cost_name == "task_aligned" else max(int(total), 1)
        if cost_name != "task_aligned" and total > 1e-3:
            margin = min(margin, abs(total - round(total)) if total > 0.9 else 1)
        if k < len(order):
            ahead, behind = cost[order[k - 1], j].item(), cost[order[k], j].item()
            if cost_name != "task_aligned" or ahead < 0:
                scale = -ahead if cost_name == "task_aligned" else resolution(ahead)
                margin = min(margin, (behind - ahead) / scale)
        for i in order[:k]:
            if cost_name != "task_aligned" or (cost[i, j] < 0 and depth[i, j] > 0.01):
                winners[i].append(j)
    for i, won in winners.items():
        if len(won) > 1:
            value = -iou[i] if cost_name == "task_aligned" else cost[i]
            rivals = sorted(won if cost_name == "task_aligned" else range(M), key=lambda j: value[j].item())
            margin = min(margin, (value[rivals[1]] - value[rivals[0]]).item() / resolution(value[rivals[0]].item()))
            won[:] = rivals[:1]
        if won:
            assigned[i], assigned_iou[i] = won[0], iou[i, won[0]]
    return assigned, assigned_iou, margin


def naive_atss(
    boxes: Tensor, priors: Tensor, gt: Tensor, scale: float = 8.0, topk: int = 9, noise: float = 0.0
) -> tuple[Tensor, Tensor, float]:
    """`naive` of ATSS, step by step as its paper has it."""
    boxes, priors, gt = boxes.double(), priors.double(), gt.double()
    rotated, N = gt.shape[1] == 5, len(priors)
    side = scale * priors[:, 2:3]
    if rotated:
        anchors = torch.cat([priors[:, :2], side, side, 0 * side], 1)
        gt = torch.cat([gt[:, :2], gt[:, 2:4].clamp(min=1e-3), gt[:, 4:]], 1)
    else:
        anchors = torch.cat([priors[:, :2] - side / 2, priors[:, :2] + side / 2], 1)
    overlaps, predicted = (
        (box_iou_rotated_reference if rotated else upright_iou)(these, gt) for these in (anchors, boxes)
    )
    overlaps += noise * torch.rand(overlaps.shape, dtype=overlaps.dtype, generator=torch.Generator().manual_seed(0))
    center = gt[:, :2] if rotated else (gt[:, :2] + gt[:, 2:]) / 2
    size, angle = (gt[:, 2:4], gt[:, 4]) if rotated else (gt[:, 2:] - gt[:, :2], 0 * gt[:, 0])
    dx, dy = (priors[:, None, :2] - center).unbind(-1)  # [N, M]
    inside = torch.minimum(
        size[:, 0] / 2 - (dx * angle.cos() + dy * angle.sin()).abs(),
        size[:, 1] / 2 - (dy * angle.cos() - dx * angle.sin()).abs(),
    )
    distances, insides = (dx**2 + dy**2).T.tolist(), (inside - 0.01).T.tolist()
    levels = [(priors[:, 2] == stride).nonzero()[:, 0].tolist() for stride in (8, 16, 32)]
    won: dict[int, list[tuple[float, int]]] = {}
    margin = math.inf
    for j, (distance, inner, ious) in enumerate(zip(distances, insides, overlaps.T.tolist(), strict=True)):
        near = []
        for level in levels:
            order = sorted(level, key=lambda i: (distance[i], i))
            near += order[:topk]
            if len(order) > topk:  # of equally near ones the first
                ahead, behind = distance[order[topk - 1]], distance[order[topk]]
                margin = min(margin, (behind - ahead) / behind if behind > ahead else 1)
        values = [ious[i] for i in near]
        threshold = statistics.mean(values) + (statistics.stdev(values) if len(values) > 1 else 0)
        for i, value in zip(near, values, strict=True):
            if threshold > 0 and max(values) - min(values) > 1e-9 and inner[i] > -1e-3:
                margin = min(margin, abs(value - threshold) / threshold, abs(inner[i]))
            if value >= threshold * (1 - 1e-9) and inner[i] > 0:
                won.setdefault(i, []).append((-value, j))
    assigned, assigned_iou = torch.full((N,), -1), torch.zeros(N, dtype=torch.float64)
    for i, claims in won.items():
        first, *others = sorted(claims)
        margin = min([margin, *(other[0] - first[0] for other in others if other[0] > first[0])])
        assigned[i], assigned_iou[i] = first[1], predicted[i, first[1]]
    return assigned, assigned_iou, margin


def upright_iou(boxes: Tensor, gt: Tensor) -> Tensor:
    """IoU [N, M] of xyxy boxes."""
    sides = torch.minimum(boxes[:, None, 2:], gt[:, 2:]) - torch.maximum(boxes[:, None, :2], gt[:, :2])
    inter = sides.clamp(min=0).prod(-1)
    area, gt_area = (boxes[:, 2:] - boxes[:, :2]).prod(-1), (gt[:, 2:] - gt[:, :2]).prod(-1)
    return inter / (area[:, None] + gt_area - inter).clamp(min=1e-6)


def resolution(cost: float) -> float:
    """What a margin is relative to. SimOTA's penalty of 1e5 leaves steps of 1/128, of which a margin has to be 4."""
    return max(abs(cost), 1) if cost < 5e4 else 1500


def make_priors(size: int) -> Tensor:
    priors = []
    for stride in (8, 16, 32):
        y, x = torch.meshgrid(*[torch.arange(0, size, stride)] * 2, indexing="ij")
        priors.append(torch.stack([x, y, *[torch.full_like(x, stride)] * 2], -1).view(-1, 4))
    return torch.cat(priors).float()


def make_problem(
    seed: int,
    B: int = 2,
    size: int = 64,
    M: int = 7,
    C: int = 5,
    *,
    rotated: bool = False,
    cover: bool = False,
    probabilities: bool = False,
) -> list[Tensor]:
    """boxes, logits (or probabilities), priors, gt_boxes, gt_labels, gt_counts, of what a half-trained model says."""
    rng = torch.Generator().manual_seed(seed)
    priors = make_priors(size)
    N = len(priors)
    sides = size * torch.exp(torch.rand(B, M, 2, generator=rng) * math.log(8)) / 16
    center = torch.rand(B, M, 2, generator=rng) * size
    if cover:
        sides[:, 0], center[:, 0] = 2.1 * size, size / 2
    labels = torch.randint(0, C, (B, M), generator=rng)
    # every other prediction is near a ground truth at random, the others are about the size of their stride
    own = torch.randint(0, max(M, 1), (B, N), generator=rng) if M else torch.zeros(B, N, dtype=torch.long)
    box_center = priors[:, :2] + torch.randn(B, N, 2, generator=rng) * priors[:, 2:]
    box_sides = priors[:, 2:] * 2 * torch.exp(torch.randn(B, N, 2, generator=rng) * 0.5)
    if M:
        index = own[..., None].expand(-1, -1, 2)
        near = (priors[:, :2] - center.gather(1, index)).abs().amax(-1, keepdim=True) < 1.5 * priors[:, 2:3]
        near = near | (torch.rand(B, N, 1, generator=rng) < 0.2)
        noise = torch.randn(B, N, 4, generator=rng) * 0.1
        box_center = torch.where(near, center.gather(1, index) + noise[..., :2] * sides.gather(1, index), box_center)
        box_sides = torch.where(near, sides.gather(1, index) * noise[..., 2:].exp(), box_sides)
    logits = torch.randn(B, N, C, generator=rng) * 1.6 - 3
    if M:
        logits.scatter_add_(2, labels.gather(1, own)[..., None], 2 * torch.rand(B, N, 1, generator=rng))
    if rotated:
        gt = torch.cat([center, sides, torch.rand(B, M, 1, generator=rng) * 3 - 1.5], -1)
        boxes = torch.cat([box_center, box_sides, torch.rand(B, N, 1, generator=rng) * 3 - 1.5], -1)
    else:
        gt = torch.cat([center - sides / 2, center + sides / 2], -1)
        boxes = torch.cat([box_center - box_sides / 2, box_center + box_sides / 2], -1)
    counts = torch.tensor([M if b % 2 == 0 else M // 2 for b in range(B)])
    for b, count in enumerate(counts.tolist()):  # what stands in the padding must not matter
        gt[b, count:], labels[b, count:] = math.nan, 10**6
    return [boxes, logits.sigmoid() if probabilities else logits, priors, gt, labels, counts]


def solved(cost: str, dtype: torch.dtype = torch.float32, **kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """A problem in `dtype` that rounding cannot decide, and the oracle's answer (assigned, IoU, labels).

    Near IoU 0 the cost follows log(IoU + 1e-7), and a rotated IoU has an error of 2e-7 in float32: that must not
    decide either.
    """
    for seed in itertools.count():
        problem = make_problem(seed, probabilities=cost != "soft_label", **kwargs)
        problem = [x.to(dtype) if x.is_floating_point() else x for x in problem]
        boxes, scores, priors, gt, labels, counts = problem
        answers = [
            naive(cost, boxes[b], scores[b], priors, gt[b, :n], labels[b, :n]) for b, n in enumerate(counts.tolist())
        ]
        if min(margin for *_, margin in answers) < 2e-5:
            continue
        if not kwargs.get("rotated") or all(
            torch.equal(answer[0], naive(cost, boxes[b], scores[b], priors, gt[b, :n], labels[b, :n], noise=3e-7)[0])
            for b, (n, answer) in enumerate(zip(counts.tolist(), answers, strict=True))
        ):
            break
    assigned, iou = (torch.stack([answer[i] for answer in answers]) for i in (0, 1))
    label = torch.full_like(assigned, -1)
    if gt.shape[1]:
        label = torch.where(assigned < 0, -1, labels.gather(1, assigned.clamp(min=0)))
    return [x.to(DEVICE) for x in problem], [assigned.to(DEVICE), iou.to(DEVICE), label.to(DEVICE)]


def check(out: tuple[Tensor, ...], expected: list[Tensor], dtype: torch.dtype = torch.float32) -> None:
    assert torch.equal(out[0], expected[0])
    torch.testing.assert_close(out[1].double(), expected[1], rtol=0, atol=TOL[dtype])
    assert torch.equal(out[2], expected[2])
    assert out[0].dtype == out[2].dtype == torch.int64
    assert out[1].dtype == torch.promote_types(dtype, torch.float32)


# --- parity

SHAPES = [  # 21, 84, 189 and 525 priors
    dict(B=1, size=32, M=1, C=1),
    dict(B=3, size=64, M=4 if INTERPRETED else 7, C=80),
    dict(B=1, size=96, M=9 if INTERPRETED else 33, C=3),
    *([] if INTERPRETED else [dict(B=2, size=160, M=300, C=3)]),
]


@pytest.mark.parametrize("rotated", [False, True], ids=["xyxy", "rotated"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("cost", ASSIGN)
def test_equals_oracle(cost, shape, rotated):
    if cost == "simota" and shape["M"] == 300:
        pytest.skip("with so many, some costs above 1e5 are always equal in float32")
    problem, expected = solved(cost, rotated=rotated, **shape)
    assert (expected[0] >= 0).any() or shape["M"] == 1
    check(ASSIGN[cost](*problem), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cost", ASSIGN)
def test_dtypes(cost, dtype):
    if TRITON and dtype == torch.float64:
        pytest.skip("the Triton kernels compute in float32")
    problem, expected = solved(cost, dtype, B=1, size=96, M=4, C=3)
    check(ASSIGN[cost](*problem), expected, dtype)


@not_interpreted
@pytest.mark.parametrize("rotated", [False, True], ids=["xyxy", "rotated"])
def test_many_candidates(rotated):  # all of 8400 priors are
    problem, expected = solved("soft_label", B=1, size=640, M=20, C=2, cover=True, rotated=rotated)
    check(m.dynamic_soft_label_assign(*problem), expected)


@pytest.mark.parametrize("cost", ASSIGN)
@pytest.mark.parametrize("B, N, M", [(2, 5, 0), (2, 0, 3), (0, 5, 3), (0, 0, 0)])
def test_empty(cost, B, N, M):
    out = ASSIGN[cost](
        torch.rand(B, N, 4, device=DEVICE),
        torch.rand(B, N, 3, device=DEVICE),
        torch.rand(N, 4, device=DEVICE),
        torch.rand(B, M, 4, device=DEVICE),
        torch.zeros(B, M, dtype=torch.int64, device=DEVICE),
        torch.full((B,), M, device=DEVICE),
    )
    assert (out[0] == -1).all() and (out[1] == 0).all() and (out[2] == -1).all()
    assert all(x.shape == (B, N) for x in out)


def test_centers():
    problem, expected = solved("soft_label", size=96)
    boxes, logits, priors, gt, labels, counts = problem
    centers = gt[..., :2]
    out = m.dynamic_soft_label_assign(*problem, centers)
    assert not torch.equal(out[0], expected[0])
    for b, n in enumerate(counts.tolist()):
        args = (x.cpu() for x in (boxes[b], logits[b], priors, gt[b, :n], labels[b, :n], centers[b, :n]))
        assert torch.equal(out[0][b].cpu(), naive("soft_label", *args)[0])


def test_metric_of_task_aligned():
    problem, expected = solved("task_aligned")
    *_, metric = m.task_aligned_assign(*problem)
    p = problem[1].double().gather(2, expected[2].clamp(min=0)[..., None])[..., 0]
    p = torch.where(expected[0] < 0, 0, p * expected[1] ** 6)
    torch.testing.assert_close(metric.double(), p, rtol=1e-4, atol=1e-6)
    assert (metric > 0).any()


@pytest.mark.parametrize("cost", ASSIGN)
def test_options(cost):
    problem, _ = solved(cost)
    options = {
        "soft_label": dict(topk=3, center_radius=1.0, iou_weight=0.5),
        "simota": dict(topk=3, center_radius=1.0, iou_weight=0.5, cls_weight=4.0),
        "task_aligned": dict(topk=3, alpha=0.5, beta=2.0),
        "atss": dict(topk=3, anchor_scale=5.0),
    }[cost]
    out = ASSIGN[cost](*problem, **options)
    assert not torch.equal(out[0], ASSIGN[cost](*problem)[0])
    expected = ASSIGN[cost](*(x.double() if x.is_floating_point() else x for x in problem), **options)
    assert torch.equal(out[0], expected[0])


# --- the published assigner's answers


def reference_cases(shared: Path) -> list[dict[str, Any]]:
    return torch.load(shared / "reference" / "assign_cases.pt", weights_only=True)


def test_assign_cases(shared):
    checked = 0
    for case in reference_cases(shared):
        if INTERPRETED and case["name"] not in ("random_320_7gt_20c", "degenerate_gts", "single_prior_valid"):
            continue
        count = torch.tensor([len(case["gt_labels"])])
        inputs = (
            case["decoded_bboxes"][None],
            case["cls_logits"][None],
            case["priors"],
            case["gt_bboxes"][None],
            case["gt_labels"][None],
            count,
        )
        assigned, iou, labels = (x[0].cpu() for x in m.dynamic_soft_label_assign(*(x.to(DEVICE) for x in inputs)))
        positive = case["gt_inds"] > 0
        assert torch.equal(assigned + 1, case["gt_inds"].long()), case["name"]
        assert torch.equal(labels, case["labels"].long()), case["name"]
        torch.testing.assert_close(iou[positive], case["max_overlaps"][positive], rtol=0, atol=1e-6)
        checked += 1
    assert checked == (3 if INTERPRETED else 16)


@pytest.mark.parametrize("model", ["rtmdet_tiny", "rtmdet-ins_tiny", "rotated_rtmdet_tiny"])
def test_assignments_in_training(shared, model):
    if INTERPRETED and model == "rotated_rtmdet_tiny":
        pytest.skip("takes 10 s under the interpreter")
    train = torch.load(shared / "reference" / f"{model}.pt", weights_only=True)["train"]
    pred = [image["pred"] for image in train["assign"]]
    gt_boxes = torch.stack([gt["bboxes"] for gt in train["gts"]])
    if gt_boxes.shape[-1] == 5:  # training regularises to le90: w > h
        x, y, w, h, angle = gt_boxes.unbind(-1)
        gt_boxes = torch.where((w < h)[..., None], torch.stack([x, y, h, w, angle + math.pi / 2], -1), gt_boxes)
    centers = None
    if "masks" in train["gts"][0]:
        masks = torch.stack(
            [torch.from_numpy(np.unpackbits(gt["masks"]["packed"].numpy(), axis=-1)) for gt in train["gts"]]
        ).float()
        y, x = torch.arange(masks.shape[-2]), torch.arange(masks.shape[-1])
        centers = torch.stack([(masks * x).sum((2, 3)), (masks * y[:, None]).sum((2, 3))], -1)
        centers = (centers / masks.sum((2, 3))[..., None]).to(DEVICE)
    inputs = (
        torch.stack([p["bboxes"] for p in pred]),
        torch.stack([p["scores"] for p in pred]),
        pred[0]["priors"],
        gt_boxes,
        torch.stack([gt["labels"] for gt in train["gts"]]),
        torch.tensor([8, 8]),
    )
    images = slice(0, 1 if INTERPRETED else 2)
    inputs = tuple(x if x.shape[0] != 2 else x[images] for x in inputs)
    out = m.dynamic_soft_label_assign(*(x.to(DEVICE) for x in inputs), None if centers is None else centers[images])
    for b, image in enumerate(train["assign"][images]):
        positive = image["gt_inds"] > 0
        assert torch.equal(out[0][b].cpu() + 1, image["gt_inds"])
        assert torch.equal(out[2][b].cpu(), image["labels"])
        torch.testing.assert_close(out[1][b].cpu()[positive], image["max_overlaps"][positive], rtol=0, atol=1e-5)


# --- what ATSS has of its own


@pytest.mark.parametrize("topk", [1, 2])
def test_of_equally_near_priors_the_first_are_candidates(topk):
    """Corners at whole pixels, where many are, and where float32 is exact: the rule decides, not the way of sorting.

    With few candidates each decides.
    """
    priors = make_priors(64)
    rng = torch.Generator().manual_seed(0)
    corner = torch.randint(0, 12, (2, 12, 2), generator=rng) * 4
    gt = torch.cat([corner, corner + torch.randint(2, 10, (2, 12, 2), generator=rng) * 4], -1).float()
    boxes = torch.cat([priors[:, :2] - 10, priors[:, :2] + 11], 1).expand(2, -1, -1)
    center = (gt[..., :2] + gt[..., 2:]) / 2
    ties = 0
    for near in (priors[priors[:, 2] == 8, :2] - center[:, :, None]).square().sum(-1).flatten(0, 1).sort().values:
        ties += int(near[topk - 1] == near[topk])
    assert ties > 3
    expected = [naive_atss(boxes[b], priors, gt[b], topk=topk) for b in range(2)]
    args = [x.to(DEVICE) for x in (boxes, priors, gt, torch.zeros(2, 12, dtype=torch.int64), torch.full((2,), 12))]
    assigned, iou, _ = m.atss_assign(*args, strides=(8, 16, 32), topk=topk)
    assert min(margin for *_, margin in expected) > 1e-5
    assert torch.equal(assigned.cpu(), torch.stack([e[0] for e in expected]))
    torch.testing.assert_close(iou.cpu().double(), torch.stack([e[1] for e in expected]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rotated", [False, True], ids=["xyxy", "rotated"])
@pytest.mark.parametrize("side", [70.3, 333.3, 1e4])
def test_where_all_overlaps_are_equal_all_candidates_win(side, rotated):
    """The deviation is 0 but for rounding, which must not decide."""
    priors = make_priors(64)[:64].to(DEVICE)  # one level
    c, h = 27.7, side / 2
    gt = [c, c, side, side, 0.0] if rotated else [c - h, c - h, c + h, c + h]
    gt = torch.tensor([[gt]], device=DEVICE)
    zero, one = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE), torch.ones(1, dtype=torch.int64, device=DEVICE)
    boxes = torch.ones(1, 64, gt.shape[2], device=DEVICE)
    assigned = m.atss_assign(boxes, priors, gt, zero, one, strides=[8], anchor_scale=2.0)[0]
    assert int((assigned == 0).sum()) == 9


def test_a_single_candidate_wins_and_other_strides_match_nothing():
    priors, gt = torch.tensor([[16.0, 16, 8, 8]] * 2), torch.tensor([[[4.0, 4, 20, 24]]])
    priors[1, 2:] = 64
    zero, one = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    args = [x.to(DEVICE) for x in (gt.expand(1, 2, 4), priors, gt, zero, one)]
    assigned, iou, _ = m.atss_assign(*args, strides=(8, 16, 32))
    assert assigned.tolist() == [[0, -1]] and iou.tolist() == [[1, 0]]
    # of two different overlaps neither is as great as mean + deviation of n - 1; that of n would be the greater one
    assert (m.atss_assign(*args, strides=(8, 64))[0] == -1).all()


def test_the_order_of_priors_does_not_matter():
    problem, expected = solved("atss")
    boxes, scores, priors, *gt = problem
    order = torch.randperm(len(priors), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    out = ASSIGN["atss"](boxes[:, order], scores[:, order], priors[order], *gt)
    check(out, [x[:, order] for x in expected])


@pytest.mark.parametrize("strides", [(8, 8), (0, 8), (math.nan,), (-8,)])
def test_bad_strides(strides):
    boxes, _, *problem = (x.to(DEVICE) for x in make_problem(0))
    with pytest.raises(ValueError, match="strides"):
        m.atss_assign(boxes, *problem, strides=strides)


# --- whatever the inputs

BAD_GT = {
    "xyxy": [
        [math.nan, 0, 40, 40],
        [0, 0, math.inf, 40],
        [-math.inf, 0, 40, 40],
        [40, 10, 20, 50],
        [10, 40, 50, 20],
        [-3e38, 0, 3e38, 40],
    ],
    "rotated": [
        [math.nan, 20, 40, 40, 0],
        [20, 20, math.inf, 40, 0],
        [20, 20, 40, 40, math.nan],
        [20, 20, -40, 40, 0],
        [20, 20, 40, -1, 0.3],
        [20, 20, 3e38, 3e38, 0.3],
    ],
}


@pytest.mark.parametrize("rotated", [False, True], ids=["xyxy", "rotated"])
@pytest.mark.parametrize("cost", ASSIGN)
def test_bad_ground_truths_change_nothing(cost, rotated):
    problem, expected = solved(cost, B=1, M=3, rotated=rotated)
    *others, gt, labels, _ = problem
    bad = torch.tensor(BAD_GT["rotated" if rotated else "xyxy"], device=DEVICE)
    fine = torch.tensor([32, 32, 30, 30, 0.1] if rotated else [10, 10, 50, 50], device=DEVICE)
    bad = torch.cat([bad, fine.expand(3, -1)])[None]
    beyond = -2 if cost == "atss" else 5  # which knows no number of classes
    bad_labels = torch.tensor([[0] * (bad.shape[1] - 3) + [-1, beyond, 2**31 - 1]], device=DEVICE)
    count = torch.tensor([3 + bad.shape[1]], device=DEVICE)
    n = bad.shape[1]
    out = ASSIGN[cost](*others, torch.cat([bad, gt], 1), torch.cat([bad_labels, labels], 1), count)
    check(out, [torch.where(expected[0] < 0, -1, expected[0] + n), *expected[1:]])
    # nor do centres that are not finite, but to their own ground truth
    if cost == "soft_label":
        centers = torch.full((1, n + 3, 2), math.nan, device=DEVICE)
        gts, every = torch.cat([fine.expand(1, n, -1), gt], 1), torch.cat([torch.zeros_like(bad_labels), labels], 1)
        centers[:, n:] = gt[..., :2] if rotated else (gt[..., :2] + gt[..., 2:]) / 2
        out = m.dynamic_soft_label_assign(*others, gts, every, count, centers)
        assert torch.equal(out[0], torch.where(expected[0] < 0, -1, expected[0] + n))


@pytest.mark.parametrize("rotated", [False, True], ids=["xyxy", "rotated"])
@pytest.mark.parametrize("cost", ASSIGN)
def test_bad_priors_change_nothing(cost, rotated):
    """Priors with a non-finite box or score never match, and the others are assigned as without them."""
    problem, expected = solved(cost, B=1, M=3, C=3, rotated=rotated)
    boxes, scores, priors, *gt = problem
    good_box, good_score = boxes[0, expected[0][0] >= 0][0], scores[0, expected[0][0] >= 0][0]
    good_prior = priors[expected[0][0] >= 0][0]
    bad = []
    for field, values in (
        (0, (math.nan, math.inf, -math.inf)),
        (1, (math.nan, math.inf, -math.inf)),
        (2, (math.nan, math.inf)),
    ):
        for value, at in itertools.product(values, (0, -1)):
            if field == 1 and cost == "atss":  # to which scores do not matter
                continue
            row = [good_box.clone(), good_score.clone(), good_prior.clone()]
            row[field][at if field < 2 else 0] = value
            bad.append(row)
    bad += [
        [good_box, good_score, torch.cat([good_prior[:2], good_prior.new_full((2,), stride)])]
        for stride in (0.0, -8.0, math.nan)
    ]
    if cost == "simota":
        bad += [[good_box, good_score + 1, good_prior], [good_box, -good_score, good_prior]]
    n = len(bad)
    bad_boxes, bad_scores, bad_priors = (torch.stack(rows) for rows in zip(*bad, strict=True))
    out = ASSIGN[cost](
        torch.cat([bad_boxes[None], boxes], 1),
        torch.cat([bad_scores[None], scores], 1),
        torch.cat([bad_priors, priors]),
        *gt,
    )
    assert (out[0][:, :n] == -1).all() and (out[1][:, :n] == 0).all() and (out[2][:, :n] == -1).all()
    check(tuple(x[:, n:] for x in out), expected)


def test_zero_size_and_inverted_boxes():
    """As in the published assigner: IoU 0, so that they win only where there is nothing better."""
    priors = make_priors(32).to(DEVICE)
    N = len(priors)
    gt = torch.tensor([[[4.0, 4.0, 28.0, 28.0], [12.0, 12.0, 12.0, 12.0]]], device=DEVICE)
    labels, counts = torch.tensor([[0, 1]], device=DEVICE), torch.tensor([2], device=DEVICE)
    logits = torch.zeros(1, N, 2, device=DEVICE)
    inverted = torch.tensor([20.0, 20.0, 12.0, 12.0], device=DEVICE).expand(1, N, 4)
    for boxes in (inverted, inverted * 0 + 16):
        assigned, iou, _ = m.dynamic_soft_label_assign(boxes, logits, priors, gt, labels, counts)
        assert (iou == 0).all()
        assert sorted(assigned[assigned >= 0].tolist()) in ([0, 1], [0], [1])  # one each, or both the same
        good = boxes.clone()
        i = ((priors[:, :2] == 16).all(-1) & (priors[:, 2] == 8)).nonzero()[0, 0]
        good[0, i] = gt[0, 0]
        assert m.dynamic_soft_label_assign(good, logits, priors, gt[:, :1], labels[:, :1], counts - 1)[0][0, i] == 0


@pytest.mark.parametrize("value", [-1e30, -100.0, 100.0, 6e4])
def test_saturated_logits(value):
    problem, _ = solved("soft_label", B=1)
    problem[1] = torch.full_like(problem[1], value)
    assigned, iou, _ = m.dynamic_soft_label_assign(*problem)
    assert iou.isfinite().all() and (assigned >= 0).any()


@pytest.mark.parametrize("cost", ASSIGN)
def test_non_contiguous(cost):
    problem, expected = solved(cost)
    boxes, scores, priors, gt, labels, counts = problem
    strided = [x.mT.contiguous().mT for x in (boxes, scores, priors, gt)]
    labels = torch.stack([labels, labels], -1)[..., 0]
    counts = torch.stack([counts, counts], -1)[:, 0]
    assert not any(x.is_contiguous() for x in (*strided, labels, counts))
    check(ASSIGN[cost](*strided, labels.int(), counts.int()), expected)


@pytest.mark.parametrize("cost", ASSIGN)
def test_every_output_is_written_and_the_same_twice(cost):
    problem, expected = solved(cost)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what `torch.empty` returns with NaN
    try:
        assert torch.empty(2).isnan().all()
        out, again = ASSIGN[cost](*problem), ASSIGN[cost](*problem)
    finally:
        torch.use_deterministic_algorithms(False)
    check(out, expected)
    assert all(torch.equal(a, b) for a, b in zip(out, again, strict=True))


def test_not_differentiated_and_autocast():
    problem, expected = solved("soft_label")
    inputs = [x.requires_grad_() if x.is_floating_point() else x for x in problem]
    with torch.autocast(DEVICE, torch.bfloat16):
        out = m.dynamic_soft_label_assign(*inputs)
    check(out, expected)
    assert not out[1].requires_grad


@pytest.mark.parametrize(
    "name, change, error",
    [
        ("boxes", lambda x: x[0], ValueError),
        ("boxes", lambda x: x[..., :3], ValueError),
        ("boxes", lambda x: x.long(), TypeError),
        ("logits", lambda x: x[:, 1:], ValueError),
        ("logits", lambda x: x[..., :0], ValueError),
        ("priors", lambda x: x[1:], ValueError),
        ("priors", lambda x: x[:, :2], ValueError),
        ("gt_boxes", lambda x: x[:1], ValueError),
        ("gt_boxes", lambda x: F.pad(x, (0, 1)), ValueError),
        ("gt_boxes", lambda x: x[0], ValueError),
        ("gt_labels", lambda x: x[:, 1:], ValueError),
        ("gt_labels", lambda x: x.float(), TypeError),
        ("gt_labels", lambda x: x > 0, TypeError),
        ("gt_counts", lambda x: x[None], ValueError),
        ("gt_counts", lambda x: x.to("meta"), ValueError),
        ("gt_centers", lambda x: x[..., :1], ValueError),
        ("topk", lambda x: 0, ValueError),
        ("topk", lambda x: 2.0, ValueError),
    ],
)
def test_bad_input(name, change, error):
    names = ("boxes", "logits", "priors", "gt_boxes", "gt_labels", "gt_counts")
    kwargs: dict[str, Any] = dict(zip(names, (x.to(DEVICE) for x in make_problem(0)), strict=True))
    kwargs |= {"gt_centers": kwargs["gt_boxes"][..., :2], "topk": 13}
    kwargs[name] = change(kwargs[name])
    with pytest.raises(error, match=name):
        m.dynamic_soft_label_assign(**kwargs)


def test_scores_are_called_scores():
    boxes, scores, *rest = (x.to(DEVICE) for x in make_problem(0))
    with pytest.raises(ValueError, match="scores has shape"):
        m.simota_assign(boxes, scores[:1], *rest)


# --- memory and compilation


@not_interpreted
@pytest.mark.skipif(DEVICE == "cuda" or not Path("/proc/self/clear_refs").exists(), reason="reads Linux's peak memory")
def test_memory():
    """1,000 ground truths in one image take less than one [N, M] float32 matrix (34 MB)."""
    script = """
import re, torch
from test_assign import make_problem
from rtmdet_fast.kernels.assign import dynamic_soft_label_assign
problem = make_problem(0, B=1, size=640, M=1000, C=80)
dynamic_soft_label_assign(*make_problem(0))  # loads what is loaded once
status = lambda key: int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
dynamic_soft_label_assign(*problem)
print(status("VmHWM") - before)
"""
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[1:3])),
            "MALLOC_MMAP_THRESHOLD_": "65536",
        },
    )  # what is freed goes back at once
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 34e6


class Operations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@not_interpreted
@pytest.mark.parametrize("cost", ["soft_label", "atss"])
def test_elsewhere_than_on_a_cpu_the_reference_takes_few_operations(cost, monkeypatch):
    """Each is a launch there; chunks for a CPU's cache make one in proportion to the ground truths."""
    boxes, logits, priors, *truths = make_problem(0, B=16, size=256, M=100, C=2)
    counts = []
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(assign_torch, "at_once", lambda _, n, device=device: at_once(torch.device(device), n))
        with Operations() as operations:
            if cost == "atss":
                assign_torch.atss._init_fn(boxes, priors, *truths, [8.0, 16.0, 32.0], 9, 8.0)
            else:
                assign_torch.assign._init_fn(boxes, logits, priors, *truths, None, cost, 13, 3.0, 3.0, 1.0)
        counts.append(operations.count)
    assert counts[0] > 2 * counts[1] and counts[1] < 500


@not_interpreted
@pytest.mark.parametrize("cost", ASSIGN)
def test_compiles_without_graph_break(cost):
    problem, expected = solved(cost)
    f = torch.compile(lambda boxes, *rest: ASSIGN[cost](boxes * 1, *rest), fullgraph=True, backend="aot_eager")
    check(f(*problem), expected)


@not_interpreted
def test_exports():
    class Module(torch.nn.Module):
        def forward(self, *problem: Tensor) -> tuple[Tensor, ...]:
            return m.dynamic_soft_label_assign(*problem)

    problem, expected = solved("soft_label")
    check(torch.export.export(Module(), tuple(problem)).module()(*problem), expected)


@not_interpreted
def test_opcheck():
    problem, _ = solved("soft_label")
    op = assign_triton.assign.library_op if TRITON else assign_torch.assign
    torch.library.opcheck(op, (*problem, None, "soft_label", 13, 3.0, 3.0, 1.0))
    op = assign_triton.atss.library_op if TRITON else assign_torch.atss
    torch.library.opcheck(op, (problem[0], *problem[2:], [8.0, 16.0, 32.0], 9, 8.0))


def lowered() -> list[Any]:
    """Every kernel, cost, kind of box, dtype and target; those far from what RTMDet runs are marked slow."""
    cases = []
    for target, dtype, cost, box in itertools.product(TARGETS, ("fp16", "fp32", "bf16"), ASSIGN, (4, 5)):
        usual = (
            (cost == "soft_label" or target in ("sm_90", "gfx942"))
            if dtype == "fp16"
            else (target == "sm_90" and cost == "soft_label" and box == 4)
        )
        cases.append(pytest.param(target, dtype, cost, box, marks=[] if usual else pytest.mark.slow))
    return cases


@needs_lowering
@pytest.mark.parametrize("target, dtype, cost, box", lowered())
def test_lowering(target, dtype, cost, box):
    types = {
        "count_ptr": "*i64:16",
        "label_ptr": "*i64:16",
        "index_ptr": "*i64:16",
        "key_ptr": "*i64:16",
        "won_ptr": "*i64:16",
        "assigned_ptr": "*i64:16",
        "assigned_label_ptr": "*i64:16",
        "prior_ptr": "*fp32:16",
        "sum_ptr": "*fp32:16",
        "iou_ptr": "*fp32:16",
        "N": "i32",
        "M": "i32",
        "C": "i32",
        "topk": "i32",
        "radius": "fp32",
        "iou_weight": "fp32",
        "cls_weight": "fp32",
    }
    tuning, rotated = assign_triton.TUNING, box == 5
    method, without = {"BOX": box, "METHOD": cost}, {} if cost == "soft_label" else {"center_ptr": None}
    prior = (assign_triton._prior_kernel, method | without | tuning["prior"], 64)
    resolve = (assign_triton._resolve_kernel, method | without | tuning["resolve"], 96)
    if cost == "atss":
        types |= {"near_ptr": "*i32:16", "any_class": "i32", "level": "i32"}
        types |= dict.fromkeys(("level_stride", "anchor_scale", "rounding"), "fp32")
        prior[1]["score_ptr"] = resolve[1]["score_ptr"] = None
        candidates = {"BOX": box, "NEAR": 48, "SLOTS": 64}
        kernels = [
            prior,
            (assign_triton._nearest_kernel, {"BOX": box, "LEVELS": 3, "LIST": 16} | tuning["nearest"], 96),
            (assign_triton._threshold_kernel, candidates | tuning["threshold"], 96),
            resolve,
        ]
    else:
        blocks = tuning["match_rotated" if rotated else "match"]
        kernels = [prior, (assign_triton._match_kernel, method | without | blocks | {"LIST": 16}, 128), resolve]
    for kernel, constexprs, registers in kernels:
        num_warps = constexprs.pop("num_warps")
        signature = {name: types.get(name, f"*{dtype}:16") for name in kernel.arg_names if name not in constexprs}
        used = lower(kernel, signature, constexprs, target, num_warps=num_warps)
        assert used.spills == 0 and used.registers <= registers, (kernel.__name__, used.registers, used.spills)
        if target.startswith("sm_") and kernel in (assign_triton._match_kernel, assign_triton._nearest_kernel):
            # a prior a thread, with all its columns: 8 of 256 are one's
            assert used.assembly.count("ld.global.v4.b32") >= constexprs["BLOCK"] // 32
