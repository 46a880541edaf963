"""Other values of the constants at the top of the kernels' files (`TUNING`), one at a time: which would be faster?

Each number that a case's launch reads is halved and doubled; of a tuple each number, and of a pair also one for the
other; a choice between two ways is taken the other way. First every value is tried and its result compared, in
processes side by side, since each compiles a kernel anew; then what was right is timed, the values of a constant in
turns. `python -m benches.gpu kernels` does both.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benches import harness
from benches.harness import Case
from benches.run import Results
from rtmdet_fast.kernels import _dispatch

MOST_CASES = 2
"""Of a group of headline cases, those that are swept: the first."""
GAIN = 0.02
"""Of the time, from which on another value is suggested."""

Path = tuple[str, ...]
"""Of a constant: its module, and keys in TUNING."""
Row = dict[str, Any]


class Watched(dict):
    """A TUNING that notes which of its numbers are read, in dicts within it too."""

    def __init__(self, content: dict[str, Any], path: Path, read: dict[Path, Any]):
        super().__init__(
            {key: Watched(x, (*path, key), read) if isinstance(x, dict) else x for key, x in content.items()}
        )
        self.path, self.read = path, read

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if not isinstance(value, Watched):
            self.read[(*self.path, key)] = value
        return value

    # with an own iterator, `**` and dict() ask for each item
    def __iter__(self) -> Iterator[str]:
        return super().__iter__()


@functools.cache
def modules() -> dict[str, Any]:
    """By name, those that have a TUNING."""
    return {
        path.stem: importlib.import_module(f"rtmdet_fast.kernels.{path.stem}")
        for path in sorted(pathlib.Path(_dispatch.__file__).parent.glob("*.py"))
        if "\nTUNING" in path.read_text()
    }


def read_by(call: Callable[[], Any]) -> dict[Path, Any]:
    """The constants that a call reads, and their values, as they come."""
    read: dict[Path, Any] = {}
    with contextlib.ExitStack() as kept:
        for name, module in modules().items():
            kept.callback(setattr, module, "TUNING", module.TUNING)
            module.TUNING = Watched(module.TUNING, (name,), read)
        call()
    return read


@contextlib.contextmanager
def changed(path: Path, value: Any) -> Iterator[None]:
    """Within it a constant has another value."""
    name, *keys, last = path
    module = modules()[name]
    before, module.TUNING = module.TUNING, copy.deepcopy(module.TUNING)
    place = module.TUNING
    for key in keys:
        place = place[key]
    place[last] = value
    try:
        yield
    finally:
        module.TUNING = before


def others(value: Any) -> list[Any]:
    """The values to try in place of one."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value // 2, 2 * value] if value > 1 else [2 * value] if value == 1 else []
    if not (isinstance(value, tuple) and all(isinstance(x, int) and not isinstance(x, bool) for x in value)):
        return []
    found = [(*value[:i], x, *value[i + 1 :]) for i in range(len(value)) for x in others(value[i])]
    if len(value) == 2:
        found += [(a, b) for a, b in ((value[0] // 2, 2 * value[1]), (2 * value[0], value[1] // 2)) if a and b]
    return found


def swept(cases: Sequence[Case]) -> list[Case]:
    """Those that other values are tried on: the first headline cases of each group, or by themselves."""
    count: dict[str | None, int] = {}
    found = []
    for case in cases:
        count[case.group] = count.get(case.group, 0) + 1
        if case.headline and count[case.group] <= MOST_CASES:
            found.append(case)
    return found


def checked(some: Sequence[Case], cases: Sequence[Case], device: torch.device, *, quick: bool = False) -> Iterator[Row]:
    """Of those of `cases` that are in `some` the constants, one after the other, with a verdict on each other value.

    A constant is told of before it is tried, so that what ends the process is known by its having no verdicts.
    """
    names = {case.name for case in some}
    for case in cases:
        if case.name not in names:
            continue
        inputs, contender = case.inputs(0), case.contenders[0]
        expected = harness.exact(case, inputs)
        call = contender.build()
        constants = read_by(lambda call=call, inputs=inputs: call(*inputs))  # type: ignore[misc]
        for path, value in list(constants.items())[: 1 if quick else None]:
            row = {"constant": named(path), "now": value, "op": case.op, "case": case.name, "verdicts": {}}
            yield row
            for other in others(value):
                with changed(path, other):
                    try:
                        told = "right: " + case.compare(contender.result(call(*inputs)), expected)
                    except harness.Parity as error:
                        told = f"wrong: {error}"
                    except Exception as error:  # too many registers, too much shared memory, not a power of two
                        told = f"failed: {harness._first_line(error)}"
                row["verdicts"][shown(other)] = told
                yield row


def named(path: Path) -> str:
    return f"{path[0]}: {' '.join(map(str, path[1:]))}"


def shown(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def keep(rows: dict[str, Row], row: Row) -> None:
    """Adds what `checked` tells to the record of a run: by constant, and of it by case."""
    found = rows.setdefault(row["constant"], {"now": row["now"], "op": row["op"], "cases": {}})
    found["cases"][f"{row['op']}: {row['case']}"] = {"verdicts": row["verdicts"], "times": {}}


def measure(cases: Sequence[Case], results: Results, end: float) -> None:
    """Times what was found right, writing the file after each constant, until `time.monotonic()` is past `end`."""
    rows: dict[str, Row] = results.record["sweep"]
    for case in cases:
        key = results.key(case)
        wanted = [name for name, row in rows.items() if key in row["cases"]]
        if not wanted or time.monotonic() > end:
            continue
        inputs = harness.input_sets(case, results.device)
        call = case.contenders[0].build()
        constants = {named(path): path for path in read_by(lambda call=call, sets=inputs: call(*sets[0]))}  # type: ignore[misc]
        for name in wanted:
            if time.monotonic() > end:
                break
            if name in constants:
                entry = rows[name]["cases"][key]
                entry["times"] = timed(case, call, constants[name], rows[name], entry, inputs, results)
                results.write()
                print(f"{name}, {key}: {entry['times']}", flush=True)


def timed(
    case: Case,
    call: Callable[..., Any],
    path: Path,
    row: Row,
    entry: dict[str, Any],
    inputs: Sequence[tuple[Any, ...]],
    results: Results,
) -> dict[str, float]:
    """Milliseconds by value, the present one first."""
    now = row["now"] if not isinstance(row["now"], list) else tuple(row["now"])
    values = [now, *(x for x in others(now) if entry["verdicts"].get(shown(x), "").startswith("right"))]

    def with_value(value: Any) -> Callable[..., Any]:
        def run(*sets: Any) -> Any:
            with changed(path, value):
                return call(*sets)

        return run

    cuda, clocks = results.device.type == "cuda", {}
    for value in values:
        if cuda and case.contenders[0].graph:
            try:
                clocks[shown(value)] = harness._graph_clock(with_value(value), inputs)
            except RuntimeError:
                continue
        else:
            wait = torch.cuda.synchronize if cuda else lambda: None
            clocks[shown(value)] = harness._call_clock(with_value(value), inputs, wait, [])
    quick = results.record["quick"]
    samples = harness._turns(clocks, 0.05 if quick else 0.3, 3 if quick else 10, 30)
    del clocks
    if cuda:
        torch.cuda.empty_cache()
    return {value: 1e3 * statistics.median(times) for value, times in samples.items()}


def suggestion(row: Row) -> tuple[str, float] | None:
    """The value that would be fastest, and how many times as fast as the present one, by the cases' geometric mean.

    Of those that were timed in all cases in which the present one was; None where nothing was timed.
    """
    now = shown(tuple(row["now"]) if isinstance(row["now"], list) else row["now"])
    tables = [case["times"] for case in row["cases"].values() if now in case["times"]]
    if not tables:
        return None
    everywhere = set.intersection(*(set(times) for times in tables))
    speed = {value: statistics.geometric_mean([times[now] / times[value] for times in tables]) for value in everywhere}
    best = max(speed, key=lambda value: speed[value])
    return (best, speed[best]) if speed[best] > 1 + GAIN else (now, 1.0)
