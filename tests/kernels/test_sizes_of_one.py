"""Kernels for sizes of 1, which Triton's compiler takes for constants: Python's integers, not its own.

The interpreter does not show what that breaks, and the machine code of usual sizes neither.
"""

import pytest
import torch
from lowering import needs_lowering, record_launches

from rtmdet_fast.kernels import (
    _dispatch,
    assign,
    assign_triton,
    batch_norm,
    bn_silu,
    deformable_attention,
    deformable_attention_triton,
    dwconv_bn_silu,
    dynamic_mask,
    dynamic_mask_triton,
    letterbox,
    nms,
    quality_focal_loss,
    rotated_iou,
)

pytestmark = needs_lowering


@pytest.fixture
def launches(monkeypatch):
    monkeypatch.setattr(_dispatch, "BACKEND", "triton")
    # nothing is run: what a kernel would have written must be a possible index
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    modules = (
        assign_triton, batch_norm, bn_silu, deformable_attention_triton, dwconv_bn_silu, dynamic_mask_triton,
        letterbox, nms, quality_focal_loss, rotated_iou,
    )  # fmt: skip
    return record_launches(monkeypatch, *modules)


def trace_all(launches, least: int) -> None:
    launches = set(launches)
    assert len(launches) >= least
    for launch in launches:
        launch.trace()


@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (1, 16, 1, 4), (1, 1, 17, 16)], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_layers(launches, shape, memory_format):
    x = torch.randn(shape).to(memory_format=memory_format).requires_grad_()
    weight, bias, mean, var = (torch.ones(shape[1]) for _ in range(4))
    weight.requires_grad_()
    for training in (False, True):
        bn_silu.bn_silu(x, weight, bias, mean, var, training=training).sum().backward()
        for size, stride in ((5, 1), (3, 2)):
            kernel = torch.randn(shape[1], 1, size, size, requires_grad=True)
            arguments = x, kernel, weight, bias, mean, var
            dwconv_bn_silu.dwconv_bn_silu(*arguments, stride=stride, training=training).sum().backward()
    trace_all(launches, 10)


@pytest.mark.parametrize("box", [4, 5])
def test_boxes(launches, box):
    for images, priors, truths, classes in ((1, 1, 1, 1), (2, 2, 1, 2), (1, 2, 2, 1)):
        boxes, gt_boxes = torch.rand(images, priors, box), torch.rand(images, truths, box)
        labels = torch.zeros(images, priors, dtype=torch.int64)
        counts = torch.full((images,), truths)
        problem = (
            boxes,
            torch.rand(images, priors, classes),
            torch.rand(priors, 4),
            gt_boxes,
            labels[:, :truths],
            counts,
        )
        assign.dynamic_soft_label_assign(*problem)
        assign.atss_assign(boxes, *problem[2:], strides=(8, 16)[:truths], topk=classes)
        nms.batched_nms_padded(boxes, torch.rand(images, priors), labels, 0.5, 1)
        if box == 4:
            assign.simota_assign(*problem)
            assign.task_aligned_assign(*problem)
        else:
            rotated_iou.box_iou_rotated(boxes, gt_boxes)
            rotated_iou.box_iou_rotated(boxes.requires_grad_(), boxes, aligned=True).sum().backward()
    trace_all(launches, 10)


def test_masks(launches):
    features, kernels = torch.rand(1, 8, 1, 1, requires_grad=True), torch.rand(1, 169, requires_grad=True)
    index = torch.zeros(1, dtype=torch.int64)
    inputs = features, kernels, torch.rand(1, 2), torch.ones(1), index
    dynamic_mask.dynamic_mask_logits(*inputs, feature_stride=1).sum().backward()
    truth = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    dynamic_mask.dynamic_mask_dice_loss(*inputs, truth, index, feature_stride=1).sum().backward()
    trace_all(launches, 6)


@pytest.mark.parametrize("method", ["bilinear", "discrete"])
def test_attention(launches, method):
    for sizes, D in ((((1, 1),), 1), (((1, 1), (1, 2)), 4)):
        S, P = sum(h * w for h, w in sizes), len(sizes)
        value, offsets = torch.rand(1, S, 1, D, requires_grad=True), torch.rand(1, 1, 1, P, 2)
        weights, points = torch.rand(1, 1, 1, P), (1,) * P
        deformable_attention.deformable_attention(
            value, sizes, offsets, weights, points, method=method
        ).sum().backward()
        deformable_attention.box_deformable_attention(
            value, sizes, torch.rand(1, 1, 4), offsets, weights, points, method=method
        ).sum().backward()
    trace_all(launches, 8)


def test_losses(launches):
    for shape in ((1, 1, 1), (1, 2, 1), (2, 1, 16)):
        labels = torch.zeros(shape[:2], dtype=torch.int64)
        logits = torch.rand(shape, requires_grad=True)
        quality_focal_loss.quality_focal_loss(logits, labels, labels.float()).backward()
    trace_all(launches, 4)


def test_letterbox(launches):
    for images, capacity, size, pad in ((1, 1, 1, 1), (1, 3, 1, 0), (2, 3, 2, 1)):
        frames, sizes = torch.zeros(images, capacity, dtype=torch.uint8), torch.ones(images, 2, dtype=torch.int32)
        for squash in (False, True):
            options = dict(mean=(0, 0, 0), std=(1, 1, 1), pad=pad, squash=squash)
            letterbox.letterbox_normalize(frames, sizes, size, **options)
    trace_all(launches, 2)
