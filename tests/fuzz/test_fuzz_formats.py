"""Mutated YOLO text, data.yaml and VOC XML: read or refused in a sentence, and nothing lost without a word."""

from __future__ import annotations

import shutil
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzing import PARTS, add_odd_images, fuzz, load_all, told_in_a_line
from mutations import SIZE, Rng, damage, pick

from rtmdet_fast.data.check import ImageCheck
from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.data.convert import write_dataset
from rtmdet_fast.data.formats import FORMATS
from rtmdet_fast.data.layout import find_sources
from rtmdet_fast.data.shapes import make_shapes
from rtmdet_fast.tasks import TASKS

pytestmark = pytest.mark.slow
FIELDS = (*"nan inf -inf 1e400 -1 0 1 2 99 0.5 1.0000001 -0.1 20 1_0 ٣ 円 0x1 cat".split(), "9" * 5000, "\0", "")
LINES = ("", " \t", "1 2 3", "\0" * 9, "\x0c", "\ufeff", "0 .5 .5 .1 .1 .9", "0 " + ".5 " * 8, "0 " + ".5 " * 501)
YAML = ("names: [a]", "names:", "nc: -1", "nc: 3", "path: /", "train: .", "train: [a, ..]", "val: images/train", "x")
YAML += (
    "kpt_shape: [2, x]",
    "kpt_shape: [0, 3]",
    "names: {0: a, 0: b}",
    "names: {-1: a}",
    "\tx: y",
    "names: [a, a, b]",
)
YAML += (f"train: {'a' * 300}", "train: ../../../../etc", "train: /etc/passwd", "train: listed.txt", '"names": ["\\0"]')
TEXTS = (*FIELDS, "&lt;", "&x;", "<a/>", "]]>", "<!--", "-->", "<![CDATA[x]]>", '<!DOCTYPE a [<!ENTITY x "y">]>', "é")
LISTED = (*"train/000000 000000.jpg ../x /etc/passwd gone images/train/000001.jpg".split(), "", "\0", "a" * 300)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Data sets of boxes, polygons and oriented boxes, in both formats, with odd images among them."""
    root = tmp_path_factory.mktemp("drawn")
    shapes = make_shapes(root / "source", num_train=5, num_val=1, image_size=SIZE, seed=3)
    found = {}
    for task, kind in TASKS.items():
        splits = {"train": kind.open_dataset(find_sources(shapes.root, "train"))}
        for form in ("yolo", "voc"):
            folder = root / f"{task}_{form}"
            write_dataset(splits, form, folder)
            add_odd_images(folder / FORMATS[form].IMAGES.format("train"))
            found[task, form] = folder
    return found


@pytest.mark.parametrize("form", ["yolo", "voc"])
@pytest.mark.parametrize("part", range(PARTS))
def test_mutated_files(drawn, tmp_path, form, part, record_property):
    def case(rng, outcomes):
        task = pick(rng, tuple(TASKS))
        root = tmp_path / "data"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(drawn[task, form], root)
        for _ in range(rng.integers(1, 5)):
            (mutate_yolo if form == "yolo" else mutate_voc)(rng, root)
        skip_bad = rng.random() < 0.6
        with told_in_a_line(outcomes):
            evaluated(root, task, form, skip_bad)
        with told_in_a_line({}):
            dataset = TASKS[task].open_dataset(find_sources(root, "train"), skip_bad=skip_bad, training=True)
            ImageCheck(dataset).report(wait=None)
            for sample in load_all(dataset):
                assert np.isfinite(sample.boxes).all() and len(sample.boxes) == len(sample.labels)

    outcomes = fuzz(part, 2000, case)
    record_property("annotation files fuzzed", sum(outcomes.values()))
    assert outcomes.keys() == {"read", "refused"}


def mutate_yolo(rng: Rng, root: Path) -> None:
    kind = int(rng.integers(6))
    if kind == 0:
        path = root / "data.yaml"
        lines = path.read_text("utf-8", "surrogateescape").split("\n")
        lines.insert(int(rng.integers(len(lines) + 1)), pick(rng, YAML))
        path.write_text("\n".join(lines), "utf-8", "surrogateescape")
        if rng.random() < 0.3:
            path.write_bytes(damage(rng, path.read_bytes()))
        return
    if kind == 1:
        lines = [f"./images/train/{i:06d}.jpg" for i in rng.permutation(6).tolist()]
        lines.insert(int(rng.integers(6)), pick(rng, LISTED))
        (root / "listed.txt").write_text("\n".join(lines))
        (root / "data.yaml").write_text("names: [a, b, c, d, e]\ntrain: listed.txt\n")
        return
    mutate_a_file(rng, sorted((root / "labels/train").glob("*.txt")), FIELDS, LINES)


def mutate_voc(rng: Rng, root: Path) -> None:
    kind = int(rng.integers(6))
    path = root / "ImageSets/Main/train.txt"
    if kind == 0 and path.is_file():
        path.write_text(path.read_text() + pick(rng, LISTED) + "\n")
        return
    if kind == 1:
        shutil.rmtree(root / "ImageSets", ignore_errors=True)
        (root / "train").mkdir(exist_ok=True)
        for path in (*(root / "Annotations").glob("*.xml"), *(root / "JPEGImages").glob("*")):
            shutil.copy(path, root / "train")
        return
    if kind == 2 and rng.random() < 0.2:
        shutil.rmtree(root / pick(rng, ("Annotations", "JPEGImages")), ignore_errors=True)
    files = sorted((*(root / "Annotations").glob("*.xml"), *(root / "train").glob("*.xml")))
    if not files:
        return
    mutate_a_file(rng, files, TEXTS, ("<object>", "</object>", "<bndbox/>", "<polygon><x1>5</x1></polygon>", *TEXTS))


def mutate_a_file(rng: Rng, files: list[Path], fields: tuple[str, ...], lines: tuple[str, ...]) -> None:
    path = pick(rng, files)
    rows = path.read_text("utf-8", "surrogateescape").split("\n")
    at = int(rng.integers(len(rows)))
    kind = int(rng.integers(8))
    if kind < 3:
        separator = " " if " " in rows[at].strip() else ">"
        words = rows[at].split(separator)
        place = int(rng.integers(len(words)))
        value = pick(rng, fields)
        words[place] = value if separator == " " else f"{value}<{words[place].partition('<')[2]}"
        rows[at] = separator.join(words)
    elif kind == 3:
        del rows[at]
    elif kind == 4:
        rows.insert(at, pick(rng, lines))
    elif kind == 5:
        rows.insert(at, rows[at])
    elif kind == 6:
        path.unlink()
        return
    else:
        path.rename(path.with_stem(pick(rng, ("none", "a" * 240, "line\nbreak", "円", " ", "two", "deep"))))
        return
    data = "\n".join(rows).encode("utf-8", "surrogateescape")
    path.write_bytes(damage(rng, data) if rng.random() < 0.1 else data)


def evaluated(root: Path, task: str, form: str, skip_bad: bool) -> None:
    sources = find_sources(root, "train")
    dataset = TASKS[task].open_dataset(sources, skip_bad=skip_bad)
    ImageCheck(dataset).report(wait=None)
    load_all(dataset)
    truth = dataset.to_coco()
    if len(sources) == 1:
        accounted(dataset, given(sources[0], form), truth)


def given(source: Any, form: str) -> int:
    """Objects that the files in use hold: lines, or <object> elements, of files that can be read."""
    count = 0
    if form == "voc":
        for path in FORMATS["voc"]._xml_files(source, Silent):
            with suppress(ValueError):  # it is counted as an unreadable label file
                count += len(list(FORMATS["voc"].read_xml(path).iter("object")))
        return count
    for image in FORMATS["yolo"]._images(source, Silent):
        path = FORMATS["yolo"]._label_file(source, image)
        with suppress(OSError, UnicodeDecodeError):
            count += sum(1 for line in path.read_text("utf-8-sig").split("\n") if line.split())
    return count


class Silent:
    @staticmethod
    def bad(*_: object) -> None:
        pass

    skip = bad


def accounted(dataset: CocoDataset, objects: int, truth: Any) -> None:
    """Every object is one of the ground truth or in `skipped`, but for those of images that were left out."""
    counts = Counter({reason: len(what) for reason, what in dataset.skipped.items()})
    left_out = counts["unreadable image"] + counts["missing image"] + counts["duplicate image id"]
    reasons = ("malformed line", "malformed object", "class number", "has no segmentation", "segmentation", "neither")
    reasons += ("annotation without a mask", "angle beyond", "box with a negative side", "is of an image without width")
    reasons += ("coordinates beyond", "bbox reaches", "is of an image")
    told = sum(n for reason, n in counts.items() if reason.startswith(reasons))
    lost = objects - len(truth.dataset["annotations"]) - told
    assert lost == 0 or (lost > 0 and left_out), dict(counts)
