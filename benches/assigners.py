"""RTMDet trained with each assigner: AP, time and memory of short runs, alike in all else.

    python -m benches.assigners --bccd FOLDER --hit-uav FOLDER [--init WEIGHTS] [--epochs 12] [--out FOLDER]

Every run is a process of its own: its peak of memory counts model, data and all that PyTorch loads. Time is that of a
training step with its data, the median over the run; on a CPU the processor's own, which others' work disturbs less.
A run that is done is not done again, and its figures are in results.json and table.md at once, so that the bench may be
killed at any time and run again, also with other sizes, into the same folder; nothing of it goes on without it. A run
that fails is told of, and tried again next time. `--toy` tries the bench itself, in a minute.

Data sets as of benches.finetuning; drawn scenes where none is given.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from benches.finetuning import data_sets
from benches.harness import status
from rtmdet_fast.files import write_atomically, write_json
from rtmdet_fast.models.rtmdet.detection_head import ASSIGNERS
from rtmdet_fast.training.callbacks import Callback, Progress
from rtmdet_fast.training.config import Settings, TrainConfig
from rtmdet_fast.training.train import train


class Steps(Callback):
    """Time and memory of the steps before the first validation, which takes more of both."""

    def on_start(self, settings: Settings, iteration: int) -> None:
        self.cuda = settings.device.startswith("cuda")
        self.clock = time.perf_counter if self.cuda else time.process_time
        self.times: list[float] = []
        self.bytes = 0
        self.validated = False

    def on_step(self, progress: Progress) -> None:
        if not self.validated:
            self.times.append(self.clock())
            self.bytes = torch.cuda.max_memory_allocated() if self.cuda else status("VmHWM")

    def on_epoch(self, progress: Progress) -> None:
        self.times.append(float("nan"))  # between two epochs no step is taken
        self.validated |= "AP" in progress.metrics

    @property
    def seconds(self) -> float:
        taken = [after - before for before, after in zip(self.times, self.times[1:], strict=False)]
        return median(value for value in taken if value == value)


def end_with_parent() -> None:
    """Of a bench that is killed no run goes on, to write where the next one does."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def run(settings: dict[str, Any]) -> dict[str, float]:
    """Figures of one run."""
    steps = Steps()
    result = train(TrainConfig(**settings), callbacks=[steps])
    figures = {"AP": result.metrics["AP"], "AP50": result.metrics["AP50"], "wall seconds": round(result.seconds)}
    return {**figures, "seconds": steps.seconds, "bytes": steps.bytes}


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Of each group of runs, by assigner the means over the seeds, and AP of each."""
    lines = []
    for group, runs in results.items():
        lines += [
            f"### {group}",
            "",
            "| assigner | AP | of each seed | AP50 | s an iteration | peak, MB |",
            "|---|---|---|---|---|---|",
        ]
        for assigner in ASSIGNERS:
            found = [figures for key, figures in runs.items() if key.startswith(f"{assigner}, ")]
            if found:
                ap, ap50, seconds, size = (mean(f[name] for f in found) for name in ("AP", "AP50", "seconds", "bytes"))
                seeds = " ".join(f"{figures['AP']:.3f}" for figures in found)
                lines.append(f"| {assigner} | {ap:.3f} | {seeds} | {ap50:.3f} | {seconds:.3f} | {size / 1e6:.0f} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bccd", type=Path)
    parser.add_argument("--hit-uav", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/assigners"))
    parser.add_argument("--init", help="weights to start from, a file or a published name; fresh ones without")
    parser.add_argument("--freeze", choices=["backbone"], help="what stays as --init has it")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--toy", action="store_true", help="tiny images, two epochs, drawn scenes of a few images")
    arguments = parser.parse_args()
    if arguments.toy:
        arguments.epochs, arguments.seeds, arguments.image_size = 2, 1, 64
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "results.json"
    results: dict[str, dict[str, dict[str, float]]] = json.loads(path.read_text()) if path.exists() else {}
    failed: list[str] = []
    sets = data_sets(arguments)
    if len(sets) > 1:
        del sets["drawn"]
    for name, paths in sets.items():
        start = "" if arguments.init is None else f" from {Path(arguments.init).stem}"
        start += "" if arguments.freeze is None else f", {arguments.freeze} frozen"
        steps = f"{arguments.batch_size} images of {arguments.image_size} px a step, {arguments.epochs} epochs"
        group = results.setdefault(f"{name}: RTMDet-{arguments.size}{start}, {steps}", {})
        for seed in range(arguments.seeds):
            # A B C, then C B A: a machine that others slow does so to none alone
            for assigner in ASSIGNERS[:: -1 if seed % 2 else 1]:
                if (key := f"{assigner}, seed {seed}") not in group:
                    settings = dict(
                        **paths,
                        out=arguments.out / "run",
                        size=arguments.size,
                        init=arguments.init,
                        freeze=arguments.freeze,
                        assigner=assigner,
                        epochs=arguments.epochs,
                        batch_size=arguments.batch_size,
                        image_size=arguments.image_size,
                        val_interval=arguments.epochs,
                        seed=seed,
                        device=arguments.device,
                        num_workers=0,
                        loggers=(),
                        overwrite=True,
                        report=False,
                        progress=False,
                    )
                    context = multiprocessing.get_context("spawn")
                    with ProcessPoolExecutor(1, mp_context=context, initializer=end_with_parent) as pool:
                        try:
                            group[key] = pool.submit(run, settings).result()
                        except Exception as error:
                            failed.append(f"{name}, {key}: {type(error).__name__}: {error}")
                            print(failed[-1], flush=True)
                            continue
                    write_json(path, results)
                    with write_atomically(arguments.out / "table.md") as file:
                        file.write(table(results).encode())
                print(f"{name}, {key}: {group[key]}", flush=True)
    print(table(results))
    if failed:
        sys.exit("\n".join(["some runs failed:", *failed]))


if __name__ == "__main__":
    main()
