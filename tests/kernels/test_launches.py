"""What the kernels are compiled for, and with what they wait: from their launches and machine code."""

from __future__ import annotations

import re

import pytest
import torch
from lowering import needs_lowering, record_launches

from rtmdet_fast.kernels import (
    _dispatch,
    assign,
    assign_triton,
    batch_norm,
    bn_silu,
    dwconv_bn_silu,
    dynamic_mask,
    dynamic_mask_triton,
    nms,
    quality_focal_loss,
)
from rtmdet_fast.models.fused import fused_bn_silu

pytestmark = needs_lowering


@pytest.fixture
def launches(monkeypatch):
    monkeypatch.setattr(_dispatch, "BACKEND", "triton")
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)  # what nobody writes is an index later
    modules = assign_triton, batch_norm, bn_silu, dwconv_bn_silu, dynamic_mask_triton, nms, quality_focal_loss
    return record_launches(monkeypatch, *modules)


def layers(images, height, width, layout=torch.channels_last):
    x = torch.randn(images, 32, height, width).to(memory_format=layout).half().requires_grad_()
    statistics = [torch.ones(32) for _ in range(4)]
    kernel = torch.randn(32, 1, 5, 5).half()
    for training in (False, True):
        y = bn_silu.bn_silu(x, *statistics, training=training)
        y = y + dwconv_bn_silu.dwconv_bn_silu(x, kernel, *statistics, training=training)
        y.backward(torch.empty_like(y))


def norms(images, height, width):
    x = torch.randn(images, 64, height, width).to(memory_format=torch.channels_last).half().requires_grad_()
    for training in (False, True):
        y = bn_silu.bn_silu(x, *(torch.ones(64) for _ in range(4)), training=training)
        y.backward(torch.empty_like(y))


def assignment(images, priors, truths):
    labels = torch.zeros(images, truths, dtype=torch.int64)
    counts = torch.full((images,), truths)
    boxes = torch.rand(images, priors, 4)
    problem = torch.rand(images, priors, 16), torch.rand(priors, 4), boxes[:, :truths], labels, counts
    assign.dynamic_soft_label_assign(boxes, *problem)
    assign.atss_assign(boxes, *problem[1:], strides=(8, 16, 32))


def suppression(images, boxes):
    labels = torch.zeros(images, boxes, dtype=torch.int64)
    nms.batched_nms_padded(torch.rand(images, boxes, 4), torch.rand(images, boxes), labels, 0.5, 10)


def masks(images, height, width, instances, truths):
    features = torch.rand(images, 8, height, width, requires_grad=True)
    kernels, index = torch.rand(instances, 169, requires_grad=True), torch.zeros(instances, dtype=torch.int64)
    inputs = features, kernels, torch.rand(instances, 2), torch.ones(instances), index
    truth = torch.zeros(images, truths, 2 * height, 2 * width, dtype=torch.bool)
    dynamic_mask.dynamic_mask_dice_loss(*inputs, truth, index).sum().backward()


def loss(images, priors):
    labels = torch.zeros(images, priors, dtype=torch.int64)
    logits = torch.rand(images, priors, 80, requires_grad=True)
    quality_focal_loss.quality_focal_loss(logits, labels, labels.float()).backward()


@pytest.mark.parametrize(
    ("run", "sizes"),
    [
        (layers, [(1, 16, 32), (3, 48, 80), (2, 24, 40)]),
        (layers, [(1, 37, 31), (3, 47, 51), (5, 45, 37)]),  # odd sizes are another kernel, and one for all
        (norms, [(1, 20, 20), (2, 12, 18), (8, 7, 5)]),  # multiples of eight pixels
        (norms, [(1, 19, 19), (3, 7, 5), (2, 9, 3)]),
        (assignment, [(1, 64, 16), (2, 525, 7), (3, 33, 1)]),
        (loss, [(1, 64), (2, 525), (3, 1)]),
        (suppression, [(1, 64), (2, 300), (3, 1025)]),
        (masks, [(1, 16, 16, 1, 1), (2, 12, 20, 5, 3), (3, 16, 8, 16, 16)]),
    ],
)
def test_another_size_compiles_nothing(launches, run, sizes):
    """In mid-run that would take seconds, with images of another size or a batch with one more ground truth."""
    compiled = []
    for size in sizes:
        launches.clear()
        run(*size)
        compiled.append(set(launches))
    assert compiled[0] and compiled[1] == compiled[0] and compiled[2] == compiled[0]


