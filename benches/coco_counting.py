"""COCO's figures of 5,000 images with 100 detections each: this library, pycocotools, faster-coco-eval.

`python -m benches.coco_counting [IMAGES]`. Seconds are of the processor, from lists of detections to the twelve
figures; faster-coco-eval takes part where it is installed.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.evaluation.coco import METRICS, score_detections

DETECTIONS, CLASSES, SIDE = 100, 80, 640
PEERS = {"pycocotools": ("pycocotools", "COCOeval"), "faster-coco-eval": ("faster_coco_eval", "COCOeval_faster")}


def made(folder: Path, images: int) -> tuple[CocoDataset, list[dict[str, Any]]]:
    """1 to 14 objects an image, one in a hundred a crowd, and detections near them, three in ten of another class."""
    rng = np.random.default_rng(0)
    annotations: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []
    for image in range(1, images + 1):
        count = rng.integers(1, 15)
        boxes = np.concatenate([rng.uniform(0, 500, (count, 2)), rng.uniform(10, 140, (count, 2))], 1)
        labels = rng.integers(1, CLASSES + 1, count)
        for box, label in zip(boxes.tolist(), labels.tolist(), strict=True):
            crowd = int(rng.random() < 0.01)
            entry = {"id": len(annotations) + 1, "image_id": image, "category_id": label, "bbox": box}
            annotations.append({**entry, "area": box[2] * box[3], "iscrowd": crowd})
        source = rng.integers(0, count, DETECTIONS)
        near = boxes[source] + rng.normal(0, 8, (DETECTIONS, 4))
        near[:, 2:] = np.abs(near[:, 2:]) + 1
        other = rng.integers(1, CLASSES + 1, DETECTIONS)
        found = np.where(rng.random(DETECTIONS) < 0.7, labels[source], other)
        for box, label, score in zip(near.tolist(), found.tolist(), rng.random(DETECTIONS).tolist(), strict=True):
            detections.append({"image_id": image, "category_id": label, "bbox": box, "score": score})
    listed = [{"id": i, "file_name": "x.png", "width": SIDE, "height": SIDE} for i in range(1, images + 1)]
    categories = [{"id": i, "name": f"class {i}"} for i in range(1, CLASSES + 1)]
    (folder / "x.png").write_bytes(b"")
    (folder / "a.json").write_text(json.dumps({"images": listed, "annotations": annotations, "categories": categories}))
    return CocoDataset(folder / "a.json", folder), detections


def peer_figures(dataset: CocoDataset, detections: list[dict[str, Any]], package: str, evaluator: str) -> list[float]:
    """The twelve figures by a peer, with its own objects throughout."""
    coco = importlib.import_module(f"{package}.coco" if package == "pycocotools" else package).COCO
    cocoeval = getattr(
        importlib.import_module(f"{package}.cocoeval" if package == "pycocotools" else package), evaluator
    )
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco(str(dataset.annotation_path))
        scorer = cocoeval(truth, truth.loadRes(detections), "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return [float(value) for value in scorer.stats[:12]]


def main(images: int) -> None:
    """Prints a line for each."""
    with tempfile.TemporaryDirectory() as folder:
        dataset, detections = made(Path(folder), images)
        started = time.process_time()
        ours = score_detections(dataset, detections).metrics
        print(f"{'rtmdet_fast':16} {time.process_time() - started:7.2f} s   AP {ours['AP']:.6f}", flush=True)
        for name, (package, evaluator) in PEERS.items():
            copied = copy.deepcopy(detections)  # they write into them
            started = time.process_time()
            try:
                theirs = peer_figures(dataset, copied, package, evaluator)
            except ImportError:
                print(f"{name:16} is not installed")
                continue
            gap = max(abs(ours[key] - value) for key, value in zip(METRICS, theirs, strict=True))
            print(f"{name:16} {time.process_time() - started:7.2f} s   figures differ by {gap:.1e} at most", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5000)
