"""What every loader process does first, and what is done about one that ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import TypeVar

import cv2

T = TypeVar("T")
NOTICED_AFTER = 1.0
"""Seconds in which PyTorch hears that a loader process ended, and how."""


def init_worker(worker_id: int) -> None:
    """For DataLoader(worker_init_fn=...): one thread, or OpenCV's fight over the cores; and its parent alone ends it.

    A terminal sends Ctrl-C, and SLURM or systemd SIGTERM, to all processes of a run: a worker that ends by it leaves
    the run without the batches of the step that it means to finish.
    """
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None and hasattr(signal, "sigwaitinfo"):  # macOS and Windows lack it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, args=(parent.pid,), daemon=True).start()


def handed_over(batches: Iterator[T]) -> Iterator[T]:
    """The batches of a loader; of a process that ends while it hands one over PyTorch's own error is raised, in which
    stands how it ended."""
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (ConnectionError, EOFError):
            time.sleep(NOTICED_AFTER)  # PyTorch's handler of SIGCHLD raises in here
            raise
        yield batch


def _end_with_parent(parent: int | None) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
