"""Which implementation runs: Triton for CUDA tensors, plain PyTorch for everything else."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch.autograd import forward_ad

from rtmdet_fast.errors import UserError

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # macOS, Windows: only the references run
    from types import SimpleNamespace

    def _jit(fn: Any = None, **_: Any) -> Any:
        return fn or _jit

    triton, tl = SimpleNamespace(jit=_jit), SimpleNamespace(constexpr=int)
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
    """True where the Triton op takes `x`; an explicit `triton` never falls back in silence.

    But for forward-mode AD and the transforms of torch.func, which no Triton op has: the references have what PyTorch
    has.
    """
    if BACKEND == "auto":
        return AVAILABLE and x.is_cuda and not transforms()
    check_backend()
    return BACKEND == "triton" and not transforms()


def transforms() -> bool:
    """Whether forward-mode AD or a transform of torch.func (jvp, vmap, ...) is at work."""
    return not torch.compiler.is_compiling() and (
        forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
    )


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def multiprocessors(x: torch.Tensor) -> int:
    """Of the GPU that `x` is on; of an H200 for tensors that are on none."""
    return _multiprocessors(x.device) if x.is_cuda and type(x) is torch.Tensor else 132


def at_once(device: torch.device, on_cpu: int) -> int:
    """Elements of a temporary that a reference computes at once: on a CPU as many as stay in its cache.

    Elsewhere each operation is a launch, of which chunks for a cache would take thousands: 64 times as many.
    """
    return on_cpu if device.type == "cpu" else 64 * on_cpu


def is_aligned(x: torch.Tensor, elements: int) -> bool:
    """Whether `x` starts at a multiple of so many elements.

    A tensor that torch.compile traces has no address: there PyTorch copies inputs that are not as aligned as those of
    the trace were, and what it allocates is.
    """
    if type(x) in (torch.Tensor, torch.nn.Parameter):
        return x.data_ptr() % (elements * x.element_size()) == 0
    return x.storage_offset() % elements == 0


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


@triton.jit
def memory_barrier(AMD: tl.constexpr):
    """Waits until all threads of a program have stored in global memory what the others are to read there."""
    if AMD:  # whose barrier waits for shared memory alone
        zero = tl.zeros([1], tl.int32)
        tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)\nv_mov_b32 $0, $1", "=v,v", [zero], dtype=tl.int32, is_pure=False, pack=1
        )
    tl.debug_barrier()


IS_AMD = torch.version.hip is not None


@triton.jit
def is_last(counter_ptr, expected, AMD: tl.constexpr):
    """Whether this program is the last of `expected` that come here: it may load what all of them stored before.

    `counter_ptr` is one of `counters`. Each program's threads wait for their stores before one of them counts; counting
    publishes them (release) and, for the last, lets no load go before it (acquire). Such loads take ".cg", which passes
    by the cache of a multiprocessor. Which program is last hangs on the moment: whoever it is, it has to do the same.
    """
    memory_barrier(AMD)
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == expected - 1
    if last:
        tl.store(counter_ptr, 0)
    tl.debug_barrier()
    return last


_counters: dict[tuple[torch.device, int], torch.Tensor] = {}


def counters(x: torch.Tensor, number: int) -> torch.Tensor:
    """At least `number` integers 0 on x's device, for `is_last`, which leaves them so.

    Kept for each stream, whose kernels follow each other: clearing them is a launch. A CUDA graph, which may be
    replayed on any stream, and a trace clear their own.
    """
    if not _launches.real or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return torch.zeros(number, dtype=torch.int32, device=x.device)
    key = x.device, torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    if key not in _counters or len(_counters[key]) < number:
        _counters[key] = torch.zeros(max(number, 4096), dtype=torch.int32, device=x.device)
    return _counters[key]


class TritonOp:
    """`torch.library.triton_op` that runs on the GPU of its first argument: Triton launches on the current one.

    PyTorch gets to know it when it is first called: registering imports all of torch.compile, which takes longer than
    PyTorch itself, and neither the references nor `undispatched` need it. A saved program of torch.export that holds
    such ops is loaded after `import rtmdet_fast.kernels._registered`.
    """

    def __init__(
        self, name: str, function: Callable[..., Any], *, opaque: bool = False, mutates: tuple[str, ...] = ()
    ) -> None:
        self.name, self.function, self.opaque, self.mutates = name, function, opaque, mutates
        self._more: list[Callable[[Any], Any]] = []

    def __call__(self, *arguments: Any) -> Any:
        # torch.compile, which would trace a call, runs an import as it is
        import rtmdet_fast.kernels._registered  # noqa: F401

        return self.library_op(*arguments)

    def undispatched(self, x: torch.Tensor, *arguments: Any) -> Any:
        """What the op does on a GPU, without PyTorch's dispatcher."""
        outside, _launches.real = _launches.real, True
        try:
            with torch.cuda.device_of(x):
                return self.function(x, *arguments)
        finally:
            _launches.real = outside

    def register_fake(self, function: Callable[..., Any]) -> None:
        self._more.append(lambda op: op.register_fake(function))

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        self._more.append(lambda op: op.register_autograd(backward, setup_context=setup_context))

    @cached_property
    def library_op(self) -> Any:
        """The op as PyTorch knows it, registered at first access."""
        # without Triton a plain op, which is never called: torch's own decorator would warn of each
        make: Any = torch.library.triton_op if AVAILABLE and not self.opaque else torch.library.custom_op
        op = make(self.name, self.function, mutates_args=self.mutates)
        op.register_kernel("cuda")(self.undispatched)
        for add in self._more:
            add(op)
        return op


def triton_op(
    name: str, *, opaque: bool = False, mutates: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], TritonOp]:
    """Makes a function of tensors and numbers, the first of them a tensor, a `TritonOp`.

    `opaque`: torch.compile calls it and does not look into it; it needs `register_fake`. `mutates`: parameters that it
    writes to; PyTorch lets such an op have no gradient.
    """
    return partial(TritonOp, name, opaque=opaque, mutates=mutates)


# of kernels that pass pointers through tuples it takes all for written there, and clones what they only read
CLONES_WHAT_IS_READ = torch.__version__ < "2.12"


def unwatched(x: torch.Tensor) -> bool:
    """Whether an op on `x` gives its result and nothing else: no gradient, trace, transform or subclass of Tensor.

    `op.undispatched` then does what `op` does, without PyTorch's dispatcher of Python ops, which takes as long as the
    launch of a kernel (10 us): in a small batch the host is what one waits for.
    """
    return not torch.is_grad_enabled() and plain(x)


def plain(x: torch.Tensor) -> bool:
    """Whether an op on `x` gives its result and maybe a gradient: no trace, transform or subclass of Tensor."""
    return (
        type(x) is torch.Tensor
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and not transforms()
    )
