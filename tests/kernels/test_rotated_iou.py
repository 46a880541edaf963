"""Rotated IoU and its loss: against polygon clipping in float64, finite differences and the exact fixtures."""

from __future__ import annotations

import math
import os
from itertools import product

import lowering
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lowering import TARGETS, needs_lowering, record_launches
from polygons import exact_iou
from torch.library import opcheck

from rtmdet_fast.kernels import _dispatch
from rtmdet_fast.kernels import rotated_iou as m

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNS_TRITON = DEVICE == "cuda" or INTERPRETED
needs_triton = pytest.mark.skipif(not RUNS_TRITON, reason="needs CUDA or TRITON_INTERPRET=1")
pytestmark = pytest.mark.usefixtures("poison")
has_triton = pytest.mark.skipif(not _dispatch.AVAILABLE, reason="needs Triton")
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="torch.compile cannot trace an interpreted kernel")
BACKENDS = ["reference", pytest.param("triton", marks=needs_triton)]
# absolute; half inputs are compared with the exact IoU of what they were rounded to
TOL = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5}
FAMILIES = [
    "random",
    "overlapping",
    "identical",
    "jitter_1e-06",
    "jitter_1e-05",
    "jitter_0.0001",
    "jitter_0.001",
    "jitter_0.01",
    "half_turn",
    "quarter_turn_swapped",
    "sharing_an_edge",
    "contained",
    "far_from_origin_20000px",
    "normalised_tiny",
    "very_thin",
    "zero_width",
    "axis_aligned_by_hand",
]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    monkeypatch.setattr(m, "use_triton", lambda x: request.param == "triton")
    return request.param


