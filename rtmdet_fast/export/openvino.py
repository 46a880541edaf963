"""OpenVINO's form of an exported ONNX file."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from rtmdet_fast.errors import UserError


def convert_to_openvino(onnx_path: Path, path: Path, metadata: dict[str, Any]) -> None:
    """Write `path` (.xml) and the weights beside it (.bin) from an ONNX file, in float32."""
    openvino = import_openvino()
    model = openvino.convert_model(str(onnx_path))
    model.set_rt_info(json.dumps(metadata), ["rtmdet_fast"])
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        openvino.save_model(model, str(Path(folder) / path.name), compress_to_fp16=False)
        for suffix in (".bin", ".xml"):
            shutil.move(Path(folder) / path.with_suffix(suffix).name, path.with_suffix(suffix))


def open_openvino(path: Path, threads: int | None, precision: str = "f32") -> tuple[str, Any]:
    """The metadata of an OpenVINO file, and what runs it."""
    openvino = import_openvino()
    try:
        core = openvino.Core()
        model = core.read_model(str(path))
        metadata = model.get_rt_info(["rtmdet_fast"]).astype(str) if model.has_rt_info(["rtmdet_fast"]) else ""
        # `masks` are for other clients, and take long
        outputs = [output for output in model.outputs if "masks" not in output.get_names()]
        model = openvino.Model(outputs, model.get_parameters(), "detector")
        # of itself it takes bfloat16 where the CPU has it
        config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision} | (
            {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
        )
        compiled = core.compile_model(model, "CPU", config)
    except RuntimeError as error:
        raise UserError(f"{path} cannot be read by OpenVINO: {str(error).splitlines()[0]}") from error
    names = [next(iter(output.get_names())) for output in compiled.outputs]

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        found = compiled(images)
        return {name: found[output] for name, output in zip(names, compiled.outputs, strict=True)}

    return metadata, run


def import_openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise UserError("openvino is not installed: pip install 'rtmdet-fast[openvino]'") from error
    return openvino
