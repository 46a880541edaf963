"""Training: one loop for every family, which reads from top to bottom."""

from __future__ import annotations

import itertools
import math
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from rtmdet_fast.data.augment import Batch, collate
from rtmdet_fast.data.check import CHECK_SECONDS, ImageCheck
from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.data.image_cache import ImageCache, room_for_images
from rtmdet_fast.data.plan import PlanSampler, repeat_factors
from rtmdet_fast.data.workers import handed_over, init_worker
from rtmdet_fast.distributed import any_process, gather, greatest, join_processes, once_per_node, process_count
from rtmdet_fast.errors import UserError
from rtmdet_fast.evaluation.analysis import analyse, best_score_thresholds
from rtmdet_fast.evaluation.evaluate import evaluate, match_categories
from rtmdet_fast.evaluation.pictures import ReportSample, report_samples
from rtmdet_fast.evaluation.report import write_report
from rtmdet_fast.files import write_json
from rtmdet_fast.models.checkpoint import Checkpoint, damage_told, read_checkpoint, resolve_weights, save_atomically
from rtmdet_fast.models.detector import Detector
from rtmdet_fast.models.families import load_model
from rtmdet_fast.tasks import TASKS
from rtmdet_fast.training.batch_size import find_batch_size
from rtmdet_fast.training.callbacks import (
    Callback,
    Callbacks,
    Progress,
    random_numbers_kept,
    random_states,
    set_random_states,
)
from rtmdet_fast.training.checkpoints import Checkpoints, Wish
from rtmdet_fast.training.config import Settings, TrainConfig, TrainResult, resolve
from rtmdet_fast.training.horizon import Horizon, clock
from rtmdet_fast.training.interruption import Interruption
from rtmdet_fast.training.loggers import LOGGERS, check_loggers
from rtmdet_fast.training.preview import draw_batches
from rtmdet_fast.training.run_log import Meter, RunLog, read_metrics, timed
from rtmdet_fast.training.schedule import ModelEMA, random_side
from rtmdet_fast.training.state import load_optimizer_state, read_training_state, remove_run, shared_anew
from rtmdet_fast.training.step import AMP_TYPES, GraphStep, Step, is_graph, of_several_processes

LOG_EVERY = 10
OfProcess = tuple[dict[str, Any], list[torch.Tensor], float, dict[str, Any]]
"""What a checkpoint holds of each process: where its loaders and generators stand, and means of losses."""
SHOWN = ("AP", "AP50", "segm_AP", "segm_AP50")
"""Of the figures of a validation, those that an epoch's line shows."""


def train(config: TrainConfig, *, model: Detector | None = None, callbacks: Sequence[Callback] = ()) -> TrainResult:
    """Run a training to its end (or continue it), and return what came out. Raises UserError for bad input.

    SIGTERM and Ctrl-C end it after the step, with a checkpoint to `resume` from, by Terminated (a SystemExit of code
    143) and KeyboardInterrupt.

    Args:
        config: the settings, in which `model`, `size` and `task` are those of the model given.
        model: to start from in place of `init`; it stays as it is. Layers of other classes start fresh.
        callbacks: told of the run while it goes.
    """
    with Interruption() as interruption:
        return _train(config, model, callbacks, interruption)


