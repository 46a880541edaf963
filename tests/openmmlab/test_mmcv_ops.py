"""mmcv's own functions on top of the stand-in, and this project's functions in their place."""

import inspect
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from needs import openmmlab

openmmlab("mmcv")

import mmcv.ops
from mmengine.config import ConfigDict

import rtmdet_fast.compat.mmcv_ext as ext
from rtmdet_fast import ops

lite = pytest.mark.skipif(sys.modules["mmcv._ext"] is not ext, reason="this mmcv is a compiled one")


def boxes(n: int, seed: int = 0, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """xyxy [n, 4], distinct scores, labels."""
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=g) * 100
    xyxy = torch.cat([corner, corner + 4 + torch.rand(n, 2, generator=g) * 36], 1)
    return xyxy, torch.randperm(n, generator=g) / n, torch.randint(classes, (n,), generator=g)


def rotated(n: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed + 1)
    xyxy = boxes(n, seed)[0]
    return torch.cat([xyxy[:, :2], xyxy[:, 2:] - xyxy[:, :2], torch.rand(n, 1, generator=g) * 3 - 1.5], 1)


def same(theirs, ours) -> None:
    assert len(theirs[1]) > 10
    torch.testing.assert_close(theirs, ours, rtol=0, atol=0)


@lite
def test_the_stand_in_serves_every_module_of_mmcv():
    names = set(
        re.findall(r"ext_module\.(\w+)", "".join(f.read_text() for f in Path(mmcv.ops.__file__).parent.glob("*.py")))
    )
    assert len(names) > 100 and all(callable(getattr(ext, name)) for name in names)
    with pytest.raises(NotImplementedError, match="three_nn_forward needs the compiled mmcv"):
        mmcv.ops.three_nn(torch.zeros(1, 3, 3), torch.zeros(1, 3, 3))


@pytest.mark.parametrize("n", [60, 700])
def test_nms_and_batched_nms(n):
    xyxy, scores, labels = boxes(n)
    same(mmcv.ops.nms(xyxy, scores, 0.5), ops.nms(xyxy, scores, 0.5))
    arguments = (xyxy, scores, 0.4, 1, 0.2, 50)
    same(mmcv.ops.nms(*arguments), ops.nms(*arguments))
    for cfg in (
        ConfigDict(type="nms", iou_threshold=0.6),  # what mmdet passes
        dict(type="nms", iou_threshold=0.6, max_num=40, score_threshold=0.1),
        dict(type="nms", iou_threshold=0.6, split_thr=20),
        dict(type="nms", iou_threshold=0.6, split_thr=20, class_agnostic=True, max_num=30, score_threshold=0.1),
        dict(type="nms", iou_threshold=0.6, class_agnostic=True),
        None,
    ):
        theirs = mmcv.ops.batched_nms(xyxy, scores, labels, cfg)
        same(theirs, ops.batched_nms(xyxy, scores, labels, cfg))
    same(
        mmcv.ops.batched_nms(xyxy, scores, labels, dict(iou_threshold=0.3), True),
        ops.batched_nms(xyxy, scores, labels, dict(iou_threshold=0.3), True),
    )


def test_nms_of_arrays():
    xyxy, scores, _ = (x.numpy() for x in boxes(80))
    theirs, ours = mmcv.ops.nms(xyxy, scores, 0.5), ops.nms(xyxy, scores, 0.5)
    for a, b in zip(theirs, ours, strict=True):
        assert isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)


def test_nms_rotated():
    dets = rotated(300)
    _, scores, labels = boxes(300)
    same(mmcv.ops.nms_rotated(dets, scores, 0.1), ops.nms_rotated(dets, scores, 0.1))
    same(
        mmcv.ops.nms_rotated(dets, scores, 0.3, None, False), ops.nms_rotated(dets, scores, 0.3, None, clockwise=False)
    )
    cfg = dict(type="nms_rotated", iou_threshold=0.1)
    same(mmcv.ops.batched_nms(dets, scores, labels, cfg), ops.batched_nms(dets, scores, labels, cfg))


def test_labels_of_nms_rotated_count_here_alone():
    dets = rotated(300)
    _, scores, labels = boxes(300)
    same(mmcv.ops.nms_rotated(dets, scores, 0.3, labels), mmcv.ops.nms_rotated(dets, scores, 0.3))
    assert len(ops.nms_rotated(dets, scores, 0.3, labels)[1]) > len(ops.nms_rotated(dets, scores, 0.3)[1])


def answer(module, name, args, kwargs):
    try:
        return getattr(module, name)(*args, **kwargs)
    except AssertionError:
        return None


@pytest.mark.filterwarnings("ignore:.iou_thr:DeprecationWarning")
@pytest.mark.parametrize("seed", range(100))
def test_odd_input_is_answered_alike(seed):
    """Lists with ties, IoUs at the threshold, boxes and scores that are no numbers, thresholds of any kind."""
    g = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (1,), generator=g))]

    n = pick(1, 7, 60, 300, 1200)
    corner = torch.randint(-3, 20, (n, 2), generator=g).float() if seed % 2 else torch.rand(n, 2, generator=g) * 50
    xyxy = torch.cat([corner, corner + torch.randint(-1, 12, (n, 2), generator=g)], 1)
    scores = (torch.rand(n, generator=g) * pick(5, 10**6)).round() / 5
    if seed % 3 == 0:
        xyxy[pick(0, -1), pick(0, 3)], scores[0] = pick(torch.nan, torch.inf), pick(torch.nan, -torch.inf)
    idxs = pick(torch.randint(-2, 9, (n,), generator=g), torch.rand(n, generator=g) * 4, scores > 0.5)
    threshold = pick(0.0, 0.1, 0.3, 0.5, 0.6, 2 / 3, 1.0, 1.5, -0.1)
    cfg = dict(offset=pick(0, 1), max_num=pick(-1, 0, 20), score_threshold=pick(0, 0.4))
    batched = cfg | dict(iou_threshold=threshold, split_thr=pick(1, 100, 10000), class_agnostic=pick(True, False))
    for name, args, kwargs in (
        ("nms", (xyxy, scores, threshold), cfg),
        ("nms", (xyxy.numpy(), scores.numpy()), dict(iou_thr=threshold)),
        ("nms", (xyxy[:0], scores[:0], threshold), {}),
        ("nms", (xyxy[:, :3], scores, threshold), {}),
        ("nms", (xyxy, scores[1:], threshold), {}),
        ("nms", (xyxy, scores, threshold), dict(offset=2)),
        ("nms_rotated", (xyxy[:0], scores[:0], threshold), {}),
        ("batched_nms", (xyxy, scores, idxs, batched), {}),
        ("batched_nms", (xyxy, scores, idxs, None), {}),
    ):
        theirs, ours = (answer(module, name, args, kwargs) for module in (mmcv.ops, ops))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
