"""Errors beside TIDE's published code (tidecv 1.0.1, whose figures are in tide.json), and by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
from made_detections import overlaps

from rtmdet_fast.evaluation.errors import KINDS, PASSED, RIGHT, find_errors, gains
from rtmdet_fast.evaluation.overlaps import rotated_overlaps

SHORT = dict(zip(("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss"), KINDS, strict=True))


@pytest.mark.parametrize("case", range(3))
def test_errors_and_gains_are_those_of_the_published_code(case):
    told = json.loads(Path(__file__).with_name("tide.json").read_text())[case]
    o = overlaps(told["objects"], told["detections"])
    errors = find_errors(o)
    assert errors.counts() == {SHORT[kind]: number for kind, number in told["counts"].items()}
    assert min(errors.counts().values()) > 5
    found = gains(o, errors, 4)
    assert found.ap50 == pytest.approx(told["AP"] / 100, abs=1e-9)
    assert found.by_kind == pytest.approx({SHORT[kind]: gain / 100 for kind, gain in told["main"].items()}, abs=1e-9)
    assert found.false_positives == pytest.approx(told["special"]["FalsePos"] / 100, abs=1e-9)
    assert found.false_negatives == pytest.approx(told["special"]["FalseNeg"] / 100, abs=1e-9)


BOX = (0, 0, 100, 100)
BY_HAND = {
    "right": ((0, 0, 0.9, 0, 0, 100, 90), RIGHT),
    "location": ((0, 0, 0.9, 0, 0, 100, 40), KINDS.index("location")),
    "class": ((0, 1, 0.9, 0, 0, 100, 90), KINDS.index("class")),
    "both": ((0, 1, 0.9, 0, 0, 100, 40), KINDS.index("both")),
    "background": ((0, 0, 0.9, 0, 0, 100, 9), KINDS.index("background")),
    "elsewhere": ((1, 0, 0.9, *BOX), KINDS.index("background")),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_detection_alone(name):
    detection, kind = BY_HAND[name]
    o = overlaps([(0, 0, *BOX)], [detection], images=2)
    errors = find_errors(o)
    assert errors.kinds.tolist() == [kind]
    assert errors.found.tolist() == [name == "right"]
    # what an error of class or location is about was seen, and is not missed
    assert errors.missed.tolist() == [name in ("both", "background", "elsewhere")]
    found = gains(o, errors, 2)
    assert found.ap50 == pytest.approx(float(name == "right"))
    gained = {"location": "location", "class": "class"}.get(name)
    assert {kind: round(gain, 9) for kind, gain in found.by_kind.items() if gain} == ({gained: 1.0} if gained else {})


def test_of_two_detections_of_an_object_the_worse_is_a_duplicate():
    o = overlaps([(0, 0, *BOX)], [(0, 0, 0.5, 0, 0, 100, 95), (0, 0, 0.9, 0, 0, 100, 80)])
    assert o.scores.tolist() == [0.9, 0.5]
    assert find_errors(o).kinds.tolist() == [RIGHT, KINDS.index("duplicate")]
    # above a threshold that leaves the better one alone
    assert find_errors(o, o.scores > 0.6).kinds.tolist() == [RIGHT, PASSED]


def test_what_lies_in_a_crowd_does_not_count():
    o = overlaps([(0, 0, *BOX)], [(0, 0, 0.9, 10, 10, 20, 20), (0, 1, 0.8, 10, 10, 20, 20)], ignored=[0])
    errors = find_errors(o)
    assert errors.kinds.tolist() == [PASSED, KINDS.index("background")] and not errors.missed.any()
    assert gains(o, errors, 2).ap50 == -1


def test_one_error_alone_is_corrected_of_each_object():
    wrong = [(0, 0, 0.9, 0, 0, 100, 40), (0, 0, 0.8, 0, 0, 100, 45), (0, 1, 0.7, 0, 0, 100, 90)]
    o = overlaps([(0, 0, *BOX)], wrong)
    errors = find_errors(o)
    assert [KINDS[kind] for kind in errors.kinds] == ["location", "location", "class"]
    found = gains(o, errors, 2).by_kind
    assert found["location"] == pytest.approx(1) and found["class"] == 0  # of the object the best scored error


def test_rotated_boxes():
    truth = [(np.array([[50.0, 50, 80, 20, 0.3]]), np.array([0]), np.array([False]))]
    turned = np.array([[50.0, 50, 80, 20, 0.3], [50, 50, 80, 20, 0.7], [50, 50, 80, 20, 0.3]])
    o = rotated_overlaps(truth, [(turned, np.array([0.5, 0.9, 0.4]), np.array([0, 0, 1]))])
    errors = find_errors(o)
    assert [KINDS[kind] if kind >= 0 else kind for kind in errors.kinds] == ["location", RIGHT, "class"]


def test_nothing_at_all():
    o = overlaps([], [])
    errors = find_errors(o)
    assert set(errors.counts().values()) == {0} and gains(o, errors, 3).ap50 == -1
