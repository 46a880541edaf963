"""Kills a process that predicts a shard at each of its steps on the disk, and lets another one go on.

`python tests/predictor/killed_shards.py FOLDER`, a process of its own as its children are forks: prints how many kills
there were, and how many images are in the results after each.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import cv2
import numpy as np
import torch

from rtmdet_fast.inference.results import Results
from rtmdet_fast.inference.shards import Merged, Shard
from rtmdet_fast.predictor.shards import predict_shard
from rtmdet_fast.predictor.stream import Stream

IMAGES = 7


class Predictor:
    """Finds in an image a box as wide as its values tell."""

    task, class_names = "det", ("a",)

    def stream(self, frames, *, classes, write, total, progress):
        return Stream(frames, self.detect, write=write)

    def detect(self, images):
        boxes = [torch.tensor([[0.0, 0, float(image.mean()), 1]]) for image in images]
        return [
            Results(image, box, torch.ones(1), torch.zeros(1, dtype=torch.int64), self.class_names)
            for image, box in zip(images, boxes, strict=True)
        ]


def predict(folder: Path, out: Path) -> None:
    predict_shard(Predictor(), [folder], out, Shard(0, 1), resume=True, part_size=3, skip_bad=True)  # type: ignore[arg-type]


def forked(folder: Path, out: Path, last_step: int | None) -> bool:
    """Whether a process that predicts ends by itself, before its step of that number."""
    pid = os.fork()
    if pid == 0:
        steps = 0

        def count(event: str, arguments: tuple) -> None:
            nonlocal steps
            if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.chmod") and str(out) in str(arguments[0]):
                steps += 1
                if steps == last_step:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            predict(folder, out)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, status
    return status == 0


def main(folder: Path) -> None:
    images, out = folder / "images", folder / "out"
    images.mkdir()
    for i in range(IMAGES):
        cv2.imwrite(str(images / f"{i}.png"), np.full((4, 4, 3), i, np.uint8))
    (images / "bad.png").write_bytes(b"not an image")
    torch.set_num_threads(1)
    kills, counted = 0, []
    while True:
        shutil.rmtree(out, ignore_errors=True)
        if forked(images, out, kills + 1):
            break
        kills += 1
        assert forked(images, out, None)
        merged = Merged(out)
        rows = {row["file_name"]: row for row in merged.rows()}
        assert len(rows) == merged.total == merged.images + merged.unreadable and merged.repeated == 0
        assert rows.pop("bad.png")["error"]
        assert {name: row["detections"][0]["box"][2] for name, row in rows.items()} == {
            f"{i}.png": i for i in range(IMAGES)
        }
        left = [path.name for path in out.rglob("*") if path.suffix == ".tmp"]
        assert len(left) <= 1, left  # of the kill between a file's making and its first byte
        counted.append(merged.images)
    print(json.dumps({"kills": kills, "counted": counted}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
