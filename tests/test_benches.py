"""The benches' harness and table, on toy contenders."""

from __future__ import annotations

import importlib
import json
import math
import time
from pathlib import Path

import pytest
import torch

from benches import harness, run, table
from benches.harness import Absent, Case, Contender, Parity

CPU = torch.device("cpu")


def absent():
    raise Absent("not on this machine")


def not_installed():
    import a_package_that_nobody_has  # noqa: F401


def fails(x):
    raise RuntimeError("no kernel image\nand more lines")


def slow(x):
    time.sleep(0.01)
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


def test_only_right_results_are_timed():
    record = measure(toy(wrong=lambda x: 2.001 * x, nan=lambda x: x * math.nan, fails=fails, short=lambda x: x[1:]))
    status = {name: entry["status"] for name, entry in record["contenders"].items()}
    assert status == {
        "double": "timed",
        "slow": "timed",
        "wrong": "wrong",
        "nan": "wrong",
        "fails": "failed",
        "short": "wrong",
        "absent": "absent",
        "not installed": "absent",
    }
    for name, entry in record["contenders"].items():
        assert ("call" in entry) == ("memory" in entry) == (status[name] == "timed")
    assert record["ratios"].keys() == {"slow"}
    assert record["contenders"]["wrong"]["why"] == "relative error 5.0e-04, allowed 1e-06"
    assert record["contenders"]["absent"]["why"] == "not on this machine"
    assert record["contenders"]["fails"]["why"] == "no kernel image"
    json.dumps(record, allow_nan=False)


def test_no_ratio_when_ours_is_wrong():
    assert measure(toy(double=lambda x: x))["ratios"] == {}


def test_turns_medians_and_ratios():
    order = []

    def clock(name, times):
        return lambda: order.append(name) or times.pop(0)

    times = harness._turns({"a": clock("a", [1.0, 2, 3]), "b": clock("b", [4.0, 2, 6])}, 0, 3, 9)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert times == {"a": [1, 2, 3], "b": [4, 2, 6]}
    entries = {"a": {"memory": 10}, "b": {"memory": 30}}
    ratio = harness.ratio(entries, {"call": times}, "a", "b")
    assert ratio == {"clock": "call", "time": 2, "q1": 1.5, "q3": 3, "memory": 3}  # of the rounds' ratios 4, 1, 2
    assert harness.ratio(entries, {"call": times, "graph": times}, "a", "b")["clock"] == "graph"
    assert harness.ratio(entries, {"call": times, "graph": {"a": [1.0]}}, "a", "b")["clock"] == "call"
    ratio = harness.ratio({"a": {"memory": 0}, "b": {"memory": 1}}, {"call": times}, "a", "b")
    assert ratio["memory"] is None


def test_rounds_stop_at_the_budget_but_not_before_the_least():
    record = measure(toy(), least=4)
    assert record["contenders"]["slow"]["call"]["rounds"] == record["contenders"]["double"]["call"]["rounds"] == 4
    assert record["contenders"]["slow"]["call"]["median"] >= 10  # ms
    assert record["ratios"]["slow"]["time"] > 1


def test_discrete_results_may_differ_in_a_few_decisions():
    assert harness.few_differ(1, 1000, "boxes") == "1 of 1000 boxes differ"
    with pytest.raises(Parity, match="2 of 1000 boxes differ"):
        harness.few_differ(2, 1000, "boxes")


def test_extra_memory_counts_the_peak_and_not_what_was_there():
    def call(x):
        temporary = torch.ones(8 * 2**20)  # 32 MiB
        return temporary[:1] + x[:1]

    there = torch.ones(16 * 2**20)
    call(there)  # malloc may keep what is freed here: it still counts
    memory = harness._extra_memory(call, (there,), CPU)
    if memory is None:
        pytest.skip("the peak of the resident set cannot be reset here")
    assert 30 * 2**20 < memory < 48 * 2**20


def test_results_are_written_after_every_case(tmp_path: Path, monkeypatch):
    out = tmp_path / "results" / "toy.json"
    written = []
    write = run.write_json
    monkeypatch.setattr(run, "write_json", lambda path, record: (write(path, record), written.append(load(out))))

    def broken(seed):
        raise MemoryError("too large")

    case = toy("too large", headline=False)
    cases = [Case(**{**vars(case), "inputs": broken}), toy("second", headline=False), toy("first")]
    measure_all(cases, out)
    assert [list(record["cases"]) for record in written] == [
        ["nms: first"],
        ["nms: first"],  # the case that failed
        ["nms: first", "nms: second"],
    ]
    assert written[-1]["not_measured"] == {"nms: too large": "MemoryError: too large"}


def test_the_time_limit_is_kept_and_said(tmp_path: Path):
    out = tmp_path / "toy.json"
    measure_all([toy("late")], out, end=-math.inf)
    record = load(out)
    assert record["cases"] == {}
    assert record["not_measured"] == {"nms: late": "the time limit came first"}


