"""The benches under pytest-benchmark: `pytest benches --benchmark-only -k "training and tiny"`.

The contenders of a case are timed in turns, by the harness, before the first of them is reported: pytest-benchmark
alone would time one after the other. It is handed the measured times through the clock; its tables, `--benchmark-json`
and `--benchmark-compare` work on them. results/<device>.json and README.md are written as by `python -m benches.run`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benches import run, table

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = run.cases_of(run.OPS, DEVICE)


class Replay:
    """A clock that `step` moves on by the next of the measured times."""

    def __init__(self) -> None:
        self.now = 0.0
        self.samples: Iterator[float] = iter(())

    def __call__(self) -> float:
        return self.now

    def step(self) -> None:
        self.now += next(self.samples)


replay = Replay()


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Iterator[Any]:
    """From a case to its entry and samples, measured once."""
    cases = (item.callspec.params["case"] for item in request.session.items)
    selected = {(case.op, case.name): case for case in cases}
    out, quick = (request.config.getoption(name) for name in ("--bench-out", "--bench-quick"))
    only = None if len(selected) == len(CASES) else list(selected.values())
    results = run.Results(DEVICE, out or run.committed(DEVICE), run.OPS, quick=quick, only=only)
    found: dict[str, Any] = {}

    def once(case: Any) -> Any:
        key = results.key(case)
        if key not in found:
            found[key] = results.measure(case)
        return key, *found[key]

    yield once
    if out is None:
        table.write(run.FOLDER)


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize(
    ("case", "contender"),
    [
        pytest.param(case, contender.name, id=f"{case.op}: {case.name}: {contender.name}")
        for case in CASES
        for contender in case.contenders
    ],
)
def test_case(benchmark: Any, measured: Any, case: Any, contender: str) -> None:
    key, entry, samples = measured(case)
    assert entry is not None, "could not be measured"
    found = entry["contenders"][contender]
    if found["status"] == "absent":
        pytest.skip(found["why"])
    assert found["status"] == "timed", f"{found['status']}: {found['why']}"
    clock = "graph" if contender in samples.get("graph", {}) else "call"
    benchmark.group = f"{key} [{clock}]"
    benchmark.extra_info.update({name: found[name] for name in ("parity", "memory")}, clock=clock)
    replay.samples = iter(samples[clock][contender])
    benchmark.pedantic(replay.step, rounds=len(samples[clock][contender]), iterations=1)