def test_soft_nms(method):
    xyxy, scores, labels = boxes(80)
    arguments = (xyxy, scores, 0.4, 0.5, 0.05, method, 1)
    theirs, ours = mmcv.ops.soft_nms(*arguments), ops.soft_nms(*arguments)
    assert 10 < len(theirs[1]) < 80
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=0)
    for split_thr in (20, 10000):
        cfg = dict(type="soft_nms", iou_threshold=0.4, method=method, split_thr=split_thr)
        theirs, ours = (module.batched_nms(xyxy, scores, labels, cfg) for module in (mmcv.ops, ops))
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=0)


@pytest.mark.parametrize("mode", ["iou", "iof"])
@pytest.mark.parametrize("clockwise", [True, False])
@pytest.mark.parametrize("aligned", [True, False])
def test_box_iou_rotated(mode, clockwise, aligned):
    one, two = rotated(50), rotated(50) + 3 * rotated(50, seed=5) / 50
    theirs = mmcv.ops.box_iou_rotated(one, two, mode, aligned, clockwise)
    assert (theirs > 0.2).sum() > 10
    torch.testing.assert_close(theirs, ops.box_iou_rotated(one, two, mode, aligned, clockwise), atol=1e-5, rtol=0)


@lite
def test_diff_iou_rotated(shared):
    cases = torch.load(shared / "reference/rotated_iou_cases.pt", weights_only=True)
    for name, (one, two, iou) in ((name, case.values()) for name, case in cases.items()):
        # mmcv's Python finds the vertices with absolute tolerances, which float32 does not meet for coinciding boxes
        found = mmcv.ops.diff_iou_rotated_2d(one[None].double(), two[None].double())[0]
        assert (found - iou).abs().max() < 1e-4, name
    one, two = rotated(200).requires_grad_(), rotated(200, seed=7)
    two[:100, :2] = one[:100, :2].detach() + 3
    theirs = mmcv.ops.diff_iou_rotated_2d(one[None], two[None])[0]
    ours = ops.box_iou_rotated(one, two, "iou", True)
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
    grads = [torch.autograd.grad(iou.sum(), one)[0] for iou in (theirs, ours)]
    torch.testing.assert_close(*grads, atol=1e-3, rtol=1e-3)


def test_deformable_attention():
    """The stand-in under mmcv's own autograd function, and this project's, against mmcv's on a CPU."""
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction, multi_scale_deformable_attn_pytorch

    g = torch.Generator().manual_seed(0)
    shapes, starts = torch.tensor([[6, 9], [3, 5]]), torch.tensor([0, 54])
    tensors = (
        torch.rand(2, 69, 4, 8, generator=g),
        torch.rand(2, 11, 4, 2, 3, 2, generator=g) * 1.4 - 0.2,
        torch.rand(2, 11, 4, 2, 3, generator=g),
    )
    upstream = torch.rand(2, 11, 32, generator=g)
    results = []
    functions = [
        lambda v, x, w: multi_scale_deformable_attn_pytorch(v, shapes, x, w),
        lambda v, x, w: ops.MultiScaleDeformableAttnFunction.apply(v, shapes, starts, x, w, 64),
    ]
    if sys.modules["mmcv._ext"] is ext:
        functions.append(lambda v, x, w: MultiScaleDeformableAttnFunction.apply(v, shapes, starts, x, w, 64))
    for function in functions:
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = function(*leaves)
        results.append((out, *torch.autograd.grad(out, leaves, upstream)))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["nms", "soft_nms", "batched_nms", "nms_rotated", "box_iou_rotated", "multi_scale_deformable_attn_pytorch"]
)
def test_signatures(name):
    module = mmcv.ops.multi_scale_deform_attn if "deform" in name else mmcv.ops
    theirs = inspect.signature(inspect.unwrap(getattr(module, name))).parameters
    ours = inspect.signature(getattr(ops, name)).parameters
    assert list(theirs) == list(ours)
    for a, b in zip(theirs.values(), ours.values(), strict=True):
        assert a.default == b.default and a.kind == b.kind


def test_torchvision_signatures():
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    from rtmdet_fast.ops import torchvision as own

    xyxy, scores, labels = boxes(500)
    torch.testing.assert_close(torchvision.ops.nms(xyxy, scores, 0.5), own.nms(xyxy, scores, 0.5))
    arguments = (xyxy, scores, labels, 0.5)
    torch.testing.assert_close(torchvision.ops.batched_nms(*arguments), own.batched_nms(*arguments))
    for name in ("nms", "batched_nms"):
        theirs = inspect.signature(getattr(torchvision.ops, name)).parameters
        assert list(theirs) == list(inspect.signature(getattr(own, name)).parameters)
