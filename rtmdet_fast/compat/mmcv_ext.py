"""`mmcv._ext` by this project's kernels: mmcv-lite then does what RTMDet needs of the compiled mmcv.

    import rtmdet_fast.compat.mmcv_ext  # before mmdet, mmrotate and mmcv.ops

puts this module into `sys.modules` as `mmcv._ext`. Processes that are spawned from then on, as for mmrotate's
evaluation, have it as well, whatever their main module is. Scripts that cannot be edited run under it:

    python -m rtmdet_fast.compat.mmcv_ext tools/train.py my_config.py

It answers, on CPU and CUDA tensors, `nms`, `softnms`, `nms_rotated`, `box_iou_rotated`,
`diff_iou_rotated_sort_vertices_forward`, `ms_deform_attn_forward` and `ms_deform_attn_backward`: what RTMDet,
RTMDet-Ins, rotated RTMDet, Deformable DETR and DINO call in training and testing. Every other op is there, and raises
when called. Where a compiled mmcv is installed nothing happens, unless asked for by
`mmcv_ext.install(replace=True)`.

The answers are mmcv's to the letter (see `rtmdet_fast.ops.mmcv`), with these differences:

| op | compiled mmcv | here |
|---|---|---|
| `nms_rotated` on a CPU | suppresses at the threshold too | above it, as mmcv on CUDA |
| `nms_rotated` with labels | strips them, on CPU and CUDA | so too (`rtmdet_fast.ops.nms_rotated` heeds them) |
| `nms`, `nms_rotated` of other floating dtypes | some are refused | taken |
| vertices of coinciding boxes | out of order: IoU of a box with itself below 0.5 | in order |

What mmcv's Python part of `diff_iou_rotated_2d` misjudges in float32 remains.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from functools import wraps
from multiprocessing import spawn
from typing import Any, NoReturn

import torch
from torch import Tensor

from rtmdet_fast.kernels import greedy_nms
from rtmdet_fast.kernels.rotated_iou import box_iou_rotated as _box_iou_rotated
from rtmdet_fast.ops.mmcv import multi_scale_deformable_attn_pytorch as _attention


def install(replace: bool = False) -> bool:
    """Puts this module in the place of `mmcv._ext`, also in processes spawned from here; returns whether it is there.

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
    get_preparation_data: Callable[[str], dict[str, Any]] = spawn.get_preparation_data

    @wraps(get_preparation_data)
    def with_this_module(name: str) -> dict[str, Any]:
        return {"mmcv._ext": _Installer(replace), **get_preparation_data(name)}

    spawn.get_preparation_data = with_this_module  # type: ignore[assignment]
    return True


class _Installer:
    """Installs this module where it is unpickled: in a spawned process, before anything of the program is."""

    def __init__(self, replace: bool):
        self.replace = replace

    def __reduce__(self) -> Any:
        path = [entry for entry in sys.path if isinstance(entry, str)]  # which the process learns only later
        return exec, (f"import sys\nsys.path[:] = {path!r}\nfrom {__name__} import install\ninstall({self.replace})",)


def _compiled() -> bool:
    """Whether the installed mmcv has a compiled module; imports nothing."""
    mmcv = importlib.util.find_spec("mmcv")
    return bool(mmcv and importlib.machinery.PathFinder.find_spec("mmcv._ext", mmcv.submodule_search_locations))


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int = 0) -> Tensor:
    """Boxes [N, 4] xyxy, scores [N] -> indices [K] of the kept, by falling score; `offset` 1: inclusive pixels."""
    if boxes.numel() == 0:
        return boxes.new_zeros(0, dtype=torch.int64)
    return greedy_nms.greedy_nms(boxes, scores, iou_threshold, offset=offset)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Boxes [N, 4] xyxy, scores [N] -> indices [K] of the kept; into dets [N, 5] go boxes and lowered scores, first."""
    settings = iou_threshold, sigma, min_score, method, offset
    kept, index = greedy_nms.soft_nms(boxes.detach().numpy(), scores.detach().numpy(), *settings)
    dets[: len(index)] = torch.from_numpy(kept)
    return torch.from_numpy(index)


def nms_rotated(
    dets: Tensor,
    scores: Tensor,
    order: Tensor,
    dets_sorted: Tensor,
    labels: Tensor,
    iou_threshold: float,
    multi_label: bool,
) -> Tensor:
    """Dets [N, 5, or 6 if `multi_label`], scores [N] -> indices [K] of the kept, by falling score.

    The column of labels is left out of account, as in mmcv; the other arguments are not needed.
    """
    if dets.numel() == 0:
        return dets.new_zeros(0, dtype=torch.int64)
    return greedy_nms.greedy_nms(dets[:, :5], scores, iou_threshold)


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


def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    im2col_step: int,
) -> Tensor:
    """Value [B, S, H, D], shapes [L, 2], locations [B, Q, H, L, P, 2], weights [B, Q, H, L, P] -> [B, Q, H D]."""
    with torch.no_grad():
        return _attention(value, spatial_shapes, sampling_loc, attn_weight)


def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Writes the gradients of value, locations and weights into the three last tensors."""
    leaves = [x.detach().requires_grad_() for x in (value, sampling_loc, attn_weight)]
    with torch.enable_grad():
        output = _attention(leaves[0], spatial_shapes, *leaves[1:])
    gradients = torch.autograd.grad(output, leaves, grad_output)
    for into, gradient in zip((grad_value, grad_sampling_loc, grad_attn_weight), gradients, strict=True):
        into.copy_(gradient)


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
            "nms, softnms, nms_rotated, box_iou_rotated, diff_iou_rotated_sort_vertices_forward and ms_deform_attn"
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
    # In this namespace: spawned processes, whose main module is this one, look there for what the script defines.
    exec(compile(Path(sys.argv[0]).read_bytes(), sys.argv[0], "exec"))
elif __name__ != "__mp_main__":  # a spawned process has it by now
    install()
