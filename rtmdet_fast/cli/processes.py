"""How one of several processes, as torchrun starts them, ends: with its own reason, or without a word."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

ALIKE_SECONDS = 2.0
"""In which torchrun ends a process whose first one met the same error, and told it."""
ENDED_SECONDS = 20.0
"""Likewise a process that another one has left; it ends by itself after them, where torchrun is elsewhere."""


def is_several() -> bool:
    """Whether torchrun started more than this process."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def tell_of_failure(reason: str) -> None:
    """To torchrun, whose last words then have it; from a process that is not its node's first one, no sooner than the
    first had the time to tell the same."""
    if not is_several():
        return
    failed_at = int(time.time())
    if os.environ.get("LOCAL_RANK") != "0":
        _wait_for_the_end(ALIKE_SECONDS)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with open(file, "w") as out:
            json.dump({"message": reason, "timestamp": failed_at}, out)


def was_left(error: Exception) -> bool:
    """Whether an error says no more than that another process is gone."""
    if not is_several():
        return False
    from torch.distributed import DistError

    told = ("gloo/transport", "by peer", "ncclRemoteError", "Broken pipe")
    return isinstance(error, (RuntimeError, DistError)) and any(words in str(error) for words in told)


def wait_for_the_end() -> None:
    """Of a process that was left: torchrun is to see first the one that failed, and then ends this one."""
    _wait_for_the_end(ENDED_SECONDS)
    print("error: another process of this run has ended; it or torchrun tells why", file=sys.stderr)


def leave_the_others(code: int) -> None:
    """In good order, as NCCL wants it, at the end of a program; where it failed, torchrun sees to it."""
    if is_several() and code == 0:
        from torch import distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()


def _wait_for_the_end(seconds: float) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun's, which has nothing to wait for any more
    time.sleep(seconds)