def random_boxes(*shape, seed=0, size=60.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    box = torch.rand(*shape, 5, generator=generator, dtype=torch.float64)
    box = box * torch.tensor([size, size, 40, 40, 6.0]) + torch.tensor([0, 0, 3, 3, -3.0])
    return box.to(dtype).to(DEVICE)


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_in_every_family(backend, family, shared):
    case = torch.load(shared / "reference" / "rotated_iou_cases.pt", weights_only=True)[family]
    boxes1, boxes2, exact = (case[k].to(DEVICE) for k in ("boxes1", "boxes2", "iou"))
    for a, b in ((boxes1, boxes2), (boxes2, boxes1)):
        assert (m.box_iou_rotated(a, b, aligned=True) - exact).abs().max() <= 1e-5
        pairwise = m.box_iou_rotated(a[:33], b[:3])
        assert (pairwise.diagonal() - exact[:3]).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", TOL, ids=str)
def test_aligned_parity(backend, dtype):
    for n in (0, 1, 63, 130):
        boxes1, boxes2 = random_boxes(n, dtype=dtype), random_boxes(n, seed=1, dtype=dtype)
        iou = m.box_iou_rotated(boxes1, boxes2, aligned=True)
        assert iou.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and iou.shape == (n,)
        exact = torch.tensor([exact_iou(*pair) for pair in zip(boxes1.tolist(), boxes2.tolist(), strict=True)])
        torch.testing.assert_close(iou.cpu().double(), exact.double(), atol=TOL[dtype], rtol=0)


@pytest.mark.parametrize("dtype", TOL, ids=str)
@pytest.mark.parametrize(
    "shape1, shape2",
    [
        ((0,), (3,)),
        ((2,), (0,)),
        ((1,), (1,)),
        ((35,), (67,)),
        ((2, 3, 5), (2, 3, 4)),
    ],
    ids=str,
)
def test_pairwise_parity(backend, dtype, shape1, shape2):
    boxes1, boxes2 = random_boxes(*shape1, dtype=dtype), random_boxes(*shape2, seed=1, dtype=dtype)
    iou = m.box_iou_rotated(boxes1, boxes2)
    assert iou.shape == (*shape1, shape2[-1])
    for image in np.ndindex(shape1[:-1]):
        exact = [exact_iou(a, b) for a, b in product(boxes1[image].tolist(), boxes2[image].tolist())]
        torch.testing.assert_close(
            iou[image].flatten().cpu().double(), torch.tensor(exact).double(), atol=TOL[dtype], rtol=0
        )


def test_mixed_dtypes_promote(backend):
    boxes1, boxes2 = random_boxes(4), random_boxes(4, seed=1, dtype=torch.float64)
    assert m.box_iou_rotated(boxes1, boxes2).dtype == torch.float64
    assert m.box_iou_rotated(boxes1.half(), boxes2.bfloat16(), aligned=True).dtype == torch.float32


def test_non_contiguous(backend):
    boxes1, boxes2 = random_boxes(12), random_boxes(10, seed=1)
    flipped = boxes1.T.contiguous().T
    assert not flipped.is_contiguous()
    for a, b, c, aligned in ((flipped, boxes1, boxes2, False), (flipped[::3], boxes1[::3], boxes2[:4], True)):
        assert torch.equal(m.box_iou_rotated(a, c, aligned), m.box_iou_rotated(b, c, aligned))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_disjoint_boxes_have_exactly_zero(backend, dtype):
    """Also where no edge separates them in the frame of box 1, and only rounding errors are left of the sum."""
    k = torch.arange(130, dtype=dtype, device=DEVICE)
    box1 = torch.stack([k * 0, k * 0, k * 0 + 7.3, k * 0 + 5.1, k * 0], 1)
    box2 = torch.stack([k * 0 + 5.08, k * 0 + 3.98, 3 + k / 10, k * 0 + 4, k * 0 - math.pi / 4], 1)
    assert not m.box_iou_rotated(box1, box2, aligned=True).any()
    assert not m.box_iou_rotated(box2, box1, aligned=True).any()


def test_culling_changes_nothing(backend):
    boxes1, boxes2 = random_boxes(9, size=300), random_boxes(40, seed=1, size=300)
    aligned = m.box_iou_rotated(boxes1.repeat_interleave(40, 0), boxes2.repeat(9, 1), aligned=True)
    pairwise = m.box_iou_rotated(boxes1, boxes2)
    assert 0 < (pairwise > 0).float().mean() < 0.5
    torch.testing.assert_close(pairwise.flatten(), aligned, atol=1e-6, rtol=0)


side, coordinate = st.floats(2**-7, 100, width=32), st.floats(-100, 100, width=32)
a_box = st.tuples(coordinate, coordinate, side, side, st.floats(-7, 7, width=32))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(a_box, a_box, st.sampled_from([0, 1, 2, 3]))
def test_any_pair(one, two, same):
    """Also pairs that share their first 2 to 4 values exactly: parallel and coinciding edges."""
    two = (*one[: same + 1], *two[same + 1 :]) if same else two
    a, b = torch.tensor([one]), torch.tensor([two])
    exact = exact_iou(one, two)
    for x, y in ((a, b), (b, a)):
        assert abs(m.box_iou_rotated_reference(x.double(), y.double(), True).item() - exact) < 1e-9
        # float32 rounds coordinates of magnitude 100 to 8e-6, which counts in proportion to the thinnest side
        assert abs(m.box_iou_rotated_reference(x, y, True).item() - exact) < 1e-5 + 1e-4 / min(*one[2:4], *two[2:4])
    assert m.box_iou_rotated_reference(a, a).item() == 1


inf, nan = math.inf, math.nan
BAD_BOXES = [
    (0, 0, 0, 5, 0),
    (0, 0, 5, 0, 1),
    (0, 0, -5, 5, 0),
    (0, 0, -5, -5, 0),
    (0, 0, 1e-25, 1e-25, 0),
    (0, 0, 1e-19, 1e-20, 0),
    (0, 0, 1e30, 1e30, 0),
    (1e19, 0, 5, 5, 0),
    (nan, 0, 5, 5, 0),
    (0, inf, 5, 5, 0),
    (0, 0, nan, 5, 0),
    (0, 0, 5, inf, 0),
    (0, 0, 5, 5, nan),
    (0, 0, 5, 5, -inf),
]


def test_unusable_boxes_match_nothing_and_poison_nothing(backend):
    good = torch.tensor([[0.0, 0, 5, 5, 0]], device=DEVICE)
    bad = torch.tensor(BAD_BOXES, device=DEVICE)
    mixed = torch.cat([bad, good])
    assert m.box_iou_rotated(mixed, mixed).sum() == m.box_iou_rotated(mixed, mixed, mode="iof").sum() == 1
    assert m.box_iou_rotated(mixed, good).flatten().tolist() == [0] * len(bad) + [1]
    for one, two in ((mixed, good.expand(len(mixed), 5)), (good.expand(len(mixed), 5), mixed)):
        one, two = one.clone().requires_grad_(), two.clone().requires_grad_()
        iou = m.box_iou_rotated(one, two, aligned=True)
        assert iou.tolist() == [0] * len(bad) + [1]
        iou.sum().backward()
        assert not one.grad.any() and not two.grad.any()


def test_gradient_matches_finite_differences(backend):
    boxes1 = random_boxes(40, size=30, dtype=torch.float64).requires_grad_()
    boxes2 = random_boxes(40, size=30, seed=1, dtype=torch.float64).requires_grad_()
    weight = torch.rand(40, dtype=torch.float64, device=DEVICE)
    assert (m.box_iou_rotated(boxes1, boxes2, True) > 0.01).float().mean() > 0.5
    (m.box_iou_rotated(boxes1, boxes2, True) * weight).sum().backward()
    for x, fixed in ((boxes1, boxes2), (boxes2, boxes1)):
        for k in range(5):
            step = torch.zeros(5, dtype=torch.float64, device=DEVICE)
            step[k] = 1e-6
            difference = m.box_iou_rotated(x.detach() + step, fixed.detach(), True)
            difference = difference - m.box_iou_rotated(x.detach() - step, fixed.detach(), True)
            torch.testing.assert_close(x.grad[:, k], difference / 2e-6 * weight, atol=2e-8, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gradient_in_float32_whatever_the_input(backend, dtype):
    boxes1, boxes2 = random_boxes(70, size=30, dtype=dtype), random_boxes(70, size=30, seed=1, dtype=dtype)
    exact = [x.double().requires_grad_() for x in (boxes1, boxes2)]
    m.box_iou_rotated_reference(*exact, aligned=True).sum().backward()
    leaves = [x.clone().requires_grad_() for x in (boxes1, boxes2)]
    m.box_iou_rotated(*leaves, aligned=True).sum().backward()
    tol = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]  # of storing the gradient
    for x, y in zip(leaves, exact, strict=True):
        assert x.grad.dtype == dtype
        torch.testing.assert_close(x.grad.double(), y.grad, atol=1e-5, rtol=tol)


SPECIAL_PAIRS = {
    "identical": ([5, 5, 4, 2, 0.3], [5, 5, 4, 2, 0.3]),
    "half turn": ([5, 5, 4, 2, 0], [5, 5, 4, 2, math.pi]),
    "sharing an edge": ([0, 0, 2, 2, 0], [2, 0, 2, 2, 0]),
    "axis-aligned": ([0, 0, 4, 2, 0], [1, 0, 4, 2, 0]),
    "contained": ([0, 0, 4, 4, 0], [0, 0, 2, 2, 0]),
    "cross": ([0, 0, 9, 1, 0], [0, 0, 9, 1, math.pi / 2]),
    "disjoint": ([0, 0, 2, 2, 0], [90, 0, 2, 2, 1]),
    "far disjoint": ([0, 0, 2, 2, 0], [1e15, 0, 2, 2, 1]),
    "nearly parallel": ([0, 0, 9, 9, 0], [1, 1, 9, 9, 1e-42]),
    "huge ratio": ([0, 0, 1e9, 1e9, 0], [0, 0, 1e-9, 1e-9, 1]),
    "thin": ([0, 0, 1e6, 1e-6, 0], [0, 0, 1e6, 1e-6, 1e-7]),
    "zero size": ([0, 0, 0, 0, 0], [0, 0, 0, 0, 0]),
}


@pytest.mark.parametrize("mode", ["linear", "log", "square"])
def test_loss_and_gradient_finite_everywhere(backend, mode):
    pred, target = (
        torch.tensor(list(x), device=DEVICE, dtype=torch.float32).requires_grad_()
        for x in zip(*SPECIAL_PAIRS.values(), strict=True)
    )
    loss = m.rotated_iou_loss(pred, target, mode=mode, reduction="none")
    loss.sum().backward()
    assert loss.isfinite().all() and pred.grad.isfinite().all() and target.grad.isfinite().all()
    names = list(SPECIAL_PAIRS)
    assert not pred.grad[names.index("disjoint")].any()  # like the published loss
    assert not pred.grad[names.index("identical")].any()  # already at the maximum
    assert pred.grad[names.index("axis-aligned"), 0] < 0  # to the right, where the target is


def test_loss_values(backend):
    pred, target = random_boxes(9, size=20), random_boxes(9, size=20, seed=1)
    iou = m.box_iou_rotated(pred, target, aligned=True).clamp(min=1e-6)
    weight = torch.arange(9.0, device=DEVICE)
    for mode, expected in (("linear", 1 - iou), ("square", 1 - iou**2), ("log", -iou.log())):
        assert torch.equal(m.rotated_iou_loss(pred, target, mode, "none"), expected)
        torch.testing.assert_close(m.rotated_iou_loss(pred, target, mode), expected.mean())
        torch.testing.assert_close(m.rotated_iou_loss(pred, target, mode, "sum", weight), (expected * weight).sum())
    empty = pred[:0].clone().requires_grad_()
    m.rotated_iou_loss(empty, target[:0]).backward()
    assert empty.grad.shape == (0, 5)


def test_loss_under_autocast(backend):
    pred, target = random_boxes(9, size=20), random_boxes(9, size=20, seed=1)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = m.rotated_iou_loss(pred, target)
    assert loss.dtype == torch.float32 and torch.equal(loss, m.rotated_iou_loss(pred, target))


def test_loss_pulls_a_box_onto_its_target(monkeypatch):
    monkeypatch.setattr(m, "use_triton", lambda x: False)
    target = torch.tensor([[50.0, 40, 30, 12, 0.7]])
    pred = torch.tensor([[44.0, 47, 18, 20, 0.1]], requires_grad=True)
    scale = torch.tensor([10.0, 10, 10, 10, 0.3])
    free = (pred.detach() / scale).requires_grad_()
    optimizer = torch.optim.Adam([free], lr=0.02)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 300)
        optimizer.zero_grad()
        m.rotated_iou_loss(free * scale, target).backward()
        optimizer.step()
    assert m.rotated_iou_loss(free * scale, target) < 0.01


