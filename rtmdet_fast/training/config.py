"""The settings of a training run, and every default worked out."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rtmdet_fast.errors import UserError

BOUNDS = {
    "epochs": (1, 10**6),
    "batch_size": (1, 2**16),
    "accumulate": (1, 2**16),
    "val_interval": (1, 10**6),
    "warmup_iterations": (0, 10**9),
    "num_workers": (0, 256),
    "seed": (0, 2**32 - 1),
    "weight_decay": (0, 1e9),
    "ema_momentum": (0, 1),
}
"""The least and the greatest value of a setting."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a detector on a COCO-format data set."""

    data: Path | None = None
    """Folder laid out like COCO (rotated: or DOTA), in place of the four paths below."""
    train: Path | None = None
    """Annotation file of the training images (COCO JSON; rotated: or a folder of DOTA text files)."""
    train_images: Path | None = None
    """Folder of the training images."""
    val: Path | None = None
    """Annotation file of the validation images; without it there is no validation."""
    val_images: Path | None = None
    """Folder of the validation images."""
    out: Path = Path("runs/train")
    """Where checkpoints, metrics.csv, TensorBoard logs and report.html go."""
    size: str = "tiny"
    """nano, tiny, s, m, l or x."""
    task: str = "det"
    """What to detect: det (boxes), ins (boxes and masks) or rotated (rotated boxes)."""
    init: str | None = None
    """Weights to start from: a file, or a published name such as rtmdet-tiny or cspnext-tiny (ImageNet backbone)."""
    epochs: int | None = None
    """Passes over the training images; 300 (rotated: 36) where not given."""
    stage2_epochs: int | None = None
    """Last epochs without mosaic and mixup, which rotated never has; 20 of 300 in proportion where not given."""
    batch_size: int | None = None
    """Images per step and process; 32 (rotated: 8) where not given."""
    accumulate: int = 1
    """Batches whose gradients are added up before the optimiser steps."""
    image_size: int | None = None
    """Side of the training images in pixels, a multiple of 32; 640 (nano: 320, rotated: 1024) where not given."""
    lr: float | None = None
    """Base learning rate; 4e-3 (x: 2e-3) at 256 images per step of all processes, rotated 2.5e-4 at 8, times the square
    root of the step's share of it."""
    weight_decay: float = 0.05
    """Weight decay of AdamW on convolution weights."""
    warmup_iterations: int | None = None
    """Steps of linear warm-up; 1000, but at most a tenth of the run, where not given."""
    ema_momentum: float = 2e-4
    """Share of the new weights in the moving average, after its own warm-up."""
    amp: str = "auto"
    """Mixed precision: none, bf16 or fp16; auto is bf16 on a GPU that has it and none elsewhere."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes the first GPU where there is one."""
    num_workers: int | None = None
    """Loader processes; one less than the cores, at most 8, where not given. 0 loads in the main process."""
    seed: int = 0
    """Seed of weights, order and augmentation."""
    val_interval: int | None = None
    """Epochs between validations; a thirtieth of the run, and every one of stage 2, where not given."""
    skip_bad: bool = False
    """Go on over unreadable images and invalid annotations, and count them."""
    resume: bool = False
    """Continue the run in `out` from its last checkpoint."""
    overwrite: bool = False
    """Start anew in an `out` that holds a run already."""
    compile: bool = False
    """Compile the model with torch.compile."""
    report: bool = True
    """Write report.html at the end."""
    progress: bool = True
    """Show progress bars."""


