"""What `benches.run` writes: results, tables, pictures, and what got slower."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from toy_cases import CPU, load, measure_all, toy

from benches import chart, compare, run, table
from benches.harness import Case


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
