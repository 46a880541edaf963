"""Mistakes in the demo's arguments are told before anything is drawn; what it trains finds what is drawn."""

import json

import pytest

from rtmdet_fast.cli import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "bogus"], "--task 'bogus'"),
        (["--epochs", "0"], "--epochs is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--device", "bogus"], "--device"),
        (["--model", "bogus"], "--model 'bogus'"),
        (["--model", "rtdetr", "--task", "ins"], "--task ins is for --model rtmdet"),
    ],
)
def test_wrong_arguments(tmp_path, capsys, arguments, message):
    assert main(["demo", "--out", str(tmp_path / "demo"), *arguments]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "demo").exists()


@pytest.mark.slow  # eight minutes on two quiet cores
def test_rtdetr_learns_the_demos_scenes(tmp_path):
    assert main(["demo", "--model", "rtdetr", "--out", str(tmp_path / "demo"), "--json", str(tmp_path / "a.json")]) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["AP50"] >= 0.4, found
    assert len(list((tmp_path / "demo/pictures").glob("*.jpg"))) == 24
