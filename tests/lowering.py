"""Compile a Triton kernel for a GPU that is not there, and read what it would use of it.

lower(_kernel, {"x_ptr": "*fp16:16", "n": "i32"}, {"BLOCK": 1024}, "sm_90", num_warps=4).spills == 0
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

try:
    import triton
except ModuleNotFoundError:
    triton = None

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")

# under the interpreter a jit function is no jit function any more: there is nothing left to compile
needs_lowering = pytest.mark.skipif(
    triton is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs Triton's compiler, thus no TRITON_INTERPRET=1",
)


@dataclass(frozen=True, kw_only=True)
class Resources:
    registers: int  # per thread (gfx942: vector registers, accumulation registers included)
    spills: int  # bytes of local memory per thread (gfx942: spilled vector registers)
    shared_bytes: int  # per program
    assembly: str  # PTX or amdgcn
    cubin: bytes = b""  # of NVIDIA's

    def instructions(self) -> tuple[int, list[int]]:
        """How many NVIDIA's machine code has: in all, and in each of its loops that stand in no other.

        Of a loop all count that stand in it, as if each of its branches were taken once a turn.
        """
        places, at, end = {}, 0, 0
        loops: list[tuple[int, int]] = []
        for line in _disassembled(self.cubin).splitlines():
            if label := re.match(r"(\.L\w+):", line):
                places[label[1]] = at
            elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
                at += 1
                target = re.search(r"BRA.*`\((\.L\w+)\)", instruction[1])
                if target and target[1] in places:
                    first = places[target[1]]
                    if first == at - 1:  # what jumps to itself is the padding behind the last
                        break
                    loops = [*(loop for loop in loops if loop[0] < first), (first, at)]
                end = at
        outside = [loop for loop in loops if not any(a < loop[0] and loop[1] < b for a, b in loops)]
        return end, [last - first for first, last in outside]


def lower(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    target: str,
    *,
    num_warps: int = 4,
    num_stages: int = 3,
) -> Resources:
    """Resources of `kernel` (jit function, or wrapped by autotune or heuristics) on one of TARGETS.

    `signature` maps each run-time argument to its type: "*fp16", "*fp32", "i32", "i64", "fp32", ... A ":16"
    behind it says that the pointer or integer is a multiple of 16, which Triton finds out at a launch and
    which decides the width of loads. Constexprs, and arguments that a launch specialises because they are
    None or an integer equal to 1, go into `constexprs`. An argument in neither, or in both, is an error.
    """
    from triton.backends.compiler import GPUTarget

    backend, arch = ("cuda", int(target[3:])) if target.startswith("sm_") else ("hip", target)
    compiled = triton.compile(
        _source(kernel, signature, constexprs),
        target=GPUTarget(backend, arch, 32 if backend == "cuda" else 64),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    if backend == "hip":
        text = compiled.asm["amdgcn"]
        usage = {key: int(value) for key, value in re.findall(r"\.vgpr_(count|spill_count):\s+(\d+)", text)}
        return Resources(
            registers=usage["count"], spills=usage["spill_count"], shared_bytes=compiled.metadata.shared, assembly=text
        )
    usage = _resource_usage(compiled.asm["cubin"])
    return Resources(
        registers=usage["REG"],
        spills=usage["STACK"] + usage["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        assembly=compiled.asm["ptx"],
        cubin=compiled.asm["cubin"],
    )


def trace(kernel: Any, signature: Mapping[str, str], constexprs: Mapping[str, Any]) -> None:
    """Triton's first step alone, from Python to its intermediate representation, which takes the types it can take."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)
    options = backend.parse_options({})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    _source(kernel, signature, constexprs).make_ir(target, options, functions, modules, context)


def _source(kernel: Any, signature: Mapping[str, str], constexprs: Mapping[str, Any]) -> Any:
    from triton.compiler import ASTSource

    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn
    if set(signature) & set(constexprs) or set(signature) | set(constexprs) != set(kernel.arg_names):
        wrong = (set(signature) | set(constexprs)) ^ set(kernel.arg_names) | set(signature) & set(constexprs)
        raise ValueError(f"{kernel.__name__}: arguments missing, unknown or given twice: {sorted(wrong)}")
    types, attrs = {}, {}
    for i, name in enumerate(kernel.arg_names):
        types[name], _, multiple = signature.get(name, "constexpr").partition(":")
        if multiple:
            attrs[(i,)] = [["tt.divisibility", int(multiple)]]
    return ASTSource(kernel, types, dict(constexprs), attrs)


@dataclass(frozen=True)
class Launch:
    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, int], ...]  # num_warps, num_stages

    def lower(self, target: str) -> Resources:
        return lower(self.kernel, dict(self.signature), dict(self.constexprs), target, **dict(self.options))

    def trace(self) -> None:
        trace(self.kernel, dict(self.signature), dict(self.constexprs))


def record_launches(monkeypatch: pytest.MonkeyPatch, *modules: Any) -> list[Launch]:
    """The list to which every kernel that `modules` launch through `wrap_triton` is added instead of being run.

    The kernels must be plain jit functions, and all their arguments positional but constexprs and options.
    """
    launches: list[Launch] = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            assert all(n > 0 for n in grid), f"{self.kernel.__name__}: empty grid {grid}"
            return self.launch

        def launch(self, *args, **kwargs):
            options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
            given = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
            signature, constexprs = {}, {}
            for parameter in self.kernel.params:
                value = given[parameter.name]
                one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
                if parameter.is_constexpr or value is None or one:
                    constexprs[parameter.name] = value
                else:
                    signature[parameter.name] = _type(value, specialize=not parameter.do_not_specialize)
            launches.append(Launch(self.kernel, *(tuple(x.items()) for x in (signature, constexprs, options))))

    for module in modules:
        monkeypatch.setattr(module, "wrap_triton", Recorder)
    return launches


def _type(value: torch.Tensor | int | float, *, specialize: bool) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{_TYPES[value.dtype]}" + ":16" * (value.data_ptr() % 16 == 0)
    return "fp32" if isinstance(value, float) else "i32" + ":16" * (specialize and value % 16 == 0)


_TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.bool: "i1", torch.uint8: "u8",
}  # fmt: skip


def _resource_usage(cubin: bytes) -> dict[str, int]:
    text = _told("cuobjdump", "--dump-resource-usage", cubin)
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def _disassembled(cubin: bytes) -> str:
    return _told("nvdisasm", "-c", cubin)


def _told(tool: str, option: str, cubin: bytes) -> str:
    """What one of the tools in Triton's package says of a kernel."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, option, file.name], check=True, capture_output=True, text=True).stdout
