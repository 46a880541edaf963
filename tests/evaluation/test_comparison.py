"""Runs side by side: what differs, and what is told of runs that lack something."""

import json
from pathlib import Path

import pytest
from browser import WIDTHS, beyond, needs_browser
from html_page import NASTY, Page

from rtmdet_fast.errors import UserError
from rtmdet_fast.evaluation.comparison import compared, read_run, run_names, write_comparison

HISTORY = [
    {"epoch": "1", "iteration": "10", "loss": "3", "AP": "", "images_per_second": "50"},
    {"epoch": "1", "iteration": "10", "loss": "", "AP": "0.2"},
    {"epoch": "2", "iteration": "20", "loss": "1", "AP": "", "images_per_second": "70"},
    {"epoch": "2", "iteration": "20", "loss": "", "AP": "0.4"},
]


def run(folder, name, history=HISTORY, **changes):
    folder.mkdir()
    config = {"lr": 0.1, "out": str(folder), "epochs": 2, "nested": {"a": 1}} | changes.pop("config", {})
    metrics = {
        "AP": 0.4,
        "AP50": 0.6,
        "APs": -1,
        "best_epoch": 2,
        "per_class": {"cat": {"AP": 0.5}, "dog": {"AP": 0.3}},
    }
    metrics["analysis"] = {
        "dAP": dict.fromkeys(("class", "location", "both", "duplicate", "background", "missed"), 0.125)
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.json").write_text(json.dumps(metrics | changes))
    return read_run(folder, history, name)


def test_what_differs_is_told(tmp_path):
    runs = [
        run(tmp_path / "a", "a"),
        run(
            tmp_path / "b",
            "b",
            config={"lr": 0.2, "nested": {"a": 2}, "new": True},
            per_class={"cat": {"AP": 0.45}, "dog": {"AP": 0.9}},
            AP50=0.7,
        ),
    ]
    found = compared(runs)
    assert found["settings"] == {
        "lr": {"a": 0.1, "b": 0.2},
        "nested.a": {"a": 1, "b": 2},
        "new": {"a": None, "b": True},
    }
    figures = {"AP": 0.4, "AP50": 0.6, "best epoch": 2, "images per second in training": 60}
    assert found["figures"] == {"a": figures, "b": figures | {"AP50": 0.7}}
    text = write_comparison(tmp_path / "c.html", runs).read_text(encoding="utf-8")
    page = Page(text)
    words = " ".join(" ".join(page.words).split())
    assert not page.open and not page.tags & {"script", "link", "iframe", "object"} and text.count("<svg") == 2
    for expected in (
        "AP50, IoU .50 0.600 0.700",
        "lr 0.1 0.2",
        "dog 0.300 0.900 +0.600 cat 0.500 0.450 -0.050",
        "0.125",
    ):
        assert expected in words, expected
    assert "epochs" not in words.partition("Settings that differ")[2].partition("Curves")[0]


@needs_browser
def test_many_long_names_fit_phones_and_desktops(tmp_path):
    names = [f"{'a run with a long name, ' * 4}{i}" for i in range(7)]
    settings = [{"lr": i, "a setting with a long name " * 4: "v" * 90 * i} for i in range(7)]
    runs = [run(tmp_path / f"{i}", names[i], config=settings[i]) for i in range(7)]
    assert beyond(write_comparison(tmp_path / "c.html", runs)) == {width: [] for width in WIDTHS}


def test_runs_that_lack_figures_are_compared_all_the_same(tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text('{"lr": 1}')
    runs = [run(tmp_path / "a", "a"), read_run(bare, [], NASTY), run(tmp_path / "c", "c", [], per_class={}, analysis=3)]
    text = write_comparison(tmp_path / "c.html", runs).read_text(encoding="utf-8")
    begin, end = text.index("<section>"), text.rindex("</body>")  # the date above may hold a -1
    words = " ".join(Page(text[begin:end]).words)
    assert not Page(text).open and "nan" not in words.lower() and "-1" not in words
    assert NASTY in "".join(Page(text).words)
    same = write_comparison(tmp_path / "d.html", [runs[0], runs[0]]).read_text(encoding="utf-8")
    assert "The settings are the same." in same


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        read_run(tmp_path, [], "a")
    (tmp_path / "metrics.json").write_text("[")
    with pytest.raises(UserError, match=r"metrics\.json cannot be read"):
        read_run(tmp_path, [], "a")
    (tmp_path / "metrics.json").write_text("[]")
    with pytest.raises(UserError, match="is damaged"):
        read_run(tmp_path, [], "a")


def test_names_are_as_short_as_they_can_be():
    assert run_names([Path("x/a"), Path("x/b")]) == ["a", "b"]
    assert run_names([Path("x/a"), Path("y/a")]) == ["x/a", "y/a"]
    with pytest.raises(UserError, match="given twice"):
        run_names([Path("x/a"), Path("x/../x/a")])
