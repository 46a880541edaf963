"""dwconv_bn_silu: the reference and the Triton kernels against a float64 composition of PyTorch's own functions."""

from __future__ import annotations

from functools import partial
from itertools import product
from math import prod

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lowering import TARGETS, needs_lowering
from on_triton import DEVICE, needs_triton, not_interpreted
from test_bn_silu import (  # noqa: F401 (fixtures)
    LAYOUTS,
    TOLERANCE,
    assert_close,
    double,
    outputs,
    record,
    small_inputs_take_kernels,
    thinned,
    traced_for_cuda,
    traced_kernels,
)
from test_bn_silu import composition as bn_silu_composition
from test_bn_silu import inputs as bn_silu_inputs
from torch.library import opcheck

from rtmdet_fast.kernels import batch_norm
from rtmdet_fast.kernels import bn_silu as bn
from rtmdet_fast.kernels import dwconv_bn_silu as m

pytestmark = pytest.mark.usefixtures("poison", "slow_ones_wait")
BOTH = [
    pytest.param(m.dwconv_bn_silu_reference, id="reference"),
    pytest.param(m.dwconv_bn_silu, marks=needs_triton, id="triton"),
]


def composition(x, conv_weight, bn_weight, bn_bias, *stats, stride=1, training=False, residual=None, **named_stats):
    z = F.conv2d(x, conv_weight, None, stride, conv_weight.shape[2] // 2, groups=x.shape[1])
    return bn_silu_composition(z, bn_weight, bn_bias, *stats, **named_stats, training=training, residual=residual)


def inputs(shape, size=5, stride=1, dtype=torch.float32, layout="contiguous", residual=False):
    tensors = bn_silu_inputs(shape, dtype, layout)
    weight = (torch.randn(shape[1], 1, size, size) / size).to(dtype).to(DEVICE)
    tensors = {"x": tensors["x"], "conv_weight": weight, "bn_weight": tensors["weight"], "bn_bias": tensors["bias"],
               "running_mean": tensors["running_mean"], "running_var": tensors["running_var"]}  # fmt: skip
    if residual:
        tensors["residual"] = composition(**tensors, stride=stride).detach() * 2
    return tensors


def check(function, tensors, stride, training, tolerance=None):
    actual = outputs(function, tensors, stride=stride, training=training)
    x = tensors["x"]
    assert actual["y"].dtype == x.dtype
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    assert actual["y"].is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    expected = outputs(composition, double(tensors), stride=stride, training=training)
    assert_close(actual, expected, tolerance or TOLERANCE[x.dtype])


@not_interpreted
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("size", "stride"), list(product((3, 5, 7), (1, 2))))
def test_reference_parity(size, stride, dtype, layout, training, residual):
    for shape in ((2, 3, 9, 8), (1, 1, 2, 3)):
        check(m.dwconv_bn_silu_reference, inputs(shape, size, stride, dtype, layout, residual), stride, training)


# shape, K, stride, dtype, layout, residual
CASES = [
    ((2, 3, 9, 8), 5, 1, torch.float32, "contiguous", False),
    ((1, 9, 6, 7), 5, 1, torch.float32, "channels_last", True),
    ((2, 3, 6, 10), 5, 1, torch.float16, "contiguous", True),
    ((1, 70, 4, 5), 5, 1, torch.float16, "channels_last", False),
    ((1, 3, 5, 9), 5, 1, torch.bfloat16, "contiguous", False),
    ((1, 2, 5, 6), 5, 1, torch.bfloat16, "channels_last", False),
    ((1, 1, 9, 70), 5, 1, torch.float32, "contiguous", False),  # programs side by side and below each other
    ((1, 2, 13, 63), 3, 1, torch.float16, "contiguous", False),
    ((4, 2, 1, 2), 5, 1, torch.float32, "contiguous", False),  # smaller than the kernel
    ((2, 1, 2, 1), 7, 1, torch.float32, "contiguous", True),
    ((1, 1, 3, 2), 7, 2, torch.float32, "channels_last", False),
    ((2, 3, 6, 8), 3, 1, torch.bfloat16, "contiguous", False),
    ((1, 3, 7, 5), 3, 1, torch.float32, "channels_last", True),
    ((2, 3, 8, 8), 3, 2, torch.float32, "contiguous", True),
    ((1, 3, 7, 9), 3, 2, torch.float16, "channels_last", False),
    ((1, 3, 12, 12), 5, 2, torch.float32, "contiguous", False),
    ((1, 3, 9, 13), 5, 2, torch.bfloat16, "contiguous", True),
    ((2, 2, 7, 6), 5, 2, torch.float16, "channels_last", False),
    ((1, 2, 8, 10), 7, 1, torch.float16, "contiguous", False),
    ((1, 2, 5, 5), 7, 1, torch.float32, "channels_last", False),
    ((1, 2, 9, 12), 7, 2, torch.float32, "contiguous", False),
    ((1, 2, 8, 7), 7, 2, torch.bfloat16, "contiguous", False),
    # channels and columns that no block of lanes ends with
    ((1, 33, 5, 20), 5, 1, torch.float16, "contiguous", True),
    ((2, 24, 4, 10), 5, 1, torch.bfloat16, "channels_last", True),
    ((1, 40, 4, 12), 5, 1, torch.float16, "channels_last", False),
]


