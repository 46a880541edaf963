"""`nms`, `soft_nms`, `nms_rotated` and `batched_nms` with the signatures of `mmcv.ops`, and its answers to the letter.

`MultiScaleDeformableAttnFunction` and `multi_scale_deformable_attn_pytorch`, which are one here, likewise.

| given | answer |
|---|---|
| boxes without area, or with NaN or infinite coordinates | kept; they suppress nothing |
| scores of −inf, +inf, NaN | take part, in the order −inf < … < +inf < NaN |
| `iou_threshold` outside [0, 1] | taken: below 0 boxes far apart suppress each other too |
| `iou_thr` in place of `iou_threshold` | taken, with a DeprecationWarning (not by `nms_rotated`) |
| `score_threshold`, `max_num` | count only above 0 |
| no boxes | `nms_rotated` returns what it was given, without a column of scores, and None |
| `idxs` | any numbers; a class moves its boxes by idx × (greatest coordinate + 1), as in the original: coordinates \
below 0, or one that is not finite, let classes meet, or not meet themselves |
| `nms_cfg["split_thr"]` | that many boxes or more are suppressed class by class, `class_agnostic` or not |
| wrong types, shapes, `offset` | AssertionError |

Beyond the original: any floating dtype on a CPU, no boxes in `batched_nms`, and `labels` in `nms_rotated`, which the
original takes and leaves out of account. Of the types of NMS `nms_quadri` is missing. Attention in half precision takes
locations and weights as they are, where the original rounds them to the dtype of `value`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from rtmdet_fast.kernels import greedy_nms as kernels
from rtmdet_fast.kernels.deformable_attention import deformable_attention

Array = TypeVar("Array", Tensor, np.ndarray)
_METHODS = {"naive": 0, "linear": 1, "gaussian": 2}


def _takes_iou_thr(op: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(op)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if "iou_thr" in kwargs:
            assert "iou_threshold" not in kwargs, "iou_thr is iou_threshold: give one of them"
            warnings.warn('"iou_thr" is deprecated, please use "iou_threshold"', DeprecationWarning, stacklevel=2)
            kwargs["iou_threshold"] = kwargs.pop("iou_thr")
        return op(*args, **kwargs)

    return wrapper


@_takes_iou_thr
def nms(
    boxes: Array,
    scores: Array,
    iou_threshold: float,
    offset: int = 0,
    score_threshold: float = 0,
    max_num: int = -1,
) -> tuple[Array, Array]:
    """Boxes [N, 4] xyxy, scores [N] -> (dets [K, 5] with the score last, keep [K] int64), by falling score.

    `offset` 1 takes x2 and y2 as inclusive pixels. Arrays are answered with arrays.
    """
    return _nms(boxes, scores, iou_threshold, offset, score_threshold, max_num)


@_takes_iou_thr
def _nms(
    boxes: Any,
    scores: Any,
    iou_threshold: float,
    offset: int = 0,
    score_threshold: float = 0,
    max_num: int = -1,
    groups: Tensor | None = None,
    split: Tensor | None = None,
) -> Any:
    is_array = isinstance(boxes, np.ndarray)
    boxes, scores = _tensors(boxes, scores, offset)
    chosen: Any = (scores > score_threshold).nonzero()[:, 0] if score_threshold > 0 else slice(None)
    if split is not None:
        kept = kernels.kept_within(boxes[chosen], scores[chosen], split[chosen], iou_threshold, offset)
        keep = kept.nonzero()[:, 0]
    else:
        group = groups if groups is None else groups[chosen]
        keep = kernels.greedy_nms(boxes[chosen], scores[chosen], iou_threshold, group, offset)
    if max_num > 0:
        keep = keep[:max_num]
    if score_threshold > 0:
        keep = chosen[keep]
    dets = torch.cat([boxes[keep], scores[keep].reshape(-1, 1)], 1)
    return (dets.cpu().numpy(), keep.cpu().numpy()) if is_array else (dets, keep)


def _tensors(boxes: Any, scores: Any, offset: int) -> tuple[Tensor, Tensor]:
    for name, x in (("boxes", boxes), ("scores", scores)):
        assert isinstance(x, Tensor | np.ndarray), f"{name} are {type(x).__name__}: expected a tensor or an array"
    boxes, scores = (torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in (boxes, scores))
    assert boxes.size(1) == 4, f"boxes have shape {tuple(boxes.shape)}: expected [N, 4]"
    assert boxes.size(0) == scores.size(0), f"{boxes.size(0)} boxes, {scores.size(0)} scores"
    assert offset in (0, 1), f"offset={offset!r}: expected 0 or 1"
    return boxes, scores


@_takes_iou_thr
def soft_nms(
    boxes: Array,
    scores: Array,
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 1e-3,
    method: str = "linear",
    offset: int = 0,
) -> tuple[Array, Array]:
    """Boxes [N, 4] xyxy, scores [N] -> (dets [K, 5] with the lowered score last, keep [K] int64); on the CPU.

    `method` is "naive", "linear" or "gaussian" (which alone reads `sigma`).
    """
    is_array = isinstance(boxes, np.ndarray)
    tensors = _tensors(boxes, scores, offset)
    assert method in _METHODS, f"method={method!r}: expected one of {', '.join(_METHODS)}"
    arrays = [x.detach().cpu().numpy() for x in tensors]
    settings = iou_threshold, sigma, min_score, _METHODS[method], offset
    result: Any = kernels.soft_nms(arrays[0], arrays[1], *settings)
    if not is_array:
        result = tuple(torch.from_numpy(x).to(tensors[0].device) for x in result)
    return result


def nms_rotated(
    dets: Tensor, scores: Tensor, iou_threshold: float, labels: Tensor | None = None, clockwise: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Dets [N, 5] (cx, cy, w, h, radians), scores [N] -> (dets [K, 6] with the score last, keep [K] int64).

    `labels` [N] confine suppression to equal labels; `clockwise` False takes angles from x towards -y.
    """
    if dets.shape[0] == 0:
        return dets, None
    turned = dets if clockwise else torch.cat([dets[:, :4], -dets[:, 4:]], 1)
    keep = kernels.greedy_nms(turned, scores, iou_threshold, labels)
    return torch.cat([dets[keep], scores[keep].reshape(-1, 1)], 1), keep


