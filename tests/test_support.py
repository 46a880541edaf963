"""The support matrix is what was measured: nothing in it by hand."""

import json
from pathlib import Path

import pytest

pytest.importorskip("onnxscript", reason="extra `export` is not installed")

from benches import support


def test_the_page_is_that_of_the_results():
    assert Path(support.PAGE).read_text() == support.page(json.loads(support.RESULTS.read_text()))


def test_a_cell_tells_how_near_a_file_is_or_why_there_is_none(monkeypatch, tmp_path):
    from rtmdet_fast import UserError
    from rtmdet_fast.export.agreement import Agreement

    monkeypatch.setattr(support, "RESULTS", tmp_path / "a.json")
    monkeypatch.setattr(support, "PAGE", tmp_path / "a.md")
    monkeypatch.setattr(support, "confident", lambda *_: type("Model", (), {})())

    asked = []

    def export(model, path, **options):
        asked.append(options)
        if path.suffix == ".onnx":
            return Agreement(600, 0.002, 1e-6, 0.0, 1)
        raise UserError("\x1b[96mno operator\x1b[0m of that name. And a page of it")

    monkeypatch.setattr(support, "export", export)
    support.main(["--models", "RTMDet-s, det", "--formats", "ONNX", "OpenVINO"])
    text = (tmp_path / "a.md").read_text()
    (row,) = (line for line in text.splitlines() if line.startswith("| RTMDet-s, det |"))
    assert [cell.strip() for cell in row.split("|")[2:5]] == [
        "2e-03 px, 1e-06; 1 of 600",
        "not measured",
        "no: no operator of that name",
    ]
    assert "| ONNX, no NMS |" not in text
    support.main(["--models", "RTMDet-s, det", "--formats", "ONNX, no NMS", "OpenVINO int8, no NMS"])
    text = (tmp_path / "a.md").read_text()
    assert "| ONNX, no NMS |" in text and "int8" not in text.split("## det")[1] and asked[-1]["nms"] is False