@needs_triton
@pytest.mark.parametrize(("shape", "size", "stride", "dtype", "layout", "residual"), CASES)
def test_parity_in_training(shape, size, stride, dtype, layout, residual):
    check(m.dwconv_bn_silu, inputs(shape, size, stride, dtype, layout, residual), stride, training=True)


@needs_triton
@pytest.mark.parametrize(("shape", "size", "stride", "dtype", "layout", "residual"), CASES[:4] + CASES[12:18:2])
def test_parity_where_dz_is_stored(shape, size, stride, dtype, layout, residual, monkeypatch):
    monkeypatch.setitem(m.TUNING, "store_dz", True)
    check(m.dwconv_bn_silu, inputs(shape, size, stride, dtype, layout, residual), stride, training=True)


@needs_triton
@pytest.mark.parametrize(
    ("shape", "size", "stride", "dtype", "layout", "residual"), CASES[:6] + CASES[12:18:2] + CASES[-3:]
)
def test_parity_in_inference(shape, size, stride, dtype, layout, residual):
    check(m.dwconv_bn_silu, inputs(shape, size, stride, dtype, layout, residual), stride, training=False)


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_of_a_large_mean_and_a_small_variance(function, layout):
    tensors = inputs((1, 3, 33, 20), 3, layout=layout)
    tensors["x"] = (1000 + torch.randn(tensors["x"].shape).to(DEVICE) / 10).contiguous(memory_format=LAYOUTS[layout])
    tensors["conv_weight"].zero_()[:, :, 1, 1] = 1  # z = x: no borders
    tensors["running_var"].fill_(0.01)
    expected = outputs(composition, double(tensors), training=True)
    actual = outputs(function, tensors, training=True)
    assert (actual["running_var"] / expected["running_var"] - 1).abs().max() < 1e-3
    # the mean has a step of 6e-5, of a deviation of 0.1; PyTorch's CPU kernel for channels_last loses more
    assert_close(actual, expected, 3e-3 if function is m.dwconv_bn_silu else 2e-2)


@pytest.mark.parametrize("function", BOTH)
def test_non_contiguous_inputs(function):
    tensors = inputs((1, 6, 5, 6), 3, residual=True)
    tensors = {name: t[:, ::2] if t.dim() == 4 and t.shape[1] == 6 else t[::2] for name, t in tensors.items()}
    tensors["residual"] = tensors["residual"].contiguous(memory_format=torch.channels_last)
    dy = torch.ones((), device=DEVICE).expand(1, 3, 5, 6)
    for training in (False, True):
        expected = outputs(composition, double(tensors), dy, training=training)
        assert_close(outputs(function, tensors, dy, training=training), expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("function", BOTH)
def test_odd_storage_offset(function):
    # an even width, but pairs of columns are not aligned to 4 bytes
    tensors = inputs((1, 2, 4, 6), 3, dtype=torch.float16)
    tensors["x"] = torch.cat((tensors["x"].new_zeros(1), tensors["x"].flatten()))[1:].view(1, 2, 4, 6)
    assert tensors["x"].storage_offset() == 1
    check(function, tensors, 1, training=True)


@pytest.mark.parametrize("function", BOTH)
def test_nan_stays_in_its_channel(function):
    tensors = inputs((1, 3, 4, 5), 3)
    tensors["x"][0, 1, 2, 3] = float("nan")
    for training in (False, True):
        y = outputs(function, tensors, training=training)["y"]
        assert y.isnan().flatten(2).any(2).tolist() == [[False, True, False]]
    assert y[0, 1].isnan().all()  # the statistics of its channel


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_autocast(function, training):
    tensors = inputs((1, 3, 4, 6), 3)
    with torch.autocast(DEVICE, torch.bfloat16):
        actual = outputs(function, tensors, training=training)
    assert actual.pop("y").dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 for t in actual.values())
    expected = outputs(composition, double(tensors), training=training)
    del expected["y"]
    assert_close(actual, expected, TOLERANCE[torch.bfloat16])


