"""The settings of a training run, and every default worked out."""

from __future__ import annotations

import math
import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rtmdet_fast.errors import UserError

if TYPE_CHECKING:
    from rtmdet_fast.data.coco import CocoDataset
    from rtmdet_fast.data.source import Source
    from rtmdet_fast.training.recipe import Recipe

BOUNDS = {
    "epochs": (1, 10**6),
    "batch_size": (1, 2**16),
    "accumulate": (1, 2**16),
    "val_interval": (1, 10**6),
    "queries": (1, 2**16),
    "version": (1, 2),
    "warmup_iterations": (0, 10**9),
    "num_workers": (0, 256),
    "seed": (0, 2**32 - 1),
    "weight_decay": (0, 1e9),
    "ema_momentum": (0, 1),
    "patience": (1, 10**6),
    "repeat_threshold": (0, 1),
    "keep": (1, 10**6),
}
"""The least and the greatest value of a setting."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a detector on a data set of COCO's, YOLO's, Pascal VOC's or DOTA's format."""

    data: tuple[Path, ...] = ()
    """Folder of a data set, of whatever format, or a data.yaml, in place of the four paths below; several are trained
    on together, their classes merged by name."""
    train: Path | None = None
    """Annotations of the training images: COCO JSON, or a folder of YOLO, VOC or DOTA label files."""
    train_images: Path | None = None
    """Folder of the training images."""
    val: Path | None = None
    """Annotations of the validation images; without them there is no validation."""
    val_images: Path | None = None
    """Folder of the validation images."""
    out: Path = Path("runs/train")
    """Where checkpoints, metrics.csv, TensorBoard logs and report.html go."""
    model: str = "rtmdet"
    """The family of models: rtmdet or rtdetr."""
    size: str | None = None
    """nano, tiny, s, m, l or x, tiny where not given; of rtdetr r18, r34, r50m, r50, r101, l, x or h, r18 where not
    given."""
    version: int | None = None
    """Of rtdetr: 1 or 2; 1 (h: 2) where not given."""
    queries: int | None = None
    """Of rtdetr: boxes that are predicted for an image; 300 where not given. Fewer are faster; objects beyond their
    number are not learnt."""
    sampling: str | None = None
    """Of rtdetr, version 2: bilinear, or discrete, whole cells, for runtimes without grid_sample, which goes on from
    weights of bilinear sampling; bilinear where not given."""
    assigner: str | None = None
    """Of rtmdet, who matches predictions with objects in training: soft_label (as published), simota, task_aligned or
    atss; soft_label where not given."""
    task: str = "det"
    """What to detect: det (boxes), ins (boxes and masks) or rotated (rotated boxes)."""
    init: str | None = None
    """Weights to start from: a file, or a published name such as rtmdet-tiny or cspnext-tiny (ImageNet backbone)."""
    epochs: int | None = None
    """Passes over the training images; 300 (rotated: 36, rtdetr: 72 to 120) where not given."""
    stage2_epochs: int | None = None
    """Last epochs without strong augmentation: mosaic and mixup (which rotated never has), of rtdetr distortion,
    zoom-out, crop and change of image size. Where not given 20, but at most half of the run, of rtdetr 0 or, version 2,
    1 to 3 of its published epochs in proportion."""
    batch_size: int | Literal["auto"] | None = None
    """Images per step and process; 32 (rotated: 8, rtdetr: 16) where not given. auto: what the GPU's memory has room
    for, or 8 on a CPU, but no more than the published number a step, nor than a 16th of the training images."""
    accumulate: int = 1
    """Batches whose gradients are added up before the optimiser steps."""
    image_size: int | None = None
    """Side of the training images in pixels, a multiple of 32; 640 (nano: 320, rotated: 1024) where not given."""
    lr: float | None = None
    """Base learning rate; 4e-3 (x: 2e-3) at 256 images per step of all processes, rotated 2.5e-4 at 8, rtdetr 1e-4 (its
    backbone less) at 16, times the square root of the step's share of it. Boxes and masks of rtmdet: more in a run of
    fewer than 137,000 steps, twice as much in one of 535."""
    weight_decay: float | None = None
    """Weight decay of AdamW; 0.05 on convolution weights, of rtdetr 1e-4, where not given."""
    warmup_iterations: int | None = None
    """Steps of linear warm-up; 1000 (rtdetr: 2000, in version 1 none), but at most a tenth of the run, where not
    given."""
    ema_momentum: float | None = None
    """Share of the new weights in the moving average, after its own warm-up. Where not given 2e-4 (rtdetr: 1e-4) in a
    run as long as the published one, and more the shorter it is: rtmdet 27 over its steps (rotated: 8), rtdetr 20."""
    freeze: Literal["backbone"] | None = None
    """Part of the model that stays as --init has it, batch norms' statistics too: backbone."""
    repeat_threshold: float | None = None
    """Show images of rare classes more often: for a class in a share f of the images, t being this threshold,
    sqrt(t / f) times an epoch (LVIS has 0.001). Each is shown once where not given."""
    empty_images: bool = False
    """Train on images without objects too, against false detections in such. rtdetr always does; rtmdet, as published,
    leaves them out."""
    cache: str | None = None
    """Keep decoded images in memory, for all loader processes together: ram, which takes up to half of what is free,
    or an amount such as 8GB. The first epoch fills it."""
    loggers: tuple[str, ...] = ("tensorboard",)
    """Where figures go besides metrics.csv: any of tensorboard, wandb, mlflow."""
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
    patience: int | None = None
    """Epochs without a better validation after which the run goes over to its last, --stage2-epochs, or, in these,
    ends; never where not given."""
    time: str | float | None = None
    """Time for the run, such as 2h, 90m or 1h30m: as many of its epochs, stage 2 and last validation included, as it
    has room for."""
    save_every: str | float = "30m"
    """Time between checkpoints, such as 10m, in the middle of an epoch too; besides there is one after each epoch and
    before each validation."""
    keep: int = 1
    """Checkpoints that stay: last.pth and, from 2 on, older ones as last-ITERATION.pth."""
    skip_bad: bool = False
    """Go on over unreadable images and invalid annotations, and count them."""
    as_one: bool = False
    """Of several processes: show together, step by step, the images that one with all of their batch sizes would. Else
    each fills mosaics from the images of its own, as published."""
    resume: bool | Literal["auto"] = False
    """Continue the run in `out` from its last checkpoint; auto: where there is one, else start the run."""
    overwrite: bool = False
    """Start anew in an `out` that holds a run already."""
    compile: bool = False
    """Compile the model with torch.compile."""
    graph: str = "off"
    """Run each step as one CUDA graph: auto, which is for rtmdet on GPUs, without --accumulate and --compile, or
    off, which stays the default until GPUs have run it."""
    report: bool = True
    """Write report.html at the end."""
    progress: bool = True
    """Show progress bars."""