def test_mode_and_direction(backend):
    boxes1, boxes2 = random_boxes(6, size=20), random_boxes(7, size=20, seed=1)
    iou = m.box_iou_rotated(boxes1, boxes2)
    areas = boxes1[:, None, 2:4].prod(-1), boxes2[None, :, 2:4].prod(-1)
    inter = iou * (areas[0] + areas[1]) / (1 + iou)
    torch.testing.assert_close(m.box_iou_rotated(boxes1, boxes2, mode="iof"), inter / areas[0])
    flip = torch.tensor([1.0, 1, 1, 1, -1], device=DEVICE)
    mirrored = m.box_iou_rotated(boxes1 * flip, boxes2 * flip)
    assert torch.equal(m.box_iou_rotated(boxes1, boxes2, clockwise=False), mirrored)
    scored = torch.cat([boxes1, boxes1[:, :1]], 1)
    assert torch.equal(m.box_iou_rotated(scored, boxes2), iou)
    pairs = boxes1, boxes2[:6]
    assert torch.equal(m.box_iou_rotated(*pairs, "iou", True, True), m.box_iou_rotated(*pairs, True))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda b: m.box_iou_rotated(b[0], b), "boxes1 has shape"),
        (lambda b: m.box_iou_rotated(b, b[:, :4]), "boxes2 has shape"),
        (lambda b: m.box_iou_rotated(b, b[:2], aligned=True), "boxes2 has shape"),
        (lambda b: m.box_iou_rotated(b[None], b), "boxes2 has shape"),
        (lambda b: m.box_iou_rotated(b.long(), b), "boxes1 is torch.int64"),
        (lambda b: m.box_iou_rotated(b, b, "iou", 1), "aligned="),
        (lambda b: m.box_iou_rotated(b, b.to("meta")), "boxes2 is on meta"),
        (lambda b: m.box_iou_rotated(b, b, mode="giou"), "mode="),
        (lambda b: m.rotated_iou_loss(b, b[:2]), "target has shape"),
        (lambda b: m.rotated_iou_loss(b, b, mode="exp"), "mode="),
        (lambda b: m.rotated_iou_loss(b, b, reduction="max"), "reduction="),
        (lambda b: m.rotated_iou_loss(b, b, weight=b), "weight has shape"),
    ],
)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(random_boxes(3))


