"""Training: the published two-stage recipe in one loop that reads from top to bottom."""

from __future__ import annotations

import itertools
import json
import math
import os
import pickle
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from rtmdet_fast.checkpoint import read_checkpoint, resolve_weights, save_atomically
from rtmdet_fast.data.augment import Augmenter, Batch, collate, init_worker, recipe_for
from rtmdet_fast.data.augment_rotated import RotatedAugmenter, rotated_recipe
from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.data.plan import PlanSampler
from rtmdet_fast.data.tasks import find_task_split, open_dataset
from rtmdet_fast.errors import UserError
from rtmdet_fast.evaluate import evaluate, match_categories
from rtmdet_fast.heads import Targets
from rtmdet_fast.layers import enable_sync_bn
from rtmdet_fast.model import TASKS, RTMDet, check_image_size, default_image_size
from rtmdet_fast.preprocess import normalize
from rtmdet_fast.report import ReportSample, write_report
from rtmdet_fast.run_log import Meter, RunLog, read_metrics, timed
from rtmdet_fast.schedule import ModelEMA, learning_rate_factor, parameter_groups

STATE = frozenset(
    {
        "config",
        "model",
        "ema",
        "optimizer",
        "scaler",
        "samplers",
        "torch_rng",
        "epoch",
        "iteration",
        "best_epoch",
        "best_metrics",
    }
)
"""What a training state holds."""
LOG_EVERY = 10
# What may differ between a run and its continuation.
RESUMABLE = {"out", "resume", "overwrite", "device", "val_interval", "report", "progress", "val", "val_images"}


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
    """Base learning rate; 4e-3 (x: 2e-3) at 256 images per step, rotated 2.5e-4 at 8, times the square root of the
    batch's share of it."""
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
    """Images and annotations left out of training, and of validation, or else notable, by reason."""


def resolve(config: TrainConfig) -> TrainConfig:
    """The config with every default worked out. Raises UserError for values that cannot be."""
    if config.task not in TASKS:
        raise UserError(f"--task {config.task!r} is unknown; choose one of {', '.join(TASKS)}")
    rotated = config.task == "rotated"
    if config.epochs is None:
        config = replace(config, epochs=36 if rotated else 300)
    if config.batch_size is None:
        config = replace(config, batch_size=8 if rotated else 32)
    for name, least in (
        *((name, 1) for name in ("epochs", "batch_size", "accumulate", "val_interval")),
        *((name, 0) for name in ("num_workers", "warmup_iterations", "seed", "weight_decay", "ema_momentum")),
    ):
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
    if config.seed >= 2**32:
        raise UserError(f"--seed is {config.seed}; it must be below {2**32}")
    if config.ema_momentum > 1:
        raise UserError(f"--ema-momentum is {config.ema_momentum}; it must be at most 1")
    if config.lr is not None and not 0 < config.lr < math.inf:
        raise UserError(f"--lr is {config.lr}; it must be above 0")
    if config.data is not None:
        if config.train or config.train_images or config.val or config.val_images:
            raise UserError("--data stands in place of --train, --train-images, --val and --val-images")
        train_file, train_images = find_task_split(config.task, config.data, "train")
        val_file, val_images = find_task_split(config.task, config.data, "val")
        config = replace(
            config, data=None, train=train_file, train_images=train_images, val=val_file, val_images=val_images
        )
    if config.train is None or config.train_images is None:
        raise UserError("give --train FILE and --train-images FOLDER, or --data FOLDER")
    if (config.val is None) != (config.val_images is None):
        raise UserError("--val and --val-images go together")
    if config.amp not in ("auto", "none", "bf16", "fp16"):
        raise UserError(f"--amp {config.amp!r} is unknown; choose none, bf16, fp16 or auto")
    assert config.epochs and config.batch_size
    device = pick_device(config.device)
    amp = config.amp
    if amp == "auto":
        amp = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "none"
    if amp == "fp16" and device.type == "cpu":
        raise UserError("--amp fp16 needs a GPU; a CPU takes bf16 or none")
    base_lr, base_batch = (2.5e-4, 8) if rotated else (2e-3 if config.size == "x" else 4e-3, 256)
    stage2 = 0 if rotated else config.stage2_epochs
    if stage2 is None:
        stage2 = max(round(config.epochs * 20 / 300), 1) if config.epochs > 1 else 0
    if not 0 <= stage2 <= config.epochs:
        raise UserError(f"--stage2-epochs {stage2} must lie between 0 and --epochs {config.epochs}")
    workers = config.num_workers
    if workers is None:
        workers = min(max((os.cpu_count() or 1) - 1, 0), 8)
    return replace(
        config,
        device=str(device),
        amp=amp,
        stage2_epochs=stage2,
        num_workers=workers,
        image_size=check_image_size(
            default_image_size(config.size, config.task) if config.image_size is None else config.image_size
        ),
        lr=config.lr or base_lr * math.sqrt(config.batch_size * config.accumulate / base_batch),
    )


