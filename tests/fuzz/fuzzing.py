"""What the fuzz tests share: cases by Hypothesis, what may come out, odd images."""

from __future__ import annotations

import faulthandler
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from rtmdet_fast.data.coco import CocoDataset, Sample
from rtmdet_fast.errors import UserError

SEED = int(os.environ.get("RTMDET_FAST_FUZZ_SEED", "0"))
PARTS = 8  # of a round, for pytest-xdist
PATIENCE = 600  # seconds after which a case has hung: where it stands is printed, and the process ends
MOST_MEMORY = 1 << 21  # KiB that a process may grow by, whatever it read


class Drawn:
    """Hypothesis in the place of a numpy.random.Generator, as far as mutations use one: what fails is made smaller."""

    def __init__(self, data: st.DataObject):
        self._data = data

    def integers(self, low: int, high: int | None = None, size: int | None = None) -> Any:
        low, high = (0, low) if high is None else (low, high)
        if size is None:
            return self._data.draw(st.integers(low, high - 1))
        return np.array([self.integers(low, high) for _ in range(size)], np.int64)

    def random(self) -> float:
        return self.integers(1 << 20) / (1 << 20)  # evenly: Hypothesis's own floats are most often 0

    def uniform(self, low: float, high: float, size: int | None = None) -> Any:
        if size is None:
            return low + (high - low) * self.random()
        return np.array([self.uniform(low, high) for _ in range(size)])

    def choice(self, options: Any) -> Any:
        return options[self.integers(len(options))]

    def permutation(self, count: int) -> np.ndarray:
        return np.array(self._data.draw(st.permutations(range(count))), np.int64)


def fuzz(part: int, count: int, run: Callable[[Drawn, dict[str, int]], None]) -> dict[str, int]:
    """Runs a part of `count` cases, which RTMDET_FAST_FUZZ_COUNT sets too; how many were read and refused."""
    count = int(os.environ.get("RTMDET_FAST_FUZZ_COUNT", count))
    outcomes: dict[str, int] = {}

    @seed(SEED * PARTS + part)
    @settings(
        max_examples=len(range(part, count, PARTS)),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(st.data())
    def case(data: st.DataObject) -> None:
        run(Drawn(data), outcomes)

    before = peak_memory()
    case()
    grown = peak_memory() - before
    assert grown < MOST_MEMORY, f"the process grew by {grown} KiB"
    print(f"part {part}: {outcomes}, {grown >> 10} MiB")
    return outcomes


def peak_memory() -> int:
    """Of this process, in KiB; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 1024 if sys.platform == "darwin" else peak


@contextmanager
def told_in_a_line(outcomes: dict[str, int]) -> Iterator[None]:
    """Counts a case as read or refused. All that may come out of it is a UserError and warnings, of one line each."""
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", UserWarning)
            try:
                yield
                outcomes["read"] = outcomes.get("read", 0) + 1
            except UserError as error:
                assert str(error).isprintable(), f"{error!r}"
                outcomes["refused"] = outcomes.get("refused", 0) + 1
        for warning in told:
            assert str(warning.message).isprintable(), f"{warning.message!r}"
    finally:
        faulthandler.cancel_dump_traceback_later()


def add_odd_images(folder: Path) -> tuple[str, ...]:
    """Images beside those of a data set, cut, empty, without end, tiny, deep and of other kinds; their names."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    jpeg, png = (cv2.imencode(suffix, noise)[1].tobytes() for suffix in (".jpg", ".png"))
    files = {
        "cut.jpg": jpeg[:-1],
        "half.png": png[: len(png) // 2],
        "endless.jpg": jpeg[:-100] + bytes(100),
        "empty.jpg": b"",
        "two.png": png[:2],
        "text.jpg": b"<html>404</html>",
        "tiny.png": cv2.imencode(".png", noise[:4, :4])[1].tobytes(),
        "deep.png": cv2.imencode(".png", noise[:, :, 0].astype(np.uint16) << 8)[1].tobytes(),
        "line\nbreak.png": png,
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return tuple(files)


def load_all(dataset: CocoDataset) -> list[Sample]:
    """Its samples, with skip_bad without the images that cannot be read."""
    samples = []
    for i in range(len(dataset)):
        with suppress(UserError) if dataset.skip_bad else nullcontext():
            samples.append(dataset.load(i))
    return samples


NO_BOXES = ("box below one pixel", "box outside the image", "box without area")


def accounted(dataset: CocoDataset, content: Any, truth: Any, samples: list[Any]) -> None:
    """All that the file gives is in the ground truth and the samples, or in `skipped`, or belongs to what is there."""
    given = content.get("annotations") or []
    images = content["images"]
    listed = {e["id"] for e in images if isinstance(e, dict) and type(e.get("id")) is int}
    of_no_image = [
        a
        for a in given
        if isinstance(a, dict)
        and isinstance(a.get("image_id"), (int, float))
        and a["image_id"] in listed
        and a["image_id"] not in dataset.image_ids
    ]
    counts = Counter({reason: len(what) for reason, what in dataset.skipped.items()})
    of_images = ("an image", "image ", "missing image", "duplicate image id", "unreadable image", "malformed, it needs")
    left_out_images = sum(n for reason, n in counts.items() if reason.startswith(of_images))
    unreadable = counts["unreadable image"]
    assert len(dataset) + left_out_images - unreadable == len(images)
    assert len(samples) == len(dataset) - unreadable
    no_boxes = sum(n for reason, n in counts.items() if reason in NO_BOXES)
    parts = sum(n for reason, n in counts.items() if reason.startswith("polygon"))
    categories = sum(n for reason, n in counts.items() if reason.startswith("category"))
    left_out = counts.total() - left_out_images - no_boxes - parts - categories
    entries = truth.dataset["annotations"]
    assert 0 <= len(given) - left_out - len(entries) <= len(of_no_image)
    ignored = sum(1 for a in entries if a["iscrowd"] or a["ignore"])
    expected = len(entries) - ignored - no_boxes
    sized = all(type(e.get("width")) is int and type(e.get("height")) is int for e in truth.dataset["images"])
    shown = sum(len(sample.boxes) for sample in samples)
    assert shown <= expected
    if sized and not dataset.resized_count and not unreadable and all(e["width"] for e in truth.dataset["images"]):
        assert shown == expected
