"""Training with other assigners than the published one."""

from functools import partial

import pytest
import torch

from rtmdet_fast import RTMDet
from rtmdet_fast.kernels.assign import atss_assign, simota_assign, task_aligned_assign
from rtmdet_fast.models.detector import Targets
from rtmdet_fast.models.rtmdet.detection_head import ASSIGNERS, STRIDES, DetectionHead, normalised_alignment
from rtmdet_fast.models.rtmdet.rotated_head import RotatedHead


def problem(rotated: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Targets]:
    """Logits, boxes and priors of 128 px, each prediction near the nearest of three ground truths; and these."""
    generator = torch.Generator().manual_seed(0)
    priors = DetectionHead.priors(DetectionHead(8, 4)([torch.zeros(1, 8, 128 // s, 128 // s) for s in STRIDES]))
    N = len(priors)
    center, side = torch.tensor([[30.0, 30], [90, 90], [90, 30]]), torch.tensor([[44.0, 36], [60, 60], [40, 50]])
    own = torch.cdist(priors[:, :2], center).argmin(1).expand(2, -1)
    shift, stretch = torch.randn(2, N, 4, generator=generator).mul(0.15).split(2, -1)
    center_of, side_of = center[own] + shift * side[own], side[own] * stretch.exp()
    if rotated:
        truths = torch.cat((center, side, torch.zeros(3, 1)), 1)
        boxes = torch.cat((center_of, side_of, shift[..., :1]), -1)
    else:
        truths, boxes = (torch.cat((c - s / 2, c + s / 2), -1) for c, s in ((center, side), (center_of, side_of)))
    labels, counts = torch.tensor([[0, 3, 1]] * 2), torch.tensor([3, 2])
    logits = torch.randn(2, N, 4, generator=generator) - 2
    return logits, boxes, priors, Targets(truths.expand(2, -1, -1), labels, counts, (center + 30).expand(2, -1, -1))


@pytest.mark.parametrize("rotated", [False, True], ids=["boxes", "rotated"])
@pytest.mark.parametrize("assigner", [name for name in ASSIGNERS if name != "soft_label"])
def test_the_head_matches_by_its_assigner(assigner, rotated):
    logits, boxes, priors, targets = problem(rotated)
    head = (RotatedHead if rotated else DetectionHead)(8, 4)
    published = head.assign(logits, boxes, priors, targets)
    head.assigner = assigner
    found = head.assign(logits.requires_grad_(), boxes, priors, targets)
    op = {"simota": simota_assign, "task_aligned": task_aligned_assign, "atss": partial(atss_assign, strides=STRIDES)}
    scores = () if assigner == "atss" else (logits.sigmoid(),)
    gt, iou, labels, *metric = op[assigner](boxes, *scores, priors, *targets[:3])
    assert torch.equal(found.gt, gt) and torch.equal(found.labels, labels)
    assert not torch.equal(found.gt, published.gt)
    if not metric:
        assert torch.equal(found.quality, iou)
    assert (found.quality >= 0).all() and (found.quality <= 1).all() and not found.quality.requires_grad
    assert (found.gt[1] < 2).all() and all((found.gt == j).any() for j in range(3))


def test_alignment_of_a_ground_truth_is_scaled_to_its_greatest_overlap():
    logits, boxes, priors, targets = problem()
    gt, iou, _, metric = task_aligned_assign(boxes, logits.sigmoid(), priors, *targets[:3])
    metric[0, gt[0] == 1] = 0  # of a truth whose metric is too small for float32
    quality = normalised_alignment(gt, iou, metric, 3)
    assert (quality[gt < 0] == 0).all() and (quality[0, gt[0] == 1] == 0).all()
    for b, j in ((0, 0), (0, 2), (1, 0), (1, 1)):
        own = gt[b] == j
        expected = metric[b, own] / metric[b, own].max() * iou[b, own].max()
        torch.testing.assert_close(quality[b, own], expected)
        assert quality[b, own].max() == iou[b, own].max() > 0.5
    nothing = torch.full((2, 5), -1)
    assert (normalised_alignment(nothing, torch.zeros(2, 5), torch.zeros(2, 5), 0) == 0).all()


@pytest.mark.parametrize("task", ["det", "ins", "rotated"])
@pytest.mark.parametrize("assigner", ASSIGNERS)
def test_every_task_has_losses_and_gradients(assigner, task):
    torch.manual_seed(0)
    model = RTMDet("nano", task, num_classes=3)
    model.bbox_head.assigner = assigner
    box = [30.0, 30, 40, 24, 0.3] if task == "rotated" else [8.0, 8, 40, 48]
    masks = torch.ones(2, 1, 16, 16, dtype=torch.uint8) if task == "ins" else None
    for count in (1, 0):
        targets = Targets(
            torch.tensor([[box]] * 2)[:, :count],
            torch.zeros(2, count, dtype=torch.int64),
            torch.full((2,), count),
            torch.full((2, count, 2), 28.0) if task == "ins" else None,
            None if masks is None else masks[:, :count],
        )
        model.zero_grad()
        losses = model(torch.randn(2, 3, 64, 64), targets)
        sum(losses.values()).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(loss.isfinite() for loss in losses.values()) and all(g.isfinite().all() for g in gradients)
        assert (losses["loss_bbox"] > 0) == (count > 0)
