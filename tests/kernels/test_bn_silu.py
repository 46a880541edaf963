"""bn_silu: the reference and the Triton kernels against a float64 composition of PyTorch's own functions."""

from __future__ import annotations

import re
from functools import partial
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lowering import TARGETS, needs_lowering, record_launches
from on_triton import DEVICE, INTERPRETED, needs_triton, not_interpreted
from torch.library import opcheck

from rtmdet_fast.kernels import _dispatch, batch_norm
from rtmdet_fast.kernels import bn_silu as m

pytestmark = pytest.mark.usefixtures("poison", "slow_ones_wait")
# of the largest element of what is compared, at least 1; the reference folds its weights in the low precision too
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
BOTH = [pytest.param(m.bn_silu_reference, id="reference"), pytest.param(m.bn_silu, marks=needs_triton, id="triton")]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.fixture(autouse=True)
def small_inputs_take_kernels(monkeypatch):
    """Which PyTorch's own would train on otherwise."""
    monkeypatch.setitem(batch_norm.TUNING, "least_training", 0)


def composition(x, weight, bias, running_mean, running_var, residual=None, *, training=False, eps=1e-5):
    y = F.silu(F.batch_norm(x, running_mean, running_var, weight, bias, training, 0.1, eps))
    return y if residual is None else y + residual


def inputs(shape, dtype=torch.float32, layout="contiguous", residual=False, parameter_dtype=torch.float32):
    """x, weight, bias, running statistics and maybe a residual, by name."""
    torch.manual_seed(0)
    channels = shape[1]
    tensors = {
        "x": (torch.randn(shape) * 2 + 3).to(dtype).contiguous(memory_format=LAYOUTS[layout]),
        "weight": torch.randn(channels).to(parameter_dtype),
        "bias": torch.randn(channels).to(parameter_dtype),
        "running_mean": torch.randn(channels).to(parameter_dtype),
        "running_var": (torch.rand(channels) + 0.1).to(parameter_dtype),
    }
    if residual:
        tensors["residual"] = torch.randn(shape).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    return {name: tensor.to(DEVICE) for name, tensor in tensors.items()}


def outputs(function, tensors, dy=None, **options):
    """The result, the gradients (`d` + name) and the running statistics of `function` of `tensors`, by name."""
    leaves = {
        name: t.detach().clone() if name.startswith("running") else t.detach().requires_grad_()
        for name, t in tensors.items()
    }
    y = function(**leaves, **options)
    if dy is None:
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
    y.backward(dy.to(y.dtype))
    gradients = {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}
    return {"y": y.detach(), **gradients, **{n: t for n, t in leaves.items() if n.startswith("running")}}


def assert_close(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        limit = tolerance * max(value.abs().max().item(), 1)
        assert (actual[name].double() - value).abs().max().item() <= limit, name  # NaN fails


def double(tensors):
    return {name: t.double() for name, t in tensors.items()}


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 7, 9), (1, 1, 2, 1), (1, 5, 3, 13), (3, 16, 8, 8)], ids=str)
def test_parity(function, shape, dtype, layout, training, residual):
    tensors = inputs(shape, dtype, layout, residual)
    actual = outputs(function, tensors, training=training)
    assert actual["y"].dtype == dtype
    assert actual["y"].stride() == tensors["x"].stride()
    assert all(actual[f"d{name}"].dtype == t.dtype for name, t in tensors.items() if not name.startswith("running"))
    assert_close(actual, outputs(composition, double(tensors), training=training), TOLERANCE[dtype])


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize(("shape", "layout"), [((2, 3, 63, 65), "contiguous"), ((2, 70, 9, 11), "channels_last")])
def test_programs_of_several_tiles(function, shape, layout, monkeypatch):
    for name, value in (("programs", 1), ("program_tiles", 3)):
        monkeypatch.setitem(batch_norm.TUNING, name, value)
    tensors = inputs(shape, layout=layout)
    expected = outputs(composition, double(tensors), training=True)
    assert_close(outputs(function, tensors, training=True), expected, TOLERANCE[torch.float32])


