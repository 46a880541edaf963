"""rtmdet-fast demo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtmdet_fast.cli.output import Outcome
from rtmdet_fast.cli.predict import PredictConfig, run_predict

LR = {"ins": 1e-3, "rotated": 1e-3}
"""Where not 2e-3, at which angles get worse again after the third epoch."""


def settings_of(model: str, task: str, epochs: int | None) -> dict[str, Any]:
    """What the demo changes in the published training of a family, for small scenes and few minutes."""
    if model == "rtdetr":  # all of it from scratch; without strong augmentation, which asks for more epochs
        epochs = 4 if epochs is None else epochs
        return dict(size="r18", version=2, queries=60, epochs=epochs, stage2_epochs=epochs, image_size=96, lr=8e-4)
    epochs = 10 if epochs is None else epochs
    # More than the 20 of 300 epochs of a full run: mosaics of small scenes are hard. No mosaic is like a scene with
    # little in it: after a third of plain epochs, without empty scenes, models of masks found objects in such.
    plain = dict(stage2_epochs=epochs // 2, empty_images=True) if task == "ins" else dict(stage2_epochs=epochs // 3)
    return dict(size="tiny", epochs=epochs, image_size=128, lr=LR.get(task, 2e-3), **plain)


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Draw a data set of shapes, train on it, evaluate, and write report.html and pictures. Needs no download."""

    model: str = "rtmdet"
    """The family of models: rtmdet (tiny) or rtdetr (r18)."""
    task: str = "det"
    """What to detect: det (boxes), ins (boxes and masks) or rotated (rotated boxes); rtdetr finds boxes alone."""
    out: Path = Path("runs/demo")
    """Where data, weights, report and pictures go."""
    epochs: int | None = None
    """Passes over the drawn images; 10 (rtdetr: 4) where not given."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes the first GPU where there is one."""
    seed: int = 0
    """Seed of weights, order and augmentation."""
    json: Path | None = None
    """Write the figures to this file."""


def run_demo(config: DemoConfig) -> Outcome:
    from rtmdet_fast.data.shapes import make_shapes, shapes_paths
    from rtmdet_fast.training.config import TrainConfig, resolve
    from rtmdet_fast.training.train import train

    shapes, settings = shapes_paths(config.out / "data"), settings_of(config.model, config.task, config.epochs)
    training = TrainConfig(
        train=shapes.train_ann,
        train_images=shapes.train_images,
        val=shapes.val_ann,
        val_images=shapes.val_images,
        out=config.out / "run",
        model=config.model,
        task=config.task,
        **settings,
        batch_size=8,
        num_workers=0,
        val_interval=max(settings["epochs"] // 3, 1),
        device=config.device,
        seed=config.seed,
        overwrite=True,
    )
    resolved = resolve(training)  # what is wrong with the arguments is told before anything is drawn
    make_shapes(shapes.root, num_train=1500, num_val=120, image_size=128, seed=config.seed)
    print(
        f"drew {shapes.train_images} and {shapes.val_images}; "
        f"training {resolved.model}-{resolved.size} for {resolved.epochs} epochs",
        flush=True,
    )
    result = train(training)
    pictures = run_predict(
        PredictConfig(
            source=(str(shapes.val_images),),
            weights=str(result.best),
            out=config.out / "pictures",
            device=config.device,
            limit=24,
        )
    )
    lines = [
        *pictures.lines,
        "",
        f"AP50 {result.metrics['AP50']:.3f}, AP {result.metrics['AP']:.3f} on {shapes.val_ann}",
    ]
    if "segm_AP" in result.metrics:
        lines.append(f"of masks: AP50 {result.metrics['segm_AP50']:.3f}, AP {result.metrics['segm_AP']:.3f}")
    lines += [f"look at   {result.report}", f"          {pictures.found['out']}/*.jpg"]
    found = {
        **result.metrics,
        "seconds": result.seconds,
        "seconds_per_iteration": result.seconds_per_iteration,
        "weights": str(result.best),
        "report": str(result.report),
        "pictures": pictures.found["out"],
    }
    return Outcome(found, lines)