@dataclass(frozen=True, kw_only=True)
class Settings(TrainConfig):
    """A config with every default worked out that does not hang on the data."""

    train_sources: tuple[Source, ...]
    """What --data or --train and --train-images lead to."""
    val_sources: tuple[Source, ...]
    """Likewise; none without validation."""
    size: str
    epochs: int
    stage2_epochs: int
    batch_size: int
    image_size: int
    lr: float
    """Of the first step after warm-up."""
    weight_decay: float
    num_workers: int
    resume: bool
    time: float | None
    """In seconds."""
    save_every: float
    """Likewise."""

    @property
    def recipe(self) -> Recipe:
        """What the settings leave to the family."""
        from rtmdet_fast.training.recipe import RECIPES

        return RECIPES[self.model](self.size, self.version, self.task, self.queries, self.sampling, self.assigner)

    def open_data(self) -> tuple[CocoDataset, CocoDataset | None]:
        """The training images with their annotations; those of validation, if any, with the same classes."""
        from rtmdet_fast.tasks import TASKS

        dataset = self.open_training_data()
        if not self.val_sources:
            return dataset, None
        return dataset, TASKS[self.task].open_dataset(
            self.val_sources,
            skip_bad=self.skip_bad,
            class_names=dataset.class_names,  # labels are to index one list
            match_by_position=True,
        )

    @property
    def images_per_step(self) -> int:
        """Of all processes."""
        from rtmdet_fast.distributed import process_count

        return self.batch_size * self.accumulate * process_count()

    def open_training_data(self) -> CocoDataset:
        """The training images with their annotations."""
        from rtmdet_fast.tasks import TASKS

        return TASKS[self.task].open_dataset(
            self.train_sources,
            skip_bad=self.skip_bad,
            training=True,
            keep_empty=self.recipe.empty_images or self.empty_images,
        )

    def as_json(self) -> dict[str, Any]:
        """What config.json and the state in last.pth hold; of the data where it lies, however it was named."""
        told: dict[str, Any] = {
            key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()
        }
        for split, sources in (("train", told.pop("train_sources")), ("val", told.pop("val_sources"))):
            for key, part in ((split, "annotations"), (f"{split}_images", "images")):
                told[key] = " ".join(str(source[part]) for source in sources) or None
        return {**told, "data": None}


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
    ended_by: str | None = None
    """What ended it before the epochs asked for: "patience", "time", or "callback", after which `resume` goes on."""


def check_bounds(config: Any) -> None:
    """Raises UserError where a setting of a command lies outside its BOUNDS."""
    for name, (least, most) in BOUNDS.items():
        value = getattr(config, name, None)
        if value is not None and value != "auto" and not least <= value <= most:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must lie between {least} and {most}")


def seconds_of(time: str | float, option: str = "--time") -> float:
    """Of 2h, 90m, 45s or 1h30m, or of a number of seconds. UserError, which names the option, for anything else."""
    number = r"(\d+(?:\.\d+)?)"
    parts = re.fullmatch(rf"(?:{number}h)?(?:{number}m)?(?:{number}s?)?", str(time).strip())
    hours, minutes, rest = map(float, parts.groups("0")) if parts else (0.0, 0.0, 0.0)
    seconds = 3600 * hours + 60 * minutes + rest
    if not 0 < seconds < math.inf:
        raise UserError(f"{option} {time} is no time; 2h, 90m, 1h30m or a number of seconds is expected")
    return seconds


