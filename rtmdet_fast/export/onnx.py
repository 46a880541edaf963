"""ONNX files with NMS inside, of the folded model; readable by ONNX Runtime, OpenVINO, TensorRT and others."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch

from rtmdet_fast.errors import UserError
from rtmdet_fast.export.graph import Graph, trace

OPSET = 18


def export_onnx(
    graph: Graph, path: Path, metadata: dict[str, Any], image_size: int | None, batch_size: int | None
) -> None:
    """Write `graph` as one ONNX file, with `metadata` as JSON under "rtmdet_fast" in its metadata_props.

    image_size: side in pixels of the square input, None for any multiples of 32. batch_size: None for any.
    Raises UserError where the packages that it takes are not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install 'rtmdet-fast[export]'") from error
    from rtmdet_fast.export.onnx_ops import translations

    with torch.no_grad(), quiet():
        program = torch.onnx.export(
            trace(graph, image_size, batch_size),
            dynamo=True,
            opset_version=OPSET,
            input_names=["input"],
            output_names=graph.output_names,
            custom_translation_table=translations(),
        )
    assert program is not None
    model = program.model_proto
    axes = model.graph.input[0].type.tensor_type.shape.dim
    clients_names = {axes[i].dim_param: name for i, name in ((0, "batch"), (2, "height"), (3, "width"))}
    for value in (*model.graph.input, *model.graph.output):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_param = clients_names.get(axis.dim_param, axis.dim_param)
    onnx.helper.set_model_props(model, {"rtmdet_fast": json.dumps(metadata)})
    model.producer_name = "rtmdet_fast"
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


@contextlib.contextmanager
def quiet() -> Any:
    """The exporter talks of its progress, and of packages that it could do more with."""
    log = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
