"""The benches' harness and table, on toy contenders."""

from __future__ import annotations

import importlib
import io
import itertools
import json
import math
import os
import subprocess
import sys
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from benches import (
    assigners,
    bench_deformable_attention,
    bench_postprocess,
    bench_predict,
    bench_rtdetr,
    bench_training,
    chart,
    compare,
    gpu,
    gpu_page,
    harness,
    machine_code,
    models,
    run,
    sweep,
    table,
)
from benches.harness import Absent, Case, Contender, Parity

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


@pytest.fixture(autouse=True)
def no_test_waits_for_a_real_clock(monkeypatch):
    for module in (harness, run, gpu, sweep):
        monkeypatch.setattr(module, "time", clock)


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
    results = run.Results(CPU, out, ["nms"], quick=True, only=[toy("another")])
    assert list(results.record["cases"]) == ["nms: doubling", "nms: renamed, malloc not trimming"]
    assert list(run.Results(CPU, out, ["nms"], quick=True, only=[toy()]).record["cases"]) == [
        "nms: renamed, malloc not trimming"
    ]
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
    assert {path.name for path in tmp_path.iterdir()} - {"pictures"} == {"results", "README.md"}


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
    assert "### Layers\n\nNot measured." in text
    assert "### Layers" not in table.device_section(record, elsewhere={"layers"})


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
        assert names[0] == (
            "predictor"
            if (device, op) == ("cuda", "predict")
            else "triton"
            if device == "cuda" and op not in ("pipeline", "matcher", "engines")
            else "reference"
        )
        assert len(set(names)) == len(names) > 1


def test_a_training_step_in_plain_pytorch_is_the_same_step():
    """What a GPU machine has as peers; mmdet's is compared where it is installed, by the benches themselves."""
    inputs = (models.pictures(2, 64, CPU, 0), *models.objects(2, 5, 3, 64, CPU, 0))
    expected = bench_training.checked(bench_training.Step("nano", 3, CPU, torch.float64)(*inputs))
    for backend in (lambda step: step, models.plain, partial(models.plain, per_image=True)):
        step = bench_training.Step("nano", 3, CPU, torch.float32, backend=backend)
        found = bench_training.checked(step(*inputs))
        assert "losses: relative error" in bench_training.compare(found, expected, (1e-4, 1e-2))
        assert not torch.equal(step(*inputs)[1], found[0])  # it does step
    wrong = (found[0] * 1.01, found[1])
    with pytest.raises(Parity):
        bench_training.compare(wrong, expected, (1e-3, 1e-2))


def test_a_step_under_autocast_is_judged_by_its_losses_and_its_float32_gradients():
    case = bench_training._step(CPU, "nano", 2, 64, 3, torch.bfloat16)
    inputs = case.inputs(0)
    expected = case.expected(*inputs)
    contender = case.contenders[0]
    losses, found = contender.result(contender.build()(*inputs))
    assert (losses - expected[0]).abs().max() > 1e-3  # bfloat16: few pixels and objects, far off
    with pytest.raises(Parity):
        case.compare((losses, found), expected)
    assert "gradients: relative error" in case.compare((expected[0], found), expected)
    with pytest.raises(Parity):
        case.compare((expected[0], 1.1 * found), expected)
    assert case.compare((expected[0], None), expected).endswith("gradients not compared")


def test_post_processing_in_plain_pytorch_finds_the_same():
    (case,) = [case for case in bench_postprocess.cases(CPU) if case.name.startswith("1 image")]
    levels = case.inputs(0)
    expected = case.expected(*levels)
    assert len(expected[0]) == 300
    assert case.compare(bench_postprocess.eager(*levels), expected).startswith("0 of 300")
    with pytest.raises(Parity):
        case.compare([expected[0] + torch.tensor([1.0, 0, 0, 0, 0, 0])], expected)
    with pytest.raises(Parity):
        case.compare([expected[0][:0]], expected)


def ratio_record(low: float, high: float, **others):
    ratio = {"clock": "call", "time": (low + high) / 2, "q1": low, "q3": high}
    timed = {"status": "timed"}
    case = {"ours": "mine", "contenders": {"mine": timed, "eager": timed}, "ratios": {"eager": ratio}} | others
    return {"versions": {"torch": "1"}, "cases": {"nms: a": case}}


