import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from rtmdet_fast.data.masks import MaskStore, Segmentation
from rtmdet_fast.errors import UserError
from rtmdet_fast.evaluation import report as module
from rtmdet_fast.evaluation.report import ReportSample, write_report
from rtmdet_fast.inference.masks import PredictedMasks
from rtmdet_fast.inference.results import Results

RECALL = np.linspace(0, 1, 101)
NASTY = '<script>alert("x")</script> & $\\frac{1}{2}$'


def sample(names, score=0.9):
    image = np.full((64, 96, 3), 90, np.uint8)
    boxes = torch.tensor([[10.0, 10.0, 50.0, 40.0], [20.0, 5.0, 90.0, 60.0]])
    result = Results(image, boxes, torch.tensor([score, 0.1]), torch.zeros(2).long(), names, path="val/street.jpg")
    return ReportSample(result, boxes.numpy(), np.zeros(2, int))


def report(tmp_path, **changes):
    arguments = {
        "title": "a run",
        "history": [{"epoch": 1, "loss": 2.0}],
        "evaluation": {},
        "pr_curves": {},
        "samples": [],
        "settings": {},
    }
    path = write_report(tmp_path / "runs" / "report.html", **arguments | changes)
    return path.read_text(encoding="utf-8")


class Page(HTMLParser):
    """Tags that may stay open, and every address a browser would load."""

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.tags, self.words = [], [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def full(tmp_path, names, epochs=12):
    history = [
        {
            "epoch": e,
            "iteration": 10 * e,
            "loss": 3 / e,
            "loss_cls": 1 / e,
            "loss_bbox": "2",  # csv gives text
            "lr": "1e-3",
            "images_per_second": 123.0,
            "data_wait": 0.02,
            "AP": 0.04 * e if e % 2 == 0 else "",
            "AP50": 0.06 * e if e % 2 == 0 else "",
        }
        for e in range(1, epochs + 1)
    ]
    history[-1] |= {"AP": 0.111}  # the best is the one before it that was validated
    per_class = {n: {"AP": 0.5 - 0.3 * i / len(names), "AP50": 0.8} for i, n in enumerate(names)}
    return report(
        tmp_path,
        history=history,
        evaluation={"AP": 0.4321, "AP50": 0.7, "AP75": 0.5, "APs": -1, "per_class": per_class},
        pr_curves=dict.fromkeys(names, (RECALL, 1 - RECALL**4)),
        samples=[sample(names), sample(names)],
        settings={"size": "tiny", "data": {"train": "a/train.json"}},
        parameters=4_870_000,
        seconds=3725,
    )


def test_whole_page_stands_alone(tmp_path):
    text = full(tmp_path, ("person", "car"))
    page = Page(text)
    assert not page.open
    assert not page.tags & {"script", "link", "iframe", "object"}
    assert page.addresses and all(a.startswith(("data:image/jpeg;base64,", "#")) for a in page.addresses)
    assert "@import" not in text and "url(http" not in text
    words = " ".join(" ".join(page.words).split())
    for expected in (
        "0.432 AP, IoU .50 to .95",
        "0.700 AP50",
        "10 of 12 best epoch",
        "1 h 02 min",
        "123 images per second",
        "2.0% of training spent waiting",
        "4.87 M parameters",
        "Training loss",
        "Learning rate",
        "street.jpg truth: 2 prediction: 1",
        "data.train a/train.json",
        "torch",
    ):
        assert expected in words, expected
    assert text.count("<svg") == 5
    assert text.count("data:image/jpeg") == 4
    assert len(re.findall(r"#010203", text)) == 0


def test_masks_are_drawn(tmp_path):
    truth = MaskStore([Segmentation([np.array([[10, 10], [50, 10], [30, 40]], np.float32)])] * 2).load(0, 2, 96, 64)
    plain = sample(["a"])
    masks = PredictedMasks(torch.ones(2, 8, 12), (1.0, 1.0), (64, 96))
    result = replace(plain.result, predicted_masks=masks)
    pages = [
        report(tmp_path, samples=[s], evaluation={"AP": 0.5, "segm_AP": 0.4})
        for s in (plain, plain._replace(gt_masks=truth), plain._replace(result=result))
    ]
    pictures = [re.findall('src="(.*?)"', page) for page in pages]
    assert pictures[1][0] != pictures[0][0] and pictures[1][1] == pictures[0][1]
    assert pictures[2][0] == pictures[0][0] and pictures[2][1] != pictures[0][1]
    assert "mask AP, IoU .50 to .95" in pages[0]


def test_names_are_escaped(tmp_path):
    text = full(tmp_path, (NASTY, "_hidden", "<b>"))
    page = Page(text)
    assert not page.open and "script" not in page.tags and "b" in page.tags
    assert "<b></b>" not in text
    words = "".join(page.words)
    assert words.count(NASTY) == 2  # in the table and in the legend, as they are
    assert words.count("_hidden") == 2


def test_any_name_stands_in_the_page(tmp_path, recwarn):
    text = full(tmp_path, ("円", "a\nb", "\ud800x", "a\0b", "\x1b[31m"))
    words = "".join(Page(text).words)
    assert words.count("円") == 2 and "a b" in words
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_curves_leave_out_what_was_not_measured(tmp_path, monkeypatch):
    """-1 of pycocotools: a class of validation images without ground truth, or masks that were not there."""
    curves = {}
    monkeypatch.setattr(module, "line_chart", lambda title, unit, found, **_: curves.update({title: found}) or "")
    rows = [{"epoch": e, "iteration": e, "AP": e / 10, "AP50": -1, "segm_AP": [-1, 0.5][e % 2]} for e in (1, 2, 3)]
    report(tmp_path, history=[*rows, {"epoch": 3, "iteration": 9, "loss": 1}])
    drawn = {curve.label: (curve.x.tolist(), curve.y.tolist()) for curve in curves[list(curves)[1]]}
    assert drawn == {"AP": ([1, 2, 3], [0.1, 0.2, 0.3]), "segm_AP": ([1, 3], [0.5, 0.5])}


def test_eighty_classes(tmp_path):
    names = tuple(f"class {i}" for i in range(80))
    text = full(tmp_path, names)
    words = "".join(Page(text).words)
    assert all(name in words for name in names)
    assert "best 4 and worst 5 classes" in words
    assert len(text) < 2_000_000


def test_one_epoch_and_no_ground_truth(tmp_path):
    text = report(
        tmp_path,
        evaluation={"AP": -1.0, "AP50": float("nan"), "per_class": {"person": {"AP": -1.0, "AP50": -1.0}}},
        pr_curves={"person": (RECALL, -np.ones(101))},
        samples=[ReportSample(sample(("person",)).result, np.zeros((0, 4)), np.zeros(0, int))],
    )
    page = Page(text)
    words = " ".join(page.words)
    assert "hold no ground truth" in words and "-1.0" not in words and "nan" not in words.lower()
    assert "truth: 0" in words
    assert text.count("<svg") == 1


@pytest.mark.parametrize("history", [[], [{}], [{"iteration": 5, "loss": float("nan")}], [{"loss": 1}, {"loss": 2}]])
def test_hardly_anything_known(tmp_path, history):
    assert not Page(report(tmp_path, history=history)).open


def test_rows_within_epochs_are_drawn_by_iteration(tmp_path):
    history = [{"epoch": i // 4, "iteration": 50 * i, "loss": 5 - i / 10} for i in range(40)]
    assert ">iteration</text>" in report(tmp_path, history=history)


def test_a_long_run_makes_no_larger_page(tmp_path):
    history = [{"iteration": i, "loss": 5 + np.sin(i)} for i in range(1, 20_000)]
    assert len(report(tmp_path, history=history)) < 100_000


def test_unwritable_path(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match=r"report\.html"):
        report(tmp_path)
