"""Which implementation runs: Triton for CUDA tensors, plain PyTorch for everything else."""

from __future__ import annotations

import os

import torch

try:
    import triton
    import triton.language as tl
    from torch.library import triton_op
except ModuleNotFoundError:  # macOS, Windows: only the references run
    from types import SimpleNamespace

    # plain ops, which are never called: torch's own decorator warns of each op without Triton
    triton_op = torch.library.custom_op  # type: ignore[assignment]
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
