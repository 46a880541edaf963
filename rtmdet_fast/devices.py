"""The device that a run uses."""

from __future__ import annotations

import os

import torch

from rtmdet_fast.errors import UserError


def pick_device(name: str) -> torch.device:
    """The torch device of a `--device` argument; a GPU becomes the current one."""
    if name in ("auto", "cuda"):
        local = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"  # which torchrun sets, one process to a GPU
        name = local if name == "cuda" or torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # "meta" has no values
    except (RuntimeError, AssertionError, ImportError) as error:  # the last where a backend is a package of its own
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"--device {name!r} cannot be used here: {reason}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where NCCL gathers objects
    return device
