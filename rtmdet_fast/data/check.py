"""A look at every image file of a run, before its first step as far as that takes seconds, else beside it."""

from __future__ import annotations

import threading
import time
import warnings

from tqdm import tqdm

from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.errors import UserError, shown
from rtmdet_fast.images import CUT, SEVERAL, check_image

CHECK_SECONDS = 10.0  # that a run waits for, before it starts
THREADS = 4
NAMED = 3  # files in a sentence


class ImageCheck:
    """Looks for images that cannot be read, in threads of its own; `report` tells of them.

    Header and end of a file are looked at; it is decoded only where these are not as they should be.
    """

    def __init__(self, *datasets: CocoDataset) -> None:
        import cv2  # noqa: F401
        from PIL import Image

        Image.init()  # all imports here: a loader worker forked while a thread imports could not import it any more
        self._datasets = datasets
        self._total = sum(map(len, datasets))
        self._waiting = iter([(dataset, index) for dataset in datasets for index in range(len(dataset))])
        self._checked = 0
        self._found: list[tuple[CocoDataset, int, UserError | str]] = []  # why it cannot be read, or what is odd
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(min(THREADS, self._total))]
        for thread in self._threads:
            thread.start()

    def report(self, wait: float | None = 0.0, *, progress: bool = False) -> None:
        """Tells what was found since the last call, once all is checked or `wait` seconds are over (None: no limit).

        Raises UserError where images cannot be read, unless their data set has skip_bad: then they are left out, and
        counted in its `skipped`. Files that can be read but are odd are counted in its `noticed`. Warns of both.
        """
        until = None if wait is None else time.monotonic() + wait
        with tqdm(
            total=self._total, desc="check images", unit="img", delay=1, disable=not progress, leave=False
        ) as bar:
            for thread in self._threads:
                while thread.is_alive() and (until is None or time.monotonic() < until):
                    thread.join(0.1)
                    bar.update(self._checked - bar.n)
        with self._lock:
            found, self._found = self._found, []
        for dataset in self._datasets:
            faults = sorted(((i, what) for d, i, what in found if d is dataset), key=lambda fault: fault[0])
            _tell_of_unreadable(dataset, [(i, what) for i, what in faults if isinstance(what, UserError)])
            for oddity in ODD:
                _tell_of_odd(dataset, oddity, [i for i, what in faults if what == oddity])

    def _work(self) -> None:
        while True:
            with self._lock:
                dataset, index = next(self._waiting, (None, 0))
            if dataset is None:
                return
            found: list[UserError | str]
            try:
                found = [*check_image(dataset.image_dir / dataset.files[index])]
            except UserError as fault:
                found = [fault]
            with self._lock:
                self._checked += 1
                self._found += [(dataset, index, what) for what in found]


ODD = {CUT: "lack their end; what is missing of them is grey", SEVERAL: "hold several pictures; the first is used"}


def _tell_of_odd(dataset: CocoDataset, oddity: str, indices: list[int]) -> None:
    if indices:
        files = [shown(dataset.files[index]) for index in indices]
        dataset.noticed.setdefault(oddity, []).extend(files)
        what, _, consequence = ODD[oddity].partition("; ")
        warnings.warn(f"{_sentence(dataset, files, what)}; {consequence}", stacklevel=3)


def _tell_of_unreadable(dataset: CocoDataset, faults: list[tuple[int, UserError]]) -> None:
    if not faults:
        return
    text = _sentence(dataset, [shown(dataset.files[index]) for index, _ in faults], "cannot be read")
    if not dataset.skip_bad:
        raise UserError(f"{text} ({faults[0][1]}); replace them, or leave them out with --skip-bad")
    dataset.leave_out([index for index, _ in faults])
    warnings.warn(f"{text}; they are left out", stacklevel=3)


def _sentence(dataset: CocoDataset, files: list[str], what: str) -> str:
    return (
        f"{dataset.annotation_path}: {len(files)} of its {len(dataset)} images {what}: "
        f"{', '.join(files[:NAMED])}{', …' if len(files) > NAMED else ''}"
    )
