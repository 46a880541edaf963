"""The bench of the assigners."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from toy_cases import load

from benches import assigners


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
