"""Mutated rotated annotations, DOTA text and JSON: read or refused in a sentence, nothing lost without a word."""

from __future__ import annotations

import copy
import json
import shutil
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzing import PARTS, accounted, add_odd_images, fuzz, load_all, told_in_a_line
from mutations import MUTATIONS, SIZE, Rng, damage, dumps, pick, rotated_box

from rtmdet_fast.data.augment_rotated import RotatedAugmenter
from rtmdet_fast.data.check import ImageCheck
from rtmdet_fast.data.dota import DotaDataset
from rtmdet_fast.data.plan import SamplePlan
from rtmdet_fast.data.recipes import rotated_recipe
from rtmdet_fast.data.shapes import make_shapes
from rtmdet_fast.evaluation.dota import rotated_map
from rtmdet_fast.geometry.rotated import boxes_to_quads

pytestmark = pytest.mark.slow
FIELDS = (*"nan inf -1e308 1e400 1e7 x -5 0.5 1_0 ٣ 円 ship".split(), "9" * 5000, "\0", "ship\a")
LINES = ("gsd:1", "imagesource:x", "gsd", "", " \t", "1 2 3", "\0" * 9, "\x0c", "0 0 9 0 9 9 0 9 ship 0 0", "\ufeff")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """JSON and the lines of text files of a small data set, its image folder, and the names of odd images there."""
    shapes = make_shapes(tmp_path_factory.mktemp("shapes"), num_train=6, num_val=1, image_size=SIZE, seed=3)
    content = json.loads(shapes.train_ann.read_text())
    lines: dict[str, list[str]] = {Path(e["file_name"]).stem: ["imagesource:x", "gsd:1"] for e in content["images"]}
    names = list(lines)
    for i, a in enumerate(content["annotations"]):
        quad = boxes_to_quads(np.array([a["rbox"]]))[0].round(1).tolist()
        lines[names[a["image_id"] - 1]].append(" ".join(map(str, (*quad, f"class{a['category_id']}", i % 5 // 3))))
        form = i % 3
        if form:
            del a["rbox"]
        if form == 1:
            a["bbox"] = quad
    return content, lines, shapes.train_images, add_odd_images(shapes.train_images)


@pytest.mark.parametrize("part", range(PARTS))
def test_mutated_json(drawn, tmp_path, part, record_property):
    content, _, images, odd = drawn
    path = tmp_path / "a.json"

    def case(rng, outcomes):
        mutated = copy.deepcopy(content)
        for _ in range(rng.integers(1, 5)):
            pick(rng, (*MUTATIONS, rotated_box, rotated_box))(rng, mutated, odd)
        data = dumps(rng, mutated)
        path.write_bytes(damage(rng, data) if rng.random() < 0.15 else data)
        read(path, images, rng, outcomes)

    outcomes = fuzz(part, 1500, case)
    record_property("annotation files fuzzed", sum(outcomes.values()))
    assert outcomes.keys() == {"read", "refused"}


@pytest.mark.parametrize("part", range(PARTS))
def test_mutated_text(drawn, tmp_path, part, record_property):
    _, lines, images, odd = drawn

    def case(rng, outcomes):
        mutated = copy.deepcopy(lines)
        for _ in range(rng.integers(1, 5)):
            mutate_lines(rng, mutated, odd)
        labels = tmp_path / "labels"
        shutil.rmtree(labels, ignore_errors=True)
        labels.mkdir()
        for name, text in mutated.items():
            data = "\n".join(text).encode("utf-8", "surrogatepass")
            (labels / f"{name}.txt").write_bytes(damage(rng, data) if rng.random() < 0.03 else data)
        read(labels, images, rng, outcomes)

    outcomes = fuzz(part, 1500, case)
    record_property("annotation files fuzzed", sum(outcomes.values()))
    assert outcomes.keys() == {"read", "refused"}


def mutate_lines(rng: Rng, files: dict[str, list[str]], odd: tuple[str, ...]) -> None:
    name = pick(rng, list(files))
    lines = files[name]
    at = int(rng.integers(len(lines)))
    fields = lines[at].split(" ")
    kind = int(rng.integers(8))
    if kind == 0:
        fields[int(rng.integers(len(fields)))] = pick(rng, FIELDS)
    elif kind == 1:
        fields.insert(int(rng.integers(len(fields) + 1)), pick(rng, FIELDS))
    elif kind == 2:
        del fields[int(rng.integers(len(fields)))]
    elif kind == 3:
        fields = [*rng.uniform(-90, 160, 8).round(int(rng.integers(3))).astype(str), pick(rng, ("ship", "plane")), "0"]
    elif kind == 4:  # points on a line, or all the same
        fields = [*np.repeat(rng.integers(0, 64, 4), (1, 3, 0, 4)).astype(str), "ship"]
    elif kind == 5:
        lines.insert(at, pick(rng, LINES))
        return
    elif kind == 6:
        files[Path(pick(rng, odd)).stem] = copy.copy(lines)
        return
    else:
        files[pick(rng, ("none", "a" * 240, "line\nbreak", "円", " "))] = files.pop(name)
        return
    lines[at] = pick(rng, (" ", " ", "\t", "  ")).join(fields)


def read(path: Path, images: Path, rng: Rng, outcomes: dict[str, int]) -> None:
    skip_bad = rng.random() < 0.6
    with told_in_a_line(outcomes):
        evaluated(path, images, skip_bad)
    with told_in_a_line({}):
        trained_on(path, images, skip_bad, int(rng.integers(2**31)))


def evaluated(path: Path, images: Path, skip_bad: bool) -> None:
    dataset = DotaDataset(path, images, skip_bad=skip_bad)
    ImageCheck(dataset).report(wait=None)
    samples = load_all(dataset)
    truth = dataset.to_coco()
    if path.is_dir():
        text_accounted(dataset, path, truth)
    else:
        accounted(dataset, json.loads(path.read_text("utf-8-sig")), truth, samples)
    targets = [dataset.ground_truth(i) for i in range(len(dataset))]
    with_area = sum(a["rbox"][3] > 1e-6 * max(1.0, a["rbox"][2]) for a in truth.dataset["annotations"])
    assert sum(len(t.boxes) for t in targets) == with_area
    rotated_map(targets, [(t.boxes, np.ones(len(t.boxes)), t.labels) for t in targets], dataset.class_names)


def text_accounted(dataset: DotaDataset, folder: Path, truth: Any) -> None:
    """Every line is a box of the ground truth or in `skipped`, but for files that were left out as a whole."""
    counts = Counter({reason: len(what) for reason, what in dataset.skipped.items()})
    files = sorted(folder.glob("*.txt"))
    left_out = sum(counts[reason] for reason in ("unreadable label file", "missing image"))
    assert len(dataset) + left_out == len(files)
    given = 0
    for path in files:
        with suppress(UnicodeDecodeError):
            rows = [line.split() for line in path.read_text("utf-8-sig").split("\n")]
            given += sum(1 for row in rows if row and not row[0].lower().startswith(("imagesource:", "gsd:")))
    lost = given - len(truth.dataset["annotations"]) - counts["malformed line"]
    assert lost == 0 or (lost > 0 and left_out)


def trained_on(path: Path, images: Path, skip_bad: bool, seed: int) -> None:
    dataset = DotaDataset(path, images, skip_bad=skip_bad, training=True)
    ImageCheck(dataset).report(wait=None)
    augmenter = RotatedAugmenter(dataset, rotated_recipe(SIZE, dataset.class_names))
    for index in {0, len(dataset) - 1}:
        image, boxes, labels = augmenter[SamplePlan(index, seed)]
        assert image.shape == (3, SIZE, SIZE) and len(boxes) == len(labels)
        assert bool(boxes.isfinite().all()) and all(0 <= label < len(dataset.class_names) for label in labels.tolist())
