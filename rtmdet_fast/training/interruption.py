"""SIGTERM and Ctrl-C, which end a run after its step and with a checkpoint of it."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, NoReturn

from rtmdet_fast.training.horizon import clock

ONE_PRESS = 1.0
"""Seconds in which a Ctrl-C may come twice: from the terminal, and handed on by torchrun."""


class Terminated(SystemExit):
    """A run was ended by SIGTERM, in good order; a program that does not catch it ends with the exit code 143."""


class Interruption:
    """In the block, SIGTERM raises Terminated and SIGINT KeyboardInterrupt; at once, or where `hold` was called, with
    `release`. What comes after the first is not heard, except a second Ctrl-C, which is at once.

    A program's own handlers are left alone, and so is every signal where the block is not in the main thread.
    """

    def __init__(self) -> None:
        self.arrived: int | None = None
        """The number of the first signal."""
        self._since = 0.0
        self._held = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
                if signal.getsignal(number) == default:
                    self._before[number] = signal.signal(number, self._arrive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def hold(self) -> None:
        """From here on a signal waits."""
        self._held = True

    def release(self) -> None:
        """Raises where a signal waits, and from here on for any that comes."""
        self._held = False
        if self.arrived is not None:
            self.end()

    def end(self) -> NoReturn:
        """Raises what the signal stands for; where it came to another process, that is SIGTERM's."""
        if self.arrived == signal.SIGINT:
            raise KeyboardInterrupt
        raise Terminated(128 + signal.SIGTERM)

    def _arrive(self, number: int, _: FrameType | None) -> None:
        if self.arrived is None:
            self.arrived, self._since = number, clock()
            if self._held:
                return
        elif number != signal.SIGINT or clock() - self._since < ONE_PRESS:
            return
        self.end()
