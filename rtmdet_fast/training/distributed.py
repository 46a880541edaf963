"""Several processes, as torchrun starts them."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch


def process_count() -> int:
    """Of the processes that torchrun started; 1 for one alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join_processes(device: torch.device) -> tuple[int, int]:
    """Rank and number of the processes that torchrun started, joined; (0, 1) for one alone."""
    world_size = process_count()
    if world_size == 1:
        return 0, 1
    if not torch.distributed.is_initialized():
        # The others wait while the first validates.
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=6))
    return torch.distributed.get_rank(), world_size


def gather(value: Any, world_size: int) -> list[Any]:
    """The value of every process, by rank."""
    values = [value] * world_size
    if world_size > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def any_process(value: bool, device: torch.device) -> bool:
    """Whether it is true of one of the processes, all of which ask at the same time."""
    return bool(greatest(value, device))


def greatest(value: int, device: torch.device) -> int:
    """Of the values of all processes, all of which ask at the same time."""
    if process_count() == 1:
        return value
    values = torch.tensor(int(value), device=device)
    torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
    return int(values)
