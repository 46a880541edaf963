"""A disk without room: no file of this process grows beyond a size, or none takes a byte."""

import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

resource = pytest.importorskip("resource")


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """In the block, writing past `size` bytes of any file raises OSError, as writing to a full disk does."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@contextmanager
def no_space() -> Iterator[None]:
    """In the block, writing to temporary files, which become those with names, raises the system's ENOSPC."""
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full here")
    make = tempfile.mkstemp

    def made_full(*args, **kwargs):
        descriptor, path = make(*args, **kwargs)
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, descriptor)
        os.close(full)
        return descriptor, path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "mkstemp", made_full)
        yield
