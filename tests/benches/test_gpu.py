"""The script for a GPU: its calls, limits, sweeps and page, dry and on toy cases."""

from __future__ import annotations

import io
import itertools
import math
import os
import subprocess
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from toy_cases import CPU, clock, load, toy

from benches import gpu, gpu_page, machine_code, run, sweep


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
    others = (path for path in root.glob("tests/*/test_*.py") if path != Path(__file__))
    marked = {str(path.relative_to(root)) for path in others if "mark.gpu" in path.read_text()}
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