def pick_device(name: str) -> torch.device:
    """The torch device of a `--device` argument; a GPU becomes the current one."""
    if name in ("auto", "cuda"):
        local = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"  # which torchrun sets, one process to a GPU
        name = local if name == "cuda" or torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where NCCL gathers objects
    return device


def train(config: TrainConfig) -> TrainResult:
    """Run a training to its end (or continue it), and return what came out. Raises UserError for bad input."""
    config = resolve(config)
    rank, world_size = join_processes(config)
    if rank > 0:
        config = replace(config, progress=False, report=False)
    assert (
        config.train
        and config.train_images
        and config.lr
        and config.image_size
        and config.num_workers is not None
        and config.stage2_epochs is not None
        and config.epochs
        and config.batch_size
    )
    device = torch.device(config.device)
    out = config.out
    last, best = out / "last.pth", out / "best.pth"
    if last.exists() and not (config.resume or config.overwrite):
        raise UserError(f"{out} holds a run already; continue it with --resume, or start anew with --overwrite")
    random.seed(config.seed)
    np.random.seed(config.seed)
    torch.manual_seed(config.seed)

    rotated = config.task == "rotated"
    # The figure by which an epoch is the best; DOTA's mAP is at 0.5.
    criterion = {"det": "AP", "ins": "segm_AP", "rotated": "AP50"}[config.task]
    dataset = open_dataset(config.task, config.train, config.train_images, skip_bad=config.skip_bad, training=True)
    val_dataset = None
    if config.val is not None and config.val_images is not None:
        # text files hold no list of classes: a small part of a data set may lack some
        names = dataset.class_names if rotated else None
        val_dataset = open_dataset(
            config.task, config.val, config.val_images, skip_bad=config.skip_bad, class_names=names
        )
    recipe = recipe_for(config.size, config.image_size, masks=config.task == "ins")
    sampler = PlanSampler(
        len(dataset),
        config.batch_size,
        recipe,
        config.seed,
        config.num_workers,
        rank=rank,
        world_size=world_size,
    )
    loader = DataLoader(
        RotatedAugmenter(dataset, rotated_recipe(config.image_size, dataset.class_names))
        if rotated
        else Augmenter(dataset, recipe),
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=config.num_workers,
        worker_init_fn=init_worker,
        pin_memory=device.type == "cuda",
        persistent_workers=config.num_workers > 0,
    )

    torch.backends.cudnn.benchmark = True  # all batches have one shape
    model = RTMDet(config.size, config.task, class_names=dataset.class_names)
    if config.init is not None:
        model.load_weights(read_checkpoint(resolve_weights(config.init)))
    if val_dataset is not None:
        match_categories(model, val_dataset)  # which cannot be seen too early
    model.image_size = config.image_size
    if rotated:
        model.patch_size = dataset.longest_side  # what an object's size in pixels was seen relative to
    model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ema = ModelEMA(model, config.ema_momentum)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.weight_decay), lr=config.lr, fused=device.type == "cuda"
    )
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
    amp_dtype = torch.float16 if config.amp == "fp16" else torch.bfloat16
    step_model: Callable[..., Any] = model
    if world_size > 1:
        enable_sync_bn(model)
        step_model = torch.nn.parallel.DistributedDataParallel(
            model, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False
        )
    if config.compile:
        step_model = torch.compile(step_model)

    steps_per_epoch = math.ceil(len(sampler) / config.accumulate)
    total = steps_per_epoch * config.epochs
    warmup = config.warmup_iterations
    if warmup is None:
        warmup = min(1000, total // 10)
    iteration = start_epoch = 0
    best_epoch, best_metrics = None, {}
    if config.resume:
        state = read_training_state(last, config)
        model.load_state_dict(state["model"])
        ema.model.load_state_dict(state["ema"])
        ema.step = iteration = state["iteration"]
        for group in state["optimizer"]["param_groups"]:
            group["fused"] = device.type == "cuda"  # where the run goes on, not where it began
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        sampler.load_state_dict(state["samplers"][rank])
        torch.set_rng_state(state["torch_rng"])
        start_epoch, best_epoch, best_metrics = state["epoch"], state["best_epoch"], state["best_metrics"]
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()}
    log = RunLog(out, iteration) if rank == 0 else None
    if log is not None:
        (out / "config.json").write_text(json.dumps(settings, indent=1))
    meter = Meter()
    previous: tuple[Callable[[], float], Batch] | None = None
    started, first_iteration = time.perf_counter(), iteration
    validating = 0.0

    for epoch in range(start_epoch, config.epochs):
        sampler.set_stage2(rotated or epoch >= config.epochs - config.stage2_epochs)
        model.train()
        batches = timed(iter(loader), meter)
        bar = tqdm(
            range(steps_per_epoch), desc=f"epoch {epoch + 1}/{config.epochs}", disable=not config.progress, leave=False
        )
        for step in bar:
            lr = config.lr * learning_rate_factor(iteration, total, warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            parts = min(config.accumulate, len(sampler) - step * config.accumulate)
            for batch in itertools.islice(batches, parts):
                batch = batch.to(device, non_blocking=True)
                targets = Targets(batch.gt_boxes, batch.gt_labels, batch.gt_counts, batch.gt_centers, batch.gt_masks)
                with torch.autocast(device.type, amp_dtype, enabled=config.amp != "none"):
                    losses = step_model(normalize(batch.images), targets)
                loss = sum(losses.values()) / parts
                scaler.scale(loss).backward()
                meter.add(losses, len(batch.images))
                # Looking at the loss one batch late keeps the host one batch ahead of the device.
                stop_on_nan(previous, out, iteration)
                previous = (on_its_way(loss.detach()), batch)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            ema.update(model)
            iteration += 1
            meter.step()
            if iteration % LOG_EVERY == 0 or iteration == total:
                row = {"epoch": epoch + 1, "iteration": iteration, "lr": lr, **meter.read()}
                if log is not None:
                    log.write(row)
                bar.set_postfix_str(
                    f"loss {row['loss']:.3f}, lr {lr:.1e}, {row['images_per_second']:.0f} img/s, "
                    f"data {row['data_wait']:.0%}, ETA {duration(meter.seconds_per_step * (total - iteration))}"
                )
        stop_on_nan(previous, out, iteration)
        previous = None

        samplers = gather(sampler.state_dict(), world_size)
        if log is None:  # the first process alone validates and writes
            continue
        if val_dataset is not None and due(epoch + 1, config):
            validation_started = time.perf_counter()
            evaluation = evaluate(
                ema.model,
                val_dataset,
                batch_size=config.batch_size,
                num_workers=config.num_workers,
                progress=config.progress,
            )
            validating += time.perf_counter() - validation_started
            log.write({"epoch": epoch + 1, "iteration": iteration, **evaluation.metrics})
            if config.progress:
                tqdm.write(f"epoch {epoch + 1}: " + ", ".join(f"{k} {v:.3f}" for k, v in evaluation.metrics.items()))
            if best_epoch is None or evaluation.metrics[criterion] > best_metrics[criterion]:
                best_epoch, best_metrics = epoch + 1, evaluation.metrics
                ema.model.save(best)
            meter.restart()
        ema.model.save(
            last,
            training={
                "config": settings,
                "model": model.state_dict(),
                "ema": ema.model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "samplers": samplers,
                "torch_rng": torch.get_rng_state(),
                "epoch": epoch + 1,
                "iteration": iteration,
                "best_epoch": best_epoch,
                "best_metrics": best_metrics,
            },
        )
        if val_dataset is None:
            ema.model.save(best)

    if log is not None:
        log.close()
    seconds = time.perf_counter() - started
    pace = (seconds - validating) / max(iteration - first_iteration, 1)
    report = None
    if config.report:
        report = report_run(config, settings, dataset, val_dataset, best_epoch, seconds, pace)
    skipped = {reason: len(what) for reason, what in dataset.skipped.items()}
    if val_dataset is not None:
        skipped |= {f"{reason}, of validation": len(what) for reason, what in val_dataset.skipped.items()}
    return TrainResult(best_metrics, best_epoch, seconds, pace, last, best, report, skipped)


def join_processes(config: TrainConfig) -> tuple[int, int]:
    """Rank and number of the processes that torchrun started, joined; (0, 1) for one alone."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return 0, 1
    if not torch.distributed.is_initialized():
        # The others wait while the first validates.
        torch.distributed.init_process_group(
            "nccl" if config.device.startswith("cuda") else "gloo", timeout=timedelta(hours=6)
        )
    return torch.distributed.get_rank(), world_size


def gather(value: Any, world_size: int) -> list[Any]:
    """The value of every process, by rank."""
    values = [value] * world_size
    if world_size > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def due(epoch: int, config: TrainConfig) -> bool:
    """Whether the epoch, counted from 1, ends with a validation."""
    assert config.epochs is not None and config.stage2_epochs is not None
    if epoch == config.epochs:
        return True
    if config.val_interval is not None:
        return epoch % config.val_interval == 0
    return epoch % max(config.epochs // 30, 1) == 0 or epoch > config.epochs - config.stage2_epochs


def on_its_way(value: torch.Tensor) -> Callable[[], float]:
    """Sends a scalar to the host; what is returned waits for it, but, unlike `item`, for no work queued later."""
    if not value.is_cuda:
        return value.item
    host, arrived = value.to("cpu", non_blocking=True), torch.cuda.Event()  # into page-locked memory
    arrived.record()

    def wait() -> float:
        arrived.synchronize()
        return host.item()

    return wait


def stop_on_nan(previous: tuple[Callable[[], float], Batch] | None, out: Path, iteration: int) -> None:
    """Raise UserError where the loss of the batch before is not finite, with that batch kept for inspection."""
    if previous is None or math.isfinite(value := previous[0]()):
        return
    path = out / "nan_batch.pt"
    batch = {k: v.cpu() for k, v in asdict(previous[1]).items() if v is not None}
    save_atomically({"iteration": iteration, **batch}, path)
    raise UserError(
        f"the loss is {value} near iteration {iteration}; the batch is in {path}, the last good weights "
        f"in last.pth (a lower --lr or --amp none may help)"
    )


def read_training_state(last: Path, config: TrainConfig) -> dict[str, Any]:
    """The state to continue from. Raises UserError where there is none, or where it is another run's."""
    if not last.exists():
        raise UserError(f"there is nothing to resume: {last} does not exist")
    try:
        state = torch.load(last, map_location="cpu", weights_only=True).get("training")
    except (RuntimeError, EOFError, AttributeError, pickle.UnpicklingError, OSError) as error:
        raise UserError(f"{last} cannot be read: it is damaged, or of something else") from error
    if state is None:
        raise UserError(f"{last} holds weights but no training state to resume from")
    if not state.keys() >= STATE:
        raise UserError(f"{last}: its training state lacks {sorted(STATE - state.keys())[0]!r}")
    for key, value in asdict(config).items():
        before = state["config"].get(key)
        if key not in RESUMABLE and before != (str(value) if isinstance(value, Path) else value):
            raise UserError(f"--{key.replace('_', '-')} is {value}, but the run in {last.parent} has {before}")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if len(state["samplers"]) != processes:
        raise UserError(
            f"the run in {last.parent} had {len(state['samplers'])} processes, and now there are {processes}"
        )
    return state


def report_run(
    config: TrainConfig,
    settings: dict[str, Any],
    dataset: CocoDataset,
    val_dataset: CocoDataset | None,
    best_epoch: int | None,
    seconds: float,
    pace: float,
) -> Path:
    """Evaluate the best weights once more, for curves and pictures, and write report.html."""
    model = RTMDet.from_pretrained(config.out / "best.pth").to(config.device)
    metrics: dict[str, Any] = {}
    curves: dict[str, Any] = {}
    samples = []
    if val_dataset is not None:
        evaluation = evaluate(model, val_dataset, batch_size=config.batch_size or 8, progress=config.progress)
        metrics = {**evaluation.metrics, "per_class": evaluation.per_class, "best_epoch": best_epoch}
        curves = evaluation.pr_curves
        (config.out / "metrics.json").write_text(json.dumps(metrics, indent=1))
        (config.out / "detections.json").write_text(json.dumps(evaluation.detections))
        for index in np.linspace(0, len(val_dataset) - 1, min(12, len(val_dataset))).astype(int):
            sample = val_dataset.load(int(index))
            samples.append(ReportSample(model.predict(sample.image), sample.boxes, sample.labels, sample.masks))
    return write_report(
        config.out / "report.html",
        title=f"RTMDet-{config.size} on {dataset.annotation_path.name}",
        history=read_metrics(config.out / "metrics.csv"),
        evaluation=metrics,
        pr_curves=curves,
        samples=samples,
        settings={**settings, "training images": len(dataset), "seconds per iteration": round(pace, 4)},
        parameters=sum(p.numel() for p in model.parameters()),
        seconds=seconds,
    )


def duration(seconds: float) -> str:
    """1:02:03 of 3723 seconds."""
    return str(timedelta(seconds=round(seconds)))