@needs_triton
def test_opcheck():
    boxes1, boxes2 = random_boxes(5), random_boxes(5, seed=1)
    tests = ["test_schema", "test_autograd_registration"] + ["test_faketensor"] * (not INTERPRETED)
    opcheck(m._pairwise.library_op, (boxes1, boxes2[:3]), test_utils=tests)
    opcheck(m._aligned.library_op, (boxes1.requires_grad_(), boxes2), test_utils=tests)


def test_opcheck_of_the_reference():
    opcheck(m._pairwise_reference, (random_boxes(2, 5), random_boxes(2, 3, seed=1)))


@not_interpreted
def test_compiles_without_graph_break():
    pred, target = random_boxes(16).requires_grad_(), random_boxes(16, seed=1)

    def f(pred, target):
        return m.rotated_iou_loss(pred * 1.01, target), m.box_iou_rotated(pred, target)

    eager, iou = f(pred, target)
    (expected,) = torch.autograd.grad(eager, pred)
    compiler = "inductor" if DEVICE == "cuda" else "aot_eager"  # the C++ compiler takes its time
    loss, compiled_iou = torch.compile(f, fullgraph=True, backend=compiler)(pred, target)
    (grad,) = torch.autograd.grad(loss, pred)
    torch.testing.assert_close((loss, compiled_iou, grad), (eager, iou, expected), atol=1e-6, rtol=1e-4)


