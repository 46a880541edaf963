"""Deformable attention: against explicit loops in float64, and the fixtures made by the published implementation."""

from __future__ import annotations

import math
import os
from itertools import product

import pytest
import torch
from lowering import TARGETS, needs_lowering, record_launches
from on_triton import DEVICE
from test_bn_silu import thinned, traced_for_cuda, traced_kernels  # noqa: F401 (a fixture)
from torch.library import opcheck

from rtmdet_fast import ops
from rtmdet_fast.kernels import _dispatch, deformable_attention_torch, deformable_attention_triton
from rtmdet_fast.kernels import deformable_attention as m

pytestmark = pytest.mark.usefixtures("poison", "slow_ones_wait")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not (DEVICE == "cuda" or INTERPRETED), reason="needs CUDA or TRITON_INTERPRET=1")
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="torch.compile cannot trace an interpreted kernel")
# of the greatest element, or of 1
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
NAMES = {"core": ("value", "locations", "weights"), "boxes": ("value", "references", "offsets", "logits")}
FUNCTIONS = {"core": ops.deformable_attention, "boxes": ops.box_deformable_attention}


@pytest.fixture(params=["reference", pytest.param("triton", marks=needs_triton)])
def backend(request, monkeypatch):
    monkeypatch.setattr(m, "use_triton", lambda x: request.param == "triton")
    return request.param


def inputs(form, sizes, points, B=2, Q=3, H=2, D=5, dtype=torch.float32, seed=0):
    """Tensors by name, and sizes and points. Some locations are outside of the image."""
    g = torch.Generator().manual_seed(seed)
    S, P = sum(h * w for h, w in sizes), sum(points)
    value = torch.randn(B, S, H, D, generator=g).to(dtype)
    if form == "core":
        tensors = value, torch.rand(B, Q, H, P, 2, generator=g) * 1.6 - 0.3, torch.randn(B, Q, H, P, generator=g)
        tensors = tensors[0], tensors[1].to(dtype), tensors[2].to(dtype)
    else:
        offsets, logits = torch.randn(B, Q, H, P, 2, generator=g), torch.randn(B, Q, H, P, generator=g)
        tensors = value, torch.rand(B, Q, 4, generator=g).to(dtype), offsets.to(dtype) * 2, logits.to(dtype) * 2
    named = {name: tensor.to(DEVICE) for name, tensor in zip(NAMES[form], tensors, strict=True)}
    return named | {"sizes": sizes, "points": points}


def oracle(value, sizes, points, locations=None, weights=None, references=None, offsets=None, logits=None, *,
           method="bilinear", published_clamp=False):  # fmt: skip
    """One sample after the other, as the definition says."""
    if locations is None:
        weights, locations = logits.softmax(3), []
        for level, count in enumerate(points):
            mine = offsets.split(points, 3)[level]
            locations.append(references[:, :, None, None, :2] + mine / count * references[:, :, None, None, 2:] / 2)
        locations = torch.cat(locations, 3)
    (B, _, H, D), Q = value.shape, locations.shape[1]
    levels = [
        level.unflatten(1, size) for size, level in zip(sizes, value.split([h * w for h, w in sizes], 1), strict=True)
    ]
    level_of = [level for level, count in enumerate(points) for _ in range(count)]
    rows = []
    for b, q, h in product(range(B), range(Q), range(H)):
        out = value.new_zeros(D)
        for p, level in enumerate(level_of):
            height, width = sizes[level]
            x, y = locations[b, q, h, p, 0] * width, locations[b, q, h, p, 1] * height
            if method == "discrete":
                column = min(max(int(x.detach() + 0.5), 0), (min(height, width) if published_clamp else width) - 1)
                row = min(max(int(y.detach() + 0.5), 0), height - 1)
                out = out + weights[b, q, h, p] * levels[level][b, row, column, h]
                continue
            x, y = x - 0.5, y - 0.5
            x0, y0 = math.floor(x.detach()), math.floor(y.detach())
            for row, column in product((y0, y0 + 1), (x0, x0 + 1)):
                if 0 <= row < height and 0 <= column < width:
                    near = (x - x0 if column > x0 else x0 + 1 - x) * (y - y0 if row > y0 else y0 + 1 - y)
                    out = out + weights[b, q, h, p] * near * levels[level][b, row, column, h]
        rows.append(out)
    return torch.stack(rows).view(B, Q, H * D)


