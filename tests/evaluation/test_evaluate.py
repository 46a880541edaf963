"""Evaluation against the reference's own detections and figures."""

import json

import numpy as np
import pytest
import torch
from pycocotools import mask

from rtmdet_fast import RTMDet, UserError
from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.data.dota import DotaDataset
from rtmdet_fast.evaluation.coco import METRICS, score_detections
from rtmdet_fast.evaluation.evaluate import evaluate, match_categories
from rtmdet_fast.inference.detections import Detections
from rtmdet_fast.inference.masks import PredictedMasks


@pytest.fixture(scope="module")
def bccd(shared):
    return CocoDataset(shared / "data/bccd/val.json", shared / "data/bccd/images")


@pytest.fixture(scope="module")
def expected(shared):
    return json.loads((shared / "reference/mmdet_results_bccd_rtmdet_tiny.json").read_text())


def test_the_references_checkpoint_gives_the_references_detections(shared, bccd, expected):
    model = RTMDet.from_pretrained(shared / "reference/mmdet_checkpoint_bccd_rtmdet_tiny.pth")
    found = evaluate(model, bccd, image_size=256, progress=False)
    assert found.metrics["AP"] == pytest.approx(0.478, abs=1e-3)
    assert found.metrics["AP50"] == pytest.approx(0.770, abs=1e-3)
    assert found.metrics["AP75"] == pytest.approx(0.547, abs=1e-3)
    assert tuple(found.metrics) == METRICS and set(found.per_class) == {"RBC", "WBC", "Platelets"}
    assert len(found.detections) == len(expected)
    for image_id in bccd.image_ids:
        ours, theirs = (
            np.array([[d["category_id"], d["score"], *d["bbox"]] for d in side if d["image_id"] == image_id])
            for side in (found.detections, expected)
        )
        gap = np.abs(ours[:, None] - theirs)
        gap[..., 4:] = np.abs((ours[:, None, 2:4] + ours[:, None, 4:]) - (theirs[:, 2:4] + theirs[:, 4:]))
        same = (gap[..., 0] == 0) & (gap[..., 1] < 2e-4) & (gap[..., 2:].max(-1) < 0.05)
        assert same.any(1).all() and same.any(0).all()


def test_scoring_the_references_own_detections(bccd, expected):
    assert score_detections(bccd, expected).metrics["AP"] == pytest.approx(0.4779, abs=1e-4)


def test_perfect_and_no_detections(bccd):
    truth = json.loads(bccd.annotation_path.read_text())["annotations"]
    perfect = [{k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 1.0} for a in truth]
    assert score_detections(bccd, perfect).metrics["AP"] > 0.99
    none = score_detections(bccd, [])
    assert none.metrics["AP"] == 0 and none.per_class["RBC"] == {"AP": 0.0, "AP50": 0.0}


def write_dataset(folder, names=("a", "b"), annotations=()):
    content = {
        "images": [{"id": 5, "file_name": "x.png", "width": 64, "height": 64}],
        "annotations": list(annotations),
        "categories": [{"id": 10 * (i + 1), "name": name} for i, name in enumerate(names)],
    }
    import cv2

    cv2.imwrite(str(folder / "x.png"), np.full((64, 64, 3), 90, np.uint8))
    (folder / "ann.json").write_text(json.dumps(content))
    return CocoDataset(folder / "ann.json", folder)


def test_a_data_set_without_annotations_has_figures_of_minus_one(tmp_path):
    dataset = write_dataset(tmp_path)
    result = evaluate(RTMDet("nano", class_names=("a", "b")), dataset, image_size=64, progress=False)
    assert result.metrics["AP"] == -1 and result.per_class["a"]["AP"] == -1 and not result.pr_curves


def test_crowds_swallow_detections(tmp_path):
    box = {"image_id": 5, "category_id": 10, "area": 400.0}
    dataset = write_dataset(
        tmp_path,
        annotations=[
            {"id": 1, "bbox": [0, 0, 20, 20], "iscrowd": 0, **box},
            {"id": 2, "bbox": [30, 30, 20, 20], "iscrowd": 1, **box},
        ],
    )
    detections = [
        {"image_id": 5, "category_id": 10, "bbox": [0, 0, 20, 20], "score": 0.5},
        {"image_id": 5, "category_id": 10, "bbox": [31, 31, 9, 9], "score": 0.9},
    ]
    assert score_detections(dataset, detections).metrics["AP"] == pytest.approx(1, abs=1e-6)


def test_classes_are_matched_by_name(tmp_path):
    dataset = write_dataset(tmp_path, names=("cat", "dog", "owl"))
    assert match_categories(RTMDet("nano", class_names=("owl", "cat")), dataset) == [30, 10]
    assert match_categories(RTMDet("nano", num_classes=3), dataset) == [10, 20, 30]
    with pytest.raises(UserError, match="'cow'"):
        match_categories(RTMDet("nano", class_names=("cat", "cow", "owl")), dataset)


