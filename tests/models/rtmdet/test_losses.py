"""The loss of boxes against its definition, by hand."""

import torch

from rtmdet_fast.models.rtmdet.losses import giou_loss


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
