"""Wrong input to each op of the stand-in: refused, never answered; and what is empty.

What mmcv's Python part refuses before it calls an op is left to it: here the ops are called as that part calls them.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import rtmdet_fast.compat.mmcv_ext as ext

N, C, H, W, K, BINS = 2, 4, 5, 6, 3, 2


def rand(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(len(shape)))


def regions(columns: int) -> Tensor:
    return torch.tensor([[0, 1.0, 1, 4, 3, 0.3], [1, 0, 0, 3, 4, 0.1], [0, 2, 1, 5, 4, 0]])[:, :columns]


def boxes(count: int) -> Tensor:
    corner = rand(count, 2) * 5
    return torch.cat([corner, corner + 1 + rand(count, 2).flip(0)], 1)


def quads(count: int) -> Tensor:
    x1, y1, x2, y2 = boxes(count).unbind(1)
    return torch.stack([x1, y1, x2, y1, x2, y2, x1, y2], 1)


def pooling(name: str, columns: int, settings: tuple, argmax: tuple[torch.dtype, ...] = ()) -> dict[str, dict]:
    """Forward and backward of an op that pools features inside regions."""
    pooled = torch.zeros(K, C, BINS, BINS)
    inner = {f"argmax{i}": torch.zeros_like(pooled, dtype=dtype) for i, dtype in enumerate(argmax)}
    return {
        f"{name}_forward": dict(input=rand(N, C, H, W), rois=regions(columns), output=pooled, **inner)
        | dict(settings=settings),
        f"{name}_backward": dict(grad=rand(K, C, BINS, BINS), rois=regions(columns), **inner)
        | dict(into=torch.zeros(N, C, H, W), settings=settings),
    }


def convolutions() -> dict[str, dict]:
    image, weight, offset, none = rand(N, C, H, W), rand(C, C, 3, 3), rand(N, 18, H, W), torch.zeros(0)
    mask, grad, bias = rand(N, 9, H, W), rand(N, C, H, W), rand(C)
    plain, modulated = (3, 3, 1, 1, 1, 1, 1, 1, 1, 1), (3, 3, 1, 1, 1, 1, 1, 1, 1, 1, True)
    zeros = {f"into{i}": torch.zeros_like(x) for i, x in enumerate((image, weight, bias, offset, mask))}
    return {
        "deform_conv_forward": dict(input=image, weight=weight, offset=offset, output=torch.zeros_like(grad))
        | dict(settings=(none, none, *plain, 2)),
        "deform_conv_backward_input": dict(input=image, offset=offset, grad=grad, into0=zeros["into0"])
        | dict(into3=zeros["into3"], weight=weight, settings=(none, *plain, 2)),
        "deform_conv_backward_parameters": dict(input=image, offset=offset, grad=grad, into1=zeros["into1"])
        | dict(settings=(none, none, *plain, 1.0, 2)),
        "modulated_deform_conv_forward": dict(input=image, weight=weight, bias=bias, unused=None, offset=offset)
        | dict(mask=mask, output=torch.zeros_like(grad), settings=(none, *modulated)),
        "modulated_deform_conv_backward": dict(input=image, weight=weight, bias=bias, unused=None, offset=offset)
        | dict(mask=mask, unused2=None, **zeros, grad=grad, settings=modulated),
    }


def calls() -> dict[str, dict[str, Any]]:
    """A right call of each op: its arguments in their order; `settings` are several at the end."""
    logits, target, weight = rand(6, 3), torch.tensor([0, 1, 2, 0, 1, 2]), rand(3)
    one, two, rotated = boxes(4), boxes(5), torch.cat([rand(4, 4) + 1, rand(4, 1)], 1)
    attention = dict(value=rand(2, 16, 2, 8), shapes=torch.tensor([[3, 4], [2, 2]]), starts=torch.tensor([0, 12]))
    attention |= dict(locations=rand(2, 5, 2, 2, 3, 2), weights=rand(2, 5, 2, 2, 3))
    features, masks, fine = rand(1, 4, 3, 4), rand(1, 18, 6, 8), rand(1, 4, 6, 8)
    row, column = torch.tensor([0, 3]), torch.tensor([1, 2])
    indices = (torch.arange(36).view(4, 3, 3, 1) + 1).int()
    filters, turned = rand(2, 3, 4, 3, 3), rand(2, 12, 3, 3)
    psa, size = (0, 2, 4, 5, 3, 5, 1, 2), (2, 20, 4, 5)
    refined, border = rand(N, H, W, 5) * 3, boxes(N * 3).view(N, 3, 4)
    points, sets = rand(7, 2) * 5, rand(4, 18) * 4
    cloud, near1, near2 = rand(3, 4, 2), torch.zeros(3, 4).int(), torch.zeros(3, 5).int()
    vertices, mask = rand(1, 2, 24, 2), torch.arange(24).lt(5).expand(1, 2, 24).clone()
    return {
        "nms": dict(boxes=one, scores=rand(4), settings=(0.5, 0)),
        "softnms": dict(boxes=one, scores=rand(4), dets=torch.zeros(4, 5), settings=(0.3, 0.5, 0.0, 1, 0)),
        "nms_match": dict(dets=torch.cat([one, rand(4, 1)], 1), settings=(0.5,)),
        "nms_rotated": dict(dets=rotated, scores=rand(4), settings=(None, None, None, 0.3, False)),
        "nms_quadri": dict(dets=quads(4), scores=rand(4), settings=(None, None, 0.3, False)),
        "bbox_overlaps": dict(one=one, two=two, ious=torch.zeros(4, 5), settings=(0, False, 0)),
        "box_iou_rotated": dict(one=rotated, two=rotated[:3], ious=torch.zeros(12), settings=(0, False)),
        "box_iou_quadri": dict(one=quads(4), two=quads(5), ious=torch.zeros(20), settings=(0, False)),
        "bbox_overlaps, aligned": dict(one=one, two=two[:4], ious=torch.zeros(4), settings=(0, True, 0)),
        "box_iou_rotated, aligned": dict(one=rotated, two=rotated, ious=torch.zeros(4), settings=(0, True)),
        "box_iou_quadri, aligned": dict(one=quads(4), two=quads(4), ious=torch.zeros(4), settings=(0, True)),
        "diff_iou_rotated_sort_vertices_forward": dict(vertices=vertices, mask=mask, count=mask.sum(-1).int()),
        "ms_deform_attn_forward": attention | dict(settings=(64,)),
        "ms_deform_attn_backward": attention
        | dict(grad=rand(2, 5, 16), **{f"into{i}": torch.zeros_like(attention[x]) for i, x in enumerate(
            ("value", "locations", "weights"))}, settings=(64,)),
        **pooling("roi_align", 5, (BINS, BINS, 1.0, 2, 0, True), (torch.float32, torch.float32)),
        **pooling("roi_align_rotated", 6, (BINS, BINS, 1.0, 2, True, False)),
        **pooling("riroi_align_rotated", 6, (BINS, BINS, 1.0, 2, 4, False)),
        **pooling("prroi_pool", 5, (BINS, BINS, 1.0)),
        **pooling("roi_pool", 5, (BINS, BINS, 1.0), (torch.int32,)),
        "prroi_pool_coor_backward": dict(output=rand(K, C, BINS, BINS), grad=rand(K, C, BINS, BINS))
        | dict(input=rand(N, C, H, W), rois=regions(5), into=torch.zeros(K, 5), settings=(BINS, BINS, 1.0)),
        "rotated_feature_align_forward": dict(input=rand(N, C, H, W), boxes=refined)
        | dict(output=torch.zeros(N, C, H, W), settings=(1.0, 5)),
        "rotated_feature_align_backward": dict(grad=rand(N, C, H, W), boxes=refined)
        | dict(into=torch.zeros(N, C, H, W), settings=(1.0, 5)),
        "border_align_forward": dict(input=rand(N, C, H, W), boxes=border, output=torch.zeros(N, 1, 3, 4))
        | dict(argmax=torch.zeros(N, 1, 3, 4).int(), settings=(3,)),
        "border_align_backward": dict(grad=rand(N, 1, 3, 4), boxes=border, argmax=torch.zeros(N, 1, 3, 4).int())
        | dict(into=torch.zeros(N, C, H, W), settings=(3,)),
        **convolutions(),
        "sigmoid_focal_loss_forward": dict(input=logits, target=target, weight=weight)
        | dict(output=torch.zeros(6, 3), settings=(2.0, 0.25)),
        "sigmoid_focal_loss_backward": dict(input=logits, target=target, weight=weight)
        | dict(into=torch.zeros(6, 3), settings=(2.0, 0.25)),
        "softmax_focal_loss_forward": dict(input=logits.softmax(1), target=target, weight=weight)
        | dict(output=torch.zeros(6), settings=(2.0, 0.25)),
        "softmax_focal_loss_backward": dict(input=logits.softmax(1), target=target, weight=weight)
        | dict(buffer=torch.zeros(6), into=torch.zeros(6, 3), settings=(2.0, 0.25)),
        "points_in_polygons_forward": dict(points=points, polygons=quads(4), output=torch.zeros(7, 4)),
        "min_area_polygons": dict(sets=sets, output=torch.zeros(4, 8)),
        "convex_iou": dict(sets=sets, polygons=quads(5), ious=torch.zeros(4, 5)),
        "convex_giou": dict(sets=sets, polygons=quads(4), output=torch.zeros(4, 19)),
        "chamfer_distance_forward": dict(one=cloud, two=rand(3, 5, 2), output1=torch.zeros(3, 4))
        | dict(output2=torch.zeros(3, 5), output3=near1.clone(), output4=near2.clone()),
        "chamfer_distance_backward": dict(one=cloud, two=rand(3, 5, 2), near1=near1, near2=near2, grad1=rand(3, 4))
        | dict(grad2=rand(3, 5), into1=torch.zeros(3, 4, 2), into2=torch.zeros(3, 5, 2)),
        "carafe_naive_forward": dict(input=features, masks=masks, output=torch.zeros_like(fine), settings=(3, 2, 2)),
        "carafe_naive_backward": dict(grad=fine, input=features, masks=masks, into0=torch.zeros_like(features))
        | dict(into1=torch.zeros_like(masks), settings=(3, 2, 2)),
        "carafe_forward": dict(input=features, masks=masks, kept=torch.zeros_like(features), unused=None, unused2=None)
        | dict(output=torch.zeros_like(fine), settings=(3, 2, 2)),
        "carafe_backward": dict(grad=fine, input=features, masks=masks, **{f"unused{i}": None for i in range(4)})
        | dict(into0=torch.zeros_like(features), into1=torch.zeros_like(masks), settings=(3, 2, 2)),
        "masked_im2col_forward": dict(input=rand(1, 3, 5, 6), rows=row, columns=column, output=torch.zeros(27, 2))
        | dict(settings=(3, 3, 1, 1)),
        "masked_col2im_forward": dict(input=rand(3, 2), rows=row, columns=column, output=torch.zeros(1, 3, 5, 6))
        | dict(settings=(5, 6, 3)),
        "active_rotated_filter_forward": dict(input=filters, indices=indices, output=torch.zeros_like(turned)),
        "active_rotated_filter_backward": dict(grad=turned, indices=indices, into=torch.zeros_like(filters)),
        "psamask_forward": dict(input=rand(2, 15, 4, 5), output=torch.zeros(size), settings=psa),
        "psamask_backward": dict(grad=rand(*size), into=torch.zeros(2, 15, 4, 5), settings=psa),
    }  # fmt: skip


CALLS = calls()
MAPS = [("input", dim) for dim in (0, 2, 3)]  # regions may be in some images only, and anywhere
FREE = {
    **{op: MAPS for op in CALLS if op.endswith(("align_forward", "align_rotated_forward", "pool_forward"))},
    "rotated_feature_align_forward": [],
    "border_align_forward": MAPS[1:],
    "prroi_pool_coor_backward": MAPS,
    "masked_im2col_forward": MAPS[1:],
    "ms_deform_attn_forward": [("value", 3)],  # as many channels are returned
    "box_iou_rotated": [("one", 1), ("two", 1)],  # mmcv does not read the columns from the sixth on
    "modulated_deform_conv_forward": [("offset", 2), ("offset", 3), ("mask", 2), ("mask", 3)],  # of larger ones, a part
}
FREE["box_iou_rotated, aligned"] = FREE["box_iou_rotated"]
FREE["modulated_deform_conv_backward"] = FREE["modulated_deform_conv_forward"]
WRITTEN = ("output", "into", "ious", "argmax", "dets", "kept", "buffer")


def call(op: str, **changed: Any) -> Any:
    """The op on copies of its right arguments, of which some are changed; what it returns, else what it wrote."""
    arguments = {name: x.clone() if isinstance(x, Tensor) else x for name, x in (CALLS[op] | changed).items()}
    settings = arguments.pop("settings", ())
    returned = getattr(ext, op.partition(",")[0])(*arguments.values(), *settings)
    return [x for name, x in arguments.items() if name.startswith(WRITTEN)] if returned is None else returned


def inputs(op: str) -> dict[str, Tensor]:
    return {name: x for name, x in CALLS[op].items() if isinstance(x, Tensor) and not name.startswith(WRITTEN)}


def test_every_op_is_called_here():
    assert {op.partition(",")[0] for op in CALLS} == set(ext.__all__) - {
        "install",
        "get_compiler_version",
        "get_compiling_cuda_version",
    }
    for op in CALLS:
        call(op)


def floating(op: str) -> list[str]:
    return [name for name, x in inputs(op).items() if x.is_floating_point()]


def assert_refused(op: str, **changed: Tensor) -> None:
    try:
        found = call(op, **changed)
    except (RuntimeError, ValueError, IndexError, AssertionError, NotImplementedError, TypeError):
        return
    told = {name: (tuple(x.shape), x.dtype, x.device) for name, x in changed.items()}
    pytest.fail(f"{op} of {told} answers {found}")


def only_sorted(op: str, name: str) -> bool:
    return op.startswith("nms") and name == "scores"


@pytest.mark.parametrize("op", CALLS)
def test_whole_numbers_are_refused(op):
    for name in floating(op):
        if not only_sorted(op, name):
            assert_refused(op, **{name: CALLS[op][name].long()})


@pytest.mark.parametrize("op", CALLS)
def test_tensors_of_two_dtypes_are_refused(op):
    for name in floating(op)[1:]:
        if not only_sorted(op, name):
            assert_refused(op, **{name: CALLS[op][name].double()})


@pytest.mark.parametrize("op", CALLS)
def test_tensors_on_two_devices_are_refused(op):
    for name in floating(op)[1:]:
        assert_refused(op, **{name: CALLS[op][name].to("meta")})


@pytest.mark.parametrize("op", CALLS)
def test_shapes_that_do_not_fit_are_refused(op):
    for name, x in inputs(op).items():
        for dim, size in enumerate(x.shape):
            if (name, dim) not in FREE.get(op, ()):
                for other in {1, size - 1, size + 1, 2 * size} - {size, 0}:
                    assert_refused(op, **{name: x.index_select(dim, torch.arange(other) % size)})
        assert_refused(op, **{name: x.flatten() if x.ndim > 1 else x[:, None]})


NOTHING: dict[str, dict[str, int]] = {  # the arguments that have a size of 0 then, and which
    "nms": {"boxes": 0, "scores": 0},
    "softnms": {"boxes": 0, "scores": 0, "dets": 0},
    "nms_match": {"dets": 0},
    "nms_rotated": {"dets": 0, "scores": 0},
    "nms_quadri": {"dets": 0, "scores": 0},
    "bbox_overlaps": {"one": 0, "ious": 0},
    "bbox_overlaps, aligned": {"one": 0, "two": 0, "ious": 0},
    "box_iou_rotated": {"one": 0, "ious": 0},
    "box_iou_rotated, aligned": {"one": 0, "two": 0, "ious": 0},
    "box_iou_quadri": {"one": 0, "ious": 0},
    "box_iou_quadri, aligned": {"one": 0, "two": 0, "ious": 0},
    "chamfer_distance_forward": {"one": 0, "two": 0, **{f"output{i}": 0 for i in (1, 2, 3, 4)}},
    "chamfer_distance_backward": dict.fromkeys(CALLS["chamfer_distance_backward"], 0),
    "diff_iou_rotated_sort_vertices_forward": {"vertices": 1, "mask": 1, "count": 1},
    "ms_deform_attn_forward": {"locations": 1, "weights": 1},
    "ms_deform_attn_backward": {"locations": 1, "weights": 1, "grad": 1, "into1": 1, "into2": 1},
    "border_align_forward": {"boxes": 1, "output": 2, "argmax": 2},
    "border_align_backward": {"grad": 2, "boxes": 1, "argmax": 2},
    "prroi_pool_coor_backward": {"output": 0, "grad": 0, "rois": 0, "into": 0},
    "rotated_feature_align_forward": {"input": 0, "boxes": 0, "output": 0},
    "rotated_feature_align_backward": {"grad": 0, "boxes": 0, "into": 0},
    "deform_conv_forward": {"input": 0, "offset": 0, "output": 0},
    "deform_conv_backward_input": {"input": 0, "offset": 0, "grad": 0, "into0": 0, "into3": 0},
    "deform_conv_backward_parameters": {"input": 0, "offset": 0, "grad": 0},
    "modulated_deform_conv_forward": {"input": 0, "offset": 0, "mask": 0, "output": 0},
    "modulated_deform_conv_backward": {"input": 0, "offset": 0, "mask": 0, "grad": 0}
    | {"into0": 0, "into3": 0, "into4": 0},
    "sigmoid_focal_loss_forward": {"input": 0, "target": 0, "output": 0},
    "sigmoid_focal_loss_backward": {"input": 0, "target": 0, "into": 0},
    "softmax_focal_loss_forward": {"input": 0, "target": 0, "output": 0},
    "softmax_focal_loss_backward": {"input": 0, "target": 0, "buffer": 0, "into": 0},
    "points_in_polygons_forward": {"points": 0, "output": 0},
    "min_area_polygons": {"sets": 0, "output": 0},
    "convex_iou": {"sets": 0, "ious": 0},
    "convex_giou": {"sets": 0, "polygons": 0, "output": 0},
    "carafe_naive_forward": {"input": 0, "masks": 0, "output": 0},
    "carafe_naive_backward": {"grad": 0, "input": 0, "masks": 0, "into0": 0, "into1": 0},
    "carafe_forward": {"input": 0, "masks": 0, "kept": 0, "output": 0},
    "carafe_backward": {"grad": 0, "input": 0, "masks": 0, "into0": 0, "into1": 0},
    "masked_im2col_forward": {"rows": 0, "columns": 0, "output": 1},
    "masked_col2im_forward": {"input": 1, "rows": 0, "columns": 0},
    "active_rotated_filter_forward": {"input": 1, "output": 1},
    "active_rotated_filter_backward": {"grad": 1, "into": 1},
}


@pytest.mark.parametrize("op", CALLS)
def test_nothing_is_answered_with_nothing(op):
    """No regions, boxes, queries, pixels or images: what is written or returned has no elements, or is 0."""
    if op.startswith("psamask"):
        pytest.skip("takes whole images, whose number is an argument")
    regions = {name: 0 for name in CALLS[op] if name in ("rois", "grad", "output") or name.startswith("argmax")}
    sizes = NOTHING.get(op, regions)
    none = {name: CALLS[op][name].narrow(dim, 0, 0) for name, dim in sizes.items()}
    for x in call(op, **none):
        assert not torch.as_tensor(x).any()
