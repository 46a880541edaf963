"""Ground truth and detections to be counted: random ones in files, and overlaps of a few boxes."""

import json

import numpy as np
from pycocotools import mask

from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.evaluation.overlaps import LEAST_IOU, Overlaps


def made_dataset(folder, rng, images=8, classes=4, objects=9):
    """Objects on a coarse grid, so that boxes repeat and IoUs tie; crowds, odd areas, a class without any."""
    folder.mkdir(exist_ok=True)
    annotations = []
    for image in range(1, images):
        for _ in range(rng.integers(objects)):
            x, y, w, h = (rng.integers(0, 4, 2) * 20).tolist() + (rng.integers(1, 5, 2) * 20).tolist()
            crowd = int(rng.random() < 0.15)
            area = w * h * rng.choice([0.5, 1.0, 4.0])
            entry = {"image_id": 10 * image, "category_id": 3 * int(rng.integers(1, classes)), "bbox": [x, y, w, h]}
            annotations.append({**entry, "id": len(annotations), "area": area, "iscrowd": crowd})
    content = {
        "images": [{"id": 10 * i, "file_name": "x.png", "width": 160, "height": 160} for i in range(images)][::-1],
        "annotations": annotations,
        "categories": [{"id": 3 * (classes - i), "name": f"c{i}"} for i in range(classes)],
    }
    (folder / "x.png").write_bytes(b"")
    (folder / "a.json").write_text(json.dumps(content))
    return CocoDataset(folder / "a.json", folder)


def made_detections(dataset, rng, per_image=30, jitter=3.0):
    truth = dataset.to_coco()
    found = []
    for image_id in dataset.image_ids:
        anns = truth.imgToAnns.get(image_id, [])
        for _ in range(rng.integers(per_image + 1)):
            source = anns[rng.integers(len(anns))] if anns and rng.random() < 0.8 else None
            box = source["bbox"] if source else (rng.integers(0, 8, 4) * 10 + 5).tolist()
            shift = rng.normal(0, jitter, 4) if rng.random() < 0.7 else np.zeros(4)
            category = source["category_id"] if source and rng.random() < 0.8 else int(rng.choice([3, 6, 9, 12, 99]))
            box = np.abs(np.array(box) + shift) + (0, 0, 1, 1) * (shift != 0)
            score = round(float(rng.random()), 1)  # so that scores tie
            found.append({"image_id": image_id, "category_id": category, "bbox": box.tolist(), "score": score})
    return found


def overlaps(objects, detections, ignored=(), images=None, limit=100):
    """Of rows image, label, x, y, w, h and image, label, score, x, y, w, h."""
    objects = np.array(objects, float).reshape(-1, 6)
    detections = np.array(detections, float).reshape(-1, 7)
    detections = detections[np.lexsort((-detections[:, 2], detections[:, 0]))]
    crowd = np.isin(np.arange(len(objects)), list(ignored))
    iou = np.zeros((len(detections), len(objects)))
    if iou.size:
        iou = mask.iou(detections[:, 3:], objects[:, 2:], crowd.astype(int).tolist())
    iou = iou * (detections[:, :1] == objects[:, 0])
    dets, gts = np.nonzero(iou >= LEAST_IOU)
    boxes = np.concatenate([objects[:, 2:4], objects[:, 2:4] + objects[:, 4:]], 1)
    of_dets = detections[:, 0].astype(int), detections[:, 2], detections[:, 1].astype(int), detections[:, 5:].prod(1)
    of_gts = objects[:, 0].astype(int), objects[:, 1].astype(int), objects[:, 4:].prod(1), boxes
    most = int(max([*detections[:, 0], *objects[:, 0]], default=-1)) + 1 if images is None else images
    return Overlaps(most, *of_dets, *of_gts, crowd, dets, gts, iou[dets, gts], limit)