@not_interpreted
def test_gradcheck_of_the_reference():
    tensors = double(inputs((1, 2, 3, 2), 3, residual=True))
    names = ("x", "conv_weight", "bn_weight", "bn_bias", "residual")
    for training in (False, True):

        def function(*args, training=training):
            stats = {n: tensors[n].clone() for n in ("running_mean", "running_var")}
            return m.dwconv_bn_silu(**dict(zip(names, args, strict=True)), **stats, training=training)

        assert torch.autograd.gradcheck(function, [tensors[n].detach().requires_grad_() for n in names])


BAD = {
    "x: expected 4 dimensions": dict(x=torch.ones(3, 4)),
    "conv_weight: expected shape": dict(conv_weight=torch.ones(3, 1, 4, 4)),
    r"conv_weight: expected shape \(3, 1, K, K\)": dict(conv_weight=torch.ones(3, 3, 5, 5)),
    "conv_weight: torch.float16, but x is torch.float32": dict(conv_weight=torch.ones(3, 1, 5, 5).half()),
    "conv_weight: on meta": dict(conv_weight=torch.ones(3, 1, 5, 5, device="meta")),
    "bn_weight: expected shape": dict(bn_weight=torch.ones(4)),
    "bn_bias: expected shape": dict(bn_bias=torch.ones(2)),
    "running_mean: expected shape": dict(running_mean=torch.ones(2)),
    "stride: expected 1 or 2": dict(stride=3),
    "residual: expected the output's shape": dict(residual=torch.ones(2, 3, 4, 5), stride=2),
    "x: expected more than 1 value|Expected more than 1 value": dict(x=torch.ones(1, 3, 2, 2), stride=2, training=True),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_names_the_argument(message):
    arguments = {k: v.cpu() for k, v in inputs((2, 3, 4, 5)).items()} | BAD[message]
    with pytest.raises((ValueError, TypeError), match=message):
        m.dwconv_bn_silu(**arguments)


@needs_triton
def test_opcheck():
    tests = ("test_schema", "test_autograd_registration") + ("test_faketensor",) * (DEVICE == "cuda")
    t = inputs((1, 3, 4, 5), 3, residual=True)
    for tensor in (t["x"], t["conv_weight"], t["bn_weight"], t["bn_bias"], t["residual"]):
        tensor.requires_grad_()
    opcheck(m._inference.library_op, (*t.values(), 1, 1e-5), test_utils=tests)
    parameters = (t["x"], t["conv_weight"], t["bn_weight"], t["bn_bias"], t["residual"])
    x, weight, running = t["x"].detach(), t["conv_weight"].detach(), (t["running_mean"], t["running_var"])
    opcheck(m._convolution.library_op, (x, weight, 1, 0.1, "", *running), test_utils=tests[:1] + tests[2:])
    z, stats = torch.rand_like(x), torch.rand(5, 3, device=DEVICE)
    opcheck(m._training.library_op, (*parameters, z, stats, 1, 1e-5, ""), test_utils=tests)


@not_interpreted
@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_graph_break(training):
    tensors = inputs((2, 3, 4, 5), residual=True)
    compiled = torch.compile(m.dwconv_bn_silu, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    check(compiled, tensors, 1, training)


@needs_lowering
@pytest.mark.skipif(
    torch.__version__ < "2.12", reason="torch 2.11 takes all pointers of these kernels for written, and copies more"
)
def test_traces_forward_and_backward(traced_for_cuda):  # noqa: F811
    tensors = {name: t.cpu() for name, t in inputs((2, 3, 4, 5), residual=True).items()}
    forward = ("_forward_kernel", ["partial_ptr", "y_ptr"])
    sums = ("_sums_kernel", ["counter_ptr", "partial_ptr", "sums_ptr"])
    backward = [sums, ("_backward_kernel", ["dw_ptr", "dx_ptr"])]
    assert traced_kernels(m.dwconv_bn_silu, tensors) == [("_forward_kernel", ["y_ptr"]), forward, *backward]
    assert traced_kernels(partial(m.dwconv_bn_silu, training=True), tensors) == [
        forward,
        ("_merge_kernel", ["running_mean_ptr", "running_var_ptr", "stats_ptr"]),
        ("_apply_kernel", ["y_ptr"]),
        *backward,
    ]


@needs_lowering
def test_exports(traced_for_cuda):  # noqa: F811
    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return m.dwconv_bn_silu(*tensors, stride=2)

    tensors = tuple(t.cpu() for t in inputs((4, 3, 8, 10)).values())
    sizes = {dim: torch.export.Dim(name, min=4) for dim, name in ((0, "b"), (2, "h"), (3, "w"))}
    program = torch.export.export(Module(), tensors, dynamic_shapes=((sizes, *[None] * 5),))
    targets = [str(node.target) for node in program.graph.nodes]
    assert "rtmdet_fast.dwconv_bn_silu_inference.default" in targets


# ---- SyncBN, of both ops at once: starting two processes takes longer than all they do


def join(rank, store, queue, jobs):
    """One of two processes in a gloo group; the first has one image of each job and the second the others."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mine = slice(0, 1) if rank == 0 else slice(1, None)
    for function, arrays in jobs:
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        dy, tensors["x"] = tensors.pop("dy")[mine], tensors["x"][mine]
        results = outputs(partial(function, process_group=dist.group.WORLD), tensors, dy, training=True)
        queue.put((rank, {name: t.numpy() for name, t in results.items()}))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(DEVICE == "cuda", reason="compares processes on CPU tensors")
def test_synchronised_statistics_equal_those_of_one_process(tmp_path):
    cases = [(bn.bn_silu, bn_silu_composition, bn_silu_inputs((3, 3, 4, 5)))]
    cases += [(m.dwconv_bn_silu, composition, inputs((3, 3, 4, 5), 3))]
    dy = torch.randn(3, 3, 4, 5)
    jobs = [(f, {n: t.numpy() for n, t in (tensors | {"dy": dy}).items()}) for f, _, tensors in cases]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=join, args=(rank, tmp_path / "store", queue, jobs)) for rank in range(2)]
    for process in processes:
        process.start()
    answers = [queue.get(timeout=300) for _ in range(2 * len(jobs))]
    for process in processes:
        process.join()
    first, second = ([results for rank, results in answers if rank == r] for r in range(2))
    for (_, reference, tensors), a, b in zip(cases, first, second, strict=True):
        expected = outputs(reference, double(tensors), dy, training=True)
        actual = {}
        for name in a:
            x, y = torch.from_numpy(a[name]), torch.from_numpy(b[name])
            if name.startswith("running"):
                assert torch.equal(x, y)
            actual[name] = x if name.startswith("running") else torch.cat((x, y)) if name in ("y", "dx") else x + y
        assert_close(actual, expected, TOLERANCE[torch.float32])


# ---- how outputs lie in blocks of lanes


@pytest.mark.parametrize("mode", ["inference", "training", "backward"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_few_lanes_idle(mode, layout, dtype):
    """At least four fifths of them have a group of columns, in feature maps of 640 px. An idle one takes as long."""
    last, shares = layout == "channels_last", {}
    for channels, width in ((32, 160), (64, 80), (128, 40), (256, 20), (24, 160), (48, 80), (96, 40), (192, 20)):
        x = torch.empty(1, channels, width, width, dtype=dtype, device="meta").to(memory_format=LAYOUTS[layout])
        plan = (
            m._plan(x, 5, 1, last, mode != "inference")
            if mode != "backward"
            else {**m.TUNING["backward"], "columns": 2}
        )
        block = plan["lanes" if mode == "inference" else "block"]
        shape, blocks = m._blocks(x, last, plan["columns"], block)
        shares[channels, width] = channels * width / plan["columns"] / (prod(shape) * prod(blocks))
    assert min(shares.values()) >= 0.8, shares


def test_rows_are_loaded_in_whole_sectors_where_lanes_allow():
    """A narrower block idles fewer lanes and brings half of what L2 gives: it has to spare a fifth of them."""
    for width, groups in ((160, 16), (80, 8), (40, 8), (20, 4)):
        x = torch.empty(1, 64, width, width, dtype=torch.float16, device="meta")
        assert m._blocks(x, False, 2, (32, 4))[0] == (128 // groups, groups), width


# ---- what every configuration of the launchers compiles to

LOWERED = {
    "pairs": ((4, 64, 80, 160), "contiguous"),
    "few pairs": ((4, 64, 20, 20), "contiguous"),
    "odd": ((2, 30, 13, 21), "contiguous"),
    "last": ((4, 96, 80, 80), "channels_last"),
    "narrow last": ((2, 24, 13, 63), "channels_last"),
}
FAST = {
    ("pairs", 5, 1, torch.float16, "sm_90"),
    ("odd", 5, 1, torch.bfloat16, "gfx942"),
    ("last", 5, 1, torch.float16, "sm_100"),
    ("narrow last", 5, 1, torch.float32, "sm_80"),
    ("pairs", 3, 1, torch.bfloat16, "sm_100"),
    ("last", 3, 1, torch.float16, "gfx942"),
    ("odd", 5, 2, torch.float32, "sm_90"),
    ("narrow last", 3, 2, torch.float16, "sm_90"),
    ("pairs", 7, 2, torch.float16, "sm_80"),
    ("few pairs", 5, 1, torch.float16, "sm_90"),
    ("last", 5, 1, torch.float16, "sm_90"),
}
ALL = list(product(LOWERED, (3, 5, 7), (1, 2), TOLERANCE, TARGETS))


@needs_lowering
@pytest.mark.parametrize(
    ("case", "size", "stride", "dtype", "target"), thinned(ALL, {i for i, case in enumerate(ALL) if case in FAST})
)
def test_lowering(case, size, stride, dtype, target, monkeypatch):
    shape, layout = LOWERED[case]
    x = torch.empty(shape, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])
    names = ("bn_weight", "bn_bias", "running_mean", "running_var")
    tensors = {"x": x, "conv_weight": torch.empty(shape[1], 1, size, size, dtype=dtype)}
    tensors |= {name: torch.empty(shape[1]) for name in names}
    launches = record(monkeypatch, partial(m.dwconv_bn_silu, stride=stride), tensors, m, batch_norm)
    launches = [launch for launch in launches if launch.kernel in (m._forward_kernel, m._backward_kernel)]
    assert len(launches) in (3, 4)  # inference, training, backward (of either, if its statistics are not aligned)
    for launch in launches:
        resources = launch.lower(target)
        assert resources.spills == 0, launch
        # of 255 on NVIDIA's, and 512 (vector and accumulation) on AMD's; K = 7 has 49 weights and 49 sums of dw
        assert resources.registers <= (192 if size < 7 else 320 if target == "gfx942" else 255), launch
        if target == "sm_90":  # the programs that are counted with fit its registers, which it gives out by eights
            plan = m.TUNING["backward"]
            if launch.kernel is m._forward_kernel:
                plan = m._plan(x, size, stride, layout != "contiguous", dict(launch.constexprs)["TRAINING"])
            each = 128 * -(-resources.registers // 8) * 8
            assert plan["resident"][size] * each <= 65536, (launch, resources.registers)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("shape", "size", "stride"),
    [((8, 32, 160, 160), 5, 1), ((8, 128, 40, 40), 5, 1), ((32, 256, 20, 20), 5, 1), ((8, 64, 80, 80), 3, 2),
     ((4, 24, 63, 121), 7, 1)],
)  # fmt: skip
def test_shapes_of_the_models_twice(shape, size, stride, dtype, layout):
    tensors = inputs(shape, size, stride, dtype, layout, residual=True)
    for training in (False, True):
        run = partial(outputs, m.dwconv_bn_silu, tensors, stride=stride, training=training)
        actual, again = run(), run()
        assert all(torch.equal(actual[name], again[name]) for name in actual)
        check(m.dwconv_bn_silu, tensors, stride, training)