@pytest.mark.parametrize(("layout", "most"), [(torch.channels_last, 6), (torch.contiguous_format, 8)], ids=str)
def test_sizes_of_all_kinds_take_few_kernels(launches, layout, most):
    """Widths that 4, 2 or nothing divides; in contiguous format also blocks of four widths, that few lanes idle."""
    for size in (9, 10, 13, 16, 18, 19, 20, 21, 22, 31, 38, 40, 76):
        layers(1, size, size, layout)
    kinds = {}
    for launch in set(launches):
        kind = launch.kernel.__name__, dict(launch.constexprs).get("TRAINING")
        kinds[kind] = kinds.get(kind, 0) + 1
    assert len(kinds) == 8 and max(kinds.values()) <= most, kinds


def test_what_other_threads_stored_is_waited_for_on_amd(launches, monkeypatch):
    monkeypatch.setattr(_dispatch, "IS_AMD", True)
    suppression(1, 300)
    masks(1, 12, 20, 3, 2)
    checked = {launch for launch in launches if launch.kernel in (nms._scan_kernel, dynamic_mask_triton._dice_kernel)}
    assert len(checked) == 3  # that of the masks also backward
    for launch in checked:
        lines = [line.strip() for line in launch.lower("gfx942").assembly.splitlines()]
        waits = [i for i, line in enumerate(lines) if line.startswith("s_waitcnt vmcnt(0)")]
        barriers = [i for i, line in enumerate(lines) if line.startswith("s_barrier")]
        stores = [i for i, line in enumerate(lines) if re.match(r"(global|flat|buffer)_store", line)]
        # the barrier that comes next after such a wait, with no store between them
        pairs = [(w, next((b for b in barriers if b > w), None)) for w in waits]
        assert any(b and any(s < w for s in stores) and not any(w < s < b for s in stores) for w, b in pairs), launch