def outputs(function, arguments, **options):
    """The result and the gradients, None where there is none, in the order of the arguments."""
    leaves = {
        name: x.detach().clone().requires_grad_() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()
    }
    result = function(**leaves, **options)
    upstream = torch.randn(result.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    tensors = [leaf for leaf in leaves.values() if isinstance(leaf, torch.Tensor)]
    grads = torch.autograd.grad(result, tensors, upstream.to(result), allow_unused=True)
    for grad, tensor in zip(grads, tensors, strict=True):
        assert grad is None or (grad.dtype == tensor.dtype and grad.shape == tensor.shape)
    return result.detach(), *grads


def double(arguments):
    return {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


def assert_close(actual, expected, tolerance):
    for i, (got, want) in enumerate(zip(actual, expected, strict=True)):
        assert (got is None) == (want is None), i
        if want is not None:
            assert (got.double() - want).abs().max().item() <= tolerance * max(1, want.abs().max().item()), (
                i
            )  # NaN fails


SIZES = (4, 5), (3, 2), (2, 7)
CASES = {
    "unequal points": dict(sizes=SIZES, points=(2, 3, 1)),
    "one point": dict(sizes=((3, 4),), points=(1,), B=1, H=1, D=4),
    "many points": dict(sizes=((3, 4), (2, 2)), points=(9, 4), B=1, Q=2, H=1),
    "one pixel": dict(sizes=((1, 1), (1, 3), (3, 1)), points=(2, 2, 2), Q=2),
    "one channel": dict(sizes=SIZES, points=(1, 1, 1), D=1),
    "five levels": dict(sizes=(*SIZES, (2, 2), (1, 2)), points=(1, 2, 1, 1, 1), B=1, H=1),
    "fp16": dict(sizes=SIZES, points=(2, 1, 2), D=8, dtype=torch.float16),
    "bf16": dict(sizes=SIZES, points=(2, 1, 2), D=8, dtype=torch.bfloat16),
    "float64": dict(sizes=SIZES, points=(2, 3, 1), dtype=torch.float64),
    "six levels": dict(sizes=(*SIZES, (2, 2), (1, 2), (2, 1)), points=(1, 2, 1, 1, 1, 1), B=1, H=1),
}


@pytest.mark.parametrize("method", ["bilinear", "discrete", "published"])
@pytest.mark.parametrize("form", FUNCTIONS)
@pytest.mark.parametrize("case", CASES)
def test_parity(case, form, method, backend):
    arguments = inputs(form, **CASES[case])
    options = dict(method="bilinear" if method == "bilinear" else "discrete", published_clamp=method == "published")
    actual, expected = (
        outputs(f, a, **options) for f, a in ((FUNCTIONS[form], arguments), (oracle, double(arguments)))
    )
    assert actual[0].dtype == arguments["value"].dtype
    assert (actual[2] is None) == (method != "bilinear")  # locations, or the boxes they lie in
    assert_close(actual, expected, TOLERANCE[arguments["value"].dtype])


def test_the_published_clamp_matters_on_wide_levels_alone(backend):
    for sizes, differs in ((((3, 9),), True), (((9, 3),), False), (((4, 4),), False)):
        arguments = inputs("core", sizes, (6,), Q=5)
        right, published = (
            ops.deformable_attention(**arguments, method="discrete", published_clamp=flag) for flag in (False, True)
        )
        assert torch.equal(right, published) != differs


def msda_cases(shared):
    return torch.load(shared / "reference/rtdetr/msda_cases.pt", weights_only=True)


@pytest.mark.parametrize(
    "function", [m.deformable_attention, deformable_attention_torch.deformable_attention_grid_sample]
)
def test_fixtures(function, shared, monkeypatch):
    monkeypatch.setattr(m, "use_triton", lambda x: False)
    for case in msda_cases(shared):
        check_fixture(case, function, torch.float64, 1e-12)


@needs_triton
def test_fixtures_by_the_kernels(shared, monkeypatch):
    monkeypatch.setattr(m, "use_triton", lambda x: True)
    if INTERPRETED:  # which takes its time for a program, whatever it does
        monkeypatch.setitem(deformable_attention_triton.TUNING, "bytes", (256, 256))
    for case in msda_cases(shared):
        if not INTERPRETED or case["name"] in ("borders", "one_level_one_point", "discrete_borders"):
            check_fixture(case, m.deformable_attention, torch.float32, 2e-5)


def check_fixture(case, function, dtype, tolerance):
    """In float32 some of `borders` lie on the other side of a kink, where the gradient of the location is another."""
    tensors = {
        "value": case["value"], "locations": case["sampling_locations"], "weights": case["attention_weights"],
    }  # fmt: skip
    leaves = {name: x.to(DEVICE, dtype).requires_grad_() for name, x in tensors.items()}
    discrete = case["method"] == "discrete"
    result = function(
        **leaves, sizes=[tuple(size) for size in case["spatial_shapes"].tolist()], points=case["num_points"].tolist(),
        method="discrete" if discrete else "bilinear", published_clamp=True,
    )  # fmt: skip
    grads = torch.autograd.grad(result, list(leaves.values()), case["grad_output"].to(result), allow_unused=True)
    expected = case["output"], case["grad_value"], case.get("grad_sampling_locations"), case["grad_attention_weights"]
    for got, want in zip((result, *grads), expected, strict=True):
        assert (got is None) == (want is None), case["name"]
        is_kink = dtype == torch.float32 and case["name"] == "borders" and want is expected[2]
        if want is not None and not is_kink:
            error = (got.detach().cpu().double() - want).abs().max().item()
            assert error <= tolerance * max(1, want.abs().max().item()), case["name"]


@pytest.mark.parametrize("form", FUNCTIONS)
def test_no_queries_and_no_images(form, backend):
    for sizes in (dict(Q=0), dict(B=0)):
        result, *grads = outputs(FUNCTIONS[form], inputs(form, SIZES, (1, 2, 1), **sizes))
        assert result.numel() == 0 and not any(grad.any() for grad in grads)


def test_mixed_dtypes_and_strides(backend):
    """As under autocast: references in fp32, the rest in half; value a view of a projection."""
    arguments = inputs("boxes", SIZES, (2, 1, 2), dtype=torch.float16)
    arguments["references"] = arguments["references"].float() / 3
    arguments["value"] = arguments["value"].transpose(1, 2).contiguous().transpose(1, 2)
    arguments["offsets"] = arguments["offsets"].transpose(0, 1).contiguous().transpose(0, 1)
    expected = outputs(oracle, double(arguments))
    assert_close(outputs(ops.box_deformable_attention, arguments), expected, TOLERANCE[torch.float16])
    with torch.autocast(DEVICE, torch.bfloat16):
        assert_close(outputs(ops.box_deformable_attention, arguments), expected, TOLERANCE[torch.float16])


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_nan_and_infinity_stay_in_their_query(number, backend):
    for name in ("offsets", "logits", "references"):
        arguments = inputs("boxes", SIZES, (2, 1, 2))
        clean = ops.box_deformable_attention(**arguments)
        arguments[name][1, 2] = number
        result = ops.box_deformable_attention(**arguments)
        assert result[1, 2].isnan().all()
        assert torch.equal(result[0], clean[0]) and torch.equal(result[1, :2], clean[1, :2])


def test_locations_far_outside(backend):
    arguments = inputs("core", SIZES, (2, 1, 2))
    arguments["locations"] = torch.tensor([1e30, -1e30, 3e9, 7.0, -0.6], device=DEVICE)[:, None].expand(2, 3, 2, 5, 2)
    result, *grads = outputs(ops.deformable_attention, arguments)
    assert not result.any() and not any(grad.any() for grad in grads)


def test_a_logit_of_minus_infinity_has_no_weight(backend):
    arguments = inputs("boxes", SIZES, (2, 1, 2))
    arguments["logits"][..., 0] = -math.inf
    assert_close(outputs(ops.box_deformable_attention, arguments), outputs(oracle, double(arguments)), 2e-5)


@needs_triton
def test_programs_of_several_rows_and_steps(monkeypatch):
    monkeypatch.setattr(m, "use_triton", lambda x: True)
    for warps, unroll in ((1, 1), (10**6, 3)):
        monkeypatch.setitem(deformable_attention_triton.TUNING, "warps", warps)
        for kernel in ("forward", "backward"):
            monkeypatch.setitem(deformable_attention_triton.TUNING[kernel], "UNROLL", unroll)
        arguments = inputs("boxes", SIZES, (2, 3, 1), Q=4)
        assert_close(outputs(ops.box_deformable_attention, arguments), outputs(oracle, double(arguments)), 2e-5)


@needs_triton
@pytest.mark.parametrize("form", FUNCTIONS)
def test_deterministic_algorithms_take_the_reference(form, monkeypatch):
    monkeypatch.setattr(m, "use_triton", lambda x: True)
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(deformable_attention_triton, "attention", None)
    outputs(FUNCTIONS[form], inputs(form, SIZES, (1, 1, 1)))


@not_interpreted
def test_gradcheck_of_the_reference(monkeypatch):
    monkeypatch.setattr(m, "use_triton", lambda x: False)
    for form, method in product(FUNCTIONS, ("bilinear", "discrete")):
        arguments = double(inputs(form, ((3, 4), (2, 2)), (2, 1), B=1, Q=2, D=2))
        names = NAMES[form] if method == "bilinear" else ("value", NAMES[form][-1])
        leaves = [arguments.pop(name).requires_grad_() for name in names]
        assert torch.autograd.gradcheck(
            lambda *tensors, form=form, names=names, rest=arguments, method=method: FUNCTIONS[form](
                **dict(zip(names, tensors, strict=True)), **rest, method=method
            ),
            leaves,
        )


@not_interpreted
@pytest.mark.parametrize("method", ["bilinear", "discrete"])
def test_standard_operators(method):
    """The form for export, of boxes, by composition; it exports with a batch that may change."""
    arguments = inputs("boxes", SIZES, (2, 3, 1), dtype=torch.float64)
    expected = outputs(oracle, arguments, method=method)

    def function(value, references, offsets, logits, sizes=SIZES, points=(2, 3, 1)):
        return deformable_attention_torch.deformable_attention_grid_sample(
            value, sizes, deformable_attention_torch.box_locations(references, offsets, points), logits.softmax(3),
            points, method=method,
        )  # fmt: skip

    assert_close(outputs(function, arguments), expected, 1e-12)

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return function(*tensors)

    tensors = tuple(x for x in arguments.values() if isinstance(x, torch.Tensor))
    program = torch.export.export(Module(), tensors, dynamic_shapes=(({0: torch.export.Dim("batch")},) * 4,))
    assert not [node for node in program.graph.nodes if "rtmdet_fast" in str(node.target)]
    three = tuple(torch.cat([x, x[:1]]) for x in tensors)
    torch.testing.assert_close(program.module()(*three), function(*three))


BAD = {
    "value: expected shape": dict(value=torch.ones(2, 40, 2)),
    "value: expected a floating": dict(value=torch.ones(2, 40, 2, 5, dtype=torch.int32)),
    "sizes: expected 40 pixels": dict(sizes=((4, 5), (3, 2), (2, 8))),
    "sizes: expected a height": dict(sizes=((4, 10), (0, 2), (0, 7))),
    "points: expected at least 1 for each": dict(points=(2, 4)),
    r"points: .* got \(6, 0, 0\)": dict(points=(6, 0, 0)),
    "offsets: expected shape": dict(offsets=torch.ones(2, 3, 2, 6, 3)),
    "logits: expected shape": dict(logits=torch.ones(2, 3, 2, 7)),
    "logits: expected a floating": dict(logits=torch.ones(2, 3, 2, 6, dtype=torch.int64)),
    "references: expected shape": dict(references=torch.ones(2, 3, 2)),
    "references: on meta": dict(references=torch.ones(2, 3, 4, device="meta")),
    "method: expected bilinear or discrete, got 'default'": dict(method="default"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_names_the_argument(message):
    arguments = inputs("boxes", SIZES, (2, 3, 1))
    arguments = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    with pytest.raises((ValueError, TypeError), match=message):
        ops.box_deformable_attention(**arguments | BAD[message])


def of_op(form, method="bilinear", clamp=False):
    """Arguments of the reference's op (core) or the Triton op (boxes)."""
    arguments = inputs(form, SIZES, (2, 3, 1))
    tensors = [x for x in arguments.values() if isinstance(x, torch.Tensor)]
    return tensors, ([n for size in SIZES for n in size], [2, 3, 1], method, clamp)


@needs_triton
@pytest.mark.parametrize("method", ["bilinear", "discrete"])
def test_opcheck(method):
    tests = ("test_schema", "test_autograd_registration") + ("test_faketensor",) * (not INTERPRETED)
    tensors, settings = of_op("boxes", method)
    opcheck(
        deformable_attention_triton.attention_backward.library_op,
        (torch.ones(2, 3, 10, device=DEVICE),) * 2 + (*tensors, *settings),
        test_utils=tests[:1],
    )
    tensors[0].requires_grad_()
    opcheck(deformable_attention_triton.attention.library_op, (*tensors, *settings), test_utils=tests)
    opcheck(
        deformable_attention_triton.attention.library_op, (tensors[0], None, *tensors[2:], *settings), test_utils=tests
    )


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of opcheck in torch 2.14
@not_interpreted
@pytest.mark.parametrize("method", ["bilinear", "discrete"])
def test_opcheck_of_the_reference(method):
    tensors, settings = of_op("core", method)
    _, *kept = deformable_attention_torch.attention(*tensors, *settings)
    dout = torch.ones(2, 3, 10, device=DEVICE)
    opcheck(deformable_attention_torch.attention_backward, (dout, *tensors, *kept))
    for tensor in tensors[:: 1 if method == "bilinear" else 2]:
        tensor.requires_grad_()
    opcheck(deformable_attention_torch.attention, (*tensors, *settings))


@not_interpreted
@pytest.mark.parametrize("form", FUNCTIONS)
def test_compiles_without_graph_break(form):
    arguments = inputs(form, SIZES, (2, 3, 1))
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(FUNCTIONS[form], fullgraph=True, backend=backend)
    assert_close(
        outputs(compiled, arguments), double(dict(enumerate(outputs(FUNCTIONS[form], arguments)))).values(), 1e-6
    )


@needs_lowering
@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11 takes all pointers of these kernels for written")
@pytest.mark.parametrize("form", FUNCTIONS)
def test_traces_forward_and_backward(form, traced_for_cuda):  # noqa: F811
    torch.use_deterministic_algorithms(False)
    arguments = {n: x.cpu() if isinstance(x, torch.Tensor) else x for n, x in inputs(form, SIZES, (2, 3, 1)).items()}
    settings = {name: arguments.pop(name) for name in ("sizes", "points")}
    boxes = ["dreferences_ptr"] * (form == "boxes")
    assert traced_kernels(lambda **tensors: FUNCTIONS[form](**tensors, **settings), arguments) == [
        ("_forward_kernel", ["out_ptr"]),
        ("_backward_kernel", ["dlogits_ptr", "doffsets_ptr", *boxes, "dvalue_ptr"]),
    ]


# the decoder of RT-DETR and the encoder and decoder of Deformable DETR, at few images and at many
LOWERED = {
    "decoder, 1 image": dict(sizes=((80, 80), (40, 40), (20, 20)), points=(4, 4, 4), B=1, Q=300, H=8, D=32),
    "decoder, 16 images": dict(sizes=((80, 80), (40, 40), (20, 20)), points=(4, 4, 4), B=16, Q=300, H=8, D=32),
    "odd": dict(sizes=((13, 17), (7, 9)), points=(3, 5), B=3, Q=7, H=3, D=20),
}


@needs_lowering
@pytest.mark.parametrize(
    ("case", "form", "method", "dtype", "target"),
    thinned(
        list(
            product(
                LOWERED, FUNCTIONS, ("bilinear", "discrete"), (torch.float32, torch.float16, torch.bfloat16), TARGETS
            )
        ),
        {24 + 4 + 1, 48 + 0 + 0, 72 + 8 + 3, 84 + 4 + 1, 120 + 0 + 2},
    ),
)
def test_lowering(case, form, method, dtype, target, monkeypatch):
    monkeypatch.setattr(_dispatch, "BACKEND", "triton")
    arguments = inputs(form, dtype=dtype, **LOWERED[case])
    launches = record_launches(monkeypatch, deformable_attention_triton)
    outputs(
        FUNCTIONS[form], {n: x.cpu() if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}, method=method
    )
    assert len(launches) == 2
    for launch in launches:
        resources = launch.lower(target)
        assert resources.spills == 0, launch
        assert resources.shared_bytes == 0, launch  # nothing changes layout
        assert resources.registers <= (256 if target == "gfx942" else 160), launch


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_shapes_of_the_models(dtype):
    """Against the reference in float64, which the other tests hold to the oracle."""
    arguments = inputs("boxes", dtype=dtype, **LOWERED["decoder, 16 images"])
    actual, expected = (outputs(ops.box_deformable_attention, a) for a in (arguments, double(arguments)))
    assert_close(actual, expected, TOLERANCE[dtype])
