"""A step of training, from a batch to new weights; on a GPU, where everything allows it, as one CUDA graph.

A graph is a recording: the host starts hundreds of kernels by one call, and they read and write the memory that they
did when it was made. So a step that is to be one reads its batch from tensors that stay where they are, in which ground
truths are padded to one of a few sizes; numbers that change from step to step, the learning rate and the share of the
weight average, are tensors on the device too (moments and count of steps always are); and no size in it is a matter of
the values.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rtmdet_fast.data.augment import Batch
from rtmdet_fast.distributed import greatest_on_host, process_count
from rtmdet_fast.models.detector import Detector, Targets
from rtmdet_fast.training.config import Settings
from rtmdet_fast.training.schedule import ModelEMA

AMP_TYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What the forward pass is cast to, by the names of `--amp`."""
GRAPHED = {"cuda"}
"""Types of devices on which steps are recorded."""
SIZES = (4, 16, 64, 256, 1024)
"""To which the ground truths of an image are padded."""
FULL = 2
"""Room for matched predictions is that of half of the padded ground truths: fuller batches take the next size."""
WARM_UP = 3
"""Steps before one is recorded: libraries choose algorithms, kernels are compiled, moments are allocated."""
WARM_UP_OF_SEVERAL = 11
"""Steps of any size that DistributedDataParallel is to have taken before: it times the first ten, which waits."""
MAX_GRAPHS = 12
"""Sizes of batches, images and ground truths that are recorded; a step of another is taken as it comes."""

Losses = dict[str, Tensor]


def targets_of(batch: Batch, room: int | None = None) -> Targets:
    """What a model's losses take of a batch."""
    return Targets(batch.gt_boxes, batch.gt_labels, batch.gt_counts, batch.gt_centers, batch.gt_masks, room)


def is_graph(settings: Settings, model: Detector) -> bool:
    """Whether a run's steps are recorded: of one batch on GPUs, not compiled, with losses that do not wait."""
    return (
        settings.graph == "auto"
        and torch.device(settings.device).type in GRAPHED
        and model.most_matches is not None
        and settings.accumulate == 1
        and not settings.compile
    )


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """On which steps are recorded, and taken before that."""
    return torch.cuda.Stream(device)


def of_several_processes(model: Detector, graph: bool) -> Callable[..., Any]:
    """The model as one of several processes calls it: its gradients, and moments of BatchNorm, are those of all.

    graph: its steps are to be recorded, on the stream on which it is made here: it keeps nodes that gradients end in.
    """
    device = next(model.parameters()).device
    model.enable_sync_bn()
    with warnings.catch_warnings(), ExitStack() as around:
        # of torch 2.13, whose successor of the argument those before it do not have
        warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
        if graph and device.type == "cuda":
            side_stream(device).wait_stream(torch.cuda.current_stream(device))
            around.callback(torch.cuda.current_stream(device).wait_stream, side_stream(device))
            around.enter_context(torch.cuda.stream(side_stream(device)))
        made = torch.nn.parallel.DistributedDataParallel(
            model, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False
        )
    if graph:
        made._set_ddp_runtime_logging_sample_rate(2**31 - 1)  # it would wait in every hundredth step, recorded or not
    return made


