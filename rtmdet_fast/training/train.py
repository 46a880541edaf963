"""Training: one loop for every family. `Run` is what it is made of, and `_train` the order in which it goes."""

from __future__ import annotations

import itertools
import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from rtmdet_fast.data.augment import Batch, collate
from rtmdet_fast.data.check import CHECK_SECONDS, ImageCheck
from rtmdet_fast.data.plan import PlanSampler, repeat_factors
from rtmdet_fast.data.workers import handed_over, init_worker
from rtmdet_fast.distributed import any_process, gather, greatest_on_host, join_processes, once_per_node
from rtmdet_fast.errors import ImageError, UserError
from rtmdet_fast.evaluation.analysis import best_score_thresholds
from rtmdet_fast.evaluation.evaluate import Evaluation, evaluate, match_categories
from rtmdet_fast.files import write_json
from rtmdet_fast.models.checkpoint import damage_told
from rtmdet_fast.models.detector import Detector
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
from rtmdet_fast.training.config import TrainConfig, TrainResult, resolve
from rtmdet_fast.training.horizon import Horizon, clock
from rtmdet_fast.training.interruption import Interruption
from rtmdet_fast.training.loggers import LOGGERS, check_loggers
from rtmdet_fast.training.loss_watch import LossWatch
from rtmdet_fast.training.run_log import Meter, RunLog, timed
from rtmdet_fast.training.run_report import report_run
from rtmdet_fast.training.schedule import ModelEMA, random_side
from rtmdet_fast.training.setup import image_cache, make_model, tell_settings
from rtmdet_fast.training.state import (
    load_optimizer_state,
    read_training_state,
    refuse_other_run,
    remove_run,
    shared_anew,
)
from rtmdet_fast.training.step import AMP_TYPES, GraphStep, Step, is_graph, of_several_processes

LOG_EVERY = 10
OfProcess = tuple[dict[str, Any], list[torch.Tensor], float, dict[str, Any]]
"""What a checkpoint holds of each process: where its loaders and generators stand, and means of losses."""
SHOWN = ("AP", "AP50", "segm_AP", "segm_AP50")
"""Of the figures of a validation, those that an epoch's line shows."""
T = TypeVar("T")


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
    run = Run(config, model, callbacks, interruption)
    while run.goes_on:
        run.train_epoch()
    return run.end()


@dataclass
class Epoch:
    """The epoch under way: how it was planned when it began, and what its last step left."""

    name: str
    """For people."""
    number: int
    """From 1."""
    epochs: int
    """Of the run."""
    iterations: int
    """Steps of the run, those of before a `--resume` too."""
    sides: tuple[int, ...]
    """Those of images in pixels, to one of which each batch is resized."""
    batches: Iterator[Batch]
    sampler_state: dict[str, Any]
    """From which the epoch begins; once it is over, the next one."""
    first_step: int
    """Of those taken here: not 0 where the epoch was broken off and goes on."""
    bar: tqdm
    begun: float
    lr: float
    losses: dict[str, torch.Tensor]
    wish: Wish = Wish.GO_ON
    """What all processes do after the step."""


