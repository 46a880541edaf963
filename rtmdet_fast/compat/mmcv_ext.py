"""`mmcv._ext` by this project's kernels: mmcv-lite then does what RTMDet needs of the compiled mmcv.

    import rtmdet_fast.compat.mmcv_ext  # before mmdet, mmrotate and mmcv.ops

puts this module into `sys.modules` as `mmcv._ext`. It belongs at the top of the script that is run, and not under
`if __name__ == "__main__"`: processes that are spawned, as for mmrotate's evaluation, import it from there. Scripts
that cannot be edited run under it:

    python -m rtmdet_fast.compat.mmcv_ext tools/train.py my_config.py

It answers, on CPU and CUDA tensors, `nms`, `nms_rotated`, `box_iou_rotated` and
`diff_iou_rotated_sort_vertices_forward`: what RTMDet, RTMDet-Ins and rotated RTMDet call in training and testing. Every
other op is there, and raises when called. Where a compiled mmcv is installed nothing happens, unless asked for by
`mmcv_ext.install(replace=True)`.

As in mmcv, boxes without area and with non-finite numbers take part: nothing suppresses them. Unlike in mmcv, rotated
NMS keeps to "suppressed above the threshold" and to the labels on the CPU too, and the vertices of coinciding boxes
come in order (mmcv's compiled op gives `diff_iou_rotated_2d` below 0.5 for some boxes with themselves; what its Python
part misjudges in float32 remains).
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from rtmdet_fast.kernels.nms import batched_nms_padded, usable
from rtmdet_fast.kernels.rotated_iou import box_iou_rotated as _box_iou_rotated


def install(replace: bool = False) -> bool:
    """Puts this module in the place of `mmcv._ext`; returns whether it stands there.

    A compiled `mmcv._ext` that is installed keeps its place, unless `replace`. Raises RuntimeError if `mmcv.ops`
    has been imported with it: its functions are bound by then.
    """
    this = sys.modules[__name__]
    if sys.modules.get("mmcv._ext") is this:
        return True
    if not replace and ("mmcv._ext" in sys.modules or _compiled()):
        return False
    if "mmcv.ops" in sys.modules:
        raise RuntimeError("mmcv.ops is imported already: import rtmdet_fast.compat.mmcv_ext before mmdet and mmcv.ops")
    sys.modules["mmcv._ext"] = this
    return True


def _compiled() -> bool:
    """Whether the installed mmcv has a compiled module; imports nothing."""
    mmcv = importlib.util.find_spec("mmcv")
    return bool(mmcv and importlib.machinery.PathFinder.find_spec("mmcv._ext", mmcv.submodule_search_locations))


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int = 0) -> Tensor:
    """Boxes [N, 4] xyxy, scores [N] -> indices [K] of the kept, by falling score; `offset` 1: inclusive pixels."""
    if offset:
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] + offset], 1)
    return _kept(boxes, scores, None, iou_threshold)


def nms_rotated(
    dets: Tensor,
    scores: Tensor,
    order: Tensor,
    dets_sorted: Tensor,
    labels: Tensor,
    iou_threshold: float,
    multi_label: bool,
) -> Tensor:
    """Dets [N, 5], scores [N] -> indices [K] of the kept, by falling score; the rest of dets is not needed.

    If `multi_label`, only boxes of equal `labels` [N] suppress each other.
    """
    return _kept(dets[:, :5], scores, labels.long() if multi_label else None, iou_threshold)


def _kept(boxes: Tensor, scores: Tensor, labels: Tensor | None, iou_threshold: float) -> Tensor:
    if len(boxes) == 0:
        return scores.new_zeros(0, dtype=torch.int64)
    labels = torch.zeros_like(scores, dtype=torch.int64) if labels is None else labels - labels.amin()
    keep, count = batched_nms_padded(boxes[None], scores[None], labels[None], float(iou_threshold), len(boxes))
    kept = ~usable(boxes, scores, labels)  # what the kernels leave out, mmcv keeps
    kept[keep[0, : int(count)]] = True
    order = scores.sort(descending=True, stable=True).indices
    return order[kept[order]]


def box_iou_rotated(boxes1: Tensor, boxes2: Tensor, ious: Tensor, mode_flag: int = 0, aligned: bool = False) -> None:
    """IoU of [N, 5 or more] with [M, 5 or more] into `ious` [N * M], or [N] if aligned.

    `mode_flag` 1 divides by the area of box 1. Columns from the sixth on are not read, as in mmcv.
    """
    mode = "iof" if mode_flag else "iou"
    with torch.no_grad():
        ious.copy_(_box_iou_rotated(boxes1[:, :5], boxes2[:, :5], mode, bool(aligned)).view(ious.shape))


def diff_iou_rotated_sort_vertices_forward(vertices: Tensor, mask: Tensor, num_valid: Tensor) -> Tensor:
    """The corners of two boxes' intersection, in order, for `mmcv.ops.diff_iou_rotated_2d`.

    vertices [B, N, 24, 2] relative to the mean of the valid ones, of which mask [B, N, 24] says which are (num_valid
    [B, N] how many): 8 corners, then 16 crossings of edges. Returns indices [B, N, 9] int32: at most 8 vertices by
    rising angle, the first again, and from there on a crossing that is not valid (all 9 if fewer than 3 are valid).
    """
    angle = torch.atan2(vertices[..., 1], vertices[..., 0]).masked_fill(~mask, torch.inf)
    order = angle.argsort(dim=-1, stable=True)
    rank = torch.arange(mask.shape[-1], device=mask.device)
    count = num_valid[..., None].long()
    # Coinciding boxes have more vertices than the 8 of an octagon, some of them twice: the ones farthest from those
    # before them stay, in the order they are in.
    point = vertices.gather(2, order[..., None].expand_as(vertices))
    before = point.gather(2, ((rank - 1) % count.clamp(min=1))[..., None].expand_as(point))
    gap = (point - before).square().sum(-1).masked_fill(rank >= count, -1)
    first = gap.topk(8, dim=-1).indices.sort(-1).values
    index, count = order.gather(-1, first), count.clamp(max=8)
    pad = 8 + mask[..., 8:].long().argmin(-1, keepdim=True)
    slot = torch.arange(9, device=mask.device)
    index = torch.where(slot < count, torch.cat([index, pad], -1), pad)
    index = torch.where(slot == count, index[..., :1], index)
    return torch.where(num_valid[..., None] < 3, pad, index).int()


def get_compiler_version() -> str:
    return "none: mmcv._ext is rtmdet_fast's"


def get_compiling_cuda_version() -> str:
    return "none: mmcv._ext is rtmdet_fast's"


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def missing(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"mmcv's op {name} needs the compiled mmcv: rtmdet_fast stands in for mmcv._ext here and has only "
            "nms, nms_rotated, box_iou_rotated and diff_iou_rotated_sort_vertices_forward"
        )

    return missing


if __name__ == "__main__":
    from importlib import import_module
    from pathlib import Path

    del sys.argv[0]
    if not sys.argv:
        sys.exit("usage: python -m rtmdet_fast.compat.mmcv_ext SCRIPT [ARGUMENT ...]")
    import_module("rtmdet_fast.compat.mmcv_ext")  # under its own name, not as __main__
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    # In this namespace: processes that are spawned import this module first, since it is the main one.
    exec(compile(Path(sys.argv[0]).read_bytes(), sys.argv[0], "exec"))
elif __name__ == "rtmdet_fast.compat.mmcv_ext":
    install()
else:  # "__mp_main__", in a spawned process
    import rtmdet_fast.compat.mmcv_ext  # noqa: F401
