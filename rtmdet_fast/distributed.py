"""Several processes of one run, as torchrun starts them, and what they tell each other."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

WAIT = timedelta(minutes=30)
"""What a process waits for the others at most: the first alone scores a validation and writes files."""
T = TypeVar("T")


def process_count() -> int:
    """Of the processes that torchrun started; 1 for one alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join_processes(device: torch.device, graphs: bool = False) -> tuple[int, int]:
    """Rank and number of the processes that torchrun started, joined; (0, 1) for one alone.

    `graphs`: what they tell each other is to be part of CUDA graphs, for which PyTorch asks NCCL's errors to be found
    by who waits for it, not by a thread of its own.
    """
    world_size = process_count()
    if world_size == 1:
        return 0, 1
    if graphs:
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    if not torch.distributed.is_initialized():
        # objects go by gloo also where tensors go by NCCL: they are no business of the GPUs
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=WAIT)
    return torch.distributed.get_rank(), world_size


def gather(value: T, world_size: int) -> list[T]:
    """The value of every process, by rank."""
    values = [value] * world_size
    if world_size > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def gather_to_first(value: T) -> list[T] | None:
    """The value of every process, by rank, where this is the first one; else None."""
    values: list[Any] | None = [None] * process_count() if torch.distributed.get_rank() == 0 else None
    torch.distributed.gather_object(value, values)
    return values


def any_process(value: bool) -> bool:
    """Whether it is true of one of the processes, all of which ask at the same time."""
    return bool(greatest_on_host([value])[0])


def greatest_on_host(values: Sequence[int]) -> list[int]:
    """Of each of the values the greatest of all processes, which the host finds out without the device."""
    if process_count() == 1:
        return list(values)
    found = torch.tensor(values, dtype=torch.int64)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return found.tolist()


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a tensor over the processes."""
    if process_count() > 1:
        value = value.clone()
        torch.distributed.all_reduce(value)
        value /= process_count()
    return value


def loss_normaliser(total: Tensor) -> Tensor:
    """What a process divides its summed losses by, so that the mean of all gradients is that of one process.

    `total`, a scalar, is what the losses of this process's images are averaged over: matched IoUs, objects. One process
    with the images of all of W would divide by their sum, at least 1; as gradients are averaged over processes, each
    divides by a Wth of that. Published code (mmdet's `reduce_mean` before its clamp, RT-DETR's) bounds each process's
    mean by 1 instead, the sum by W, and so has smaller losses and gradients, the more processes there are, while few
    objects are matched.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return total.clamp(min=1)
    total = total.clone()
    torch.distributed.all_reduce(total)
    return total.clamp(min=1) / torch.distributed.get_world_size()


def once_per_node(make: Callable[[], T]) -> T:
    """What `make` returns, which the first process of each node alone calls; the others of its node get copies."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if process_count() == 1:
        return make()
    made: T | None = None
    path = None
    try:
        if local_rank == 0:
            made = make()
            if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
                # a file, not a message: NCCL and gloo would hold several copies of it at once
                descriptor, path = tempfile.mkstemp(prefix="rtmdet-fast-")
                with os.fdopen(descriptor, "wb") as file:
                    pickle.dump(made, file, pickle.HIGHEST_PROTOCOL)
        paths = gather(path, process_count())
        if local_rank > 0:
            theirs = paths[torch.distributed.get_rank() - local_rank]
            made = pickle.loads(Path(str(theirs)).read_bytes())
        torch.distributed.barrier()
    finally:
        if path is not None:
            Path(path).unlink(missing_ok=True)
    return made  # type: ignore[return-value]
