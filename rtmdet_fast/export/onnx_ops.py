"""The library's own operators in operators of ONNX; imported where onnxscript is installed."""

# ONNX's operators are typed by unions that no expression of theirs fits:
# mypy: ignore-errors
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import onnxscript
import torch
from onnxscript import BOOL, FLOAT
from onnxscript import opset18 as op

import rtmdet_fast.export.graph  # noqa: F401 - which registers greedy
from rtmdet_fast.kernels import nms as _nms  # noqa: F401 - which registers batched_nms_reference


def translations() -> dict[Callable, Callable]:
    """What torch.onnx.export takes as custom_translation_table."""
    return {
        torch.ops.rtmdet_fast.batched_nms_reference.default: batched_nms,
        torch.ops.rtmdet_fast.greedy.default: greedy,
    }


def ints(*values: int) -> Any:
    return op.Constant(value_ints=values)


def number(value: float) -> Any:
    return op.Constant(value_float=float(value))


def batched_nms(boxes: Any, scores: Any, labels: Any, iou_threshold: float, max_keep: int) -> tuple[Any, Any]:
    """`batched_nms_padded` of xyxy boxes by NonMaxSuppression, which takes scores above 0 of each class."""
    size = op.Shape(scores)  # [B, K]
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    classes = op.Range(zero, op.Add(op.ReduceMax(labels, keepdims=0), one), one)
    of_class = op.Equal(op.Unsqueeze(labels, ints(1)), op.Unsqueeze(classes, ints(0, 2)))
    by_class = op.Where(of_class, op.Unsqueeze(scores, ints(1)), number(-1))  # [B, C, K]
    capacity = op.Gather(size, ints(1))
    threshold = op.Constant(value_floats=[float(iou_threshold)])
    chosen = op.NonMaxSuppression(boxes, by_class, capacity, threshold, op.Constant(value_floats=[0.0]))
    place = op.Gather(chosen, ints(0, 2), axis=1)  # (image, box) of (image, class, box)
    none = op.ConstantOfShape(size, value=onnx.helper.make_tensor("zero", onnx.TensorProto.INT64, [1], [0]))
    ones = op.Expand(one, op.Gather(op.Shape(chosen), ints(0)))
    kept = op.ScatterND(none, place, ones)
    ranked = op.Where(op.Greater(kept, zero), scores, number(-1))
    best, index = op.TopK(op.Pad(ranked, ints(0, 0, 0, max_keep), number(-1)), ints(max_keep), axis=1)
    keep = op.Where(op.Greater(best, number(0)), index, op.Constant(value_int=-1))
    return keep, op.Min(op.ReduceSum(kept, ints(1), keepdims=0), op.Constant(value_int=max_keep))


@onnxscript.script(default_opset=op)
def greedy(suppresses: FLOAT) -> BOOL:
    """`greedy` of rtmdet_fast.export.graph, round after round by a Loop."""
    axis = op.Constant(value_ints=[1])
    nothing = op.Constant(value_float=0.0)
    keep = op.Cast(op.ReduceSum(suppresses, axis, keepdims=1) == nothing, to=1)
    changed = op.ReduceMax(op.ReduceMax(suppresses, axis, keepdims=0), keepdims=0) > nothing
    while changed:
        after = op.Cast(op.MatMul(keep, suppresses) == nothing, to=1)
        changed = op.ReduceSum(op.Abs(after - keep), keepdims=0) > nothing
        keep = op.Identity(after)
    return op.Squeeze(keep, axis) > nothing
