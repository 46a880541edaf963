"""The batched assigners against mmdet's, one image after the other."""

import pytest
import torch
from needs import openmmlab

openmmlab("mmdet")

from mmdet.models.task_modules import ATSSAssigner, DynamicSoftLabelAssigner, SimOTAAssigner, TaskAlignedAssigner
from mmengine.structures import InstanceData

from rtmdet_fast import ops

CLASSES, STRIDES = 7, (8, 16, 32)


def problem(seed: int, size: int, truths: int) -> list[torch.Tensor]:
    """Boxes, scores, priors, gt_boxes, gt_labels, gt_counts."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=g)

    grids = [torch.meshgrid(*[torch.arange(0, size, s)] * 2, indexing="ij") for s in STRIDES]
    levels = [torch.stack([x, y, *[torch.full_like(x, s)] * 2], -1) for s, (y, x) in zip(STRIDES, grids, strict=True)]
    priors = torch.cat([level.view(-1, 4) for level in levels]).float()
    N = len(priors)
    corner, side = rand(2, truths, 2) * size * 0.9, 4 * 32 ** rand(2, truths, 2)
    gt = torch.cat([corner, corner + side], -1)
    near = gt.gather(1, torch.randint(truths, (2, N), generator=g)[..., None].expand(-1, -1, 4))
    reach = priors[:, 2:] * (0.5 + 3 * rand(2, N, 2))
    own = torch.cat([priors[:, :2] - reach, priors[:, :2] + reach], -1)
    boxes = torch.where(rand(2, N, 1) < 0.5, near + rand(2, N, 4) * 6, own)
    labels = torch.randint(CLASSES, (2, truths), generator=g)
    return [boxes, rand(2, N, CLASSES) ** 2, priors, gt, labels, torch.tensor([truths, truths // 2])]


@pytest.mark.parametrize("truths", [3, 12, 40])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("method", ["soft_label", "simota", "task_aligned", "atss"])
def test_batched_assigners_match_as_mmdets(method, seed, truths):
    boxes, scores, priors, gt, labels, counts = problem(seed, 160, truths)
    match, theirs = {
        "soft_label": (ops.dynamic_soft_label_assign, DynamicSoftLabelAssigner(topk=13)),
        "simota": (ops.simota_assign, SimOTAAssigner()),
        "task_aligned": (ops.task_aligned_assign, TaskAlignedAssigner(topk=13)),
        "atss": (ops.atss_assign, ATSSAssigner(topk=9)),
    }[method]
    if method == "soft_label":
        scores = scores.logit()
    if method == "atss":
        found = match(boxes, priors, gt, labels, counts, strides=STRIDES)
    else:
        found = match(boxes, scores, priors, gt, labels, counts)
    half = 4 * priors[:, 2:]  # of the anchors; TaskAligned asks for their centres alone
    anchors = torch.cat([priors[:, :2] - half, priors[:, :2] + half], 1)
    of_levels = [int((priors[:, 2] == stride).sum()) for stride in STRIDES]
    matched = 0
    for b, count in enumerate(counts.tolist()):
        truth = InstanceData(bboxes=gt[b, :count], labels=labels[b, :count])
        if method == "atss":
            expected = theirs.assign(InstanceData(priors=anchors), of_levels, truth)
        else:
            place = anchors if method == "task_aligned" else priors
            expected = theirs.assign(InstanceData(bboxes=boxes[b], scores=scores[b], priors=place), truth)
        assert torch.equal(found[0][b] + 1, expected.gt_inds)
        assert torch.equal(found[2][b], expected.labels) or count == 0
        matched += int((expected.gt_inds > 0).sum())
    assert matched > 0