class Step:
    """What turns batches into new weights: `take` each, `backward` each, and then `update`."""

    def __init__(
        self,
        model: Detector,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        ema: ModelEMA[Detector],
        *,
        call: Callable[..., Any] | None = None,
        amp: torch.dtype | None = None,
        clip_norm: float | None = None,
    ):
        """
        Args:
            model: to train, on its device.
            optimizer: of its parameters; each group has an `lr_factor` on the learning rate.
            scaler: of the gradients of fp16; one that is not enabled leaves them alone.
            ema: the average of the model's weights.
            call: the model as it is called, compiled or for several processes.
            amp: what the forward pass is cast to, if anything.
            clip_norm: greatest norm of the gradient of all parameters.
        """
        self.model, self.optimizer, self.scaler, self.ema = model, optimizer, scaler, ema
        self.call, self.amp, self.clip_norm = call or model, amp, clip_norm
        self.device = next(model.parameters()).device

    def set_rate(self, rate: float) -> None:
        """The learning rate of the steps from now on."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_factor"]

    def take(self, batch: Batch, side: int) -> Batch:
        """The batch on the device, with images of that side in pixels."""
        return batch.to(self.device, non_blocking=True).resized(side)

    def backward(self, batch: Batch, parts: int = 1) -> tuple[Losses, Tensor]:
        """Adds the gradients of a taken batch, one of `parts` of a step → its losses, and their sum over `parts`.

        UserError for predictions that no loss can be made of.
        """
        return self._gradients(batch.images, targets_of(batch), parts)

    def update(self) -> None:
        """Moves weights by the gradients, and their average by the weights."""
        self._descend()
        self.ema.update()

    def _gradients(self, images: Tensor, targets: Targets, parts: int) -> tuple[Losses, Tensor]:
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            losses = self.call(self.model.normalize(images), targets)
        loss = sum(losses.values()) / parts
        self.scaler.scale(loss).backward()
        return {name: value.detach() for name, value in losses.items()}, loss.detach()

    def _descend(self) -> None:
        if self.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)


@dataclass
class Places:
    """Where the batches of one size lie, and what is made of them there."""

    batch: Batch
    room: int
    names: tuple[str, ...] = ()
    """Of the losses."""
    losses: Tensor | None = None
    """[1 + losses], their sum first."""
    steps: int = 0
    graph: Any = field(default=None, repr=False)

    def fill(self, batch: Batch) -> None:
        """Copies it here; rows of ground truths beyond its own stay as they are, and count for nothing."""
        self.batch.images.copy_(batch.images)
        self.batch.gt_counts.copy_(batch.gt_counts)
        for name in ("gt_boxes", "gt_labels", "gt_centers", "gt_masks"):
            theirs = getattr(batch, name)
            if theirs is not None:
                getattr(self.batch, name)[:, : theirs.shape[1]].copy_(theirs)


class GraphStep(Step):
    """`backward` makes all of a step, of one batch, on tensors that stay where they are; on a GPU as one CUDA graph.

    A batch that fits no size, or comes after `MAX_GRAPHS` others, is taken as `Step` takes it, and counted in `eager`.
    Nothing may be given other tensors meanwhile: neither model, nor the optimiser.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        assert self.model.most_matches is not None
        self.eager = 0
        self._places: dict[tuple[Any, ...], Places] = {}
        self._images: dict[tuple[int, ...], Tensor] = {}
        self._share = torch.zeros((), device=self.device)
        self._objects = 0
        self._updated = False
        self._recording = self.device.type == "cuda"
        self._pool: Any = None
        self._side = side_stream(self.device) if self._recording else None
        self._copies = torch.cuda.Stream(self.device) if self._recording else None
        self._taken = 0
        if self._recording:
            torch.cuda.reset_peak_memory_stats(self.device)
        for group in self.optimizer.param_groups:
            # a number would be part of the recording; a kernel of AdamW on a CPU takes it in double precision
            dtype = torch.float64 if self.device.type == "cpu" else torch.float32
            group["lr"] = torch.tensor(group["lr"], dtype=dtype).to(self.device)

    def set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"].fill_(rate * group["lr_factor"])

    def take(self, batch: Batch, side: int) -> Batch:
        self._objects = int(batch.gt_counts.sum())  # still on the host
        if self._copies is None:
            return super().take(batch, side)
        with torch.cuda.stream(self._copies):  # while the device is at work on the batch before
            taken = super().take(batch, side)
        stream = torch.cuda.current_stream(self.device)
        stream.wait_stream(self._copies)
        for part in fields(taken):
            tensor = getattr(taken, part.name)
            if tensor is not None:
                tensor.record_stream(stream)
        return taken

    def backward(self, batch: Batch, parts: int = 1) -> tuple[Losses, Tensor]:
        places = self._fitting(batch) if parts == 1 else None
        if places is None:
            self.eager += 1
            return super().backward(batch, parts)
        places.fill(batch)
        self._share.fill_(self.ema.share(self.ema.step))
        self._run(places)
        self.ema.step += 1
        self._updated = True
        assert places.losses is not None
        loss, *losses = places.losses.clone().unbind()  # the next step writes over them
        return dict(zip(places.names, losses, strict=True)), loss

    def update(self) -> None:
        if not self._updated:
            super().update()
        self._updated = False

    def step(self, places: Places) -> None:
        """All of a step on the batch that lies there; nothing in it makes the host wait or has a size by the values."""
        losses, loss = self._gradients(places.batch.images, targets_of(places.batch, places.room), 1)
        self._descend()
        self.ema.move(self._share)
        found = torch.stack([loss, *losses.values()])
        if places.losses is None:
            places.names, places.losses = tuple(losses), found
        else:
            places.losses.copy_(found)

    def _gradients(self, images: Tensor, targets: Targets, parts: int) -> tuple[Losses, Tensor]:
        self._taken += 1
        return super()._gradients(images, targets, parts)

    def _fitting(self, batch: Batch) -> Places | None:
        """Where a batch is to lie; None where there is no such place. The same in all processes."""
        images, most = batch.images.shape, batch.gt_boxes.shape[1]
        too_small = [size < most or size * images[0] < FULL * self._objects for size in SIZES]
        size, count, other = greatest_on_host([sum(too_small), images[0], -images[0]])
        if size == len(SIZES) or count != -other:
            return None
        key = (*images, SIZES[size])
        if key not in self._places:
            if len(self._places) == MAX_GRAPHS:
                return None
            self._places[key] = self._made(batch, SIZES[size])
        return self._places[key]

    def _made(self, batch: Batch, size: int) -> Places:
        def padded(x: Tensor) -> Tensor:
            return x.new_zeros(len(x), size, *x.shape[2:])

        assert self.model.most_matches is not None
        images = self._images.setdefault(batch.images.shape, torch.empty_like(batch.images))
        own = Batch(
            images,
            padded(batch.gt_boxes),
            padded(batch.gt_labels),
            torch.zeros_like(batch.gt_counts),
            None if batch.gt_centers is None else padded(batch.gt_centers),
            None if batch.gt_masks is None else padded(batch.gt_masks),
        )
        return Places(own, room=len(images) * size // FULL * self.model.most_matches)

    def _run(self, places: Places) -> None:
        places.steps += 1
        warm = process_count() == 1 or self._taken >= WARM_UP_OF_SEVERAL
        if places.graph is None and self._recording and places.steps > WARM_UP and warm:
            self._record(places)
        if places.graph is not None:
            places.graph.replay()
            return
        if self._side is None:
            self.step(places)
            return
        stream = torch.cuda.current_stream(self.device)
        self._side.wait_stream(stream)  # as the recording will be on another than the current one
        with torch.cuda.stream(self._side):
            self.step(places)
        stream.wait_stream(self._side)

    def _record(self, places: Places) -> None:
        """Makes a graph of `step`, which by itself does nothing; where that fails, says so and makes no more."""
        torch.cuda.empty_cache()
        needed = torch.cuda.max_memory_allocated(self.device) - torch.cuda.memory_allocated(self.device)
        free, _ = torch.cuda.mem_get_info(self.device)
        # graphs share theirs with each other, but not with other steps
        short = self._pool is None and free < 2 * needed
        if any(greatest_on_host([short])):
            self._give_up(f"of {free / 1e9:.1f} GB of memory a graph and a step without take {2 * needed / 1e9:.1f}")
            return
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        for group in self.optimizer.param_groups:
            group["capturable"] = True  # AdamW warns where it is, and nothing is recorded
        why = ""
        try:
            # graphs run one after another and share their memory; other threads may go on with what they do
            with (
                torch.cuda.device(self.device),
                torch.cuda.graph(graph, self._pool, self._side, capture_error_mode="thread_local"),
            ):
                self.step(places)
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # which a recording that fails leaves
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler._per_optimizer_states.clear()  # it would take the step for done
            why = str(error) or "no reason was given"
        finally:
            for group in self.optimizer.param_groups:
                group["capturable"] = False
        if any(greatest_on_host([bool(why)])):
            self._give_up(why or "another process could not do it")
            return
        self._pool, places.graph = graph.pool(), graph

    def _give_up(self, reason: str) -> None:
        self._recording = False
        warnings.warn(
            f"the training step could not be recorded as a CUDA graph and goes on without (--graph off): {reason}",
            stacklevel=2,
        )