def test_a_second_process_adds_its_cases(tmp_path: Path, monkeypatch):
    out = tmp_path / "toy.json"
    measure_all([toy()], out, quick=True)
    for name, value in run.PINNED.items():
        monkeypatch.setenv(name, value)
    measure_all([toy()], out, quick=True)
    cases = load(out)["cases"]
    assert list(cases) == ["nms: doubling", "nms: doubling, malloc not trimming"]
    assert list(cases["nms: doubling, malloc not trimming"]["malloc"].values()) == list(run.PINNED.values())
    measure_all([toy("renamed")], out, quick=True)
    assert list(load(out)["cases"]) == ["nms: doubling", "nms: renamed, malloc not trimming"]
    for name in run.PINNED:
        monkeypatch.delenv(name)
    monkeypatch.setattr(run, "versions", lambda: {"torch": "another"})
    measure_all([toy("new")], out, quick=True)
    assert list(load(out)["cases"]) == ["nms: new"]  # other versions: nothing is mixed


@pytest.mark.parametrize(("malloc", "before", "after"), [("pinned", None, str(2**34)), ("default", "1", None)])
def test_malloc_settings_take_a_new_process(monkeypatch, malloc: str, before: str | None, after: str | None):
    class Replaced(Exception):
        pass

    def execve(program, arguments, environment):
        assert arguments[1:] == ["-m", "benches.run", "--malloc", malloc, "--ops", "nms"]
        assert [environment.get(name) for name in run.PINNED] == [after, after]
        raise Replaced

    monkeypatch.setattr(run.os, "execve", execve)
    for name in run.PINNED:
        if before is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, before)
    with pytest.raises(Replaced):
        run.main(["--malloc", malloc, "--ops", "nms"])


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch):
    out = tmp_path / "toy.json"
    run.write_json(out, {"cases": 1})

    def cut(self, text):
        with self.open("w") as file:
            file.write(text[:3])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", cut)
    with pytest.raises(KeyboardInterrupt):
        run.write_json(out, {"cases": 2})
    assert load(out) == {"cases": 1}


def test_table(tmp_path: Path):
    measure_all([toy(wrong=lambda x: x)], tmp_path / "results" / "toy.json", quick=True)
    table.write(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| doubling | double | slow | call |" in text
    assert "- wrong: not timed, wrong (relative error 5.0e-01, allowed 1e-06)\n" in text
    assert "- absent: not here (not on this machine)\n" in text
    assert "### Assignment\n\nNot measured.\n" in text
    assert "## GPU\n\nNot measured.\n" in text
    assert str(tmp_path) not in text
    assert {path.name for path in tmp_path.iterdir()} == {"results", "README.md"}


def test_table_of_a_gpu():
    time = {"median": 2.0, "q1": 1.9, "q3": 2.1}
    ours = {"status": "timed", "memory": 10**6, "call": time, "graph": time | {"gb_s": 2000.0}}
    peer = ours | {"memory": 4 * 10**6, "graph": time | {"median": 5.0, "gb_s": 800.0}}
    ratio = {"clock": "graph", "time": 2.5, "q1": 2.4, "q3": 2.6, "memory": 4.0}
    case = {"op": "bn_silu", "group": "g", "bytes": 1, "load": 1, "ours": "triton", "ratios": {"eager": ratio}}
    case["contenders"] = {"triton": ours, "eager": peer}
    record = {
        "device": {"type": "cuda", "name": "NVIDIA H200"},
        "versions": {"torch": "2.11.0"},
        "copy_gb_s": 4000.0,
        "not_measured": {"nms: big": "the time limit came first"},
        "cases": {f"bn_silu: {i}": case for i in range(3)},
    }
    text = table.device_section(record)
    row = "| 0 | triton | eager | graph | 2 | 5 | **2.5x** (2.4x to 2.6x) | 1 | 4 | 4x | 2000 | 50% |"
    assert row in text
    assert "- geometric mean of 3 cases, g, against eager: **2.5x**" in text
    assert "Copy bandwidth, measured: 4000 GB/s" in text
    assert "### NMS\n\nNot measured.\n- not measured: big (the time limit came first)" in text


def test_table_without_results(tmp_path: Path):
    table.write(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "## CPU\n\nNot measured.\n" in text and "## GPU\n\nNot measured.\n" in text


@pytest.mark.parametrize("op", run.OPS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_op_has_cases_with_names_of_their_own(op: str, device: str):
    cases = importlib.import_module(f"benches.bench_{op}").cases(torch.device(device))
    assert len({case.name for case in cases}) == len(cases) > 0
    assert all(case.op == op for case in cases)
    for case in cases:
        names = [contender.name for contender in case.contenders]
        assert names[0] == ("triton" if device == "cuda" and op != "pipeline" else "reference")
        assert len(set(names)) == len(names) > 1


def load(path: Path):
    return json.loads(path.read_text())
