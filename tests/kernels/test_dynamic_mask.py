"""Dynamic masks and their Dice loss: against grouped convolutions in float64, and mmdet's own functions."""

from __future__ import annotations

import os
from functools import partial
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lowering import TARGETS, needs_lowering, record_launches
from on_triton import DEVICE
from test_bn_silu import LAYOUTS, thinned, traced_for_cuda, traced_kernels  # noqa: F401 (a fixture)
from torch.library import opcheck

from rtmdet_fast import ops
from rtmdet_fast.kernels import _dispatch, dynamic_mask_torch, dynamic_mask_triton
from rtmdet_fast.kernels import dynamic_mask as m

pytestmark = pytest.mark.usefixtures("poison", "slow_ones_wait")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not (DEVICE == "cuda" or INTERPRETED), reason="needs CUDA or TRITON_INTERPRET=1")
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="torch.compile cannot trace an interpreted kernel")
# of the greatest element; outputs have the inputs' exact result, gradients are rounded to the inputs' dtype
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(params=["reference", pytest.param("triton", marks=needs_triton)])
def backend(request, monkeypatch):
    monkeypatch.setattr(m, "use_triton", lambda x: request.param == "triton")
    return request.param


def oracle_logits(features, kernels, points, strides, image_index, *, feature_stride=8):
    """The published formulation: one grouped convolution over the inputs of all instances."""
    K, (H, W) = len(kernels), features.shape[2:]
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    grid = torch.stack([x, y]).to(features) * feature_stride
    relative = (points[:, :, None, None] - grid) / (8 * strides[:, None, None, None])
    z = torch.cat([relative, features[image_index]], 1).reshape(1, K * 10, H, W)
    w1, w2, w3, b1, b2, b3 = kernels.split((80, 64, 8, 8, 8, 1), 1)
    z = F.conv2d(z, w1.reshape(K * 8, 10, 1, 1), b1.flatten(), groups=K).relu()
    z = F.conv2d(z, w2.reshape(K * 8, 8, 1, 1), b2.flatten(), groups=K).relu()
    return F.conv2d(z, w3.reshape(K, 8, 1, 1), b3.flatten(), groups=K)[0]


def oracle_loss(*tensors, gt_masks, gt_index, eps=5e-6, **options):
    logits = oracle_logits(*tensors, **options)
    p = F.interpolate(logits[None], scale_factor=2, mode="bilinear", align_corners=False)[0].sigmoid().flatten(1)
    t = (gt_masks[tensors[4], gt_index] != 0).to(p).flatten(1)
    return 1 - 2 * (p * t).sum(1) / (p.square().sum(1) + eps + t.square().sum(1) + eps)


def inputs(B, H, W, K, dtype=torch.float32, layout="contiguous", kernel_dtype=None, seed=0):
    """The five tensors of the logits, images in any order."""
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(B, 8, H, W, generator=g).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    kernels = (torch.randn(K, 169, generator=g) / 2).to(kernel_dtype or dtype)
    points = torch.rand(K, 2, generator=g) * 8 * torch.tensor([W, H])
    strides = torch.tensor([8.0, 16, 32])[torch.randint(3, (K,), generator=g)]
    tensors = features, kernels, points, strides, torch.randint(B, (K,), generator=g)
    return [tensor.to(DEVICE) for tensor in tensors]


def masks(tensors, M=3, dtype=torch.bool):
    features, kernels = tensors[:2]
    g = torch.Generator().manual_seed(1)
    B, _, H, W = features.shape
    gt_masks = torch.rand(B, M, 2 * H, 2 * W, generator=g) > 0.6
    gt_index = torch.randint(max(M, 1), (len(kernels),), generator=g)
    return dict(gt_masks=gt_masks.to(dtype).to(DEVICE), gt_index=gt_index.to(DEVICE))


