"""Decoded images kept in memory that loader processes share, as many as there is room for."""

from __future__ import annotations

import multiprocessing
import re
import shutil
from pathlib import Path

import numpy as np
import torch

from rtmdet_fast.errors import UserError

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
SHARED_MEMORY = Path("/dev/shm")
"""Where Linux keeps it; a container has 64 MB of it, if not told otherwise."""


def bytes_of(amount: str) -> int | None:
    """Of 8GB, 500MB or 2GiB; None for ram, as much as is sensible. UserError where it is none of these."""
    if amount == "ram":
        return None
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?B)", amount.strip().upper())
    if not parts or not (size := int(float(parts[1]) * UNITS[parts[2]])):
        raise UserError(f"--cache {amount} is no amount of memory; ram, or one such as 8GB, is expected")
    return size


def room_for_images(amount: str, processes: int = 1) -> int:
    """Bytes that a cache of each of `processes` may take: of the amount asked for, or of half of the free memory.

    Either way no more than nine tenths of what the system lets processes share.
    """
    asked = bytes_of(amount)
    if asked is None:
        asked = _available() // 2
    if SHARED_MEMORY.is_dir():
        asked = min(asked, shutil.disk_usage(SHARED_MEMORY).free * 9 // 10)
    return asked // processes


def _available() -> int:
    """Bytes of memory that could be had, by what the system and a container around tell; else 4 GiB."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return 2**32
    try:
        return min(available, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # there is no container, or it may take all ("max")
        return available


class ImageCache:
    """Images [H, W, 3] uint8 by index, in one block of `capacity` bytes shared by all processes that hold the object.

    The first ones to come stay, until it is full: in a random order every image is as likely as any other to be wanted
    next, and one that makes room for another gains nothing.
    """

    def __init__(self, length: int, capacity: int) -> None:
        """length: number of images. Raises MemoryError where the system refuses so many bytes."""
        try:
            # share_memory_ would copy a tensor that was there before, and so need the room twice
            self._block = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(capacity))
        except (RuntimeError, MemoryError, OSError) as error:
            raise MemoryError(f"the system has no {capacity / 1e9:.1f} GB to share") from error
        # offset in the block, height, width; offset -1 for what is not there
        self._entries = torch.full((length, 3), -1, dtype=torch.int64).share_memory_()
        self._used = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._lock = multiprocessing.get_context().Lock()

    @property
    def used(self) -> int:
        """Bytes that images take so far."""
        return int(self._used)

    def __len__(self) -> int:
        """Images that are in it."""
        return int((self._entries[:, 0] >= 0).sum())

    def get(self, index: int) -> np.ndarray | None:
        """A copy of the image; None where it is not there."""
        with self._lock:
            offset, height, width = self._entries[index].tolist()
        if offset < 0:
            return None
        size = height * width * 3
        return self._block[offset : offset + size].numpy().reshape(height, width, 3).copy()

    def put(self, index: int, image: np.ndarray) -> None:
        """Keeps the image, if there is room. Two processes may do so at once: both copies are the same."""
        height, width = image.shape[:2]
        with self._lock:
            offset = int(self._used)
            if offset + image.size > len(self._block):
                return
            self._used += image.size
        self._block[offset : offset + image.size] = torch.from_numpy(np.ascontiguousarray(image)).flatten()
        with self._lock:
            self._entries[index] = torch.tensor([offset, height, width])
