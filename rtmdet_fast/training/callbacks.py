"""What is told of a training while it goes, to those who listen, and how they end it."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rtmdet_fast.models.detector import Detector

if TYPE_CHECKING:
    from rtmdet_fast.training.config import Settings, TrainResult


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands, after a step or an epoch."""

    epoch: int
    """From 1: the one that the step belongs to, or that is over."""
    epochs: int
    """Of the run, as it is planned now: `--time` and `--patience` bring the end nearer."""
    iteration: int
    """Steps of the optimiser so far, those before a `--resume` too."""
    iterations: int
    """Steps of the run, as it is planned now."""
    lr: float
    """Base learning rate of the last step."""
    losses: Mapping[str, Tensor]
    """Of the last batch of this process, scalars where they were computed: to read one is to wait for the GPU."""
    metrics: Mapping[str, float]
    """After every tenth step the row of metrics.csv, else nothing; after an epoch its mean `loss`, and the figures of a
    validation where there was one."""
    model: Detector
    """With the averaged weights, in eval mode; those that are validated and kept."""
    stop: Callable[[], None]
    """Ends the run, in good order: after this step or epoch, with all that `--resume` needs in last.pth."""


class Callback:
    """Derive from it what is to be told of a run, and override what it wants to hear.

    Of several processes the first alone tells. Random numbers that are drawn here change none of the run's. What is
    raised ends the run, except of a `Logger`.
    """

    def on_start(self, settings: Settings, iteration: int) -> None:
        """Before the first step; `iteration` steps were done before, where a run is resumed."""

    def on_step(self, progress: Progress) -> None:
        """After each step of the optimiser."""

    def on_epoch(self, progress: Progress) -> None:
        """After each epoch: it was validated, where that was due, and last.pth and best.pth are written."""

    def on_end(self, result: TrainResult) -> None:
        """After the last one, with what `train` returns; not where the run ends in an error."""


class Logger(Callback):
    """A callback that a run can do without: what it raises is told once, as a warning, and the run goes on."""


class Callbacks:
    """Those of a run, told together."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        for callback in callbacks:
            if not isinstance(callback, Callback):
                raise TypeError(f"{callback!r} is no rtmdet_fast.training.callbacks.Callback")
        self._callbacks = list(callbacks)
        self._warned: set[int] = set()
        self.stopped = False
        """Whether one of them asked for the end."""

    def stop(self) -> None:
        self.stopped = True

    def tell(self, event: str, *arguments: Any) -> None:
        """Calls the method of that name of each."""
        if not self._callbacks:
            return
        with random_numbers_kept():
            for callback in list(self._callbacks):
                self._tell(callback, event, *arguments)

    def _tell(self, callback: Callback, event: str, *arguments: Any) -> None:
        try:
            getattr(callback, event)(*arguments)
        except Exception as error:
            if not isinstance(callback, Logger):
                raise
            if id(callback) not in self._warned:
                self._warned.add(id(callback))
                told = " ".join(str(error).split()) or type(error).__name__
                warnings.warn(f"{type(callback).__name__} failed, and the training goes on: {told}", stacklevel=4)
            if event == "on_start":  # it has nothing to write to
                self._callbacks.remove(callback)


@contextmanager
def random_numbers_kept() -> Iterator[None]:
    """Leaves the state of all generators as it was."""
    python, numpy, torch_states = random.getstate(), np.random.get_state(), random_states()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        set_random_states(torch_states)


def random_states() -> list[Tensor]:
    """Of torch's generators: the CPU's, and the current GPU's where one is in use."""
    gpu = [torch.cuda.get_rng_state()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *gpu]


def set_random_states(states: Sequence[Tensor]) -> None:
    """Those of `random_states`."""
    torch.set_rng_state(states[0])
    if len(states) > 1 and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[1])