def test_perfect_masks(shared):
    root = shared / "data/coco_tiny"
    dataset = CocoDataset(root / "instances_val.json", root / "val", masks=True)
    truth = dataset.to_coco()
    perfect = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "segmentation": truth.annToRLE(a), "score": 1.0}
        for a in truth.loadAnns(truth.getAnnIds(iscrowd=False))
    ]
    assert score_detections(dataset, perfect, iou_type="segm").metrics["AP"] > 0.99
    turned = [
        {**d, "segmentation": mask.encode(np.asfortranarray(mask.decode(d["segmentation"])[::-1]))} for d in perfect
    ]
    assert score_detections(dataset, turned, iou_type="segm").metrics["AP"] < 0.5
    assert score_detections(dataset, [], iou_type="segm").metrics["AP"] == 0
    larger = mask.encode(np.zeros((10, 10), np.uint8, order="F"))
    with pytest.raises(UserError, match=r"image .* pixels, and a detection's mask 10x10"):
        score_detections(dataset, [{**perfect[0], "segmentation": larger}], iou_type="segm")


def test_masks_of_images_whose_real_size_is_another(shared, tmp_path):
    """Every size in the file is wrong by a pixel: the figures stay, with polygons and with RLE as the truth."""
    images = shared / "data/coco_tiny/val"
    content = json.loads((shared / "data/coco_tiny/instances_val.json").read_text())
    content["annotations"] = [a for a in content["annotations"] if not a["iscrowd"]]

    def dataset(name):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(content))
        return CocoDataset(file, images, masks=True)

    honest = dataset("honest")
    wanted = evaluate(KnowsTheMasks(honest), honest, image_size=320, progress=False).metrics["segm_AP"]
    assert wanted > 0.5
    sizes = {}
    for entry in content["images"]:
        entry["width"], entry["height"] = entry["width"] + 1, entry["height"] - 1
        sizes[entry["id"]] = entry["height"], entry["width"]
    for name in ("polygons", "runs"):
        if name == "runs":
            for a in content["annotations"]:
                rle = mask.merge(mask.frPyObjects(a["segmentation"], *sizes[a["image_id"]]))
                a["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
        with pytest.warns(UserWarning, match="the real size is used"):
            found = evaluate(KnowsTheMasks(honest), dataset(name), image_size=320, progress=False).metrics
        assert found["segm_AP"] == pytest.approx(wanted, abs=0.01)


class KnowsTheMasks(RTMDet):
    """Answers with the ground truth: stride-8 logits of its masks on the letterboxed canvas."""

    def __init__(self, dataset):
        super().__init__("nano", "ins", class_names=dataset.class_names)
        self.dataset, self.next = dataset, 0

    def detect(self, canvases, scales, shapes, **_):
        found = []
        for scale, shape in zip(scales, shapes, strict=True):
            sample = self.dataset.load(self.next)
            self.next += 1
            size = canvases.shape[-1]
            masks = sample.masks.resized(scale).seen_through((0, 0, size, size))
            full = torch.zeros(len(masks), size, size)
            for i in range(len(masks)):
                x, y, pixels = masks.region(i)
                full[i, y : y + pixels.shape[0], x : x + pixels.shape[1]] = torch.from_numpy(pixels).float()
            logits = torch.nn.functional.avg_pool2d(full[None], 8)[0] - 0.5
            boxes, labels = torch.from_numpy(sample.boxes), torch.from_numpy(sample.labels)
            found.append(
                Detections(boxes, torch.ones(len(boxes)), labels, labels, PredictedMasks(logits, scale, shape))
            )
        return found


def test_masks_are_pasted_where_they_belong(shared):
    """Wide and high images, through logits of stride 8: nearly all large masks are found again."""
    root = shared / "data/coco_tiny"
    dataset = CocoDataset(root / "instances_val.json", root / "val", masks=True)
    found = evaluate(KnowsTheMasks(dataset), dataset, image_size=640, progress=False)
    assert found.metrics["AP"] > 0.99
    assert found.metrics["segm_APl"] > 0.99 and found.metrics["segm_AP50"] > 0.8  # small ones suffer from the stride
    assert set(found.metrics) == {*METRICS, *(f"segm_{name}" for name in METRICS)}
    assert {"AP", "AP50", "segm_AP", "segm_AP50"} == found.per_class["person"].keys()
    assert all(isinstance(d["segmentation"]["counts"], str) for d in found.detections)
    json.dumps(found.detections[:5])


def test_masks_are_not_evaluated_without_theirs(shared):
    root = shared / "data/coco_tiny"
    dataset = CocoDataset(root / "instances_val.json", root / "val")
    with pytest.raises(UserError, match="masks=True"):
        evaluate(RTMDet("nano", "ins", class_names=dataset.class_names), dataset, progress=False)


@pytest.mark.parametrize("task", ["det", "rotated"])
def test_a_data_set_of_the_other_kind_of_boxes_is_refused(tmp_path, task):
    upright = write_dataset(tmp_path)
    dataset = upright if task == "rotated" else DotaDataset(upright.annotation_path, tmp_path)
    with pytest.raises(UserError, match=f"boxes, but the model's task is '{task}'"):
        evaluate(RTMDet("nano", task, class_names=("a", "b")), dataset, progress=False)
