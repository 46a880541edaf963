"""When a run writes checkpoints, and which of the older ones stay."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any

from rtmdet_fast.files import write_atomically
from rtmdet_fast.models.detector import Detector
from rtmdet_fast.training.horizon import clock


class Wish(IntEnum):
    """What a process wants after a step; of all processes' wishes the greatest is what all of them do."""

    GO_ON = 0
    CHECKPOINT = 1
    TIME_IS_UP = 2
    STOP = 3
    """A callback's."""
    END = 4
    """A signal's: at once, without a validation."""


class Checkpoints:
    """last.pth of a run and, as last-ITERATION.pth beside it, older ones: `keep` files in all."""

    def __init__(self, last: Path, every: float, keep: int, iteration: int) -> None:
        """every: seconds between two. iteration: that of the last.pth that is there, 0 where there is none."""
        self.last, self.every, self.keep = last, every, keep
        self._iteration = iteration
        self._since = clock()

    @property
    def due(self) -> bool:
        """Whether the newest is `every` seconds old."""
        return clock() - self._since >= self.every

    def write(self, model: Detector, state: Mapping[str, Any]) -> None:
        """Writes last.pth: the averaged weights in `model`, and the state of training. Raises UserError where the
        system refuses; the last.pth before it is there then."""
        iteration = state["iteration"]
        if self.keep > 1 and 0 < self._iteration < iteration and self.last.is_file():
            _copy(self.last, self.last.with_name(f"last-{self._iteration}.pth"))
        older = {number: path for number, path in numbered(self.last.parent).items() if number < iteration}
        for number in sorted(older)[: len(older) - (self.keep - 1)]:
            older[number].unlink(missing_ok=True)
        model.save(self.last, training=state)
        self._iteration, self._since = iteration, clock()


def numbered(folder: Path) -> dict[int, Path]:
    """The older checkpoints in the folder of a run, by their iteration."""
    found = ((re.fullmatch(r"last-(\d+)\.pth", path.name), path) for path in folder.glob("last-*.pth"))
    return {int(match[1]): path for match, path in found if match}


def _copy(path: Path, to: Path) -> None:
    """A second name for the file, which takes no room; where there is no such thing, a copy."""
    to.unlink(missing_ok=True)
    try:
        os.link(path, to)
    except OSError:
        with path.open("rb") as source, write_atomically(to) as target:
            shutil.copyfileobj(source, target)
