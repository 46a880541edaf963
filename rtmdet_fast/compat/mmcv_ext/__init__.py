"""`mmcv._ext` without compiling: mmcv-lite then does what mmdet and mmrotate need of the compiled mmcv.

    import rtmdet_fast.compat.mmcv_ext  # before mmdet, mmrotate and mmcv.ops

puts this module into `sys.modules` as `mmcv._ext`. Processes that are spawned from then on, as for mmrotate's
evaluation, have it as well, whatever their main module is. Scripts that cannot be edited run under it:

    python -m rtmdet_fast.compat.mmcv_ext tools/train.py my_config.py

The ops stand on this project's kernels (NMS, overlaps, attention), on torchvision where that loads (RoIAlign,
deformable convolution) or on PyTorch alone, on CPU and CUDA tensors, forward and backward. Those for points in space,
video and text are there as names, and raise when called. Where a compiled mmcv is installed nothing happens, unless
asked for by `mmcv_ext.install(replace=True)`.

The answers are mmcv's to the letter (see `rtmdet_fast.ops.mmcv`), with these differences:

| op | compiled mmcv | here |
|---|---|---|
| `nms_rotated`, `nms_quadri` on a CPU | suppress at the threshold too | above it, as mmcv on CUDA |
| the same with labels | strip them, on CPU and CUDA | so too (`rtmdet_fast.ops.nms_rotated` heeds them) |
| `nms`, `nms_rotated` of other floating dtypes | some are refused | taken |
| `nms_rotated` of quadrilaterals [N, 8] (Gliding Vertex) | the first five numbers are taken for rotated boxes | \
RuntimeError |
| vertices of coinciding boxes | out of order: IoU of a box with itself below 0.5 | in order |
| `box_iou_quadri`, `nms_quadri` | right for rectangles only: corners are looked for in a rectangle | right for \
convex quadrilaterals |
| `roi_pool` of a region without area | its gradient goes to the first pixel | nowhere |
| `chamfer_distance` of a point set and one without points | 0, and a gradient of other memory | RuntimeError |
| an image that is not there, as a region's first number | memory of something else | RuntimeError on a CPU |
| shapes, dtypes or devices that do not fit together | some are read past their end | RuntimeError |
| half precision | computed in it | computed in float32 |
| what mmcv has for CUDA only | refused on a CPU | taken |

What newer versions lack and OpenMMLab still asks for is there again: `pkg_resources` (mmengine; setuptools has had none
since 82), `numpy.float` (mmdet's evaluation of videos, and e2cnn, which mmrotate's ReDet needs; NumPy 1.24),
`collections.Sequence` (mmrotate; Python 3.10).

What mmcv's Python part of `diff_iou_rotated_2d` misjudges in float32 remains.
"""

from __future__ import annotations

import collections
import collections.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from functools import wraps
from multiprocessing import spawn
from typing import Any, NoReturn

import numpy as np

from rtmdet_fast.compat.mmcv_ext import _pkg_resources
from rtmdet_fast.compat.mmcv_ext._boxes import (
    bbox_overlaps,
    box_iou_rotated,
    diff_iou_rotated_sort_vertices_forward,
    ms_deform_attn_backward,
    ms_deform_attn_forward,
    nms,
    nms_match,
    nms_rotated,
    softnms,
)
from rtmdet_fast.compat.mmcv_ext._deform_conv import (
    deform_conv_backward_input,
    deform_conv_backward_parameters,
    deform_conv_forward,
    modulated_deform_conv_backward,
    modulated_deform_conv_forward,
)
from rtmdet_fast.compat.mmcv_ext._filters import (
    active_rotated_filter_backward,
    active_rotated_filter_forward,
    carafe_backward,
    carafe_forward,
    carafe_naive_backward,
    carafe_naive_forward,
    masked_col2im_forward,
    masked_im2col_forward,
    psamask_backward,
    psamask_forward,
)
from rtmdet_fast.compat.mmcv_ext._focal_loss import (
    sigmoid_focal_loss_backward,
    sigmoid_focal_loss_forward,
    softmax_focal_loss_backward,
    softmax_focal_loss_forward,
)
from rtmdet_fast.compat.mmcv_ext._polygons import (
    box_iou_quadri,
    chamfer_distance_backward,
    chamfer_distance_forward,
    convex_giou,
    convex_iou,
    min_area_polygons,
    nms_quadri,
    points_in_polygons_forward,
)
from rtmdet_fast.compat.mmcv_ext._roi import (
    border_align_backward,
    border_align_forward,
    prroi_pool_backward,
    prroi_pool_coor_backward,
    prroi_pool_forward,
    riroi_align_rotated_backward,
    riroi_align_rotated_forward,
    roi_align_backward,
    roi_align_forward,
    roi_align_rotated_backward,
    roi_align_rotated_forward,
    roi_pool_backward,
    roi_pool_forward,
    rotated_feature_align_backward,
    rotated_feature_align_forward,
)