@pytest.fixture
def small_tiles(monkeypatch):
    """Many parts and groups of few elements: what a large input has, in a small one."""
    for name, value in (("tile", 128), ("merged", 64), ("group", 1), ("program_tiles", 1), ("small_image_channels", 2)):
        monkeypatch.setitem(batch_norm.TUNING, name, value)


GROUPED = {
    "contiguous": ((1, 2, 31, 36), "contiguous"),
    "small images": ((6, 3, 5, 8), "contiguous"),
    "last": ((1, 128, 3, 3), "channels_last"),
    "folded": ((1, 24, 8, 8), "channels_last"),
}


@needs_triton
@pytest.mark.parametrize("case", GROUPED)
def test_groups_of_parts(case, small_tiles):
    shape, layout = GROUPED[case]
    tensors = inputs(shape, layout=layout)
    (parts, _), sizes, rows, _, _ = batch_norm.summing(tensors["x"])
    assert parts > 2 * sizes[-1] and rows - parts > 2  # parts of a group; groups
    expected = outputs(composition, double(tensors), training=True)
    assert_close(outputs(m.bn_silu, tensors, training=True), expected, TOLERANCE[torch.float32])


@pytest.mark.skipif(not INTERPRETED, reason="a GPU takes programs in whatever order it likes")
@needs_triton
@pytest.mark.parametrize("case", ["contiguous", "folded"])
def test_whichever_program_is_last_the_result_is_the_same_to_the_bit(case, small_tiles, monkeypatch):
    """Partial results are NaN until they are stored: who merges too early shows."""
    from triton.runtime.interpreter import interpreter_builder

    shape, layout = GROUPED[case]
    tensors, original = inputs(shape, layout=layout), interpreter_builder.set_grid_idx
    found = [outputs(m.bn_silu, tensors, training=True)]
    for seed in range(2):

        def shuffled(x, y, z, seed=seed):
            # of the grid's own programs each once, in another order
            X, Y, _ = interpreter_builder.grid_dim
            place = torch.randperm(X * Y, generator=torch.Generator().manual_seed(seed))[x * Y + y].item()
            original(place // Y, place % Y, z)

        monkeypatch.setattr(interpreter_builder, "set_grid_idx", shuffled)
        found.append(outputs(m.bn_silu, tensors, training=True))
    for other in found[1:]:
        assert all(torch.equal(other[name], value) for name, value in found[0].items())


@needs_triton
def test_counters_are_left_as_they_were_found(small_tiles, monkeypatch):
    """The next layer counts with the same ones."""
    kept = {}
    monkeypatch.setattr(_dispatch, "_counters", kept)
    t = inputs((1, 24, 8, 8), layout="channels_last")
    with torch.no_grad():
        for _ in range(2):
            m.bn_silu(*t.values(), training=True)
    assert len(kept) == 1 and all(not counter.any() for counter in kept.values())


def test_small_inputs_train_by_pytorch_unless_triton_is_insisted_on(monkeypatch):
    monkeypatch.setitem(batch_norm.TUNING, "least_training", 100)
    monkeypatch.setattr(m.bn, "takes_triton", lambda x: True)
    monkeypatch.setattr(m, "_training", lambda *_: "triton")
    monkeypatch.setattr(m.bn, "with_running_stats", lambda *_, **__: None)
    small, large = inputs((1, 3, 3, 11)), inputs((1, 3, 3, 12))
    taken = {}
    for backend in ("auto", "triton"):
        monkeypatch.setattr(_dispatch, "BACKEND", backend)
        taken[backend] = [isinstance(m.bn_silu(**t, training=True), str) for t in (small, large)]
    assert taken == {"auto": [False, True], "triton": [True, True]}


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize(("channels", "height", "width"), [(24, 4, 6), (12, 8, 8), (48, 5, 6), (27, 3, 4), (80, 2, 4)])
def test_pixels_side_by_side_are_one_in_channels_last(function, channels, height, width, monkeypatch):
    monkeypatch.setitem(batch_norm.TUNING, "programs", 1)
    tensors = inputs((2, channels, height, width), torch.float16, "channels_last", residual=True)
    for training in (False, True):
        expected = outputs(composition, double(tensors), training=training)
        assert_close(outputs(function, tensors, training=training), expected, TOLERANCE[torch.float16])


def test_no_lane_idles_in_channels_last():
    for channels in (12, 24, 48, 80, 96, 160, 192, 320, 384, 640):
        x = torch.empty(8, channels, 40, 40).to(memory_format=torch.channels_last)
        _, (together, _, _), constexprs = batch_norm.tiling(x)
        assert together == constexprs["FOLD"] * channels and together % constexprs["BLOCK"][0] == 0
        assert constexprs["BLOCK"][0] == 64


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_of_a_large_mean_and_a_small_variance(function, layout):
    # E[x^2] - E[x]^2 in fp32 would find a variance of 0.06 here, in place of 0.01
    tensors = inputs((2, 3, 33, 65), layout=layout)
    tensors["x"] = (1000 + torch.randn(tensors["x"].shape).to(DEVICE) / 10).contiguous(memory_format=LAYOUTS[layout])
    tensors["running_mean"].fill_(1000)
    tensors["running_var"].fill_(0.01)
    expected = outputs(composition, double(tensors), training=True)
    actual = outputs(function, tensors, training=True)
    assert (actual["running_var"] / expected["running_var"] - 1).abs().max() < 1e-4
    # the mean has a step of 6e-5, of a deviation of 0.1; PyTorch's CPU kernel for channels_last loses more
    assert_close(actual, expected, 3e-3 if function is m.bn_silu else 2e-2)


@pytest.mark.parametrize("function", BOTH)
def test_non_contiguous_inputs(function):
    tensors = inputs((2, 6, 7, 9), residual=True)
    tensors = {name: t[:, ::2] if t.dim() == 4 else t[::2] for name, t in tensors.items()}
    tensors["residual"] = tensors["residual"].contiguous(memory_format=torch.channels_last)
    dy = torch.ones((), device=DEVICE).expand(2, 3, 7, 9)
    assert not tensors["x"].is_contiguous()
    for training in (False, True):
        expected = outputs(composition, double(tensors), dy, training=training)
        assert_close(outputs(function, tensors, dy, training=training), expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("function", BOTH)
def test_half_precision_parameters_and_a_wider_residual(function):
    tensors = inputs((2, 3, 5, 7), torch.bfloat16, residual=True, parameter_dtype=torch.bfloat16)
    tensors["residual"] = tensors["residual"].float()
    actual = outputs(function, tensors, training=True)
    assert actual["y"].dtype == torch.bfloat16
    assert actual["dresidual"].dtype == torch.float32
    assert_close(actual, outputs(composition, double(tensors), training=True), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("function", BOTH)
def test_nan_stays_in_its_channel(function):
    tensors = inputs((2, 3, 5, 7))
    tensors["x"][1, 1, 2, 3] = float("nan")
    actual = outputs(function, tensors, training=True)
    for name in ("y", "running_mean", "running_var"):
        channels = actual[name].movedim(1, 0).flatten(1) if name == "y" else actual[name][:, None]
        assert channels.isnan().all(1).tolist() == [False, True, False], name


@pytest.mark.parametrize("function", [m.bn_silu_reference, m.bn_silu])
def test_empty_batch_in_inference(function):
    tensors = inputs((0, 3, 5, 7))
    assert function(**tensors).shape == (0, 3, 5, 7)


@not_interpreted
def test_gradcheck_of_the_reference():
    tensors = double(inputs((2, 2, 2, 3), residual=True))
    names = ("x", "weight", "bias", "residual")
    for training in (False, True):

        def function(*args, training=training):
            stats = {n: tensors[n].clone() for n in ("running_mean", "running_var")}
            return m.bn_silu(**dict(zip(names, args, strict=True)), **stats, training=training)

        assert torch.autograd.gradcheck(function, [tensors[n].detach().requires_grad_() for n in names])


BAD = {
    "x: expected 4 dimensions": dict(x=torch.ones(3, 4)),
    "x: expected a floating": dict(x=torch.ones(2, 3, 4, 4, dtype=torch.int32)),
    "x: expected more than 1 value|Expected more than 1 value": dict(x=torch.ones(1, 3, 1, 1), training=True),
    "weight: expected shape": dict(weight=torch.ones(4)),
    "bias: expected shape": dict(bias=torch.ones(3, 1)),
    "bias: expected a floating": dict(bias=torch.ones(3, dtype=torch.int64)),
    "running_mean: expected shape": dict(running_mean=torch.ones(2)),
    "running_var: on meta": dict(running_var=torch.ones(3, device="meta")),
    "residual: expected the output's shape": dict(residual=torch.ones(2, 3, 4, 1)),
    "residual: expected a floating": dict(residual=torch.ones(2, 3, 4, 5, dtype=torch.bool)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_names_the_argument(message):
    arguments = {k: v.cpu() for k, v in inputs((2, 3, 4, 5)).items()} | BAD[message]
    with pytest.raises((ValueError, TypeError), match=message):
        m.bn_silu(**arguments)


@needs_triton
def test_opcheck():
    tests = ("test_schema", "test_autograd_registration") + ("test_faketensor",) * (DEVICE == "cuda")
    t = inputs((2, 3, 4, 5), residual=True)
    for name in ("x", "weight", "bias", "residual"):
        t[name].requires_grad_()
    opcheck(m._inference.library_op, (*t.values(), 1e-5), test_utils=tests)
    x, running = t["x"].detach(), (t["running_mean"], t["running_var"])
    opcheck(m._statistics.library_op, (x, 0.1, "", *running), test_utils=tests[:1] + tests[2:])
    stats = torch.rand(5, 3, device=DEVICE)
    tensors = t["x"], t["weight"], t["bias"], t["residual"], stats
    opcheck(m._training.library_op, (*tensors, 1e-5, ""), test_utils=tests)


@not_interpreted
@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_graph_break(training):
    tensors = inputs((2, 3, 4, 5), residual=True)
    compiled = torch.compile(m.bn_silu, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    expected = outputs(composition, double(tensors), training=training)
    assert_close(outputs(compiled, tensors, training=training), expected, TOLERANCE[torch.float32])


@pytest.fixture
def traced_for_cuda(monkeypatch):
    """CPU tensors take the Triton ops; for their tracing, a GPU's name is all that Triton needs."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    monkeypatch.setattr(_dispatch, "BACKEND", "triton")
    target = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    monkeypatch.setattr(driver, "_active", target)


def traced_kernels(function, tensors):
    """(kernel, what it writes) of forward and backward of `function` as torch.compile traces it, run by nobody."""
    import torch._functorch.config as config
    from functorch.compile import default_partition, make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    found = []

    def collect(graph_module, example_inputs):
        for node in graph_module.graph.nodes:
            if "triton_kernel_wrapper" in str(node.target):
                kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
                found.append((kernel.fn.__name__, sorted(node.kwargs["tensors_to_clone"])))
        return make_boxed_func(stop)

    def stop(*args):
        raise NotImplementedError("no GPU")

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=collect, bw_compiler=collect, partition_fn=default_partition)
    leaves = {n: t.clone() if n.startswith("running") else t.clone().requires_grad_() for n, t in tensors.items()}
    with config.patch(force_non_lazy_backward_lowering=True), pytest.raises(NotImplementedError):
        torch.compile(function, fullgraph=True, backend=backend)(**leaves)
    return found


@needs_lowering
def test_traces_forward_and_backward(traced_for_cuda):
    tensors = {name: t.cpu() for name, t in inputs((2, 3, 4, 5), residual=True).items()}
    backward = [("_sums_kernel", ["counter_ptr", "partial_ptr", "sums_ptr"]), ("_dx_kernel", ["dx_ptr"])]
    assert traced_kernels(m.bn_silu, tensors) == [("_apply_kernel", ["y_ptr"]), *backward]
    assert traced_kernels(partial(m.bn_silu, training=True), tensors) == [
        ("_moments_kernel", ["counter_ptr", "partial_ptr", "running_mean_ptr", "running_var_ptr", "stats_ptr"]),
        ("_apply_kernel", ["y_ptr"]),
        *backward,
    ]


@needs_lowering
def test_exports(traced_for_cuda):
    class Module(torch.nn.Module):
        def forward(self, x, weight, bias, mean, var):
            return m.bn_silu(x, weight, bias, mean, var)

    tensors = tuple(t.cpu() for t in inputs((2, 3, 4, 5)).values())
    sizes = {dim: torch.export.Dim(name, min=2) for dim, name in ((0, "b"), (2, "h"), (3, "w"))}
    program = torch.export.export(Module(), tensors, dynamic_shapes=(sizes, *[None] * 4))
    targets = [str(node.target) for node in program.graph.nodes]
    assert "rtmdet_fast.bn_silu_inference.default" in targets


def record(monkeypatch, function, tensors, *modules):
    """What `function` of these CPU tensors launches forward, in inference and in training, and backward."""
    monkeypatch.setattr(_dispatch, "BACKEND", "triton")
    launches = record_launches(monkeypatch, *modules)
    for training in (False, True):
        leaves = {n: t.detach() if n.startswith("running") else t.detach().requires_grad_() for n, t in tensors.items()}
        y = function(**leaves, training=training)
        y.backward(torch.empty_like(y))
    return set(launches)


# every block that `tiling` picks: with many tiles a program, with a part of one, and a width that no load can use
LOWERED = {
    "large": ((8, 64, 160, 160), "contiguous"),
    "small": ((2, 30, 13, 21), "contiguous"),
    "last": ((8, 96, 80, 80), "channels_last"),
    "narrow last": ((2, 24, 63, 13), "channels_last"),
}


def thinned(cases, kept):
    """All `cases`, those beyond the `kept` ones marked slow."""
    return [case if i in kept else pytest.param(*case, marks=pytest.mark.slow) for i, case in enumerate(cases)]


@needs_lowering
@pytest.mark.parametrize(
    ("case", "dtype", "target"), thinned(list(product(LOWERED, TOLERANCE, TARGETS)), {4 + 1, 12 + 10, 24 + 0, 36 + 7})
)
def test_lowering(case, dtype, target, monkeypatch):
    shape, layout = LOWERED[case]
    x = torch.empty(shape, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])
    parameters = {n: torch.empty(shape[1]) for n in ("weight", "bias", "running_mean", "running_var")}
    launches = record(monkeypatch, m.bn_silu, {"x": x, **parameters, "residual": x}, m, batch_norm)
    assert len({launch.kernel for launch in launches}) == 4
    for launch in launches:
        resources = launch.lower(target)
        assert resources.spills == 0, launch
        assert resources.registers <= 128, launch


@needs_lowering
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((2, 24, 16, 16), "channels_last"),  # eight pixels are one
        pytest.param((2, 12, 16, 16), "channels_last", marks=pytest.mark.slow),
        pytest.param((2, 64, 15, 15), "channels_last", marks=pytest.mark.slow),
        pytest.param((2, 3, 12, 14), "contiguous", marks=pytest.mark.slow),  # 8 divides the pixels, 16 does not
    ],
    ids=str,
)
def test_loads_are_16_bytes_wide(shape, layout, monkeypatch):
    x = torch.empty(shape).half().contiguous(memory_format=LAYOUTS[layout])
    parameters = {n: torch.empty(shape[1]) for n in ("weight", "bias", "running_mean", "running_var")}
    launches = record(monkeypatch, m.bn_silu, {"x": x, **parameters}, m, batch_norm)
    found = {launch.kernel: launch for launch in launches}
    assert len(found) == 4
    for launch in found.values():
        assert re.search(r"ld\.global[\w.:]*\.v4\.b32", launch.lower("sm_90").assembly), launch


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(8, 64, 160, 160), (8, 256, 40, 40), (32, 512, 20, 20)], ids=str)
def test_shapes_of_the_models_twice(shape, dtype, layout):
    tensors = inputs(shape, dtype, layout, residual=True)
    actual = outputs(m.bn_silu, tensors, training=True)
    again = outputs(m.bn_silu, tensors, training=True)
    assert all(torch.equal(actual[name], again[name]) for name in actual)
    assert_close(actual, outputs(composition, double(tensors), training=True), TOLERANCE[dtype])
