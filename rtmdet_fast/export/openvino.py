"""OpenVINO's form of an exported ONNX file."""

from __future__ import annotations

import contextlib
import ctypes
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rtmdet_fast.errors import UserError

PRECISIONS = {"auto": "f32", "fp32": "f32", "bf16": "bf16", "fp16": "f16"}
"""OpenVINO's names. Of itself it takes bfloat16 where the CPU has it."""


def convert_to_openvino(
    onnx_path: Path, path: Path, metadata: dict[str, Any], prepare: Callable[[Any], Any] = lambda network: network
) -> None:
    """Write `path` (.xml) and the weights beside it (.bin) from an ONNX file, in float32.

    prepare: makes of the openvino.Model the one that is written.
    """
    openvino = import_openvino()
    network = prepare(openvino.convert_model(str(onnx_path)))
    network.set_rt_info(json.dumps(metadata), ["rtmdet_fast"])
    try:
        openvino.save_model(network, str(path), compress_to_fp16=False)
    except RuntimeError as error:
        raise UserError(f"cannot write {path.name}: the disk may be full") from error


def open_openvino(path: Path, threads: int | None, dtype: str = "auto") -> tuple[str, Any]:
    """The metadata of an OpenVINO file, and what runs it."""
    openvino = import_openvino()
    with path.open("rb") as file:
        if b"<net" not in file.read(1000):  # readers of other formats would try, and talk
            raise UserError(f"{path} cannot be read by OpenVINO: it does not begin as its files do")
    try:
        core = openvino.Core()
        model = core.read_model(str(path))
        metadata = model.get_rt_info(["rtmdet_fast"]).astype(str) if model.has_rt_info(["rtmdet_fast"]) else ""
        # `masks` are for other clients, and take long
        outputs = [output for output in model.outputs if "masks" not in output.get_names()]
        model = openvino.Model(outputs, model.get_parameters(), "detector")
        config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": PRECISIONS[dtype]} | (
            {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
        )
        with signal_stack_kept():
            compiled = core.compile_model(model, "CPU", config)
    except RuntimeError as error:
        places = "Exception from", "Check '"  # in its code; the reason comes after them
        reason = (line for line in str(error).splitlines() if line and not line.startswith(places))
        raise UserError(f"{path} cannot be read by OpenVINO: {next(reason, 'it gives no reason')}") from error
    names = [next(iter(output.get_names())) for output in compiled.outputs]

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        found = compiled(images)
        return {name: found[output] for name, output in zip(names, compiled.outputs, strict=True)}

    return metadata, run


class SignalStack(ctypes.Structure):
    """C's stack_t: where a thread's signal handlers run."""

    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))

    @classmethod
    def of_this_thread(cls) -> SignalStack:
        stack = cls()
        ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack))
        return stack


@contextlib.contextmanager
def signal_stack_kept() -> Iterator[None]:
    """OpenVINO gives the thread that compiles a model a stack for signals, which it may free with the model.

    After that a signal, such as Ctrl-C or the end of a loader's process, would end the process.
    """
    if sys.platform != "linux":
        yield
        return
    before = SignalStack.of_this_thread()
    try:
        yield
    finally:
        ctypes.CDLL(None).sigaltstack(ctypes.byref(before), None)


def import_openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise UserError("openvino is not installed: pip install 'rtmdet-fast[openvino]'") from error
    return openvino
