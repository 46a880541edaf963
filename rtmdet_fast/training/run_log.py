"""What a training run keeps of itself while it goes: running means, and metrics.csv."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO, TypeVar

import torch

from rtmdet_fast.distributed import mean_over_processes
from rtmdet_fast.errors import UserError
from rtmdet_fast.files import write_atomically

COLUMNS = (
    "epoch",
    "iteration",
    "loss",
    "loss_cls",
    "loss_vfl",
    "loss_bbox",
    "loss_giou",
    "loss_mask",
    "lr",
    "images_per_second",
    "data_wait",
    "AP",
    "AP50",
    "AP75",
    "segm_AP",
    "segm_AP50",
    "segm_AP75",
)
T = TypeVar("T")


class Meter:
    """Means of the losses of all processes, and the pace, since the last reading."""

    def __init__(self) -> None:
        self.seconds_per_step = 0.0
        self.restart()

    def restart(self) -> None:
        """Forget what was not read: time spent elsewhere (validation) is none of the pace."""
        self._losses: dict[str, torch.Tensor] = {}
        self._batches = self._steps = self._images = 0
        self._wait = 0.0
        self._since = time.perf_counter()

    def waited(self, seconds: float) -> None:
        """Time in which the loop stood still for data."""
        self._wait += seconds

    def add(self, losses: dict[str, torch.Tensor], images: int) -> None:
        """Losses of one batch, left on their device."""
        for name, value in losses.items():
            value = value.detach()
            self._losses[name] = self._losses[name].to(value.device) + value if name in self._losses else value
        self._batches += 1
        self._images += images

    def step(self) -> None:
        """The optimiser stepped."""
        self._steps += 1

    def state_dict(self) -> dict[str, Any]:
        """The losses not read yet, so that a resumed run goes on with the same means; the pace starts anew."""
        return {"losses": {name: value.cpu() for name, value in self._losses.items()}, "batches": self._batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`, or from nothing where it is empty. ValueError where it is none."""
        losses, batches = dict(state.get("losses", {})), state.get("batches", 0)
        if not (type(batches) is int and all(isinstance(v, torch.Tensor) and v.ndim == 0 for v in losses.values())):
            raise ValueError("these are no means of losses")
        self.restart()
        self._losses, self._batches = losses, batches

    def read(self) -> dict[str, float]:
        """Means since the last reading, over all processes, which read at the same time; `data_wait` is a share of the
        time of this one."""
        means = mean_over_processes(torch.stack([value.float() for value in self._losses.values()])) / self._batches
        losses = dict(zip(self._losses, means.tolist(), strict=True))
        elapsed = time.perf_counter() - self._since
        self.seconds_per_step = elapsed / max(self._steps, 1)
        pace = {"images_per_second": self._images / elapsed, "data_wait": self._wait / elapsed}
        self.restart()
        return {"loss": sum(losses.values()), **losses, **pace}


class RunLog:
    """metrics.csv of a run; rows past `iteration`, where a resumed run goes on, are dropped, and so is the validation
    there unless it is `validated`.

    All of it raises UserError where the system refuses to write.
    """

    def __init__(self, folder: Path, iteration: int, validated: bool = True):
        self.path = folder / "metrics.csv"
        kept = [row for row in read_metrics(self.path) if _is_upto(row, iteration)] if iteration else []
        if not validated:
            kept = [row for row in kept if row["lr"] or int(row["iteration"]) < iteration]
        text = io.StringIO(newline="")
        _writer(text).writeheader()
        _writer(text).writerows(kept)
        with write_atomically(self.path) as file:  # a crash now must not cost the rows there are
            file.write(text.getvalue().encode())

    def write(self, row: dict[str, Any]) -> None:
        """One row: `epoch` and `iteration`, and the values that there are."""
        try:
            with self.path.open("a", newline="") as file:  # a run that fails leaves nothing open
                _writer(file).writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error


def _is_upto(row: dict[str, str], last: int) -> bool:
    # a row that a crash cut off lacks its last columns, and of its iteration perhaps digits
    whole = None not in row.values() and {"iteration", "lr"} <= row.keys()
    return whole and row["iteration"].isdecimal() and int(row["iteration"]) <= last


def _writer(file: TextIO) -> csv.DictWriter[str]:
    return csv.DictWriter(file, COLUMNS, extrasaction="ignore")


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Rows of a metrics.csv; none where it is not there. UserError where it is something else."""
    if not path.exists():
        return []
    try:
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: move it away, and the run goes on without its rows") from error


def timed(items: Iterator[T], meter: Meter) -> Iterator[T]:
    """The items, with the time that getting each took told to the meter."""
    while True:
        started = time.perf_counter()
        try:
            item = next(items)
        except StopIteration:
            return
        meter.waited(time.perf_counter() - started)
        yield item