class Run:
    """A training: the parts that it is made of, where it stands, and what it does.

    Where it stands is `epoch`, of those that are over, and `step`, of the one under way: 0 up to `steps_per_epoch`
    before its validation, and 0 after. Every process has a Run and takes the same way through it: what one decides by a
    clock, a callback or a file of its own, it tells the others before any of them acts on it. The first alone writes.
    """

    def __init__(
        self, config: TrainConfig, model: Detector | None, callbacks: Sequence[Callback], interruption: Interruption
    ):
        """Makes all parts; what can be wrong with the settings and the data is raised before anything is written."""
        self.started = clock()
        self.interruption = interruption
        self.settings = resolve(config)
        check_loggers(self.settings.loggers)
        self.device = torch.device(self.settings.device)
        self.rank, self.world_size = join_processes(self.device, graphs=self.settings.graph == "auto")
        if self.rank > 0:
            self.settings = replace(self.settings, progress=False)
        self.task, self.recipe = TASKS[self.settings.task], self.settings.recipe
        self.out = self.settings.out
        self.last, self.best = self.out / "last.pth", self.out / "best.pth"
        if self.rank == 0 and not (self.settings.resume or self.settings.overwrite):
            refuse_other_run(self.out, config.resume)
        random.seed(self.settings.seed)
        np.random.seed(self.settings.seed)
        torch.manual_seed(self.settings.seed)

        self._open_data(config)
        self._make_model(model)
        self._make_step()
        if self.settings.progress:
            tell_settings(config, self.settings, self.sampler)
        if self.check is not None:
            self.check.report(wait=CHECK_SECONDS, progress=self.settings.progress)
        self._stand_at_the_start()
        if self.settings.resume:
            self._resume()
        elif self.settings.overwrite and self.rank == 0:
            remove_run(self.out)
        self._open_files()
        self._begin(callbacks)

    def _open_data(self, config: TrainConfig) -> None:
        """The images, in which order they are shown, and, where that was left to the run, how many at a time."""
        settings, recipe = self.settings, self.recipe
        dataset, self.val_dataset = once_per_node(settings.open_data)
        if config.batch_size == "auto":
            self.settings = settings = replace(settings, batch_size=find_batch_size(settings, dataset))
        if settings.cache is not None:
            dataset.cache = image_cache(settings.cache, dataset, told=settings.progress)
        repeats = None
        if settings.repeat_threshold is not None:
            repeats = repeat_factors(dataset.labels_by_image, settings.repeat_threshold)
        self.check = None
        if self.rank == 0:
            self.check = ImageCheck(dataset, *([self.val_dataset] if self.val_dataset is not None else []))
        self.dataset = dataset
        self.sampler = PlanSampler(
            len(dataset),
            settings.batch_size,
            recipe.caches,
            settings.seed,
            settings.num_workers,
            rank=self.rank,
            world_size=self.world_size,
            repeats=repeats,
            as_one=settings.as_one,
        )
        self.loader = DataLoader(
            recipe.augment(dataset, settings.image_size),
            batch_sampler=self.sampler,
            collate_fn=collate,
            num_workers=settings.num_workers,
            worker_init_fn=init_worker,
            pin_memory=self.device.type == "cuda",
            persistent_workers=settings.num_workers > 0,
        )
        self.steps_per_epoch = math.ceil(len(self.sampler) / settings.accumulate)
        if config.lr is None:
            lr = recipe.lr_of(settings.images_per_step, settings.epochs * self.steps_per_epoch)
            self.settings = settings = replace(settings, lr=lr)
        self.horizon = Horizon(settings.epochs, settings.stage2_epochs)

    def _make_model(self, start: Detector | None) -> None:
        """The model on its device, and the average of its weights."""
        torch.backends.cudnn.benchmark = True  # batches have one shape, or one of a few
        self.model = model = make_model(self.settings, self.dataset, start)
        self.frozen = [] if self.settings.freeze is None else [model.get_submodule(self.settings.freeze)]
        for module in self.frozen:
            module.requires_grad_(False)
        if self.val_dataset is not None:
            match_categories(model, self.val_dataset)  # which cannot be seen too early
        model.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema = ModelEMA(model, self._ema_share())

    def _make_step(self) -> None:
        """The optimiser, and what a step is: plain, compiled, of several processes, or a CUDA graph."""
        settings, recipe, model = self.settings, self.recipe, self.model
        self.optimizer = torch.optim.AdamW(
            recipe.parameter_groups(model, settings.weight_decay), lr=settings.lr, fused=True
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.amp == "fp16")
        step_model: Callable[..., Any] = model
        graph = is_graph(settings, model)
        if self.world_size > 1:
            step_model = of_several_processes(model, graph)
        if settings.compile:
            step_model = torch.compile(step_model)
        self.stepping = (GraphStep if graph else Step)(
            model,
            self.optimizer,
            self.scaler,
            self.ema,
            call=step_model,
            amp=AMP_TYPES[settings.amp],
            clip_norm=recipe.clip_norm,
        )

    def _stand_at_the_start(self) -> None:
        """Before the first step."""
        self.iteration = self.epoch = self.step = 0
        self.shift = 0  # of iteration against the schedule: what other numbers of processes took more, or fewer, before
        self.best_epoch: int | None = None
        self.best_metrics: dict[str, float] = {}
        self.seconds_before = self.validation_seconds = 0.0  # of the last validation
        self.epoch_loss = torch.zeros((), device=self.device)
        self.meter = Meter()
        self.stopped = False
        self.random_states: list[torch.Tensor] = []  # with which an epoch goes on that was broken off

    def _resume(self) -> None:
        """Goes to where last.pth stands."""
        settings, last = self.settings, self.last
        state = read_training_state(last, settings)
        with damage_told(last):
            if (processes := len(state["samplers"])) != self.world_size:
                state = shared_anew(state, settings, self.steps_per_epoch)
            self.model.load_state_dict(state["model"])
            self.ema.model.load_state_dict(state["ema"])
            load_optimizer_state(self.optimizer, state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.step = state["step"]
            if self.step > self.steps_per_epoch:
                raise ValueError(f"step {self.step} of {self.steps_per_epoch}")
            self.sampler.load_state_dicts(state["samplers"], skip=self.step * settings.accumulate)
            self.random_states = self._of_this_process(state["random_states"])
            set_random_states(self.random_states)
            self.epoch_loss += self._of_this_process(state["epoch_losses"])
            self.meter.load_state_dict(self._of_this_process(state["meters"]))
            self.seconds_before, self.validation_seconds = map(float, state.get("seconds", (0.0, 0.0)))
            self.horizon = Horizon(*state["horizon"])
            thresholds = state.get("score_thresholds")
            self.ema.model.score_thresholds = None if thresholds is None else tuple(map(float, thresholds))
        if processes != self.world_size and self.rank == 0:
            warnings.warn(
                f"the run in {self.out} had {processes} processes and goes on with {self.world_size}, at "
                f"{settings.batch_size * settings.accumulate * self.world_size} images a step and a rate of "
                f"{settings.lr:.3g}: to the bit it would with {processes} alone",
                stacklevel=5,
            )
        self.iteration, self.epoch = state["iteration"], state["epoch"]
        self.best_epoch, self.best_metrics = state["best_epoch"], state["best_metrics"]
        self.ema.step = self.epoch * self.steps_per_epoch + self.step
        self.shift = self.iteration - self.ema.step

    def _of_this_process(self, values: Sequence[T]) -> T:
        """Of what a state holds of each; there may be other numbers of them now."""
        return values[self.rank % len(values)]

    def _open_files(self) -> None:
        """What is written from now on; of rows and checkpoints those past the beginning go."""
        validated = self.step == 0 or self.epoch >= self.horizon.epochs
        self.log = RunLog(self.out, self.iteration, validated) if self.rank == 0 else None
        self.checkpoints = Checkpoints(self.last, self.settings.save_every, self.settings.keep, self.iteration)
        if self.log is not None:
            write_json(self.out / "config.json", self.settings.as_json())
        self.watch = LossWatch(self.out)

    def _begin(self, callbacks: Sequence[Callback]) -> None:
        """Tells those who listen, and looks at the clock."""
        loggers = (LOGGERS[name][0]() for name in self.settings.loggers)
        self.listeners = Callbacks([*loggers, *callbacks] if self.rank == 0 else ())
        self.listeners.tell("on_start", self.settings, self.iteration)
        time = self.settings.time
        self.deadline = math.inf if time is None else self.started - self.seconds_before + time
        self.begun, self.first_iteration = clock(), self.iteration
        self.training_seconds = 0.0

    @property
    def goes_on(self) -> bool:
        """Whether there is another epoch."""
        return self.epoch < self.horizon.epochs and not self.stopped

    @property
    def scheduled_steps(self) -> int:
        """Of the run as it is planned now; rate and averaging go by them."""
        return self.horizon.epochs * self.steps_per_epoch

    def _ema_share(self) -> Callable[[int], float]:
        """The share of the new weights in the average at a step, as the run is planned now."""
        share, total, momentum = self.recipe.ema_share, self.scheduled_steps, self.settings.ema_momentum
        return lambda step: share(step, total, momentum)  # without the run, which would hold itself, and its loaders

    def _rate(self, iteration: int) -> float:
        """The learning rate of a step; `iteration` counts those before it."""
        warmup = self.settings.warmup_iterations
        if warmup is None:
            warmup = min(self.recipe.warmup, self.scheduled_steps // 10)
        return self.settings.lr * self.recipe.lr_factor(iteration - self.shift, self.scheduled_steps, warmup)

    def _progress(self, epoch: Epoch, metrics: dict[str, float]) -> Progress:
        return Progress(
            epoch=epoch.number,
            epochs=epoch.epochs,
            iteration=self.iteration,
            iterations=epoch.iterations,
            lr=epoch.lr,
            losses=epoch.losses,
            metrics=metrics,
            model=self.ema.model,
            stop=self.listeners.stop,
        )

    def train_epoch(self) -> None:
        """The steps of an epoch, or those left of one that was broken off, its validation, and a checkpoint of it.

        A signal waits for the checkpoint, except in a validation.
        """
        self.interruption.hold()
        epoch = self._begin_epoch()
        self._take_steps(epoch)
        self.stopped = epoch.wish > Wish.CHECKPOINT
        finished = self.step == self.steps_per_epoch
        epochs = self.epoch + finished
        horizon = self._planned(epoch, epochs)
        ended = finished or horizon.epochs == epochs
        validates = ended and horizon.validates(epochs, self.settings.val_interval) and self.val_dataset is not None
        evaluation = None
        if validates or epoch.wish == Wish.END:
            self._write_checkpoint(self._of_processes(epoch))
            if epoch.wish == Wish.END:
                gather(None, self.world_size)  # nobody leaves before it is written
                self.interruption.end()
            self.interruption.release()
            evaluation = self._validate()

        self.epoch, self.horizon = epochs, horizon
        if finished:
            self.step, epoch.sampler_state = 0, self.sampler.state_dict()
        of_processes = self._of_processes(epoch)
        if self.log is not None:
            metrics = {"loss": sum(loss for *_, loss, _ in of_processes) / self.world_size}
            if evaluation is not None:
                self._judge(evaluation, epoch.number)
                metrics |= evaluation.metrics
            if self.settings.progress and ended:
                _tell_epoch(epoch.name, metrics)
            if self.val_dataset is None or (self.stopped and self.best_epoch is None):
                self.ema.model.save(self.best)
            self._write_checkpoint(of_processes)  # last: what it tells of is there
            if self.check is not None:
                self.check.report()
            if ended:
                self.listeners.tell("on_epoch", self._progress(epoch, metrics))
        self.stopped = any_process(self.listeners.stopped)
        self.horizon = gather(self.horizon, self.world_size)[0]
        self.interruption.release()
        self.epoch_loss.zero_()

    def _begin_epoch(self) -> Epoch:
        """Its plans, its batches, and the model ready to learn."""
        settings, first_step = self.settings, self.step
        stage2 = self.epoch >= self.horizon.stage2_begin
        self.sampler.set_stage2(stage2)
        self.ema.share = self._ema_share()
        sampler_state = self.sampler.state_dict()
        self.model.train()
        for module in self.frozen:
            module.eval()
        batches = timed(handed_over(iter(self.loader)), self.meter)
        if first_step:  # what the loader's start has drawn, it drew before
            set_random_states(self.random_states)
        if first_step == self.steps_per_epoch:  # its validation alone is left
            next(batches, None)  # makes the plans, upon which those of the next epoch hang
        number, epochs, total = self.epoch + 1, self.horizon.epochs, self.steps_per_epoch
        name = f"epoch {number}/{epochs}"
        return Epoch(
            name=name,
            number=number,
            epochs=epochs,
            iterations=self.scheduled_steps + self.shift,
            sides=(settings.image_size,) if stage2 else self.recipe.batch_sides(settings.image_size),
            batches=batches,
            sampler_state=sampler_state,
            first_step=first_step,
            begun=clock(),
            lr=self._rate(max(self.iteration - 1, self.shift)),
            losses={},
            bar=tqdm(total=total, initial=first_step, desc=name, disable=not settings.progress, leave=False),
        )

    def _take_steps(self, epoch: Epoch) -> None:
        """Up to the end of the epoch, or as far as a signal, a callback or the time allows."""
        while self.step < self.steps_per_epoch:
            self._take_step(epoch)
            metrics = self._read_meter(epoch)
            self.listeners.tell("on_step", self._progress(epoch, metrics))
            epoch.wish = self._wish()
            if epoch.wish > Wish.CHECKPOINT:
                break
            if epoch.wish == Wish.CHECKPOINT and self.step < self.steps_per_epoch:
                self.watch.check(self.iteration)
                self._write_checkpoint(self._of_processes(epoch))
        epoch.bar.close()
        self.watch.check(self.iteration)
        self.watch.forget()
        self.training_seconds += clock() - epoch.begun

    def _take_step(self, epoch: Epoch) -> None:
        """Of the optimiser, on one batch or on those that make a step together."""
        settings = self.settings
        epoch.lr = self._rate(self.iteration)
        self.stepping.set_rate(epoch.lr)
        parts = min(settings.accumulate, len(self.sampler) - self.step * settings.accumulate)
        for part, batch in enumerate(itertools.islice(epoch.batches, parts)):
            files = [self.dataset.files[index] for index in self.sampler.ahead.popleft()]
            batch = self.stepping.take(batch, random_side(epoch.sides, settings.seed, self.iteration, part))
            try:
                epoch.losses, loss = self.stepping.backward(batch, parts)
            except UserError as error:  # predictions that no loss can be made of
                self.watch.check(self.iteration)
                kept = self.watch.keep(batch, files, self.iteration)
                if isinstance(error, ImageError):
                    named = [files[i] for i in error.images]
                    kept = f"of {', '.join([*named[:3], *['…'] * (len(named) > 3)])}; {kept}"
                raise UserError(f"{error}; {kept}") from error
            self.meter.add(epoch.losses, len(batch.images) * self.world_size)
            self.epoch_loss += loss / self.steps_per_epoch
            self.watch.check(self.iteration)
            self.watch.add(loss, batch, files)
        self.stepping.update()
        self.iteration, self.step = self.iteration + 1, self.step + 1
        self.meter.step()
        epoch.bar.update()

    def _read_meter(self, epoch: Epoch) -> dict[str, float]:
        """Means of losses and the pace, logged and shown, every LOG_EVERY steps; else nothing."""
        if self.iteration % LOG_EVERY and self.iteration != epoch.iterations:
            return {}
        metrics = {"lr": epoch.lr, **self.meter.read()}
        if self.log is not None:
            self.log.write({"epoch": epoch.number, "iteration": self.iteration, **metrics})
        left = self.meter.seconds_per_step * (epoch.iterations - self.iteration)
        epoch.bar.set_postfix_str(
            f"loss {metrics['loss']:.3f}, lr {epoch.lr:.1e}, {metrics['images_per_second']:.0f} img/s, "
            f"data {metrics['data_wait']:.0%}, ETA {duration(left)}"
        )
        return metrics

    def _wish(self) -> Wish:
        """What all processes do now: the greatest of their wishes."""
        wish = Wish.GO_ON
        if self.interruption.arrived is not None:
            wish = Wish.END
        elif self.listeners.stopped:
            wish = Wish.STOP
        elif self.rank == 0 and clock() > self.deadline - self.validation_seconds:
            wish = Wish.TIME_IS_UP
        elif self.rank == 0 and self.checkpoints.due:
            wish = Wish.CHECKPOINT
        return Wish(greatest_on_host([wish])[0])  # to ask by the device after every step would be to wait for it

    def _planned(self, epoch: Epoch, epochs: int) -> Horizon:
        """The end of the run after its steps of an epoch, with which `epochs` are over; nearer by `--time` alone."""
        horizon = self.horizon
        if self.log is not None:  # the first process alone decides
            if epoch.wish == Wish.TIME_IS_UP and epochs < horizon.epochs:
                horizon = Horizon(epochs, 0, "time")
            elif self.step == self.steps_per_epoch and self.settings.time is not None:
                taken = self.step - epoch.first_step
                if taken:
                    epoch_seconds = (clock() - epoch.begun) / taken * self.steps_per_epoch
                else:
                    epoch_seconds = (clock() - self.started + self.seconds_before) / epoch.number
                validation_seconds = self.validation_seconds
                if not validation_seconds:
                    validation_seconds = epoch_seconds * len(self.val_dataset or ()) / len(self.dataset)
                left = self.deadline - clock()
                horizon = horizon.within(left, epochs, epoch_seconds, validation_seconds, self.settings)
        return gather(horizon, self.world_size)[0]

    def _validate(self) -> Evaluation:
        """The averaged weights on the images of validation, by all processes."""
        assert self.val_dataset is not None
        begun = clock()
        with random_numbers_kept():  # how often it is validated changes nothing
            evaluation = evaluate(
                self.ema.model,
                self.val_dataset,
                batch_size=self.settings.batch_size,
                num_workers=self.settings.num_workers,
                progress=self.settings.progress,
                together=self.world_size > 1,
            )
        self.validation_seconds = clock() - begun
        self.meter.restart()
        return evaluation

    def _judge(self, evaluation: Evaluation, number: int) -> None:
        """What follows from a validation after epoch `number`: thresholds, the best weights, and patience."""
        assert self.log is not None
        metrics, criterion, patience = evaluation.metrics, self.task.criterion, self.settings.patience
        self.log.write({"epoch": number, "iteration": self.iteration, **metrics})
        self.ema.model.score_thresholds = best_score_thresholds(evaluation, len(self.dataset.class_names))
        if self.best_epoch is None or metrics[criterion] > self.best_metrics[criterion]:
            self.best_epoch, self.best_metrics = number, metrics
            self.ema.model.save(self.best)
        if patience is None:
            return
        planned, self.horizon = self.horizon, self.horizon.out_of_patience(self.epoch, self.best_epoch, patience)
        if self.settings.progress and self.horizon != planned:
            left = self.horizon.epochs - self.epoch
            tqdm.write(
                f"no better {criterion} for {patience} epochs: "
                + (f"the last {left}, without strong augmentation, come now" if left else "the run ends")
            )

    def _of_processes(self, epoch: Epoch) -> list[OfProcess]:
        """What a checkpoint holds of each process; all of them ask at the same time."""
        own = epoch.sampler_state, random_states(), self.epoch_loss.item(), self.meter.state_dict()
        return gather(own, self.world_size)

    def _write_checkpoint(self, of_processes: Sequence[OfProcess]) -> None:
        """last.pth of where the run stands, by the first process."""
        if self.log is None:
            return
        samplers, random_numbers, epoch_losses, meters = zip(*of_processes, strict=True)
        self.checkpoints.write(
            self.ema.model,
            {
                "config": self.settings.as_json(),
                "model": self.model.state_dict(),
                "ema": self.ema.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "samplers": list(samplers),
                "random_states": list(random_numbers),
                "epoch": self.epoch,
                "step": self.step,
                "iteration": self.iteration,
                "horizon": list(astuple(self.horizon)),
                "seconds": [clock() - self.started + self.seconds_before, self.validation_seconds],
                "best_epoch": self.best_epoch,
                "best_metrics": self.best_metrics,
                "score_thresholds": self.ema.model.score_thresholds,
                "epoch_losses": list(epoch_losses) if self.step else [0.0] * self.world_size,
                "meters": list(meters),
            },
        )

    def end(self) -> TrainResult:
        """The report, and what came out."""
        seconds = clock() - self.begun
        pace = self.training_seconds / max(self.iteration - self.first_iteration, 1)
        report = None
        ended_by = "callback" if self.epoch < self.horizon.epochs else self.horizon.reason
        if self.settings.report and ended_by != "callback":
            report = report_run(
                self.settings, self.dataset, self.val_dataset, self.best_epoch, seconds, pace, self.rank
            )
        skipped, noticed = dict(self.dataset.skipped), dict(self.dataset.noticed)
        if self.val_dataset is not None:
            skipped |= {f"{reason}, of validation": what for reason, what in self.val_dataset.skipped.items()}
            noticed |= {f"{reason}, of validation": what for reason, what in self.val_dataset.noticed.items()}
        left_out, odd = ({reason: len(what) for reason, what in told.items()} for told in (skipped, noticed))
        result = TrainResult(
            self.best_metrics, self.best_epoch, seconds, pace, self.last, self.best, report, left_out, odd, ended_by
        )
        self.listeners.tell("on_end", result)
        return result


def _tell_epoch(name: str, metrics: dict[str, float]) -> None:
    """The line of an epoch."""
    shown = {key: metrics[key] for key in ("loss", *SHOWN) if key in metrics}
    figures = ", ".join(f"{key} {value:.3f}" if value >= 0 else f"{key} -" for key, value in shown.items())
    tqdm.write(f"{name}: {figures}")


def duration(seconds: float) -> str:
    """1:02:03 of 3723 seconds."""
    return str(timedelta(seconds=round(seconds)))
