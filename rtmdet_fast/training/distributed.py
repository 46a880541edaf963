"""Several processes, as torchrun starts them."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch

from rtmdet_fast.training.config import TrainConfig


def join_processes(config: TrainConfig) -> tuple[int, int]:
    """Rank and number of the processes that torchrun started, joined; (0, 1) for one alone."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return 0, 1
    if not torch.distributed.is_initialized():
        # The others wait while the first validates.
        torch.distributed.init_process_group(
            "nccl" if config.device.startswith("cuda") else "gloo", timeout=timedelta(hours=6)
        )
    return torch.distributed.get_rank(), world_size


def gather(value: Any, world_size: int) -> list[Any]:
    """The value of every process, by rank."""
    values = [value] * world_size
    if world_size > 1:
        torch.distributed.all_gather_object(values, value)
    return values