def outputs(function, tensors, **options):
    """The result, and the gradients of features and kernels, of `function`."""
    leaves = [t.detach().requires_grad_() for t in tensors[:2]]
    result = function(*leaves, *tensors[2:], **options)
    upstream = torch.randn(result.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    grads = torch.autograd.grad(result, leaves, upstream.to(result))
    assert all(grad.dtype == leaf.dtype and grad.shape == leaf.shape for grad, leaf in zip(grads, leaves, strict=True))
    return result.detach(), *grads


def double(tensors):
    return [t.double() if t.is_floating_point() else t for t in tensors]


def assert_close(actual, expected, tolerances):
    names = ("result", "dfeatures", "dkernels")[: len(actual)]
    for name, got, want, tolerance in zip(names, actual, expected, tolerances, strict=True):
        assert (got.double() - want).abs().max().item() <= tolerance * want.abs().max().item(), name  # NaN fails


def check(tensors, options, logits_gradients=not INTERPRETED):
    """Both functions against the oracle. The kernels of their gradients are the same, and the interpreter is slow."""
    tolerances = [1e-12 if tensors[0].dtype == torch.float64 else 1e-5, *(TOLERANCE[t.dtype] for t in tensors[:2])]
    pairs = ((ops.dynamic_mask_logits, oracle_logits, {}), (ops.dynamic_mask_dice_loss, oracle_loss, masks(tensors)))
    for function, oracle, more in pairs:
        expected = outputs(oracle, double(tensors), **more, **options)
        if function is ops.dynamic_mask_logits and not logits_gradients:
            actual = (function(*tensors, **more, **options),)
        else:
            actual = outputs(function, tensors, **more, **options)
        assert actual[0].dtype == (torch.float64 if tensors[0].dtype == torch.float64 else torch.float32)
        assert_close(actual, expected[: len(actual)], tolerances[: len(actual)])


CASES = {
    "odd": dict(B=2, H=7, W=13, K=3),
    "one pixel": dict(B=1, H=1, W=1, K=2),
    "one row": dict(B=1, H=1, W=37, K=2),
    "one column": dict(B=2, H=21, W=1, K=2),
    "an image without instances": dict(B=5, H=4, W=6, K=3),
    "fp16": dict(B=2, H=9, W=8, K=3, dtype=torch.float16),
    "bf16": dict(B=1, H=8, W=9, K=3, dtype=torch.bfloat16),
    "fp16 kernels": dict(B=2, H=6, W=9, K=3, kernel_dtype=torch.float16),
    "float64": dict(B=2, H=6, W=5, K=4, dtype=torch.float64),
    "channels_last": dict(B=2, H=6, W=10, K=3, layout="channels_last"),
}


@pytest.mark.parametrize("case", CASES)
def test_parity(case, backend):
    check(inputs(**CASES[case]), {})


def test_no_instances(backend):
    tensors = inputs(2, 5, 4, 0)
    for function, shape, options in (
        (ops.dynamic_mask_logits, (0, 5, 4), {}),
        (ops.dynamic_mask_dice_loss, (0,), masks(tensors, M=0)),
    ):
        result, dfeatures, dkernels = outputs(function, tensors, **options)
        assert result.shape == shape and dkernels.shape == (0, 169)
        assert not dfeatures.any()


def test_another_stride_of_the_features(backend):
    check(inputs(2, 4, 5, 2), dict(feature_stride=4), logits_gradients=True)


def test_chunks_of_the_reference(monkeypatch):
    monkeypatch.setattr(dynamic_mask_torch, "CHUNK", 3 * 8 * 30)
    monkeypatch.setattr(m, "use_triton", lambda x: False)
    check(inputs(2, 5, 6, 7), {})


@needs_triton
def test_several_tiles_an_instance_and_one_group(monkeypatch):
    monkeypatch.setattr(m, "use_triton", lambda x: True)
    monkeypatch.setitem(dynamic_mask_triton.TUNING, "tile", {"logits": 40, "dkernels": 64})
    monkeypatch.setitem(dynamic_mask_triton.TUNING["groups"], "programs", 1)
    check(inputs(1, 11, 13, 2), {})


def test_masks_of_bytes_and_sampled_views(backend):
    tensors = inputs(2, 5, 6, 2)
    options = masks(tensors, dtype=torch.uint8)
    expected = ops.dynamic_mask_dice_loss(*tensors, **options)
    assert torch.equal(
        expected, ops.dynamic_mask_dice_loss(*tensors, **options | {"gt_masks": options["gt_masks"] * 255})
    )
    full = torch.zeros(2, 3, 40, 48, dtype=torch.bool, device=DEVICE)
    full[:, :, 2::4, 2::4] = options["gt_masks"] != 0
    view = ops.dynamic_mask_dice_loss(*tensors, **options | {"gt_masks": full[:, :, 2::4, 2::4]})
    assert torch.equal(expected, view)


def test_non_contiguous_inputs(backend):
    features, kernels, points, strides, image_index = inputs(2, 5, 12, 4)
    strided = features[..., ::2], kernels.repeat(1, 2)[::2, :169], points[::2], strides[::2], image_index[::2]
    check(strided, {})
    loss = ops.dynamic_mask_dice_loss(strided[0].requires_grad_(), *strided[1:], **masks(strided))
    loss.sum().backward()  # an expanded gradient


def test_order_of_the_instances_and_runs_change_nothing(backend):
    tensors = inputs(3, 6, 7, 3)
    options = masks(tensors)
    first = outputs(ops.dynamic_mask_dice_loss, tensors, **options)
    again = outputs(ops.dynamic_mask_dice_loss, tensors, **options)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    order = torch.randperm(3, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    loss = ops.dynamic_mask_dice_loss(
        tensors[0], *(t[order] for t in tensors[1:]), options["gt_masks"], options["gt_index"][order]
    )
    torch.testing.assert_close(loss, first[0][order], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_stay_where_they_are(backend, value):
    tensors = inputs(2, 6, 7, 3)
    options = masks(tensors)
    clean = outputs(ops.dynamic_mask_dice_loss, tensors, **options)
    tensors[1][1] = value
    loss, dfeatures, dkernels = outputs(ops.dynamic_mask_dice_loss, tensors, **options)
    others = torch.arange(3, device=DEVICE) != 1
    image = tensors[4][1]
    assert loss[1].isnan() and dkernels[1].isnan().any()
    torch.testing.assert_close(loss[others], clean[0][others])
    torch.testing.assert_close(dkernels[others], clean[2][others])
    torch.testing.assert_close(dfeatures[1 - image], clean[1][1 - image])

    tensors = inputs(2, 6, 7, 3)
    clean = ops.dynamic_mask_logits(*tensors)
    tensors[0][1, 5, 2, 3] = float("nan")
    logits = ops.dynamic_mask_logits(*tensors)
    expected = torch.zeros_like(logits, dtype=torch.bool)
    expected[tensors[4] == 1, 2, 3] = True
    assert torch.equal(logits.isnan(), expected)
    torch.testing.assert_close(logits[~expected], clean[~expected])


def test_empty_and_full_masks_and_saturated_logits(backend):
    tensors = inputs(1, 4, 5, 6)
    tensors[1][:, 168] = torch.tensor([-200.0, -200, 200, 200, 0, 0])
    tensors[1][:, 144:152] = torch.tensor([0.0, 0, 0, 0, 1, 1])[:, None]
    gt_masks = torch.stack([torch.zeros(8, 10), torch.ones(8, 10)]).bool().to(DEVICE)[None]
    gt_index = torch.tensor([0, 1, 0, 1, 0, 1], device=DEVICE)
    loss, *grads = outputs(ops.dynamic_mask_dice_loss, tensors, gt_masks=gt_masks, gt_index=gt_index)
    assert loss[:5].tolist() == pytest.approx([1, 1, 1, 0, 1], abs=1e-6)
    assert all(grad.isfinite().all() for grad in grads)
    assert_close(
        (loss, *grads), outputs(oracle_loss, double(tensors), gt_masks=gt_masks, gt_index=gt_index), [1e-5] * 3
    )


def test_indices_out_of_range(backend):
    tensors = inputs(2, 4, 5, 2)
    options = masks(tensors)
    clean = ops.dynamic_mask_dice_loss(*tensors, **options)
    for name, index in product(("image_index", "gt_index"), (-2, 10**9)):
        arguments = (
            dict(zip(("features", "kernels", "points", "strides", "image_index"), tensors, strict=True)) | options
        )
        arguments[name] = arguments[name].clone()
        arguments[name][1] = index
        arguments["features"] = arguments["features"].clone().requires_grad_()
        if backend == "reference":
            with pytest.raises(ValueError, match=name):
                ops.dynamic_mask_dice_loss(**arguments)
            continue
        loss = ops.dynamic_mask_dice_loss(**arguments)
        assert loss.isnan().tolist() == [False, True]
        torch.testing.assert_close(loss[:1], clean[:1])
        if index == -2 and name == "image_index":
            loss.sum().backward()  # reads nothing outside
            assert arguments["features"].grad.isfinite().all()


def test_padding_has_no_loss_and_no_gradient(backend):
    """As many places as there may be instances: those left over change nothing, to the bit."""
    real = inputs(2, 3, 4, 2)
    options = masks(real)
    expected = outputs(ops.dynamic_mask_dice_loss, real, **options)
    empty = torch.tensor([True, False, True, False], device=DEVICE)
    padded = [real[0], *(x.new_full((4, *x.shape[1:]), torch.nan if x.is_floating_point() else -1) for x in real[1:])]
    for tensor, values in zip(padded[1:], real[1:], strict=True):
        tensor[~empty] = values
    gt_index = options["gt_index"].new_zeros(4)
    gt_index[~empty] = options["gt_index"]
    upstream = torch.randn(2, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(real[0])
    leaves = [x.requires_grad_() for x in padded[:2]]
    loss = ops.dynamic_mask_dice_loss(*leaves, *padded[2:], gt_masks=options["gt_masks"], gt_index=gt_index)
    weights = upstream.new_full((4,), 7.0)
    weights[~empty] = upstream
    features, kernels = torch.autograd.grad(loss, leaves, weights)
    assert not loss[empty].any() and not kernels[empty].any()
    for found, truth in zip((loss[~empty], features, kernels[~empty]), expected, strict=True):
        assert torch.equal(found, truth)


def test_autocast_changes_nothing(backend):
    tensors = inputs(2, 5, 6, 2)
    options = masks(tensors)
    expected = outputs(ops.dynamic_mask_dice_loss, tensors, **options)
    with torch.autocast(DEVICE, torch.bfloat16):
        actual = outputs(ops.dynamic_mask_dice_loss, tensors, **options)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@not_interpreted
def test_gradcheck_of_the_reference(monkeypatch):
    monkeypatch.setattr(m, "use_triton", lambda x: False)
    tensors = double(inputs(2, 3, 2, 3))
    leaves = [t.requires_grad_() for t in tensors[:2]]
    for function, options in ((ops.dynamic_mask_logits, {}), (ops.dynamic_mask_dice_loss, masks(tensors))):
        assert torch.autograd.gradcheck(lambda f, k, f_=function, o=options: f_(f, k, *tensors[2:], **o), leaves)


BAD = {
    "features: expected shape": dict(features=torch.ones(2, 7, 4, 5)),
    "features: expected a floating": dict(features=torch.ones(2, 8, 4, 5, dtype=torch.int32)),
    "kernels: expected shape": dict(kernels=torch.ones(3, 168)),
    "kernels: expected a floating": dict(kernels=torch.ones(3, 169, dtype=torch.int64)),
    "points: expected shape": dict(points=torch.ones(3, 4)),
    "strides: expected shape": dict(strides=torch.ones(3, 1)),
    "strides: on meta": dict(strides=torch.ones(3, device="meta")),
    "image_index: expected shape": dict(image_index=torch.zeros(2, dtype=torch.int64)),
    "image_index: expected int64": dict(image_index=torch.zeros(3)),
    "feature_stride: expected at least 1": dict(feature_stride=0),
    "gt_masks: expected shape": dict(gt_masks=torch.zeros(2, 3, 4, 5, dtype=torch.bool)),
    "gt_masks: expected bool": dict(gt_masks=torch.zeros(2, 3, 8, 10)),
    "gt_index: expected shape": dict(gt_index=torch.zeros(4, dtype=torch.int64)),
    "gt_index: expected int64": dict(gt_index=torch.zeros(3, dtype=torch.int32)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_names_the_argument(message):
    tensors = [t.cpu() for t in inputs(2, 4, 5, 3)]
    arguments = dict(zip(("features", "kernels", "points", "strides", "image_index"), tensors, strict=True))
    arguments |= {name: t.cpu() for name, t in masks(tensors).items()} | BAD[message]
    with pytest.raises((ValueError, TypeError), match=message):
        ops.dynamic_mask_dice_loss(**arguments)


def test_mmdet():
    """Its predictions and its mask loss, outputs and gradients, of a batch of two images."""
    pytest.importorskip("mmdet")
    from mmdet.models.dense_heads.rtmdet_ins_head import RTMDetInsHead
    from mmdet.models.losses import DiceLoss
    from mmdet.models.task_modules.prior_generators import MlvlPointGenerator

    features, kernels, points, strides, image_index = inputs(2, 6, 9, 7)
    full = torch.rand(2, 4, 48, 72) > 0.5
    gt_index = torch.randint(4, (7,))
    head = SimpleNamespace(
        weight_nums=[80, 64, 8],
        bias_nums=[8, 8, 1],
        dyconv_channels=8,
        mask_loss_stride=4,
        prior_generator=MlvlPointGenerator(strides=[8, 16, 32], offset=0),
        loss_mask=DiceLoss(loss_weight=2.0, eps=5e-6),
    )
    head.parse_dynamic_params = partial(RTMDetInsHead.parse_dynamic_params, head)
    head._mask_predict_by_feat_single = partial(RTMDetInsHead._mask_predict_by_feat_single, head)
    priors = torch.cat([points, strides[:, None].expand(-1, 2)], 1)
    order = image_index.argsort(stable=True)  # its loss takes the images one by one
    f, k = (t.clone().requires_grad_() for t in (features, kernels))
    logits = torch.cat(
        [head._mask_predict_by_feat_single(f[b], k[image_index == b], priors[image_index == b]) for b in range(2)]
    )
    got = ops.dynamic_mask_logits(features, kernels[order], points[order], strides[order], image_index[order])
    torch.testing.assert_close(got, logits.detach(), rtol=1e-5, atol=1e-5)
    samples = [
        SimpleNamespace(pos_priors=priors[which], pos_inds=which.nonzero()[:, 0], pos_assigned_gt_inds=gt_index[which])
        for which in (image_index == 0, image_index == 1)
    ]
    theirs = RTMDetInsHead.loss_mask_by_feat(
        head, f, k.expand(2, 7, 169), samples, [SimpleNamespace(masks=gt) for gt in full]
    )
    theirs.backward()
    mine = [t.clone().requires_grad_() for t in (features, kernels)]
    loss = ops.dynamic_mask_dice_loss(*mine, points, strides, image_index, full[:, :, 2::4, 2::4], gt_index)
    loss = 2 * loss.sum() / 7
    dfeatures, dkernels = torch.autograd.grad(loss, mine)
    torch.testing.assert_close((loss, dfeatures, dkernels), (theirs, f.grad, k.grad), rtol=1e-4, atol=1e-7)


@needs_triton
def test_opcheck():
    tests = ("test_schema", "test_autograd_registration") + ("test_faketensor",) * (not INTERPRETED)
    tensors = inputs(2, 4, 5, 3)
    more = tuple(masks(tensors).values())
    tensors[0].requires_grad_()
    opcheck(dynamic_mask_triton.logits.library_op, (*tensors, 8), test_utils=tests)
    opcheck(dynamic_mask_triton.dice.library_op, (*tensors, *more, 8, 5e-6), test_utils=tests)
    opcheck(
        dynamic_mask_triton.logits_backward.library_op,
        (torch.ones(3, 4, 5, device=DEVICE), *tensors, 8),
        test_utils=tests[:1],
    )
    sums = torch.ones(3, 2, device=DEVICE)
    opcheck(dynamic_mask_triton.dice_backward.library_op, (sums[:, 0], sums, *tensors, *more, 8), test_utils=tests[:1])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of opcheck in torch 2.14
def test_opcheck_of_the_reference():
    tensors = inputs(2, 4, 5, 3)
    more = tuple(masks(tensors).values())
    sums = torch.ones(3, 2, device=DEVICE)
    opcheck(dynamic_mask_torch.logits_backward, (torch.ones(3, 4, 5, device=DEVICE), *tensors, 8))
    opcheck(dynamic_mask_torch.dice_backward, (sums[:, 0], sums, *tensors, *more, 8))
    for tensor in tensors[:2]:
        tensor.requires_grad_()
    opcheck(dynamic_mask_torch.logits, (*tensors, 8))
    opcheck(dynamic_mask_torch.dice, (*tensors, *more, 8, 5e-6))


@not_interpreted
def test_compiles_without_graph_break():
    tensors = inputs(2, 5, 6, 4)
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    for function, options in ((ops.dynamic_mask_logits, {}), (ops.dynamic_mask_dice_loss, masks(tensors))):
        compiled = torch.compile(function, fullgraph=True, backend=backend)
        expected = outputs(function, tensors, **options)
        assert_close(outputs(compiled, tensors, **options), double(expected), [1e-6] * 3)


@needs_lowering
@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11 takes all pointers of these kernels for written")
def test_traces_forward_and_backward(traced_for_cuda):  # noqa: F811
    tensors = [t.cpu() for t in inputs(2, 4, 5, 3)]
    options = {name: t.cpu() for name, t in masks(tensors).items()}

    def function(features, kernels):
        return ops.dynamic_mask_dice_loss(features, kernels, *tensors[2:], **options)

    assert traced_kernels(function, dict(features=tensors[0], kernels=tensors[1])) == [
        ("_dice_kernel", ["logits_ptr", "out_ptr"]),
        ("_dice_kernel", ["logits_ptr", "out_ptr"]),
        ("_dkernels_kernel", ["partial_ptr"]),
        ("_dkernels_kernel", ["partial_ptr"]),
        ("_dfeatures_kernel", ["partial_ptr"]),
    ]


# registers; those of gfx942, which has 512, apart
LIMITS = {
    "_logits_kernel": (255, 256),
    "_dice_kernel": (255, 256),
    "_dkernels_kernel": (192, 320),
    "_dfeatures_kernel": (192, 272),
}
LOWERED = {"640 px": (2, 80, 80, 16), "odd": (3, 17, 13, 5)}


@needs_lowering
@pytest.mark.parametrize(
    ("case", "dtype", "target"),
    thinned(list(product(LOWERED, (torch.float32, torch.float16, torch.bfloat16), TARGETS)), {4 + 1, 12 + 8 + 3}),
)
def test_lowering(case, dtype, target, monkeypatch):
    monkeypatch.setattr(_dispatch, "BACKEND", "triton")
    B, H, W, K = LOWERED[case]
    tensors = [t.cpu() for t in inputs(B, H, W, K, dtype)]
    options = {name: t.cpu() for name, t in masks(tensors).items()}
    launches = record_launches(monkeypatch, dynamic_mask_triton)
    outputs(ops.dynamic_mask_logits, tensors)
    outputs(ops.dynamic_mask_dice_loss, tensors, **options)
    assert len(set(launches)) == 6  # dice forward and backward, dkernels of the first layer and the others
    for launch in set(launches):
        resources = launch.lower(target)
        assert resources.spills == 0, launch
        if target != "gfx942":  # the interpreter's maximum keeps NaN whatever it is asked for
            assert "max.NaN.f32" in resources.assembly, launch
        assert resources.registers <= LIMITS[launch.kernel.__name__][target == "gfx942"], launch
        if case == "640 px":  # a canvas has 16 n pixels of stride 8, which lets loads and arithmetic share a layout
            assert resources.shared_bytes <= 16, launch  # the sums over a program need some
        assert "ld.volatile" not in resources.assembly, launch  # would not be served from L1


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_shapes_of_the_models(dtype):
    check(inputs(2, 80, 80, 200, dtype), {})
