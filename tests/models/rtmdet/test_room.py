"""Losses whose tensors have one size, whatever is matched: what a CUDA graph of the training step needs."""

import pytest
import torch
from torch import nn

from rtmdet_fast import RTMDet
from rtmdet_fast.models.detector import Targets
from rtmdet_fast.models.rtmdet.detection_head import ASSIGNERS, grid_priors, positives
from rtmdet_fast.models.rtmdet.model import HEADS

SIDE = 128


@pytest.mark.parametrize("share", [0, 0.1, 1])
def test_positives_come_in_order_and_others_follow(share):
    gt = torch.where(torch.rand(3, 50) < share, torch.randint(9, (3, 50)), -1)
    image, prior = (gt >= 0).nonzero(as_tuple=True)
    count = len(image)
    for room in (None, count, count + 7, 3 * 50 + 20):
        *found, valid = positives(gt, room)
        size = count if room is None else min(room, 150)
        assert valid.tolist() == [True] * count + [False] * (size - count)
        assert found[0][:count].equal(image) and found[1][:count].equal(prior)
        places = torch.stack(found).unique(dim=1)
        assert places.shape[1] == size  # each once: a gradient that is scattered to them meets no other
    if count:
        assert positives(gt, count - 1)[2].all()


def scene(task: str, most: int) -> Targets:
    """Two images with 5 objects and 1, padded to `most` with what is to change nothing."""
    torch.manual_seed(1)
    counts = torch.tensor([5, 1])
    if task == "rotated":
        boxes = torch.rand(2, most, 5) * torch.tensor([SIDE, SIDE, 40, 30, 3.0]) + torch.tensor([0, 0, 10, 10, 0])
    else:
        start = torch.rand(2, most, 2) * SIDE * 0.6
        boxes = torch.cat((start, start + 10 + torch.rand(2, most, 2) * 40), -1)
    if task != "ins":
        return Targets(boxes, torch.arange(2 * most).reshape(2, most) % 3, counts)
    masks = torch.ones(2, most, SIDE // 4, SIDE // 4, dtype=torch.uint8)
    return Targets(boxes, torch.zeros(2, most).long(), counts, boxes[..., :2] + 10, masks)


def padded(targets: Targets, most: int) -> Targets:
    """As many rows as that, with rubbish in the new ones."""
    rows = most - targets.boxes.shape[1]
    values = [
        x if x is None or x.ndim == 1 else torch.cat((x, x[:, :1].repeat_interleave(rows, 1)), 1) for x in targets[:5]
    ]
    return Targets(*values)


@pytest.mark.parametrize("task", HEADS)
def test_losses_with_room_are_those_without(task):
    torch.manual_seed(0)
    model = RTMDet("nano", task, num_classes=3)
    for predictor in model.bbox_head.rtm_reg:
        nn.init.ones_(predictor.bias)  # boxes that are not empty
    images = torch.randn(2, 3, SIDE, SIDE)
    targets = scene(task, 5)
    results = []
    for given in (targets, padded(targets, 16)._replace(room=13 * 2 * 16)):
        model.zero_grad()
        losses = model(images, given)
        sum(losses.values()).backward()
        results.append((losses, [p.grad.clone() for p in model.parameters()]))
    (losses, gradients), (same_losses, same_gradients) = results
    for name, value in losses.items():
        torch.testing.assert_close(same_losses[name], value, rtol=1e-6, atol=0)  # sums of more zeros: another order
    assert all(map(torch.equal, same_gradients, gradients)) and losses["loss_bbox"] > 0


@pytest.mark.parametrize("assigner", ASSIGNERS)
@pytest.mark.parametrize("task", ["det", "rotated"])
def test_nobody_is_matched_more_often_than_there_is_room_for(task, assigner):
    head = RTMDet("nano", task, num_classes=3).bbox_head
    head.assigner = assigner
    priors = grid_priors([(16, 16), (8, 8), (4, 4)], torch.device("cpu"))
    targets = scene(task, 5)
    first = targets.boxes[:, :1]
    center = first[..., :2] if task == "rotated" else (first[..., :2] + first[..., 2:4]) / 2
    near = (priors[:, :2] - center).norm(dim=-1, keepdim=True) < 30
    boxes = torch.where(near, first, 0.0)  # all that are near predict one object, and none differently
    gt = head.assign(torch.zeros(2, len(priors), 3), boxes, priors, targets).gt
    counts = [(image == j).sum() for image in gt for j in range(5)]
    assert 0 < max(counts) <= head.most_matches
