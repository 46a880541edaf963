"""The benches' harness, on toy contenders: parity before time, rounds, ratios, memory."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from toy_cases import CPU, clock, fails, measure, slow, toy

from benches import harness
from benches.harness import Contender, Parity


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

    def told(name, times):
        return lambda: order.append(name) or times.pop(0)

    times = harness._turns({"a": told("a", [1.0, 2, 3]), "b": told("b", [4.0, 2, 6])}, 0, 3, 9)
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
    assert record["contenders"]["slow"]["call"]["median"] == pytest.approx(12)  # ms, of which 2 are readings
    assert record["ratios"]["slow"]["time"] == pytest.approx(6)
    record = harness.measure(toy(), CPU, seconds=1, least=4)
    assert 4 < record["contenders"]["slow"]["call"]["rounds"] < 1 / 0.012


def test_the_host_clock_ends_where_the_call_returns():
    def wait():
        clock.now += 0.1

    until_return = []
    read = harness._call_clock(slow, [(torch.ones(1),)], wait, until_return)
    assert read() == pytest.approx(0.112) and until_return == [pytest.approx(0.011)]


def test_float64_is_computed_without_looking_for_the_fastest_algorithm(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    found = []
    case = replace(toy(), expected=lambda x: found.append(torch.backends.cudnn.benchmark) or (2 * x.double(),))
    assert measure(case)["contenders"]["double"]["status"] == "timed" and harness.verify(case, CPU).startswith("right")
    assert found == [False, False] and torch.backends.cudnn.benchmark


def test_what_warms_up_first_is_not_timed_before():
    calls = []
    case = toy()
    contender = Contender(
        name="warm", build=lambda: lambda x: calls.append(1) or 2 * x, result=lambda y: (y,), warm_up=4
    )
    assert measure(replace(case, contenders=[contender]), least=2)["contenders"]["warm"]["call"]["rounds"] == 2
    assert len(calls) == 1 + 4 + 1 + 2  # what is looked at, warm-up, memory, rounds


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