@not_interpreted
@pytest.mark.parametrize("triton", [False, pytest.param(True, marks=has_triton)], ids=["reference", "triton"])
def test_exports(triton, monkeypatch):
    monkeypatch.setattr(m, "use_triton", lambda x: triton)

    class Pairwise(torch.nn.Module):
        def forward(self, a, b):
            return m.box_iou_rotated(a, b), m.box_iou_rotated(a, b[:5], aligned=True)

    args = random_boxes(5), random_boxes(7, seed=1)
    exported = torch.export.export(Pairwise(), args)
    assert ("rtmdet_fast.box_iou_rotated_aligned" in str(exported)) == triton
    if not triton or DEVICE == "cuda":
        torch.testing.assert_close(exported.module()(*args), Pairwise()(*args))


@needs_lowering
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_lowering(target, dtype, monkeypatch):
    monkeypatch.setitem(lowering._TYPES, torch.float64, "fp64")
    launches = record_launches(monkeypatch, m)
    boxes1, boxes2 = random_boxes(48, dtype=dtype), random_boxes(48, dtype=dtype)
    iou = m._aligned(boxes1, boxes2)
    m._aligned_backward(iou, boxes1, boxes2)
    m._pairwise(boxes1, boxes2)
    assert len(launches) == 3
    used = [launch.lower(target) for launch in launches]
    assert all(x.spills == 0 for x in used)
    assert max(x.registers for x in used) <= (96 if dtype == torch.float32 else 168)
