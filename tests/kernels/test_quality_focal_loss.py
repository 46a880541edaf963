"""quality_focal_loss: the reference and the Triton kernel against its definition in float64."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from lowering import TARGETS, needs_lowering, record_launches
from on_triton import DEVICE, needs_triton, not_interpreted
from torch.library import opcheck

from rtmdet_fast.kernels import _dispatch
from rtmdet_fast.kernels import quality_focal_loss as m
from rtmdet_fast.models.rtmdet.detection_head import Assignment, DetectionHead

pytestmark = pytest.mark.usefixtures("poison", "slow_ones_wait")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of gradients; sums are of float32
BOTH = [
    pytest.param(m.quality_focal_loss_reference, id="reference"),
    pytest.param(m.quality_focal_loss, marks=needs_triton, id="triton"),
]


def oracle(logits, labels, quality, weight=None):
    target = torch.zeros_like(logits)
    for b, n in ((labels >= 0) & (labels < logits.shape[2])).nonzero().tolist():
        target[b, n, labels[b, n]] = quality[b, n]
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    loss = ((logits.sigmoid() - target).abs() ** 2 * bce).sum(-1)
    return (loss if weight is None else loss * weight).sum()


def inputs(shape, dtype=torch.float32, weighted=False, spread=5.0):
    """Logits, labels of background, of the first and the last class and of others, quality and maybe weights."""
    B, N, C = shape
    logits = (torch.randn(shape) * spread).to(dtype)
    labels = torch.randint(-1, C, (B, N))
    labels.flatten()[: 3 * N // 4 : 3] = C - 1
    labels.flatten()[1 : 3 * N // 4 : 3] = 0
    quality = torch.rand(B, N).where(labels >= 0, 0.0)
    weight = torch.rand(B, N) * 2 if weighted else None
    return tuple(x if x is None else x.to(DEVICE) for x in (logits, labels, quality, weight))


def loss_and_gradient(function, logits, *rest, scale=1.0):
    leaf = logits.detach().clone().requires_grad_()
    loss = function(leaf, *rest)
    (scale * loss).backward()
    return loss.detach(), leaf.grad


def check(function, logits, labels, quality, weight=None, scale=1.0):
    doubles = logits.double(), labels, quality.double(), None if weight is None else weight.double()
    expected, gradient = loss_and_gradient(oracle, *doubles, scale=scale)
    loss, found = loss_and_gradient(function, logits, labels, quality, weight, scale=scale)
    assert loss.dtype == torch.float32 and loss.shape == () and found.dtype == logits.dtype
    assert abs(loss.item() - expected.item()) <= 1e-5 * expected.item() + 1e-6
    limit = TOLERANCE[logits.dtype] * max(gradient.abs().max().item(), 1e-3)
    assert (found.double() - gradient).abs().max().item() <= limit  # NaN fails


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 7, 3), (3, 41, 80), (1, 37, 91), (2, 130, 20), (1, 3, 1203)], ids=str)
def test_parity(function, shape, dtype, weighted):
    check(function, *inputs(shape, dtype, weighted), scale=0.37)


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("classes", [3, 12, 80])
def test_blocks_that_begin_within_a_row(function, classes, monkeypatch):
    for name in m.TUNING:
        monkeypatch.setitem(m.TUNING, name, {"BLOCK": 128, "num_warps": 4})
    check(function, *inputs((2, 1 + 640 // classes, classes), weighted=True))


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("label", [-1, -7, 5, 6, 2**40])
def test_labels_outside_of_the_classes_are_background(function, label):
    logits, labels, quality, _ = inputs((2, 9, 5))
    labels[1] = label
    quality[1] = float("nan")
    expected = loss_and_gradient(function, logits, labels.clamp(max=5).where(labels < 5, -1), quality.nan_to_num(0.0))
    found = loss_and_gradient(function, logits, labels, quality)
    assert all(map(torch.equal, found, expected))
    check(function, logits, labels.where(labels < 5, -1), quality.nan_to_num(0.0))


@pytest.mark.parametrize("function", BOTH)
def test_images_without_objects(function):
    logits, labels, quality, _ = inputs((3, 20, 80))
    labels[1], quality[1] = -1, 0
    check(function, logits, labels, quality)
    check(function, logits[1:2], labels[1:2], quality[1:2])
    check(function, logits, torch.full_like(labels, -1), torch.zeros_like(quality))


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3)], ids=str)
def test_no_logits(function, shape):
    loss, gradient = loss_and_gradient(function, *inputs(shape))
    assert loss == 0 and gradient.shape == shape


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_large_logits(function, dtype):
    """Of both signs, at the label and elsewhere, with every quality; as far as the dtype goes."""
    top = min(torch.finfo(dtype).max, 1e30)
    logits = torch.tensor([0.0, 17, 88, 104, 1e4, top], dtype=torch.float64)
    logits = torch.cat((logits, -logits)).to(dtype).expand(3, 12, 12).contiguous().to(DEVICE)
    labels = torch.arange(12, device=DEVICE).expand(3, 12)
    quality = torch.tensor([0.0, 0.5, 1.0], device=DEVICE)[:, None].expand(3, 12)
    leaf, double = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss, expected = function(leaf, labels, quality), oracle(double, labels, quality.double())
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        leaf.grad.double(), double.grad, rtol=1e-3 if dtype != torch.bfloat16 else 8e-3, atol=1e-5
    )


@pytest.mark.parametrize("function", BOTH)
def test_small_losses_keep_their_digits(function):
    """log(1 + e) in float32 has none of an e below 6e-8: here the score is 1e-8."""
    logits, labels, quality, _ = inputs((1, 64, 16))
    logits = torch.full_like(logits, -18.4)
    expected = oracle(logits.double(), torch.full_like(labels, -1), quality.double()).item()
    found = function(logits, torch.full_like(labels, -1), quality).item()
    assert found == pytest.approx(expected, rel=1e-5) and 0 < found < 1e-20


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(function, value):
    logits, labels, quality, _ = inputs((1, 9, 16))
    logits[0, 3, 5], labels[0, 3] = value, 2
    loss, gradient = loss_and_gradient(function, logits, labels, quality)
    assert not loss.isfinite()
    gradient[0, 3, 5] = 0
    assert gradient.isfinite().all()


@pytest.mark.parametrize("function", BOTH)
def test_other_layouts_and_dtypes_of_the_inputs(function):
    logits, labels, quality, weight = inputs((2, 8, 6), weighted=True)
    expected = loss_and_gradient(function, logits, labels, quality, weight)
    strided = logits.transpose(0, 1).contiguous().transpose(0, 1)
    spread = torch.stack((quality, quality), -1)[..., 0]
    found = loss_and_gradient(function, strided, labels.int(), spread, weight.double())
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("function", BOTH)
def test_no_gradient_but_of_the_logits(function):
    logits, labels, quality, _ = inputs((1, 4, 3))
    assert not function(logits, labels, quality).requires_grad
    loss = m.quality_focal_loss(logits.requires_grad_(), labels, quality.requires_grad_())
    loss.backward()
    assert quality.grad is None and logits.grad is not None


@not_interpreted
def test_gradcheck_of_the_reference():
    logits, labels, quality, weight = inputs((2, 3, 4), torch.float64, weighted=True, spread=2.0)
    function = partial(m.quality_focal_loss, labels=labels, quality=quality.double(), weight=weight.double())
    assert torch.autograd.gradcheck(function, [logits.requires_grad_()])


@pytest.mark.parametrize(
    ("message", "bad"),
    [
        ("logits: expected shape", dict(logits=torch.ones(3, 4))),
        ("logits: expected shape", dict(logits=torch.ones(2, 3, 0))),
        ("logits: expected a floating", dict(logits=torch.ones(2, 3, 4, dtype=torch.int32))),
        ("labels: expected an integer", dict(labels=torch.ones(2, 3))),
        ("labels: expected an integer", dict(labels=torch.ones(2, 3, dtype=torch.bool))),
        ("labels: expected shape", dict(labels=torch.ones(2, 4, dtype=torch.int64))),
        ("quality: expected shape", dict(quality=torch.ones(2, 3, 1))),
        ("quality: expected a floating", dict(quality=torch.ones(2, 3, dtype=torch.int64))),
        ("weight: on meta", dict(weight=torch.ones(2, 3, device="meta"))),
    ],
)
def test_bad_input_names_the_argument(message, bad):
    given = dict(logits=torch.ones(2, 3, 4), labels=torch.ones(2, 3, dtype=torch.int64), quality=torch.ones(2, 3))
    with pytest.raises((ValueError, TypeError), match=message):
        m.quality_focal_loss(**{**given, **bad})


@needs_triton
def test_opcheck():
    tests = ("test_schema", "test_autograd_registration") + ("test_faketensor",) * (DEVICE == "cuda")
    logits, *rest = inputs((2, 5, 4), weighted=True)
    opcheck(m._forward.library_op, (logits.requires_grad_(), *rest), test_utils=tests)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("function", BOTH)
def test_the_head_takes_it(function, dtype, monkeypatch):
    """And hands it the logits as they are: no copy of them in float32."""
    from rtmdet_fast.models.rtmdet import detection_head

    given = []

    def watched(logits, *rest):
        given.append(logits.dtype)
        return function(logits, *rest)

    monkeypatch.setattr(detection_head, "quality_focal_loss", watched)
    logits, labels, quality, _ = inputs((2, 9, 3), dtype)
    assignment = Assignment(torch.where(labels < 0, -1, 0), quality, labels)
    boxes = torch.rand(2, 9, 4, device=DEVICE).cumsum(-1).requires_grad_()
    truths = torch.tensor([[[0.0, 0, 1, 1]]], device=DEVICE).expand(2, 1, 4)
    targets = detection_head.Targets(truths, labels.new_zeros(2, 1), labels.new_ones(2))
    losses = DetectionHead(8, 3).box_losses(logits, boxes, targets, assignment)
    expected = oracle(logits.double(), labels, quality.double()) / max(quality.double().sum(), 1)
    torch.testing.assert_close(losses["loss_cls"].double(), expected, rtol=1e-5, atol=0)
    assert given == [dtype]


def record(monkeypatch, logits, weighted):
    monkeypatch.setattr(_dispatch, "BACKEND", "triton")
    launches = record_launches(monkeypatch, m)
    B, N, _ = logits.shape
    labels, quality = torch.zeros(B, N, dtype=torch.int64), torch.zeros(B, N)
    m.quality_focal_loss(logits.requires_grad_(), labels, quality, quality if weighted else None).backward()
    return launches


CLASSES = (80, 20, 15, 1)


def thinned(cases, kept):
    return [case if i in kept else pytest.param(*case, marks=pytest.mark.slow) for i, case in enumerate(cases)]


@needs_lowering
@pytest.mark.parametrize(
    ("classes", "dtype", "target"), thinned(list(product(CLASSES, TOLERANCE, TARGETS)), {4 + 1, 12 + 3, 24 + 10})
)
def test_lowering(classes, dtype, target, monkeypatch):
    launches = record(monkeypatch, torch.zeros(2, 100, classes, dtype=dtype), weighted=classes == 20)
    assert len(launches) == 2
    for launch in launches:
        resources = launch.lower(target)
        assert resources.spills == 0 and resources.registers <= 128, (launch, resources.registers)


@needs_lowering
def test_forward_and_backward_are_a_launch_each_and_read_the_logits_alone(monkeypatch):
    launches = record(monkeypatch, torch.zeros(4, 21, 80, dtype=torch.float16), weighted=False)
    signatures = [dict(launch.signature) for launch in launches]
    assert [signature["logits_ptr"][:5] for signature in signatures] == ["*fp16", "*fp16"]
    assert [signature["out_ptr"][:5] for signature in signatures] == ["*fp32", "*fp16"]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_shapes_of_the_models_twice(dtype):
    logits, labels, quality, _ = inputs((32, 8400, 80), dtype)
    labels = labels.where(torch.rand(labels.shape, device=DEVICE) < 0.01, -1)
    once = loss_and_gradient(m.quality_focal_loss, logits, labels, quality)
    assert all(map(torch.equal, once, loss_and_gradient(m.quality_focal_loss, logits, labels, quality)))
    doubles = logits.double(), labels, quality.double()
    expected, gradient = loss_and_gradient(m.quality_focal_loss_reference, *doubles)
    assert abs(once[0].item() - expected.item()) <= 1e-5 * expected.item()
    assert (once[1].double() - gradient).abs().max() <= TOLERANCE[dtype] * gradient.abs().max()