@dataclass(frozen=True, kw_only=True)
class Settings(TrainConfig):
    """A config with every default worked out that does not hang on the data."""

    train: Path
    train_images: Path
    epochs: int
    stage2_epochs: int
    batch_size: int
    image_size: int
    lr: float
    """Of the first step after warm-up."""
    num_workers: int

    def as_json(self) -> dict[str, Any]:
        """What config.json and the state in last.pth hold."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}


@dataclass(frozen=True)
class TrainResult:
    """What a run gave: figures of its best epoch (empty without validation), and where things lie."""

    metrics: dict[str, float]
    best_epoch: int | None
    seconds: float
    seconds_per_iteration: float
    last: Path
    best: Path
    report: Path | None
    skipped: dict[str, int]
    """Images and annotations left out of training, and of validation, by reason."""
    noticed: dict[str, int]
    """Those that are odd and were used all the same."""


def check_bounds(config: Any) -> None:
    """Raises UserError where a setting of a command lies outside its BOUNDS."""
    for name, (least, most) in BOUNDS.items():
        value = getattr(config, name, None)
        if value is not None and not least <= value <= most:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must lie between {least} and {most}")


def resolve(config: TrainConfig) -> Settings:
    """The config with every default worked out. Raises UserError for values that cannot be."""
    # here: `rtmdet-fast --help` shows the settings, and has no need of PyTorch
    import torch

    from rtmdet_fast.devices import pick_device
    from rtmdet_fast.models.detector import check_image_size
    from rtmdet_fast.models.rtmdet.model import default_image_size
    from rtmdet_fast.tasks import TASKS
    from rtmdet_fast.training.distributed import process_count

    if config.task not in TASKS:
        raise UserError(f"--task {config.task!r} is unknown; choose one of {', '.join(TASKS)}")
    task = TASKS[config.task]
    check_bounds(config)
    if config.lr is not None and not 0 < config.lr < math.inf:
        raise UserError(f"--lr is {config.lr}; it must be above 0")
    train, train_images, val, val_images = config.train, config.train_images, config.val, config.val_images
    if config.data is not None:
        if train or train_images or val or val_images:
            raise UserError("--data stands in place of --train, --train-images, --val and --val-images")
        train, train_images = task.find_split(config.data, "train")
        val, val_images = task.find_split(config.data, "val")
    if train is None or train_images is None:
        raise UserError("give --train FILE and --train-images FOLDER, or --data FOLDER")
    if (val is None) != (val_images is None):
        raise UserError("--val and --val-images go together")
    if config.amp not in ("auto", "none", "bf16", "fp16"):
        raise UserError(f"--amp {config.amp!r} is unknown; choose none, bf16, fp16 or auto")
    device = pick_device(config.device)
    amp = config.amp
    if amp == "auto":
        amp = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "none"
    if amp == "fp16" and device.type == "cpu":
        raise UserError("--amp fp16 needs a GPU; a CPU takes bf16 or none")
    epochs = task.epochs if config.epochs is None else config.epochs
    stage2 = config.stage2_epochs if task.two_stages else 0
    if stage2 is None:
        stage2 = max(round(epochs * 20 / 300), 1) if epochs > 1 else 0
    if not 0 <= stage2 <= epochs:
        raise UserError(f"--stage2-epochs {stage2} must lie between 0 and --epochs {epochs}")
    image_size = default_image_size(config.size, config.task) if config.image_size is None else config.image_size
    batch_size = task.batch_size if config.batch_size is None else config.batch_size
    lr = config.lr
    if lr is None:
        images_per_step = batch_size * config.accumulate * process_count()
        lr = task.lr_of_size.get(config.size, task.lr) * math.sqrt(images_per_step / task.lr_batch)
    workers = config.num_workers
    if workers is None:
        workers = min(max((os.cpu_count() or 1) - 1, 0), 8)
    resolved = {
        "data": None,
        "train": train,
        "train_images": train_images,
        "val": val,
        "val_images": val_images,
        "device": str(device),
        "amp": amp,
        "epochs": epochs,
        "stage2_epochs": stage2,
        "batch_size": batch_size,
        "image_size": check_image_size(image_size),
        "lr": lr,
        "num_workers": workers,
    }
    return Settings(**{f.name: getattr(config, f.name) for f in fields(TrainConfig)} | resolved)