def resolve(config: TrainConfig) -> Settings:
    """The config with every default worked out. Raises UserError for values that cannot be."""
    # here: `rtmdet-fast --help` shows the settings, and has no need of PyTorch
    import torch

    from rtmdet_fast.data.image_cache import bytes_of
    from rtmdet_fast.devices import pick_device
    from rtmdet_fast.distributed import process_count
    from rtmdet_fast.models.detector import check_image_size
    from rtmdet_fast.tasks import TASKS
    from rtmdet_fast.training.recipe import RECIPES

    if config.task not in TASKS:
        raise UserError(f"--task {config.task!r} is unknown; choose one of {', '.join(TASKS)}")
    if config.model not in RECIPES:
        raise UserError(f"--model {config.model!r} is unknown; choose one of {', '.join(RECIPES)}")
    check_bounds(config)
    recipe = RECIPES[config.model](
        config.size, config.version, config.task, config.queries, config.sampling, config.assigner
    )
    if config.resume not in (False, True, "auto"):
        raise UserError(f"--resume {config.resume} is unknown; give it alone, or auto")
    if config.resume == "auto" and config.overwrite:
        raise UserError("--resume auto goes on with the run that --overwrite would remove: give one of them")
    resume = (config.out / "last.pth").exists() if config.resume == "auto" else config.resume
    if config.sampling == "discrete" and config.init is None and not resume:
        raise UserError(
            "--sampling discrete leaves as it is where heads look: give bilinear weights to go on from, --init"
        )
    if config.lr is not None and not 0 < config.lr < math.inf:
        raise UserError(f"--lr is {config.lr}; it must be above 0")
    train, val = _sources(config)
    if config.amp not in ("auto", "none", "bf16", "fp16"):
        raise UserError(f"--amp {config.amp!r} is unknown; choose none, bf16, fp16 or auto")
    if config.graph not in ("auto", "off"):
        raise UserError(f"--graph {config.graph!r} is unknown; choose auto or off")
    device = pick_device(config.device)
    amp = config.amp
    if amp == "auto":
        amp = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "none"
    if amp == "fp16" and device.type == "cpu":
        raise UserError("--amp fp16 needs a GPU; a CPU takes bf16 or none")
    epochs = recipe.epochs if config.epochs is None else config.epochs
    stage2 = config.stage2_epochs
    if stage2 is None:
        stage2 = recipe.stage2_of(epochs)
    if not 0 <= stage2 <= epochs:
        raise UserError(f"--stage2-epochs {stage2} must lie between 0 and --epochs {epochs}")
    image_size = recipe.image_size if config.image_size is None else config.image_size
    # that of auto is found out once there is a model to try
    batch_size = config.batch_size if isinstance(config.batch_size, int) else recipe.batch_size
    lr = config.lr
    if lr is None:  # of a run of the published length, until the images are counted
        lr = recipe.lr_of(batch_size * config.accumulate * process_count())
    if config.freeze not in (None, "backbone"):
        raise UserError(f"--freeze {config.freeze!r} is unknown; choose backbone")
    if config.cache is not None:
        bytes_of(config.cache)
    if config.patience is not None and not val:
        raise UserError("--patience needs validation images: --val and --val-images, or --data with a part for it")
    workers = config.num_workers
    if workers is None:
        workers = min(max((os.cpu_count() or 1) - 1, 0), 8)
    resolved = {
        "train_sources": train,
        "val_sources": val,
        "device": str(device),
        "amp": amp,
        "size": recipe.size,
        "version": recipe.version,
        "epochs": epochs,
        "stage2_epochs": stage2,
        "batch_size": batch_size,
        "image_size": check_image_size(image_size),
        "lr": lr,
        "weight_decay": recipe.weight_decay if config.weight_decay is None else config.weight_decay,
        "num_workers": workers,
        "resume": resume,
        "time": None if config.time is None else seconds_of(config.time),
        "save_every": seconds_of(config.save_every, "--save-every"),
    }
    return Settings(**{f.name: getattr(config, f.name) for f in fields(TrainConfig)} | resolved)


def _sources(config: TrainConfig) -> tuple[tuple[Source, ...], tuple[Source, ...]]:
    """What to train on, and what to validate on, if anything."""
    from rtmdet_fast.data.layout import find_sources, source_of

    train, train_images, val, val_images = config.train, config.train_images, config.val, config.val_images
    if config.data:
        if train or train_images or val or val_images:
            raise UserError("--data stands in place of --train, --train-images, --val and --val-images")
        return find_sources(config.data, "train"), find_sources(config.data, "val")
    if train is None or train_images is None:
        raise UserError("give --train FILE and --train-images FOLDER, or --data FOLDER")
    if val is None and val_images is None:
        return (source_of(train, train_images),), ()
    if val is None or val_images is None:
        raise UserError("--val and --val-images go together")
    return (source_of(train, train_images),), (source_of(val, val_images),)