def test_compare_tells_what_got_slower_by_more_than_the_spread(tmp_path: Path, capsys):
    old, same, slower = ratio_record(2.0, 2.2), ratio_record(1.9, 2.1), ratio_record(1.4, 1.6)
    assert compare.slower_cases(same, old) == ([], 1)
    (line,), compared = compare.slower_cases(slower, old)
    assert line == "nms: a: 1.5x (1.4x to 1.6x) of eager's speed, was 2.1x (2x to 2.2x)" and compared == 1
    assert compare.slower_cases(old, slower) == ([], 1)  # faster
    # a second peer that did not get ahead: the first is what got faster
    for record in (old, slower):
        record["cases"]["nms: a"]["ratios"]["mmdet"] = ratio_record(3, 3.5)["cases"]["nms: a"]["ratios"]["eager"]
    assert compare.slower_cases(slower, old) == ([], 1)
    wrong = {"mine": {"status": "wrong", "why": "no"}, "eager": {"status": "timed"}}
    assert compare.slower_cases(ratio_record(2, 3, contenders=wrong, ratios={}), old) == (["nms: a: wrong now, no"], 1)
    assert compare.slower_cases(ratio_record(1, 1, ratios={}), old) == ([], 0)

    for name, record in (("old", ratio_record(2.0, 2.2)), ("same", same), ("slower", ratio_record(1.4, 1.6))):
        (tmp_path / name).write_text(json.dumps(record))
    for name, code in (("same", 0), ("slower", 1)):
        with pytest.raises(SystemExit) as exit:
            compare.main([str(tmp_path / name), str(tmp_path / "old")])
        assert exit.value.code == code
    assert "1 of 1 cases that both runs have are slower" in capsys.readouterr().out


