"""Which settings fine-tune best: a grid of short runs from weights of other classes, on several data sets.

    python -m benches.finetuning --init WEIGHTS --bccd FOLDER --hit-uav FOLDER [--epochs 20 50 100] [--out FOLDER]

Compares, for each data set and number of epochs, the published 300-epoch settings cut short with changes of learning
rate, warm-up, share of the epochs without mosaic, and averaging: one factor at a time from the settings that are best
so far, then the settings found, together. `--full` tries every combination. AP is the mean over the seeds, of the
last epoch's averaged weights and of the best epoch's; a run that is done is not done again, so that the bench may be
stopped at any time. Writes results.json and table.md. `--toy` tries the bench itself, in minutes.

Data sets, each left out where it is not given: BCCD (COCO JSON: train.json, val.json, images/), HIT-UAV (DOTA text:
train/images, train/labelTxt, val/…; its boxes taken upright), and drawn scenes, which need no files.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

from rtmdet_fast import RTMDet
from rtmdet_fast.data.dota import DotaDataset
from rtmdet_fast.data.shapes import make_shapes
from rtmdet_fast.files import write_atomically, write_json
from rtmdet_fast.training.config import TrainConfig
from rtmdet_fast.training.recipe import rtmdet_recipe
from rtmdet_fast.training.run_log import read_metrics
from rtmdet_fast.training.train import train

PUBLISHED_EMA = 2e-4


@dataclass(frozen=True)
class Choice:
    """Of one run, what is tried; the defaults are the published settings, cut short."""

    lr: float = 1.0
    """Times the default rate at this batch size."""
    warmup: float | None = None
    """Share of the run; the default, 1000 steps or a tenth, where None."""
    plain: float = 20 / 300
    """Share of the epochs, the last ones, without mosaic and mixup."""
    ema: str = "constant"
    """constant: the published momentum; length: by the length of the run; none: the weights as they are."""

    def __str__(self) -> str:
        warmup = "published" if self.warmup is None else f"{self.warmup:.0%}"
        return f"rate x{self.lr:g}, warm-up {warmup}, plain {self.plain:.0%}, averaging {self.ema}"


FACTORS: dict[str, tuple] = {
    "ema": ("constant", "length", "none"),
    "lr": (0.25, 0.5, 1.0, 2.0, 4.0),
    "warmup": (None, 0.0, 0.05),
    "plain": (20 / 300, 0.2, 0.5),
}


def choices(full: bool, scores: dict[Choice, float]) -> Iterator[Choice]:
    """What to try next; `scores` grows while it goes, and decides on what follows."""
    if full:
        yield from (
            Choice(**dict(zip(FACTORS, values, strict=True))) for values in itertools.product(*FACTORS.values())
        )
        return
    yield Choice()
    best = Choice()
    for name, values in FACTORS.items():
        tried = [replace(best, **{name: value}) for value in values]
        yield from tried
        best = max(tried, key=lambda choice: scores[choice])


def data_sets(arguments: argparse.Namespace) -> dict[str, dict[str, Path]]:
    """By name: paths of a run."""
    found = {}
    if arguments.bccd:
        files = {part: arguments.bccd / f"{part}.json" for part in ("train", "val")}
        found["bccd"] = {**files, "train_images": arguments.bccd / "images", "val_images": arguments.bccd / "images"}
    if arguments.hit_uav:
        found["hit-uav"] = {
            key: value
            for part in ("train", "val")
            for key, value in (
                (part, upright(arguments, part)),
                (f"{part}_images", arguments.hit_uav / part / "images"),
            )
        }
    drawn = make_shapes(
        arguments.out / "drawn",
        num_train=24 if arguments.toy else 300,
        num_val=8 if arguments.toy else 100,
        image_size=arguments.image_size,
    )
    found["drawn"] = {
        "train": drawn.train_ann,
        "train_images": drawn.train_images,
        "val": drawn.val_ann,
        "val_images": drawn.val_images,
    }
    return found


def upright(arguments: argparse.Namespace, part: str) -> Path:
    """COCO JSON of DOTA text, with the upright boxes around its rotated ones."""
    dataset = DotaDataset(arguments.hit_uav / part / "labelTxt", arguments.hit_uav / part / "images")
    images, annotations = [], []
    for index in range(len(dataset)):
        height, width = dataset.load(index).image.shape[:2]
        images.append({"id": index, "file_name": dataset.files[index], "height": height, "width": width})
        truth = dataset.ground_truth(index)
        for (x, y, w, h, angle), label in zip(truth.boxes.tolist(), truth.labels.tolist(), strict=True):
            cos, sin = abs(math.cos(angle)), abs(math.sin(angle))
            box_width, box_height = w * cos + h * sin, w * sin + h * cos
            box = [x - box_width / 2, y - box_height / 2, box_width, box_height]
            entry = {"id": len(annotations) + 1, "image_id": index, "category_id": label + 1, "bbox": box}
            annotations.append({**entry, "area": box[2] * box[3], "iscrowd": 0})
    path = arguments.out / f"hit_uav_{part}.json"
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(dataset.class_names)]
    write_json(path, {"images": images, "annotations": annotations, "categories": categories})
    return path


def score(arguments: argparse.Namespace, name: str, paths: dict[str, Path], epochs: int, choice: Choice) -> dict:
    """AP of the last and of the best epoch, means over the seeds."""
    images = len(json.loads(paths["train"].read_text())["images"])
    steps = max(images // arguments.batch_size, 1) * epochs
    rate = rtmdet_recipe(arguments.size, None, "det", None).lr_of(arguments.batch_size)
    momentum = {"constant": PUBLISHED_EMA, "length": None, "none": 1.0}[choice.ema]
    last, best, seconds = [], [], 0.0
    for seed in range(arguments.seeds):
        out = arguments.out / "runs" / name
        result = train(
            TrainConfig(
                **paths,
                out=out,
                size=arguments.size,
                init=arguments.init,
                epochs=epochs,
                stage2_epochs=round(epochs * choice.plain),
                batch_size=arguments.batch_size,
                image_size=arguments.image_size,
                lr=choice.lr * rate,
                warmup_iterations=None if choice.warmup is None else round(choice.warmup * steps),
                ema_momentum=momentum,
                val_interval=max(epochs // 10, 1),
                seed=seed,
                device=arguments.device,
                num_workers=arguments.workers,
                loggers=(),
                overwrite=True,
                report=False,
            )
        )
        last.append([float(row["AP"]) for row in read_metrics(out / "metrics.csv") if row["AP"]][-1])
        best.append(result.metrics["AP"])
        seconds += result.seconds
    return {"last": mean(last), "best": mean(best), "by seed": last, "seconds": round(seconds)}


def table(results: dict[str, dict]) -> str:
    """The runs of each data set and length, the best first, with what they gain on the published settings."""
    lines = []
    groups: dict[str, dict[str, dict]] = {}
    for key, found in results.items():
        group, _, choice = key.partition(": ")
        groups.setdefault(group, {})[choice] = found
    for group, runs in groups.items():
        base = runs.get(str(Choice()), {"last": float("nan")})["last"]
        lines += [
            f"### {group}",
            "",
            "| settings | AP, last | gain | AP, best epoch | seeds | s |",
            "|---|---|---|---|---|---|",
        ]
        for choice, found in sorted(runs.items(), key=lambda item: -item[1]["last"]):
            seeds = " ".join(f"{value:.3f}" for value in found["by seed"])
            figures = f"{found['last']:.3f} | {found['last'] - base:+.3f} | {found['best']:.3f} | {seeds}"
            lines.append(
                f"| {choice}{' (published)' if choice == str(Choice()) else ''} | {figures} | {found['seconds']} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", help="weights of other classes, a file or a published name; fresh ones without")
    parser.add_argument("--bccd", type=Path)
    parser.add_argument("--hit-uav", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/finetuning"))
    parser.add_argument("--epochs", type=int, nargs="+", default=[20, 50, 100])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=320)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--full", action="store_true", help="every combination")
    parser.add_argument("--toy", action="store_true", help="tiny images, few epochs, drawn scenes of a few images")
    arguments = parser.parse_args()
    if arguments.toy:
        arguments.epochs, arguments.seeds, arguments.image_size, arguments.workers = [2], 1, 64, 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.init is None:  # of classes that none of the data sets has
        arguments.init = str(arguments.out / "fresh.pth")
        RTMDet(arguments.size, num_classes=7).save(arguments.init)
    path = arguments.out / "results.json"
    results: dict[str, dict] = json.loads(path.read_text()) if path.exists() else {}
    for name, paths in data_sets(arguments).items():
        for epochs in arguments.epochs:
            scores: dict[Choice, float] = {}
            for choice in choices(arguments.full, scores):
                key = f"{name}, {epochs} epochs: {choice}"
                if key not in results:
                    results[key] = score(arguments, name, paths, epochs, choice)
                    write_json(path, results)
                    with write_atomically(arguments.out / "table.md") as file:
                        file.write(table(results).encode())
                scores[choice] = results[key]["last"]
                print(f"{key}: AP {results[key]['last']:.3f}", flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
