"""Losses against their definitions written out in float64."""

import pytest
import torch
import torch.nn.functional as F

from rtmdet_fast.models.rtmdet.losses import giou_loss, quality_focal_loss


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 7, 3), (3, 33, 80)], ids=str)
def test_quality_focal_loss_and_its_gradient(shape):
    logits = (torch.randn(shape) * 5).requires_grad_()
    labels = torch.randint(-1, shape[2], shape[:2])
    quality = torch.rand(shape[:2]) * (labels >= 0)
    oracle = logits.detach().double().requires_grad_()
    target = torch.zeros(shape, dtype=torch.float64)
    for b, n in (labels >= 0).nonzero().tolist():
        target[b, n, labels[b, n]] = quality[b, n].double()
    bce = F.binary_cross_entropy_with_logits(oracle, target, reduction="none")
    expected = ((oracle.sigmoid() - target).abs() ** 2 * bce).sum()
    loss = quality_focal_loss(logits, labels, quality)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.grad.double(), oracle.grad, rtol=1e-4, atol=1e-5)


def test_saturated_logits_stay_finite():
    logits = torch.tensor([[[1e4, -1e4, 88.0, -88.0]]], requires_grad=True)
    quality_focal_loss(logits, torch.tensor([[1]]), torch.tensor([[0.5]])).backward()
    assert logits.grad.isfinite().all()


def test_giou_by_hand():
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 1, 1], [0, 0, 4, 4], [1, 1, 1, 1]])
    target = torch.tensor([[1.0, 1, 3, 3], [2, 2, 3, 3], [0, 0, 4, 4], [0, 0, 2, 2]])
    expected = torch.tensor([1 - (1 / 7 - 2 / 9), 1 - (0 - 7 / 9), 0.0, 1.0])
    torch.testing.assert_close(giou_loss(boxes, target), expected)


def test_giou_gradient_is_finite_for_empty_and_far_boxes():
    boxes = torch.tensor([[5.0, 5, 5, 5], [9, 9, 3, 3], [0, 0, 1e5, 1e5], [2, 2, 2, 2]], requires_grad=True)
    target = torch.tensor([[5.0, 5, 5, 5], [0, 0, 1, 1], [0, 0, 1e-3, 1e-3], [-4, -4, -3, -3]])
    giou_loss(boxes, target).sum().backward()
    assert boxes.grad.isfinite().all()
