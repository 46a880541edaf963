"""Which implementation runs: Triton for CUDA tensors, plain PyTorch for everything else."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # macOS, Windows: only the references run
    from types import SimpleNamespace

    triton, tl = SimpleNamespace(jit=lambda fn: fn), SimpleNamespace(constexpr=int)
    AVAILABLE = False
else:
    AVAILABLE = True

# "auto" (default), "torch" (debugging, A/B timing) or "triton" (with TRITON_INTERPRET=1, on a CPU too)
BACKEND = os.environ.get("RTMDET_FAST_KERNELS", "auto")
if BACKEND not in ("auto", "torch", "triton"):
    raise ValueError(f"RTMDET_FAST_KERNELS={BACKEND!r}: expected auto, torch or triton")
if BACKEND == "triton" and not AVAILABLE:
    raise ImportError("RTMDET_FAST_KERNELS=triton, but triton is not installed")


def use_triton(x: torch.Tensor) -> bool:
    """True where the Triton op takes `x`; an explicit `triton` never falls back in silence."""
    return BACKEND == "triton" or (BACKEND == "auto" and AVAILABLE and x.is_cuda)


def triton_op(name: str) -> Callable[[Callable[..., Any]], Any]:
    """`torch.library.triton_op` that runs on the GPU of its first argument: Triton launches on the current one."""

    def register(function: Callable[..., Any]) -> Any:
        # without Triton a plain op, which is never called: torch's own decorator would warn of each
        library_op: Any = torch.library.triton_op if AVAILABLE else torch.library.custom_op
        op = library_op(name, function, mutates_args=())

        @op.register_kernel("cuda")
        def on_its_gpu(x: torch.Tensor, *arguments: Any) -> Any:
            with torch.cuda.device_of(x):
                return function(x, *arguments)

        return op

    return register
