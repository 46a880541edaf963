"""Compiled files (.pt2): the graph by torch.export and AOTInductor, for the kind of machine that it is compiled on."""

from __future__ import annotations

import json
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rtmdet_fast.errors import UserError
from rtmdet_fast.export.graph import Graph, trace

METADATA = "_metadata.json"
"""What the name of a part of the package ends in that AOTInductor puts metadata into."""
MOST_METADATA = 1 << 24  # bytes; of a compressed part a thousandth may stand in the file


def export_pt2(
    graph: Graph, path: Path, metadata: dict[str, Any], image_size: int | None, batch_size: int | None
) -> None:
    """Compile `graph` for the device that it is on, with `metadata` as JSON under "rtmdet_fast" in the package.

    image_size: side in pixels of the square input, None for any multiples of 32. batch_size: None for any.
    Loops that depend on the boxes (NMS) stay operators of this library, which loading the file takes.
    Raises UserError without a C++ compiler.
    """
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UserError(
            f"{path.name}: no C++ compiler was found, which .pt2 takes: install g++, or export to .onnx or .xml"
        ) from error
    device = next(graph.parameters()).device
    metadata = {**metadata, "device": device.type, "cpu": torch.backends.cpu.get_cpu_capability()}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own deprecated parts
        program = trace(graph, image_size, batch_size)
        try:
            aoti_compile_and_package(
                program,
                package_path=str(path),
                inductor_configs={"aot_inductor.metadata": {"rtmdet_fast": json.dumps(metadata)}},
            )
        except CppCompileError as error:
            reason = next((line for line in error.output.splitlines() if "error" in line), "it gives no reason")
            raise UserError(f"{path.name}: the C++ compiler failed: {reason}") from error


def open_pt2(path: Path) -> tuple[dict[str, Any], Any]:
    """The metadata of a compiled file, and what runs it, on the kind of device that it was made for.

    What a file tells of itself is read before its code is loaded.
    """
    import rtmdet_fast.kernels.nms  # noqa: F401 - which registers an operator that the file calls

    try:
        with zipfile.ZipFile(path) as package:
            members = [member for member in package.infolist() if member.filename.endswith(METADATA)]
            if sum(member.file_size for member in members) > MOST_METADATA:
                raise UserError(f"{path} is no package of AOTInductor: its metadata would take more than 16 MiB")
            parts = [json.loads(package.read(member)) for member in members]
    except (zipfile.BadZipFile, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is no package of AOTInductor, or is damaged") from error
    metadata = json.loads(next((part["rtmdet_fast"] for part in parts if "rtmdet_fast" in part), ""))
    if metadata["device"] not in ("cpu", "cuda"):
        raise ValueError(metadata["device"])
    device, cpu = torch.device(metadata["device"]), torch.backends.cpu.get_cpu_capability()
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{path} was compiled for a GPU, which this machine has not: export it anew here")
    if metadata["cpu"] != cpu:
        raise UserError(
            f"{path} was compiled for a processor with {metadata['cpu']}, and this one has {cpu}: export it anew here"
        )
    try:
        compiled = torch._inductor.aoti_load_package(str(path))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be loaded by torch {torch.__version__}: {reason}") from error
    names = metadata["outputs"]

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        with torch.no_grad():
            found = compiled(torch.from_numpy(images).to(device))
        return {name: output.cpu().numpy() for name, output in zip(names, found, strict=True)}

    return metadata, run