SHAPES = {
    "contiguous": ((8, 32, 40, 40), torch.contiguous_format),
    "channels_last": ((8, 64, 40, 40), torch.channels_last),
    "folded": ((8, 24, 40, 40), torch.channels_last),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_batch_norm_and_silu_train_with_five_launches(launches, shape, monkeypatch):
    """Counting the batch, statistics, y; sums, dx. Eager PyTorch has as many: count, batch norm, SiLU and their two."""
    x = torch.randn(SHAPES[shape][0]).half().to(memory_format=SHAPES[shape][1]).requires_grad_()
    norm = torch.nn.BatchNorm2d(x.shape[1])
    fused_bn_silu(x, norm)  # registers the ops, and makes the counters
    launches.clear()
    monkeypatch.setattr(_dispatch._launches, "real", True)  # as on a GPU, where ops run without PyTorch's dispatcher
    y, forward = operations(lambda: fused_bn_silu(x, norm))
    dy = torch.ones_like(y)
    _, backward = operations(lambda: y.backward(dy))
    names = [launch.kernel.__name__ for launch in launches]
    assert names == ["_moments_kernel", "_apply_kernel", "_sums_kernel", "_dx_kernel"]
    assert forward == ["add_"] and backward == []


@pytest.mark.parametrize("shape", ["contiguous", "channels_last"])
def test_depthwise_layers_train_with_eight_launches(launches, shape, monkeypatch):
    """Counting the batch, z and the moments of its tiles, their merging, y; sums, dx with dw of the tiles, dw."""
    x = torch.randn(SHAPES[shape][0]).half().to(memory_format=SHAPES[shape][1]).requires_grad_()
    norm, conv = torch.nn.BatchNorm2d(x.shape[1]), torch.nn.Conv2d(x.shape[1], x.shape[1], 5, 1, 2, groups=x.shape[1])
    conv.half()
    fused_bn_silu(x, norm, conv)
    launches.clear()
    monkeypatch.setattr(_dispatch._launches, "real", True)
    y, forward = operations(lambda: fused_bn_silu(x, norm, conv))
    dy = torch.ones_like(y)
    _, backward = operations(lambda: y.backward(dy))
    names = [launch.kernel.__name__ for launch in launches]
    assert names == ["_forward_kernel", "_merge_kernel", "_apply_kernel", "_sums_kernel", "_backward_kernel"]
    assert forward == ["add_"] and backward == ["sum", "copy_"]


def operations(function):
    """What `function` returns, and the operations of PyTorch in it that launch: neither views nor memory."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = function()
    views = (
        "empty empty_like empty_strided new_empty detach view reshape select slice transpose t alias as_strided "
        "to _to_copy contiguous result_type _reshape_alias"
    )

    def launches(event):
        return event and event.name.startswith("aten::") and event.name.removeprefix("aten::") not in views.split()

    events = [event for event in profile.events() if launches(event) and not launches(event.cpu_parent)]
    return result, [event.name.removeprefix("aten::") for event in events]


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("shape", ["channels_last", *(pytest.param(s, marks=pytest.mark.slow) for s in SHAPES)])
def test_who_merges_sees_what_the_others_stored(launches, shape, target, monkeypatch):
    """Stores, a barrier for the program's threads, counting with release and acquire, a barrier, and only then loads.

    The interpreter takes one program after the other: of this it shows nothing.
    """
    monkeypatch.setattr(_dispatch, "IS_AMD", target == "gfx942")
    x = torch.randn(SHAPES[shape][0]).half().to(memory_format=SHAPES[shape][1]).requires_grad_()
    fused_bn_silu(x, torch.nn.BatchNorm2d(x.shape[1])).sum().backward()
    found = {launch for launch in launches if launch.kernel in (bn_silu._moments_kernel, batch_norm._sums_kernel)}
    assert len(found) == 2
    for launch in found:
        check_merging(launch.lower(target).assembly.splitlines(), amd=target == "gfx942")


def check_merging(lines, amd):
    def places(pattern):
        return [i for i, line in enumerate(lines) if re.search(pattern, line)]

    counts = places("global_atomic_add" if amd else r"atom\.global\.gpu\.acq_rel\.add")
    barriers = places("s_barrier" if amd else r"bar\.sync")
    stores = places("global_store" if amd else r"st\.global")
    merged = places(r"global_load.* nt$" if amd else r"ld\.global\.cg")
    assert len(counts) == 2 and merged and not places(r"ld\.global\.(ca|nc)|ld\.volatile")
    for count in counts:
        before, after = max(b for b in barriers if b < count), min(b for b in barriers if b > count)
        stored = max(s for s in stores if s < count)
        assert stored < before < count < after
        assert not any(count < load < after for load in merged)
        if amd:  # what has arrived is written back from the die's cache, and what lies in the own cache is dropped
            assert any(stored < i < before for i in places(r"s_waitcnt.*vmcnt\(0\)"))
            assert any(before < i < count for i in places("buffer_wbl2 sc1"))
            assert any(count < i < after for i in places("buffer_inv sc1"))
    assert min(merged) > min(counts)


@pytest.mark.parametrize(("images", "boxes"), [(32, 5000), (1, 30000), (8, 1000)])
def test_words_of_nms_are_bounded(launches, monkeypatch, images, boxes):
    """32 x 5,000 boxes took 101 MB, of which 1/80 was read."""
    allocated = []

    def empty(*shape, **options):
        allocated.append(torch.Size(shape).numel() * options["dtype"].itemsize)
        return torch.zeros(1, dtype=options["dtype"]).expand(shape)

    monkeypatch.setattr(nms.torch, "empty", empty)
    blocks = nms._blocks(images, boxes)
    suppression(images, boxes)
    assert allocated and max(allocated) <= 8 * nms.TUNING["words"] == 2**25
    assert [first for first, _ in blocks] == [sum(n for _, n in blocks[:i]) for i in range(len(blocks))]
    assert sum(n for _, n in blocks) == -(-boxes // 64) and len(blocks) <= 3


def test_pairs_of_columns_are_told_by_their_address(launches):
    """A buffer of somebody else's has an offset of 0 wherever it begins."""
    data = bytearray(2 * 2 * 3 * 8 * 8 + 16)
    start = torch.frombuffer(data, dtype=torch.uint8).data_ptr()
    packs = []
    for address in (0, 2, 4, 8):
        offset = (address - start) % 16
        x = torch.frombuffer(data, dtype=torch.float16, count=2 * 3 * 8 * 8, offset=offset).view(2, 3, 8, 8)
        assert x.storage_offset() == 0 and x.data_ptr() % 16 == address
        statistics = [torch.ones(3) for _ in range(4)]
        launches.clear()
        dwconv_bn_silu.dwconv_bn_silu(x, torch.ones(3, 1, 5, 5).half(), *statistics)
        packs.append(dict(launches[0].constexprs)["PACK_IN"])
    assert packs == [4, 1, 2, 4]


@pytest.mark.parametrize("name", ["dwconv", "masks"])
def test_opaque_ops_are_traced_as_such(monkeypatch, name):
    """As with PyTorch 2.11, which would clone what the kernels of these ops read."""
    from torch._dynamo.backends.common import aot_autograd

    module = dwconv_bn_silu if name == "dwconv" else dynamic_mask_triton
    monkeypatch.setattr(_dispatch, "BACKEND", "triton")
    ops = [op for op in vars(module).values() if isinstance(op, _dispatch.TritonOp)]
    assert len(ops) in (3, 4) and all(op.opaque == _dispatch.CLONES_WHAT_IS_READ for op in ops)
    monkeypatch.setattr(_dispatch.TritonOp, "opaque", True, raising=False)
    replaced = [
        _dispatch.TritonOp(op.name.replace("::", "_opaque::"), op.function, opaque=True, mutates=op.mutates)
        for op in ops
    ]
    for op, new in zip(ops, replaced, strict=True):
        new._more = op._more
        for attribute in [a for a, value in vars(module).items() if value is op]:
            monkeypatch.setattr(module, attribute, new)
        _ = new.library_op
    found = []

    def collect(graph, inputs):
        found.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    weight = torch.ones(3, 1, 5, 5, requires_grad=True)
    statistics = [torch.ones(3) for _ in range(4)]
    backend = aot_autograd(fw_compiler=collect, bw_compiler=collect)
    with torch._functorch.config.patch(force_non_lazy_backward_lowering=True), pytest.raises(Exception):  # noqa: B017
        if name == "dwconv":
            torch.compile(
                lambda: dwconv_bn_silu.dwconv_bn_silu(x, weight, *statistics, training=True), backend=backend
            )()
        else:
            index = torch.zeros(4, dtype=torch.int64)
            inputs = torch.rand(2, 8, 4, 4), torch.rand(4, 169), torch.rand(4, 2), torch.ones(4), index
            torch.compile(lambda: dynamic_mask.dynamic_mask_logits(*inputs), backend=backend)()
    assert not any("triton_kernel" in target for target in found)
    assert any(replaced[0].name.split("::")[0] in target for target in found)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", [3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_rows_on_their_way_stay_in_their_registers(launches, layout, size, stride):
    """A turn of the loop uses as many as there are: what it would move it would have to wait for."""
    x = torch.randn(2, 96, 16, 16).half().to(memory_format=layout)
    for training in (False, True):
        dwconv_bn_silu.dwconv_bn_silu(
            x,
            torch.ones(96, 1, size, size).half(),
            *[torch.ones(96) for _ in range(4)],
            stride=stride,
            training=training,
        )
    found = [dict(launch.constexprs) for launch in launches if launch.kernel is dwconv_bn_silu._forward_kernel]
    assert len(found) == 2 and all(0 < c["PREFETCH"] <= c["UNROLL"] * c["S"] for c in found)
