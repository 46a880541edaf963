import re

import cv2
import numpy as np
import pytest
from browser import WIDTHS, beyond, needs_browser
from html_page import NASTY, Page
from made_detections import made_dataset, made_detections

from rtmdet_fast.errors import UserError
from rtmdet_fast.evaluation import report as module
from rtmdet_fast.evaluation.analysis import analyse
from rtmdet_fast.evaluation.coco import score_detections
from rtmdet_fast.evaluation.pictures import SAMPLES, WORST, Drawn, ReportSample, report_samples
from rtmdet_fast.evaluation.report import write_report
from rtmdet_fast.geometry.masks import Region, encode

RECALL = np.linspace(0, 1, 101)


def sample(**changes):
    image = np.full((64, 96, 3), 90, np.uint8)
    boxes, labels = np.array([[10.0, 10, 50, 40], [20, 5, 90, 60]]), np.zeros(2, int)
    arguments = {"truth": Drawn(boxes, labels), "found": Drawn(boxes[:1], labels[:1], np.array([0.9]))}
    return ReportSample("street.jpg", image, **arguments | changes)


def report(tmp_path, **changes):
    arguments = {"title": "a run", "history": [{"epoch": 1, "loss": 2.0}], "evaluation": {}}
    arguments |= {"pr_curves": {}, "settings": {}, "class_names": ("person",)}
    path = write_report(tmp_path / "runs" / "report.html", **arguments | changes)
    return path.read_text(encoding="utf-8")


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
        class_names=names,
        samples=[sample(), sample()],
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


def test_masks_and_colours_are_drawn(tmp_path):
    mask = np.zeros((64, 96), bool)
    mask[15:35, 15:45] = True
    masks = [encode(Region(0, 0, mask), mask.shape)] * 2
    plain = sample()
    truth = Drawn(plain.truth.boxes, plain.truth.labels, None, masks)
    red = Drawn(plain.found.boxes, plain.found.labels, plain.found.scores, colors=[(0, 0, 255)])
    samples = (plain, sample(truth=truth), sample(found=red, note="missed <b>"))
    pages = [report(tmp_path, samples=[s], evaluation={"AP": 0.5, "segm_AP": 0.4}) for s in samples]
    pictures = [re.findall('src="(.*?)"', page) for page in pages]
    assert pictures[1][0] != pictures[0][0] and pictures[1][1] == pictures[0][1]
    assert pictures[2][0] == pictures[0][0] and pictures[2][1] != pictures[0][1]
    assert "mask AP, IoU .50 to .95" in pages[0] and "missed &lt;b&gt;" in pages[2]


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
        samples=[sample(truth=Drawn(np.zeros((0, 4)), np.zeros(0, int)))],
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


def made_evaluation(folder, **options):
    rng = np.random.default_rng(0)
    dataset = made_dataset(folder, rng, **options)
    cv2.imwrite(str(folder / "x.png"), rng.integers(0, 255, (160, 160, 3), np.uint8))
    evaluation = score_detections(dataset, made_detections(dataset, rng))
    return dataset, evaluation, analyse(evaluation, dataset.class_names)


def analysed_report(tmp_path, dataset, evaluation, analysis):
    worst, samples = report_samples(dataset, evaluation, analysis)
    batch = np.random.default_rng(0).integers(0, 255, (1300, 1300, 3)).astype(np.uint8)
    return report(
        tmp_path,
        evaluation={**evaluation.metrics, "per_class": evaluation.per_class},
        pr_curves=evaluation.pr_curves,
        class_names=dataset.class_names,
        analysis=analysis,
        worst=worst,
        samples=samples,
        batches=[("a batch", batch), ("another", batch)],
        train_objects=np.arange(len(dataset.class_names)),
    )


def test_what_an_analysis_found_stands_in_the_page(tmp_path):
    dataset, evaluation, analysis = made_evaluation(tmp_path, images=40)
    text = analysed_report(tmp_path, dataset, evaluation, analysis)
    page = Page(text)
    words = " ".join(" ".join(page.words).split())
    assert not page.open and not page.tags & {"script", "link", "iframe", "object"}
    for expected in (
        "F1 by score threshold",
        "What fixing each kind would gain",
        "Confusion matrix",
        "taken for",
        "The worst images",
        "By size of the object",
        "By objects in the image",
        "By overlap with another object",
        "Objects of training",
        "Objects of validation",
        "a batch",
        f"at {analysis.thresholds[1]:.2f}",
        f"now {evaluation.metrics['AP50']:.3f}",
    ):
        assert expected in words, expected
    counts = [int(cell or 0) for cell in re.findall(r"--share:[\d.]+\">(\d*)<", text)]
    assert sum(counts) == analysis.confusion.sum() and max(counts) == analysis.confusion.max()
    assert text.count("data:image/jpeg") == 2 * (WORST + text.count("prediction:") // 2 - WORST) + 2


@needs_browser
def test_everything_fits_phones_and_desktops(tmp_path):
    dataset, evaluation, analysis = made_evaluation(tmp_path, images=12, classes=100, objects=20)
    analysed_report(tmp_path, dataset, evaluation, analysis)
    page = tmp_path / "runs/report.html"
    assert beyond(page) == {width: [] for width in WIDTHS}
    page.write_text('<p style="height: 400px; width: 640px">too wide', encoding="utf-8")
    found = beyond(page)
    assert found[360] == ["P : too wide", "the page: 648"] and not found[768]


def test_the_worst_images_come_first_and_are_not_shown_twice(tmp_path):
    dataset, evaluation, analysis = made_evaluation(tmp_path, images=20)
    worst, samples = report_samples(dataset, evaluation, analysis)
    assert len(worst) == WORST and len(samples) <= SAMPLES and len(worst) + len(samples) <= 20
    first = analysis.worst_images(evaluation.overlaps, 1)[0]
    kept = analysis.kept & (evaluation.overlaps.det_images == first)
    assert worst[0].note == analysis.told(evaluation.overlaps, first)
    assert worst[0].found.scores.tolist() == evaluation.overlaps.scores[kept].tolist()
    boxes = [d for d in evaluation.detections if d["image_id"] == evaluation.image_ids[first]]
    best = max(boxes, key=lambda d: (d["score"], d["category_id"] in dataset.category_ids))
    assert best["score"] >= worst[0].found.scores[0]
    assert len(worst[0].found.colors) == len(worst[0].found.boxes) and samples[0].found.colors is None


def test_an_image_that_is_gone_is_left_out(tmp_path):
    dataset, evaluation, analysis = made_evaluation(tmp_path, images=6)
    (tmp_path / "x.png").unlink()
    assert report_samples(dataset, evaluation, analysis) == ([], [])


def test_without_objects_there_are_pictures_all_the_same(tmp_path):
    dataset, evaluation, analysis = made_evaluation(tmp_path, images=3, objects=1)
    assert analysis is None
    worst, samples = report_samples(dataset, evaluation, analysis)
    assert not worst and len(samples) == 3


def test_any_data_set_makes_a_page_below_its_bound(tmp_path):
    dataset, evaluation, analysis = made_evaluation(tmp_path, images=30, classes=300, objects=60)
    text = analysed_report(tmp_path, dataset, evaluation, analysis)
    assert len(text) < 10_000_000  # of pictures that are nothing but noise
    matrix = text[text.index('class="matrix"') : text.index("Most frequent confusions")]
    assert matrix.count("<tr>") == 18 and "the 16 classes that are confused most" in text


def test_unwritable_path(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match=r"report\.html"):
        report(tmp_path)