def _train(
    config: TrainConfig, model: Detector | None, callbacks: Sequence[Callback], interruption: Interruption
) -> TrainResult:
    started = clock()
    settings = resolve(config)
    check_loggers(settings.loggers)
    rank, world_size = join_processes(torch.device(settings.device), graphs=settings.graph == "auto")
    if rank > 0:
        settings = replace(settings, progress=False)
    task, recipe = TASKS[settings.task], settings.recipe
    device, out = torch.device(settings.device), settings.out
    last, best = out / "last.pth", out / "best.pth"
    if rank == 0 and not (settings.resume or settings.overwrite):
        if last.exists():
            raise UserError(f"{out} holds a run already; continue it with --resume, or start anew with --overwrite")
        if best.exists():
            if config.resume != "auto":
                raise UserError(f"{out} holds the weights of a run already; start anew with --overwrite")
            best.replace(out / "best-before.pth")
            warnings.warn(f"{best} is no part of a run to continue, and is best-before.pth now", stacklevel=3)
    random.seed(settings.seed)
    np.random.seed(settings.seed)
    torch.manual_seed(settings.seed)

    dataset, val_dataset = once_per_node(settings.open_data)
    if config.batch_size == "auto":
        batch_size = find_batch_size(settings, dataset)
        lr = config.lr or recipe.lr_of(batch_size * settings.accumulate * world_size)
        settings = replace(settings, batch_size=batch_size, lr=lr)
    if settings.cache is not None:
        dataset.cache = image_cache(settings.cache, dataset, told=settings.progress)
    repeats = None
    if settings.repeat_threshold is not None:
        repeats = repeat_factors(dataset.labels_by_image, settings.repeat_threshold)
    check = ImageCheck(dataset, *([val_dataset] if val_dataset is not None else [])) if rank == 0 else None
    sampler = PlanSampler(
        len(dataset),
        settings.batch_size,
        recipe.caches,
        settings.seed,
        settings.num_workers,
        rank=rank,
        world_size=world_size,
        repeats=repeats,
        as_one=settings.as_one,
    )
    loader = DataLoader(
        recipe.augment(dataset, settings.image_size),
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=settings.num_workers,
        worker_init_fn=init_worker,
        pin_memory=device.type == "cuda",
        persistent_workers=settings.num_workers > 0,
    )
    steps_per_epoch = math.ceil(len(sampler) / settings.accumulate)
    horizon = Horizon(settings.epochs, settings.stage2_epochs)
    total = horizon.epochs * steps_per_epoch

    torch.backends.cudnn.benchmark = True  # batches have one shape, or one of a few
    model = make_model(settings, dataset, model)
    frozen = [] if settings.freeze is None else [model.get_submodule(settings.freeze)]
    for module in frozen:
        module.requires_grad_(False)
    if val_dataset is not None:
        match_categories(model, val_dataset)  # which cannot be seen too early
    model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ema = ModelEMA(model, lambda step: recipe.ema_share(step, total, settings.ema_momentum))
    optimizer = torch.optim.AdamW(recipe.parameter_groups(model, settings.weight_decay), lr=settings.lr, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=settings.amp == "fp16")
    step_model: Callable[..., Any] = model
    graph = is_graph(settings, model)
    if world_size > 1:
        step_model = of_several_processes(model, graph)
    if settings.compile:
        step_model = torch.compile(step_model)
    stepping = (GraphStep if graph else Step)(
        model, optimizer, scaler, ema, call=step_model, amp=AMP_TYPES[settings.amp], clip_norm=recipe.clip_norm
    )

    if settings.progress:
        tell_settings(config, settings, sampler)
    if check is not None:
        check.report(wait=CHECK_SECONDS, progress=settings.progress)
    iteration = epoch = first_step = 0
    shift = 0  # of the count of steps against the schedule: what other numbers of processes took more, or fewer, before
    best_epoch, best_metrics = None, {}
    seconds_before = validation_seconds = 0.0  # of the last validation
    epoch_loss = torch.zeros((), device=device)
    if settings.resume:
        state = read_training_state(last, settings)
        with damage_told(last):
            if (processes := len(state["samplers"])) != world_size:
                state = shared_anew(state, settings, steps_per_epoch)
            model.load_state_dict(state["model"])
            ema.model.load_state_dict(state["ema"])
            load_optimizer_state(optimizer, state["optimizer"])
            scaler.load_state_dict(state["scaler"])
            first_step = state["step"]
            if first_step > steps_per_epoch:
                raise ValueError(f"step {first_step} of {steps_per_epoch}")
            sampler.load_state_dicts(state["samplers"], skip=first_step * settings.accumulate)
            random_numbers = state["random_states"][rank % len(state["random_states"])]
            set_random_states(random_numbers)
            epoch_loss += state["epoch_losses"][rank % len(state["epoch_losses"])]
            seconds_before, validation_seconds = map(float, state.get("seconds", (0.0, 0.0)))
            horizon = Horizon(*state["horizon"])
            thresholds = state.get("score_thresholds")
            ema.model.score_thresholds = None if thresholds is None else tuple(map(float, thresholds))
        if processes != world_size and rank == 0:
            warnings.warn(
                f"the run in {out} had {processes} processes and goes on with {world_size}, at "
                f"{settings.batch_size * settings.accumulate * world_size} images a step and a rate of "
                f"{settings.lr:.3g}: to the bit it would with {processes} alone",
                stacklevel=3,
            )
        iteration, epoch = state["iteration"], state["epoch"]
        best_epoch, best_metrics = state["best_epoch"], state["best_metrics"]
        ema.step = epoch * steps_per_epoch + first_step
        shift = iteration - ema.step
    elif settings.overwrite and rank == 0:
        remove_run(out)
    validated = first_step == 0 or epoch >= horizon.epochs
    log = RunLog(out, iteration, validated) if rank == 0 else None
    checkpoints = Checkpoints(last, settings.save_every, settings.keep, iteration)
    if log is not None:
        write_json(out / "config.json", settings.as_json())
    meter = Meter()
    if settings.resume:
        with damage_told(last):
            meter.load_state_dict(state["meters"][rank % len(state["meters"])])
    previous: tuple[Callable[[], float], Batch] | None = None
    listeners = Callbacks([*(LOGGERS[name][0]() for name in settings.loggers), *callbacks] if rank == 0 else ())
    listeners.tell("on_start", settings, iteration)
    deadline = math.inf if settings.time is None else started - seconds_before + settings.time
    begun, first_iteration = clock(), iteration
    training_seconds = 0.0
    stopped = False

    def of_process(sampler_state: dict[str, Any]) -> OfProcess:
        return sampler_state, random_states(), epoch_loss.item(), meter.state_dict()

    def write_checkpoint(epoch: int, step: int, horizon: Horizon, processes: Sequence[OfProcess]) -> None:
        if log is None:  # the first process alone writes
            return
        samplers, random_numbers, epoch_losses, meters = zip(*processes, strict=True)
        checkpoints.write(
            ema.model,
            {
                "config": settings.as_json(),
                "model": model.state_dict(),
                "ema": ema.model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "samplers": list(samplers),
                "random_states": list(random_numbers),
                "epoch": epoch,
                "step": step,
                "iteration": iteration,
                "horizon": list(astuple(horizon)),
                "seconds": [clock() - started + seconds_before, validation_seconds],
                "best_epoch": best_epoch,
                "best_metrics": best_metrics,
                "score_thresholds": ema.model.score_thresholds,
                "epoch_losses": list(epoch_losses) if step else [0.0] * world_size,
                "meters": list(meters),
            },
        )

    while epoch < horizon.epochs and not stopped:
        interruption.hold()
        total = horizon.epochs * steps_per_epoch
        warmup = settings.warmup_iterations
        if warmup is None:
            warmup = min(recipe.warmup, total // 10)
        stage2 = epoch >= horizon.stage2_begin
        sampler.set_stage2(stage2)
        sampler_state = sampler.state_dict()
        sides = (settings.image_size,) if stage2 else recipe.batch_sides(settings.image_size)
        model.train()
        for module in frozen:
            module.eval()
        batches = timed(handed_over(iter(loader)), meter)
        if first_step:  # what the loader's start has drawn, it drew before
            set_random_states(random_numbers)
        if first_step == steps_per_epoch:  # its validation alone is left
            next(batches, None)  # makes the plans, upon which those of the next epoch hang
        number = epoch + 1
        name = f"epoch {number}/{horizon.epochs}"
        end = total + shift
        progress = partial(
            Progress, epoch=number, epochs=horizon.epochs, iterations=end, model=ema.model, stop=listeners.stop
        )
        epoch_begun = clock()
        bar = tqdm(total=steps_per_epoch, initial=first_step, desc=name, disable=not settings.progress, leave=False)
        done, wish = first_step, Wish.GO_ON
        lr = settings.lr * recipe.lr_factor(max(iteration - shift - 1, 0), total, warmup)
        losses: dict[str, torch.Tensor] = {}
        for step in range(first_step, steps_per_epoch):
            lr = settings.lr * recipe.lr_factor(iteration - shift, total, warmup)
            stepping.set_rate(lr)
            parts = min(settings.accumulate, len(sampler) - step * settings.accumulate)
            for part, batch in enumerate(itertools.islice(batches, parts)):
                batch = stepping.take(batch, random_side(sides, settings.seed, iteration, part))
                try:
                    losses, loss = stepping.backward(batch, parts)
                except UserError as error:  # predictions that no loss can be made of
                    stop_on_nan(previous, out, iteration)
                    raise UserError(f"{error}; {keep_batch(batch, out, iteration)}") from error
                meter.add(losses, len(batch.images) * world_size)
                epoch_loss += loss / steps_per_epoch
                # Looking at the loss one batch late keeps the host one batch ahead of the device.
                stop_on_nan(previous, out, iteration)
                previous = (on_its_way(loss), batch)
            stepping.update()
            iteration, done = iteration + 1, step + 1
            meter.step()
            bar.update()
            metrics: dict[str, float] = {}
            if iteration % LOG_EVERY == 0 or iteration == end:
                metrics = {"lr": lr, **meter.read()}
                if log is not None:
                    log.write({"epoch": number, "iteration": iteration, **metrics})
                bar.set_postfix_str(
                    f"loss {metrics['loss']:.3f}, lr {lr:.1e}, {metrics['images_per_second']:.0f} img/s, "
                    f"data {metrics['data_wait']:.0%}, ETA {duration(meter.seconds_per_step * (end - iteration))}"
                )
            listeners.tell("on_step", progress(iteration=iteration, lr=lr, losses=losses, metrics=metrics))
            wish = Wish.GO_ON
            # Several processes ask each other now and then: to do so is to wait for the device.
            if world_size == 1 or iteration % LOG_EVERY == 0:
                if interruption.arrived is not None:
                    wish = Wish.END
                elif listeners.stopped:
                    wish = Wish.STOP
                elif rank == 0 and clock() > deadline - validation_seconds:
                    wish = Wish.TIME_IS_UP
                elif rank == 0 and checkpoints.due:
                    wish = Wish.CHECKPOINT
                wish = Wish(greatest(wish, device))
            if wish > Wish.CHECKPOINT:
                break
            if wish == Wish.CHECKPOINT and done < steps_per_epoch:
                stop_on_nan(previous, out, iteration)
                write_checkpoint(epoch, done, horizon, gather(of_process(sampler_state), world_size))
        bar.close()
        stop_on_nan(previous, out, iteration)
        previous = None
        epoch_seconds = (clock() - epoch_begun) / max(done - first_step, 1) * steps_per_epoch
        if done == first_step:
            epoch_seconds = (clock() - started + seconds_before) / number
        training_seconds += clock() - epoch_begun
        stopped = wish > Wish.CHECKPOINT
        broken_off = epoch, done, horizon
        step = done % steps_per_epoch  # 0: the epoch is over
        if step == 0:
            epoch += 1

        if log is not None:  # the first process alone decides and writes
            if wish == Wish.TIME_IS_UP and epoch < horizon.epochs:
                horizon = Horizon(epoch, 0, "time")
            elif step == 0 and settings.time is not None:
                expected = validation_seconds or epoch_seconds * len(val_dataset or ()) / len(dataset)
                horizon = horizon.within(deadline - clock(), epoch, epoch_seconds, expected, settings)
        horizon = gather(horizon, world_size)[0]
        ended = step == 0 or horizon.epochs == epoch
        validates = val_dataset is not None and ended and horizon.validates(epoch, settings.val_interval)
        if validates or wish == Wish.END:
            write_checkpoint(*broken_off, gather(of_process(sampler_state), world_size))
            if wish == Wish.END:
                gather(None, world_size)  # nobody leaves before it is written
                interruption.end()
            interruption.release()
        evaluation = None
        if val_dataset is not None and validates:
            validation_begun = clock()
            with random_numbers_kept():  # how often it is validated changes nothing
                evaluation = evaluate(
                    ema.model,
                    val_dataset,
                    batch_size=settings.batch_size,
                    num_workers=settings.num_workers,
                    progress=settings.progress,
                    together=world_size > 1,
                )
            validation_seconds = clock() - validation_begun
            meter.restart()
        if step == 0:
            sampler_state = sampler.state_dict()
        of_processes = gather(of_process(sampler_state), world_size)
        if log is not None:
            metrics = {"loss": sum(loss for *_, loss, _ in of_processes) / world_size}
            if evaluation is not None:
                log.write({"epoch": number, "iteration": iteration, **evaluation.metrics})
                metrics |= evaluation.metrics
                ema.model.score_thresholds = best_score_thresholds(evaluation, len(dataset.class_names))
                if best_epoch is None or evaluation.metrics[task.criterion] > best_metrics[task.criterion]:
                    best_epoch, best_metrics = number, evaluation.metrics
                    ema.model.save(best)
                if settings.patience is not None:
                    planned, horizon = horizon, horizon.out_of_patience(epoch, best_epoch, settings.patience)
                    if settings.progress and horizon != planned:
                        left = horizon.epochs - epoch
                        tqdm.write(
                            f"no better {task.criterion} for {settings.patience} epochs: "
                            + (f"the last {left}, without strong augmentation, come now" if left else "the run ends")
                        )
            if settings.progress and ended:
                shown = {key: metrics[key] for key in ("loss", *SHOWN) if key in metrics}
                figures = ", ".join(f"{key} {value:.3f}" if value >= 0 else f"{key} -" for key, value in shown.items())
                tqdm.write(f"{name}: {figures}")
            if val_dataset is None or (stopped and best_epoch is None):
                ema.model.save(best)
            write_checkpoint(epoch, step, horizon, of_processes)  # last: what it tells of is there
            if check is not None:
                check.report()
            if ended:
                listeners.tell("on_epoch", progress(iteration=iteration, lr=lr, losses=losses, metrics=metrics))
        stopped = any_process(listeners.stopped, device)
        horizon = gather(horizon, world_size)[0]
        interruption.release()
        first_step = 0
        epoch_loss.zero_()

    seconds = clock() - begun
    pace = training_seconds / max(iteration - first_iteration, 1)
    report = None
    ended_by = "callback" if epoch < horizon.epochs else horizon.reason
    if settings.report and ended_by != "callback":
        report = report_run(settings, dataset, val_dataset, best_epoch, seconds, pace, rank)
    skipped, noticed = dict(dataset.skipped), dict(dataset.noticed)
    if val_dataset is not None:
        skipped |= {f"{reason}, of validation": what for reason, what in val_dataset.skipped.items()}
        noticed |= {f"{reason}, of validation": what for reason, what in val_dataset.noticed.items()}
    left_out, odd = ({reason: len(what) for reason, what in told.items()} for told in (skipped, noticed))
    result = TrainResult(best_metrics, best_epoch, seconds, pace, last, best, report, left_out, odd, ended_by)
    listeners.tell("on_end", result)
    return result


def make_model(settings: Settings, dataset: CocoDataset, start: Detector | None) -> Detector:
    """The model to train on `dataset`, with the weights that it starts from: those of `start` where it is given."""
    recipe = settings.recipe
    given, options = None, {}
    if start is not None:
        meta = {"rtmdet_fast": start.saved_options()}
        given = Checkpoint(Path("the model given"), start.state_dict(), start.class_names, meta)
        options = {name: value for name, value in start.inspect(given).options.items() if value is not None}
    model = recipe.build(class_names=dataset.class_names, **options)
    if recipe.needs_init and settings.init is None and start is None and not settings.resume:
        warnings.warn(
            f"{model.title} has frozen batch norms, which without weights to start from (--init) normalise nothing",
            stacklevel=2,
        )
    if settings.freeze and settings.init is None and start is None and not settings.resume:
        raise UserError(f"--freeze {settings.freeze} keeps weights as they are: give those to start from with --init")
    checkpoint = given
    if settings.init is not None:
        checkpoint = read_checkpoint(resolve_weights(settings.init))
    if checkpoint is not None:
        model.load_weights(checkpoint)
        before = checkpoint.class_names
        if before and before != model.class_names and len(before) == len(model.class_names):
            warnings.warn(
                f"{checkpoint.path}: its classes ({', '.join(before[:8])}, …) are taken for those of the training data "
                f"({', '.join(model.class_names[:8])}, …) in that order",
                stacklevel=2,
            )
    model.image_size = settings.image_size
    if model.patch_size is not None:
        model.patch_size = dataset.longest_side  # what an object's size in pixels was seen relative to
    return model


def image_cache(amount: str, dataset: CocoDataset, *, told: bool) -> ImageCache | None:
    """Of the size that the images need or that there is room for; None, with a warning, where there is none."""
    needed, processes = dataset.decoded_bytes, process_count()
    room = room_for_images(amount, processes)
    try:
        cache = ImageCache(len(dataset), min(needed, room))
    except MemoryError as error:
        warnings.warn(f"--cache {amount}: {error}; images are decoded each time", stacklevel=2)
        return None
    if told:
        share = f"all {len(dataset)}" if room >= needed else f"{room / needed:.0%} of {len(dataset)}"
        each = f" in each of {processes} processes" if processes > 1 else ""
        tqdm.write(f"cache: {min(needed, room) / 1e9:.2f} GB of memory, shared by loaders{each}, for {share} images")
    return cache


def tell_settings(config: TrainConfig, settings: Settings, sampler: PlanSampler) -> None:
    """Says what was worked out for the run and decides much."""
    recipe, images = settings.recipe, settings.batch_size * settings.accumulate * process_count()
    if config.lr is None:
        rate = f"learning rate {settings.lr:.3g}: {recipe.lr:g} at {recipe.lr_batch} images a step, here {images}"
        tqdm.write(f"batch size {settings.batch_size}{' (auto)' if config.batch_size == 'auto' else ''}, {rate}")
    elif config.batch_size == "auto":
        tqdm.write(f"batch size {settings.batch_size} (auto)")
    if sampler.repeats is not None:
        more = int((sampler.repeats > 1).sum())
        tqdm.write(
            f"an epoch shows {sampler.epoch_length} images: of {sampler.dataset_length} there are {more} repeated"
        )


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
    kept = keep_batch(previous[1], out, iteration)
    raise UserError(f"the loss is {value} near iteration {iteration}; {kept} (a lower --lr or --amp none may help)")


def keep_batch(batch: Batch, out: Path, iteration: int) -> str:
    """Write a batch for inspection, and say where."""
    path = out / "nan_batch.pt"
    tensors = {k: v.cpu() for k, v in asdict(batch).items() if v is not None}
    save_atomically({"iteration": iteration, **tensors}, path)
    return f"the batch is in {path}, the last good weights in last.pth"


def report_run(
    settings: Settings,
    dataset: CocoDataset,
    val_dataset: CocoDataset | None,
    best_epoch: int | None,
    seconds: float,
    pace: float,
    rank: int,
) -> Path | None:
    """Evaluate the best weights once more, for curves and pictures; the first process writes report.html."""
    best = settings.out / "best.pth"
    together = all(gather(best.is_file(), process_count()))  # not on nodes that have no disk in common
    if rank > 0 and not (together and val_dataset is not None):
        return None
    model = load_model(best).to(settings.device)
    metrics: dict[str, Any] = {}
    curves: dict[str, Any] = {}
    analysis = None
    worst: list[ReportSample] = []
    samples: list[ReportSample] = []
    if val_dataset is not None:
        evaluation = evaluate(
            model, val_dataset, batch_size=settings.batch_size, progress=settings.progress, together=together
        )
        if rank > 0:
            return None
        analysis = analyse(evaluation, val_dataset.class_names)
        metrics = {**evaluation.metrics, "per_class": evaluation.per_class, "best_epoch": best_epoch}
        if analysis is not None:
            metrics["analysis"] = analysis.as_json()
        curves = evaluation.pr_curves
        write_json(settings.out / "metrics.json", metrics)
        write_json(settings.out / "detections.json", evaluation.detections, indent=None)
        worst, samples = report_samples(val_dataset, evaluation, analysis)
    return write_report(
        settings.out / "report.html",
        title=f"{model.title} on {dataset.annotation_path.name}",
        evaluation=metrics,
        pr_curves=curves,
        settings={**settings.as_json(), "training images": len(dataset), "seconds per iteration": round(pace, 4)},
        class_names=dataset.class_names,
        history=read_metrics(settings.out / "metrics.csv"),
        analysis=analysis,
        worst=worst,
        samples=samples,
        batches=[(drawn.told, drawn.picture) for drawn in draw_batches(settings, dataset, 1)],
        train_objects=np.bincount(dataset.objects()[2], minlength=len(dataset.class_names)),
        parameters=sum(p.numel() for p in model.parameters()),
        seconds=seconds,
    )


def duration(seconds: float) -> str:
    """1:02:03 of 3723 seconds."""
    return str(timedelta(seconds=round(seconds)))
