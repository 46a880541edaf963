"""Parts of pages: what is escaped, what is left out, and what stands alone."""

import re

import numpy as np
import pytest
from html_page import NASTY, Page

from rtmdet_fast.errors import UserError
from rtmdet_fast.pages import charts, page


def curve(label="a", color="#3d7eff"):
    return charts.Curve(label, np.arange(3.0), np.arange(3.0), color)


TEXTS = {
    "title": lambda t: page.section(t, "x"),
    "note": lambda t: page.section("a", "x", note=t),
    "tile": lambda t: page.tiles([(t, "1")]),
    "figure": lambda t: page.figure(t, "x", t),
    "table": lambda t: page.table([t], [[t]]),
    "bars": lambda t: page.bars(t, [(t, 1.0, t)], t),
    "settings": lambda t: page.settings_table({t: {t: t}}),
    "picture": lambda t: page.pictures(t, page.picture(np.zeros((4, 4, 3), np.uint8), t), note=t),
    "lines": lambda t: charts.line_chart(t, t, [curve(t), curve()], ylabel=t, note=t),
    "columns": lambda t: charts.column_chart(t, [t], [(t, [1.0], "#000"), ("b", [1.0], "#000")], xlabel=t, note=t),
}


@pytest.mark.parametrize("part", TEXTS)
@pytest.mark.parametrize("text", [NASTY, "円", "\ud800x", "\x1b[31m"])
def test_texts_stand_in_the_page_as_they_are(tmp_path, part, text, recwarn):
    html = TEXTS[part](text)
    path = page.write_page(tmp_path / "runs/a.html", text, [page.section("s", html)], note=text)
    found = Page(path.read_text(encoding="utf-8"))
    assert not found.open and not found.tags & {"script", "link", "iframe", "object"}
    words = "".join(found.words)
    assert words.count(text.replace("\ud800", "?")) >= 3  # title, heading and note, and what the part has
    assert all(a.startswith(("data:image/jpeg;base64,", "#")) for a in found.addresses)
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_nothing_makes_no_part():
    assert page.section("a") == page.section("a", "", note="n") == page.grid("") == page.tiles([]) == ""
    assert page.table(["a"], []) == page.bars("a", []) == page.figure("a", "") == page.settings_table({}) == ""
    assert charts.line_chart("a", "x", []) == charts.column_chart("a", [], []) == charts.legend([]) == ""


def test_bars_are_as_long_as_their_share_of_the_greatest():
    html = page.bars("a", [("x", 4.0, "4"), ("y", 1.0, "1"), ("z", float("nan"), "-"), ("w", 0.0, "0")])
    assert re.findall(r"width:([\d.]+)%", html) == ["100.0", "25.0", "0.0", "0.0"]


def test_ink_becomes_the_colour_of_the_page():
    html = charts.line_chart("a", "x", [curve(color=charts.INK), curve("b")])
    assert charts.INK not in html and html.count("currentColor") > 3


def test_a_gap_and_a_mark_are_drawn():
    with_gap = charts.Curve(None, np.arange(3.0), np.array([1, np.nan, 2]), "#000001")
    html = charts.line_chart("a", "x", [with_gap], marks=[(1.0, 1.5, "#000002")], left=0, right=2)
    assert "#000001" in html and "#000002" in html and "legend" not in html


def test_many_labels_are_thinned_out():
    labels = [f"{i:05d}" for i in range(100)]
    html = charts.column_chart("a", labels, [("n", np.ones(100), "#000001")])
    drawn = [label for label in labels if f">{label}</text>" in html]
    assert 3 < len(drawn) < 15


def test_flat_names():
    assert page.flat({"a": {"b": 1, "c": {}}, "d": 2}) == {"a.b": 1, "a.c": {}, "d": 2}


def test_pictures_are_never_empty():
    assert page.resized(np.zeros((2000, 2, 3), np.uint8), 0.1).shape == (200, 1, 3)


def test_unwritable_path(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match=r"a\.html"):
        page.write_page(tmp_path / "runs/a.html", "t", [])
