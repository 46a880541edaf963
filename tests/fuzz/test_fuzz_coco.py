"""Mutated COCO files are read, or refused in a sentence, and nothing of them is lost without a word."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from fuzzing import PARTS, accounted, add_odd_images, fuzz, load_all, told_in_a_line
from mutations import MUTATIONS, SIZE, damage, dumps, pick

from rtmdet_fast.data.augment import Augmenter
from rtmdet_fast.data.check import ImageCheck
from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.data.plan import PlanSampler
from rtmdet_fast.data.recipes import recipe_for
from rtmdet_fast.data.shapes import make_shapes
from rtmdet_fast.evaluation.coco import score_detections

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Annotations and image folder of a small data set, masks of both kinds, and the names of odd images there."""
    shapes = make_shapes(tmp_path_factory.mktemp("shapes"), num_train=6, num_val=1, image_size=SIZE, seed=3)
    content = json.loads(shapes.train_ann.read_text())
    for a in content["annotations"][::3]:
        x, y, w, h = a["bbox"]
        runs = [x * SIZE + y] + [h, SIZE - h] * w
        runs[-1] = SIZE * SIZE - sum(runs[:-1])
        a["segmentation"] = {"size": [SIZE, SIZE], "counts": runs}
    return content, shapes.train_images, add_odd_images(shapes.train_images)


@pytest.mark.parametrize("part", range(PARTS))
def test_mutated_files(drawn, tmp_path, part, record_property):
    content, images, odd = drawn
    path = tmp_path / "a.json"

    def case(rng, outcomes):
        mutated = copy.deepcopy(content)
        for _ in range(rng.integers(1, 5)):
            pick(rng, MUTATIONS)(rng, mutated, odd)
        data = dumps(rng, mutated)
        path.write_bytes(damage(rng, data) if rng.random() < 0.15 else data)
        options = {"skip_bad": rng.random() < 0.6, "masks": rng.random() < 0.5}
        with told_in_a_line(outcomes):
            evaluated(path, images, options)
        with told_in_a_line({}):
            trained_on(path, images, options, rng.integers(2**31))

    outcomes = fuzz(part, 3000, case)
    record_property("annotation files fuzzed", sum(outcomes.values()))
    assert outcomes.keys() == {"read", "refused"}


def evaluated(path: Path, images: Path, options: dict[str, bool]) -> None:
    dataset = CocoDataset(path, images, **options)
    ImageCheck(dataset).report(wait=None)
    samples = load_all(dataset)
    truth = dataset.to_coco()
    accounted(dataset, json.loads(path.read_text("utf-8-sig")), truth, samples)
    annotations = truth.dataset["annotations"]
    found = [{key: a[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.5} for a in annotations]
    if len(dataset):
        score_detections(dataset, found)
    if len(dataset) and options["masks"]:
        masks = [{**d, "segmentation": truth.annToRLE(a)} for d, a in zip(found, annotations, strict=True)]
        for d in masks:
            del d["bbox"]
        score_detections(dataset, masks, iou_type="segm")


def trained_on(path: Path, images: Path, options: dict[str, bool], seed: int) -> None:
    dataset = CocoDataset(path, images, training=True, **options)
    ImageCheck(dataset).report(wait=None)
    recipe = recipe_for("tiny", SIZE, masks=options["masks"])
    plans = next(iter(PlanSampler(len(dataset), 2, recipe, seed, 0)))
    augmenter = Augmenter(dataset, recipe)
    for plan in plans:
        image, boxes, labels, *_ = augmenter[plan]
        assert image.shape == (3, SIZE, SIZE) and len(boxes) == len(labels)
        assert bool(boxes.isfinite().all()) and labels.tolist() <= [len(dataset.class_names)] * len(labels)
