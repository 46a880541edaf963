"""Cases that take no time, and a clock of their own, for the tests of the benches."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from benches import harness, run
from benches.harness import Absent, Case, Contender

CPU = torch.device("cpu")


class Clock:
    """Stands in for the module `time`: a reading takes a millisecond, and what costs more adds it to `now`."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1e-3
        return self.now

    monotonic = perf_counter


clock = Clock()


def absent():
    raise Absent("not on this machine")


def not_installed():
    import a_package_that_nobody_has  # noqa: F401


def fails(x):
    raise RuntimeError("no kernel image\nand more lines")


def slow(x):
    clock.now += 0.01
    return 2 * x


def toy(name: str = "doubling", *, headline: bool = True, **others) -> Case:
    named = {"double": lambda x: x + x, "slow": slow, **others}
    return Case(
        op="nms",
        name=name,
        shapes={"x": [1000]},
        inputs=lambda seed: (torch.randn(1000, generator=torch.Generator().manual_seed(seed)),),
        expected=lambda x: (2 * x.double(),),
        compare=lambda result, expected: harness.relative_error(result, expected, 1e-6),
        contenders=[
            *(Contender(name=n, build=lambda f=f: f, result=lambda y: (y,)) for n, f in named.items()),
            Contender(name="absent", build=absent),
            Contender(name="not installed", build=not_installed),
        ],
        headline=headline,
    )


def measure(case: Case, **options):
    return harness.measure(case, CPU, seconds=0, **options)


def measure_all(cases: list[Case], out: Path, *, end: float = math.inf, quick: bool = False) -> None:
    run.measure_all(cases, run.Results(CPU, out, ["nms"], quick=quick), end=end)


def load(path: Path):
    return json.loads(path.read_text())
