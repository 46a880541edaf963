"""Times the contenders of a case in turns, each only after its result has been found right.

The turns go A B C, C B A, A B C, ...: else one would always follow the contender that empties the caches.

On CUDA there are two clocks. "call" is a whole call between two synchronisations, launches included, as a user sees
it. "graph" replays a CUDA graph that holds one call for every set of inputs, between two CUDA events, divided by
their number: the kernels alone. The sets exceed the L2 cache together, and the graph keeps every output, so that
neither reads nor writes are served from it. "host" is the part of "call" until the call returns: where it is all of it,
the device waits for the host, and a faster kernel gains nothing. On a CPU "call" is the only clock.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rtmdet_fast.kernels import _dispatch


class Absent(Exception):
    """Raised by `Contender.build` where the contender cannot run; its message is the reason."""


class Parity(Exception):
    """Raised by `Case.compare` for a wrong result; its message says what differs."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    name: str
    build: Callable[[], Callable[..., Any]]  # imports what it needs and returns what is timed
    result: Callable[[Any], Any] = lambda output: output  # what `Case.compare` takes; not timed
    graph: bool = False  # whether it can be captured, that is, never synchronises
    warm_up: int = 0  # calls before the first that counts, besides that whose result is looked at


@dataclass(frozen=True, kw_only=True)
class Case:
    op: str
    name: str
    shapes: dict[str, Any]
    inputs: Callable[[int], tuple[Any, ...]]  # by seed
    expected: Callable[..., Any]  # from the inputs, in float64
    compare: Callable[[Any, Any], str]  # (result, expected) -> how near, or raises Parity
    contenders: Sequence[Contender]  # the first is ours: ratios are the others over it
    bytes: int | None = None  # that a call must move, for memory-bound ops
    group: str | None = None  # of cases whose ratios have a mean worth telling
    headline: bool = True  # measured first, and by --quick
    late: bool = False  # measured after all others, and not by --quick: its contenders take minutes to compile
    images: int | None = None  # of a call, where images a second are worth telling
    least: int = 5  # rounds, however long they take


def own(
    device: torch.device,
    op: Callable[..., Any],
    reference: Callable[..., Any],
    *,
    result: Callable[[Any], Any] = lambda output: output,
    graph_reference: bool = False,
) -> list[Contender]:
    """This project's contenders: the Triton op and the reference on CUDA; elsewhere `op` is the reference."""
    if device.type != "cuda":
        return [Contender(name="reference", build=lambda: op, result=result)]

    def triton() -> Callable[..., Any]:
        if not _dispatch.AVAILABLE:
            raise Absent("Triton is not installed")
        return op

    return [
        Contender(name="triton", build=triton, result=result, graph=True),
        Contender(name="reference", build=lambda: reference, result=result, graph=graph_reference),
    ]


def compiled(
    device: torch.device, function: Callable[..., Any], mode: str | None = None
) -> Callable[[], Callable[..., Any]]:
    """Builder of a `torch.compile` contender."""

    def build() -> Callable[..., Any]:
        if device.type != "cuda":
            raise Absent("measured on GPUs only")
        torch.compiler.reset()
        return torch.compile(function, dynamic=False, mode=mode)

    return build


