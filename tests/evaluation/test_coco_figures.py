"""COCO's figures beside pycocotools itself, which is the yardstick: equal to 1e-12, also where it is odd."""

import contextlib
import io
import json

import numpy as np
import pytest
from made_detections import made_dataset, made_detections

from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.errors import UserError
from rtmdet_fast.evaluation.coco import METRICS, score_detections


def pycocotools_figures(dataset, detections, image_ids=None, iou_type="bbox"):
    """(the twelve figures, precision [T, R, K] of all areas), by pycocotools' own loops."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = dataset.to_coco()
        if detections:
            found = truth.loadRes([dict(d) for d in detections])
        else:
            found = COCO()
            found.dataset = {**truth.dataset, "annotations": []}
            found.createIndex()
        scorer = COCOeval(truth, found, iou_type)
        if image_ids is not None:
            scorer.params.imgIds = sorted(image_ids)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return dict(zip(METRICS, scorer.stats.tolist(), strict=True)), scorer.eval["precision"][:, :, :, 0, -1]


def assert_equal(dataset, detections, image_ids=None, iou_type="bbox"):
    figures, precision = pycocotools_figures(dataset, detections, image_ids, iou_type)
    ours = score_detections(dataset, detections, image_ids, iou_type=iou_type)
    assert ours.metrics == pytest.approx(figures, abs=1e-12)
    ids = sorted(i for i in dataset.category_ids if i >= 0)
    assert list(ours.per_class) == [dataset.class_names[dataset.category_ids.index(i)] for i in ids]
    for k, (name, found) in enumerate(ours.per_class.items()):
        measured = precision[:, :, k][precision[:, :, k] > -1]
        assert found["AP"] == pytest.approx(measured.mean() if measured.size else -1, abs=1e-12)
        assert (name in ours.pr_curves) == bool(measured.size)
        if measured.size:
            np.testing.assert_allclose(ours.pr_curves[name][1], precision[0, :, k], atol=1e-12)
    return ours


@pytest.mark.parametrize("seed", range(12))
def test_every_figure_is_that_of_pycocotools(tmp_path, seed):
    rng = np.random.default_rng(seed)
    dataset = made_dataset(tmp_path, rng)
    detections = made_detections(dataset, rng)
    ours = assert_equal(dataset, detections)
    assert 0 < ours.metrics["AP50"] < 1
    assert_equal(dataset, detections, image_ids=[0, 10, 30, 70])


def test_of_more_than_a_hundred_detections_of_a_class_the_best_count(tmp_path):
    rng = np.random.default_rng(0)
    dataset = made_dataset(tmp_path, rng, images=3)
    assert_equal(dataset, made_detections(dataset, rng, per_image=900, jitter=8))


def test_nothing_found_and_nothing_there(tmp_path):
    rng = np.random.default_rng(1)
    assert_equal(made_dataset(tmp_path, rng), [])
    empty = made_dataset(tmp_path / "empty", rng, objects=1)
    assert set(assert_equal(empty, made_detections(empty, rng)).metrics.values()) == {-1.0}


def test_masks_and_crowds_of_coco(shared):
    """Real masks, moved by some pixels; the file has crowds as runs."""
    from pycocotools import mask

    root = shared / "data/coco_tiny"
    dataset = CocoDataset(root / "instances_val.json", root / "val", masks=True)
    truth, rng = dataset.to_coco(), np.random.default_rng(0)
    found = []
    for a in truth.dataset["annotations"]:
        for _ in range(rng.integers(4)):
            pixels = np.roll(truth.annToMask(a), rng.integers(-6, 7, 2), (0, 1))
            rle = mask.encode(np.asfortranarray(pixels))
            rle["counts"] = rle["counts"].decode()
            category = a["category_id"] if rng.random() < 0.9 else 1
            entry = {"image_id": a["image_id"], "category_id": category, "segmentation": rle}
            found.append({**entry, "score": float(rng.random())})
    ours = assert_equal(dataset, found, iou_type="segm")
    assert ours.overlaps is not None and ours.overlaps.ignored.any()


def test_the_references_own_detections(shared):
    dataset = CocoDataset(shared / "data/bccd/val.json", shared / "data/bccd/images")
    found = json.loads((shared / "reference/mmdet_results_bccd_rtmdet_tiny.json").read_text())
    assert_equal(dataset, found)


def test_detections_in_an_unknown_image_are_refused(tmp_path):
    dataset = made_dataset(tmp_path, np.random.default_rng(0))
    with pytest.raises(UserError, match="has no image 5"):
        score_detections(dataset, [{"image_id": 5, "category_id": 3, "bbox": [0, 0, 1, 1], "score": 1.0}])
