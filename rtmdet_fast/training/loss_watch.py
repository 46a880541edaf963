"""Losses that are no numbers, which end a run with the batch that made them kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from rtmdet_fast.data.augment import Batch
from rtmdet_fast.errors import UserError
from rtmdet_fast.models.checkpoint import save_atomically


class LossWatch:
    """Looks at the loss of each batch one batch late, which keeps the host one batch ahead of the device."""

    def __init__(self, out: Path):
        """out: the folder of the run."""
        self._path = out / "nan_batch.pt"
        self._previous: tuple[Callable[[], float], Batch, Sequence[str]] | None = None

    def add(self, loss: torch.Tensor, batch: Batch, files: Sequence[str]) -> None:
        """The next to be looked at: the loss, a scalar on the device, of a batch, and the names of its images."""
        self._previous = _on_its_way(loss), batch, files

    def check(self, iteration: int) -> None:
        """Raise UserError where the loss of the batch before is not finite, with that batch kept for inspection."""
        if self._previous is None or math.isfinite(value := self._previous[0]()):
            return
        kept = self.keep(*self._previous[1:], iteration)
        raise UserError(f"the loss is {value} near iteration {iteration}; {kept} (a lower --lr or --amp none may help)")

    def forget(self) -> None:
        """The batch that was looked at last."""
        self._previous = None

    def keep(self, batch: Batch, files: Sequence[str], iteration: int) -> str:
        """Write a batch and the names of its images for inspection, and say where."""
        tensors = {k: v.cpu() for k, v in asdict(batch).items() if v is not None}
        save_atomically({"iteration": iteration, "files": list(files), **tensors}, self._path)
        return f"the batch, with the names of its images, is in {self._path}, the last good weights in last.pth"


def _on_its_way(value: torch.Tensor) -> Callable[[], float]:
    """Sends a scalar to the host; what is returned waits for it, but, unlike `item`, for no work queued later."""
    if not value.is_cuda:
        return value.item
    host, arrived = value.to("cpu", non_blocking=True), torch.cuda.Event()  # into page-locked memory
    arrived.record()

    def wait() -> float:
        arrived.synchronize()
        return host.item()

    return wait
