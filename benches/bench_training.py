"""A training step (normalisation, forward, loss, backward, AdamW, weight averaging), alone and with its data."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benches.harness import Absent, Case, Contender, relative_error
from benches.models import (
    EMA_MOMENTUM,
    LEARNING_RATE,
    WEIGHT_DECAY,
    drawn,
    forever,
    gradients,
    mmdet_model,
    objects,
    ours,
    pictures,
    plain,
    resized,
)
from rtmdet_fast import accelerate
from rtmdet_fast.inference.preprocess import normalize
from rtmdet_fast.models.detector import Targets
from rtmdet_fast.training.schedule import ModelEMA, ema_share, parameter_groups

CLASSES, DRAWN_CLASSES = 80, 5
# Of the losses, and of all gradients together: rounding may turn a match. Through some sixty layers of random weights
# bfloat16 leaves little of a gradient (a cosine of 0.5 between eager's and float64's): where a step is timed under
# autocast, the losses are its own and the gradients those of the same step in float32.
TOLERANCE = {torch.float32: (1e-3, 5e-2), torch.bfloat16: (5e-2, 5e-2)}


FLOAT64 = ("nano", "tiny", "s")
"""Sizes of which a GPU has room for a step in float64; the losses of others are compared with PyTorch in float32."""
LOADERS = 8
"""Processes of the loader on a GPU machine."""
ITERATIONS = 5
"""With the loader, between two synchronisations: the host goes ahead of the device, as in a run."""


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        return [
            _step(device, "tiny", 8, 256, 20),
            _step(device, "s", 8, 256, 20),
            _step(device, "tiny", 8, 256, 200),
            _iteration(device, "tiny", 8, 256),
        ]
    step = partial(_step, device, side=640, count=20, dtype=torch.bfloat16)
    loaded = partial(_iteration, device, side=640, dtype=torch.bfloat16, workers=LOADERS, iterations=ITERATIONS)
    return [
        step("tiny", 32),
        loaded("tiny", 32),
        step("s", 32),
        step("m", 32, headline=False),
        loaded("s", 32, headline=False),
        step("l", 32, headline=False),
        loaded("m", 32, headline=False),
        loaded("l", 32, headline=False),
        _step(device, "tiny", 32, 640, 200, torch.bfloat16, headline=False),
        step("tiny", 32, mode="default"),
        step("tiny", 32, mode="max-autotune"),
    ]


def _exact(size: str, classes: int, device: torch.device) -> Step:
    """The step that others are compared with."""
    if size in FLOAT64 or device.type == "cpu":
        return Step(size, classes, device, torch.float64)
    return Step(size, classes, device, torch.float32, backend=plain)


def _step(
    device: torch.device,
    size: str,
    batch: int,
    side: int,
    count: int,
    dtype: torch.dtype = torch.float32,
    headline: bool = True,
    mode: str | None = None,
) -> Case:
    """`dtype` bfloat16: under autocast. `mode`: of torch.compile, beside which ours and eager run, minutes of a GPU."""
    cuda = device.type == "cuda"

    def inputs(seed: int) -> tuple[Tensor, ...]:
        return pictures(batch, side, device, seed), *objects(batch, count, CLASSES, side, device, seed)[:3]

    def built(make: Callable[..., Any], **options: Any) -> Any:
        step = make(size, CLASSES, device, dtype, **options)
        if dtype != torch.float32 and mode is None and (size in FLOAT64 or not cuda):
            with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
                exact = make(size, CLASSES, device, torch.float32, **options)
                step.exact = checked(exact(*inputs(0)))[1]
        return step

    own, theirs = partial(built, Step), partial(built, TheirStep, side=side)

    def torch_compile() -> Step:
        if mode is None:
            raise Absent("measured in cases of its own on a GPU: compiling takes its time")
        torch.compiler.reset()
        return own(backend=plain, mode=mode)

    contenders = [Contender(name="triton" if cuda else "reference", build=own, result=checked)]
    if cuda:
        contenders.append(
            Contender(
                name="triton, one CUDA graph",
                build=partial(RecordedStep, size, CLASSES, device, dtype),
                result=checked,
                warm_up=RecordedStep.WARM_UP,
            )
        )
        channels_last = partial(own, backend=plain)
        contenders.append(Contender(name="eager, channels_last", build=channels_last, result=checked))
    if mode is None:
        if cuda:
            contiguous = partial(own, backend=plain, layout=torch.contiguous_format)
            contenders.append(Contender(name="eager", build=contiguous, result=checked))
        contenders += [
            Contender(
                name="eager, assigning per image",
                build=partial(own, backend=partial(plain, per_image=True)),
                result=checked,
            ),
            *([] if cuda else [Contender(name="torch.compile", build=torch_compile, result=checked)]),
            Contender(name="mmdet", build=theirs, result=checked),
        ]
        if cuda:
            accelerated = partial(theirs, accelerated=True)
            contenders.append(Contender(name="mmdet, accelerated", build=accelerated, result=checked))
    else:
        name = "torch.compile" if mode == "default" else f"torch.compile, {mode}"
        contenders.append(Contender(name=name, build=torch_compile, result=checked, warm_up=3))
    return Case(
        op="training",
        name=f"step: RTMDet-{size}, {batch} x 3 x {side} x {side}, {count} ground truths each, "
        + ("autocast to bfloat16" if dtype == torch.bfloat16 else "float32")
        + ("" if mode is None else f", beside torch.compile, {mode}"),
        shapes={"images": [batch, 3, side, side], "gt_boxes": [batch, count, 4]},
        inputs=inputs,
        expected=lambda *inputs: checked(_exact(size, CLASSES, device)(*inputs)),
        compare=lambda result, expected: compare(result, expected, TOLERANCE[dtype]),
        contenders=contenders,
        least=5 if cuda or count >= 100 else 15,
        headline=headline and mode is None,
        late=mode is not None,
        images=batch,
    )


def _iteration(
    device: torch.device,
    size: str,
    batch: int,
    side: int,
    dtype: torch.dtype = torch.float32,
    workers: int = 0,
    iterations: int = 1,
    headline: bool = True,
) -> Case:
    """With loading and augmentation, in the same process or by `workers`; each contender draws its own batches."""
    cuda = device.type == "cuda"

    def compare_own(result: Any, _: Any) -> str:
        inputs, found = result
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
            expected = checked(_exact(size, DRAWN_CLASSES, device)(*(x.to(device) for x in inputs)))
        return compare(found, expected, TOLERANCE[dtype]) + " on its own batch"

    def own(make: Callable[..., Any], **options: Any) -> Callable[[], Any]:
        step = make(size, DRAWN_CLASSES, device, dtype, **options)
        batches = iter(our_batches(size, batch, side, workers))

        def run() -> Any:
            first = None
            for _ in range(iterations):
                data = next(batches)
                out = step(*(data if make is RecordedStep else [x.to(device, non_blocking=True) for x in data]))
                first = first or (data, out)
            return first

        return run

    def mmdet() -> Callable[[], Any]:
        step = TheirStep(size, DRAWN_CLASSES, device, dtype, side=side)
        batches = iter(their_batches(step.config, batch, side))

        def run() -> Any:
            first = None
            for _ in range(iterations):
                data = next(batches)
                out = step.step(data)
                first = first or (step.tensors(data), out)
            return first

        return run

    contenders = [Contender(name="triton" if cuda else "reference", build=partial(own, Step))]
    if cuda:
        graph = partial(own, RecordedStep)
        per_image = partial(own, Step, backend=partial(plain, per_image=True))
        contenders += [
            Contender(name="triton, one CUDA graph", build=graph, warm_up=RecordedStep.WARM_UP),
            Contender(name="eager, channels_last", build=partial(own, Step, backend=plain)),
            Contender(name="eager, assigning per image", build=per_image),
        ]
    contenders.append(Contender(name="mmdet", build=mmdet))
    # the gradients of several are the last's
    judged = checked if iterations == 1 else lambda output: (output[1], None)
    contenders = [replace(one, result=lambda out: (out[0], judged(out[1]))) for one in contenders]
    loader = f", {workers} loader processes" if workers else ""
    many = f", {iterations} of them" if iterations > 1 else ""
    return Case(
        op="training",
        name=f"iteration with its data (drawn shapes){many}: RTMDet-{size}, {batch} x 3 x {side} x {side}, "
        + ("autocast to bfloat16" if dtype == torch.bfloat16 else "float32")
        + loader,
        shapes={"images": [batch, 3, side, side]},
        inputs=lambda seed: (),
        expected=lambda: None,
        compare=compare_own,
        least=5 if cuda else 40,  # batches differ in their work
        contenders=contenders,
        headline=headline,
        images=batch * iterations,
    )


class Step:
    """One training step of ours as `train.py` does it; gradients stay until the next."""

    exact: Tensor | None = None
    """Gradients of the first step in float32, where it is not in float32 itself."""

    def __init__(
        self,
        size: str,
        classes: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        backend: Callable[..., Any] = lambda function: function,
        mode: str | None = None,
        layout: torch.memory_format = torch.channels_last,
    ):
        """`mode`: of torch.compile, if it is to be compiled."""
        self.model = ours(size, classes, device, torch.float64 if dtype == torch.float64 else torch.float32).train()
        self.model.to(memory_format=layout)  # type: ignore[call-overload]
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, WEIGHT_DECAY), lr=LEARNING_RATE, fused=True)
        self.ema = ModelEMA(self.model, lambda step: ema_share(step, EMA_MOMENTUM))
        self.loss = backend(self.model if mode is None else torch.compile(self.model, dynamic=False, mode=mode))
        self.device, self.dtype, self.layout = device, dtype, layout

    def __call__(self, images: Tensor, *targets: Tensor) -> tuple[Any, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        x = normalize(images.contiguous(memory_format=self.layout))
        if self.dtype == torch.float64:
            x, targets = x.double(), (targets[0].double(), *targets[1:])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            losses = self.loss(x, Targets(*targets))
        sum(losses.values()).backward()
        self.optimizer.step()
        self.ema.update()
        return self, torch.stack([loss.detach() for loss in losses.values()])


class RecordedStep(Step):
    """The same as one CUDA graph, once it is warm; no gradients are left of it. Raises Absent where it cannot be."""

    WARM_UP = 4

    def __init__(self, size: str, classes: int, device: torch.device, dtype: torch.dtype):
        from rtmdet_fast.training.step import GraphStep  # which asks for OpenCV

        super().__init__(size, classes, device, dtype)
        scaler = torch.amp.GradScaler(device.type, enabled=False)
        amp = dtype if dtype == torch.bfloat16 else None
        self.step = GraphStep(self.model, self.optimizer, scaler, self.ema, amp=amp)

    def __call__(self, images: Tensor, *targets: Tensor) -> tuple[Any, Tensor]:
        from rtmdet_fast.data.augment import Batch

        batch = Batch(images.contiguous(memory_format=torch.channels_last), *targets)
        if images.device != self.device:
            batch = self.step.take(batch, images.shape[2])
        losses, _ = self.step.backward(batch)
        self.step.update()
        if self.device.type == "cuda" and not self.step._recording:
            raise Absent("the step could not be recorded, as its warning says")
        return self, torch.stack([*losses.values()])


class TheirStep:
    """One of mmdet's, with its data preprocessor, optimiser wrapper and averaging; gradients stay until the next."""

    exact: Tensor | None = None

    def __init__(
        self,
        size: str,
        classes: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        side: int,
        accelerated: bool = False,
    ):
        self.model, self.config = mmdet_model(size, classes, device, image_size=side)
        from mmdet.models.layers import ExpMomentumEMA  # type: ignore[import-not-found]
        from mmengine.optim import build_optim_wrapper  # type: ignore[import-not-found]

        self.model.train()
        if accelerated:
            accelerate(self.model)
        self.dtype = dtype
        settings = copy.deepcopy(self.config.optim_wrapper)
        settings["optimizer"].update(lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        if dtype != torch.float32:
            settings.update(type="AmpOptimWrapper", dtype="bfloat16")
        self.wrapper = build_optim_wrapper(self.model, settings)
        self.zero = self.wrapper.zero_grad
        self.wrapper.zero_grad = lambda **_: None  # done before the next step instead: gradients are looked at
        self.ema = ExpMomentumEMA(self.model, momentum=EMA_MOMENTUM, update_buffers=True)

    def __call__(self, images: Tensor, boxes: Tensor, labels: Tensor, counts: Tensor) -> tuple[Any, Tensor]:
        from mmdet.structures import DetDataSample  # type: ignore[import-not-found]
        from mmengine.structures import InstanceData  # type: ignore[import-not-found]

        side = images.shape[2]
        samples = []
        for box, label in zip(boxes, labels, strict=True):
            sample = DetDataSample(metainfo=dict(img_shape=(side, side), pad_shape=(side, side)))
            sample.gt_instances = InstanceData(bboxes=box, labels=label)
            samples.append(sample)
        return self.step(dict(inputs=list(images), data_samples=samples))

    def step(self, data: dict[str, Any]) -> tuple[Any, Tensor]:
        self.zero()
        log: Any = self.model.train_step(data, self.wrapper)  # type: ignore[operator]
        self.ema.update_parameters(self.model)
        return self, torch.stack([log["loss_cls"].detach(), log["loss_bbox"].detach()])

    def tensors(self, data: dict[str, Any]) -> tuple[Tensor, ...]:
        """Images and padded ground truths of one of its batches."""
        found = [sample.gt_instances for sample in data["data_samples"]]
        boxes = [getattr(instances.bboxes, "tensor", instances.bboxes) for instances in found]
        pad = torch.nn.utils.rnn.pad_sequence
        counts = torch.tensor([len(box) for box in boxes])
        labels = pad([instances.labels for instances in found], batch_first=True, padding_value=-1)
        return torch.stack(data["inputs"]), pad(boxes, batch_first=True), labels, counts


def checked(output: tuple[Any, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Losses and all gradients of a step; None for the gradients of a step under autocast that has no exact ones."""
    step, losses = output
    if step.dtype == torch.bfloat16:
        return losses, step.exact
    return losses, gradients(step.model)


def compare(result: tuple[Tensor, Tensor | None], expected: tuple[Tensor, Any], tolerance: tuple[float, float]) -> str:
    losses = relative_error(result[:1], expected[:1], tolerance[0])
    if result[1] is None:
        return f"losses: {losses}, gradients not compared"
    return f"losses: {losses}, gradients: {relative_error([result[1]], [expected[1]], tolerance[1])}"


def our_batches(size: str, batch: int, side: int, workers: int = 0) -> Iterator[tuple[Tensor, ...]]:
    paths = drawn(200, side)
    from rtmdet_fast.data.augment import Augmenter, collate
    from rtmdet_fast.data.coco import CocoDataset
    from rtmdet_fast.data.plan import PlanSampler
    from rtmdet_fast.data.recipes import recipe_for
    from rtmdet_fast.data.workers import init_worker

    data, recipe = CocoDataset(paths.train_ann, paths.train_images, training=True), recipe_for(size, side)
    loader = torch.utils.data.DataLoader(
        Augmenter(data, recipe),
        batch_sampler=PlanSampler(len(data), batch, recipe, 0, workers),
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=init_worker,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
    )
    for found in forever(loader):
        yield found.images, found.gt_boxes, found.gt_labels, found.gt_counts


def their_batches(config: Any, batch: int, side: int) -> Iterator[dict[str, Any]]:
    from mmengine.runner import Runner  # type: ignore[import-not-found]

    paths = drawn(200, side)
    random.seed(0)
    np.random.seed(0)
    from rtmdet_fast.data.shapes import CLASSES as NAMES

    loader = Runner.build_dataloader(
        dict(
            batch_size=batch,
            num_workers=0,
            sampler=dict(type="DefaultSampler", shuffle=True),
            drop_last=True,
            collate_fn=dict(type="pseudo_collate"),
            dataset=dict(
                type="CocoDataset",
                ann_file=str(paths.train_ann),
                data_prefix=dict(img=str(paths.train_images)),
                metainfo=dict(classes=NAMES),
                filter_cfg=dict(filter_empty_gt=True, min_size=8),
                pipeline=resized([dict(step) for step in config.train_pipeline], side),
            ),
        ),
        seed=0,
    )
    yield from forever(loader)
