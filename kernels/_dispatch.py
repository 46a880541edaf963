"""Which implementation runs: Triton for CUDA tensors, plain PyTorch for everything else."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import torch

from rtmdet_fast.errors import UserError

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


def check_backend() -> None:
    """Raises UserError where RTMDET_FAST_KERNELS is none of the three; not at import, where no command tells it."""
    if BACKEND not in ("auto", "torch", "triton"):
        raise UserError(f"RTMDET_FAST_KERNELS is {BACKEND!r:.40}: give auto, torch or triton")
    if BACKEND == "triton" and not AVAILABLE:
        raise UserError("RTMDET_FAST_KERNELS is triton, which is not installed: give auto or torch")


def use_triton(x: torch.Tensor) -> bool:
    """True where the Triton op takes `x`; an explicit `triton` never falls back in silence."""
    if BACKEND == "auto":
        return AVAILABLE and x.is_cuda
    check_backend()
    return BACKEND == "triton"


def cdiv(a: int, b: int) -> int:
    """ceil(a / b); Triton's own, made for kernels too, takes 4 us on the host."""
    return -(-a // b)


class _Launches(threading.local):
    real = False  # of tensors that hold values: nobody traces


_launches = _Launches()


def wrap_triton(kernel: Any) -> Any:
    """`torch.library.wrap_triton`, which is for tracing and takes 60 us, or the kernel itself where it is launched.

    Run-time arguments are tensors and numbers, one a parameter: what a tuple holds does not enter torch.compile's graph
    (a tensor in it would stay the fake one of the trace). A constexpr may be a plain tuple, and not a NamedTuple, as
    Inductor writes constexprs and the kernel's source into a file where the class has no name.
    """
    return kernel if _launches.real else torch.library.wrap_triton(kernel)


def triton_op(name: str) -> Callable[[Callable[..., Any]], Any]:
    """`torch.library.triton_op` that runs on the GPU of its first argument: Triton launches on the current one."""

    def register(function: Callable[..., Any]) -> Any:
        # without Triton a plain op, which is never called: torch's own decorator would warn of each
        library_op: Any = torch.library.triton_op if AVAILABLE else torch.library.custom_op
        op = library_op(name, function, mutates_args=())

        @op.register_kernel("cuda")
        def on_its_gpu(x: torch.Tensor, *arguments: Any) -> Any:
            outside, _launches.real = _launches.real, True
            try:
                with torch.cuda.device_of(x):
                    return function(x, *arguments)
            finally:
                _launches.real = outside

        op.undispatched = on_its_gpu
        return op

    return register


def unwatched(x: torch.Tensor) -> bool:
    """Whether an op on `x` gives its result and nothing else: no gradient, no trace, no subclass of Tensor.

    `op.undispatched` then does what `op` does, without PyTorch's dispatcher of Python ops, which takes as long as the
    launch of a kernel (10 us): in a small batch the host is what one waits for.
    """
    return (
        type(x) is torch.Tensor
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and torch._C._len_torch_dispatch_stack() == 0
    )
