"""The benches' harness and table, on toy contenders."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benches import assigners, bench_postprocess, bench_training, chart, compare, gpu, harness, models, run, table
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
    for module in (harness, run, gpu):
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
    assert record["contenders"]["slow"]["call"]["median"] == pytest.approx(11)  # ms
    assert record["ratios"]["slow"]["time"] == pytest.approx(11)
    record = harness.measure(toy(), CPU, seconds=1, least=4)
    assert 4 < record["contenders"]["slow"]["call"]["rounds"] < 1 / 0.012


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
            "triton" if device == "cuda" and op not in ("pipeline", "matcher", "engines", "predict") else "reference"
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


@pytest.mark.parametrize("right", [True, False])
def test_the_gpu_run_without_pytest_keeps_everything_in_one_file(tmp_path: Path, monkeypatch, right: bool):
    def cases(ops, device):
        double = {} if right else {"double": lambda x: x}
        return [replace(toy(**double), op=op) for op in ops if op in ("nms", "assign")]

    monkeypatch.setattr(run, "cases_of", cases)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu.subprocess, "run", in_this_process)
    out = tmp_path / "all.json"
    with pytest.raises(SystemExit) as exit:
        gpu.main(["--dry-run", "--out", str(out)])
    record = load(out)
    assert exit.value.code == (0 if right else 1)
    verdict = "right: relative error 0.0e+00" if right else "wrong: relative error 5.0e-01, allowed 1e-06"
    assert record["verdicts"] == {"assign: doubling": verdict, "nms: doubling": verdict}
    assert set(record["cases"]) == {"assign: doubling", "nms: doubling"}
    assert record["cases"]["nms: doubling"]["contenders"]["slow"]["status"] == "timed"
    assert "samples" not in record["cases"]["nms: doubling"]


def test_an_op_that_hangs_or_dies_leaves_the_others(tmp_path: Path, monkeypatch):
    def process(command, timeout, **options):
        op = command[-1]
        assert timeout <= 60
        if op == "assign":
            gpu.main(command[3:])  # its second case is one too many
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
    results.write()
    gpu.measure_parts([["assign"], ["nms"], ["bn_silu"]], results, clock.now + 60)
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


@pytest.fixture
def limits(tmp_path: Path, monkeypatch) -> list[float]:
    """Two files of tests for `gpu.run_tests`; the limits that it set. That of the one that hangs comes when it does."""
    (tmp_path / "tests" / "kernels").mkdir(parents=True)
    (tmp_path / "tests/kernels/test_toy.py").write_text("def test_a(): pass\ndef test_b(): assert 0\n")
    hang = "import time\nfrom pathlib import Path\ndef test_c(): pass\n"
    hang += "def test_d():\n    Path('hangs').touch()\n    time.sleep(9999)\n"
    (tmp_path / "tests/kernels/test_slow.py").write_text(hang)
    monkeypatch.setattr(run, "FOLDER", tmp_path / "benches")
    limits = []

    def process(command, timeout, **options):
        limits.append(timeout)
        if "tests/kernels/test_slow.py" not in command:
            return real(command, **options)
        (tmp_path / "hangs").unlink(missing_ok=True)
        with subprocess.Popen(command, **options) as started:
            while not (tmp_path / "hangs").exists() and started.poll() is None:
                time.sleep(0.01)
            started.kill()
            raise subprocess.TimeoutExpired(command, timeout, started.communicate()[0])

    real = subprocess.run
    monkeypatch.setattr(gpu.subprocess, "run", process)
    return limits


def test_the_parity_tests_are_counted_and_cut_off(limits: list[float]):
    found = gpu.run_tests(12, ("slow", "toy"))
    assert limits == pytest.approx([12, 12], abs=0.1)  # of two equal shares twice the first, then all that is left
    assert found["exit_codes"] == {"slow": None, "toy": 1}
    assert (found["passed"], found["failed"]) == (2, ["tests/kernels/test_toy.py::test_b"])
    assert not gpu.sound({"tests": found, "cases": {}, "not_measured": {}})
    found = gpu.run_tests(3, ("slow",))
    assert found["passed"] == 1 and gpu.sound({"tests": found, "cases": {}, "not_measured": {}})


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
        done.append((settings["assigner"], settings["seed"]))
        ap = 0.1 * (len(done) == 1) + 0.2
        return SimpleNamespace(result=lambda: {"AP": ap, "AP50": 0.5, "seconds": 0.25, "bytes": 2e8})

    monkeypatch.setattr(assigners.ProcessPoolExecutor, "submit", train)
    for seeds in ("1", "2", "2"):
        monkeypatch.setattr(sys, "argv", ["", "--image-size", "32", "--seeds", seeds, "--out", str(tmp_path)])
        monkeypatch.setattr(assigners, "data_sets", lambda _: {"drawn": {}})
        assigners.main()
    names = assigners.ASSIGNERS
    assert done == [*((name, 0) for name in names), *((name, 1) for name in reversed(names))]
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