def relative_error(result: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> str:
    """Compares |result - expected| / |expected| (2-norms) of each pair of tensors, in float64."""
    errors = []
    for got, want in zip(result, expected, strict=True):
        if got.shape != want.shape:
            raise Parity(f"shape {tuple(got.shape)} instead of {tuple(want.shape)}")
        norm = want.norm().item()
        errors.append((got.to(want.dtype) - want).norm().item() / (norm or 1.0))
    worst = max(errors, key=lambda error: error if error == error else float("inf"))
    if not worst <= tolerance:
        raise Parity(f"relative error {worst:.1e}, allowed {tolerance:.0e}")
    return f"relative error {worst:.1e}"


def few_differ(different: int, total: int, what: str, tolerance: float = 1e-3) -> str:
    """Discrete results: rounding may turn a few decisions."""
    if different > tolerance * total:
        raise Parity(f"{different} of {total} {what} differ")
    return f"{different} of {total} {what} differ"


def measure(case: Case, device: torch.device, *, seconds: float, least: int = 5, most: int = 100) -> dict[str, Any]:
    """One case -> its record: of every contender parity, times, memory; and ratios to the first. And "samples", seconds
    by clock and contender, to be taken out before the record is stored.

    A contender that is absent, fails or is wrong gets no times and a `why`. `seconds` is spent on each clock, on
    at least `least` and at most `most` rounds.
    """
    cuda, sets = device.type == "cuda", input_sets(case, device)
    entries: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[..., Any]] = {}
    expected = exact(case, sets[0])
    for contender in case.contenders:
        entry: dict[str, Any] = {}
        entries[contender.name] = entry
        try:
            call = contender.build()
            output = call(*sets[0])
            entry["parity"] = case.compare(contender.result(output), expected)
            del output
            for inputs in sets[1:] + sets[:1] * contender.warm_up:
                call(*inputs)
            entry["memory"] = _extra_memory(call, sets[-1], device)
        except (Absent, ImportError) as error:
            entry.update(status="absent", why=_first_line(error))
        except Parity as error:
            entry.update(status="wrong", why=str(error))
        except Exception as error:  # a peer may fail in its own way: out of memory, an unsupported device
            entry.update(status="failed", why=_first_line(error))
        else:
            entry["status"] = "timed"
            calls[contender.name] = call
    del expected
    gc.collect()
    until_return: dict[str, list[float]] = {name: [] for name in calls}
    wait = torch.cuda.synchronize if cuda else lambda: None
    clocks = {name: _call_clock(call, sets, wait, until_return[name]) for name, call in calls.items()}
    times = {"call": _turns(clocks, seconds, least, most)}
    if cuda:
        times["host"] = until_return
        torch.cuda.empty_cache()
        clocks = {}
        for contender in case.contenders:
            if contender.graph and contender.name in calls:
                try:
                    clocks[contender.name] = _graph_clock(calls[contender.name], sets)
                except RuntimeError as error:
                    entries[contender.name]["no_graph"] = _first_line(error)
        times["graph"] = _turns(clocks, seconds, least, most)
    for clock, by_name in times.items():
        for name, samples in by_name.items():
            entries[name][clock] = spread([1e3 * sample for sample in samples]) | {"rounds": len(samples)}
            if case.bytes is not None and cuda and clock != "host":
                entries[name][clock]["gb_s"] = case.bytes / statistics.median(samples) / 1e9
    ours = case.contenders[0].name
    return {
        "op": case.op,
        "case": case.name,
        "group": case.group,
        "shapes": case.shapes,
        "bytes": case.bytes,
        "images": case.images,
        "input_sets": len(sets),
        "malloc": malloc_settings(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "ours": ours,
        "contenders": entries,
        "ratios": {name: ratio(entries, times, ours, name) for name in calls if name != ours and ours in calls},
        "samples": times,
    }


def input_sets(case: Case, device: torch.device) -> list[tuple[Any, ...]]:
    """One on a CPU; on a GPU as many as exceed its L2 cache together, at least 2 and at most 16."""
    sets = [case.inputs(0)]
    if device.type == "cuda":
        size = sum(x.numel() * x.element_size() for x in sets[0] if isinstance(x, Tensor))
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        sets += [case.inputs(seed) for seed in range(1, min(max(2, -(-2 * cache // max(size, 1))), 16))]
    return sets


def compile_first(case: Case) -> None:
    """Calls its torch.compile once, which keeps on the disk what it compiled; what fails does so again when timed."""
    inputs = case.inputs(0)
    for contender in case.contenders:
        if contender.name == "torch.compile":
            with contextlib.suppress(Exception):
                contender.build()(*inputs)


def exact(case: Case, inputs: tuple[Any, ...]) -> Any:
    """The float64 result, without cudnn's benchmark, which would try algorithms that take seconds in float64."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        return case.expected(*inputs)


def verify(case: Case, device: torch.device) -> str:
    """The verdict on ours alone, without timing: how near it is to the float64 result, or what is wrong."""
    inputs = case.inputs(0)
    try:
        contender = case.contenders[0]
        return "right: " + case.compare(contender.result(contender.build()(*inputs)), exact(case, inputs))
    except (Absent, ImportError) as error:
        return f"absent: {_first_line(error)}"
    except Parity as error:
        return f"wrong: {error}"
    except Exception as error:
        return f"failed: {_first_line(error)}"


def ratio(entries: dict[str, Any], times: dict[str, dict[str, list[float]]], ours: str, name: str) -> dict[str, Any]:
    """How many times faster and smaller `ours` is: ratio of medians, with the quartiles of the rounds' ratios."""
    clock = "graph" if {ours, name} <= times.get("graph", {}).keys() else "call"
    mine, theirs = times[clock][ours], times[clock][name]
    low, _, high = statistics.quantiles([b / a for a, b in zip(mine, theirs, strict=True)], n=4, method="inclusive")
    memory = [entries[n]["memory"] for n in (name, ours)]
    return {
        "clock": clock,
        "time": statistics.median(theirs) / statistics.median(mine),
        "q1": low,
        "q3": high,
        "memory": memory[0] / memory[1] if all(memory) else None,
    }


def spread(samples: Sequence[float]) -> dict[str, float]:
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


def malloc_settings() -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")}


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a copy of 2 GiB from device memory to device memory, reads and writes counted."""
    source = torch.ones(2**31, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    clock = _graph_clock(target.copy_, [(source,)])
    return 2 * source.numel() / statistics.median(clock() for _ in range(20)) / 1e9


def _turns(clocks: dict[str, Callable[[], float]], seconds: float, least: int, most: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in clocks}
    end = time.perf_counter() + seconds
    for done in range(most if clocks else 0):
        if done >= least and time.perf_counter() > end:
            break
        order = list(clocks) if done % 2 == 0 else reversed(clocks)
        for name in order:
            times[name].append(clocks[name]())
    return times


def _call_clock(
    call: Callable[..., Any], sets: Sequence[tuple[Any, ...]], synchronize: Callable[[], Any], until_return: list[float]
) -> Callable[[], float]:
    """Each reading adds to `until_return` the seconds until the call returned, whatever the device was at then."""
    turn = 0

    def clock() -> float:
        nonlocal turn
        inputs, turn = sets[turn % len(sets)], turn + 1
        synchronize()
        start = time.perf_counter()
        output = call(*inputs)
        until_return.append(time.perf_counter() - start)
        synchronize()
        end = time.perf_counter()
        del output
        return end - start

    return clock


def _graph_clock(call: Callable[..., Any], sets: Sequence[tuple[Any, ...]]) -> Callable[[], float]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for inputs in sets:
            call(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [call(*inputs) for inputs in sets]  # all kept: each call writes to memory of its own
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def clock() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(outputs)

    clock()
    return clock


def _extra_memory(call: Callable[..., Any], inputs: tuple[Any, ...], device: torch.device) -> int | None:
    """Bytes at the peak of a call, outputs included, above what was there before; None where nobody counts them."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call(*inputs)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        # without it free memory that malloc kept would be used unseen
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak starts anew from the present size
        before = status("VmRSS")
        call(*inputs)
        return max(status("VmHWM") - before, 0)
    except (OSError, AttributeError):  # not Linux, not glibc
        return None


def status(field: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    raise OSError(f"no {field} here")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
