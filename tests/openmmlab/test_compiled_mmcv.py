"""The stand-in's ops beside those of a compiled mmcv, through mmcv's own functions: what these have on a CPU.

`make bench-openmmlab` compiles one, in .venv-mmcv, whose Python then runs this file under pytest with `-W default`.
"""

import itertools
import sys
from contextlib import contextmanager

import pytest
import torch
from needs import openmmlab

openmmlab("mmcv")

import mmcv.ops

import rtmdet_fast.compat.mmcv_ext as ours

compiled = sys.modules["mmcv._ext"]
pytestmark = pytest.mark.skipif(compiled is ours, reason="this mmcv is mmcv-lite: `make bench-openmmlab` compiles one")


@contextmanager
def standing_in():
    modules = [m for n, m in sys.modules.items() if n.startswith("mmcv.ops.") and getattr(m, "ext_module", None)]
    for module in modules:
        module.ext_module = ours
    try:
        yield
    finally:
        for module in modules:
            module.ext_module = compiled


def random(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_same(function, *leaves: torch.Tensor, tolerance: float) -> None:
    """Outputs, and gradients of `leaves`, of both, to the given part of the greatest value."""

    def results():
        inputs = [x.clone().requires_grad_() for x in leaves]
        output = function(*inputs)
        gradients = (
            torch.autograd.grad(output, inputs, random(*output.shape, seed=9, dtype=output.dtype)) if inputs else ()
        )
        return output.detach(), *gradients

    theirs = results()
    with standing_in():
        found = results()
    for a, b in zip(theirs, found, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a.double() - b.double()).abs().max() <= tolerance * a.double().abs().max()


EXACT = [(torch.float32, 2e-5), (torch.float64, 1e-10)]


def regions(dtype) -> torch.Tensor:
    """[12, 5] over two images of 92 x 68 pixels, some of them partly outside."""
    corner = random(12, 2, seed=1).abs() * 40 - 15
    return torch.cat([torch.arange(12)[:, None] % 2, corner, corner + random(12, 2, seed=2).abs() * 40], 1).to(dtype)


ALIGNS = [(*case, *exact) for case in itertools.product(("avg", "max"), (True, False), (0, 2)) for exact in EXACT]
HALF = ("avg", True, 2, torch.float16, 0.05)  # else coordinates rounded to half precision choose other samples


@pytest.mark.parametrize("mode, aligned, ratio, dtype, tolerance", [*ALIGNS, HALF])
def test_roi_align(mode, aligned, ratio, dtype, tolerance):
    features, rois = random(2, 6, 17, 23, dtype=dtype), regions(dtype)
    assert_same(
        lambda x: mmcv.ops.roi_align(x, rois, (3, 4), 0.25, ratio, mode, aligned), features, tolerance=tolerance
    )


@pytest.mark.parametrize("dtype, tolerance", EXACT)
@pytest.mark.parametrize("aligned, clockwise, ratio", itertools.product((True, False), (True, False), (0, 2)))
def test_roi_align_rotated(aligned, clockwise, ratio, dtype, tolerance):
    rois = regions(dtype)
    rois = torch.cat([rois[:, :3] + 10, rois[:, 3:] - rois[:, 1:3], random(12, 1, seed=3, dtype=dtype) * 3], 1)
    rois[:, 0] -= 10
    assert_same(
        lambda x: mmcv.ops.roi_align_rotated(x, rois, (3, 4), 0.25, ratio, aligned, clockwise),
        random(2, 6, 17, 23, dtype=dtype),
        tolerance=tolerance,
    )


@pytest.mark.parametrize("points", [1, 5])
def test_rotated_feature_align(points):
    boxes = random(2, 17, 23, 5, seed=1) * 20 + torch.tensor([30.0, 40, 20, 20, 0])
    assert_same(lambda x: mmcv.ops.rotated_feature_align(x, boxes, 0.25, points), random(2, 6, 17, 23), tolerance=2e-5)


@pytest.mark.parametrize("dtype, tolerance", EXACT)
@pytest.mark.parametrize("stride, padding, dilation, groups, deform_groups", [
    (1, 1, 1, 1, 1), (2, 1, 1, 2, 1), (1, 2, 2, 1, 2), (2, 0, 1, 4, 4),
])  # fmt: skip
def test_deformable_convolutions(stride, padding, dilation, groups, deform_groups, dtype, tolerance):
    image, weight, bias = random(4, 8, 9, 11, dtype=dtype), random(8, 8 // groups, 3, 3, seed=1, dtype=dtype), random(8)
    height, width = ((n + 2 * padding - 2 * dilation - 1) // stride + 1 for n in (9, 11))
    offset = random(4, deform_groups * 18, height, width, seed=2, dtype=dtype) * 2
    offset[..., :2] = 0  # at pixels, as in a new layer, and right outside
    mask = random(4, deform_groups * 9, height, width, seed=3, dtype=dtype).sigmoid()
    settings = stride, padding, dilation, groups, deform_groups
    assert_same(lambda *x: mmcv.ops.deform_conv2d(*x, *settings), image, offset, weight, tolerance=tolerance)
    assert_same(
        lambda *x: mmcv.ops.modulated_deform_conv2d(*x, *settings),
        *(image, offset, mask, weight, bias.to(dtype)),
        tolerance=tolerance,
    )


def test_active_rotated_filter():
    indices = torch.stack([torch.randperm(72, generator=torch.Generator().manual_seed(i)) + 1 for i in range(8)], 1)
    indices = indices.view(8, 3, 3, 8).int()
    assert_same(lambda x: mmcv.ops.active_rotated_filter(x, indices), random(5, 4, 8, 3, 3), tolerance=1e-6)


@pytest.mark.parametrize("kind", [0, 1])
def test_psa_mask(kind):
    apply = sys.modules["mmcv.ops.psa_mask"].PSAMaskFunction.apply
    assert_same(lambda x: apply(x, kind, (3, 5)), random(2, 15, 6, 7), tolerance=0)


def rectangles(n: int) -> torch.Tensor:
    """Corners [n, 8] of rotated boxes."""
    center, (w, h, angle) = random(n, 2).abs() * 30, (random(3, n, seed=1).abs() * torch.tensor([20.0, 12, 3])[:, None])
    along, across = (
        torch.stack([angle.cos(), angle.sin()], 1) * w[:, None],
        torch.stack([-angle.sin(), angle.cos()], 1) * h[:, None],
    )
    return torch.stack([center + s * along + t * across for s, t in ((1, 1), (-1, 1), (-1, -1), (1, -1))], 1).flatten(1)


def test_quadrilaterals():
    """Rectangles: of other quadrilaterals mmcv misjudges which corners are inside."""
    boxes, scores = rectangles(60), torch.randperm(60, generator=torch.Generator().manual_seed(0)) / 60
    for mode, aligned in itertools.product(("iou", "iof"), (False, True)):
        assert_same(lambda: mmcv.ops.box_iou_quadri(boxes, boxes.flip(0), mode, aligned), tolerance=1e-4)  # noqa: B023
    for labels in (None, torch.arange(60) % 3):
        assert_same(lambda: mmcv.ops.nms_quadri(boxes, scores, 0.3, labels)[1], tolerance=0)  # noqa: B023


def test_upright_boxes():
    boxes = torch.cat([random(60, 2).abs() * 30, random(60, 2).abs() * 30 + random(60, 2, seed=1).abs() * 30], 1)
    for mode, offset, aligned in itertools.product(("iou", "iof"), (0, 1), (False, True)):
        assert_same(lambda: mmcv.ops.bbox_overlaps(boxes, boxes.flip(0), mode, aligned, offset), tolerance=1e-6)  # noqa: B023
    dets = torch.cat([boxes, torch.randperm(60)[:, None] / 60], 1)
    theirs = mmcv.ops.nms_match(dets, 0.3)
    with standing_in():
        found = mmcv.ops.nms_match(dets, 0.3)
    assert [x.tolist() for x in theirs] == [x.tolist() for x in found] and 5 < len(found) < 60
