"""Hungarian matching against scipy's stored answers, the published matches, and brute force in float64."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from rtdetr_reference import load, padded, pairs_by_target
from scipy.optimize import linear_sum_assignment
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rtmdet_fast.errors import ImageError, UserError
from rtmdet_fast.models.detector import Targets
from rtmdet_fast.models.rtdetr.matcher import match, solve


def random_scene(counts, queries=20, classes=7, layers=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    targets = padded(
        [
            {"boxes": torch.rand(n, 4, generator=g) * 0.4 + 0.3, "labels": torch.randint(classes, (n,), generator=g)}
            for n in counts
        ]
    )
    logits = torch.randn(layers, len(counts), queries, classes, generator=g) * 3
    return logits, torch.rand(layers, len(counts), queries, 4, generator=g) * 0.4 + 0.3, targets


def pair_cost(logit, box, gt_box):
    """By the definition, of one pair, in Python's floats; the logit is that of the target's class."""
    p = 1 / (1 + math.exp(-logit))
    focal = 0.25 * (1 - p) ** 2 * -math.log(p + 1e-8) - 0.75 * p**2 * -math.log(1 - p + 1e-8)
    (a0, b0, a1, b1), (u0, v0, u1, v1) = ((x - w / 2, y - h / 2, x + w / 2, y + h / 2) for x, y, w, h in (box, gt_box))
    overlap = max(0.0, min(a1, u1) - max(a0, u0)) * max(0.0, min(b1, v1) - max(b0, v0))
    union = (a1 - a0) * (b1 - b0) + (u1 - u0) * (v1 - v0) - overlap
    hull = (max(a1, u1) - min(a0, u0)) * (max(b1, v1) - min(b0, v0))
    giou = overlap / union - (hull - union) / hull
    return 5 * sum(abs(x - y) for x, y in zip(box, gt_box, strict=True)) + 2 * focal - 2 * giou


def cost_table(logits, boxes, targets, image):
    """[M, Q] of one image of one layer, in float64."""
    count = int(targets.counts[image])
    labels, gt_boxes = targets.labels[image, :count].tolist(), targets.boxes[image, :count].tolist()
    return np.array(
        [
            [pair_cost(logit[label], box, gt) for logit, box in zip(logits.tolist(), boxes.tolist(), strict=True)]
            for label, gt in zip(labels, gt_boxes, strict=True)
        ]
    ).reshape(count, len(boxes))


def test_scipys_stored_assignments(shared):
    for case in load(shared, "hungarian_cases.pt")["cases"]:
        cost = case["cost"]
        queries, targets = cost.shape
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = solve(cost.T[None, None], torch.tensor([targets]))[0, 0].numpy()
        assert bool(told) == (targets > queries), case["name"]
        target = np.flatnonzero(found >= 0)
        assert len(np.unique(found[target])) == len(target) == min(queries, targets), case["name"]
        total = cost.double().numpy()[found[target], target].sum()
        assert total == pytest.approx(case["total"], rel=1e-12, abs=1e-12), case["name"]
        if not case["ties"]:
            expected = pairs_by_target([(case["query"], case["target"])], targets)[0]
            assert (found == expected.numpy()).all(), case["name"]


def test_a_batch_of_costs_as_published(shared):
    """Of which each image's block of the published matrix is its own."""
    batch = load(shared, "hungarian_cases.pt")["batch"]
    sizes = batch["sizes"].tolist()
    costs = torch.full((1, len(sizes), max(sizes), 300), math.nan)
    for i, block in enumerate(batch["cost"].split(sizes, 2)):
        costs[0, i, : sizes[i]] = block[i].T
    expected = pairs_by_target(list(zip(batch["query"], batch["target"], strict=True)), max(sizes))
    assert torch.equal(solve(costs, batch["sizes"])[0], expected)


@pytest.mark.parametrize("counts", [(4, 0, 2), (1,), (0, 0, 3)], ids=str)
def test_no_other_pairs_cost_less(counts):
    """All ways to match up to 4 ground truths with 6 queries are tried."""
    for seed in range(5):
        logits, boxes, targets = random_scene(counts, queries=6, seed=seed)
        found = match(logits, boxes, targets)
        for layer, image in np.ndindex(*found.shape[:2]):
            count = counts[image]
            cost = cost_table(logits[layer, image], boxes[layer, image], targets, image)
            ways = itertools.permutations(range(6), count)
            best = min(ways, key=lambda way, cost=cost: sum(cost[j, q] for j, q in enumerate(way)))
            assert found[layer, image, :count].tolist() == list(best)
            assert (found[layer, image, count:] == -1).all()


def test_totals_are_those_of_float64():
    counts = (30, 1, 0, 17)
    logits, boxes, targets = random_scene(counts, queries=40, classes=80, layers=3)
    found = match(logits, boxes, targets)
    for layer, image in np.ndindex(*found.shape[:2]):
        cost = cost_table(logits[layer, image], boxes[layer, image], targets, image)
        rows, columns = linear_sum_assignment(cost)
        query = found[layer, image, : counts[image]].numpy()
        assert len(set(query)) == counts[image]
        total = cost[np.arange(counts[image]), query].sum()
        assert total == pytest.approx(cost[rows, columns].sum(), abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_matched_in_float32(dtype):
    logits, boxes, targets = random_scene((9, 4), queries=30)
    logits = logits.to(dtype)
    assert torch.equal(match(logits, boxes, targets), match(logits.float(), boxes, targets))


def test_more_objects_than_queries_is_said():
    logits, boxes, targets = random_scene((25, 3), queries=10)
    with pytest.warns(UserWarning, match="more objects than the model has queries \\(10\\)"):
        found = match(logits, boxes, targets)
    assert (found[:, 0].sort().values == torch.tensor([-1] * 15 + list(range(10)))).all()
    assert (found[:, 1, :3] >= 0).all() and (found[:, 1, 3:] == -1).all()


def test_images_without_objects():
    logits, boxes, targets = random_scene((0, 0))
    assert match(logits, boxes, targets).shape == (2, 2, 0)
    wide = Targets(torch.zeros(2, 4, 4), torch.full((2, 4), -1), targets.counts)
    assert (match(logits, boxes, wide) == -1).all()


@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
def test_predictions_that_are_not_finite_name_their_image(value):
    logits, boxes, targets = random_scene((2, 0, 3))
    boxes[1, 2, 5, 0] = value
    with pytest.raises(UserError, match="predictions for image 2 of the batch are not finite"):
        match(logits, boxes, targets)
    logits, boxes, targets = random_scene((2, 0, 3))
    logits[0, 0] = logits[1, 2] = math.nan
    with pytest.raises(ImageError, match="predictions for images 0, 2 of the batch are not finite") as raised:
        match(logits, boxes, targets)
    assert raised.value.images == [0, 2]


def test_a_pair_may_be_forbidden():
    costs = torch.tensor([[[[math.inf, math.inf, 1], [math.inf, 9, 0]]]])
    assert solve(costs, torch.tensor([2])).tolist() == [[[2, 1]]]


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        own = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = (x for x in tree_leaves(out) if isinstance(x, torch.Tensor))
        self.numel = max([self.numel, *(x.numel() for x in made if x.untyped_storage().data_ptr() not in own)])
        return out


def test_no_temporary_is_larger_than_the_costs():
    logits, boxes, targets = random_scene((6, 5, 2), queries=50, classes=90, layers=2)
    with Largest() as largest:
        match(logits, boxes, targets)
    assert largest.numel <= 2 * 3 * 50 * 6 + 3