def test_the_picture_has_a_bar_for_each_peer(tmp_path: Path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from matplotlib.image import imread

    chart.draw(
        tmp_path / "a.png", "NMS", [("slower", (0.5, 0.4, 0.6)), ("even", (1, 0.9, 1.1)), ("ahead", (30, 28, 35))]
    )
    image = imread(tmp_path / "a.png")[..., :3]
    for color in (chart.AHEAD, chart.BEHIND):
        rgb = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (abs(image - rgb).max(-1) < 0.01).sum() > 50, color


def test_the_cases_of_a_group_are_one_bar():
    def case(op: str, group: str | None, low: float, high: float):
        ratio = {"clock": "graph", "time": (low * high) ** 0.5, "q1": low, "q3": high}
        return {"op": op, "group": group, "ratios": {"eager": ratio}}

    cases = {"nms: b": case("nms", None, 1, 4), "bn_silu: x": case("bn_silu", "g", 1, 1)}
    cases |= {"assign: a": case("assign", None, 2, 2), "bn_silu: y": case("bn_silu", "g", 4, 16)}
    assert chart.bars(cases, table.OPS) == [
        ("Assignment: a\nagainst eager (graph)", (2, 2, 2)),
        ("NMS: b\nagainst eager (graph)", (2, 1, 4)),
        ("BatchNorm + SiLU: g (2 cases)\nagainst eager (graph)", (pytest.approx(8**0.5), 1, 16)),
    ]


def in_this_process(command, **options):
    gpu.main(command[3:])
    return subprocess.CompletedProcess(command, 0)


@pytest.fixture
def one_process(monkeypatch):
    """What processes would do is done here, one after the other; the commands."""
    commands = []

    def side_by_side(jobs, most, end, told, ended):
        for name, command in jobs.items():
            commands.append(command)
            with redirect_stdout(io.StringIO()) as out:
                gpu.main(command[3:])
            for line in out.getvalue().splitlines():
                told(name, line)
            ended(name, 0, 0.0)

    monkeypatch.setattr(gpu, "side_by_side", side_by_side)
    monkeypatch.setattr(
        gpu.subprocess, "run", lambda command, **_: commands.append(command) or in_this_process(command)
    )
    return commands


def dry_run(what: str, out: Path, *options: str):
    """Exit code and the file that a call left."""
    with pytest.raises(SystemExit) as exit:
        gpu.main([what, "--dry-run", "--out", str(out), *options])
    return exit.value.code, load(out / f"{run.slug(CPU)}-{what}.json")


@pytest.mark.parametrize("right", [True, False])
def test_without_pytest_parity_is_the_verdict_on_every_case(tmp_path: Path, monkeypatch, one_process, right: bool):
    def cases(ops, device):
        double = {} if right else {"double": lambda x: x}
        return [replace(toy(**double), op=op) for op in ops if op in ("nms", "assign")]

    monkeypatch.setattr(run, "cases_of", cases)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    code, record = dry_run("parity", tmp_path)
    assert code == (0 if right else 1)
    verdict = "right: relative error 0.0e+00" if right else "wrong: relative error 5.0e-01, allowed 1e-06"
    assert record["verdicts"] == {"assign: doubling": verdict, "nms: doubling": verdict}
    assert record["tests"] == {"why_not": "pytest or hypothesis is not installed", "files": {}}


TUNED = SimpleNamespace(TUNING={"blocks": {"WIDTH": 4, "num_warps": 2}, "pair": (8, 2), "unread": 7})


def tuned(x):
    """Faster with fewer columns; wrong with 8, and with 2 x 8 it asks for too much."""
    options = dict(**TUNED.TUNING["blocks"])
    pair = TUNED.TUNING["pair"]
    if pair == (2, 8):
        raise RuntimeError("out of resources")
    clock.now += 1e-3 * options["WIDTH"]
    return (3 if options["WIDTH"] == 8 else 2) * x


def test_kernels_are_measured_headlines_first_with_other_constants(tmp_path: Path, monkeypatch, one_process):
    def cases(ops, device):
        ours = {"double": tuned}
        return [
            replace(toy(name, headline=name == "wide", **ours), op=op)
            for op in ops[:1]
            if op == "nms"
            for name in ("deep", "wide")
        ]

    monkeypatch.setattr(run, "cases_of", cases)
    monkeypatch.setattr(sweep, "modules", lambda: {"tuned": TUNED})
    real = sweep.checked
    monkeypatch.setattr(sweep, "checked", lambda *args, quick: real(*args))
    code, record = dry_run("kernels", tmp_path)
    stages = [command[command.index("--part") + 1] for command in one_process]
    assert code == 0 and stages == ["check", "headline", "sweep"]  # the rest is not for a dry run
    assert list(record["cases"]) == ["nms: wide"] and record["verdicts"]["nms: wide"].startswith("right")
    assert list(record["sweep"]) == ["tuned: blocks WIDTH", "tuned: blocks num_warps", "tuned: pair"]
    width, warps, pair = (row["cases"]["nms: wide"] for row in record["sweep"].values())
    assert width["verdicts"]["8"].startswith("wrong") and width["verdicts"]["2"].startswith("right")
    assert set(width["times"]) == {"4", "2"} and set(warps["times"]) == {"2", "1", "4"}
    assert pair["verdicts"]["[4, 4]"].startswith("right") and "[16, 1]" in pair["times"]
    assert sweep.suggestion(record["sweep"]["tuned: blocks WIDTH"]) == ("2", pytest.approx(6 / 4))
    assert sweep.suggestion(record["sweep"]["tuned: blocks num_warps"]) == ("2", 1.0)
    assert TUNED.TUNING == {"blocks": {"WIDTH": 4, "num_warps": 2}, "pair": (8, 2), "unread": 7}
    text = "\n".join(gpu_page._constants(record))
    assert "| `tuned: blocks WIDTH` | 4 | 2 | 50% | wide: 4 → 6, 2 → 4 |" in text


def test_a_value_that_ends_the_process_is_known_by_having_no_verdict(monkeypatch):
    def ends(x):
        if TUNED.TUNING["pair"] == (4, 2):
            raise KeyboardInterrupt
        return tuned(x)

    monkeypatch.setattr(sweep, "modules", lambda: {"tuned": TUNED})
    case, rows = toy(double=ends), {}
    with pytest.raises(KeyboardInterrupt):
        for row in sweep.checked([case], [case], CPU):
            sweep.keep(rows, row)
    assert rows["tuned: pair"]["cases"]["nms: doubling"] == {"verdicts": {}, "times": {}}
    assert sweep.suggestion(rows["tuned: pair"]) is None


def test_constants_of_real_launches_are_seen_and_changed(monkeypatch):
    lowering = pytest.importorskip("lowering", reason="without Triton nothing is launched")
    from rtmdet_fast.kernels import _dispatch, batch_norm, dwconv_bn_silu

    monkeypatch.setattr(_dispatch, "BACKEND", "triton")
    try:
        launches = lowering.record_launches(monkeypatch, batch_norm, dwconv_bn_silu)
    except AttributeError:
        pytest.skip("Triton is not installed")
    x = torch.zeros(2, 64, 8, 8, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    vectors = [torch.ones(64) for _ in range(4)]
    call = lambda: dwconv_bn_silu._inference.function(x, torch.zeros(64, 1, 5, 5).half(), *vectors, None, 1, 1e-5)  # noqa: E731
    read = sweep.read_by(call)
    path = ("dwconv_bn_silu", "inference", "wide", "columns")
    assert path in read and read[path] == dwconv_bn_silu.TUNING["inference"]["wide"]["columns"]
    assert ("dwconv_bn_silu", "backward", "resident") not in read
    with sweep.changed(path, 2 * read[path]):
        call()
    columns = [dict(launch.constexprs)["COLUMNS"] for launch in launches]
    assert columns == [read[path], 2 * read[path]]


def test_instructions_of_the_machine_code_are_counted(monkeypatch):
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter compiles nothing")
    found = itertools.islice(machine_code.rows({"norm": partial(machine_code.batch_norm, 64, True)}), 1, None)
    (_, apply, resources, total, loops, each), (_, sums, _, more, (tiles, *merging), of_tiles) = (
        next(found),
        next(found),
    )
    assert apply == "_apply_kernel" and loops == [] and each == total / 16 and resources.spills == 0
    assert sums == "_sums_kernel" and len(merging) >= 2 and tiles + sum(merging) < more and of_tiles == tiles / 16


def test_a_choice_between_two_ways_is_swept():
    from rtmdet_fast.kernels.dwconv_bn_silu import TUNING

    assert sweep.others(TUNING["store_dz"]) == [not TUNING["store_dz"]] and sweep.others((2, 1)) != []


def test_other_sizes_from_which_kernels_train_take_a_swept_case_the_other_way():
    from benches import bench_bn_silu
    from rtmdet_fast.kernels.batch_norm import TUNING

    swept = sweep.swept(bench_bn_silu.cases(torch.device("cuda")))
    sizes = [math.prod(case.shapes["x"]) for case in swept if case.name.startswith("training")]
    now = TUNING["least_training"]
    for other in sweep.others(now):
        assert any((size < now) != (size < other) for size in sizes), other


def test_models_that_take_minutes_to_compile_come_last(tmp_path: Path, monkeypatch, one_process):
    def cases(ops, device):
        if "rtdetr" in ops:
            raise ImportError("No module named 'scipy'")
        names = ("compiled", "large", "small")
        return [
            replace(toy(name, headline=name == "small"), op=op, late=name == "compiled")
            for op in ops[:1]
            for name in names
        ]

    monkeypatch.setattr(run, "cases_of", cases)
    monkeypatch.setattr(gpu, "_quick", lambda results: False)
    monkeypatch.setattr(gpu, "MODELS", ("forward", "rtdetr"))
    command = gpu._command
    monkeypatch.setattr(gpu, "_command", lambda *args: [*command(*args), "--dry-run"])
    code, record = dry_run("models", tmp_path)
    stages = [command[command.index("--part") + 1] for command in one_process]
    assert stages == ["headline", "rest", "late"]
    assert record["not_measured"]["rtdetr: all"] == "No module named 'scipy'"
    assert code == 0


def test_an_op_that_hangs_or_dies_leaves_the_others(tmp_path: Path, monkeypatch):
    def process(command, timeout, **options):
        op = command[-1]
        assert timeout <= 60
        if op == "assign":
            in_this_process(command)  # its second case is one too many
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, -11) if op == "nms" else in_this_process(command)

    def cases(ops, device):
        toys = [replace(toy(name), op=op) for op in ops for name in ("one", "two")]
        return toys[:1] if measuring else toys

    measuring = False
    monkeypatch.setattr(run, "cases_of", cases)
    monkeypatch.setattr(gpu.subprocess, "run", process)
    part = gpu.measure_part

    def first_case_only(*arguments, **options):
        nonlocal measuring
        measuring = True
        part(*arguments, **options)
        measuring = False

    monkeypatch.setattr(gpu, "measure_part", first_case_only)
    out = tmp_path / "all.json"
    results = run.Results(CPU, out, (), quick=True)
    results.record["call"] = "kernels"
    results.write()
    gpu.measure_parts([("headline", [op]) for op in ("assign", "nms", "bn_silu")], results, clock.now + 60)
    record = load(out)
    died = "the process that measured nms ended with exit code -11"
    assert set(record["cases"]) == {"assign: one", "bn_silu: one"}
    assert record["not_measured"] == {
        "assign: two": gpu.LATE,
        "nms: one": died,
        "nms: two": died,
        "bn_silu: two": gpu.LATE,
    }
    assert not gpu.sound({"tests": {}, **record})


class Timer:
    """Stands in for `threading.Timer`: its time comes when its function is called."""

    started: ClassVar[list] = []

    def __init__(self, seconds, function):
        self.function = function

    def start(self):
        self.started.append(self)

    def cancel(self):
        if self in self.started:
            self.started.remove(self)


def test_a_file_of_tests_that_was_cut_off_is_not_sound(tmp_path: Path, monkeypatch):
    """Two files side by side, one of which hangs: with what it started it ends when its time comes."""
    folder = tmp_path / "tests" / "kernels"
    folder.mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\naddopts = '-q'\n")  # as in the project's
    (folder / "test_toy.py").write_text("def test_a(): pass\ndef test_b(): assert 0\n")
    hang = "import subprocess\ndef test_c(): pass\ndef test_d():\n    print('hangs', flush=True)\n"
    (folder / "test_slow.py").write_text(hang + "    subprocess.run(['sleep', '100'])\n")
    monkeypatch.setattr(run, "FOLDER", tmp_path / "benches")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # of which none is needed
    monkeypatch.setattr(gpu.threading, "Timer", Timer)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(Timer, "started", [])
    out = tmp_path / "all.json"
    results = run.Results(CPU, out, (), quick=True)
    results.record["call"] = "parity"
    side_by_side = gpu.side_by_side
    seen = []

    def watched(commands, most, end, told, ended):
        def telling(name, line):
            told(name, line)
            if line.endswith("hangs"):
                assert load(out)["tests"]["files"]["tests/kernels/test_slow.py"] == {"status": "not run"}
                for timer in list(Timer.started):
                    timer.function()

        def ending(name, *how):
            ended(name, *how)
            seen.append(load(out)["tests"]["files"][name]["status"])

        side_by_side(commands, 1, end, telling, ending)

    monkeypatch.setattr(gpu, "side_by_side", watched)
    files = {f"tests/kernels/test_{name}.py": ("-s",) for name in ("toy", "slow")}
    gpu.run_tests(results, files, clock.now + 600)
    toy_file, slow_file = (load(out)["tests"]["files"][name] for name in files)
    assert seen == ["ended", "cut off"]
    assert toy_file["exit_code"] == 1 and toy_file["failed"] == ["tests/kernels/test_toy.py::test_b"]
    assert (slow_file["exit_code"], slow_file["passed"], slow_file["failed"]) == (None, 1, [])
    whole = {"status": "ended", "exit_code": 0, "failed": [], "passed": 3, "skipped": 0}
    record = {"call": "parity", "cases": {}, "not_measured": {}}
    assert gpu.sound({**record, "tests": {"files": {"a": whole}}})
    for file in (toy_file, slow_file, {"status": "not run"}, {**whole, "passed": 0}):
        assert not gpu.sound({**record, "tests": {"files": {"a": whole, "b": file}}})
    assert not gpu.sound({**record, "tests": {"files": {}}})  # nothing was looked at


def test_outcomes_are_read_from_pytest_and_xdist(tmp_path: Path, monkeypatch):
    def side_by_side(commands, most, end, told, ended):
        (name,) = commands
        for line in (
            f"{name}::test_a[x y] PASSED [ 50%]",
            f"[gw1] [100%] FAILED {name}::test_b ",
            f"[gw0] [100%] SKIPPED {name}::test_c ",
            f"FAILED {name}::test_b - AssertionError",  # of the summary
        ):
            told(name, line)
        ended(name, 1, 2.0)

    monkeypatch.setattr(gpu, "side_by_side", side_by_side)
    results = run.Results(CPU, tmp_path / "all.json", (), quick=True)
    gpu.run_tests(results, {"tests/a.py": ()}, clock.now + 600)
    file = results.record["tests"]["files"]["tests/a.py"]
    assert (file["passed"], file["skipped"], file["failed"]) == (1, 1, ["tests/a.py::test_b"])


def test_the_files_of_tests_are_those_that_there_are():
    root = Path(run.FOLDER).parent
    assert all((root / name).is_file() for name in gpu.TESTS)
    marked = {str(path.relative_to(root)) for path in root.glob("tests/*/test_*.py") if "mark.gpu" in path.read_text()}
    assert marked <= gpu.TESTS.keys()


def test_the_page_is_what_the_command_writes():
    assert gpu_page.PAGE.read_text() == gpu_page.page(gpu_page.results())


def test_the_page_has_not_measured_in_every_cell_and_then_figures():
    text = gpu_page.page({})
    rows = [line for line in text.splitlines() if line.startswith("| ") and " not measured |" not in line]
    assert len(rows) == sum(line.startswith("|---") for line in text.splitlines())  # the heads alone

    def entry(graph: float, **more) -> dict:
        time = {"q1": 1, "q3": 1}
        return {"status": "timed", "graph": {"median": graph, **time, **more}, "call": {"median": 2 * graph, **time},
                "host": {"median": 0.5, **time}}  # fmt: skip

    def case(op: str, name: str, ours: str, images: int | None = None, **times: float) -> dict:
        entries = {key.replace("torch_c", "torch.c"): entry(value, gb_s=1000) for key, value in times.items()}
        ratios = {
            key: {"time": other["graph"]["median"] / entries[ours]["graph"]["median"]}
            for key, other in entries.items()
            if key != ours
        }
        return {"op": op, "case": name, "ours": ours, "contenders": entries, "ratios": ratios, "images": images}

    inference = "inference, float16, channels_last: RTMDet-s [32, 32, 160, 160]"
    kernels = [
        case("dwconv_bn_silu", inference, "triton", triton=1.0, torch_compile=3.0, eager=2.0),
        case("assign", "32 images, 8400 priors, 80 classes, 100 ground truths each", "triton", triton=0.25, eager=50.0),
        case("deformable_attention", "forward", "triton", **{"triton": 1.0, "msda-triton": 1.5, "grid_sample": 7.0}),
    ]
    step = "step: RTMDet-tiny, 32 x 3 x 640 x 640, 20 ground truths each, autocast to bfloat16"
    training = case("training", step, "triton", images=32, triton=10.0, mmdet=80.0)
    training["contenders"]["triton, one CUDA graph"] = entry(8.0)
    frame = "RTMDet-tiny, 1 frame in memory of 640 x 480 at 640 px"
    predict = [case("predict", frame, "predictor", predictor=0.5)]
    for mode, time in (("reduce-overhead", 1.5), ("max-autotune", 1.0)):
        beside, peer = f"{frame}, beside torch.compile, {mode}", f"torch_compile, {mode}"
        predict.append(case("predict", beside, "predictor", **{"predictor": 0.5, peer: time}))
    common = {"device": {"name": "a GPU"}, "versions": {"torch": "2"}, "quick": True, "copy_gb_s": 2000}
    record = {
        call: {**common, "cases": {f"{c['op']}: {c['case']}": c for c in cases}}
        for call, cases in (("kernels", kernels), ("models", [training, *predict]))
    }
    text = gpu_page.page(record)
    assert "beside torch.compile | 1.5x | 3x |" in text and "of a copy's speed | 60 % | 50 % |" in text
    assert "under 1 ms | 0.25 ms |" in text and "mmdet's | 2.5x | 10x |" in text
    assert "(msda-triton) | 1.1x | 1.5x |" in text and "beside grid_sample | 4x | 7x |" in text
    assert "under 0.98 ms | 0.5 ms |" in text and "in its best mode | 1.3x | 2x |" in text
    assert "under 1.22 ms | not measured |" in text
    assert f"| {inference} | 1 (graph) |  | 2 (graph), 2x | 3 (graph), 3x | 50% | 0.5 of 2 |" in text
    (row,) = (line for line in text.splitlines() if line.startswith(f"| {step} |"))
    assert row.endswith("| 0.5 of 20 | 1600 |") and "Of a quick run" in text


def test_a_step_with_its_loader_and_one_that_stays_in_its_place_are_judged_by_their_first():
    case = bench_training._iteration(CPU, "nano", 2, 64, iterations=2)
    assert case.images == 4
    ours = case.contenders[0]
    assert "on its own batch" in case.compare(ours.result(ours.build()()), None)
    inputs = (models.pictures(2, 64, CPU, 0), *models.objects(2, 5, 3, 64, CPU, 0)[:3])
    step = bench_training.RecordedStep("nano", 3, CPU, torch.float32)
    plain = bench_training.Step("nano", 3, CPU, torch.float32)
    for _ in range(2):
        torch.testing.assert_close(step(*inputs)[1], plain(*inputs)[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mode", [None, "default"])
def test_what_the_predictor_finds_is_judged(mode):
    case = bench_predict._frames(CPU, "det", "nano", 2, side=64, score_threshold=0.02, mode=mode)
    inputs = case.inputs(0)
    expected = case.expected(*inputs)
    for contender in case.contenders:
        assert "detections differ" in case.compare(contender.result(contender.build()(*inputs)), expected)
    with pytest.raises(Parity):
        case.compare(expected[::-1], expected)


def test_rtdetr_needs_no_transformers_for_its_weights(monkeypatch):
    monkeypatch.setattr(bench_rtdetr, "saved", absent)
    one, other = (bench_rtdetr.ours(CPU, torch.float32, layers).state_dict() for layers in (None, 1))
    assert all(map(torch.equal, one.values(), other.values()))


def test_the_published_code_is_absent_where_its_folder_is_not(monkeypatch, tmp_path):
    (case, *_) = bench_rtdetr.cases(CPU)
    (contender,) = (contender for contender in case.contenders if contender.name == "published")
    monkeypatch.delenv("RTDETR_PUBLISHED", raising=False)
    for folder in (None, tmp_path):
        if folder is not None:
            monkeypatch.setenv("RTDETR_PUBLISHED", str(folder))
        with pytest.raises(Absent, match="RTDETR_PUBLISHED names" if folder is None else "is no folder rtdetr_pytorch"):
            contender.build()


def test_the_public_kernel_is_asked_for_the_same(monkeypatch):
    """Its own fallback, in place of the kernel that no CPU runs."""

    def native(value, sizes, locations, weights, padding, align_corners):
        assert (padding, align_corners) == ("zeros", False)
        levels = value.split(sizes.prod(1).tolist(), 1)
        found = 0
        for level, (h, w), at, share in zip(
            levels, sizes.tolist(), locations.unbind(3), weights.unbind(3), strict=True
        ):
            image = level.permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, (h, w))
            sampled = torch.nn.functional.grid_sample(
                image, 2 * at.transpose(1, 2).flatten(0, 1) - 1, align_corners=False
            )
            sampled = (sampled * share.transpose(1, 2).flatten(0, 1)[:, None]).sum(3)
            found = found + sampled.unflatten(0, value.shape[::2][:1] + value.shape[2:3]).permute(0, 3, 1, 2)
        return found

    module = SimpleNamespace(triton_multiscale_deformable_attention=native)
    monkeypatch.setitem(sys.modules, "msda_triton", SimpleNamespace(frontend=module))
    monkeypatch.setitem(sys.modules, "msda_triton.frontend", module)
    inputs = bench_deformable_attention._inputs(CPU, 1, torch.float32, 0)
    found, expected = bench_deformable_attention._msda_triton()(*inputs), bench_deformable_attention.standard(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_calls_on_one_device_are_one_section_of_the_table():
    def record(call: str, key: str, version: str = "2") -> dict:
        return {"call": call, "versions": {"torch": version}, "cases": {key: {}}, "not_measured": {}}

    records = {f"gpu-{call}": record(call, call) for call in ("kernels", "models", "parity")}
    found = table.devices({"cpu": {"cases": {}, "versions": {}}, **records})
    assert list(found) == ["cpu", "gpu"] and list(found["gpu"]["cases"]) == ["kernels", "models", "parity"]
    assert len(table.devices({**records, "gpu-models": record("models", "models", "3")})) == 2


BARE = """
import sys
for name in ("cv2", "pycocotools", "matplotlib", "PIL", "tyro", "tqdm", "tensorboard", "pytest", "hypothesis", "mmdet"):
    sys.modules[name] = None
import torch
from benches import gpu, run
for device in ("cpu", "cuda"):
    assert run.cases_of(run.OPS, torch.device(device))
"""


def test_the_benches_need_only_torch_and_numpy():
    done = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_pytest_benchmark_tells_the_interleaved_times(tmp_path: Path):
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
    out, table = tmp_path / "own.json", tmp_path / "pytest.json"
    options = ["--benchmark-only", "--bench-quick", "--bench-out", str(out), "--benchmark-json", str(table)]
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "benches", *options, "-k", "bn_silu: and training"]
    # under xdist pytest-benchmark would refuse to measure
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(run.FOLDER).parent, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    cases = load(out)["cases"]
    found = load(table)["benchmarks"]
    assert len(found) == sum(e["status"] == "timed" for c in cases.values() for e in c["contenders"].values()) > 1
    for bench in found:
        key, clock = bench["group"].removesuffix("]").rsplit(" [", 1)
        entry = cases[key]["contenders"][bench["params"]["contender"]]
        assert bench["stats"]["median"] * 1e3 == pytest.approx(entry[clock]["median"])
        assert bench["extra_info"]["parity"] == entry["parity"]


def load(path: Path):
    return json.loads(path.read_text())


def test_runs_of_assigners_are_done_once_and_their_table_has_means(tmp_path, monkeypatch, capsys):
    done = []

    def train(pool, function, settings):
        if settings["assigner"] == fails:
            raise ValueError("the loss is nan")
        done.append((settings["assigner"], settings["seed"]))
        ap = 0.1 * (len(done) == 1) + 0.2
        return SimpleNamespace(result=lambda: {"AP": ap, "AP50": 0.5, "seconds": 0.25, "bytes": 2e8})

    monkeypatch.setattr(assigners.ProcessPoolExecutor, "submit", train)
    monkeypatch.setattr(assigners, "data_sets", lambda _: {"drawn": {}})
    names = list(assigners.ASSIGNERS)
    for seeds, fails in (("1", names[1]), ("1", None), ("2", None), ("2", None)):
        monkeypatch.setattr(sys, "argv", ["", "--image-size", "32", "--seeds", seeds, "--out", str(tmp_path)])
        with pytest.raises(SystemExit, match="the loss is nan") if fails else nullcontext():
            assigners.main()
        assert len(list(*load(tmp_path / "results.json").values())) == len(done)
    others = [name for name in names if name != names[1]]
    assert done == [*((name, 0) for name in [*others, names[1]]), *((name, 1) for name in reversed(names))]
    table = (tmp_path / "table.md").read_text()
    assert "### drawn: RTMDet-tiny, 8 images of 32 px a step, 12 epochs" in table
    assert f"| {names[0]} | 0.250 | 0.300 0.200 | 0.500 | 0.250 | 200 |" in table
    assert table in capsys.readouterr().out


def test_steps_are_timed_until_the_first_validation(monkeypatch):
    steps = assigners.Steps()
    steps.on_start(SimpleNamespace(device="cpu"), 0)
    readings = iter([1.0, 1.5, 2.1, 9.0, 9.4, 30.0])
    steps.clock = lambda: next(readings)
    monkeypatch.setattr(assigners, "status", lambda field: 1000 + len(steps.times))
    for metrics in ({}, {"AP": 0.1}, {}):
        for _ in range({0: 3, 4: 2}.get(len(steps.times), 1)):
            steps.on_step(None)
        steps.on_epoch(SimpleNamespace(metrics=metrics))
    assert steps.seconds == pytest.approx(0.5)  # of 0.5, 0.6 and, after a break, 0.4
    assert steps.bytes == 1006