__all__ = [
    "active_rotated_filter_backward",
    "active_rotated_filter_forward",
    "bbox_overlaps",
    "border_align_backward",
    "border_align_forward",
    "box_iou_quadri",
    "box_iou_rotated",
    "carafe_backward",
    "carafe_forward",
    "carafe_naive_backward",
    "carafe_naive_forward",
    "chamfer_distance_backward",
    "chamfer_distance_forward",
    "convex_giou",
    "convex_iou",
    "deform_conv_backward_input",
    "deform_conv_backward_parameters",
    "deform_conv_forward",
    "diff_iou_rotated_sort_vertices_forward",
    "get_compiler_version",
    "get_compiling_cuda_version",
    "install",
    "masked_col2im_forward",
    "masked_im2col_forward",
    "min_area_polygons",
    "modulated_deform_conv_backward",
    "modulated_deform_conv_forward",
    "ms_deform_attn_backward",
    "ms_deform_attn_forward",
    "nms",
    "nms_match",
    "nms_quadri",
    "nms_rotated",
    "points_in_polygons_forward",
    "prroi_pool_backward",
    "prroi_pool_coor_backward",
    "prroi_pool_forward",
    "psamask_backward",
    "psamask_forward",
    "riroi_align_rotated_backward",
    "riroi_align_rotated_forward",
    "roi_align_backward",
    "roi_align_forward",
    "roi_align_rotated_backward",
    "roi_align_rotated_forward",
    "roi_pool_backward",
    "roi_pool_forward",
    "rotated_feature_align_backward",
    "rotated_feature_align_forward",
    "sigmoid_focal_loss_backward",
    "sigmoid_focal_loss_forward",
    "softmax_focal_loss_backward",
    "softmax_focal_loss_forward",
    "softnms",
]


def install(replace: bool = False) -> bool:
    """Puts this module in the place of `mmcv._ext`, also in processes spawned from here; returns whether it is there.

    A compiled `mmcv._ext` that is installed keeps its place, unless `replace`. Raises RuntimeError if `mmcv.ops`
    has been imported with it: its functions are bound by then.
    """
    _restore_what_is_gone()
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


def _restore_what_is_gone() -> None:
    if "pkg_resources" not in sys.modules and importlib.util.find_spec("pkg_resources") is None:
        sys.modules["pkg_resources"] = _pkg_resources
    gone: list[tuple[Any, str, Any]] = [(np, "float", float), (collections, "Sequence", collections.abc.Sequence)]
    for module, name, value in gone:
        if not hasattr(module, name):
            setattr(module, name, value)


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


def get_compiler_version() -> str:
    return "none: mmcv._ext is rtmdet_fast's"


def get_compiling_cuda_version() -> str:
    return "none: mmcv._ext is rtmdet_fast's"


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def missing(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"mmcv's op {name} needs the compiled mmcv: rtmdet_fast stands in for mmcv._ext here, and has it not"
        )

    return missing


install()
