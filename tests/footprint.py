"""What a process and its children hold of the machine, sampled while they work."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

if not Path("/proc/self/smaps_rollup").exists():
    pytest.skip("memory is read from /proc, which Linux alone has", allow_module_level=True)


class Footprint(NamedTuple):
    memory: int
    """Bytes, of pages that processes share each one's part; without files' own, which a library's are: their part
    grows where another process of the machine ends."""
    files: int
    threads: int


class Watch:
    """Footprints over a piece of work, of which the first fifth is warm-up."""

    def __init__(self) -> None:
        self.samples: list[Footprint] = []

    def look(self) -> None:
        processes = [os.getpid(), *_children(os.getpid())]
        found = [sample for pid in processes if (sample := _footprint(pid)) is not None]
        self.samples.append(Footprint(*map(sum, zip(*found, strict=True))))

    def growth(self) -> dict[str, float]:
        """How much more the most of the last fifth is than the most of the second, as a share of it."""
        fifth = len(self.samples) // 5
        early, late = (
            Footprint(*map(max, zip(*part, strict=True)))
            for part in (self.samples[fifth : 2 * fifth], self.samples[-fifth:])
        )
        return {name: getattr(late, name) / getattr(early, name) - 1 for name in Footprint._fields}

    def told(self) -> str:
        """The figures of the end of warm-up and of the end."""
        at = (self.samples[len(self.samples) // 5], self.samples[-1])
        return ", ".join(
            f"{name} {first / scale:.0f} -> {last / scale:.0f}{unit}"
            for name, first, last, scale, unit in zip(Footprint._fields, *at, (1e6, 1, 1), (" MB", "", ""), strict=True)
        )

    def assert_constant(self) -> None:
        growth = self.growth()
        assert growth["memory"] < 0.05 and growth["files"] <= 0 and growth["threads"] <= 0, self.told()


def _children(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            yield child
            yield from _children(child)


def _footprint(pid: int) -> Footprint | None:
    """None where the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        memory = sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
        return Footprint(memory, len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task")))
    except OSError:
        return None
