"""A look at every image file of a run, before its first step as far as that takes seconds, else beside it."""

from __future__ import annotations

import threading
import time
import warnings

from tqdm import tqdm

from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.errors import UserError, shown
from rtmdet_fast.images import check_image

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
        self._found: list[tuple[CocoDataset, int, UserError | None]] = []  # None: it can be read, without its end
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(min(THREADS, self._total))]
        for thread in self._threads:
            thread.start()

    def report(self, wait: float | None = 0.0, *, progress: bool = False) -> None:
        """Tells what was found since the last call, once all is checked or `wait` seconds are over (None: no limit).

        Raises UserError where images cannot be read, unless their data set has skip_bad: then they are left out, and
        counted in its `skipped`. Files that can be read but lack their end are counted in its `noticed`. Warns of both.
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
            faults = sorted(((index, error) for d, index, error in found if d is dataset), key=lambda fault: fault[0])
            _tell(dataset, [fault for fault in faults if fault[1] is not None], "cannot be read")
            _tell(dataset, [fault for fault in faults if fault[1] is None], "lack their end")

    def _work(self) -> None:
        while True:
            with self._lock:
                dataset, index = next(self._waiting, (None, 0))
            if dataset is None:
                return
            error, whole = None, True
            try:
                whole = check_image(dataset.image_dir / dataset.files[index])
            except UserError as fault:
                error = fault
            with self._lock:
                self._checked += 1
                if not whole or error is not None:
                    self._found.append((dataset, index, error))


def _tell(dataset: CocoDataset, faults: list[tuple[int, UserError | None]], what: str) -> None:
    if not faults:
        return
    files = [shown(dataset.files[index]) for index, _ in faults]
    text = (
        f"{dataset.annotation_path}: {len(faults)} of its {len(dataset)} images {what}: "
        f"{', '.join(files[:NAMED])}{', …' if len(files) > NAMED else ''}"
    )
    error = faults[0][1]
    if error is None:
        dataset.noticed.setdefault("image file without its end", []).extend(files)
        warnings.warn(f"{text}; what is missing of them is grey", stacklevel=3)
    elif dataset.skip_bad:
        dataset.leave_out([index for index, _ in faults])
        warnings.warn(f"{text}; they are left out", stacklevel=3)
    else:
        raise UserError(f"{text} ({error}); replace them, or leave them out with --skip-bad")