def batched_nms(
    boxes: Tensor, scores: Tensor, idxs: Tensor, nms_cfg: Mapping[str, Any] | None, class_agnostic: bool = False
) -> tuple[Tensor, Tensor]:
    """Boxes [N, 4 or 5], scores [N], idxs [N] -> (dets [K, 5 or 6], keep [K] int64): NMS within each class of `idxs`.

    `nms_cfg` holds `type` ("nms", "soft_nms", "nms_rotated" or a function), its arguments, `class_agnostic` and
    `split_thr` (10000). None only sorts by score.
    """
    if nms_cfg is None:
        scores, keep = scores.sort(descending=True)
        return torch.cat([boxes[keep], scores[:, None]], 1), keep
    cfg = dict(nms_cfg)
    class_agnostic = cfg.pop("class_agnostic", class_agnostic)
    kind = cfg.pop("type", "nms")
    split_thr = cfg.pop("split_thr", 10000)
    if len(boxes) == 0:
        return torch.cat([boxes, scores[:, None]], 1), scores.new_zeros(0, dtype=torch.int64)
    threshold = cfg.get("iou_threshold", cfg.get("iou_thr", 0))
    moved, groups = (boxes, None) if class_agnostic else kernels.move_apart(boxes, idxs, threshold)
    split = len(boxes) >= split_thr
    groups = None if split else groups
    ops: dict[str, Any] = {
        "nms": partial(_nms, groups=groups),
        "soft_nms": soft_nms,
        "nms_rotated": partial(nms_rotated, labels=groups),
    }
    op = ops.get(kind, kind)
    if isinstance(op, str):
        raise NotImplementedError(f"nms_cfg has type={kind!r}: expected {', '.join(ops)} or a function")
    if not split:
        dets, keep = op(moved, scores, **cfg)
        return torch.cat([boxes[keep], dets[:, -1:]], 1), keep
    max_num = cfg.pop("max_num", -1)
    kept, lowered = torch.zeros_like(scores, dtype=torch.bool), torch.zeros_like(scores)
    if kind == "nms":
        parts, op = [torch.arange(len(scores), device=scores.device)], partial(_nms, split=idxs)
    else:
        parts = [(idxs == idx).nonzero()[:, 0] for idx in idxs.unique()]
    for members in parts:
        dets, keep = op(moved[members], scores[members], **cfg)
        kept[members[keep]] = True
        lowered[members[keep]] = dets[:, -1]
    keep = kept.nonzero()[:, 0]
    scores, order = lowered[keep].sort(descending=True)
    keep = keep[order]
    dets = torch.cat([boxes[keep], scores[:, None]], 1)
    return (dets[:max_num], keep[:max_num]) if max_num > 0 else (dets, keep)


class MultiScaleDeformableAttnFunction:
    """`apply` of mmcv's autograd function, on any device."""

    @staticmethod
    def apply(
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        """Value [B, S, H, D], shapes [L, 2], locations [B, Q, H, L, P, 2], weights [B, Q, H, L, P] -> [B, Q, H D].

        The shapes (height, width) are read on the host, once for a tensor that is given again, as layer after layer
        does. Neither starts of the levels nor `im2col_step` are needed.
        """
        return multi_scale_deformable_attn_pytorch(
            value, value_spatial_shapes, sampling_locations, attention_weights
        )  # fmt: skip


def multi_scale_deformable_attn_pytorch(
    value: Tensor, value_spatial_shapes: Tensor, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """`MultiScaleDeformableAttnFunction.apply` without the arguments that are not needed."""
    points = [sampling_locations.shape[4]] * sampling_locations.shape[3]
    return deformable_attention(
        value, _sizes(value_spatial_shapes), sampling_locations.flatten(3, 4), attention_weights.flatten(3, 4), points
    )


_known_sizes = WeakTensorKeyDictionary()  # of tensors on a GPU, with their version


def _sizes(shapes: Tensor) -> list[tuple[int, int]]:
    if not shapes.is_cuda:
        return [(height, width) for height, width in shapes.tolist()]
    version, sizes = _known_sizes.get(shapes, (None, []))
    if version != shapes._version:
        sizes = [(height, width) for height, width in shapes.tolist()]
        _known_sizes[shapes] = shapes._version, sizes
    return sizes
